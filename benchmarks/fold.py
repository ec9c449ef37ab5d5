"""What one fold costs: `WeightAverage.update` beside the peers and beside the limit that memory
sets.

The limit is one in-place `lerp_` of a flat float32 vector with as many elements as the network has
parameters. Every contender has its own copy of the network and its own average; each round times
one fold of each, in an order drawn anew, so that drift of the machine and the state of its caches
hit all alike. Times are medians over the rounds; multiples of the limit carry in brackets the
middle half of the rounds. Before anything is timed, each contender must have moved every parameter
of its average. PreResNet-110, whose fold is short, gets five times as many rounds.

`WeightAverage` is timed where it sums in two levels, beyond its first 128 points; what the merge at the end of a
block of 128 takes is timed by itself, and its share is in "x bare": the multiple of the bare `_foreach_lerp_`.

A second table has one, two and four averages of the PreResNet-110 a step, of different decays, and the memory of all
tensors that they keep, the model's own left out. `--several` makes this one alone.

    python benchmarks/fold.py [--rounds N] [--threads N] [--device cpu|cuda] [--several] [--json FILE]

The peers come with `pip install timm ema-pytorch torch-ema fastxtend lightning ultralytics`; those
that are missing are named.
"""

import argparse
import copy
import gc
import itertools
import json
import random
import statistics
import time
import warnings
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace

import torch
from torch import nn
from torchvision.models import resnet50

from fastai_swa import WeightAverage, ema
from fastai_swa.averaging.average import BLOCK

DECAY = 0.99


class PreActBottleneck(nn.Module):
    def __init__(self, c_in, width, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, width, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, 4 * width, 1, bias=False)
        self.shortcut = nn.Identity() if c_in == 4 * width else nn.Conv2d(c_in, 4 * width, 1, stride, bias=False)

    def forward(self, x):
        y = self.conv1(self.bn1(x).relu())
        y = self.conv2(self.bn2(y).relu())
        return self.conv3(self.bn3(y).relu()) + self.shortcut(x)


def preresnet110(n_out=10):
    layers, c_in = [nn.Conv2d(3, 16, 3, padding=1, bias=False)], 16
    for width, stride in (16, 1), (32, 2), (64, 2):
        for i in range(12):
            layers.append(PreActBottleneck(c_in, width, stride if i == 0 else 1))
            c_in = 4 * width
    return nn.Sequential(
        *layers, nn.BatchNorm2d(c_in), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, n_out)
    )


# a contender: a function of the model that returns its fold, and a function that gives the tensors of its average


def flat(model):
    n, device = sum(p.numel() for p in model.parameters()), next(model.parameters()).device
    average, point = torch.zeros(n, device=device), torch.randn(n, device=device)
    return lambda: average.lerp_(point, 1 - DECAY), lambda: [average]


def cached_lists(model):
    average = [p.detach().clone() for p in model.parameters()]
    points = [p.detach() for p in model.parameters()]
    return lambda: torch._foreach_lerp_(average, points, 1 - DECAY), lambda: average


def weight_average(model):
    average = WeightAverage(model, ema(DECAY))
    for _ in range(BLOCK):
        average.update(model)
    fold = partial(average.update, model)
    fold.settle = average.settle
    return fold, lambda: average.swa_model.parameters()


def naive_loop(model):
    average = copy.deepcopy(model)

    @torch.no_grad()
    def fold():
        for a, p in zip(average.parameters(), model.parameters()):
            a.lerp_(p, 1 - DECAY)

    return fold, average.parameters


def averaged_model(model, **kwargs):
    average = torch.optim.swa_utils.AveragedModel(model, **kwargs)
    return lambda: average.update_parameters(model), average.parameters


def averaged_model_multi(model):
    return averaged_model(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY))


def ultralytics_ema(model):
    from ultralytics.utils.torch_utils import ModelEMA

    average = ModelEMA(model, tau=1)
    return lambda: average.update(model), average.ema.parameters


