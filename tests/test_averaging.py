import copy
import gc
import os
import random
import signal
import sys
import threading
import time
import warnings
import weakref

import pytest
import torch
from torch import nn

from fastai_swa import WeightAverage, ema, equal
from fastai_swa.averaging import all_finite, lent
from fastai_swa.averaging.tensors import _pointers

from . import lora
from .helpers import assert_close, net, parameters, raising
from .reference import twins


def step(model, scale=1.0):
    "Move every parameter and float buffer, as a training step would."
    with torch.no_grad():
        for t in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            t.add_(torch.randn_like(t.float()).to(t.dtype) * scale)


def conv_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, x):
        return self.out(self.emb(x))


# the mean is the mean


@pytest.mark.parametrize('seed', range(12))
def test_the_mean_is_the_mean_for_random_shapes_weights_and_numbers_of_points(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shapes = [tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 4))) for _ in range(rng.randint(1, 9))]
    model = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in shapes])
    decay = rng.random()
    weight = rng.choice([equal, ema(decay), lambda n: 2 / (n + 2)])
    average, snapshots = WeightAverage(model, weight), []
    for _ in range(rng.randint(1, 40)):
        step(model)
        snapshots.append([t.clone() for t in parameters(model)])
        average.update(model)
    assert average.n_averaged == len(snapshots)
    assert_close(parameters(average.swa_model), twins.weighted_average(snapshots, weight))
    if weight is equal:
        assert_close(parameters(average.swa_model), twins.mean(snapshots))


def test_the_average_starts_with_the_first_point_and_not_with_the_weights_before_it():
    for weight in (equal, ema(0.999), lambda n: 0.01):
        model = net()
        average = WeightAverage(model, weight)
        step(model)
        average.update(model)
        for a, b in zip(parameters(average.swa_model), parameters(model)):
            assert torch.equal(a, b)


def test_ema_weights():
    assert [ema(0.9)(n) for n in (0, 1, 5)] == [1.0, pytest.approx(0.1), pytest.approx(0.1)]
    warm = [ema(0.9, warmup=True)(n) for n in (0, 1, 7, 30, 31, 1000)]
    assert warm == [
        1.0,
        pytest.approx(2 ** (-2 / 3)),
        pytest.approx(0.25),
        pytest.approx(31 ** (-2 / 3)),
        pytest.approx(0.1, rel=0.01),
        pytest.approx(0.1),
    ]


def test_twenty_thousand_points_in_float32_stay_within_a_fraction_of_their_standard_error():
    torch.manual_seed(0)
    model, n = nn.ParameterList([nn.Parameter(torch.zeros(64))]), 20_000
    average, total = WeightAverage(model), torch.zeros(64, dtype=torch.float64)
    for _ in range(n):
        with torch.no_grad():
            model[0].normal_()
        total += model[0].detach().double()
        average.update(model)
    assert (average.swa_model[0] - total / n).abs().max() < 0.2 / n**0.5


# low precision


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('weight', [equal, ema(0.999)])
def test_an_average_of_a_low_precision_model_is_exact_in_its_float32_master(dtype, weight):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
    average, snapshots = WeightAverage(model, weight), []
    for _ in range(300):
        step(model, 0.01)
        snapshots.append([t.clone() for t in parameters(model)])
        average.update(model)
    expected = twins.weighted_average(snapshots, weight)
    assert_close(average.master.values(), expected, 1e-5)
    for p, e in zip(average.swa_model.parameters(), expected):
        assert p.dtype == dtype
        assert (
            torch.equal(p, e.float().to(dtype))
            or (p.double() - e).abs().max() <= torch.finfo(dtype).eps * e.abs().max()
        )


def test_a_bfloat16_ema_moves():  # with a bfloat16 average it stands still
    model = nn.Linear(3, 3).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = WeightAverage(model, ema(0.999))
    average.update(model)
    with torch.no_grad():
        model.weight.fill_(2.0)
    for _ in range(5000):
        average.update(model)
    torch.testing.assert_close(average.master['weight'], torch.full((3, 3), 2 - 0.999**5000), rtol=1e-3, atol=1e-3)
    assert (average.swa_model.weight > 1.98).all()


def test_large_and_scalar_low_precision_tensors_are_averaged_in_pieces():
    torch.manual_seed(0)
    model = nn.ParameterList(
        [nn.Parameter(torch.randn(s).bfloat16()) for s in ((3000, 1000), (), (0, 4), (2_500_000,), (2, 1_500_000))]
    )
    average, snapshots = WeightAverage(model), []
    for _ in range(3):
        step(model)
        snapshots.append([t.clone() for t in parameters(model)])
        average.update(model)
    assert_close(average.master.values(), twins.mean(snapshots))


# what a model may do between two folds


def test_conversions_and_reassigned_tensors_between_folds_are_noticed():
    torch.manual_seed(0)
    model = conv_net()
    average, snapshots = WeightAverage(model), []

    def fold():
        step(model)
        snapshots.append([t.float().clone() for t in parameters(model)])
        average.update(model)

    fold()
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())
    fold()  # a new Parameter in an old place
    model[4].bias.data = model[4].bias.data.clone()
    fold()  # new data in an old Parameter
    model[0] = copy.deepcopy(model[0])
    fold()  # a new layer
    model.half()
    fold()
    assert {p.dtype for p in average.swa_model.parameters()} == {torch.float16} and len(average.master) == 6
    model[1].float()
    fold()  # mixed
    assert average.swa_model[1].weight.dtype == torch.float32 and len(average.master) == 4
    model.bfloat16()
    fold()
    model.float()
    fold()
    average.swa_model.half()
    fold()  # the average follows the model
    average.swa_model.load_state_dict(copy.deepcopy(average.swa_model.state_dict()), assign=True)
    fold()
    assert not average.master and {p.dtype for p in average.swa_model.parameters()} == {torch.float32}
    assert_close(
        parameters(average.swa_model), twins.mean(snapshots), 5e-3
    )  # float16 in between; a lost point would show


