import random
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import SGD, Adam, OptimWrapper
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fastai_swa import CheckpointCallback, Curve, SWACallback, line
from fastai_swa.landscape import curve as curve_file
from fastai_swa.landscape.geometry import CURVES

from . import lora
from .helpers import At, assert_same, learner, loaders, mixed_precision_on_cpu, net, raising
from .test_landscape_measure import (
    Counting,
    by_hand,
    each_merging,
    everything,
    merging_beside_twin,
    mixed,
    rows,
    unshuffled,
)


def solution(seed, n_epoch=4, model=net, dls=None, **kwargs):
    learn = learner(model, dls, seed=seed, **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch)
    return learn


@pytest.fixture(scope='module')
def two():
    return [solution(seed, 12, lambda: net(width=12), loaders(300, 100)) for seed in (0, 1)]


def quiet(learn):
    learn.logger = lambda *args: None
    return learn


# what a curve is for


@pytest.mark.parametrize('kind', CURVES)
def test_the_highest_loss_on_a_curve_lies_well_below_the_straight_lines_and_its_ends_stay_bitwise(two, kind):
    learn = quiet(two[0])
    states = [learn.model.state_dict() for learn in two]
    before = [{k: v.clone() for k, v in s.items()} for s in states]
    curve = Curve(learn, {'one': two[0], 'two': two[1]}, kind=kind)
    straight = curve.straight(15)
    assert rows(straight).tolist() == rows(line(learn, two, ts=np.linspace(0, 1, 15))).tolist()
    np.testing.assert_allclose(rows(curve.evaluate(15)), rows(straight), rtol=1e-3, atol=1e-3)  # where it begins
    curve.fit(25, 0.1)
    bent = curve.evaluate(15)
    ends = max(straight.values['train_loss'][[0, -1]])
    assert straight.max('train_loss') > 3 * ends and bent.max('train_loss') - ends < 0.25 * (
        straight.max('train_loss') - ends
    )
    assert bent.mean('train_loss') < straight.mean('train_loss') and curve.length > straight.length
    for at, (name, state), old, end in zip((0, 1), curve.ends.items(), before, states):
        params = dict(learn.model.named_parameters())
        assert all(
            torch.equal(state[k], old[k]) and torch.equal(end[k], old[k]) and torch.equal(curve.solution(at)[k], old[k])
            for k in params
        )
    assert (
        bent.values['train_loss'][0] == straight.values['train_loss'][0]
        and bent.values['train_loss'][-1] == straight.values['train_loss'][-1]
    )


# the training itself


def flat(state, names):
    return torch.cat([state[k].flatten() for k in names])


def two_layers():
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def written_out(a, b, n_bends, kind, t, batch, wd):
    """The points of the straight curve between two models of `two_layers`, in float64, with the
    gradients of loss and decay at `t`: two layers written out."""
    names, ends = ['0.weight', '0.bias', '2.weight', '2.bias'], [learn.model.state_dict() for learn in (a, b)]

    def between(s):
        return {k: ends[0][k].double() * (1 - s) + ends[1][k].double() * s for k in names}

    points = [between(s) for s in np.linspace(0, 1, n_bends + 2)]
    for p in points[1:-1]:
        for v in p.values():
            v.requires_grad_()
    w = {k: sum(float(s) * p[k] for s, p in zip(CURVES[kind](t, n_bends + 2), points)) for k in names}
    out = (batch[0].double() @ w['0.weight'].T + w['0.bias']).tanh() @ w['2.weight'].T + w['2.bias']
    (F.cross_entropy(out, batch[1]) + wd / 2 * sum((v**2).sum() for v in w.values())).backward()
    return points


