import copy
import inspect
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Metric
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastcore.foundation import L
from fastprogress import fastprogress
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader as TorchDataLoader

from fastai_swa import (
    Curve,
    Ensemble,
    SnapshotCallback,
    Surface,
    SWACallback,
    WeightAverage,
    line,
    plane,
    rays,
    update_bn,
)
from fastai_swa.passes import refreshable

from . import lora
from .helpers import At, assert_same, fingerprint, learner, loaders, mixed_precision_on_cpu, net, raising
from .reference import twins


class Weights(nn.Module):
    """Predicts its weights, whatever it is given: a loss of them is a function on weight space with
    known answers.
    """

    def __init__(self, values, dtype=torch.float64):
        super().__init__()
        values = torch.as_tensor(values, dtype=dtype)
        self.a, self.b = nn.Parameter(values[:2].clone()), nn.Parameter(values[2:].clone())

    def forward(self, x):
        return torch.cat([self.a, self.b]).expand(len(x), -1)


def surface_learner(loss, n=5, dtype=torch.float64):
    "A learner whose loss is `loss` of its `n` weights."
    data = [(torch.zeros(1), torch.zeros(1)) for _ in range(7)]
    dls = DataLoaders(DataLoader(data, bs=4), DataLoader(data[:3], bs=4), device='cpu')
    return Learner(dls, Weights(np.zeros(n), dtype), lambda pred, *yb: loss(pred[0]), opt_func=SGD, metrics=[])


def weights(*values):
    return Weights(values).state_dict()


# known answers

SQUARE, CUBE = (lambda w: (w**2).sum() / 2), (lambda w: (w**2).sum() ** 1.5)
A = torch.diag(torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64))
STRETCHED = lambda w: w @ A @ w


@pytest.mark.parametrize('loss, level, radius', [(SQUARE, 3, 6**0.5), (CUBE, 2, 2 ** (1 / 3))])
def test_rays_from_the_minimum_of_a_round_bowl_cross_a_level_at_its_radius(loss, level, radius):
    found = rays(surface_learner(loss), weights(0, 0, 0, 0, 0), distances=3.0, n_rays=4)
    (width,) = found.widths('valid_loss', level).values()
    np.testing.assert_allclose(width.distances, radius, rtol=1e-9)
    assert (
        width.std == pytest.approx(0, abs=1e-9)
        and width.n_crossed == 4
        and found.distances.tolist() == [0, *np.linspace(0, 3, 21)[1:]]
    )
    np.testing.assert_allclose(found.values['train_loss'], found.values['valid_loss'])


def test_along_each_ray_the_loss_is_that_of_the_point_at_the_distance_in_its_direction():
    from fastai_swa.landscape.geometry import direction

    start = torch.tensor([1.0, -2, 0, 0.5, 3], dtype=torch.float64)
    found = rays(surface_learner(STRETCHED), weights(*start), distances=[0.5, 2], n_rays=6, seed=3)
    (profiles,) = found.profiles('valid_loss').values()
    for number, profile in enumerate(profiles):
        expected = [float(STRETCHED(start + d * direction(5, 3, number))) for d in (0, 0.5, 2)]
        np.testing.assert_allclose(profile, expected, rtol=1e-12)
    assert found.norms == {'solution 1': pytest.approx(float(start.norm()))}
    np.testing.assert_allclose(found.profiles('norm')['solution 1'][:, 0], float(start.norm()))


def test_all_solutions_get_the_same_rays_and_seeds_get_others():
    learn = surface_learner(STRETCHED)
    at_zero = weights(0, 0, 0, 0, 0)
    both = rays(learn, {'a': at_zero, 'b': at_zero}, distances=[1.0], n_rays=3).profiles('valid_loss')
    assert both['a'].tolist() == both['b'].tolist() and len(set(both['a'][:, 1])) == 3
    (other,) = rays(learn, at_zero, distances=[1.0], n_rays=3, seed=1).profiles('valid_loss').values()
    assert not set(other[:, 1]) & set(both['a'][:, 1])


@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_line_through_a_bowl_is_the_parabola_it_should_be(dtype, tol):
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0, -1, 2, 0], [0.0, 3, 1, 1, -1]))
    learn = surface_learner(lambda w: STRETCHED(w.double()), dtype=dtype)
    found = line(learn, {'a': Weights(a), 'b': Weights(b)})
    assert {0.0, 1.0, -0.5, 1.5} <= set(found.t) and len(found.t) == 41
    np.testing.assert_allclose(
        found.values['valid_loss'], [float(STRETCHED(a + t * (b - a))) for t in found.t], rtol=tol
    )
    assert found.length == pytest.approx(float((b - a).norm())) and found.arc.tolist() == pytest.approx(
        (found.t * found.length).tolist()
    )
    assert found.values['valid_loss'][found.t == 1] == float(STRETCHED(b)) and found.values['valid_loss'][
        found.t == 0
    ] == float(STRETCHED(a))
    np.testing.assert_allclose(found.values['norm'], [float((a + t * (b - a)).norm()) for t in found.t], rtol=tol)


def test_a_number_of_points_on_a_line_has_the_solutions_among_them():
    learn, a, b = surface_learner(SQUARE), weights(1, 0, 0, 0, 0), weights(0, 1, 0, 0, 0)
    assert line(learn, [a, b], ts=4).t.tolist() == pytest.approx([-0.5, 0, 1 / 6, 5 / 6, 1, 1.5]) and line(
        learn, [a, b], ts=[2, 0.25]
    ).t.tolist() == [0.25, 2]