def test_a_reassigned_one_element_tensor_is_noticed_though_its_value_is_equal():
    model = nn.ParameterDict({'scale': nn.Parameter(torch.ones(1))})
    average = WeightAverage(model)
    average.update(model)
    model['scale'] = nn.Parameter(torch.ones(1))
    average.update(model)
    with torch.no_grad():
        model['scale'].fill_(4.0)
    average.update(model)
    assert average.swa_model['scale'].item() == pytest.approx(2.0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_memory_formats_are_kept_and_averaged(dtype):
    torch.manual_seed(0)
    model = conv_net().to(dtype=dtype, memory_format=torch.channels_last)
    average, snapshots = WeightAverage(model), []
    for _ in range(5):
        step(model)
        snapshots.append([t.clone() for t in parameters(model)])
        average.update(model)
    assert average.swa_model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(
        [p.float() for p in average.swa_model.parameters()] if dtype == torch.float32 else average.master.values(),
        twins.mean(snapshots),
    )


def test_buffers_follow_the_latest_model():
    model = conv_net()
    model.register_buffer('mask', torch.zeros(3))
    model.register_buffer('cache', None)
    average = WeightAverage(model)
    for n in (3, 5):  # also one that appears, and one that changes shape
        step(model)
        model.cache = torch.randn(n)
        average.update(model)
        for (name, a), (_, b) in zip(average.swa_model.named_buffers(), model.named_buffers(), strict=True):
            assert torch.equal(a, b), name
        assert average.swa_model.cache is not model.cache


def test_tied_weights_stay_tied_and_are_averaged_once():
    torch.manual_seed(0)
    model = Tied()
    average, snapshots = WeightAverage(model, lambda n: 0.5), []
    for _ in range(4):
        step(model)
        snapshots.append([t.clone() for t in parameters(model)])
        average.update(model)
    assert average.swa_model.out.weight is average.swa_model.emb.weight
    assert_close(parameters(average.swa_model), twins.weighted_average(snapshots, lambda n: 0.5))


def test_integer_complex_and_double_parameters():
    model = nn.ParameterList(
        [
            nn.Parameter(torch.arange(3), requires_grad=False),
            nn.Parameter(torch.randn(3, dtype=torch.complex64)),
            nn.Parameter(torch.randn(3, dtype=torch.float64)),
        ]
    )
    average = WeightAverage(model)
    average.update(model)
    before = [t.clone() for t in parameters(model)]
    with torch.no_grad():
        [t.add_(2) for t in model]
    average.update(model)
    assert torch.equal(average.swa_model[0], model[0])  # an integer has no mean: the latest
    torch.testing.assert_close(average.swa_model[1].detach(), before[1] + 1)
    torch.testing.assert_close(average.swa_model[2].detach(), before[2] + 1)


def test_frozen_parameters_are_averaged_too_and_come_out_as_they_are():
    model = net()
    for p in model.parameters():
        p.requires_grad_(False)
    average = WeightAverage(model)
    for _ in range(7):
        average.update(model)
    for a, b in zip(parameters(average.swa_model), parameters(model)):
        assert torch.equal(a, b)


# wrappers


def test_compiled_and_parallel_models_have_plain_keys():
    bare = net()
    inner = nn.Sequential(torch.compile(nn.Linear(3, 4), backend='eager'), nn.ReLU())
    for model in (
        torch.compile(bare, backend='eager'),
        nn.DataParallel(bare),
        nn.DataParallel(torch.compile(bare, backend='eager')),
    ):
        average = WeightAverage(model)
        step(bare)
        average.update(model)
        net().load_state_dict(average.swa_model.state_dict(), strict=True)
        assert_close(parameters(average.swa_model), parameters(bare))
    average = WeightAverage(inner)
    average.update(inner)
    nn.Sequential(nn.Linear(3, 4), nn.ReLU()).load_state_dict(average.swa_model.state_dict(), strict=True)
    assert list(average.state_dict()['swa_model']) == ['0.weight', '0.bias']
    average.swa_model(torch.randn(2, 3))


def test_a_model_compiled_in_place_is_averaged():
    model = net()
    model.compile(backend='eager')
    model(torch.randn(4, 6))
    average = WeightAverage(model)
    average.update(model)
    assert average.swa_model._compiled_call_impl is None
    assert_close(parameters(average.swa_model), parameters(model))


# refusals change nothing


@pytest.mark.parametrize(
    'change, names',
    [
        (lambda m: m.append(nn.Linear(2, 2)), "'8.weight'"),
        (lambda m: m.__delitem__(7), "'7.weight'"),
        (lambda m: setattr(m[7], 'weight', nn.Parameter(torch.randn(5, 8))), "'7.weight' of another shape"),
        (lambda m: setattr(m[0], 'extra', nn.Parameter(torch.zeros(2))), "'0.extra' not in the average"),
        (lambda m: setattr(m[0], 'bias', None), "'0.bias' missing"),
    ],
)
def test_a_model_whose_parameters_no_longer_match_is_refused_by_name_before_anything_changes(change, names):
    model = net()
    average = WeightAverage(model)
    average.update(model)
    before = copy.deepcopy(average.state_dict())
    step(model)
    change(model)
    with pytest.raises(ValueError, match='does not match the average') as e:
        average.update(model)
    assert names in str(e.value)
    after = average.state_dict()
    assert after['n_averaged'] == before['n_averaged'] == 1
    for k, v in before['swa_model'].items():
        assert torch.equal(v, after['swa_model'][k])


@pytest.mark.parametrize('weight', [lambda n: 2.0, lambda n: -0.1, lambda n: float('nan'), lambda n: None, ema])
def test_a_weight_outside_0_1_is_refused_at_construction(weight):
    with pytest.raises(ValueError, match=r'weight must give a number in \[0, 1\]'):
        WeightAverage(net(), weight)


def test_a_weight_that_leaves_0_1_later_is_refused_before_anything_changes():
    model = net()
    average = WeightAverage(model, lambda n: n / 2)
    for _ in range(3):
        average.update(model)
    before = [t.clone() for t in parameters(average.swa_model)]
    step(model)
    with pytest.raises(ValueError, match=r'weight\(3\) must be a number in \[0, 1\], not 1.5'):
        average.update(model)
    for a, b in zip(parameters(average.swa_model), before):
        assert torch.equal(a, b)
    assert average.n_averaged == 3


def test_a_swa_model_without_a_place_for_a_buffer_is_refused_before_anything_changes():
    model, own = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)), nn.Sequential(nn.Linear(3, 3))
    before = copy.deepcopy(own.state_dict())
    with pytest.raises(ValueError, match="its buffer '1.running_mean' has no place there"):
        WeightAverage(model.double(), swa_model=own)
    assert own[0].weight.dtype == torch.float32 and torch.equal(own[0].weight, before['0.weight'])


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match='model must be an nn.Module, not int'):
        WeightAverage(3)
    with pytest.raises(TypeError, match='weight must be a function'):
        WeightAverage(net(), 0.9)
    with pytest.raises(TypeError, match='swa_model must be'):
        WeightAverage(net(), swa_model=dict())
    for bad in (1, 1.0, -0.1, float('nan')):
        with pytest.raises(ValueError, match='decay must be in'):
            ema(bad)
    for bad in ('0.9', None, True):
        with pytest.raises(TypeError, match='decay must be a number'):
            ema(bad)


