"""`python -m fastai_swa demo`, `reproduce` and `report`.

fastai and torch are imported when a command runs: `--help`, `--version` and mistakes are there at once.
"""

import argparse
import os
import re
import sys
import warnings
from contextlib import suppress
from time import time

from .version import __version__


def main(argv=None):
    """Run the command line `argv`; a mistake in it, or in the data it names, is one sentence and
    exit status 2.

    Exit status 1 if `reproduce` could not complete a seed for another reason than the time given.
    """
    start = time()
    parser = argparse.ArgumentParser(prog='python -m fastai_swa', description='Weight averaging for fastai.')
    parser.add_argument('--version', action='version', version=f'fastai_swa {__version__}')
    commands = parser.add_subparsers(dest='command', required=True)
    _add_demo(commands)
    _add_reproduce(commands)
    _add_report(commands)
    args = vars(parser.parse_args(argv))
    name = args.pop('command')
    p = commands.choices[name]
    run = {'demo': _demo, 'reproduce': _reproduce, 'report': _report}[name]
    try:
        status = run(args, start)
        sys.stdout.flush()
        p.exit(status)
    except BrokenPipeError:  # who reads it has seen enough, as `head`
        with suppress(AttributeError, OSError):  # a stream that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at the end
        p.exit(1)
    except (ValueError, OSError) as e:
        p.error(' '.join(str(e).split()))
    except KeyboardInterrupt:
        p.exit(130, 'interrupted\n')


def _add_demo(commands):
    p = commands.add_parser(
        'demo',
        help='SWA, SGD and one-cycle side by side, on digits or on your images',
        formatter_class=_Defaults,
    )
    p.add_argument(
        '--data', metavar='FOLDER', help='images as train/<class>/* and test|valid/<class>/*; without it: digits'
    )
    p.add_argument('--arch', default='resnet18', help="one of torchvision's classifiers, for --data")
    p.add_argument('--epochs', type=_positive, default=12, help='epochs of each run')
    p.add_argument('--seeds', type=_positive, help='repetitions (default: 5 on digits, 1 on images)')
    p.add_argument('--lr', type=float, default=0.1, help='initial learning rate')
    p.add_argument('--swa-lr', type=float, help='learning rate while averaging (default: half of --lr)')
    p.add_argument(
        '--swa-start', type=_int_or_float, default=0.5, help='first epoch averaged, from 0, or a share of the epochs'
    )
    p.add_argument('--bs', type=_positive, help='batch size (default: 32 on digits, 64 on images)')
    p.add_argument(
        '--size', type=_positive, help="side of the images in pixels (default: the first image's, at most 224)"
    )
    p.add_argument('--pretrained', action='store_true', help="start from torchvision's weights (downloads them)")
    p.add_argument(
        '--label-noise', type=float, default=0.2, help="share of the digits' training labels that is drawn at random"
    )
    p.add_argument('--out', default='swa-demo', help='name of the files written, without an ending')


def _add_reproduce(commands):
    p = commands.add_parser(
        'reproduce',
        help="train one of the papers' recipes, seed by seed; the same command goes on with an interrupted one",
        formatter_class=_Defaults,
    )
    p.add_argument('name', nargs='?', help='the recipe, such as small-cifar100')
    p.add_argument('--list', action='store_true', help='print all recipes, with their sizes and times, and end')
    p.add_argument('--seeds', type=_positive, default=1, help='the seeds 0 to SEEDS - 1; those that are complete stay')
    p.add_argument('--out', help='folder for what is found and kept (default: results/NAME)')
    p.add_argument(
        '--data',
        metavar='FOLDER',
        help="images as train/<class>/* and test/<class>/*, or torchvision's files (downloaded if they are "
        'missing); "digits" to try things (default: the environment\'s CIFAR10_DIR or CIFAR100_DIR, else '
        '~/.fastai/data). '
        'For tabular- and text-: a folder with the CSV files (default: FASTAI_SWA_DATA, else the current one). '
        'For clothing-soup: photos as train/<class>/*, valid/<class>/* and test/<class>/*. '
        'For imagenet-: images as train/<class>/* and val/<class>/*, and, or it is downloaded, the state dict that '
        'tails go on from, such as resnet50.pth',
    )
    p.add_argument('--scale', type=float, default=1.0, help='multiply all lengths by this, and numbers of points')
    p.add_argument('--images', type=_positive, help='so many training images (default: as many as the recipe says)')
    p.add_argument('--test-images', type=_positive, help='so many test images (default: all)')
    p.add_argument(
        '--jobs', type=_positive, default=1, help='so many seeds at a time, on one GPU or on shares of the CPU'
    )
    p.add_argument(
        '--threads',
        type=_positive,
        help="of the CPU for each seed (default: an equal share); results depend on it in the last bits",
    )
    p.add_argument('--until', type=_seconds, metavar='TIME', help='stop in time, such as 8m: 90s, 8m, 1.5h')
    p.add_argument('--device', help='default: cuda if there is one, else cpu')
    p.add_argument(
        '--precision',
        choices=('fp32', 'bf16'),
        help='bf16: autocast, weights in float32; some CPUs are slow in it (default: bf16 on a GPU, fp32 on a CPU)',
    )
    p.add_argument(
        '--compile',
        choices=('default', 'reduce-overhead', 'max-autotune'),
        help='torch.compile; reduce-overhead captures steps',
    )
    p.add_argument(
        '--solutions',
        metavar='FOLDER',
        help='for width-, plane- and curve-: where reproduce has left the weights (default: the folder of their recipe '
        'beside --out)',
    )
    p.add_argument(
        '--deterministic',
        action='store_true',
        help='use only GPU kernels that always give the same: slower, and an interrupted run ends bitwise as the whole '
        'one',
    )