def test_the_values_and_coordinates_of_a_plane_are_those_of_its_points():
    corners = [torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0, 0, 2, -1], [0.0, 2, 0, 1, 1], [0.0, 1, 3, 0, 0])]
    mark, path = torch.tensor([1.0, 1, 1, 1, 1], dtype=torch.float64), [corners[0], (corners[1] + corners[2]) / 2]
    found = plane(
        surface_learner(STRETCHED),
        dict(zip('abc', map(Weights, corners))),
        n_points=(5, 4),
        margin=0.5,
        marks={'m': Weights(mark)},
        trajectory=[Weights(w) for w in path],
    )
    u = (corners[1] - corners[0]) / (corners[1] - corners[0]).norm()
    v = corners[2] - corners[0] - ((corners[2] - corners[0]) @ u) * u
    v = v / v.norm()
    expected = [[float(STRETCHED(corners[0] + x * u + y * v)) for x in found.xs] for y in found.ys]
    np.testing.assert_allclose(found.grid('valid_loss'), expected, rtol=1e-10)

    def coordinates(w):
        return float((w - corners[0]) @ u), float((w - corners[0]) @ v)

    for name, w in zip('abc', corners):
        assert found.solutions[name] == pytest.approx(coordinates(w), abs=1e-12)
    off = mark - corners[0]
    assert found.marks['m'] == pytest.approx((*coordinates(mark), float((off - (off @ u) * u - (off @ v) * v).norm())))
    np.testing.assert_allclose(found.trajectory, [(*coordinates(w), 0) for w in path], atol=1e-12)
    low, high = np.min(list(found.solutions.values()), 0), np.max(list(found.solutions.values()), 0)
    assert found.xs[[0, -1]].tolist() == pytest.approx(
        [low[0] - 0.5 * (high - low)[0], high[0] + 0.5 * (high - low)[0]]
    )
    assert found.ys[[0, -1]].tolist() == pytest.approx(
        [low[1] - 0.5 * (high - low)[1], high[1] + 0.5 * (high - low)[1]]
    )


def test_the_margin_and_the_number_of_points_may_differ_by_axis():
    abc = [weights(1, 0, 0, 0, 0), weights(0, 1, 0, 0, 0), weights(0, 0, 1, 0, 0)]
    found = plane(surface_learner(SQUARE), abc, n_points=(2, 3), margin=(0, 1))
    assert (
        found.xs[0] == 0
        and found.xs[1] == pytest.approx(2**0.5)
        and len(found.ys) == 3
        and np.ptp(found.ys) == pytest.approx(3 * 1.5**0.5)
    )


def test_a_solution_twice_or_three_on_a_line_are_one_clear_sentence():
    a, b, c = weights(1, 0, 0, 0, 0), weights(0, 1, 0, 0, 0), weights(2, -1, 0, 0, 0)
    learn = surface_learner(SQUARE)
    with pytest.raises(ValueError, match='^SGD and last are the same weights: a plane needs three that differ$'):
        plane(learn, {'SGD': a, 'SWA': b, 'last': a})
    with pytest.raises(ValueError, match='^SGD, SWA, last lie on a line'):
        plane(learn, {'SGD': a, 'SWA': b, 'last': c})
    with pytest.raises(ValueError, match='^SGD and SWA are the same weights: a line needs two that differ$'):
        line(learn, {'SGD': a, 'SWA': a})


# what is measured at a point


def unshuffled(n=90, n_valid=40, bs=16):
    dls = loaders(n, n_valid)
    return DataLoaders(dls.train.new(shuffle=False, drop_last=False, bs=bs), dls.valid, device='cpu')


def by_hand(learn, state, n_bn=None):
    """Loss and accuracy on training and validation set of the weights `state`, after a separate
    update_bn.
    """
    model = copy.deepcopy(learn.model)
    model.load_state_dict(state)
    update_bn(learn.dls.train, model, n_batches=n_bn)
    model.eval()
    res = []
    with torch.no_grad():
        for dl in (learn.dls.train, learn.dls.valid):
            xs, ys = (torch.cat(t) for t in zip(*dl))
            out = model(xs)
            res += [float(F.cross_entropy(out, ys)), float((out.argmax(1) == ys).double().mean())]
    return res


