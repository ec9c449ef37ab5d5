import copy
import os
import random
import signal
import sys
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastai_swa import update_bn
from fastai_swa.batchnorm import StatisticsWatch, batch_moments, statistics, tracked_bn, union

from .helpers import net
from .norms import (
    BatchNormAct,
    BatchRenorm,
    FrozenBatchNorm2d,
    GhostBatchNorm,
    NormEval,
    OtherWayRound,
    OtherWayRoundNorm,
    RunningBatchNorm,
)
from .reference import twins

TOL = dict(rtol=2e-5, atol=2e-5)


def assert_exact(model, batches, before, frozen=()):
    "The statistics of `model` equal those of the slow twin run on `before`, the model as it was."
    expected = twins.bn_statistics(before, batches, frozen)
    layers = {name: m for name, m in model.named_modules() if name in expected and m.running_mean is not None}
    assert layers
    for name, m in layers.items():
        mean, var = expected[name]
        torch.testing.assert_close(m.running_mean.double(), mean, **TOL)
        torch.testing.assert_close(m.running_var.double(), var, **TOL)


def random_net(rng):
    """Batch norm in one, two and three dimensions, in random widths, with and without affine,
    momentum or tracking.
    """
    dim = rng.choice([1, 2, 3])
    conv, bn = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1]
    layers, width = [], 2
    for _ in range(rng.randint(1, 3)):
        out = rng.randint(1, 5)
        layers += [
            conv(width, out, 3, padding=1),
            bn(
                out,
                affine=rng.random() < 0.7,
                momentum=rng.choice([0.1, 0.9, None]),
                track_running_stats=rng.random() < 0.8,
            ),
            nn.ReLU(),
            nn.Dropout(0.5),
        ]
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3), nn.SyncBatchNorm(3)), (2, *[4] * dim)


@pytest.mark.parametrize('seed', range(10))
def test_batch_norm_is_exact_for_random_networks_and_batch_sizes(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, shape = random_net(rng)
    sizes = [rng.randint(2, 9) for _ in range(rng.randint(1, 6))]
    batches = [(torch.randn(n, *shape) * rng.uniform(0.1, 5) + rng.uniform(-3, 3),) for n in sizes]
    model.train(rng.random() < 0.5)
    model(batches[0][0])
    before = copy.deepcopy(model)
    update_bn([(x, None) for (x,) in batches], model)
    assert_exact(model, batches, before)
    for (name, a), b in zip(model.named_modules(), before.modules()):
        assert a.training == b.training and getattr(a, 'momentum', 0) == getattr(b, 'momentum', 0), name
        if getattr(a, 'running_mean', None) is not None:
            assert a.num_batches_tracked.item() == len(batches)


# what torch.optim.swa_utils.update_bn gets wrong


def test_a_small_last_batch_counts_by_its_samples():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1000, 1), 50 + torch.randn(2, 1)])
    model = nn.Sequential(nn.BatchNorm1d(1))
    update_bn([(b,) for b in x.split(100)], model)
    assert model[0].running_mean.item() == pytest.approx(x.mean().item(), abs=1e-4)
    assert model[0].running_var.item() == pytest.approx(x.var().item(), rel=1e-4)


def test_the_spread_between_batches_counts():  # a loader sorted by class
    torch.manual_seed(0)
    x = torch.cat([torch.randn(100, 1), 10 + torch.randn(100, 1)])
    model = nn.Sequential(nn.BatchNorm1d(1))
    update_bn(list(x.split(20)), model)
    assert model[0].running_var.item() == pytest.approx(x.var().item(), rel=1e-5) and x.var() > 20


def test_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(2))
    x = torch.randn(64, 2)
    update_bn([x], model.train())
    torch.testing.assert_close(model[1].running_mean, x.mean(0))


def test_a_layer_used_twice_pools_both_uses():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, a, b):
            return self.bn(a).sum() - self.bn(b).sum()

    batches = [(torch.randn(n, 3), torch.randn(n + 1, 3) * 3 + 2) for n in (4, 7)]
    model = Siamese()
    update_bn([(*b, 'target') for b in batches], model)
    assert_exact(model, batches, Siamese())
    both = torch.cat([t for b in batches for t in b])
    torch.testing.assert_close(model.bn.running_mean, both.mean(0))


# frozen layers


def in_eval(m):
    m.eval()


def standing_still(m):
    m.momentum = 0.0


def not_tracking(m):
    m.track_running_stats = False


@pytest.mark.parametrize('freeze', [in_eval, standing_still, not_tracking])
def test_frozen_layers_keep_their_statistics_and_normalise_by_them(freeze):
    torch.manual_seed(0)
    model = net().train()
    model[1].running_mean.uniform_(), model[1].running_var.uniform_(0.5, 2)
    freeze(model[1])
    before, x = copy.deepcopy(model), torch.randn(30, 6)
    update_bn(list(x.split(10)), model)
    for k in ('running_mean', 'running_var', 'num_batches_tracked'):
        assert torch.equal(getattr(model[1], k), getattr(before[1], k))
    assert_exact(model, [(b,) for b in x.split(10)], before, frozen=('1',))