def assert_one_step(curve, points, lr):
    for p, bend in zip(points[1:-1], curve.bends, strict=True):
        for k in p:
            torch.testing.assert_close(bend[k].double(), p[k].detach() - lr * p[k].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('kind', CURVES)
@pytest.mark.parametrize('n_bends', [1, 3])
@pytest.mark.parametrize('wd', [0, 0.02])
def test_a_step_moves_the_bends_down_the_gradient_at_a_random_point_with_decay_on_the_weights_there(
    kind, n_bends, wd, monkeypatch
):
    "Against two layers written out."
    dls = loaders(n=16, bs=16)
    a, b = (solution(seed, 1, two_layers, dls) for seed in (0, 1))
    (batch,) = dls.train.new(shuffle=False)
    monkeypatch.setattr('torch.rand', lambda *size: torch.tensor(0.3))
    curve = Curve(quiet(a), [a, b], n_bends, kind)
    curve.fit(1, 0.5, wd=wd, opt_func=SGD)
    assert_one_step(curve, written_out(a, b, n_bends, kind, 0.3, batch, wd), 0.5)


class TwoLayers(nn.Sequential):
    "`two_layers`, run by `way`, a function of the model and its input."

    def __init__(self, way):
        super().__init__(*two_layers())
        self.way = way

    def forward(self, x):
        return self.way(self, x)


class ByHand(torch.autograd.Function):
    "Runs a module again within the backward pass, as reversible networks do."

    @staticmethod
    def forward(ctx, x, m):
        ctx.m = m
        ctx.save_for_backward(x)
        with torch.no_grad():
            return m(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.m(x), grad)
        return x.grad, None


def checkpointed(reentrant):
    return lambda m, x: checkpoint(lambda h: m[2](m[1](h)), m[0](x), use_reentrant=reentrant)


def patched(learn, how):
    "Give the live model a forward of another kind, as users do between fits."
    m = learn.model
    if how == 'compiled forward':
        m.forward = torch.compile(m.forward, backend='eager')
    if how == 'compiled model':
        learn.model = torch.compile(m, backend='eager')
    if how == 'closure over the model':
        m.forward = lambda x: m[2](m[0](x).tanh())
    if how == 'closure over a layer':
        layer = m[0]
        layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)
    if how == 'closure over tensors':
        w, b = m[0].weight, m[0].bias
        m[0].forward = lambda x: x @ w.T + b
    if how == 'hook on a gradient':
        m[0].weight.register_hook(lambda grad: grad * 1)
    if how == 'traced':
        m[0] = torch.jit.trace(m[0], torch.zeros(2, 6))


WAYS = {
    'checkpointed': checkpointed(False),
    'checkpointed, reentrant': checkpointed(True),
    'run again by hand': lambda m, x: ByHand.apply(m[1](m[0](x)), m[2]),
    'in segments': lambda m, x: checkpoint_sequential([m[1], m[2]], 2, m[0](x), use_reentrant=False),
}
PATCHES = [
    'compiled forward',
    'compiled model',
    'closure over the model',
    'closure over a layer',
    'closure over tensors',
    'hook on a gradient',
    'traced',
]


@pytest.mark.parametrize('how', [*WAYS, *PATCHES])
@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_the_gradients_are_right_whatever_the_forward_pass_refers_to_and_whenever_it_is_run(how, monkeypatch):
    """Checkpointing, forwards replaced, compiled or closed over the live model: against two layers
    written out.
    """
    dls = loaders(n=16, bs=16)
    a, b = (solution(seed, 1, two_layers, dls) for seed in (0, 1))
    (batch,) = dls.train.new(shuffle=False)
    points = written_out(a, b, 1, 'bezier', 0.3, batch, 0.02)
    for learn in (a, b):
        if how in WAYS:
            model = TwoLayers(WAYS[how])
            model.load_state_dict(learn.model.state_dict())
            learn.model = model
        elif learn is a:
            patched(learn, how)
    monkeypatch.setattr('torch.rand', lambda *size: torch.tensor(0.3))
    before = everything(quiet(a))
    curve = Curve(a, [a, b]).fit(1, 0.5, wd=0.02, opt_func=SGD)
    assert_one_step(curve, points, 0.5)
    assert_same(before, everything(a))