def fastxtend_ema(model, foreach):
    from fastxtend.callback.ema import EMACallback

    callback = EMACallback(decay=DECAY, foreach=foreach)
    callback.learn = SimpleNamespace(model=model)
    callback.before_fit()
    callback._do_ema = True
    return callback.after_batch, callback.ema_model.parameters


def fastxtend_loop(model):
    return fastxtend_ema(model, False)


def fastxtend_foreach(model):
    return fastxtend_ema(model, True)


def ema_pytorch_loop(model, use_foreach=False):
    from ema_pytorch import EMA

    average = EMA(model, beta=DECAY, update_after_step=0, update_every=1, use_foreach=use_foreach)
    return average.update, average.ema_model.parameters


def ema_pytorch_foreach(model):
    return ema_pytorch_loop(model, True)


def torch_ema(model):
    from torch_ema import ExponentialMovingAverage

    average = ExponentialMovingAverage(model.parameters(), DECAY)
    return lambda: average.update(model.parameters()), lambda: average.shadow_params  # it keeps only weak references


def timm_ema(model, dtype=None):
    from timm.utils import ModelEmaV3

    average = ModelEmaV3(model, decay=DECAY, dtype=dtype)
    return lambda: average.update(model), average.module.parameters


def timm_float32(model):
    return timm_ema(model, torch.float32)


def lightning_swa(model):
    from lightning.pytorch.callbacks import StochasticWeightAveraging as SWA

    average, n_averaged = copy.deepcopy(model), torch.tensor(0, device=next(model.parameters()).device)
    return lambda: SWA.update_parameters(average, model, n_averaged, SWA.avg_fn), average.parameters


def lightning_ema(model):
    from lightning.pytorch import LightningModule
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module, trainer = LightningModule(), SimpleNamespace(global_step=0)
    module.model = model
    module.to(next(model.parameters()).device)
    callback = EMAWeightAveraging(decay=DECAY)
    callback.setup(trainer, module, 'fit')

    def fold():
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, None, 0)

    return fold, callback._average_model.parameters


CONTENDERS = (  # name, distribution, what becomes of the buffers, dtype of the model, function
    ('one flat `lerp_`: the limit', 'torch', '-', torch.float32, flat),
    ('`_foreach_lerp_` over cached lists, nothing checked', 'torch', 'ignored', torch.float32, cached_lists),
    ('**WeightAverage.update**', 'fastai_swa', 'copied, batch norm when used', torch.float32, weight_average),
    ('ModelEMA', 'ultralytics', 'floats averaged, integers ignored', torch.float32, ultralytics_ema),
    ('EMACallback, foreach=True', 'fastxtend', 'floats averaged, integers not', torch.float32, fastxtend_foreach),
    ('EMACallback, foreach=False', 'fastxtend', 'ignored', torch.float32, fastxtend_loop),
    ('EMA, use_foreach=True', 'ema-pytorch', 'floats averaged, integers ignored', torch.float32, ema_pytorch_foreach),
    ('EMA', 'ema-pytorch', 'floats averaged, integers ignored', torch.float32, ema_pytorch_loop),
    ('ExponentialMovingAverage', 'torch-ema', 'ignored', torch.float32, torch_ema),
    ('ModelEmaV3', 'timm', 'floats averaged, integers copied', torch.float32, timm_ema),
    ('naive loop of `lerp_`', 'torch', 'ignored', torch.float32, naive_loop),
    ('AveragedModel, multi_avg_fn', 'torch', 'all copied', torch.float32, averaged_model_multi),
    ('AveragedModel', 'torch', 'all copied', torch.float32, averaged_model),
    ('StochasticWeightAveraging', 'lightning', 'ignored', torch.float32, lightning_swa),
    ('EMAWeightAveraging', 'lightning', 'all averaged', torch.float32, lightning_ema),
    (
        '**WeightAverage.update**, bf16 model, float32 master',
        'fastai_swa',
        'copied, batch norm when used',
        torch.bfloat16,
        weight_average,
    ),
    ('ModelEmaV3, bf16 model, dtype=float32', 'timm', 'floats averaged, integers copied', torch.bfloat16, timm_float32),
)


