"""`python -m fastai_swa demo`."""
import argparse

import matplotlib
import torch


def main(argv=None):
    "Run the command line `argv`; a mistake in it, or in the data it names, is one sentence and exit status 2."
    parser = argparse.ArgumentParser(prog='python -m fastai_swa', description='Weight averaging for fastai.')
    commands = parser.add_subparsers(dest='command', required=True)
    p = commands.add_parser('demo', help='SGD and SWA side by side, on digits or on your images',
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument('--data', metavar='FOLDER', help='images as train/<class>/* and test|valid/<class>/*; without it: digits')
    p.add_argument('--arch', default='resnet18', help="one of torchvision's classifiers, for --data")
    p.add_argument('--epochs', type=_positive, default=12, help='epochs of each run')
    p.add_argument('--seeds', type=_positive, help='repetitions (default: 5 on digits, 1 on images)')
    p.add_argument('--lr', type=float, default=.1, help='initial learning rate')
    p.add_argument('--swa-lr', type=float, help='learning rate while averaging (default: half of --lr)')
    p.add_argument('--swa-start', type=_int_or_float, default=.5, help='first epoch folded, from 0, or a share of the epochs')
    p.add_argument('--bs', type=_positive, help='batch size (default: 32 on digits, 64 on images)')
    p.add_argument('--size', type=_positive, help="side of the images in pixels (default: the first image's, at most 224)")
    p.add_argument('--pretrained', action='store_true', help="start from torchvision's weights (downloads them)")
    p.add_argument('--out', default='swa-demo', help='name of the files written, without an ending')
    args = vars(parser.parse_args(argv))
    matplotlib.use('agg')
    from .demo import demo    # imports fastai, which takes seconds
    del args['command']
    if args['data'] is None: torch.set_num_threads(1)    # the network is tiny: a second thread only waits
    try: demo(**args)
    except (ValueError, OSError) as e: p.error(' '.join(str(e).split()))


def _positive(text):
    if not text.isdigit() or int(text) < 1: raise argparse.ArgumentTypeError(f'expected a positive whole number, not {text!r}')
    return int(text)


def _int_or_float(text):
    try: return int(text) if text.lstrip('-').isdigit() else float(text)
    except ValueError: raise argparse.ArgumentTypeError(f'expected an epoch or a share in [0, 1), not {text!r}') from None


if __name__ == '__main__': main()
