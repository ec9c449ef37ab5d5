"""The most memory that each thing takes, in sizes of the model.

A process of its own for each row makes a network of eight layers of a million parameters (32 MB) on eight samples, and
tells two numbers: what is there before (the learner, its optimizer, the solutions given), and the most that is there
meanwhile, that included. What the same code takes with a tiny network, libraries among it, is no part of either.

What counts is the resident memory of the process. Its peak is the kernel's own (`VmHWM`, set back first), so that
nothing is missed: temporary tensors within an operation, NumPy's, and what `torch.load` reads. The allocator is told to
give back at once what is freed. Pages of a file that is mapped do not count: the system takes them back when it needs
them. Where such come, the peak is that of samples, a thousand a second. Linux only.

    python benchmarks/memory.py [--only TEXT] [--against FOLDER]

`--against`: a checkout of another commit, which is measured as well.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from fastai_swa import (
    CheckpointCallback,
    Curve,
    Ensemble,
    SWACallback,
    WeightAverage,
    average_checkpoints,
    line,
    plane,
    rays,
    update_bn,
)

WIDTH, DEPTH = 1024, 8


def network(width):
    layers = [nn.Linear(width, width, bias=False) for _ in range(DEPTH)]
    return nn.Sequential(*layers, nn.BatchNorm1d(width))


def learner(width, n_steps=2, n_epoch=1) -> Learner:
    "Trained a little by Adam, fastai's default, so that gradients and moments are there."
    x = torch.randn(4, width)
    data = [(x[i % 4], torch.tensor(i % 2)) for i in range(4 * n_steps)]
    dls = DataLoaders(DataLoader(data, bs=4, shuffle=True), DataLoader(data[:8], bs=4))
    learn = Learner(dls, network(width), CrossEntropyLossFlat(), lr=1e-6)
    learn.remove_cb(ProgressCallback)
    learn.logger = lambda *args: None
    learn.fit(n_epoch, cbs=ShortEpochCallback(1e-9))
    return learn


def states(width, n) -> list[dict]:
    return [network(width).state_dict() for _ in range(n)]


def files(width, folder, n) -> list[Path]:
    res = [folder / f'{i}.pth' for i in range(n)]
    for file in res:
        torch.save(network(width).state_dict(), file)
    return res


class Stop(Callback):
    "Ends the fit before the first step of an epoch as a crash would."

    def before_train(self):
        if self.epoch == 1:
            raise KeyboardInterrupt


# the rows: what stands before `yield` is there before


def fit(width, folder):
    learn = learner(width)
    yield
    learn.fit(2)


def fit_swa(width, folder):
    learn = learner(width)
    yield
    learn.fit(3, cbs=SWACallback(0))


def fit_steps(width, folder):
    learn = learner(width, 130)
    yield
    learn.fit(2, cbs=SWACallback(0, every=1))


def fit_again(width, folder):
    learn = learner(width)
    swa = SWACallback(0)
    learn.fit(1, cbs=swa)
    yield
    learn.fit(2, cbs=swa)


def fit_checkpointed(width, folder):
    learn = learner(width)
    yield
    learn.fit(2, cbs=CheckpointCallback(folder / 'fit.ckpt'))


def fit_four_times(width, folder):
    learn = learner(width)
    yield
    for _ in range(4):
        learn.fit(1, cbs=CheckpointCallback(folder / 'fit.ckpt'))


def fit_until_stopped(learn, folder, *cbs):
    try:
        learn.fit(3, cbs=[*cbs, CheckpointCallback(folder / 'fit.ckpt'), Stop()])
    except KeyboardInterrupt:
        pass


def interrupt(width, folder):
    fit_until_stopped(learner(width, n_epoch=0), folder)


def resume(width, folder):
    learn = learner(width, n_epoch=0)  # as a new run of the program makes it
    yield
    fit_until_stopped(learn, folder)


def interrupt_swa(width, folder):
    fit_until_stopped(learner(width, n_epoch=0), folder, SWACallback(0))


def resume_swa(width, folder):
    learn = learner(width, n_epoch=0)
    yield
    fit_until_stopped(learn, folder, SWACallback(0))


def update_batchnorm(width, folder):
    model = network(width)
    loader = [torch.randn(4, width)]
    yield
    update_bn(loader, model)


def weight_average(width, folder):
    model = network(width)
    yield
    average = WeightAverage(model)
    for _ in range(3):
        average.update(model)


def snapshots(width, folder):
    learn = learner(width)
    yield
    learn.fit_snapshots(4, 1, 1e-6)


def snapshot_files(width, folder):
    learn = learner(width)
    yield
    learn.fit_snapshots(4, 1, 1e-6, folder=folder / 'snaps')


def mean_of_files(width, folder):
    paths = files(width, folder, 4)
    learn = learner(width)
    yield
    average_checkpoints(paths, learn)


def ensemble_of_files(width, folder):
    paths = files(width, folder, 20)
    learn = learner(width)
    yield
    Ensemble(paths, learn).validate()


def ensemble_of_states(width, folder):
    learn = learner(width)
    members = states(width, 20)
    yield
    Ensemble(members, learn).validate()


def members_one_by_one(width, folder):
    paths = files(width, folder, 20)
    learn = learner(width)
    yield
    Ensemble(paths, learn).member_preds()


def rays_around_two(width, folder):
    learn = learner(width)
    solutions = states(width, 2)
    yield
    rays(learn, solutions, n_rays=2, distances=[1.0], bn_batches=1)


def line_through_two(width, folder):
    learn = learner(width)
    solutions = states(width, 2)
    yield
    line(learn, solutions, ts=3, bn_batches=1)


def plane_through_three(width, folder):
    learn = learner(width)
    solutions = states(width, 3)
    yield
    plane(learn, solutions, 2, bn_batches=1)


def plane_with_path(width, folder):
    learn = learner(width)
    solutions = states(width, 3)
    path = files(width, folder, 3)
    yield
    plane(learn, solutions, 2, bn_batches=1, trajectory=path)


def curve_made(width, folder):
    learn = learner(width)
    solutions = states(width, 2)
    yield
    Curve(learn, solutions)


def curve_fitted(width, folder):
    learn = learner(width)
    solutions = states(width, 2)
    yield
    Curve(learn, solutions).fit(1, 1e-6, wd=1e-4)


def curve_evaluated(width, folder):
    learn = learner(width)
    curve = Curve(learn, states(width, 2))
    yield
    curve.evaluate(3, bn_batches=1)


ROWS = {
    'a fit, without a callback': fit,
    '`SWACallback`': fit_swa,
    '`SWACallback(every=1)`, more than 128 steps': fit_steps,
    '`SWACallback`, a further fit': fit_again,
    '`CheckpointCallback`': fit_checkpointed,
    '`CheckpointCallback`, four fits on one path': fit_four_times,
    '`CheckpointCallback`, resumed, up to the first step': resume,
    'the same, beside a `SWACallback`': resume_swa,
    '`WeightAverage`, three updates': weight_average,
    '`update_bn`': update_batchnorm,
    '`fit_snapshots`, 4 in memory': snapshots,
    '`fit_snapshots(folder=)`, 4': snapshot_files,
    '`average_checkpoints` of 4 files': mean_of_files,
    '`Ensemble.validate`, 20 files': ensemble_of_files,
    '`Ensemble.validate`, 20 state dicts': ensemble_of_states,
    '`Ensemble.member_preds`, 20 files': members_one_by_one,
    '`rays` from 2': rays_around_two,
    '`line`': line_through_two,
    '`plane`': plane_through_three,
    '`plane` with a path of 3 files': plane_with_path,
    '`Curve`, made': curve_made,
    '`Curve`, made and fitted': curve_fitted,
    '`Curve.evaluate`': curve_evaluated,
}
PREPARED = {
    '`CheckpointCallback`, resumed, up to the first step': interrupt,
    'the same, beside a `SWACallback`': interrupt_swa,
}


# measuring


def memory() -> dict[str, int]:
    "What the kernel says of this process, in bytes."
    lines = Path('/proc/self/status').read_text().splitlines()
    return {line.split(':')[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(' kB')}


def _anonymous() -> int:
    gc.collect()
    return memory()['RssAnon']


class Peak:
    "The most memory that is there within this context, and what was there at its start."

    def __enter__(self):
        gc.collect()
        Path('/proc/self/clear_refs').write_text('5')
        start = memory()
        self.before = self.sampled = start['RssAnon']
        self.file = self.most_file = start['RssFile']
        self.is_over = False
        self.sampler = threading.Thread(target=self._sample)
        self.sampler.start()
        return self

    def _sample(self):
        while not self.is_over:
            now = memory()
            self.sampled = max(self.sampled, now['RssAnon'])
            self.most_file = max(self.most_file, now['RssFile'])
            time.sleep(1e-3)

    def __exit__(self, *error):
        self.is_over = True
        self.sampler.join()
        maps_a_file = self.most_file > self.file + SIZE / 4
        self.most = self.sampled if maps_a_file else memory()['VmHWM'] - self.file


SIZE = 4 * DEPTH * WIDTH**2
_M_MMAP_THRESHOLD = -3  # of `mallopt`: tensors of more bytes are given back to the system as soon as they are freed


def measure(name, result):
    "Send what was there before, and the most that was there, in sizes of the model."
    with tempfile.TemporaryDirectory() as folder:
        tiny, large = Path(folder) / 'tiny', Path(folder) / 'large'
        _peak(name, 16, tiny)  # so that all is imported
        libraries = _anonymous()
        peak = _peak(name, WIDTH, large)
    result.send(((peak.before - libraries) / SIZE, (peak.most - libraries) / SIZE))


def _peak(name, width, folder) -> Peak:
    folder.mkdir()
    if name in PREPARED:
        in_own_process(PREPARED[name], width, folder)
    steps = ROWS[name](width, folder)
    next(steps)
    with Peak() as peak:
        next(steps, None)
    return peak


def in_own_process(function, *args):
    process = multiprocessing.get_context('fork').Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def all_measured(names) -> dict[str, tuple[float, float]]:
    "Row -> what was there before, and the most that was there."
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    found = {}
    for name in names:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        in_own_process(measure, name, sender)
        found[name] = receiver.recv()
        print(name, found[name], file=sys.stderr)
    return found


def measured_in(checkout, only) -> dict:
    "The same, of the package in another folder."
    command = [sys.executable, __file__, '--only', only, '--json']
    environment = {**os.environ, 'PYTHONPATH': str(checkout)}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='rows with this text in their names')
    parser.add_argument('--against', type=Path, help='a checkout of another commit')
    parser.add_argument('--json', action='store_true', help='print the numbers as JSON')
    args = parser.parse_args()
    found = all_measured([name for name in ROWS if args.only in name])
    if args.json:
        print(json.dumps(found))
        return
    old = {} if args.against is None else measured_in(args.against, args.only)
    print(f'torch {torch.__version__}, cpu\n')
    print(f'| in sizes of the model | there before | most |{" most, before |" if old else ""}')
    print(f'|---|--:|--:|{"--:|" if old else ""}')
    for name, (before, most) in found.items():
        cells = [name, f'{before:.1f}', f'{most:.1f}']
        if old:
            cells.append(f'{old[name][1]:.1f}')
        print(f'| {" | ".join(cells)} |')


if __name__ == '__main__':
    main()