@pytest.mark.parametrize('mode', [True, False])
def test_batch_norm_whose_gamma_is_fixed_is_refreshed_like_any_other(mode):
    torch.manual_seed(0)
    model, x = net().train(mode), torch.randn(30, 6)
    for m in (model[1], model[5]):
        m.weight.requires_grad_(False), m.bias.requires_grad_(False)
    before = copy.deepcopy(model)
    update_bn(list(x.split(10)), model)
    assert_exact(model, [(b,) for b in x.split(10)], before)


@pytest.mark.parametrize('mode', [True, False])
def test_batch_norm_that_the_models_own_train_freezes_is_frozen_whatever_the_mode_the_model_is_in(mode):
    torch.manual_seed(0)
    backbone = NormEval(nn.Linear(6, 6), nn.BatchNorm1d(6))
    model, x = nn.Sequential(backbone, nn.Linear(6, 4), nn.BatchNorm1d(4)).train(mode), torch.randn(30, 6)
    modes = [m.training for m in model.modules()]
    assert list(tracked_bn(model)) == ['2'] and list(tracked_bn(backbone)) == []
    assert modes == [m.training for m in model.modules()]
    before = copy.deepcopy(model)
    update_bn(list(x.split(10)), model)
    assert torch.equal(backbone[1].running_mean, before[0][1].running_mean)
    assert_exact(model, [(b,) for b in x.split(10)], before, frozen=('0.1',))
    assert modes == [m.training for m in model.modules()]


def test_asking_a_model_in_eval_mode_changes_nothing_in_it_though_its_train_does():
    class Merges(nn.Linear):  # as LoRA, and not bitwise back
        def __init__(self):
            super().__init__(4, 4)
            self.delta, self.calls, self.merged = nn.Parameter(torch.randn(4, 4) / 3), 0, False

        def train(self, mode=True):
            super().train(mode)
            if mode == self.merged:
                self.weight.data += self.delta * (-1 if mode else 1)
            self.merged, self.calls = not mode, self.calls + 1
            return self

    model = nn.Sequential(Merges(), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout())).train().eval()
    model[0].delta.data *= 1.1
    bits, calls = [p.clone() for p in model.parameters()], model[0].calls
    assert list(tracked_bn(model)) == ['1.0']
    assert all(map(torch.equal, bits, model.parameters())) and model[0].calls == calls and model[0].merged
    assert not any(m.training for m in model.modules())


def test_in_a_model_wholly_in_eval_mode_every_layer_is_refreshed():
    assert list(tracked_bn(net().eval())) == list(tracked_bn(net().train())) == ['1', '5']


def test_without_batch_norm_or_with_all_of_it_frozen_the_loader_is_not_touched():
    def untouchable():
        raise AssertionError('the loader was read')
        yield

    update_bn(untouchable(), nn.Linear(2, 2))
    model = net().train()
    for m in (model[1], model[5]):
        m.eval()
    update_bn(untouchable(), model)
    update_bn(untouchable(), nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))
    update_bn(untouchable(), nn.Sequential(nn.InstanceNorm1d(3), nn.LayerNorm(3), FrozenBatchNorm2d(3)))


# Layers of all kinds, drawn: (make, given the number of channels; can it be frozen by momentum 0?)
KINDS = [
    nn.BatchNorm2d,
    partial(nn.BatchNorm2d, momentum=None),
    partial(nn.BatchNorm2d, affine=False),
    nn.SyncBatchNorm,
    BatchNormAct,
    BatchRenorm,
    partial(OtherWayRoundNorm, dim=4),
    partial(GhostBatchNorm, num_splits=2),
    partial(nn.InstanceNorm2d, track_running_stats=True),
    FrozenBatchNorm2d,
    RunningBatchNorm,
    partial(RunningBatchNorm, factors=True),
    partial(nn.BatchNorm2d, track_running_stats=False),
]
FREEZES = [in_eval, standing_still, lambda m: [p.requires_grad_(False) for p in m.parameters()], lambda m: None]


@st.composite
def networks(draw, kinds=KINDS):
    """A network with normalising layers of drawn kinds, some frozen in one of several ways; perhaps
    one that freezes some of its layers in `train()`.
    """
    torch.manual_seed(draw(st.integers(0, 99)))
    width, blocks = draw(st.integers(1, 3)), []
    for make in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=3)):
        layer = make(width)
        for p in layer.parameters():
            nn.init.uniform_(p, 0.5, 1.5)
        block = draw(st.sampled_from([nn.Sequential, nn.Sequential, NormEval]))(
            nn.Conv2d(blocks and width or 2, width, 3), layer, nn.Dropout(0.3)
        )
        blocks.append(block.train())
        freeze = draw(st.sampled_from(FREEZES))
        if freeze is not standing_still or isinstance(layer, nn.modules.batchnorm._NormBase):
            freeze(layer)
    model = nn.Sequential(*blocks)
    return model if draw(st.booleans()) else model.eval()


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(networks())
def test_what_moves_in_training_is_what_a_model_is_asked_for_and_what_a_watch_sees(model):
    batches = [(torch.randn(4, 2, 8, 8) * 2 + 1,) for _ in range(2)]
    moved = twins.moved_by_training(model, batches)
    asked, bits, modes = tracked_bn(model), twins.running_bits(model), [m.training for m in model.modules()]
    assert list(asked) == moved and twins.running_bits(model) == bits and modes == [m.training for m in model.modules()]
    if not any(modes):
        model.train()
    watch = StatisticsWatch(model)
    assert watch.moved() == []
    for m in model.modules():  # counters and versions say nothing
        if getattr(m, 'num_batches_tracked', None) is not None:
            m.num_batches_tracked += 1
        for b in m._buffers.values():
            if b is not None:
                b.copy_(b.clone())
    assert watch.moved() == []
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for (x,) in batches:
        model(x).square().mean().backward()
        opt.step()
    assert watch.moved() == moved
    assert StatisticsWatch(model).moved() == []