def test_the_points_are_drawn_uniformly_and_anew_for_each_batch(monkeypatch):
    a, b, ts = solution(0, 1), solution(1, 1), []
    monkeypatch.setattr(
        'fastai_swa.landscape.curve.CURVES', {'bezier': lambda t, n: ts.append(t) or CURVES['bezier'](t, n)}
    )
    Curve(quiet(a), [a, b]).fit(60, 0.01)
    assert len(ts) == len(set(ts)) == 60 * 6
    from scipy import stats

    assert stats.kstest(ts, 'uniform').pvalue > 1e-3


def test_the_learning_rate_is_constant_then_falls_to_a_hundredth_and_stays():
    a, b, lrs = solution(0, 1), solution(1, 1), []

    class Watch(Callback):
        def after_batch(self):
            lrs.append((self.pct_train, self.opt.hypers[-1]['lr'], self.opt.hypers[-1]['wd']))

    a.wd = 0.3
    Curve(quiet(a), [a, b]).fit(20, 0.2, cbs=Watch())
    for pct, lr, wd in lrs:
        assert (
            lr == pytest.approx(0.2 if pct < 0.5 else 0.2 + (0.002 - 0.2) * min(1, (pct - 0.5) / 0.4), abs=0.2 * 0.03)
            and wd == 0
        )
    assert lrs[0][1] == 0.2 and lrs[-1][1] == pytest.approx(0.002)


@pytest.mark.parametrize(
    'opt_func',
    [
        SGD,
        Adam,
        partial(SGD, mom=0.9),
        partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)),
    ],
)
def test_any_optimizer_trains_it(opt_func):
    a, b = solution(0, opt_func=opt_func), solution(1)
    curve = Curve(quiet(a), [a, b])
    start = curve.bends[0]
    curve.fit(1, 0.01)
    assert not torch.equal(curve.bends[0]['0.weight'], start['0.weight'])