def trained(seed=0, dls=None, **kwargs):
    learn = learner(net, unshuffled() if dls is None else dls, seed=seed, **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
    return learn


COLUMNS = ['train_loss', 'train_accuracy', 'valid_loss', 'valid_accuracy']


def rows(surface):
    return np.stack([surface.values[c] for c in COLUMNS], 1)


def mixed(shares, states):
    return {k: sum(s * w[k].double() for s, w in zip(shares, states)).to(states[0][k].dtype) for k in states[0]}


@pytest.mark.parametrize('bn_batches', [None, 2])
def test_at_each_point_batch_norm_is_that_of_a_separate_update_bn(bn_batches):
    learn = trained()
    states = [trained(seed).model.state_dict() for seed in (1, 2, 3)]
    on_line = line(learn, states[:2], ts=[-0.3, 0, 0.4, 1], bn_batches=bn_batches)
    for t, row in zip(on_line.t, rows(on_line)):
        np.testing.assert_allclose(row, by_hand(learn, mixed((1 - t, t), states), bn_batches), rtol=2e-5, atol=1e-6)
    in_plane = plane(learn, states, n_points=2, bn_batches=bn_batches)
    corners = np.array(list(in_plane.solutions.values()))
    for (x, y), row in zip(in_plane.points, rows(in_plane)):
        shares = np.linalg.solve(np.vstack([corners.T, np.ones(3)]), [x, y, 1])
        np.testing.assert_allclose(row, by_hand(learn, mixed(shares, states), bn_batches), rtol=2e-5, atol=1e-6)
    on_rays = rays(learn, states[0], distances=[0.7], n_rays=2, bn_batches=bn_batches)
    np.testing.assert_allclose(rows(on_rays)[0], by_hand(learn, states[0], bn_batches), rtol=2e-5, atol=1e-6)
    from fastai_swa.landscape.geometry import direction

    names = [k for k, _ in learn.model.named_parameters()]
    for i in range(2):
        moved, steps = (
            dict(states[0]),
            direction(sum(states[0][k].numel() for k in names), 0, i).split([states[0][k].numel() for k in names]),
        )
        for k, step in zip(names, steps):
            moved[k] = moved[k] + (0.7 * step).view(moved[k].shape).float()
        np.testing.assert_allclose(rows(on_rays)[1 + i], by_hand(learn, moved, bn_batches), rtol=2e-5, atol=1e-6)


class Scaled(nn.Module):
    "A buffer that counts, and a norm whose statistics nobody recomputes."

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer('scale', torch.ones(()))
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.scale / self.calls


def test_what_is_not_recomputed_is_the_first_solutions_and_that_is_said():
    learn, other = learner(Scaled), learner(Scaled, seed=1)
    other.model.scale.fill_(2.0)
    with pytest.warns(
        UserWarning,
        match='^scale is not recomputed and differs between the solutions: all points have that of the first$',
    ):
        found = line(learn, [learn, other], ts=[0, 1], sets='valid')
    other.model.scale.fill_(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (
            line(learn, [learn, other], ts=[0, 1], sets='valid').values['valid_loss'].tolist()
            == found.values['valid_loss'].tolist()
        )
        trained_bn = trained(1)
        line(trained(), [trained(), trained_bn], ts=[0, 1], sets='valid')  # batch norm is recomputed


def test_a_buffer_that_a_point_changes_in_place_begins_anew_at_the_next():
    learn = learner(Scaled)
    found = rows(
        line(
            learn, [learn, {k: v for k, v in learner(Scaled, seed=1).model.state_dict().items()}], ts=[0, 1e-12, 2e-12]
        )
    )
    np.testing.assert_allclose(found[1:], found[[0, 0]], rtol=1e-6)
    start = learner(Scaled).model
    many = rows(rays(learn, {'a': start, 'b': start}, [1e-12], 1))
    np.testing.assert_allclose(many[1:], many[[0] * 3], rtol=1e-6)


def test_frozen_batch_norm_keeps_the_statistics_of_the_first_solution():
    learn, other = trained(), trained(1)
    learn.model.train()
    for m in learn.model.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.eval()
    found = line(learn, [learn, other], ts=[0.0, 0.5], sets='valid')
    model = copy.deepcopy(learn.model).eval()
    for t, loss in zip(found.t, found.values['valid_loss']):
        with torch.no_grad():
            for p, q, own in zip(model.parameters(), other.model.parameters(), learn.model.parameters()):
                p.copy_(torch.lerp(own, q, float(t)))
            xs, ys = (torch.cat(v) for v in zip(*learn.dls.valid))
            assert loss == pytest.approx(float(F.cross_entropy(model(xs), ys)), rel=1e-5)


def test_statistics_that_are_recomputed_may_differ_between_the_solutions_without_a_word():
    def one_layer():
        return nn.BatchNorm1d(6)

    def compiled():
        return nn.Sequential(torch.compile(one_layer(), backend='eager'), nn.Linear(6, 3))

    for make in (net, one_layer, compiled):
        a, b = (learner(make, seed=seed) for seed in (0, 1))
        for learn in (a, b):
            with learn.no_bar(), learn.no_logging():
                learn.fit(1)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            line(a, [a, b], ts=2, sets='valid')


def test_what_a_pass_remarks_is_said_once_for_all_points_but_that_statistics_far_away_are_not_finite(monkeypatch):
    from fastai_swa.landscape import measure

    refresh_bn = measure.refresh_bn

    def remarking(*args, **kwargs):
        moments = refresh_bn(*args, **kwargs)
        moments.remarks |= {'this': 'this was remarked', 'infinite': 'not finite'}
        return moments

    monkeypatch.setattr(measure, 'refresh_bn', remarking)
    with pytest.warns(UserWarning) as caught:
        line(trained(), OTHERS, ts=5, sets='valid')
    assert [str(w.message) for w in caught] == ['this was remarked']


def test_sets_and_batches_are_those_asked_for():
    learn, seen = trained(), []

    class Count(Callback):
        def after_batch(self):
            seen.append((len(self.xb[0]), self.dl.__class__.__name__))

    learn.add_cb(Count())

    def sizes(**kwargs):
        seen.clear()
        found = line(learn, [learn, trained(1)], ts=[0.5], **kwargs)
        return [n for n, _ in seen], list(found.values)

    whole, valid = [16] * 5 + [10], [32, 8]
    assert sizes() == (whole + whole + valid, [*COLUMNS, 'norm'])
    assert sizes(sets='valid') == (whole + valid, [*COLUMNS[2:], 'norm']) and sizes(sets=['train']) == (
        whole + whole,
        [*COLUMNS[:2], 'norm'],
    )
    assert sizes(bn_batches=2) == ([16] * 2 + whole + valid, [*COLUMNS, 'norm'])
    assert sizes(train_batches=1, bn_batches=3) == ([16] * 3 + [16] + valid, [*COLUMNS, 'norm'])


NOTED = []  # by what runs in a pass, whose own lists are put back after it


def test_a_model_without_batch_norm_needs_no_pass_for_it():
    learn = surface_learner(SQUARE)
    NOTED.clear()
    learn.add_cb(At('after_batch', 0, lambda cb: NOTED.append(len(cb.xb[0]))))
    line(learn, [weights(0, 0, 0, 0, 0), weights(1, 0, 0, 0, 0)], ts=[0, 1])
    assert NOTED == [4, 3, 3] * 2


def test_what_is_drawn_is_the_same_at_each_point_and_depends_on_the_seed_alone():
    def noisy():
        return DataLoaders(
            loaders().train.new(after_batch=lambda b: (b[0] + torch.randn_like(b[0]), b[1])),
            loaders().valid,
            device='cpu',
        )

    dls = noisy()
    learn, other = learner(net, dls), learner(net, seed=1).model.state_dict()

    def measure(seed=0):
        random.seed(), np.random.seed(), torch.manual_seed(random.randrange(10**6))
        return rows(line(learn, [learn, other], ts=[0.0, 1e-12], seed=seed))

    found = measure()
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)  # two points that are the same
    assert np.array_equal(measure(), found) and not np.allclose(measure(1), found, rtol=1e-4)


class Draws(Callback):
    "Adds noise of its own to each batch."

    def before_batch(self):
        self.learn.xb = (self.xb[0] + 0.1 * torch.randn_like(self.xb[0]),)


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('cbs', [None, Draws()])
def test_batches_that_are_kept_give_what_batches_drawn_anew_give(num_workers, cbs, monkeypatch):
    def noisy():
        return DataLoaders(
            loaders(num_workers=num_workers).train.new(after_batch=lambda b: (b[0] + torch.randn_like(b[0]), b[1])),
            loaders().valid,
            device='cpu',
        )

    def measure(**kwargs):
        learn = learner(net, noisy(), cbs=copy.copy(cbs))
        drawn = []
        monkeypatch.setattr(type(learn.dls.train), 'before_iter', lambda self: drawn.append(self))
        return rows(line(learn, [learn, OTHERS[0]], ts=[0, 0.3, 1], **kwargs)), len(drawn)

    for kwargs, n_sets in (({}, 2), ({'bn_batches': 2}, 3), ({'bn_batches': 2, 'train_batches': 2}, 2)):
        kept, n_drawn = measure(**kwargs)
        assert n_drawn == n_sets  # once for each set of batches, however many points
        if cbs is None:
            monkeypatch.setattr('fastai_swa.batches._LIMIT', 100)
            anew, n_drawn = measure(**kwargs)
            assert np.array_equal(anew, kept) and n_drawn == n_sets + 3 * 3
            monkeypatch.undo()


@pytest.mark.parametrize('limit', [2**30, 100])
def test_what_a_callback_draws_is_the_same_at_each_point_too(limit, monkeypatch):
    monkeypatch.setattr('fastai_swa.batches._LIMIT', limit)
    learn = learner(cbs=Draws())
    found = rows(line(learn, [learn, OTHERS[0]], ts=[0.0, 1e-12, 2e-12]))
    np.testing.assert_allclose(found[1:], found[[0, 0]], rtol=1e-6)


def test_a_model_that_changes_its_input_in_place_changes_no_later_batch():
    class Greedy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x.mul_(0.5))

    learn = learner(Greedy)
    found = rows(line(learn, [learn, {f'net.{k}': v for k, v in OTHERS[0].items()}], ts=[0.0, 1e-12]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


# solutions


def test_solutions_come_as_state_dicts_modules_learners_paths_callbacks_and_ensembles(tmp_path):
    learn, swa, snapshots = learner(), SWACallback(1), SnapshotCallback(1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, cbs=[swa, snapshots])
    torch.save(swa.swa_model.state_dict(), tmp_path / 'mine.pth')
    learn.save(tmp_path / 'saved', with_opt=False)
    average, last = swa.swa_model.state_dict(), learn.model.state_dict()
    compiled = {f'_orig_mod.{k}': v for k, v in average.items()}
    mean = WeightAverage(learn.model)
    mean.update(swa.swa_model)

    def at(solution):
        return [(k, rows(rays(learn, solution, [1.0], 1, sets=('train', 'valid')))[0].tolist()) for k in [None]][0][1]

    expected = at(average)
    for same in (swa.swa_model, swa, tmp_path / 'mine.pth', str(tmp_path / 'mine.pth'), compiled, mean, {'SWA': swa}):
        assert at(same) == expected
    assert at(learn) == at(last) == at(tmp_path / 'saved.pth') == at(snapshots.snapshots[-1]) != expected

    def names(solutions):
        return rays(learn, solutions, [1.0], 1, sets='valid').names

    assert names(snapshots) == names(snapshots.ensemble(learn)) == ['epoch 1', 'epoch 2', 'epoch 3']
    assert names(Ensemble(snapshots.snapshots, learn)) == ['solution 1', 'solution 2', 'solution 3']
    assert names([tmp_path / 'mine.pth', swa, learn]) == ['mine', 'average', 'solution 3'] and names(
        {'a': learn, 'b': swa}
    ) == ['a', 'b']
    assert names([tmp_path / 'mine.pth'] * 2) == ['solution 1', 'solution 2'] and names(swa) == ['average']
    with swa.averaged():
        assert at(learn) == expected  # the learner is the average there


@pytest.mark.parametrize(
    'call, error, said',
    [
        (lambda learn: rays(learn, []), ValueError, 'solutions is empty'),
        (lambda learn: rays(learn, SnapshotCallback(0)), ValueError, 'the SnapshotCallback has kept nothing yet'),
        (
            lambda learn: rays(SWACallback(1), learn),
            TypeError,
            'learn must be a Learner, which comes first, not SWACallback',
        ),
        (
            lambda learn: rays(learn, [3]),
            TypeError,
            'solution 1 must be a state dict, a module, a learner, a path or a SWACallback, not 3',
        ),
        (lambda learn: rays(learn, 'missing.pth'), FileNotFoundError, 'missing.pth is missing'),
        (lambda learn: rays(learn, {'SWA': SWACallback(1)}), ValueError, 'SWA has averaged nothing yet'),
        (
            lambda learn: rays(learn, nn.Linear(2, 3)),
            ValueError,
            'solution 1 does not hold weights of this architecture',
        ),
        (
            lambda learn: rays(
                learn,
                {
                    'bad': {k: v * float('nan') for k, v in learn.model.state_dict().items() if 'tracked' not in k}
                    | {k: v for k, v in learn.model.state_dict().items() if 'tracked' in k}
                },
            ),
            ValueError,
            'bad has weights that are not finite',
        ),
        (lambda learn: rays(learn, learn, n_rays=0), ValueError, 'n_rays must be at least 1, not 0'),
        (lambda learn: rays(learn, learn, distances=[-1]), ValueError, 'distances must be positive'),
        (lambda learn: rays(learn, learn, distances=0), ValueError, 'distances must be positive'),
        (lambda learn: rays(learn, learn, distances='far'), TypeError, 'distances must be numbers'),
        (lambda learn: rays(learn, learn, distances=[1, float('inf')]), ValueError, 'distances must be finite'),
        (lambda learn: rays(learn, learn, sets='test'), ValueError, "sets must be 'train', 'valid' or both"),
        (lambda learn: rays(learn, learn, bn_batches=0), ValueError, 'bn_batches must be at least 1'),
        (lambda learn: rays(learn, learn, train_batches=1.5), TypeError, 'train_batches must be an int'),
        (lambda learn: rays(learn, learn, seed=-1), ValueError, 'seed must be at least 0'),
        (lambda learn: line(learn, learn), ValueError, 'solutions must be 2 for a line, not 1'),
        (lambda learn: line(learn, [learn, learner(seed=1)], ts=[]), ValueError, 'ts is empty'),
        (lambda learn: line(learn, [learn, learner(seed=1)], ts=1), ValueError, 'ts must be at least 2'),
        (lambda learn: plane(learn, [learn] * 2), ValueError, 'solutions must be 3 for a plane, not 2'),
        (
            lambda learn: plane(learn, [learner(seed=i) for i in range(3)], n_points=1),
            ValueError,
            'n_points must be at least 2',
        ),
        (
            lambda learn: plane(learn, [learner(seed=i) for i in range(3)], n_points=(3, 3, 3)),
            ValueError,
            'n_points must be one for both axes or a pair',
        ),
        (
            lambda learn: plane(learn, [learner(seed=i) for i in range(3)], margin=-0.1),
            ValueError,
            'margin must be at least 0',
        ),
        (
            lambda learn: plane(learn, [learner(seed=i) for i in range(3)], margin='wide'),
            TypeError,
            'margin must be numbers',
        ),
    ],
)
def test_what_cannot_be_used_is_one_clear_sentence_and_changes_nothing(call, error, said):
    learn = learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    before = fingerprint(learn)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(error, match=said):
            call(learn)
    kept = fingerprint(learn)
    for k in ('python', 'torch', 'numpy'):
        kept[k] = before[k]  # making learners draws
    assert_same(before, kept)


# nothing is changed


class Fickle(Metric):
    "Raises in its `at`-th value, if any."

    def __init__(self, at=None, error=None):
        self.at, self.error, self.n = at, error, 0

    def reset(self):
        pass

    def accumulate(self, learn):
        pass

    def __deepcopy__(self, memo):
        return self

    name = 'fickle'

    @property
    def value(self):
        self.n += 1
        if self.n == self.at:
            raise self.error
        return 0.0


class Counting(Callback):
    "A user's callback with a state of its own."

    def __init__(self):
        self.n, self.seen, self.by_size = 0, [], {}

    def after_batch(self):
        self.n += 1
        self.seen.append(self.n)
        self.by_size[len(self.xb[0])] = self.n


def everything(learn):
    "All that must be as before: also attributes, buffers and callbacks."
    state = fingerprint(learn)
    state |= {f'buffer.{k}': v.clone() for k, v in learn.model.named_buffers()}
    state |= {
        'pointers': [p.data_ptr() for p in (*learn.model.parameters(), *learn.model.buffers())],
        'grads': [p.grad is None for p in learn.model.parameters()],
        'attributes': sorted(vars(learn)),
        'callbacks': [(type(cb).__name__, sorted(vars(cb)), cb.run) for cb in learn.cbs],
        'counted': [
            (cb.n, list(cb.seen), id(cb.seen), dict(cb.by_size)) for cb in learn.cbs if isinstance(cb, Counting)
        ],
        'lock': learn.lock.locked(),
        'metrics': [m.name for m in learn.metrics],
        'ids': [id(learn.model), id(learn.opt), id(learn.cbs), id(learn.dls), id(learn.logger)],
        'autocast': torch.is_autocast_enabled('cpu'),
        'grad': torch.is_grad_enabled(),
        'requires': [p.requires_grad for p in learn.model.parameters()],
    }
    return state


MEASUREMENTS = {
    'rays': lambda learn, others, **kw: rays(learn, [learn, others[0]], distances=[0.5, 1], n_rays=1, **kw),
    'line': lambda learn, others, **kw: line(learn, [learn, others[0]], ts=4, **kw),
    'plane': lambda learn, others, **kw: plane(
        learn, [learn, *others], n_points=2, marks={'again': learn}, trajectory=others, **kw
    ),
}
each_measurement = pytest.mark.parametrize('measure', MEASUREMENTS.values(), ids=MEASUREMENTS)
OTHERS = [learner(seed=i).model.state_dict() for i in (1, 2)]


@each_measurement
@pytest.mark.parametrize('how', ['success', 'error', 'Ctrl-C in a metric', 'Ctrl-C in a batch', 'error in a pass'])
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_the_learner_is_bitwise_as_before_after_success_error_and_ctrl_c(measure, how, precision, monkeypatch):
    mixed_precision_on_cpu(monkeypatch, enabled=False)
    fickle = Fickle()
    learn = learner(
        dls=loaders(num_workers=0),
        metrics=[fickle],
        cbs=[Counting(), *([MixedPrecision('bf16')] if precision == 'bf16' else [])],
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
    learn.model[0].train(), learn.model[1].train()  # modes of its own
    fickle.n, ended = 0, {'success': None, 'error': ValueError('metric'), 'Ctrl-C in a metric': KeyboardInterrupt()}
    before = everything(learn)
    if how in ended:
        fickle.error, fickle.at = ended[how], 4 if ended[how] else None
        if how == 'success':
            measure(learn, OTHERS)
        else:
            with pytest.raises(type(ended[how])):
                measure(learn, OTHERS)
    else:
        error, n = KeyboardInterrupt() if 'Ctrl' in how else RuntimeError('in a pass'), 0
        forward = type(learn.model[3]).forward

        def breaks(self, *args):
            nonlocal n
            n += 1
            if n == 20:
                raise error
            return forward(self, *args)

        monkeypatch.setattr(type(learn.model[3]), 'forward', breaks)
        with pytest.raises(type(error)):
            measure(learn, OTHERS)
        monkeypatch.undo()
    assert_same(before, everything(learn))


# models whose modes move weights


def unmerged(make):
    "The model that `make` makes, of the same parameters and predictions, that never merges."
    model = make()
    for m in model.modules():
        cls = type(m)
        if cls.train is not nn.Module.train:
            m.__class__ = type(cls.__name__, (cls,), {'train': nn.Module.train} | forwards.get(cls, {}))
    return model


forwards = {lora.MergedEmbedding: {'forward': lambda self, x: F.embedding(x, self.weight) + self.delta()[x]}}
each_merging = pytest.mark.parametrize('make', lora.models.values(), ids=lora.models)


def merging_beside_twin(make, seed, mode):
    """A trained learner whose model merges, in train or in eval mode, and one of equal weights
    whose model does not.
    """
    learns = [learner(partial(unmerged, make), seed=seed), learner(make, seed=seed)]
    with learns[0].no_bar(), learns[0].no_logging():
        learns[0].fit(2)
    twin, learn = learns
    set_seed(seed)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)  # for an optimizer and a Recorder
    learn.model.train()
    learn.model.load_state_dict(twin.model.state_dict())
    learn.model.train(mode), twin.model.train(mode)
    for each in learns:
        each.dls.train.rng = random.Random(seed)
    return learn, twin


@each_merging
@each_measurement
@pytest.mark.parametrize('mode', [True, False], ids=['train', 'eval'])
def test_a_model_that_merges_in_eval_is_measured_as_its_twin_that_does_not_and_stays_bitwise(make, measure, mode):
    (learn, twin), (other, other_twin) = (merging_beside_twin(make, seed, mode) for seed in (0, 1))
    third = merging_beside_twin(make, 2, True)[1].model.state_dict()
    before = [everything(each) for each in (learn, other)]
    found = measure(learn, [other, third], bn_batches=2)
    expected = measure(twin, [other_twin, third], bn_batches=2)
    np.testing.assert_allclose(rows(found), rows(expected), rtol=1e-4, atol=1e-5)
    for state, each in zip(before, (learn, other)):
        assert_same(state, everything(each))


@pytest.mark.parametrize('mode', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('where', ['in the first pass', 'in the last pass'])
@pytest.mark.parametrize('make', [lora.MergedMixed, net], ids=['merged', 'plain'])
def test_two_ctrl_c_in_a_row_leave_the_learner_bitwise_as_before(make, mode, where, ctrl_c, more_ctrl_c, monkeypatch):
    learn, other = merging_beside_twin(make, 0, mode)[0], merging_beside_twin(make, 1, mode)[1].model.state_dict()
    before = everything(learn)
    NOTED.clear()

    def first(predicted, target):
        NOTED.append(None)
        if len(NOTED) == (1 if where == 'in the first pass' else 11):
            ctrl_c()
        return F.cross_entropy(predicted, target)

    with monkeypatch.context() as m:
        m.setattr(learn, 'loss_func', first)
        with pytest.raises(KeyboardInterrupt):
            line(learn, [learn, other], ts=3, sets='train')
    assert_same(before, everything(learn))


# frozen batch norm


class NormEval(nn.Sequential):
    "Keeps its first batch norm in eval mode, as detectors do with that of their backbone."

    def __init__(self):
        super().__init__(*net())

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize('mode', [True, False], ids=['train', 'eval'])
def test_batch_norm_that_an_overridden_train_freezes_keeps_its_statistics_on_the_surface_and_on_a_curve(mode):
    learn, other = (learner(NormEval, seed=seed) for seed in (0, 1))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    learn.model.train(mode)
    assert refreshable(learn) == ['5']
    with torch.no_grad():
        learn.model[1].running_var.mul_(3)  # so that it matters
    found = line(learn, [learn, other], ts=[0.0], sets='valid')
    np.testing.assert_allclose(found.values['valid_loss'], refreshed_by_hand(learn, '5'), rtol=1e-5)
    learn.logger = lambda *args: None
    own = {k: v.clone() for k, v in learn.model.state_dict().items()}
    solutions = Curve(learn, [learn, other]).fit(1, 0.05).bends
    for state in (learn.model.state_dict(), *solutions):
        for k in ('1.running_mean', '1.running_var'):
            assert torch.equal(state[k], own[k])


def refreshed_by_hand(learn, layer):
    """The validation loss, in float64, of a copy whose `layer` has the moments of what reaches it
    over the training set.
    """
    model = copy.deepcopy(learn.model).double()
    (xs, _), (valid, targets) = ([torch.cat(t) for t in zip(*dl)] for dl in learn.dls.loaders)
    frozen = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)} - {layer}
    mean, var = twins.bn_statistics(model, [(xs,)], frozen)[layer]
    model.get_submodule(layer).running_mean.copy_(mean)
    model.get_submodule(layer).running_var.copy_(var)
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(valid.double()), targets))