def test_a_watch_compares_bits_and_copes_with_layers_that_come_go_or_change():
    model = nn.ModuleDict(
        {
            'nan_': nn.BatchNorm1d(2),
            'zero_': nn.BatchNorm1d(2),
            'half_': nn.BatchNorm1d(3).half(),
            'one_': nn.InstanceNorm1d(1, track_running_stats=True),
            'gone_': nn.BatchNorm1d(2),
            'lazy_': nn.LazyBatchNorm1d(),
            'rebound_': OtherWayRound(2),
            'named_': OtherWayRoundNorm(2),
        }
    )
    model['nan_'].running_mean.fill_(float('nan'))
    watch = StatisticsWatch(model)
    assert watch.moved() == []
    model['zero_'].running_mean.neg_()  # -0. is not 0. bitwise
    assert watch.moved() == ['zero_']
    model['half_'].running_var[1] = 2
    model['one_'].running_var += 1
    model['named_'].moving_mean = model['named_'].moving_mean + 1
    model['rebound_'].moving_mean = model['rebound_'].moving_mean + 1  # no norm by its name, one by what it keeps
    assert watch.moved() == ['zero_', 'half_', 'one_', 'rebound_', 'named_']
    del model['gone_']
    model['lazy_'](torch.randn(4, 2)), model.add_module('new_', nn.BatchNorm1d(2))
    assert watch.moved() == ['zero_', 'half_', 'one_', 'lazy_', 'rebound_', 'named_', 'new_']
    model['nan_'].running_mean = torch.zeros(2)
    assert watch.moved()[0] == 'nan_'


def test_what_moved_in_several_processes_is_their_union_in_the_first_ones_order():
    assert union([['b', 'a'], ['c', 'a'], [], ['d', 'b', 'c']]) == ['b', 'a', 'c', 'd'] and union([[]]) == []


# layers that normalise in a way of their own


def of_channels(xs):
    return torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1)


def weighted(xs, statistic):
    "Mean over the samples of what `statistic` gives for each batch."
    return sum(len(x) * statistic(x) for x in xs) / sum(map(len, xs))


def split(x, n):
    return x.reshape(-1, n * x.shape[1], *x.shape[2:]).transpose(0, 1).flatten(1)


# class -> statistic -> its value, from all inputs of a layer
TWINS = {
    nn.InstanceNorm2d: {
        'running_mean': lambda xs, m: torch.cat([x.mean((2, 3)) for x in xs]).mean(0),
        'running_var': lambda xs, m: torch.cat([x.var((2, 3)) for x in xs]).mean(0),
    },
    GhostBatchNorm: {
        'running_mean': lambda xs, m: weighted(xs, lambda x: split(x, m.num_splits).mean(1)),
        'running_var': lambda xs, m: weighted(xs, lambda x: split(x, m.num_splits).var(1)),
    },
    BatchRenorm: {
        'running_mean': lambda xs, m: of_channels(xs).mean(1),
        'running_std': lambda xs, m: of_channels(xs).std(1, correction=0) + m.eps,
    },
    OtherWayRoundNorm: {
        'moving_mean': lambda xs, m: of_channels(xs).mean(1),
        'moving_var': lambda xs, m: of_channels(xs).var(1, correction=0),
    },
    RunningBatchNorm: {
        'sums': lambda xs, m: weighted(xs, lambda x: x.sum((0, 2, 3))),
        'sqrs': lambda xs, m: weighted(xs, lambda x: (x * x).sum((0, 2, 3))),
        'count': lambda xs, m: weighted(xs, lambda x: torch.tensor(x.numel() / x.shape[1]).double()),
    },
    nn.BatchNorm2d: {
        'running_mean': lambda xs, m: of_channels(xs).mean(1),
        'running_var': lambda xs, m: of_channels(xs).var(1),
    },
}
EXACT = [
    k
    for k in KINDS
    if k not in (RunningBatchNorm,)
    and getattr(k, 'func', k) is not RunningBatchNorm
    and k is not FrozenBatchNorm2d
    and k is not nn.SyncBatchNorm
]


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(networks(EXACT), st.lists(st.sampled_from([2, 4, 6, 10]), min_size=1, max_size=4))
def test_layers_of_all_kinds_hold_what_a_slow_twin_takes_from_the_batches(model, sizes):
    batches = [(torch.randn(n, 2, 8, 8) * 2 + 1,) for n in sizes]
    for m in model.modules():  # statistics far from right, as those of other weights are
        for b in statistics(m).values():
            b.uniform_(0.5, 3)
    names, before = list(tracked_bn(model)), copy.deepcopy(model)
    for m in before.modules():  # normalises by its batch alone
        if isinstance(m, BatchRenorm):
            m.r_max, m.d_max = 1.0, 0.0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        update_bn([x for (x,) in batches], model)
    inputs = twins.inputs_of(before, names, batches)
    for name, m in model.named_modules():
        if name in names:
            expected = next(v for cls, v in TWINS.items() if isinstance(m, cls))
            for k, f in expected.items():
                torch.testing.assert_close(m._buffers[k].double().flatten(), f(inputs[name], m), rtol=2e-4, atol=2e-4)
        else:
            for k, b in m._buffers.items():
                assert b is None or torch.equal(b, before.get_submodule(name)._buffers[k])
    for a, b in zip(model.modules(), before.modules()):
        assert (
            a.training == b.training
            and vars(a).keys() == vars(b).keys()
            and getattr(a, 'momentum', 0) == getattr(b, 'momentum', 0)
            and 'forward' not in vars(a)
        )


