"""What a checkpoint costs after many steps, and after many fits on one path.

    python benchmarks/checkpoints.py [--steps 1e3 1e4 1e5 1e6] [--fits 20] [--json FILE]

Steps are not trained: the histories that fastai keeps of each (losses, learning rates, hyper-parameters of a scheduler)
are filled up to their number, with an epoch for every 100 of them, and what follows are real epochs of 100 steps.
"""

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from time import perf_counter

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.foundation import L
from torch import nn

from fastai_swa import CheckpointCallback, SWACallback

AN_EPOCH = 100  # steps
WIDTH = 1000  # of the network, of a million parameters


def learner(path: Path) -> Learner:
    set_seed(0)
    samples = [(torch.randn(8), torch.tensor(i % 3)) for i in range(AN_EPOCH * 2)]
    dls = DataLoaders(DataLoader(samples, bs=2), DataLoader(samples[:8], bs=8), device='cpu')
    model = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    return Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, path=path)


class Fill(Callback):
    "Before the epoch 1: as if so many steps had been done."

    order = -2000

    def __init__(self, n_steps):
        self.n_steps = n_steps

    def before_epoch(self):
        if self.epoch != 1:
            return
        recorder = self.learn.recorder
        more = self.n_steps - len(recorder.lrs)
        recorder.lrs += [1e-3 * i / self.n_steps for i in range(more)]
        recorder.losses += list(torch.rand(more).unbind())
        scheduler = next(cb for cb in self.learn.cbs if isinstance(cb, ParamScheduler))
        for values in scheduler.hps.values():
            values += [1e-3 * i / self.n_steps for i in range(more)]
        recorder.iters += [AN_EPOCH * i for i in range(more // AN_EPOCH)]
        recorder.values += [L(0.5, 0.25, 0.125) for _ in range(more // AN_EPOCH)]
        checkpoint = next(cb for cb in self.learn.cbs if isinstance(cb, CheckpointCallback))
        checkpoint._rows += [[i, 0.5, 0.25, 0.125, '00:01'] for i in range(more // AN_EPOCH)]


class Timed(CheckpointCallback):
    "Notes the seconds and bytes of what it writes; of each fit anew."

    def before_fit(self):
        self.costs = []
        super().before_fit()

    def _sizes(self) -> dict:
        return {file.name: file.stat().st_size for file in self.file.parent.glob(f'{self.file.name}*')}

    def _write(self):
        before = self._sizes()
        start = perf_counter()
        super()._write()
        seconds = perf_counter() - start
        after = self._sizes()
        beside = sum(size - before.get(name, 0) for name, size in after.items() if name != self.file.name)
        self.costs.append({'s': seconds, 'written': after[self.file.name] + beside, 'on disk': sum(after.values())})


def fit(learn, n_epoch, *cbs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, 1e-3, cbs=cbs)


def after_steps(folder: Path, n_steps: int) -> dict:
    "Of a checkpoint after so many steps; the least of two times."
    checkpoint = Timed(folder / 'run.ckpt')
    scheduler = ParamScheduler({'lr': SchedCos(1e-3, 1e-4), 'mom': SchedCos(0.95, 0.9)})
    fit(learner(folder), 4, scheduler, SWACallback(0), Fill(n_steps), checkpoint)
    *_, a, b = checkpoint.costs
    return {'steps': n_steps, **b, 's': min(a['s'], b['s'])}


def after_fits(folder: Path, n_fits: int) -> list[dict]:
    "Of a checkpoint in the 1st, 2nd ... fit on one path: the one before its second epoch."
    learn = learner(folder)
    rows = []
    for i in range(n_fits):
        checkpoint = Timed(folder / 'run.ckpt')
        fit(learn, 2, SWACallback(0), checkpoint)
        first, second = checkpoint.costs
        rows.append({'fit': i + 1, **second, 'first s': first['s'], 'first written': first['written']})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--steps', type=float, nargs='*', default=[1e3, 1e4, 1e5, 1e6])
    parser.add_argument('--fits', type=int, default=20)
    parser.add_argument('--json')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    found = {'steps': [], 'fits': []}
    print('| steps done | seconds | MB written | MB on disk |\n|---|---|---|---|')
    for n in args.steps:
        with tempfile.TemporaryDirectory() as folder:
            row = after_steps(Path(folder), int(n))
        found['steps'].append(row)
        print(f'| {int(n):,} | {row["s"]:.3f} | {_mb(row["written"])} | {_mb(row["on disk"])} |', flush=True)
    print('\n| fit | seconds | MB written | MB on disk | the first one of the fit: seconds | MB written |')
    print('|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        found['fits'] = after_fits(Path(folder), args.fits)
    for row in found['fits']:
        if row['fit'] in (1, 2, 5, 10, 20, args.fits):
            print(
                f'| {row["fit"]} | {row["s"]:.3f} | {_mb(row["written"])} | {_mb(row["on disk"])} | '
                f'{row["first s"]:.3f} | {_mb(row["first written"])} |'
            )
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + '\n')


def _mb(n) -> str:
    return f'{n / 1e6:.2f}'


if __name__ == '__main__':
    main()
