"""What the points of a plane cost, beside as many batch-norm passes and validations done by hand.

By hand is, for each point: the weights put together in a state dict and loaded, `update_bn` (ours,
or torch's) over the training loader, and `learn.validate` on training and validation set. Timed in
turn, round by round; the multiples are of the first. On a CPU the processor time of the one thread
counts, so that what else the machine does falls on none.

    python benchmarks/landscape.py [--net NAME ...] [--points N] [--rounds N] [--device cpu|cuda]
"""

import argparse
import copy
import statistics
import time
from functools import partial

import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn

from fastai_swa import plane, update_bn
from fastai_swa.vision import PreResNet, WideResNet, cifar


def tiny(n):
    return nn.Sequential(
        nn.AvgPool2d(16), nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, n)
    )


# network, training images, batch size
NETS = {
    'one small layer, batches of 16': (tiny, 1200, 16),
    'WRN-16-1': (partial(WideResNet, 16, 1), 400, 100),
    'PreResNet-110': (partial(PreResNet, 110), 100, 50),
}


def by_hand(learn, states, shares, pass_over):
    for share in shares:
        mixed = {
            k: sum(s * w[k] for s, w in zip(share, states)) if states[0][k].is_floating_point() else states[0][k]
            for k in states[0]
        }
        learn.model.load_state_dict(mixed)
        pass_over(learn.dls.train, learn.model)
        learn.validate(dl=learn.dls.train)
        learn.validate()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--net', nargs='+', default=list(NETS), choices=list(NETS))
    parser.add_argument('--points', type=int, default=3, help='on each axis')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--device', default='cpu')
    args = parser.parse_args()
    on_gpu, n = args.device.startswith('cuda'), args.points
    if not on_gpu:
        torch.set_num_threads(1)
    print(f'torch {torch.__version__}, {args.device}, {n * n} points, {args.rounds} rounds\n')
    print('| network, training + validation images | | ms a point | multiple (middle half) |\n|---|---|--:|--:|')
    for name in args.net:
        network, n_images, bs = NETS[name]
        dls = cifar(
            10,
            'digits',
            padding=None,
            bs=bs,
            n_images=n_images,
            n_valid=n_images // 4,
            device=torch.device(args.device),
        )
        states = []
        for seed in range(3):
            set_seed(seed)
            states.append(network(10).to(args.device).state_dict())
        learn = Learner(dls, network(10).to(args.device), CrossEntropyLossFlat(), metrics=accuracy)
        learn.remove_cb(ProgressCallback)
        shares = [
            (1 - x - y, x, y)
            for x in torch.linspace(-0.2, 1.2, n).tolist()
            for y in torch.linspace(-0.2, 1.2, n).tolist()
        ]
        plain = [copy.deepcopy(s) for s in states]
        variants = {
            'by hand, with `fastai_swa.update_bn`': lambda: by_hand(learn, plain, shares, update_bn),
            "by hand, with torch's `update_bn`": lambda: by_hand(learn, plain, shares, torch.optim.swa_utils.update_bn),
            '**plane**': lambda: plane(learn, states, n),
        }
        clock = time.perf_counter if on_gpu else time.thread_time
        seconds = {v: [] for v in variants}
        for i in range(args.rounds + 1):  # the first warms up
            for v, run in variants.items():
                with learn.no_logging():
                    start = clock()
                    run()
                    if on_gpu:
                        torch.cuda.synchronize()
                    if i:
                        seconds[v].append(clock() - start)
        first = next(iter(variants))
        for v in variants:
            ratios = sorted(a / b for a, b in zip(seconds[v], seconds[first]))
            low, high = (ratios[int(len(ratios) * q)] for q in (0.25, 0.75))
            print(
                f'| {name}, {n_images} + {n_images // 4} | {v} | {1e3 * statistics.median(seconds[v]) / n**2:.1f} | '
                f'{statistics.median(ratios):.3f} ({low:.3f}-{high:.3f}) |',
                flush=True,
            )


if __name__ == '__main__':
    main()