def trained(layer, x):
    """A network with `layer` whose statistics are right for its weights, and the same with
    statistics of other weights.
    """
    torch.manual_seed(0)
    right = nn.Sequential(nn.Conv2d(2, 4, 3), layer, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).train()
    with torch.no_grad():
        for i in torch.randperm(200) % 4:
            right(x[16 * i : 16 * i + 16])
    other = copy.deepcopy(right)
    for m in other.modules():
        for k, b in statistics(m).items():
            if k not in ('batch', 'step'):
                b.mul_(1.7).add_(0.6)
    return right, other


def distance(a, b, x):
    with torch.no_grad():
        return ((a.eval()(x) - b.eval()(x)).abs().mean() / b(x).std()).item()


@pytest.mark.parametrize(
    'layer, said, share',
    [
        (BatchRenorm(4), None, 0.1),
        (BatchRenorm(4, momentum=0.01), None, 0.1),
        (GhostBatchNorm(4, num_splits=4), None, 0.1),
        (BatchNormAct(4), None, 0.1),
        (OtherWayRoundNorm(4, 4), None, 0.1),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), None, 0.1),
        (RunningBatchNorm(4), None, 0.1),
        (RunningBatchNorm(4, factors=True), "statistics of layer '1' are no running averages", 0.25),
    ],
)
def test_statistics_of_other_weights_become_right_for_these_and_what_is_not_exact_is_said(layer, said, share):
    torch.manual_seed(1)
    x = torch.randn(64, 2, 7, 7) * 2 + 1
    right, other = trained(layer, x)
    far = distance(copy.deepcopy(other), right, x)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        update_bn(list(x.split(16)), other.train())
    assert len(warned) == (said is not None) and all(said in str(w.message) for w in warned)
    assert far > 0.3 and distance(other, right, x) < share * far


def test_a_layer_that_can_take_some_batches_has_the_statistics_of_these_and_the_others_of_all():
    torch.manual_seed(0)
    model = nn.Sequential(GhostBatchNorm(2, num_splits=4), nn.BatchNorm2d(2)).train()
    batches = torch.randn(22, 2, 3, 3).split(8)  # the last one of 6
    with pytest.warns(
        UserWarning,
        match=r"layer '0' cannot take every batch .*RuntimeError: .*: the statistics there are those of the other "
        r"batches",
    ) as said:
        update_bn(batches, model)
    assert len(said) == 1 and model[1].num_batches_tracked == 3
    torch.testing.assert_close(
        model[0].running_mean.double(),
        TWINS[GhostBatchNorm]['running_mean']([b.double() for b in batches[:2]], model[0]),
        **TOL,
    )


def test_an_instance_norm_whose_batches_begin_with_one_sample_is_none_over_batches():
    model, x = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True)), torch.randn(9, 2, 3, 3) * 2
    batches = x.split([1, 3, 1, 4])
    update_bn(batches, model)
    for k, f in TWINS[nn.InstanceNorm2d].items():
        torch.testing.assert_close(model[0]._buffers[k].double(), f([b.double() for b in batches], model[0]), **TOL)


def test_a_batch_left_out_leaves_no_trace_in_layers_of_another_kind():
    torch.manual_seed(0)
    kinds = (
        BatchRenorm(2),
        RunningBatchNorm(2),
        RunningBatchNorm(2, factors=True),
        nn.InstanceNorm2d(2, track_running_stats=True),
    )
    model = nn.Sequential(*kinds, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(2)).train()
    batches = [torch.randn(4, 2, 3, 3), torch.randn(5, 2, 3, 3)]
    for m in kinds[1:3]:
        m.batch.fill_(100)
    other = copy.deepcopy(model)
    with pytest.warns(UserWarning):
        update_bn(batches, other)
    with pytest.warns(UserWarning, match='1 of 3 batches were left out'):
        update_bn([batches[0], torch.full((1, 2, 3, 3), 50.0), batches[1]], model)
    for (k, a), b in zip(model.named_buffers(), other.buffers()):
        torch.testing.assert_close(a, b, msg=lambda m, k=k: f"{k}: {m}")


def test_a_layer_that_works_in_place_or_is_used_twice_is_seen_right():
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNormAct(2)

        def forward(self, x):
            return self.norm(self.norm(x.clone()) * 2)

    model, x = Twice(), torch.randn(20, 2, 3, 3)
    update_bn(list(x.split(10)), model)
    seen = twins.inputs_of(Twice(), ['norm'], [(b,) for b in x.split(10)])['norm']
    torch.testing.assert_close(model.norm.running_var.double(), of_channels(seen).var(1), **TOL)


