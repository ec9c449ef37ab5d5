import copy
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from fastai_swa import update_bn
from fastai_swa.batchnorm import tracked_bn
from torch import nn

from .helpers import net
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
    "Batch norm in one, two and three dimensions, in random widths, with and without affine, momentum or tracking."
    dim = rng.choice([1, 2, 3])
    conv, bn = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1], (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1]
    layers, width = [], 2
    for _ in range(rng.randint(1, 3)):
        out = rng.randint(1, 5)
        layers += [conv(width, out, 3, padding=1), bn(out, affine=rng.random() < .7, momentum=rng.choice([.1, .9, None]),
                                                       track_running_stats=rng.random() < .8), nn.ReLU(), nn.Dropout(.5)]
        width = out
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3), nn.SyncBatchNorm(3)), (2, *[4]*dim)


@pytest.mark.parametrize('seed', range(10))
def test_batch_norm_is_exact_for_random_networks_and_batch_sizes(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model, shape = random_net(rng)
    sizes = [rng.randint(2, 9) for _ in range(rng.randint(1, 6))]
    batches = [(torch.randn(n, *shape)*rng.uniform(.1, 5) + rng.uniform(-3, 3),) for n in sizes]
    model.train(rng.random() < .5)
    model(batches[0][0])
    before = copy.deepcopy(model)
    update_bn([(x, None) for x, in batches], model)
    assert_exact(model, batches, before)
    for (name, a), b in zip(model.named_modules(), before.modules()):
        assert a.training == b.training and getattr(a, 'momentum', 0) == getattr(b, 'momentum', 0), name
        if getattr(a, 'running_mean', None) is not None: assert a.num_batches_tracked.item() == len(batches)


# what torch.optim.swa_utils.update_bn gets wrong

def test_a_small_last_batch_counts_by_its_samples():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1000, 1), 50 + torch.randn(2, 1)])
    model = nn.Sequential(nn.BatchNorm1d(1))
    update_bn([(b,) for b in x.split(100)], model)
    assert model[0].running_mean.item() == pytest.approx(x.mean().item(), abs=1e-4)
    assert model[0].running_var.item() == pytest.approx(x.var().item(), rel=1e-4)


def test_the_spread_between_batches_counts():    # a loader sorted by class
    torch.manual_seed(0)
    x = torch.cat([torch.randn(100, 1), 10 + torch.randn(100, 1)])
    model = nn.Sequential(nn.BatchNorm1d(1))
    update_bn(list(x.split(20)), model)
    assert model[0].running_var.item() == pytest.approx(x.var().item(), rel=1e-5) and x.var() > 20


def test_dropout_is_off():
    model = nn.Sequential(nn.Dropout(.9), nn.BatchNorm1d(2))
    x = torch.randn(64, 2)
    update_bn([x], model.train())
    torch.testing.assert_close(model[1].running_mean, x.mean(0))


def test_a_layer_used_twice_pools_both_uses():
    class Siamese(nn.Module):
        def __init__(self): super().__init__(); self.bn = nn.BatchNorm1d(3)
        def forward(self, a, b): return self.bn(a).sum() - self.bn(b).sum()
    batches = [(torch.randn(n, 3), torch.randn(n + 1, 3)*3 + 2) for n in (4, 7)]
    model = Siamese()
    update_bn([(*b, 'target') for b in batches], model)
    assert_exact(model, batches, Siamese())
    both = torch.cat([t for b in batches for t in b])
    torch.testing.assert_close(model.bn.running_mean, both.mean(0))


# frozen layers

def frozen_by_mode(m): m.train(); m[1].eval()
def frozen_by_grad(m): m.train(); m[1].weight.requires_grad_(False)
def frozen_by_grad_in_eval(m): m.eval(); m[1].weight.requires_grad_(False)

@pytest.mark.parametrize('freeze', [frozen_by_mode, frozen_by_grad, frozen_by_grad_in_eval])
def test_frozen_layers_keep_their_statistics_and_normalise_by_them(freeze):
    torch.manual_seed(0)
    model = net()
    model[1].running_mean.uniform_(), model[1].running_var.uniform_(.5, 2)
    freeze(model)
    before, x = copy.deepcopy(model), torch.randn(30, 6)
    update_bn(list(x.split(10)), model)
    for k in ('running_mean', 'running_var', 'num_batches_tracked'): assert torch.equal(getattr(model[1], k), getattr(before[1], k))
    assert_exact(model, [(b,) for b in x.split(10)], before, frozen=('1',))