def test_an_optimizer_that_is_bound_to_a_model_is_refused():
    a, b = solution(0, 1), solution(1, 1)
    a.opt_func = OptimWrapper(opt=torch.optim.SGD(a.model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="opt_func is needed: the learner's is bound"):
        Curve(a, [a, b]).fit(1)
    Curve(quiet(a), [a, b]).fit(1, opt_func=SGD)


def test_what_requires_no_gradient_and_is_equal_at_both_ends_stays_so_and_else_moves():
    a, b = solution(0, 1), solution(1, 1)
    with torch.no_grad():
        b.model[0].weight.copy_(a.model[0].weight)
    for i in (0, 4):
        a.model[i].weight.requires_grad_(False)  # the second one differs at the ends
    curve = Curve(quiet(a), [a, b])
    middle = curve.bends[0]
    curve.fit(2, 0.1, wd=0.1)
    bend = curve.bends[0]
    assert torch.equal(bend['0.weight'], a.model[0].weight) and not torch.equal(bend['4.weight'], middle['4.weight'])


def test_a_further_fit_goes_on_with_other_points_and_the_seed_says_which():
    a, b = solution(0, 1), solution(1, 1)

    def after(*fits):
        random.seed(), torch.manual_seed(random.randrange(10**6))
        curve = Curve(quiet(a), [a, b])
        for seed in fits:
            curve.fit(1, 0.05, seed=seed)
        return curve.bends[0]['0.weight']

    assert torch.equal(after(0), after(0)) and torch.equal(after(0, 0), after(0, 0))
    assert not torch.equal(after(0), after(1)) and not torch.equal(after(0, 0), after(0))


def test_a_killed_training_goes_on_from_its_checkpoint_and_ends_bitwise_as_a_whole_one(tmp_path):
    a, b = solution(0, 1), solution(1, 1)
    whole = Curve(quiet(a), [a, b]).fit(4, 0.05, cbs=CheckpointCallback(tmp_path / 'whole.ckpt'))
    for event in ('before_batch', 'after_train'):
        path = tmp_path / f'{event}.ckpt'
        with pytest.raises(KeyboardInterrupt):
            Curve(a, [a, b]).fit(4, 0.05, cbs=[CheckpointCallback(path), At(event, 2, raising(KeyboardInterrupt()))])
        resumed = Curve(a, [a, b]).fit(4, 0.05, cbs=CheckpointCallback(path))
        assert torch.equal(resumed.bends[0]['0.weight'], whole.bends[0]['0.weight']) and not path.exists()


def test_interrupted_without_a_checkpoint_the_curve_keeps_what_it_has_learned():
    a, b = solution(0, 1), solution(1, 1)
    curve = Curve(quiet(a), [a, b])
    start = curve.bends[0]['0.weight']
    with pytest.raises(KeyboardInterrupt):
        curve.fit(4, 0.05, cbs=At('before_epoch', 2, raising(KeyboardInterrupt())))
    assert not torch.equal(curve.bends[0]['0.weight'], start)


# any learner


def test_the_learners_callbacks_work_there_as_they_do_here(monkeypatch):
    mixed_precision_on_cpu(monkeypatch, enabled=False)
    seen = []

    class See(Callback):
        order = 50

        def after_pred(self):
            seen.append((self.pred.dtype, self.training))

        def before_batch(self):
            seen.append(torch.is_autocast_enabled('cpu'))

    a, b = solution(0, 1), solution(1, 1)
    a.add_cbs([MixedPrecision('bf16'), See(), GradientClip(0.1), GradientAccumulation(32), SWACallback(0)])
    Curve(quiet(a), [a, b]).fit(2, 0.05, wd=0.01)
    assert seen[:2] == [True, (torch.float32, True)] and len(seen) == 2 * 2 * 6 and not torch.is_autocast_enabled('cpu')
    assert a.swa.n_averaged == 0


def test_a_checkpoint_of_the_learners_own_fits_is_not_touched(tmp_path):
    a, b = solution(0, 1), solution(1, 1)
    a.add_cb(CheckpointCallback(tmp_path / 'own.ckpt'))
    Curve(quiet(a), [a, b]).fit(
        2, 0.05, cbs=At('after_batch', 1, lambda cb: list(tmp_path.iterdir()) and pytest.fail('it wrote a file'))
    )
    assert not list(tmp_path.iterdir())


def test_gradients_that_accumulate_are_the_mean_with_the_decay():
    dls = loaders(n=32, bs=16)

    def bend(n_acc, monkey):
        a, b = solution(0, 1, dls=dls), solution(1, 1, dls=dls)
        if n_acc:
            a.add_cb(GradientAccumulation(n_acc))
        grads = []

        class See(Callback):
            order = 60

            def before_step(self):
                grads.append(self.model.bends[0].grad.clone())

        Curve(quiet(a), [a, b]).fit(1, 1e-9, wd=0.1, cbs=See())
        return grads

    apart, together = bend(None, None), bend(32, None)
    torch.testing.assert_close(together[0], (apart[0] + apart[1]) / 2, rtol=1e-4, atol=1e-6)


class Recurrent(nn.Module):
    "Gives a tuple, keeps a state, wants to be reset."

    def __init__(self):
        super().__init__()
        self.rnn, self.out, self.h, self.n_resets = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3), None, 0

    def reset(self):
        self.h, self.n_resets = None, self.n_resets + 1

    def forward(self, x):
        y, h = self.rnn(x[:, None])
        self.h = h.detach()
        return self.out(y[:, -1])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, a, b):
        return self.left(a) + self.right(b)


def test_any_model_is_trained_along_a_curve():
    from .test_landscape_measure import Tied

    for make in (
        Recurrent,
        Tied,
        lambda: nn.DataParallel(net()),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
    ):
        torch.manual_seed(0)
        a, b = solution(0, 1, make), solution(1, 1, make)
        curve = Curve(quiet(a), [a, b])
        start = {k: v.clone() for k, v in curve.bends[0].items()}
        curve.fit(2, 0.1)
        moved = curve.bends[0]
        assert (
            any(not torch.equal(v, start[k]) for k, v in moved.items()) and np.isfinite(rows(curve.evaluate(3))).all()
        )
    both = loaders()
    for i, dl in enumerate(both.loaders):
        both.loaders[i] = dl.new(after_batch=lambda batch: (batch[0], batch[0], batch[1]))
    both.loaders[0].n_inp = both.loaders[1].n_inp = 2
    both.n_inp = 2
    a, b = solution(0, 1, TwoInputs, both), solution(1, 1, TwoInputs, both)
    assert np.isfinite(rows(Curve(quiet(a), [a, b]).fit(1, 0.1).evaluate(3))).all()