@pytest.mark.parametrize('mode', [True, False], ids=['train', 'eval'])
def test_what_a_bnfreeze_of_the_learner_keeps_from_moving_keeps_its_statistics_on_the_surface(mode):
    learn, frozen = learner(cbs=BnFreeze()), ('1.running_mean', '1.running_var')
    for p in learn.model[:2].parameters():
        p.requires_grad_(False)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    learn.model.train(mode)
    assert refreshable(learn) == ['5']
    states = []

    class Look(Metric):
        name = 'look'

        def reset(self):
            pass

        def accumulate(self, learn):
            states.append({k: v.clone() for k, v in learn.model.state_dict().items()})

        @property
        def value(self):
            return 0.0

    own = {k: v.clone() for k, v in learn.model.state_dict().items()}
    other = {k: v * 1.1 if v.is_floating_point() and k not in frozen else v.clone() for k, v in own.items()}
    learn.metrics = L(Look())
    line(learn, [own, other], ts=[0, 0.5, 1], sets='valid')
    assert len(states) >= 3
    for state in states:
        for k in frozen:
            assert torch.equal(state[k], own[k])
        assert not torch.equal(state['5.running_mean'], own['5.running_mean'])


def test_a_learner_that_was_measured_trains_on_as_one_that_was_not():
    learns = [learner(dls=loaders(num_workers=2)) for _ in range(2)]
    for i, learn in enumerate(learns):
        set_seed(0)
        learn.dls.train.rng = random.Random(0)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
            if i:
                line(learn, [learn, OTHERS[0]], ts=3)
            learn.fit(1)
    assert_same(*map(fingerprint, learns))