def build(network, device):
    "Row number -> fold; and row number -> why there is none."
    folds, missing = {}, {}
    for i, (name, _, _, dtype, make) in enumerate(CONTENDERS):
        model = copy.deepcopy(network).to(device, dtype)
        try:
            fold, average = make(model)
        except Exception as e:
            missing[i] = 'not installed' if isinstance(e, ImportError) else f'failed: {type(e).__name__}'
            continue
        for _ in range(3):
            fold()  # the first ones build caches, or copy
        before = [t.detach().clone() for t in average()]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        fold()
        if any(torch.equal(a, b) for a, b in zip(average(), before, strict=True)):
            raise RuntimeError(f'{name} did not fold every parameter')
        folds[i] = fold
    return folds, missing


def measure(folds, rounds, device):
    "Row number -> seconds, one for each round."
    sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
    seconds, order = {i: [] for i in folds}, list(folds)
    for _ in range(rounds):
        random.shuffle(order)
        for i in order:
            sync()
            start = time.perf_counter()
            folds[i]()
            sync()
            seconds[i].append(time.perf_counter() - start)
    return seconds


def merging(fold, device) -> float:
    "Seconds that each fold takes of the merge at the end of a block; 0 where there are no blocks."
    settle = getattr(fold, 'settle', None)
    if settle is None:
        return 0.0
    seconds = []
    for _ in range(11):
        fold()
        seconds += measure({0: settle}, 1, device)[0]
    return statistics.median(seconds) / BLOCK


def summary(seconds, merges):
    "Row number -> median milliseconds, multiples of the limit and of the bare kernel, and the quartiles of the former."
    limit = statistics.median(seconds[0])
    bare = statistics.median(seconds[1])
    res = {}
    for i, ts in seconds.items():
        low, median, high = statistics.quantiles(ts, n=4)
        res[i] = {
            'ms': 1000 * median,
            'multiple': median / limit,
            'low': low / limit,
            'high': high / limit,
            'of_bare': (median + merges.get(i, 0.0)) / bare,
        }
    return res


def table(results, missing):
    lines = [
        '| fold | package | buffers | ' + ' | '.join(f'{name}, ms | x limit | x bare' for name in results) + ' |',
        '|---|---|---|' + '--:|--:|--:|' * len(results),
    ]
    for i, (name, package, buffers, *_) in enumerate(CONTENDERS):
        numbers = ' | '.join(cells(rows[i]) if i in rows else f'{missing[i]} | - | -' for rows in results.values())
        lines.append(f'| {name} | {label(package)} | {buffers} | {numbers} |')
    return '\n'.join(lines)


def cells(row):
    return f'{row["ms"]:.2f} | {row["multiple"]:.2f} ({row["low"]:.2f}-{row["high"]:.2f}) | {row["of_bare"]:.2f}'


def label(package):
    if package == 'fastai_swa':
        return 'fastai_swa'
    try:
        return f'{package} {version(package)}'
    except ImportError:
        return package


# several averages of one model


def averages_in_step(model, decays):
    averages = [WeightAverage(model, ema(decay)) for decay in decays]
    steps = itertools.count()

    def fold():
        step = next(steps)
        for average in averages:
            average.update(model, step)

    for _ in range(BLOCK + 2):
        fold()
    return fold


def lists_in_step(model, decays):
    averages = [[p.detach().clone() for p in model.parameters()] for _ in decays]
    points = [p.detach() for p in model.parameters()]

    def fold():
        for average, decay in zip(averages, decays):
            torch._foreach_lerp_(average, points, 1 - decay)

    return fold


def ultralytics_in_step(model, decays):
    from ultralytics.utils.torch_utils import ModelEMA

    averages = [ModelEMA(model, decay, tau=1) for decay in decays]

    def fold():
        for average in averages:
            average.update(model)

    fold()
    return fold


def multi_in_step(model, decays):
    averaged = torch.optim.swa_utils.AveragedModel
    multi = torch.optim.swa_utils.get_ema_multi_avg_fn
    averages = [averaged(model, multi_avg_fn=multi(decay)) for decay in decays]

    def fold():
        for average in averages:
            average.update_parameters(model)

    fold()
    return fold