class Shared(nn.Module):
    "One module under two names, and one parameter in two modules."

    def __init__(self):
        super().__init__()
        self.a, self.tied, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.b, self.tied.weight = self.a, self.a.weight

    def forward(self, x):
        return self.out(self.tied(self.b(self.a(x).relu()).relu()))


def test_a_module_with_two_names_and_a_parameter_in_two_modules_are_moved_as_one():
    a, b = solution(0, 1, Shared), solution(1, 1, Shared)
    curve = Curve(quiet(a), [a, b])
    before = curve.ends
    kinds = [type(p) for p in curve._space.scratch.parameters()]
    curve.fit(2, 0.05)
    for (name, old), (_, new) in zip(before.items(), curve.ends.items()):
        assert all(torch.equal(old[k], new[k]) for k in old), name
    assert [type(p) for p in curve._space.scratch.parameters()] == kinds and not curve._space.scratch.a.weight.grad_fn
    bend = curve.bends[0]
    assert (
        torch.equal(bend['a.weight'], bend['b.weight'])
        and torch.equal(bend['a.weight'], bend['tied.weight'])
        and not torch.equal(bend['a.weight'], before['solution 1']['a.weight'])
    )
    point = learner(Shared)
    point.model.load_state_dict(curve.solution(0.3))
    assert curve.evaluate([0.3]).values['valid_loss'][0] == pytest.approx(point.validate()[0], rel=1e-5)


def test_all_forward_passes_of_a_batch_see_one_point():
    "As where a callback compares the predictions for two views of the inputs."
    a, b, seen = solution(0, 1, two_layers), solution(1, 1, two_layers), []

    class Twice(Callback):
        def after_pred(self):
            again = self.learn.model(*self.xb)
            seen.append(torch.equal(again, self.pred))
            self.learn.pred = (self.pred + again) / 2

        def after_backward(self):
            seen.append(torch.equal(self.learn.model(*self.xb), self.pred))

    twice = Curve(quiet(a), [a, b]).fit(1, 0.1, cbs=Twice()).bends[0]
    once = Curve(a, [a, b]).fit(1, 0.1).bends[0]
    assert seen == [True] * 12
    for k, v in once.items():
        torch.testing.assert_close(twice[k], v)


def test_a_model_that_no_gradient_reaches_or_that_steps_within_the_backward_pass_is_refused_before_anything_moves():
    a, b = solution(0, 1, two_layers), solution(1, 1, two_layers)
    other = two_layers()
    a.model.forward = lambda x: other(x)
    before = everything(quiet(a))
    curve = Curve(a, [a, b])
    start = curve.bends[0]
    with pytest.raises(ValueError, match='no gradient reaches the parameters of the model'):
        curve.fit(1, 0.1)
    assert_same(before, everything(a))
    del a.model.forward
    handle = a.model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match='register_post_accumulate_grad_hook'):
        curve.fit(1, 0.1)
    assert all(torch.equal(v, start[k]) for k, v in curve.bends[0].items())
    handle.remove()
    curve.fit(1, 0.1)


def test_bends_that_are_not_finite_are_dropped_with_a_warning():
    a, b = solution(0, 1), solution(1, 1)
    curve = Curve(quiet(a), [a, b]).fit(1, 0.1)
    start = curve.bends[0]
    with pytest.warns(UserWarning, match='the bends are not finite after this training'):
        curve.fit(1, 0.1, cbs=At('after_backward', 0, lambda cb: cb.learn.model.bends[0].grad.fill_(float('nan'))))
    assert all(torch.equal(v, start[k]) for k, v in curve.bends[0].items()) and torch.isfinite(start['0.weight']).all()