def _add_report(commands):
    p = commands.add_parser(
        'report',
        help="tables and figures of what reproduce has found; of several folders also the paper's own table, of two "
        'the differences',
    )
    p.add_argument('folders', nargs='+', metavar='FOLDER', help='what reproduce was given as --out')


class _Defaults(argparse.HelpFormatter):
    "Adds a default where there is one and the help does not say it already."

    def _get_help_string(self, action):
        is_said = '(default' in action.help
        is_none = action.default in (None, False, argparse.SUPPRESS)
        return action.help if is_said or is_none else f'{action.help} (default: %(default)s)'


# each imports fastai, which takes seconds


def _without_windows():
    import matplotlib

    matplotlib.use('agg')


def _demo(args, start):
    import torch

    _without_windows()
    from .demo import demo

    with suppress(AttributeError):  # a stream that is no file
        sys.stdout.reconfigure(line_buffering=True)  # or a pipe would see nothing for minutes

    if args['data'] is None:
        torch.set_num_threads(1)  # the network is tiny: a second thread only waits
    demo(**args)


def _reproduce(args, start):
    if args.pop('list'):
        _list()
        return 0
    if args['name'] is None:
        raise ValueError('name is missing: which recipe? `reproduce --list` prints them')
    import torch

    _without_windows()
    from .experiments import Settings, reproduce
    from .experiments.pool import STOPPED

    device = args['device'] or ('cuda' if torch.cuda.is_available() else 'cpu')
    precision = args['precision'] or ('bf16' if device.startswith('cuda') else 'fp32')
    settings = Settings(
        args['scale'], args['images'], args['test_images'], device, precision, args['compile'], args['deterministic']
    )
    until = start + (float('inf') if args['until'] is None else args['until'])
    missing = reproduce(
        args['name'],
        args['seeds'],
        args['out'],
        args['data'],
        settings,
        args['jobs'],
        args['threads'],
        until,
        solutions=args['solutions'],
    )
    for sentence in dict.fromkeys(missing.values()):
        seeds = [str(seed) for seed, s in missing.items() if s == sentence]
        print(f'{"seed" if len(seeds) == 1 else "seeds"} {", ".join(seeds)}: {sentence}', file=sys.stderr)
    return int(any(s != STOPPED for s in missing.values()))


def _list():
    from .experiments.listing import listing

    print(listing())


def _report(args, start):
    _without_windows()
    from .experiments.report import compare, is_of_budgets, papers_table, report

    folders = args['folders']
    for folder in folders:
        print(report(folder))
    if len(folders) < 2 or not all(map(is_of_budgets, folders)):
        return
    print(papers_table(folders) + '\n')
    if len(folders) == 2:
        print(compare(*folders))


def _positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'expected a positive whole number, not {text!r}')
    return int(text)


def _seconds(text):
    match = re.fullmatch(r'([0-9]*\.?[0-9]+)([smh])', text)
    if not match:
        raise argparse.ArgumentTypeError(f'expected a time such as 90s, 8m or 1.5h, not {text!r}')
    return float(match[1]) * {'s': 1, 'm': 60, 'h': 3600}[match[2]]


def _int_or_float(text):
    try:
        return int(text) if text.lstrip('-').isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'expected an epoch or a share in [0, 1), not {text!r}') from None


# what the libraries say of each other, and the user of a command cannot mend: the message's start, its kind
_OF_LIBRARIES = (
    ('`torch.jit.script` is deprecated', FutureWarning),  # fastai.layers, with newer torch
    ("The 'mode.chained_assignment' option is deprecated", DeprecationWarning),  # fastai.tabular, with pandas >= 3
)


def _hide_warnings_of_libraries():
    "In this process, and in those that it starts."
    for message, category in _OF_LIBRARIES:
        warnings.filterwarnings('ignore', re.escape(message), category)
        sys.warnoptions.append(f'ignore:{message}:{category.__name__}')


if __name__ == '__main__':
    _hide_warnings_of_libraries()
    main()