def test_a_foreign_swa_model_is_refused_and_a_matching_one_used_as_given():
    model = net()
    with pytest.raises(ValueError, match='does not match'):
        WeightAverage(model, swa_model=net(width=9))
    with pytest.raises(ValueError, match='shares .* with the model in training'):
        WeightAverage(model, swa_model=model)
    own = net()
    hook = own.register_forward_hook(lambda *a: None)
    average = WeightAverage(model, swa_model=own)
    average.update(model)
    assert average.swa_model is own and len(own._forward_hooks) == 1
    hook.remove()
    assert_close(parameters(own), parameters(model))
    untied = Tied()
    untied.out.weight = nn.Parameter(torch.randn(7, 4))
    with pytest.raises(ValueError, match='tied'):
        WeightAverage(untied, swa_model=Tied())


# state


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_restored_average_goes_on_bitwise(dtype, tmp_path):
    torch.manual_seed(0)
    model = conv_net().to(dtype)
    a = WeightAverage(model)
    for _ in range(3):
        step(model)
        a.update(model)
    torch.save(a.state_dict(), tmp_path / 'a.pth')
    state = torch.load(tmp_path / 'a.pth', weights_only=True)
    b = WeightAverage(conv_net().to(dtype))
    b.load_state_dict(state)
    for _ in range(3):
        step(model)
        a.update(model), b.update(model)
    assert a.n_averaged == b.n_averaged == 6
    for x, y in zip(
        [*parameters(a.swa_model), *a.master.values()], [*parameters(b.swa_model), *b.master.values()], strict=True
    ):
        assert torch.equal(x, y)


def test_a_state_of_another_model_or_of_nothing_is_one_clear_error_and_changes_nothing():
    average = WeightAverage(net())
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(
        ValueError,
        match="^the state does not match the average: '0.bias', '0.weight', '1.bias' and 10 more of another shape$",
    ):
        average.load_state_dict(WeightAverage(net(width=5)).state_dict())
    with pytest.raises(ValueError, match="'5.bias', .* missing; .* of another shape"):
        average.load_state_dict(WeightAverage(conv_net()).state_dict())
    for bad in ({}, None, net().state_dict()):
        with pytest.raises(ValueError, match='not the state of a WeightAverage'):
            average.load_state_dict(bad)
    for k, v in before['swa_model'].items():
        assert torch.equal(v, average.state_dict()['swa_model'][k])


# lending


def test_lending_puts_the_averages_own_tensors_into_the_model_and_gives_its_own_back():
    model = conv_net()
    average = WeightAverage(model)
    average.update(model)
    step(model)
    raw = {k: v.clone() for k, v in model.state_dict().items()}
    objects, pointers = [*model.parameters(), *model.buffers()], [t.data_ptr() for t in model.parameters()]
    with average.lent_to(model):
        for (k, a), b in zip(model.state_dict().items(), average.swa_model.state_dict().values(), strict=True):
            assert a.data_ptr() == b.data_ptr() and torch.equal(a, b), k
        assert all(x is y for x, y in zip(objects, [*model.parameters(), *model.buffers()], strict=True))
        model[1].running_mean.fill_(7.0)  # in place, and
        model[1].running_var = torch.full((4,), 9.0)  # rebound: both are the average's
        with pytest.raises(RuntimeError, match='lent'):
            average.update(model)
        with pytest.raises(RuntimeError, match='lent'):
            average.copy_to(model)
        with pytest.raises(RuntimeError, match='lent'):
            average.load_state_dict(average.state_dict())
        with pytest.raises(RuntimeError, match='lent'), average.lent_to(model):
            pass
    for k, v in model.state_dict().items():
        assert torch.equal(v, raw[k]), k
    assert all(x is y for x, y in zip(objects, [*model.parameters(), *model.buffers()], strict=True))
    assert pointers == [t.data_ptr() for t in model.parameters()]
    assert (average.swa_model[1].running_mean == 7).all() and (average.swa_model[1].running_var == 9).all()


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_lending_ends_whatever_is_raised_inside(error):
    model = net()
    average = WeightAverage(model)
    average.update(model)
    step(model)
    raw = [t.clone() for t in parameters(model)]
    with pytest.raises(error), average.lent_to(model):
        raise error('inside')
    for a, b in zip(parameters(model), raw):
        assert torch.equal(a, b)
    average.update(model)


def test_lending_to_a_model_that_does_not_match_is_refused_before_anything_changes():
    source, model = net(), net(width=9)
    raw = [t.clone() for t in parameters(model)]
    with pytest.raises(ValueError, match='does not match'), lent(source, model):
        pass
    for a, b in zip(parameters(model), raw):
        assert torch.equal(a, b)