def test_a_fit_with_a_measurement_in_it_is_the_same_fit():
    found, learns = [], []
    for f in (lambda cb: None, lambda cb: found.append(line(cb.learn, [cb.learn, OTHERS[0]], ts=2, sets='valid'))):
        learn = learner()
        with learn.no_bar(), learn.no_logging():
            learn.fit(3, cbs=At('after_train', 1, f))
        learns.append(learn)
    assert found[0].is_measured.all()
    assert_same(*map(fingerprint, learns))


# a file that grows


@each_measurement
def test_an_interrupted_measurement_goes_on_where_it_stopped_and_ends_bitwise_as_a_whole_one(measure, tmp_path):
    learn = learner()
    whole = measure(learn, OTHERS)
    for n in (1, 3):
        file, done = tmp_path / f'{n}.jsonl', []

        def stop(i, of):
            if i == n:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure(learn, OTHERS, file=file, progress=stop)
        assert Surface.load(file).is_measured.sum() == n
        random.seed(n), torch.manual_seed(n)  # another process
        found = measure(learn, OTHERS, file=file, progress=lambda i, of: done.append((i, of)))
        assert done == [(i, len(whole.points)) for i in range(n, len(whole.points))]
        for k in whole.values:
            np.testing.assert_array_equal(found.values[k], whole.values[k])
        for k in whole.values:
            np.testing.assert_array_equal(Surface.load(file).values[k], whole.values[k])
        measure(learn, OTHERS, file=file, progress=lambda i, of: done.append('again'))
        assert 'again' not in done