SEVERAL = {
    '`_foreach_lerp_` over cached lists, nothing checked': lists_in_step,
    '**WeightAverage.update**': averages_in_step,
    'ModelEMA of ultralytics': ultralytics_in_step,
    'AveragedModel, multi_avg_fn': multi_in_step,
}
NUMBERS = 1, 2, 4


def tensor_bytes() -> int:
    "Of all tensors alive, each storage once."
    gc.collect()
    storages = {}
    for o in gc.get_objects():
        if isinstance(o, torch.Tensor):
            storages[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return sum(storages.values())


def measure_several(network, rounds, device):
    "(name, number of averages) -> seconds a step, one for each round; and bytes."
    folds = {}
    memory = {}
    for name, make in SEVERAL.items():
        for n in NUMBERS:
            model = copy.deepcopy(network).to(device)
            before = tensor_bytes()
            try:
                folds[name, n] = make(model, [DECAY, 0.999, 0.9, 0.9999][:n])
            except ImportError:
                continue
            memory[name, n] = tensor_bytes() - before
    return measure(folds, rounds, device), memory


def table_of_several(seconds, memory):
    lines = [
        '| averages a step | ' + ' | '.join(f'{n}: ms | x bare | MB' for n in NUMBERS) + ' |',
        '|---|' + '--:|--:|--:|' * len(NUMBERS),
    ]
    bare = {n: statistics.median(seconds[next(iter(SEVERAL)), n]) for n in NUMBERS}
    for name in SEVERAL:
        row = []
        for n in NUMBERS:
            if (name, n) in seconds:
                median = statistics.median(seconds[name, n])
                row += [f'{1000 * median:.2f}', f'{median / bare[n]:.2f}', f'{memory[name, n] / 1e6:.1f}']
            else:
                row += ['not installed', '-', '-']
        lines.append(f'| {name} | ' + ' | '.join(row) + ' |')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=60)
    parser.add_argument('--threads', type=int, help="default: torch's own choice")
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--several', action='store_true', help='only the table of several averages')
    parser.add_argument('--json', help='also write the numbers to this file')
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error('--rounds must be at least 2')
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings('ignore')
    torch.manual_seed(0)
    random.seed(0)

    if not args.several:
        compare(args)
    seconds, memory = measure_several(preresnet110(), 5 * args.rounds, args.device)
    print(f'\nPreResNet-110, {torch.get_num_threads()} threads, {5 * args.rounds} rounds.\n')
    print(table_of_several(seconds, memory))


def compare(args):
    "The first table."
    results, rounds, sizes = {}, {}, []
    for name, network, times in ('ResNet-50', resnet50, 1), ('PreResNet-110', preresnet110, 5):
        network = network()
        folds, missing = build(network, args.device)
        rounds[name] = args.rounds * times
        seconds = measure(folds, rounds[name], args.device)
        merges = {i: merging(fold, args.device) for i, fold in folds.items()}
        results[name] = summary(seconds, merges)
        numels = [p.numel() for p in network.parameters()]
        sizes.append(
            f'{name}: {sum(numels) / 1e6:.2f} M parameters in {len(numels)} tensors, {len(list(network.buffers()))} '
            f'buffers, {rounds[name]} rounds'
        )
        del folds
        gc.collect()

    device = torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu'
    print(f'torch {torch.__version__}, {device}, {torch.get_num_threads()} threads. ' + '. '.join(sizes) + '.\n')
    print(table(results, missing))
    if args.json:
        rows = [
            {
                'fold': name.replace('*', ''),
                'package': label(package),
                **{net: r.get(i, missing.get(i)) for net, r in results.items()},
            }
            for i, (name, package, *_) in enumerate(CONTENDERS)
        ]
        with open(args.json, 'w') as f:
            json.dump(
                {
                    'torch': torch.__version__,
                    'device': device,
                    'threads': torch.get_num_threads(),
                    'rounds': rounds,
                    'rows': rows,
                },
                f,
                indent=1,
            )


if __name__ == '__main__':
    main()