def test_lending_keeps_ties_and_compiled_models_working():
    model = Tied()
    average = WeightAverage(model)
    average.update(model)
    step(model)
    x = torch.tensor([1, 2, 3])
    compiled = torch.compile(model, backend='eager')
    raw = compiled(x).detach()
    with average.lent_to(compiled):
        assert model.out.weight is model.emb.weight
        torch.testing.assert_close(compiled(x), average.swa_model(x))
    assert torch.equal(compiled(x), raw)


def test_copy_to_writes_the_average_in_place():
    model = conv_net()
    average = WeightAverage(model)
    for _ in range(3):
        step(model)
        average.update(model)
    pointers = [t.data_ptr() for t in model.parameters()]
    average.copy_to(model)
    assert pointers == [t.data_ptr() for t in model.parameters()]
    for a, b in zip(parameters(model), parameters(average.swa_model)):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


# finite


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_all_finite_finds_every_nan_and_infinity_and_does_not_overflow(dtype):
    big = torch.full((100,), torch.finfo(dtype).max if dtype.is_floating_point else 1e30, dtype=dtype)
    assert all_finite([big, -big, torch.tensor([], dtype=dtype), torch.tensor([3])])
    for bad in ('nan', 'inf', '-inf'):
        t = torch.zeros(10, dtype=dtype)
        t[7] = float(bad)
        assert not all_finite([big, t, big])


def test_update_is_silent_and_allocates_nothing_on_the_way():
    model = net()
    average = WeightAverage(model)
    average.update(model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        average.update(model)
    with torch.profiler.profile(profile_memory=True) as prof:
        average.update(model)
    assert not [e for e in prof.events() if e.cpu_memory_usage > 64], 'a fold must not allocate'


def test_a_shape_that_changed_behind_the_same_parameter_is_refused():
    model = net()
    average = WeightAverage(model)
    average.update(model)
    model[0].weight.data = torch.ones(1, 6)  # would broadcast
    with pytest.raises(ValueError, match="'0.weight' of another shape"):
        average.update(model)
    assert average.n_averaged == 1


def test_modules_with_extra_state_are_saved_and_restored():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {'note': 1}

        def set_extra_state(self, state):
            pass

    a, b = WeightAverage(Extra(2, 2)), WeightAverage(Extra(2, 2))
    b.load_state_dict(a.state_dict())
    assert_close(parameters(a.swa_model), parameters(b.swa_model))


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_lending_gives_the_weights_back_even_where_buffers_cannot_be_looked_up():
    model = torch.jit.script(conv_net())
    source = conv_net()
    raw = [t.clone() for t in parameters(model)]
    with lent(source, model):
        torch.testing.assert_close(model.eval()(torch.ones(1, 3, 8, 8)), source.eval()(torch.ones(1, 3, 8, 8)))
    for a, b in zip(parameters(model), raw):
        assert torch.equal(a, b)


def test_a_conversion_is_noticed_where_no_buffer_shows_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    average, snapshots = WeightAverage(model), []
    for convert in (lambda: None, model.half, model[0].float, model.double, model.bfloat16, model.float):
        convert()
        snapshots.append([t.double() for t in parameters(model)])
        average.update(model)
        assert [p.dtype for p in average.swa_model.parameters()] == [p.dtype for p in model.parameters()]
    assert_close(parameters(average.swa_model), twins.mean(snapshots), 1e-2)


# sums in two levels


@pytest.mark.parametrize('seed', range(8))
def test_beyond_a_block_the_mean_is_the_mean_wherever_it_is_settled(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shapes = [tuple(rng.randint(1, 4) for _ in range(rng.randint(0, 3))) for _ in range(rng.randint(1, 5))]
    dtypes = [rng.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16]) for _ in shapes]
    model = nn.ParameterList([nn.Parameter(torch.randn(s, dtype=d)) for s, d in zip(shapes, dtypes)])
    weights = [1.0] + [
        rng.choice([rng.random() / 10, rng.random(), 0.0, 1e-9, 1.0] if rng.random() < 0.02 else [0.01])
        for _ in range(700)
    ]
    weight = rng.choice([equal, ema(rng.random()), ema(0.999), weights.__getitem__])
    average, snapshots = WeightAverage(model, weight), []
    use = rng.choice([0.001, 0.02, 0.3])
    for _ in range(rng.randint(130, 600)):
        step(model, 0.1)
        snapshots.append([t.clone() for t in parameters(model)])
        average.update(model)
        if rng.random() < use:
            rng.choice([average.settle, average.state_dict, average.release, lambda: average.swa_model])()
    expected = twins.weighted_average(snapshots, weight)
    own = {name: p.detach() for name, p in average.swa_model.named_parameters()} | average.master
    assert_close([own[name] for name, _ in model.named_parameters()], expected, 3e-6)
    for p, e in zip(average.swa_model.parameters(), expected):
        assert (p.double() - e).abs().max() <= max(torch.finfo(p.dtype).eps, 3e-6) * max(1.0, e.abs().max())


@pytest.mark.parametrize(
    'n, weight, bound',
    [(10_000, equal, 0.05), (50_000, equal, 0.1), (10_000, ema(0.9999), 0.1), (10_000, ema(0.999), 0.2)],
)
def test_a_mean_of_many_small_steps_does_not_stall(n, weight, bound):
    torch.manual_seed(0)
    start, drift = 1 + 0.05 * torch.randn(50, dtype=torch.float64), 1e-3
    model = nn.ParameterList([nn.Parameter(start.float())])
    average, expected = WeightAverage(model, weight), None
    for i in range(n):
        with torch.no_grad():
            model[0].copy_(start + drift * i / n)
        average.update(model)
        point = model[0].detach().double()
        expected = point.clone() if expected is None else expected.lerp_(point, weight(i))
    error = (average.swa_model[0].detach().double() - expected).abs().mean()
    assert error < bound / 100 * drift, f'{100 * error / drift} % of the drift'