def test_a_file_of_other_solutions_or_settings_is_refused(tmp_path):
    learn = learner()

    def measure(other=OTHERS[0], **kwargs):
        return line(learn, {'a': learn, 'b': other}, **{'ts': [0, 1], 'file': tmp_path / 'it', **kwargs})

    measure()
    for kwargs, said in (
        ({'other': OTHERS[1]}, 'solutions='),
        ({'bn_batches': 2}, 'bn_batches=None, not 2'),
        ({'seed': 1}, 'seed=0, not 1'),
        ({'ts': [0, 2]}, 'ts='),
        ({'sets': 'valid'}, 'columns='),
        ({'train_batches': 1}, 'train_batches=None, not 1'),
    ):
        with pytest.raises(ValueError, match=f'is of another measurement, with {said}'):
            measure(**kwargs)
    learn.dls = loaders(n=91)
    with pytest.raises(ValueError, match='with data='):
        measure()
    with pytest.raises(ValueError, match='with kind='):
        rays(learn, {'a': learn}, file=tmp_path / 'it')


@pytest.mark.parametrize('n', [2, 3])
def test_a_file_of_the_same_solutions_in_another_order_is_refused(tmp_path, n):
    learn = learner()
    named = dict(zip('abc', (learn, *OTHERS)))
    measure, kwargs = (line, {'ts': [0, 1]}) if n == 2 else (plane, {'n_points': 2})
    measure(learn, {k: named[k] for k in 'abc'[:n]}, file=tmp_path / 'it', **kwargs)
    with pytest.raises(ValueError, match='with solutions='):
        measure(learn, {k: named[k] for k in ('ba' if n == 2 else 'bca')}, file=tmp_path / 'it', **kwargs)