def test_after_a_first_training_that_is_not_finite_the_bends_are_on_the_straight_line_again():
    a, b = solution(0, 1), solution(1, 1)
    curve = Curve(quiet(a), [a, b], 2)
    start = curve.bends
    with pytest.warns(UserWarning, match='the bends are not finite after this training'):
        curve.fit(1, 0.1, cbs=At('after_backward', 0, lambda cb: cb.learn.model.bends[0].grad.fill_(float('nan'))))
    for bend, old in zip(curve.bends, start):
        assert all(torch.equal(v, old[k]) for k, v in bend.items())


# bends in several parts


@pytest.mark.parametrize('n_bends', [1, 3])
@pytest.mark.parametrize('opt_func', [SGD, Adam])
def test_bends_in_several_parts_are_trained_as_in_one(n_bends, opt_func, monkeypatch, tmp_path):
    "Weight decay, something frozen, accumulated gradients, a checkpoint on the way: it all goes part by part."
    a, b = solution(0, 1), solution(1, 1)
    with torch.no_grad():
        b.model[0].weight.copy_(a.model[0].weight)
    a.model[0].weight.requires_grad_(False)
    n_parts = []

    def trained(least):
        monkeypatch.setattr(curve_file, '_LEAST_OF_PART', least)
        curve, path = Curve(quiet(a), [a, b], n_bends), tmp_path / f'{least}.ckpt'
        look = At('before_epoch', 0, lambda cb: n_parts.append(len(list(cb.learn.model.bends)) // n_bends))
        stop = At('before_batch', 1, raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            curve.fit(3, 0.05, 0.1, opt_func, [GradientAccumulation(32), CheckpointCallback(path), look, stop])
        again = Curve(a, [a, b], n_bends)
        return again.fit(3, 0.05, 0.1, opt_func, [GradientAccumulation(32), CheckpointCallback(path)]).bends

    whole, parts = trained(1 << 18), trained(1)
    assert n_parts[0] == 1 < n_parts[1] <= 8
    for one, other in zip(whole, parts):
        for k, v in one.items():
            torch.testing.assert_close(other[k], v, rtol=1e-6, atol=1e-7)


def test_groups_of_parameters_keep_their_order_and_are_of_about_one_size():
    params = [torch.zeros(n) for n in (5, 100, 1, 1, 1, 200, 3, 90, 90, 90, 7)]
    for least in (1, 150, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(curve_file, '_LEAST_OF_PART', least)
            groups = curve_file._grouped(params)
        assert [id(p) for group in groups for p in group] == [id(p) for p in params]
        assert all(sum(map(len, group)) >= min(least, sum(map(len, params))) for group in groups[:-1])
        assert len(groups) <= 8 and (len(groups) == 1) == (least == 10**6)


def test_a_further_training_leaves_what_the_curve_has_given_out_alone():
    a, b = solution(0, 1), solution(1, 1)
    curve = Curve(quiet(a), [a, b])
    given = [curve.bends[0], curve.ends['solution 1'], curve.solution(0.5)]
    kept = [{k: v.clone() for k, v in state.items()} for state in given]
    curve.fit(1, 0.1).fit(1, 0.1)
    for one, other in zip(given, kept):
        assert_same(one, other)


# nothing is changed


@pytest.mark.parametrize('how', ['success', 'error', 'Ctrl-C'])
def test_the_learner_is_bitwise_as_before_a_curve_was_trained_whatever_ends_it(how):
    learn = solution(0, 2, cbs=Counting())
    other = solution(1, 1)
    learn.model[0].train(), learn.model[1].train()
    quiet(learn)
    before = everything(learn)
    curve = Curve(learn, [learn, other])
    if how == 'success':
        curve.fit(2, 0.1, wd=0.01)
        curve.evaluate(3), curve.solution(0.5), curve.length
    else:
        with pytest.raises(KeyboardInterrupt if how == 'Ctrl-C' else ValueError):
            curve.fit(
                2,
                0.1,
                cbs=At('after_backward', 1, raising(KeyboardInterrupt() if how == 'Ctrl-C' else ValueError('here'))),
            )
    assert_same(before, everything(learn))


@each_merging
@pytest.mark.parametrize('mode', [True, False], ids=['train', 'eval'])
def test_a_curve_of_a_model_that_merges_in_eval_is_that_of_its_twin_that_does_not_and_the_learner_stays(make, mode):
    (learn, twin), (other, other_twin) = (merging_beside_twin(make, seed, mode) for seed in (0, 1))
    before = [everything(quiet(each)) for each in (learn, other)]
    curve, expected = Curve(learn, [learn, other]), Curve(quiet(twin), [twin, other_twin])
    for each in (curve, expected):
        each.fit(2, 0.05, wd=0.01)
    for state, each in zip(before, (learn, other)):
        assert_same(state, everything(each))
    for k, _ in twin.model.named_parameters():
        torch.testing.assert_close(curve.bends[0][k], expected.bends[0][k], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows(curve.evaluate(3)), rows(expected.evaluate(3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('make', [lora.MergedMixed, net], ids=['merged', 'plain'])
@pytest.mark.parametrize('grad', [False, True])
def test_two_ctrl_c_in_a_row_leave_the_learner_of_a_curve_bitwise_as_before(make, grad, ctrl_c, more_ctrl_c):
    learn, other = merging_beside_twin(make, 0, False)[0], merging_beside_twin(make, 1, False)[1].model.state_dict()
    quiet(learn)
    for p in learn.model.parameters():
        p.grad = torch.ones_like(p) if grad else None
    before = everything(learn)
    curve = Curve(learn, [learn, other])
    start = curve.bends[0]
    with pytest.raises(KeyboardInterrupt):
        curve.fit(2, 0.1, cbs=At('after_pred', 1, lambda cb: ctrl_c(), batch=1))
    assert_same(before, everything(learn))
    assert all(p.grad.eq(1).all() if grad else p.grad is None for p in learn.model.parameters())
    assert any(not torch.equal(v, start[k]) for k, v in curve.bends[0].items())  # what it has learned


def test_parameters_of_the_loss_get_no_gradient():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, pred, y):
            return F.cross_entropy(pred, y) * self.w

    a, b = solution(0, 1), solution(1, 1)
    a.loss_func = Weighted()
    for grad in (None, torch.tensor(3.0)):
        a.loss_func.w.grad = None if grad is None else grad.clone()
        Curve(quiet(a), [a, b]).fit(1, 0.05)
        assert a.loss_func.w.grad is None if grad is None else a.loss_func.w.grad == grad


# along the curve


def test_at_each_point_of_a_curve_batch_norm_is_that_of_a_separate_update_bn():
    learn, other = (solution(seed, 2, dls=unshuffled()) for seed in (0, 1))
    for kind in CURVES:
        curve = Curve(quiet(learn), [learn, other], 2, kind).fit(1, 0.1)
        found = curve.evaluate([0, 0.2, 0.5, 1])
        points = [curve.ends['solution 1'], *curve.bends, curve.ends['solution 2']]
        for t, row in zip(found.t, rows(found)):
            state = mixed(CURVES[kind](t, 4), points)
            np.testing.assert_allclose(row, by_hand(learn, state), rtol=2e-5, atol=1e-6)
            torch.testing.assert_close(
                {k: v for k, v in curve.solution(t).items() if 'running' not in k and 'tracked' not in k},
                {k: v for k, v in state.items() if 'running' not in k and 'tracked' not in k},
            )


def test_its_length_and_arc_are_those_of_the_way_through_its_points():
    learn, other = solution(0, 1), solution(1, 1)
    for kind in CURVES:
        curve = Curve(quiet(learn), [learn, other], kind=kind).fit(3, 0.1)
        names = [k for k, _ in learn.model.named_parameters()]
        drawn = torch.stack([flat(curve.solution(t), names).double() for t in np.linspace(0, 1, 401)])
        lengths = np.concatenate([[0], np.cumsum((drawn[1:] - drawn[:-1]).norm(dim=1).numpy())])
        found = curve.evaluate([0, 0.25, 0.5, 1], sets='valid')
        np.testing.assert_allclose(found.arc, lengths[[0, 100, 200, 400]], rtol=1e-4)
        assert curve.length == found.length == pytest.approx(lengths[-1], rel=1e-4)


def test_an_interrupted_evaluation_goes_on_and_one_of_another_curve_is_refused(tmp_path):
    learn, other = solution(0, 1), solution(1, 1)
    curve = Curve(quiet(learn), [learn, other]).fit(1, 0.1)
    whole = curve.evaluate(4)

    def stop(i, n):
        if i == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        curve.evaluate(4, file=tmp_path / 'it', progress=stop)
    assert rows(curve.evaluate(4, file=tmp_path / 'it')).tolist() == rows(whole).tolist()
    curve.fit(1, 0.1)
    with pytest.raises(ValueError, match='of another measurement, with points='):
        curve.evaluate(4, file=tmp_path / 'it')


def test_a_curve_that_is_saved_is_loaded_bitwise(tmp_path):
    learn, other = solution(0, 1), solution(1, 1)
    curve = Curve(quiet(learn), {'one': learn, 'two': other}, 2, 'chain').fit(1, 0.1)
    curve.save(tmp_path / 'curve.pth')
    again = Curve.load(tmp_path / 'curve.pth', learn)
    assert repr(again) == repr(curve) and repr(curve).startswith('Polygonal chain with 2 bends from one to two, ')
    for t in (0, 0.2, 0.7, 1):
        assert all(torch.equal(v, again.solution(t)[k]) for k, v in curve.solution(t).items())
    more = [c.fit(1, 0.1).bends[0]['0.weight'] for c in (curve, again)]
    assert torch.equal(*more)  # it goes on where the other one goes on
    with pytest.raises(ValueError, match='does not hold weights of this architecture'):
        Curve.load(tmp_path / 'curve.pth', learner(net(width=5)))
    (tmp_path / 'other.pth').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='is damaged, or it is no curve of fastai_swa'):
        Curve.load(tmp_path / 'other.pth', learn)


@pytest.mark.parametrize(
    'call, error, said',
    [
        (lambda a, b: Curve(a, [a, b], kind='spline'), ValueError, "kind must be 'bezier' or 'chain', not 'spline'"),
        (lambda a, b: Curve(a, [a, b], n_bends=0), ValueError, 'n_bends must be at least 1'),
        (lambda a, b: Curve(a, [a]), ValueError, 'solutions must be 2 for a curve, not 1'),
        (
            lambda a, b: Curve(a, {'x': a, 'y': a}),
            ValueError,
            'x and y are the same weights: a curve needs two that differ',
        ),
        (lambda a, b: Curve(a, [a, b]).fit(0), ValueError, 'n_epoch must be at least 1'),
        (lambda a, b: Curve(a, [a, b]).fit(1, 0), ValueError, 'lr must be positive, not 0'),
        (lambda a, b: Curve(a, [a, b]).fit(1, 'fast'), TypeError, "lr must be a number, not 'fast'"),
        (lambda a, b: Curve(a, [a, b]).fit(1, wd=-1), ValueError, 'wd must not be negative, not -1'),
        (lambda a, b: Curve(a, [a, b]).fit(1, seed=0.5), TypeError, 'seed must be an int'),
        (lambda a, b: Curve(a, [a, b]).fit(1, cbs=SWACallback(0)), TypeError, 'cbs has a SWACallback'),
        (lambda a, b: Curve(a, [a, b]).solution(1.5), ValueError, 'ts must be from 0 to 1'),
        (lambda a, b: Curve(a, [a, b]).evaluate([-0.1, 1]), ValueError, 'ts must be from 0 to 1'),
    ],
)
def test_what_cannot_be_used_is_one_clear_sentence(call, error, said):
    a, b = learner(seed=0), learner(seed=1)
    with pytest.raises(error, match=said):
        call(a, b)