def test_in_a_model_wholly_in_eval_mode_every_layer_with_trainable_weight_is_refreshed():
    assert list(tracked_bn(net().eval())) == list(tracked_bn(net().train())) == ['1', '5']


def test_without_batch_norm_or_with_all_of_it_frozen_the_loader_is_not_touched():
    def untouchable(): raise AssertionError('the loader was read'); yield
    update_bn(untouchable(), nn.Linear(2, 2))
    model = net()
    for m in (model[1], model[5]): m.weight.requires_grad_(False)
    update_bn(untouchable(), model)
    update_bn(untouchable(), nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)))


# kinds of batches

def test_tensors_tuples_lists_mappings_and_the_users_own_function():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.bn = nn.BatchNorm1d(2)
        def forward(self, a, b=0): return self.bn(input=a + b)
    x, y = torch.randn(8, 2), torch.randn(8, 2)
    for batch, expected, inputs in ((x, x, None), ((x,), x, None), ([x, 'target'], x, None), ((x, y, 'target'), x + y, None),
                                    ({'a': x, 'b': y}, x + y, None), (SimpleNamespace(p=x, q=y), x + y, lambda b: (b.p, b.q)),
                                    (SimpleNamespace(p=x, q=y), x + y, lambda b: {'a': b.p, 'b': b.q})):
        model = Two()
        update_bn([batch], model, inputs=inputs)
        torch.testing.assert_close(model.bn.running_mean, expected.mean(0))


def test_batches_move_to_the_device_asked_for():
    model = nn.Sequential(nn.BatchNorm1d(2)).to('meta')
    class Seen(nn.Module):
        def __init__(self): super().__init__(); self.bn, self.devices = nn.BatchNorm1d(2), []
        def forward(self, x, more): self.devices += [x.device.type, more['y'][0].device.type]; return self.bn(torch.randn(3, 2))
    model = Seen()
    update_bn([(torch.randn(3, 2), {'y': [torch.randn(1)]}, 0)], model, 'meta')
    assert model.devices == ['meta', 'meta']


def test_n_batches_stops_the_pass():
    model, x = net(), torch.randn(60, 6)
    before = copy.deepcopy(model)
    taken = []
    def loader():
        for b in x.split(10): taken.append(1); yield b
    update_bn(loader(), model, n_batches=3)
    assert len(taken) == 3
    assert_exact(model, [(b,) for b in x.split(10)[:3]], before)


def test_low_precision_and_double_layers():
    x = torch.randn(200, 6)*2 + 5
    for dtype, tol in ((torch.bfloat16, 2e-2), (torch.float64, 1e-9)):
        model = net().to(dtype)
        before = copy.deepcopy(model)
        batches = [(b.to(dtype),) for b in x.split(20)]
        update_bn([b for b, in batches], model)
        mean, var = twins.bn_statistics(before, batches)['1']
        torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=tol, atol=tol)
        torch.testing.assert_close(model[1].running_var.double(), var, rtol=4*tol, atol=tol)
        assert model[1].running_mean.dtype == dtype


@pytest.mark.parametrize('wrap', [lambda m: torch.compile(m, backend='eager'), nn.DataParallel,
                                  lambda m: nn.Sequential(*m[:4], torch.compile(m[4:], backend='eager'))])
def test_compiled_and_parallel_models(wrap):
    torch.manual_seed(0)
    bare, x = net(), torch.randn(40, 6)
    model = wrap(bare)
    model(x)    # compiled before the pass, in train mode
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
    with pytest.warns(UserWarning, match=r"2 of 4 batches were left out .* layer '5' got a single value per channel") as said: update_bn(batches, model)
    assert len(said) == 1
    assert_exact(model, [(x[1:11],), (x[12:],)], before)