def test_generators_that_loaders_own_begin_with_the_seed(tmp_path):
    def make(n_drawn):
        sampled, rng, state, bits = (
            torch.Generator(),
            random.Random(7),
            np.random.RandomState(7),
            np.random.default_rng(7),
        )

        class Noise:
            def __init__(self):
                self.held = rng, state, bits

            def __call__(self, b):
                return b[0] + rng.gauss(0, 1) + float(state.randn()) + float(bits.normal()), b[1]

        data = list(loaders().train.dataset)
        train = TorchDataLoader(data, batch_size=16, shuffle=True, generator=sampled)
        dls = DataLoaders(train, loaders().valid.new(after_batch=Noise()), device='cpu')
        for _ in range(n_drawn):
            next(iter(train)), next(iter(dls.valid))
        return learner(net, dls)

    def measure(n_drawn, **kwargs):
        learn = make(n_drawn)
        before = [t.sum().item() for b in (next(iter(make(n_drawn).dls.valid)),) for t in b[:1]]
        found = line(learn, [learn, OTHERS[0]], ts=[0, 0.5, 1], file=tmp_path / 'it', **kwargs)
        assert [
            t.sum().item() for b in (next(iter(learn.dls.valid)),) for t in b[:1]
        ] == before  # they stand where they stood
        return found

    def stop(i, n):
        if i == 1:
            raise KeyboardInterrupt

    whole = rows(measure(0))
    (tmp_path / 'it').unlink()
    with pytest.raises(KeyboardInterrupt):
        measure(0, progress=stop)
    assert np.array_equal(rows(measure(3)), whole)


# progress, and what callbacks see


