"""Every writer of the package: what lies there before, how it is made to write over it, and how
that is read again.

`faults.py` tries each of them on a full disk and kills it in the middle. What CheckpointCallback
does in a fit has rows of its own there.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn

from fastai_swa import Curve, Ensemble, SaveSWAModelCallback, SnapshotCallback, SWACallback, WeightHistory, demo, files
from fastai_swa.experiments import RECIPES, Settings, report
from fastai_swa.experiments.record import Record, find_record
from fastai_swa.experiments.store import store, stored
from fastai_swa.landscape.surfaces import PointFile, Profile, Surface
from fastai_swa.weightings import coefficients

matplotlib.use('agg')
RESULTS = Path(__file__).resolve().parents[1] / 'results'


@dataclass(frozen=True)
class Writer:
    make: Callable  # make(folder): what it leaves there is complete, and old
    again: Callable  # again(folder, begin): write something new over it; `begin()` comes right before
    content: Callable  # content(folder): what is there, by the parts that are replaced; raises where it is damaged
    limits: Callable  # limits(sizes of the old files): the greatest sizes of a file at which the new ones do not fit


def below_all(sizes):
    return range(1, min(sizes))


def between_the_members(sizes):
    return range(*sorted(sizes)[-2:])


def within_a_line(sizes):
    return range(sizes[0] + 1, sizes[0] + 8)


# what is written


def weights(version: int) -> dict:
    return {'x': torch.full((250_000,), float(version))}


def learner(folder, seed, width=300) -> Learner:
    set_seed(seed)
    samples = [(torch.randn(8), torch.tensor(i % 3)) for i in range(24)]
    dls = DataLoaders(DataLoader(samples[:16], bs=8), DataLoader(samples[16:], bs=8), device='cpu')
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))
    return Learner(dls, model, CrossEntropyLossFlat(), path=folder)


class Begin(Callback):
    "Calls `begin` at the start of epoch `epoch`."

    def __init__(self, begin, epoch):
        self.begin, self.at = begin, epoch

    def before_epoch(self):
        if self.epoch == self.at:
            self.begin()


def fit(learn, n_epoch, *cbs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, 0.01, cbs=cbs)


def a_line(n) -> Profile:
    "Along a line, of which nothing is measured yet."
    about = {'kind': 'line', 'solutions': {'a': 1.0, 'b': 2.0}, 'columns': ['norm'], 'spec': {}}
    return Profile(about, [(float(t),) for t in range(n)])


def state_of(file: Path) -> list:
    return [t.tolist() for t in torch.load(file, weights_only=True).values()]


# the writers


def save_weights(folder, version, begin=lambda: None):
    begin()
    files.save_weights(folder / 'weights.pth', weights(version))


def write(folder, version, begin=lambda: None):
    begin()
    files.write(folder / 'run.ckpt', 'checkpoint', 1, weights(version))


def best_average(folder, version, begin=lambda: None):
    fit(learner(folder, version), 1, SWACallback(0), SaveSWAModelCallback(at_end=True), Begin(begin, 0))


def snapshots(folder, begin):
    "The first one is there; the second one and the new index are to be written."
    fit(learner(folder, 0), 2, SnapshotCallback(0, folder=folder / 'snapshots'), Begin(begin, 1))


def weight_history(folder, begin):
    "The means of the first epoch are there; those of the second one and the last weights are to be written."
    fit(learner(folder, 0), 2, WeightHistory(folder / 'history', 4, overwrite=True), Begin(begin, 1))


def ensemble(folder, version, begin=lambda: None):
    "Of two members, the second one with the larger file."
    small, large = learner(folder, version, 200), learner(folder, version, 400)
    members = Ensemble([small.model, large.model], small)
    begin()
    members.save(folder / 'ensemble')


def curve(folder, version, begin=lambda: None):
    ends = [learner(folder, seed).model.state_dict() for seed in (version, version + 10)]
    it = Curve(learner(folder, 0), ends)
    begin()
    it.save(folder / 'curve.pth')


def surface(name):
    def save(folder, version, begin=lambda: None):
        it = a_line(5_000)
        it.values['norm'][:] = version
        begin()
        it.save(folder / name)

    return save


def points(folder, begin=lambda: None, n=3):
    "So many points of a line, which are not there yet, in a file that grows."
    rows = PointFile(folder / 'line.jsonl', a_line(1_000))
    try:
        for i in np.flatnonzero(~rows.surface.is_measured)[:n].tolist():
            begin()
            rows.add(i, {'norm': 1.0})
    finally:
        rows.close()


def one_more_point(folder, begin):
    points(folder, begin, n=1)


def record(folder, begin=lambda: None):
    "Each call is one more session in the record of a seed."
    begin()
    Record(RECIPES['ensembles-digits'], 0, folder, Settings(), {'kind': 'digits'}, threads=1)


def sessions(folder) -> dict:
    return {'number': len(find_record(folder, 0)['sessions'])}


def row(folder, version, begin=lambda: None):
    "Each call stores one seed more."
    begin()
    store(folder, {'kind': 'training', 'seed': version, 'epochs': [0.1] * 500})


def seeds(folder) -> dict:
    return {'seeds': list(stored(folder, 'training'))}


def old_report(name):
    def make(folder):
        for file in (RESULTS / name).iterdir():
            if file.is_file():
                shutil.copy(file, folder)
        for file in (folder / 'report.md', folder / 'report.json', *folder.glob('*.png')):
            file.write_bytes(b'an old one' * 500)

    return make


def new_report(folder, begin):
    begin()
    report(folder)


def figure(folder, version, begin=lambda: None):
    "What the demo draws."
    columns = dict.fromkeys(('error_rate', 'valid_loss', 'swa_error_rate', 'swa_valid_loss'), (0.5, 0.1))
    begin()
    demo._draw(
        dict.fromkeys(('SWA', 'SGD', 'one-cycle'), columns), np.full((2, 4), float(version)), folder / 'demo.png'
    )


def _of(f, content, limits=below_all) -> Writer:
    "Of a writer `f(folder, version, begin)`."
    return Writer(lambda folder: f(folder, 0), lambda folder, begin: f(folder, 1, begin), content, limits)


# how it is read


def state_at(*path):
    return lambda folder: {'state': state_of(folder.joinpath(*path))}


def values_at(name):
    return lambda folder: {'values': Surface.load(folder / name).values['norm'].tolist()}


def members_at(name):
    "All of them together: those of two ensembles must not mix."
    return lambda folder: {'members': [state_of(file) for file in Ensemble(folder / name, learner(folder, 0)).members]}


def first_epoch(folder) -> dict:
    "Of a history, each file of which must be whole."
    it = WeightHistory.load(folder / 'history', learner(folder, 0))
    assert not it._kept.stretches.faults()
    shares = it._kept.weighting({'epochs': (0, 1)})
    mean, _ = it._kept.stretches.average(coefficients(shares, it._kept.stretches.ends), {})
    return {'mean': [t.tolist() for t in mean.values()]}


def checkpoint(folder) -> dict:
    return {'x': files.read(folder / 'run.ckpt', 'checkpoint', 1)['x'].tolist()}


def bends(folder) -> dict:
    return {'bends': [t.tolist() for t in files.read(folder / 'curve.pth', 'curve', 1)['bends']]}


def picture(folder) -> dict:
    return {'picture': (folder / 'demo.png').read_bytes()}


def reported(folder) -> dict:
    return {
        file.name: file.read_bytes()
        for file in (folder / 'report.md', folder / 'report.json', *sorted(folder.glob('*.png')))
    }


WRITERS = {
    'save_weights': _of(save_weights, state_at('weights.pth')),
    'write': _of(write, checkpoint),
    'SaveSWAModelCallback': _of(best_average, state_at('models', 'swa_model.pth')),
    'SnapshotCallback': Writer(lambda folder: None, snapshots, members_at('snapshots'), below_all),
    'WeightHistory': Writer(lambda folder: None, weight_history, first_epoch, below_all),
    'Ensemble.save': _of(ensemble, members_at('ensemble'), between_the_members),
    'Curve.save': _of(curve, bends),
    'Surface.save, JSON': _of(surface('line.json'), values_at('line.json')),
    'Surface.save, npz': _of(surface('line.npz'), values_at('line.npz')),
    'PointFile': Writer(points, one_more_point, values_at('line.jsonl'), within_a_line),
    'Record': Writer(record, record, sessions, below_all),
    'the file of a row': _of(row, seeds),
    'report on runs': Writer(old_report('ensembles-digits'), new_report, reported, below_all),
    'report on surfaces': Writer(old_report('width-digits'), new_report, reported, below_all),
    'the figure of the demo': _of(figure, picture),
}