def test_a_layer_that_normalises_by_its_running_statistics_in_place_is_seen_right():
    class InPlace(BatchRenorm):
        def forward(self, x):
            return x.copy_(super().forward(x))

    torch.manual_seed(0)
    model, x = nn.Sequential(InPlace(2, momentum=0.2), nn.BatchNorm2d(2)), torch.randn(20, 2, 3, 3) * 3 + 1
    model[0].running_mean.fill_(0.5), model[0].running_std.fill_(2)
    model[0].register_buffer('running_third', torch.zeros(1))  # so that it is averaged, no moments
    forward = model[0].forward

    def third(x):
        cube = x.pow(3).mean()
        out = forward(x)
        if model[0].training:
            model[0].running_third.lerp_(cube.view(1), 0.2)
        return out

    model[0].forward = third
    update_bn([b.clone() for b in x.split(10)], model)
    torch.testing.assert_close(model[0].running_third, x.pow(3).mean().view(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model[0].running_mean, x.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert model[1].running_mean.abs().max() < 1e-4 and (model[1].running_var - 1).abs().max() < 0.02


def test_channels_may_be_the_last_axis_and_buffers_may_have_been_pruned():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('running_mean', torch.zeros(3))
            self.register_buffer('running_var', torch.ones(3))

        def forward(self, x):
            if self.training:
                self.running_mean.lerp_(x.mean((0, 1)), 0.1)
                self.running_var.lerp_(x.var((0, 1)), 0.1)
            return (x - self.running_mean) / self.running_var.sqrt()

    model, x = nn.Sequential(Last()), torch.randn(20, 5, 3) * 3 + 2
    update_bn(list(x.split(6)), model)
    torch.testing.assert_close(model[0].running_var, x.flatten(0, 1).var(0), **TOL)
    pruned = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(5, 4), nn.BatchNorm1d(4))
    for k in ('running_mean', 'running_var'):
        setattr(pruned[0], k, getattr(pruned[0], k)[:5].clone())
    for k in ('weight', 'bias'):
        setattr(pruned[0], k, nn.Parameter(getattr(pruned[0], k)[:5].detach().clone()))
    before, x = copy.deepcopy(pruned), torch.randn(30, 5)
    update_bn(list(x.split(10)), pruned)
    assert_exact(pruned, [(b,) for b in x.split(10)], before)


def test_codebooks_losses_and_spectral_norm_are_not_touched():
    class NormEMAVectorQuantizer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('cluster_size', torch.zeros(4))

        def forward(self, x):
            if self.training:
                self.cluster_size += 1
            return x

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('running_loss', torch.zeros(1))

        def forward(self, x):
            if self.training:
                self.running_loss += 1
            return x

    model = nn.Sequential(
        torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
        nn.utils.spectral_norm(nn.Linear(3, 3)),
        NormEMAVectorQuantizer(),
        Loss(),
        nn.BatchNorm1d(3),
    ).train()
    model(torch.randn(8, 3))
    before = {k: v.clone() for k, v in model.named_buffers() if not k.startswith('4.')}
    assert list(tracked_bn(model)) == ['4']
    update_bn([torch.randn(8, 3)], model)
    assert all(torch.equal(v, dict(model.named_buffers())[k]) for k, v in before.items())


def test_running_statistics_outside_of_buffers_are_named():
    class PlainNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.running_mean = torch.zeros(3)

        def forward(self, x):
            return x - self.running_mean

    class FixedNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.running_mean = nn.Parameter(torch.zeros(3), requires_grad=False)

        def forward(self, x):
            return x - self.running_mean

    for model in (nn.Sequential(PlainNorm(), FixedNorm()), nn.Sequential(PlainNorm(), FixedNorm(), nn.BatchNorm1d(3))):
        with pytest.warns(UserWarning, match="running statistics of layers '0', '1' are not buffers") as said:
            update_bn([torch.randn(8, 3)], model)
        assert len(said) == 1


# modes that others set


class Detector(nn.Module):
    "Another signature in train mode, as detectors have it."

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4))
        self.head = nn.Sequential(
            nn.Linear(4, 8), nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True), nn.BatchNorm1d(4)
        )

    def forward(self, x, targets=None):
        if self.training:
            assert targets is not None
        return self.head(self.body(x)).sum()


def test_a_callback_that_sets_train_mode_before_each_batch_changes_signatures_and_nothing_else():
    torch.manual_seed(0)
    model = Detector().train()
    model.body[3].eval(), model.head[2].eval(), model.head[3].running_var.uniform_(1, 2)
    before, x = copy.deepcopy(model), torch.randn(40, 3)
    layers, modes = {'body.1': model.body[1]}, [m.training for m in model.modules()]
    with batch_moments(model, layers) as moments:
        for b in x.split(10):
            model.train()
            model(b, targets=b)
            assert model.training and model.head.training
            moments.end_batch()
    assert modes == [m.training for m in model.modules()] and moments.unreached() == []
    torch.testing.assert_close(model.body[1].running_mean, before.body[0](x).mean(0), **TOL)
    for (k, a), b in zip(model.named_buffers(), before.buffers()):
        assert k.startswith('body.1') or torch.equal(a, b), k
    with batch_moments(
        model, tracked_bn(model)
    ) as moments:  # dropout stays off: what reaches later layers does not depend on chance
        model.train(), model(x, targets=x), moments.end_batch()
    once = model.head[3].running_mean.clone()
    with batch_moments(model, tracked_bn(model)) as moments:
        model.train(), model(x, targets=x), moments.end_batch()
    assert torch.equal(once, model.head[3].running_mean)