def test_a_fold_into_a_block_allocates_nothing():
    for model in (net(), net().bfloat16()):
        average = WeightAverage(model)
        for _ in range(140):
            average.update(model)
        with torch.profiler.profile(profile_memory=True) as prof:
            average.update(model)
        assert not [e for e in prof.events() if e.cpu_memory_usage > 64]


def test_who_holds_the_module_settles_and_all_methods_do_so_themselves():
    torch.manual_seed(0)
    model = net()
    average, snapshots = WeightAverage(model), []
    module = average.swa_model

    def fold():
        step(model)
        snapshots.append([t.clone() for t in parameters(model)])
        average.update(model)

    for _ in range(200):
        fold()
    average.settle()
    assert_close(parameters(module), twins.mean(snapshots), 1e-5)
    other = net()
    for use in (
        lambda: average.swa_model,
        average.state_dict,
        average.release,
        lambda: average.copy_to(other),
        lambda: average.lent_to(other).__enter__(),
    ):
        fold()
        before = [t.clone() for t in parameters(module)]
        use()
        assert_close(parameters(module), twins.mean(snapshots), 1e-5)
        assert not all(torch.equal(a, b) for a, b in zip(before, parameters(module)))


def test_an_average_restored_within_a_block_goes_on_bitwise():
    torch.manual_seed(0)
    model = conv_net()
    a, b = WeightAverage(model, ema(0.999)), WeightAverage(model, ema(0.999))
    for _ in range(300):
        step(model, 0.01), a.update(model)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for _ in range(300):
        step(model, 0.01)
        a.update(model), b.update(model)
    for x, y in zip(parameters(a.swa_model), parameters(b.swa_model)):
        assert torch.equal(x, y)


def test_conversions_within_a_block_lose_no_point():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    average, snapshots = WeightAverage(model), []
    for convert in (lambda: None, model.double, model[0].float, model.bfloat16, model.float):
        convert()
        for _ in range(150):
            step(model, 0.1)
            snapshots.append([t.double().clone() for t in parameters(model)])
            average.update(model)
    assert_close(parameters(average.swa_model), twins.mean(snapshots), 1e-2)


# what a fold looks at, and what it leaves for later


def watched(monkeypatch):
    "Counts how often it is looked at what a model is made of."
    looks = []
    monkeypatch.setattr(
        'fastai_swa.averaging.tensors._pointers', lambda tensors: looks.append(len(tensors)) or _pointers(tensors)
    )
    return looks


def test_several_averages_of_a_model_share_what_they_know_of_it_and_look_once_a_step(monkeypatch):
    torch.manual_seed(0)
    model = conv_net()
    averages = [WeightAverage(model, weight) for weight in (equal, ema(0.9), ema(0.99), ema(0.999))]
    for i in range(140):
        step(model, 0.1)
        for average in averages:
            average.update(model, step=i)
    assert len({id(average._linked.source) for average in averages}) == 1
    looks = watched(monkeypatch)
    for average in averages:
        average.update(model, step=140)
    assert len(looks) == 1
    for average in averages:  # nobody says that it is one step
        average.update(model)
    assert len(looks) == 5


@pytest.mark.parametrize('n', [3, 140])
def test_a_change_between_steps_is_seen_by_all_averages(n):
    torch.manual_seed(0)
    model, lone = conv_net(), conv_net()
    lone.load_state_dict(model.state_dict())
    averages = [WeightAverage(model, weight) for weight in (equal, ema(0.9))]
    expected = [WeightAverage(lone, weight) for weight in (equal, ema(0.9))]

    def fold(i):
        with torch.no_grad():
            for p, q in zip(model.parameters(), lone.parameters()):
                q.add_(torch.randn_like(q) / 10)
                p.copy_(q)
        for average in averages:
            average.update(model, step=i)
        for average in expected:
            average.update(lone)

    def new_parameter():
        model[4].weight = nn.Parameter(model[4].weight.detach().clone())

    def new_layer():
        model[0] = copy.deepcopy(model[0])

    def new_memory():
        model[4].bias.data = model[4].bias.data.clone()

    for i in range(n):
        fold(i)
    for i, change in enumerate((new_parameter, new_layer, new_memory)):
        change()
        fold(n + i)
    for a, b in zip(averages, expected):
        assert_close(parameters(a.swa_model), parameters(b.swa_model), 1e-5)


@pytest.mark.parametrize('n', [3, 140])
@pytest.mark.parametrize('name, shape', [('0.weight', (1, 3, 3, 3)), ('1.weight', (1,)), ('1.weight', (1, 4))])
@pytest.mark.filterwarnings('ignore:An output with one or more elements was resized')
def test_another_shape_behind_a_parameter_is_refused_before_anything_changes(n, name, shape):
    torch.manual_seed(0)
    model = conv_net()
    average, control = WeightAverage(model), WeightAverage(model)
    for _ in range(n):
        step(model, 0.1)
        average.update(model), control.update(model)
    own = model.get_parameter(name).data
    model.get_parameter(name).data = torch.ones(shape)
    with pytest.raises(ValueError, match=f"'{name}' of another shape"):
        average.update(model)
    model.get_parameter(name).data = own
    step(model, 0.1)
    average.update(model), control.update(model)
    assert average.n_averaged == n + 1
    for a, b in zip(parameters(average.swa_model), parameters(control.swa_model)):
        assert_close([a], [b])


def test_new_memory_of_a_parameter_is_followed_without_linking_anew():
    model = conv_net()
    average = WeightAverage(model)
    average.update(model)
    link = average._linked
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.data = p.data + 1  # as some optimizers step
        average.update(model)
    assert average._linked is link
    assert_close(parameters(average.swa_model), [p - 1.5 for p in model.parameters()])