def test_there_is_a_bar_over_the_points_and_none_where_the_learner_shows_none(monkeypatch):
    shown = []
    monkeypatch.setattr('fastai_swa.landscape.measure.progress_bar', lambda todo: shown.append(len(todo)) or todo)
    drawn = []
    monkeypatch.setattr(fastprogress.ProgressBar, '__init__', lambda self, *args, **kwargs: drawn.append(args))
    learn = learner()
    line(learn, [learn, OTHERS[0]], ts=3, sets='valid')
    curve = Curve(learn, [learn, OTHERS[0]])
    with learn.no_bar(), learn.no_logging():
        line(learn, [learn, OTHERS[0]], ts=3, sets='valid')
        curve.fit(1, 0.1).evaluate(3)
    assert shown == [5] and drawn == []  # none for each pass


def test_a_callback_that_cancels_the_passes_is_named_as_the_reason():
    learn = learner(cbs=At('before_validate', 0, raising(CancelValidException())))
    with pytest.raises(RuntimeError, match='a callback of the learner cancels validations'):
        line(learn, [learn, OTHERS[0]], ts=2)


def test_batches_that_batch_norm_cannot_use_are_said_once():
    learn = learner(dls=loaders(n=33, bs=16))  # a last batch of one
    learn.dls.train = learn.dls.train.new(drop_last=False)
    with pytest.warns(UserWarning, match='were left out of the batch-norm statistics') as said:
        line(learn, [learn, OTHERS[0]], ts=3)
    assert len(said) == 1


def test_metrics_that_are_no_numbers_are_nan_and_do_not_stop_it():
    class Table(Fickle):
        name = 'table'
        value = [1, 2]

    learn = learner(metrics=[Table()])
    found = line(learn, [learn, OTHERS[0]], ts=[0, 1])
    assert np.isnan(found.values['valid_table']).all() and found.is_measured.all()


def test_metrics_of_one_name_have_a_column_each():
    def low(inp, targ):
        return torch.tensor(0.25)

    def high(inp, targ):
        return torch.tensor(0.75)

    high.__name__ = 'low'
    learn = learner(metrics=[low, high, low])
    found = line(learn, [learn, OTHERS[0]], ts=[0, 1], sets='valid')
    assert {k: v[0] for k, v in found.values.items() if 'low' in k} == {
        'valid_low': 0.25,
        'valid_low_2': 0.75,
        'valid_low_3': 0.25,
    }


def test_a_learner_without_a_validation_set_is_measured_on_the_training_set():
    learn = learner(dls=DataLoaders(loaders().train, device='cpu'))
    assert np.isfinite(line(learn, [learn, OTHERS[0]], ts=[0, 1], sets='train').values['train_loss']).all()
    with pytest.raises(ValueError, match="sets='valid' needs a validation set, and the learner has none: sets='train'"):
        line(learn, [learn, OTHERS[0]])


class Extra(nn.Linear):
    def get_extra_state(self):
        return {'x': 1}

    def set_extra_state(self, state):
        pass


def test_a_state_dict_with_extra_state_is_a_solution_too():
    learn = learner(lambda: Extra(6, 3))
    assert rays(learn, learn.model.state_dict(), [1.0], 1, sets='valid').names == ['solution 1']


def test_a_plane_without_a_trajectory_has_none():
    learn = learner()
    for none in (None, (), []):
        assert plane(learn, [learn, *OTHERS], 2, trajectory=none, sets='valid').trajectory.shape == (0, 3)


# any model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.out, self.phase = nn.Linear(6, 3), nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.out(self.last(self.first(x).relu()) * self.phase.abs())


@pytest.mark.parametrize(
    'make',
    [
        Tied,
        lambda: net().to(memory_format=torch.channels_last),
        lambda: nn.DataParallel(net()),
        partial(net, dropout=0.5),
    ],
)
def test_any_model_is_measured_and_left_alone(make):
    torch.manual_seed(0)
    learn = learner(make)
    other = {k: v + 0.1 if v.dtype != torch.long else v for k, v in learn.model.state_dict().items()}
    other = {k.removeprefix('module.'): v for k, v in other.items()}
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    found = line(learn, [learn, other], ts=[0, 0.5, 1])
    assert np.isfinite(rows(found)).all() and found.values['valid_loss'][0] != found.values['valid_loss'][2]
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_tied_and_complex_weights_count_once_with_all_their_parts():
    learn = learner(Tied)
    found = rays(learn, learn, [1e-3], 1, sets='valid')
    own = learn.model.state_dict()
    parts = [
        torch.view_as_real(v) if v.is_complex() else v for k, v in own.items() if k not in ('last.weight', 'calls')
    ]
    assert found.norms['solution 1'] == pytest.approx(float(torch.cat([p.flatten() for p in parts]).norm()))


def test_a_model_in_low_precision_is_moved_in_float32_and_measured_in_its_own():
    learn = learner(
        lambda: nn.Linear(6, 3).to(torch.bfloat16),
        DataLoaders(
            loaders().train.new(after_batch=lambda b: (b[0].bfloat16(), b[1])),
            loaders().valid.new(after_batch=lambda b: (b[0].bfloat16(), b[1])),
            device='cpu',
        ),
    )
    other = {k: v + 1 for k, v in learn.model.state_dict().items()}
    found = line(learn, [learn, other], ts=[0, 0.001, 1], sets='valid')
    assert (
        found.values['valid_loss'][0] == pytest.approx(learn.validate()[0], rel=1e-6)
        and np.isfinite(found.values['norm']).all()
    )
    assert found.values['norm'][1] != found.values['norm'][0]


def test_arguments_that_all_measurements_share_are_in_their_signatures():
    for f in (rays, line, plane):
        assert list(inspect.signature(f).parameters)[-6:] == 'sets bn_batches train_batches seed file progress'.split()


def test_several_processes_are_refused(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr('fastai_swa.landscape.space.Processes', lambda learn: SimpleNamespace(size=2))
    learn = learner()
    with pytest.raises(
        RuntimeError, match='the loss surface is measured in one process: call it outside of distrib_ctx'
    ):
        rays(learn, learn)