# kinds of batches


def test_tensors_tuples_lists_mappings_and_the_users_own_function():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, a, b=0):
            return self.bn(input=a + b)

    x, y = torch.randn(8, 2), torch.randn(8, 2)
    for batch, expected, inputs in (
        (x, x, None),
        ((x,), x, None),
        ([x, 'target'], x, None),
        ((x, y, 'target'), x + y, None),
        ({'a': x, 'b': y}, x + y, None),
        (SimpleNamespace(p=x, q=y), x + y, lambda b: (b.p, b.q)),
        (SimpleNamespace(p=x, q=y), x + y, lambda b: {'a': b.p, 'b': b.q}),
    ):
        model = Two()
        update_bn([batch], model, inputs=inputs)
        torch.testing.assert_close(model.bn.running_mean, expected.mean(0))


def test_batches_move_to_the_device_asked_for():
    model = nn.Sequential(nn.BatchNorm1d(2)).to('meta')

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.devices = nn.BatchNorm1d(2), []

        def forward(self, x, more):
            self.devices += [x.device.type, more['y'][0].device.type]
            return self.bn(torch.randn(3, 2))

    model = Seen()
    update_bn([(torch.randn(3, 2), {'y': [torch.randn(1)]}, 0)], model, 'meta')
    assert model.devices == ['meta', 'meta']


def test_n_batches_stops_the_pass():
    model, x = net(), torch.randn(60, 6)
    before = copy.deepcopy(model)
    taken = []

    def loader():
        for b in x.split(10):
            taken.append(1)
            yield b

    update_bn(loader(), model, n_batches=3)
    assert len(taken) == 3
    assert_exact(model, [(b,) for b in x.split(10)[:3]], before)


def test_low_precision_and_double_layers():
    x = torch.randn(200, 6) * 2 + 5
    for dtype, tol in ((torch.bfloat16, 2e-2), (torch.float64, 1e-9)):
        model = net().to(dtype)
        before = copy.deepcopy(model)
        batches = [(b.to(dtype),) for b in x.split(20)]
        update_bn([b for (b,) in batches], model)
        mean, var = twins.bn_statistics(before, batches)['1']
        torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=tol, atol=tol)
        torch.testing.assert_close(model[1].running_var.double(), var, rtol=4 * tol, atol=tol)
        assert model[1].running_mean.dtype == dtype


@pytest.mark.parametrize(
    'wrap',
    [
        lambda m: torch.compile(m, backend='eager'),
        nn.DataParallel,
        lambda m: nn.Sequential(*m[:4], torch.compile(m[4:], backend='eager')),
    ],
)
def test_compiled_and_parallel_models(wrap):
    torch.manual_seed(0)
    bare, x = net(), torch.randn(40, 6)
    model = wrap(bare)
    model(x)  # compiled before the pass, in train mode
    before = copy.deepcopy(bare)
    update_bn(list(x.split(10)), model)
    assert_exact(bare, [(b,) for b in x.split(10)], before)
    bare.eval(), torch.testing.assert_close(model.eval()(x), bare(x))


# what cannot be normalised, and errors


def test_a_batch_with_one_value_a_channel_is_skipped_and_said_once():
    torch.manual_seed(0)
    model, x = net(), torch.randn(22, 6)
    before = copy.deepcopy(model)
    batches = [x[:1], x[1:11], x[11:12], x[12:]]
    with pytest.warns(
        UserWarning, match=r"2 of 4 batches were left out .* layer '5' got a single value per channel"
    ) as said:
        update_bn(batches, model)
    assert len(said) == 1
    assert_exact(model, [(x[1:11],), (x[12:],)], before)