def test_statistics_of_batch_norm_are_the_latest_models_whenever_the_average_is_used():
    torch.manual_seed(0)
    model = conv_net()
    a, b = WeightAverage(model), WeightAverage(model)
    module = a.swa_model
    for use in (
        lambda: a.swa_model,
        a.settle,
        a.state_dict,
        a.release,
        lambda: a.copy_to(conv_net()),
        lambda: a.lent_to(conv_net()).__enter__(),
    ):
        step(model)
        a.update(model)
        use()
        for x, y in zip(module[1].buffers(), model[1].buffers()):
            assert torch.equal(x, y)
        if a.is_lent:
            break
    step(model)
    b.update(model)
    statistics = [t.clone() for t in model[1].buffers()]
    other = WeightAverage(conv_net())
    other.update(conv_net())
    with other.lent_to(model):  # the model holds those of another average meanwhile
        assert all(map(torch.equal, b.swa_model[1].buffers(), statistics))
    step(model)
    b.update(model)
    statistics = [t.clone() for t in model[1].buffers()]
    other.copy_to(model)
    assert all(map(torch.equal, b.swa_model[1].buffers(), statistics))


def test_statistics_that_are_rebound_in_training_are_followed():
    model = conv_net()
    average = WeightAverage(model)
    for _ in range(3):
        model[1].running_mean = model[1].running_mean + 1
        average.update(model)
    assert torch.equal(average.swa_model[1].running_mean, model[1].running_mean)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_average_can_be_trained_and_copied_after_folds(dtype):
    model = conv_net().to(dtype)
    average = WeightAverage(model)
    for _ in range(140):
        average.update(model)
    twin = copy.deepcopy(average)
    twin.update(model)
    assert not any(t.is_inference() for t in (*average.swa_model.parameters(), *average.swa_model.buffers()))
    swa_model = average.swa_model.float()
    swa_model(torch.randn(2, 3, 8, 8)).sum().backward()
    torch.optim.SGD(swa_model.parameters(), lr=0.1).step()


# whole or not at all


@pytest.mark.parametrize('n', [3, 150, 300])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_fold_that_fails_leaves_the_average_as_it_was(monkeypatch, n, dtype):
    def fails(*args):
        raise RuntimeError('no kernel')

    def weight(n):
        return fails() if failing else 1 / (n + 1)

    torch.manual_seed(0)
    model, failing = conv_net().to(dtype), False
    average, control = WeightAverage(model, weight), WeightAverage(model, weight)
    for i in range(n):
        if i in (1, n // 2, n - 1):  # within a block, too
            failing = True
            with pytest.raises(RuntimeError, match='no kernel'):
                average.update(model)
            failing = False
            with monkeypatch.context() as m:
                m.setattr(torch, '_foreach_lerp_', fails)
                if dtype == torch.bfloat16:
                    m.setattr(torch, '_foreach_copy_', fails)
                with pytest.raises(RuntimeError, match='no kernel'):
                    average.update(model)
            assert average.n_averaged == i
        step(model, 0.1)
        average.update(model), control.update(model)
    a, b = average.state_dict(), control.state_dict()
    assert a['n_averaged'] == b['n_averaged'] == n
    for kind in ('swa_model', 'master'):
        for k, v in b[kind].items():
            assert torch.equal(v, a[kind][k]), k


@pytest.fixture
def interrupted():
    """A function that calls another, `f(go)`, and sends real SIGINTs, `count` of them in a row, so
    many seconds after that calls `go`.
    """

    def guarded(f, go, sent):
        f(go)
        while not sent:  # an Event's lock could be left locked by the interruption, and its sender wait for ever
            time.sleep(1e-4)

    def handle(number, frame):  # one that comes late must not interrupt the test itself
        while frame is not None:
            if frame.f_code is guarded.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    def run(f, seconds, count=1):
        started = threading.Event()
        sent = []

        def send():
            started.wait()
            time.sleep(seconds)
            for _ in range(count):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1e-4)
            sent.append(True)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            guarded(f, started.set, sent)
        except KeyboardInterrupt:
            pass
        thread.join()

    before, interval = signal.signal(signal.SIGINT, handle), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # the sender is not to wait for the main thread
    yield run
    sys.setswitchinterval(interval)
    signal.signal(signal.SIGINT, before)


def many_tensors(n=1500):  # two tensors each
    return nn.ModuleList([nn.Linear(2, 2) for _ in range(n)])


def test_an_interrupted_fold_is_whole(interrupted):
    rng = random.Random(0)
    model = many_tensors()
    average, value = WeightAverage(model, lambda n: 0.5), 1.0

    def set_to(value):
        with torch.no_grad():
            torch._foreach_mul_(list(model.parameters()), 0.0), torch._foreach_add_(list(model.parameters()), value)

    set_to(value)
    average.update(model)
    expected = value
    for i in range(20):
        value = rng.choice([1.0, 2.0, 4.0])
        set_to(value)
        n = average.n_averaged

        def folds(go):
            go()
            for _ in range(4):
                average.update(model)

        interrupted(folds, rng.random() * 0.02)
        done = average.n_averaged - n
        for _ in range(done):
            expected = (expected + value) / 2
        values = torch.cat([p.detach().flatten() for p in average.swa_model.parameters()])
        torch.testing.assert_close(values, torch.full_like(values, expected))


@pytest.mark.parametrize('count', [1, 2, 9])
def test_an_interrupted_lending_leaves_the_model_with_its_own_tensors(interrupted, count):
    rng = random.Random(count)
    model = many_tensors()
    average = WeightAverage(model)
    average.update(model)
    with torch.no_grad():
        [p.zero_() for p in average.swa_model.parameters()], [p.fill_(1.0) for p in model.parameters()]
    pointers = [p.data_ptr() for p in model.parameters()]
    source_pointers = [p.data_ptr() for p in average.swa_model.parameters()]

    def entered(go):
        go()
        with average.lent_to(model):
            sum(range(1000))

    def left(go):
        with average.lent_to(model):
            go()

    for _ in range(8):
        interrupted(entered, rng.random() * 0.03, count)
        for _ in range(3):
            interrupted(left, rng.random() * 0.002, count)
        assert not average.is_lent and [p.data_ptr() for p in model.parameters()] == pointers
    assert not average.is_lent
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [p.data_ptr() for p in average.swa_model.parameters()] == source_pointers
    assert all((p == 1).all() for p in model.parameters()) and all(
        (p == 0).all() for p in average.swa_model.parameters()
    )
    average.update(model)


