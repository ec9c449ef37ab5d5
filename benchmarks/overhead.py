"""What `SWACallback` adds to a fit, taken apart, and what its batch-norm pass costs beside torch's
`update_bn`.

A small residual network with batch norm is fitted to random 3x32x32 images, by turns without the
callback and with it. Its parts are timed where they happen: the learner's loop over the validation
set, the learner's loop over the training set for batch norm, and the fold. The rest is what else
the callback's events take: copying the model, finite checks, lending tensors, putting all back.
Rest and fold together are the overhead; beside the timed one stands the difference of the two fits,
which is right as well but much noisier. In the same way: what folding optimizer steps adds, and
what `CheckpointCallback` does; and the state of a ResNet-50 with Adam and an average, taken and
written, beside a bare `torch.save` of the same bytes. With `--tensors N`, instead: what lending the
average to a model of N small parameters takes, beside a fold of it.

    python benchmarks/overhead.py [--epochs N] [--repeats N] [--threads N] [--device cpu|cuda]
    [--tensors N] [--json FILE]
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.basics import DataLoaders, Learner, accuracy
from fastai.optimizer import SGD, Adam
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.models import resnet50

from fastai_swa import CheckpointCallback, SWACallback, WeightAverage, files, update_bn
from fastai_swa.averaging import lent
from fastai_swa.state import take

N_TRAIN, N_VALID, BATCH = 1024, 256, 64


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x):
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.shortcut(x)).relu()


def resnet18(width=8):
    "ResNet-18's blocks at an eighth of its width: 0.18 M parameters, 17 batch-norm layers."
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for i in range(4):
        layers += [Block(width << max(i - 1, 0), width << i, 2 if i else 1), Block(width << i, width << i, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width << 3, 10))


def learner(device):
    torch.manual_seed(0)
    random.seed(0)
    train, valid = (TensorDataset(torch.randn(n, 3, 32, 32), torch.randint(10, (n,))) for n in (N_TRAIN, N_VALID))
    dls = DataLoaders.from_dsets(train, valid, bs=BATCH, num_workers=0, device=torch.device(device))
    return Learner(dls, resnet18().to(device), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=0.01, metrics=accuracy)


class Clock:
    "Seconds spent in named parts, nested ones in both."

    def __init__(self, device):
        self.sync, self.seconds = torch.cuda.synchronize if device == 'cuda' else lambda: None, {}

    @contextmanager
    def __call__(self, part):
        self.sync()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.sync()
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


class TimedSWACallback(SWACallback):
    "`SWACallback` with a clock on its events and on their parts."

    clock, part = None, None

    def __call__(self, event):
        with self.clock('events'):
            return super().__call__(event)

    def _fold(self, **options):
        copies = not self._fit.n_folds
        with self.clock('first fold' if copies else 'later folds'):
            return super()._fold(**options)

    def _refresh(self, *args, **kwargs):
        outer, self.part = self.part, 'batch norm'
        try:
            return super()._refresh(*args, **kwargs)
        finally:
            self.part = outer

    def _evaluate(self):
        self.part = 'validation'
        try:
            return super()._evaluate()
        finally:
            self.part = None


class TimedCheckpointCallback(CheckpointCallback):
    "`CheckpointCallback` with a clock on its events."

    clock, part = None, None

    def __call__(self, event):
        with self.clock('events'):
            return super().__call__(event)


def fit(n_epoch, device, callback=None):
    "Seconds of a fit; with a `callback`, the seconds of its parts are on its clock."
    learn, clock = learner(device), Clock(device)
    if callback is not None:
        callback.clock, loop = clock, learn._do_epoch_validate

        def timed_loop(*args, **kwargs):
            if callback.part is None:
                return loop(*args, **kwargs)
            with clock(callback.part):
                return loop(*args, **kwargs)

        learn._do_epoch_validate = timed_loop
    with learn.no_bar(), learn.no_logging(), clock('fit'):
        learn.fit(n_epoch, cbs=callback)
    return clock.seconds


def measure_fits(n_epoch, repeats, device):
    """Part -> seconds, one for each repeat, the two kinds of fit taking turns in going first; and
    the overhead of a process's first fit.
    """
    fit(1, device)
    first = fit(1, device, TimedSWACallback(swa_start=0))
    rows = []
    for i in range(repeats):
        fits = {}
        for kind in ('plain', 'swa') if i % 2 else ('swa', 'plain'):
            fits[kind] = fit(n_epoch, device, TimedSWACallback(swa_start=1) if kind == 'swa' else None)
        parts = fits['swa']
        passes = parts['validation'] + parts['batch norm']
        folds = parts['first fold'] + parts.get('later folds', 0.0)
        rows.append(
            {
                'plain fit': fits['plain']['fit'],
                'fit with SWACallback': parts['fit'],
                'validation of the average': parts['validation'],
                'batch-norm pass': parts['batch norm'],
                'first fold (copies the model)': parts['first fold'],
                'later folds': parts.get('later folds', 0.0),
                'rest of the events': parts['events'] - passes - folds,
                '**overhead**: folds and rest': parts['events'] - passes,
                'the same, as difference of the fits': parts['fit'] - fits['plain']['fit'] - passes,
            }
        )
    first = first['events'] - first['validation'] - first['batch norm']
    return {part: [row[part] for row in rows] for part in rows[0]}, first


def measure_steps_and_checkpoints(n_epoch, repeats, device):
    """Part -> seconds, one for each repeat: what the callbacks' events take, beside passes over the
    average.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'run.ckpt'
        kinds = {
            'plain fit': lambda: None,
            'folding every step': lambda: TimedSWACallback(1, every=1, swa_eval_freq=0),
            'folding every 10th step': lambda: TimedSWACallback(1, every=10, swa_eval_freq=0),
            'checkpoint of every epoch': lambda: TimedCheckpointCallback(path),
        }
        for _ in range(repeats):
            row, order = {}, list(kinds)
            random.shuffle(order)
            for kind in order:
                callback = kinds[kind]()
                parts = fit(n_epoch, device, callback)
                row[kind] = (
                    parts['fit']
                    if callback is None
                    else parts['events'] - parts.get('validation', 0.0) - parts.get('batch norm', 0.0)
                )
            rows.append(row)
    return {kind: [row[kind] for row in rows] for kind in kinds}


