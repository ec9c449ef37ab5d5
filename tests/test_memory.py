"""How many models' worth of tensors are there at once, beside those that were there before."""

import gc
import weakref

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastai_swa import Curve, line, plane, rays
from fastai_swa.landscape import curve as curve_file
from fastai_swa.landscape import geometry
from fastai_swa.landscape import measure as measure_file
from fastai_swa.landscape.space import Space, line_grid

WIDTH, DEPTH = 128, 8
SIZE = 4 * DEPTH * WIDTH**2


class LiveTensors(TorchDispatchMode):
    "Counts the bytes of the tensors made within it, from when they are made to when they are freed."

    def __init__(self):
        super().__init__()
        self.live = {}  # address of a storage -> its bytes
        self.most = 0.0  # at once, in sizes of the model

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        res = func(*args, **kwargs)
        for t in tree_leaves(res):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:  # no view, nor in place
                self._add(t.untyped_storage())
        return res

    def _add(self, storage):
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, storage._cdata)
            self.most = max(self.most, sum(self.live.values()) / SIZE)


@pytest.fixture(autouse=True)
def small_stretches(monkeypatch):
    "As small beside the model as they are beside a large one."
    monkeypatch.setattr(geometry, '_STRETCH', 1024)
    monkeypatch.setattr(curve_file, '_LEAST_OF_PART', 1)


def network():
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)), nn.BatchNorm1d(WIDTH))


def the_learner():
    x = torch.randn(4, WIDTH)
    data = [(x[i % 4], torch.tensor(i % 2)) for i in range(8)]
    dls = DataLoaders(DataLoader(data, bs=4, shuffle=True), DataLoader(data, bs=4), device='cpu')
    learn = Learner(dls, network(), CrossEntropyLossFlat(), lr=1e-3)
    learn.logger = lambda *args: None
    return learn


def most(f):
    gc.collect()
    with LiveTensors() as counted:
        f()
    return counted.most


def states(n):
    return [network().state_dict() for _ in range(n)]


def test_the_counter_knows_copies_views_and_what_is_freed():
    x = torch.zeros(SIZE // 4)

    def three_at_once():
        a = x + 1
        b = a.double()
        del a
        b.view(2, -1).mul_(2)
        x.mul_(2)
        return x.clone()

    assert most(three_at_once) == 3
    assert most(lambda: x[1:].view(-1).add_(1)) == 0


# one copy of the model that takes on the points, the solutions as vectors, a ray, and the point under way


@pytest.mark.parametrize(
    'measure, n, allowed',
    [
        (lambda learn, s: rays(learn, s, n_rays=2, distances=[1.0]), 2, 1 + 2 + 1 + 1),
        (lambda learn, s: line(learn, s, ts=3), 2, 1 + 2 + 1),
        (lambda learn, s: plane(learn, s, 3), 3, 1 + 3 + 1),
        (lambda learn, s: plane(learn, s[:3], 2, trajectory=s[3:], marks={'m': s[3]}), 6, 1 + 3 + 1),
    ],
    ids=['rays', 'line', 'plane', 'plane with a path'],
)
def test_a_surface_takes_its_solutions_a_copy_of_the_model_and_the_point_under_way(measure, n, allowed):
    learn, solutions = the_learner(), states(n)
    assert most(lambda: measure(learn, solutions)) == pytest.approx(allowed, abs=0.2)


def test_a_curve_takes_its_points_and_a_copy_of_the_model():
    learn, solutions = the_learner(), states(2)
    assert most(lambda: Curve(learn, solutions)) == pytest.approx(1 + 3, abs=0.2)
    curve = Curve(learn, solutions)
    assert most(lambda: curve.evaluate(5)) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize('opt_func, kept, wd', [(SGD, 0, 0.1), (Adam, 2, 0.0), (Adam, 2, 0.1)])
def test_training_a_curve_takes_a_gradient_and_what_the_optimizer_keeps(opt_func, kept, wd):
    "Beside its points; and a copy of the bend from the second training on, should that fail."
    curve = Curve(the_learner(), states(2))
    assert most(lambda: curve.fit(1, 1e-6, wd, opt_func)) == pytest.approx(1 + kept, abs=0.6)
    assert most(lambda: curve.fit(1, 1e-6, wd, opt_func)) == pytest.approx(2 + kept, abs=0.6)


def test_no_point_is_held_while_passes_are_made(monkeypatch):
    "Nor what a pass leaves in cycles of references, which the garbage collector finds late."
    points, held = [], []
    grid = line_grid(Space(the_learner()), states(2), 5)
    at, refresh = grid.at, measure_file.refresh_bn

    def noted_at(i):
        point = at(i)
        points.append(weakref.ref(point.weights))
        return point

    def noted_refresh(*args, **kwargs):
        held.append(sum(ref() is not None for ref in points))
        return refresh(*args, **kwargs)

    grid.at = noted_at
    monkeypatch.setattr(measure_file, 'refresh_bn', noted_refresh)
    gc.collect()
    gc.disable()
    try:
        measure_file.measured(grid)
    finally:
        gc.enable()
    assert held == [0] * len(grid.points)