def test_an_interrupted_load_or_copy_is_whole(interrupted):
    rng = random.Random(0)
    model = many_tensors(500)
    average = WeightAverage(model)
    average.update(model)
    states = []
    for value in (2.0, 3.0):
        with torch.no_grad():
            [p.fill_(value) for p in average.swa_model.parameters()]
        states.append(copy.deepcopy(average.state_dict()))
    average.copy_to(model)
    for i in range(12):
        interrupted(lambda go: (go(), average.load_state_dict(states[i % 2])), rng.random() * 0.03)
        interrupted(lambda go: (go(), average.copy_to(model)), rng.random() * 0.005)
        for m in (model, average.swa_model):
            assert len(torch.cat([p.detach().flatten() for p in m.parameters()]).unique()) == 1


# models whose modes move weights


@pytest.fixture(params=lora.models)
def merging(request):
    torch.manual_seed(0)
    return lora.models[request.param]


def trained(model, x):
    "One step of what training changes: the update, and statistics of batch norm."
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    model.train()(x)


def everything(model):
    "Tensors, modes, and attributes with the insides of lists, bitwise."
    attributes = [{k: copy.copy(v) for k, v in vars(m).items() if k[0] != '_'} for m in model.modules()]
    return {k: v.clone() for k, v in model.state_dict().items()}, attributes


def assert_as_before(model, before):
    tensors, attributes = everything(model)
    for k, v in before[0].items():
        assert torch.equal(v, tensors[k]), k
    assert attributes == before[1]


@pytest.mark.parametrize('validated', [False, True])
def test_the_average_of_merged_weights_is_that_of_the_weights_in_training(merging, validated):
    x, snapshots = torch.randn(20, 6), []
    model = merging()
    average = WeightAverage(model)
    for _ in range(4):
        trained(model, x)
        snapshots.append([t.clone() for t in parameters(model)])
        if validated:  # as where one folds after a validation, and evaluates the average itself between folds
            model.eval()
            before = everything(model)
        average.update(model)
        if validated:
            assert_as_before(model, before)
            average.swa_model.eval()(x)
    state = average.state_dict()['swa_model']
    expected = twins.mean(snapshots)
    assert_close([state[name] for name, _ in model.named_parameters()], expected, 1e-5)
    fresh = merging()
    fresh.load_state_dict(state)
    torch.testing.assert_close(average.swa_model.eval()(x), fresh.eval()(x))
    for k, v in average.swa_model.train().state_dict().items():
        torch.testing.assert_close(v, state[k])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('evaluated', [True, False])
def test_a_lent_average_computes_what_a_fresh_model_with_its_weights_computes(merging, training, evaluated):
    x = torch.randn(20, 6)
    model = merging()
    average = WeightAverage(model)
    for _ in range(3):
        trained(model, x), average.update(model)
    trained(model, x)
    fresh = merging()
    fresh.load_state_dict(average.state_dict()['swa_model'])
    model.train(training)
    raw, own = everything(model), everything(average.swa_model)
    with average.lent_to(model):
        assert [m.training for m in model.modules()] == [training] * len(list(model.modules()))
        if not training:
            torch.testing.assert_close(model(x), fresh.eval()(x))
        if evaluated:
            torch.testing.assert_close(model.eval()(x), fresh.eval()(x))
            model.train()
    assert_as_before(model, raw)
    assert_as_before(average.swa_model, own)
    with average.lent_to(model):  # statistics of batch norm that are refreshed inside are the average's
        model.eval()
        norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm1d))
        norm.running_mean.fill_(7.0)
    assert_as_before(model, raw)
    changed = [k for k, v in average.swa_model.state_dict().items() if not torch.equal(v, own[0][k])]
    assert len(changed) == 1 and changed[0].endswith('running_mean')


@pytest.mark.parametrize('training', [True, False])
def test_an_applied_average_is_right_in_both_modes(merging, training):
    x = torch.randn(20, 6)
    model = merging()
    average = WeightAverage(model)
    for _ in range(3):
        trained(model, x), average.update(model)
    trained(model, x)
    state = {k: v.clone() for k, v in average.state_dict()['swa_model'].items()}
    fresh = merging()
    fresh.load_state_dict(state)
    model.train(training)
    average.copy_to(model)
    assert model.training == training
    torch.testing.assert_close(model.eval()(x), fresh.eval()(x))
    model.train()
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, state[k])


def test_a_state_is_loaded_into_an_average_in_eval_mode(merging):
    x = torch.randn(20, 6)
    model = merging()
    a, b = WeightAverage(model), WeightAverage(merging())
    for _ in range(2):
        trained(model, x), a.update(model)
    b.swa_model.eval()
    b.load_state_dict(a.state_dict())
    assert not b.swa_model.training
    torch.testing.assert_close(b.swa_model(x), a.swa_model.eval()(x))


# plain attributes


class Annealed(nn.Module):
    "What training may change besides tensors."

    def __init__(self):
        super().__init__()
        self.lin, self.act = nn.Linear(3, 3), nn.LeakyReLU(0.5)
        self.temperature, self.calls, self.scales, self.shift = 1.0, 0, {'out': [1.0]}, torch.zeros(3)

    def forward(self, x):
        self.calls += 1
        return self.act(self.lin(x)) / self.temperature * self.scales['out'][0] + self.shift


def anneal(model, by=1.0):
    model.temperature += by
    model.scales['out'][0] += by  # in place
    model.shift.add_(by)
    model.act.negative_slope /= 2
    model.late = ['came', by]


def assert_follows(copied, model, x):
    assert (copied.temperature, copied.scales, copied.act.negative_slope, copied.late) == (
        model.temperature,
        model.scales,
        model.act.negative_slope,
        model.late,
    )
    assert (
        torch.equal(copied.shift, model.shift)
        and copied.shift is not model.shift
        and copied.scales['out'] is not model.scales['out']
    )