def test_one_sample_is_enough_where_each_channel_gets_several_values():
    model, x = nn.Sequential(nn.BatchNorm2d(2)), torch.randn(1, 2, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        update_bn([x], model)
    torch.testing.assert_close(model[0].running_var, x[0].flatten(1).var(1))


class Breaks(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.net, self.at, self.calls = net(), at, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.net(x)


@pytest.mark.parametrize(
    'loader, model, error, match',
    [
        ([], net(), ValueError, 'the loader gave no batch'),
        (iter(()), net(), ValueError, 'the loader gave no batch'),
        ([torch.randn(1, 6)] * 3, net(), ValueError, '3 of 3 batches were left out.*use larger batches'),
        ([torch.randn(4, 5)], net(), RuntimeError, None),
        ([torch.randn(4, 6)] * 3, Breaks(3), KeyboardInterrupt, None),
    ],
)
def test_on_any_error_statistics_modes_and_momenta_come_back(loader, model, error, match):
    bns = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    for m in bns:
        m.running_mean.uniform_(), m.running_var.uniform_(), m.num_batches_tracked.fill_(7)
    bns[1].momentum = None
    model.train(), bns[1].eval(), bns[1].train()
    before = copy.deepcopy(model)
    pointers = [t.data_ptr() for t in model.buffers()]
    with pytest.raises(error, match=match):
        update_bn(loader, model)
    for k, v in model.state_dict().items():
        assert torch.equal(v, before.state_dict()[k]), k
    for a, b in zip(model.modules(), before.modules(), strict=True):
        assert (
            a.training == b.training
            and getattr(a, 'momentum', 0) == getattr(b, 'momentum', 0)
            and not a._forward_pre_hooks
        )
    assert pointers == [t.data_ptr() for t in model.buffers()]


@pytest.mark.parametrize(
    'kind',
    [RunningBatchNorm, BatchRenorm, partial(GhostBatchNorm, num_splits=2), partial(RunningBatchNorm, factors=True)],
)
@pytest.mark.parametrize('at, error', [(2, KeyboardInterrupt), (5, ValueError)])
def test_a_layer_of_another_kind_is_whole_again_after_any_error(kind, at, error):
    class Raises(nn.Module):
        "Raises in the `at`-th forward pass, a trial or not, of the layer it lies in."

        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == at and error is KeyboardInterrupt:
                raise error
            return x

    model = nn.Sequential(kind(2), nn.BatchNorm2d(2)).train()
    inner = Raises()
    model[0].register_module('inner', inner)
    forward = type(model[0]).forward
    model[0].forward = lambda x: inner(forward(model[0], x))
    own = model[0].forward
    before, attributes, objects = copy.deepcopy(model), dict(vars(model[0])), dict(model[0]._buffers)

    def loader():
        yield torch.randn(4, 2, 3, 3)
        if error is ValueError:
            raise error('the loader breaks')

    with pytest.raises(error):
        update_bn(loader(), model)
    assert (
        model[0].forward is own
        and vars(model[0]) == attributes | {'training': True}
        and not model[0]._forward_pre_hooks
    )
    for k, b in model[0]._buffers.items():
        assert b is objects[k] and torch.equal(b, before[0]._buffers[k])
    for k, b in model[1]._buffers.items():
        assert torch.equal(b, before[1]._buffers[k])


def test_two_interruptions_in_a_row_leave_the_model_as_it_was():
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupts(nn.BatchNorm1d):
        "The first Ctrl-C comes in its second batch, the second one while its momentum is put back."

        calls, armed = 0, False

        def __setattr__(self, name, value):
            if name == 'momentum' and self.armed:
                object.__setattr__(self, 'armed', False)
                os.kill(os.getpid(), signal.SIGINT)
            super().__setattr__(name, value)

    model = nn.Sequential(nn.BatchNorm1d(2), Interrupts(2), nn.Dropout(), nn.BatchNorm1d(2)).train()
    layer = model[1]

    def interrupt(m, args):
        layer.calls += 1
        if layer.calls == 2:
            object.__setattr__(layer, 'armed', True)
            os.kill(os.getpid(), signal.SIGINT)

    model[3].register_forward_pre_hook(interrupt)
    before, objects = copy.deepcopy(model), list(model.buffers())
    try:
        with pytest.raises(KeyboardInterrupt):
            update_bn(list(torch.randn(12, 2).split(4)), model)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert layer.calls == 2 and not layer.armed
    for a, b in zip(model.modules(), before.modules()):
        assert a.training == b.training and getattr(a, 'momentum', 0) == getattr(b, 'momentum', 0)
    for a, b, c in zip(model.buffers(), before.buffers(), objects):
        assert a is c and torch.equal(a, b)
    assert [len(m._forward_pre_hooks) for m in model.modules()] == [0, 0, 0, 0, 1]


def test_ctrl_c_at_any_line_leaves_the_statistics_as_they_were_or_new_and_all_else_as_it_was():
    torch.manual_seed(0)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    model = nn.Sequential(
        nn.BatchNorm2d(2), BatchRenorm(2), RunningBatchNorm(2), nn.Dropout(), nn.BatchNorm2d(2)
    ).train()
    batches, start = torch.randn(8, 2, 3, 3).split(4), copy.deepcopy(model)
    new = copy.deepcopy(model)
    update_bn(batches, new)
    objects = list(model.buffers())

    def run(at):
        "Ctrl-C at line number `at` that is run in batchnorm.py; the number of lines run."
        lines = 0

        def trace(frame, event, arg):
            nonlocal lines
            if not frame.f_code.co_filename.endswith('batchnorm.py') or 'torch' in frame.f_code.co_filename:
                return None
            if event == 'line':
                lines += 1
                if lines == at:
                    os.kill(os.getpid(), signal.SIGINT)
            return trace

        sys.settrace(trace)
        try:
            update_bn(batches, model)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return lines

    try:
        n, ends = run(0), set()
        for at in [*range(1, n, 29), *range(n - 40, n)]:
            for b, c in zip(model.buffers(), start.buffers()):
                b.copy_(c)
            run(at)
            now = [b.clone() for b in model.buffers()]
            whole = [all(map(torch.equal, now, m.buffers())) for m in (start, new)]
            assert any(whole), at
            ends.add(whole.index(True))
            assert all(map(lambda a, b: a is b, model.buffers(), objects))
            for a, b in zip(model.modules(), start.modules()):
                assert (
                    a.training == b.training
                    and getattr(a, 'momentum', 0) == getattr(b, 'momentum', 0)
                    and vars(a).keys() == vars(b).keys()
                ), at
                assert not a._forward_pre_hooks, at
        assert ends == {0, 1}
    finally:
        signal.signal(signal.SIGINT, handler)


def test_the_shares_of_several_processes_make_the_statistics_of_the_whole():
    torch.manual_seed(0)
    kinds = (
        BatchNormAct,
        BatchRenorm,
        partial(GhostBatchNorm, num_splits=2),
        partial(nn.InstanceNorm2d, track_running_stats=True),
        RunningBatchNorm,
        FrozenBatchNorm2d,
    )
    whole = nn.Sequential(
        nn.BatchNorm2d(2), *(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), kind(2)) for kind in kinds)
    ).train()
    batches, sent = torch.randn(22, 2, 6, 6).split([4, 6, 4, 8]), []

    def run(model, batches, gather):
        with batch_moments(model, tracked_bn(model), gather) as moments:
            for b in batches:
                model(b), moments.end_batch()
        return moments

    def first(o):
        sent.append(copy.deepcopy(o))
        return [o]

    run(copy.deepcopy(whole), batches[:2], first)
    shared = copy.deepcopy(whole)
    moments = run(shared, batches[2:], lambda o: [*sent, o])
    run(whole, batches, None)
    assert moments.n_batches == 4 and moments.remarks == {}
    for (k, a), b in zip(shared.named_buffers(), whole.buffers()):
        if a.is_floating_point() and not k.endswith(('batch', 'step')):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=k)
    assert shared[0].num_batches_tracked == 4