def test_one_sample_is_enough_where_each_channel_gets_several_values():
    model, x = nn.Sequential(nn.BatchNorm2d(2)), torch.randn(1, 2, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        update_bn([x], model)
    torch.testing.assert_close(model[0].running_var, x[0].flatten(1).var(1))


class Breaks(nn.Module):
    def __init__(self, at): super().__init__(); self.net, self.at, self.calls = net(), at, 0
    def forward(self, x):
        self.calls += 1
        if self.calls == self.at: raise KeyboardInterrupt
        return self.net(x)


@pytest.mark.parametrize('loader, model, error, match', [
    ([], net(), ValueError, 'the loader gave no batch'),
    (iter(()), net(), ValueError, 'the loader gave no batch'),
    ([torch.randn(1, 6)]*3, net(), ValueError, '3 of 3 batches were left out.*use larger batches'),
    ([torch.randn(4, 5)], net(), RuntimeError, None),
    ([torch.randn(4, 6)]*3, Breaks(3), KeyboardInterrupt, None)])
def test_on_any_error_statistics_modes_and_momenta_come_back(loader, model, error, match):
    bns = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    for m in bns: m.running_mean.uniform_(), m.running_var.uniform_(), m.num_batches_tracked.fill_(7)
    bns[1].momentum = None
    model.train(), bns[1].eval(), bns[1].train()
    before = copy.deepcopy(model)
    pointers = [t.data_ptr() for t in model.buffers()]
    with pytest.raises(error, match=match): update_bn(loader, model)
    for k, v in model.state_dict().items(): assert torch.equal(v, before.state_dict()[k]), k
    for a, b in zip(model.modules(), before.modules(), strict=True):
        assert a.training == b.training and getattr(a, 'momentum', 0) == getattr(b, 'momentum', 0) and not a._forward_pre_hooks
    assert pointers == [t.data_ptr() for t in model.buffers()]


def test_statistics_are_written_in_place():
    model = net()
    pointers = [t.data_ptr() for t in model.buffers()]
    update_bn([torch.randn(8, 6)], model)
    assert pointers == [t.data_ptr() for t in model.buffers()]


def test_a_layer_that_nothing_reaches_keeps_its_statistics():
    class Unused(nn.Module):
        def __init__(self): super().__init__(); self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
        def forward(self, x): return self.used(x)
    model = Unused()
    model.unused.running_mean.fill_(3)
    update_bn([torch.randn(8, 2)], model)
    assert (model.unused.running_mean == 3).all() and (model.unused.running_var == 1).all()


def test_bad_arguments_are_named():
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), ('1', TypeError)):
        with pytest.raises(error, match='n_batches must be'): update_bn([torch.randn(4, 6)], net(), n_batches=bad)
    with pytest.raises(TypeError, match='model must be an nn.Module, not list'): update_bn(net(), [torch.randn(4, 6)])


def test_a_layer_called_through_its_function_keeps_its_statistics_and_does_not_disturb_the_others():
    class Functional(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        def forward(self, x):
            x = nn.functional.batch_norm(x, self.a.running_mean, self.a.running_var, self.a.weight, self.a.bias, False)
            return self.b(x)
    model, x = Functional(), torch.randn(50, 3)*2 + 1
    model.a.running_mean.fill_(1), model.a.running_var.fill_(4)
    update_bn(list(x.split(10)), model)
    assert (model.a.running_mean == 1).all() and (model.a.running_var == 4).all()
    torch.testing.assert_close(model.b.running_var, ((x - 1)/2).var(0), rtol=1e-3, atol=1e-3)


def test_statistics_that_are_not_finite_are_said():
    x = torch.randn(20, 6)
    x[3, 2] = float('inf')
    with pytest.warns(UserWarning, match='not finite'): update_bn(list(x.split(10)), net())


def test_layers_that_see_different_batches_and_images_of_changing_size_are_pooled_right():
    class Sometimes(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b, self.n = nn.BatchNorm2d(2), nn.BatchNorm2d(2), 0
        def forward(self, x):
            self.n += 1
            return self.b(self.a(x)[:, :, ::2]) if self.n % 2 else self.a(x)
    batches = [torch.randn(n, 2, h, w)*3 + 1 for n, h, w in ((4, 5, 6), (3, 7, 2), (9, 3, 3), (2, 8, 8))]
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
        def __init__(self): super().__init__(); self.bn, self.kinds = nn.BatchNorm1d(2), []
        def forward(self, pair, packed): self.kinds += [type(pair), type(packed)]; return self.bn(pair.a)
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    model = Kinds()
    update_bn([(Pair(torch.randn(4, 2), (1, 2)), packed, 0)], model, 'cpu')
    assert model.kinds == [Pair, type(packed)]


def test_a_batch_left_out_leaves_no_trace_even_if_it_is_infinite():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(2))
    batches = [torch.full((1, 2, 3, 3), float('inf')), torch.randn(5, 2, 3, 3), torch.randn(4, 2, 3, 3)]
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match='1 of 3 batches were left out') as said: update_bn(batches, model)
    assert len(said) == 1
    assert_exact(model, [(b,) for b in batches[1:]], before)