def test_plain_attributes_are_those_of_the_latest_model_averaged():
    model, x = Annealed(), torch.randn(4, 3)
    average = WeightAverage(model)
    for _ in range(3):
        model(x)
        anneal(model)
        average.update(model)
        assert_follows(average.swa_model, model, x)
        assert average.swa_model.calls == model.calls
    latest = copy.deepcopy(model)
    anneal(model)
    assert_follows(average.swa_model, latest, x)
    del model.late
    average.update(model)
    assert not hasattr(average.swa_model, 'late')


def test_settings_of_torch_layers_follow_when_the_average_is_settled_with_the_model():
    model = net()
    average = WeightAverage(model)
    average.update(model)
    model[1].eps = 0.5
    average.settle(model)
    assert average.swa_model[1].eps == 0.5


def test_a_lent_average_comes_with_its_plain_attributes_and_leaves_the_models_alone():
    model, x = Annealed(), torch.randn(4, 3)
    average = WeightAverage(model)
    anneal(model)
    average.update(model)
    anneal(model)
    out, own, objects = average.swa_model(x), everything(model), [id(v) for v in vars(model).values()]
    with average.lent_to(model):
        assert torch.equal(model(x), out)
        model.scales['out'][0] = 100.0
    assert torch.equal(average.swa_model(x), out)
    tensors, attributes = everything(model)
    assert attributes[0]['temperature'] == own[1][0]['temperature'] and attributes[0]['scales'] == {'out': [3.0]}
    assert [id(v) for v in vars(model).values()] == objects
    average.copy_to(model)
    assert torch.equal(model(x), out) and model.scales is not average.swa_model.scales


def test_an_attribute_that_cannot_be_copied_is_named_once():
    class Locked:
        def __deepcopy__(self, memo):
            raise TypeError('not this one')

    model = Annealed()
    average = WeightAverage(model)
    model.locked = Locked()
    with pytest.warns(UserWarning, match="swa_model keeps its own 'locked'"):
        average.update(model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        average.update(model)


# quantization-aware training


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning', 'ignore::FutureWarning')
@pytest.mark.parametrize('qconfig', ['fbgemm', 'qnnpack'])
def test_quantization_aware_training_is_averaged_with_the_latest_observers(qconfig):
    from torch.ao import quantization

    torch.manual_seed(0)
    model = nn.Sequential(
        quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )
    model = quantization.fuse_modules_qat(model.train(), [['1', '2', '3']])
    model.qconfig = quantization.get_default_qat_qconfig(qconfig)
    quantization.prepare_qat(model, inplace=True)
    average, snapshots, x = WeightAverage(model), [], torch.randn(8, 3, 8, 8)
    for epoch in range(4):  # the observers' buffers get their shapes in the first forward pass
        step_parameters(model, 0.01)
        model.train()(x * (epoch + 1))
        if epoch == 2:
            model.apply(quantization.disable_observer)
        snapshots.append([t.clone() for t in parameters(model)])
        average.update(model)
        for (name, a), (_, b) in zip(average.swa_model.named_buffers(), model.named_buffers(), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b), name
    assert_close(parameters(average.swa_model), twins.mean(snapshots))
    with torch.no_grad():
        with average.lent_to(model):
            column = model.eval()(x)
        assert torch.equal(column, average.swa_model.eval()(x))
        twin = copy.deepcopy(model)
        for p, e in zip(twin.parameters(), average.swa_model.parameters()):
            p.copy_(e)
        assert torch.equal(twin.eval()(x), column)


def step_parameters(model, scale):
    with torch.no_grad():
        [p.add_(torch.randn_like(p) * scale) for p in model.parameters()]


def test_a_buffer_that_is_resized_in_place_or_changes_its_dtype_follows_the_model():
    model = nn.Linear(2, 2)
    model.register_buffer('low', torch.tensor(1.0))
    average = WeightAverage(model)
    average.update(model)
    for change in (
        lambda: model.low.resize_(4).fill_(2.0),
        lambda: model.low.resize_(0),
        lambda: setattr(model.low, 'data', torch.ones(3, dtype=torch.float64)),
    ):
        change()
        average.update(model)
        assert average.swa_model.low.dtype == model.low.dtype and torch.equal(average.swa_model.low, model.low)


def test_a_second_lending_walks_through_no_module_and_goes_on_with_what_is_there(monkeypatch):
    model = net()
    average = WeightAverage(model)
    average.update(model)
    with average.lent_to(model):
        pass
    with monkeypatch.context() as patches:  # at 10,000 parameters the walks cost several folds
        patches.setattr(nn.Module, 'named_modules', raising(AssertionError('a walk')))
        with average.lent_to(model):
            pass
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))
    model[1].register_buffer('running_mean', torch.ones_like(model[1].running_mean))
    own = {name: t.clone() for name, t in model.state_dict().items()}
    with average.lent_to(model) as swa_model:
        assert all(torch.equal(t, swa_model.state_dict()[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, own[name]) for name, t in model.state_dict().items())


def test_an_average_that_is_released_does_not_keep_the_model_it_was_lent_to():
    model = net()
    average = WeightAverage(model)
    average.update(model)
    with average.lent_to(model):
        pass
    gone = weakref.ref(model)
    average.release()
    del model
    gc.collect()
    assert gone() is None


def test_frozen_parameters_are_copied_so_that_no_edit_of_the_models_reaches_the_average():
    model = net().requires_grad_(False)
    model[7].requires_grad_(True)
    average = WeightAverage(model)
    average.update(model)
    averaged = [p.clone() for p in average.swa_model.parameters()]
    storages = {p.data_ptr() for p in model.parameters()}
    assert not storages & {p.data_ptr() for p in average.swa_model.parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.data.add_(1)  # of which no counter tells
    assert all(map(torch.equal, average.swa_model.parameters(), averaged))