def test_statistics_are_written_in_place():
    model = net()
    pointers = [t.data_ptr() for t in model.buffers()]
    update_bn([torch.randn(8, 6)], model)
    assert pointers == [t.data_ptr() for t in model.buffers()]


def test_a_layer_that_nothing_reaches_keeps_its_statistics_and_is_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    model.unused.running_mean.fill_(3)
    with pytest.warns(UserWarning, match="no batch of the batch-norm pass reached layer 'unused'") as said:
        update_bn([torch.randn(8, 2)], model)
    assert len(said) == 1
    assert (model.unused.running_mean == 3).all() and (model.unused.running_var == 1).all()


def test_bad_arguments_are_named():
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ('1', TypeError)):
        with pytest.raises(error, match='n_batches must be'):
            update_bn([torch.randn(4, 6)], net(), n_batches=bad)
    with pytest.raises(TypeError, match='model must be an nn.Module, not list'):
        update_bn(net(), [torch.randn(4, 6)])


def test_a_layer_called_through_its_function_keeps_its_statistics_and_does_not_disturb_the_others():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            x = nn.functional.batch_norm(x, self.a.running_mean, self.a.running_var, self.a.weight, self.a.bias, False)
            return self.b(x)

    model, x = Functional(), torch.randn(50, 3) * 2 + 1
    model.a.running_mean.fill_(1), model.a.running_var.fill_(4)
    with pytest.warns(UserWarning, match="reached layer 'a'"):
        update_bn(list(x.split(10)), model)
    assert (model.a.running_mean == 1).all() and (model.a.running_var == 4).all()
    torch.testing.assert_close(model.b.running_var, ((x - 1) / 2).var(0), rtol=1e-3, atol=1e-3)


def test_statistics_that_are_not_finite_are_said():
    x = torch.randn(20, 6)
    x[3, 2] = float('inf')
    with pytest.warns(UserWarning, match='not finite'):
        update_bn(list(x.split(10)), net())


def test_layers_that_see_different_batches_and_images_of_changing_size_are_pooled_right():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = nn.BatchNorm2d(2), nn.BatchNorm2d(2), 0

        def forward(self, x):
            self.n += 1
            return self.b(self.a(x)[:, :, ::2]) if self.n % 2 else self.a(x)

    batches = [torch.randn(n, 2, h, w) * 3 + 1 for n, h, w in ((4, 5, 6), (3, 7, 2), (9, 3, 3), (2, 8, 8))]
    model = Sometimes()
    before = copy.deepcopy(model)
    update_bn(batches, model)
    assert_exact(model, [(b,) for b in batches], before)


def test_moments_do_not_drift_over_many_batches():
    torch.manual_seed(0)
    x = torch.randn(6000, 2) + 1000
    model = nn.Sequential(nn.BatchNorm1d(2))
    update_bn(list(x.split(2)), model)
    torch.testing.assert_close(model[0].running_mean, x.double().mean(0).float(), rtol=2e-7, atol=0)


def test_nested_batches_keep_their_types_when_they_move():
    from collections import namedtuple

    Pair = namedtuple('Pair', 'a b')

    class Kinds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.kinds = nn.BatchNorm1d(2), []

        def forward(self, pair, packed):
            self.kinds += [type(pair), type(packed)]
            return self.bn(pair.a)

    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    model = Kinds()
    update_bn([(Pair(torch.randn(4, 2), (1, 2)), packed, 0)], model, 'cpu')
    assert model.kinds == [Pair, type(packed)]


def test_a_batch_left_out_leaves_no_trace_even_if_it_is_infinite():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(2))
    batches = [torch.full((1, 2, 3, 3), float('inf')), torch.randn(5, 2, 3, 3), torch.randn(4, 2, 3, 3)]
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match='1 of 3 batches were left out') as said:
        update_bn(batches, model)
    assert len(said) == 1
    assert_exact(model, [(b,) for b in batches[1:]], before)