def measure_writing(repeats, device):
    """Way -> seconds, one for each repeat, for the state of a ResNet-50 with Adam and an average;
    and its size in MB.
    """
    learn, swa = learner(device), SWACallback(swa_start=0)
    learn.model, learn.opt_func = resnet50(num_classes=10).to(device), Adam
    learn.dls.train.n = 2 * BATCH
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=swa)
    learn.epoch = 1
    learn.add_cb(swa)
    seconds = {'bare `torch.save` of the state': [], 'state taken': [], 'state written, synced, renamed': []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'run.ckpt'
        for _ in range(repeats):
            clock = Clock(device)
            with clock('take'):
                state = take(learn)
            with clock('write'):
                files.write(path, 'checkpoint', 1, {'state': state})
            with clock('save'):
                with open(Path(folder) / 'bare', 'wb') as f:
                    torch.save(state, f)
            for name, part in zip(seconds, ('save', 'take', 'write')):
                seconds[name].append(clock.seconds[part])
        return seconds, os.path.getsize(path) / 1e6


def measure_bn(repeats, device):
    """Way to refresh batch norm -> seconds, one for each repeat, all over the same batches; and the
    number of batches.
    """
    learn, swa = learner(device), SWACallback(swa_start=0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=swa)
    loader = learn.dls.train.new(shuffle=False, drop_last=False)
    n, model = len(loader), WeightAverage(learn.model).swa_model

    def callback(n_batches):
        swa._average.stale, swa.bn_batches = True, n_batches
        with learn.no_bar():
            swa.refresh()

    @torch.no_grad()
    def plain():
        model.eval()
        for x, _ in loader:
            model(x)
        model.train()

    model.train()
    ways = {
        'torch `update_bn`': lambda: torch.optim.swa_utils.update_bn(loader, model),
        '`fastai_swa.update_bn`': lambda: update_bn(loader, model),
        f'`fastai_swa.update_bn`, n_batches={n // 2}': lambda: update_bn(loader, model, n_batches=n // 2),
        f'`fastai_swa.update_bn`, n_batches={n // 8}': lambda: update_bn(loader, model, n_batches=n // 8),
        '`SWACallback`': lambda: callback(None),
        f'`SWACallback`, bn_batches={n // 2}': lambda: callback(n // 2),
        f'`SWACallback`, bn_batches={n // 8}': lambda: callback(n // 8),
        'forward pass in eval mode, nothing measured': plain,
    }
    return in_turn(ways, repeats, device), n


def measure_lending(n_tensors, repeats, device):
    """What is done -> seconds, one for each repeat, with a model of so many small parameters: a fold, and lending the
    average to the model and taking it back.
    """
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(n_tensors // 2)]).to(device)
    average = WeightAverage(model)
    average.update(model)

    def lend():
        with average.lent_to(model):
            pass

    def lend_anew():
        with lent(average.swa_model, model):
            pass

    ways = {
        'fold: `WeightAverage.update`': lambda: average.update(model),
        '`WeightAverage.lent_to`': lend,
        '`lent`, nothing kept from the time before': lend_anew,
    }
    return in_turn(ways, repeats, device)


def in_turn(ways, repeats, device):
    """Way -> seconds, one for each repeat, of calling it; in each repeat all of them are called once, in random order.
    A round before the first warms up, and builds caches.
    """
    seconds = {name: [] for name in ways}
    order = list(ways)
    for i in range(repeats + 1):
        random.shuffle(order)
        for name in order:
            clock = Clock(device)
            with clock('way'):
                ways[name]()
            if i:
                seconds[name].append(clock.seconds['way'])
    return seconds


def table(title, seconds, unit):
    """Medians of `seconds`, and in proportion to those of `unit` with the middle half of the
    repeats.
    """
    base, lines = (
        statistics.median(seconds[unit]),
        [f'| {title} | seconds | {unit.replace("`", "")} = 100 % |', '|---|--:|--:|'],
    )
    for name, ts in seconds.items():
        low, median, high = (100 * t / base for t in statistics.quantiles(ts, n=4))
        lines.append(f'| {name} | {statistics.median(ts):.4f} | {median:.2f} % ({low:.2f} to {high:.2f}) |')
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, help="default: torch's own choice")
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--tensors', type=int, help='only lend the average of a model of so many parameters')
    parser.add_argument('--json', help='also write the numbers to this file')
    args = parser.parse_args()
    if args.tensors is not None and args.tensors < 2:
        parser.error('--tensors must be at least 2')
    if args.epochs < 2 or args.repeats < 2:
        parser.error('--epochs and --repeats must be at least 2')
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings('ignore')
    device = torch.cuda.get_device_name() if args.device == 'cuda' else 'cpu'
    versions = f'torch {torch.__version__}, {device}, {torch.get_num_threads()} threads.'
    if args.tensors:
        lending = measure_lending(args.tensors, 4 * args.repeats, args.device)
        print(f'{versions} {args.tensors} parameters of at most 16 elements; {4 * args.repeats} repeats.\n')
        print(table('done once', lending, 'fold: `WeightAverage.update`'))
        if args.json:
            write_json(args, device, {'tensors': args.tensors, 'lending': lending})
        return

    fits, first = measure_fits(args.epochs, args.repeats, args.device)
    more = measure_steps_and_checkpoints(args.epochs, args.repeats, args.device)
    writing, size = measure_writing(args.repeats, args.device)
    passes, n_batches = measure_bn(2 * args.repeats, args.device)
    print(
        f'{versions} {args.epochs} epochs of {N_TRAIN} images, validated on {N_VALID}, {args.epochs - 1} of them '
        f'folded; {args.repeats} repeats.\n'
    )
    print(table('part of the fit', fits, 'plain fit'))
    print(f'\nThe first such fit of a process, not counted above: {first:.2f} seconds beside its passes.')
    print(
        f'\n{args.epochs} epochs of {N_TRAIN // BATCH} steps, all but the first folded; a checkpoint of the same '
        'network before each epoch.\n'
    )
    print(table('events of the callback, without passes', more, 'plain fit'))
    print(f'\nResNet-50, Adam, one average: {size:.0f} MB.\n')
    print(table('checkpoint', writing, 'bare `torch.save` of the state'))
    print(f'\n{n_batches} batches of {BATCH}, {2 * args.repeats} repeats.\n')
    print(table('batch-norm pass', passes, 'torch `update_bn`'))
    if args.json:
        write_json(
            args,
            device,
            {
                'epochs': args.epochs,
                'fits': fits,
                'first': first,
                'steps and checkpoints': more,
                'writing': writing,
                'MB': size,
                'passes': passes,
            },
        )


def write_json(args, device, numbers):
    with open(args.json, 'w') as f:
        json.dump(
            {'torch': torch.__version__, 'device': device, 'threads': torch.get_num_threads()} | numbers, f, indent=1
        )


if __name__ == '__main__':
    main()
