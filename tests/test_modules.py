import copy
import dataclasses
import enum
import functools
import gc
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from fastai.callback.hook import ActivationStats, Hook
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_language_model
from fastai.vision.models.unet import DynamicUnet
from torch import nn

from fastai_swa.modules import (
    check_copyable,
    clean_copy,
    dropped_hooks,
    has_own_modes,
    in_train_mode,
    moves_weights,
    plain_data,
    same_data,
    unwrap,
    written_in_train_mode,
)

from . import lora
from .helpers import learner, net


def forward_and_back(model, *args):
    "A training step's worth of graph, so that what a forward pass leaves behind is there."
    model.train()
    out = model(*args)
    while isinstance(out, tuple | list):
        out = out[0]
    out.float().sum().backward()


def assert_clean_copy_of(res, model, *args):
    "Equal weights and outputs, no tensor in common, no gradient."
    model.eval(), res.eval()
    for m in (model, res):
        if hasattr(m, 'reset'):
            m.reset()
    with torch.no_grad():
        a, b = model(*args), res(*args)
    while isinstance(a, tuple | list):
        a, b = a[0], b[0]
    assert torch.equal(a, b)
    ours, theirs = res.state_dict(keep_vars=True), unwrap(model).state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    assert not {t.data_ptr() for t in ours.values() if t.numel()} & {t.data_ptr() for t in theirs.values()}
    assert [type(t) for t in ours.values()] == [type(t) for t in theirs.values()]
    assert [t.requires_grad for t in ours.values()] == [t.requires_grad for t in theirs.values()]
    assert all(p.grad is None for p in res.parameters())


def unet():
    encoder = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
    )
    return DynamicUnet(encoder, n_out=2, img_size=(16, 16))


def old_weight_norm():
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.utils.spectral_norm(nn.Linear(4, 4)))


def new_weight_norm():
    from torch.nn.utils import parametrizations as p

    return nn.Sequential(p.weight_norm(nn.Linear(3, 4)), p.spectral_norm(nn.Linear(4, 4)))


def pruned():
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    prune.random_unstructured(model[0], 'weight', 0.5)
    return model


tokens = torch.randint(1, 20, (2, 5))


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize(
    'make, args',
    [
        (net, (torch.randn(5, 6),)),
        (unet, (torch.randn(2, 3, 16, 16),)),
        (old_weight_norm, (torch.randn(5, 3),)),
        (new_weight_norm, (torch.randn(5, 3),)),
        (pruned, (torch.randn(5, 3),)),
        (lambda: nn.LSTM(3, 4, 2), (torch.randn(5, 2, 3),)),
        (lambda: AWD_LSTM(20, 6, 8, 2), (tokens,)),
        (lambda: get_language_model(AWD_LSTM, 20), (tokens,)),
    ],
    ids='net unet old_weight_norm new_weight_norm pruned lstm awd_lstm language_model'.split(),
)
@pytest.mark.parametrize('trained', [False, True])
def test_any_architecture_is_copied_fresh_or_after_a_training_forward(make, args, trained):
    torch.manual_seed(0)
    model = make()
    if trained:
        forward_and_back(model, *args)
    res = clean_copy(model)
    if trained:
        forward_and_back(res, *args), [setattr(p, 'grad', None) for p in res.parameters()]
    res.load_state_dict(model.state_dict())
    assert_clean_copy_of(res, model, *args)


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_a_copy_of_weight_norm_computes_with_its_own_weights():
    model = old_weight_norm()
    res, x = clean_copy(model.eval()), torch.randn(5, 3)
    before = model(x).detach()
    with torch.no_grad():
        res[0].weight_g.mul_(2)
    assert not torch.allclose(res[0](x), model[0](x)) and torch.equal(model(x), before)


def test_a_unets_hooks_read_the_features_of_the_copys_own_encoder():
    model = unet()
    forward_and_back(model, torch.randn(2, 3, 16, 16))
    res = clean_copy(model)
    assert all(h.stored is None for h in res.sfs), 'activations of the training batch came along'
    hooks = [h for m in res.layers[0].modules() for h in m._forward_hooks.values()]
    assert len(hooks) == len(list(model.sfs)) and not {id(h.__self__) for h in hooks} & {id(h) for h in model.sfs}
    before = [len(m._forward_hooks) for m in model.modules()]
    del res
    gc.collect()  # a DynamicUnet removes its hooks when it goes: they must be the copy's
    assert [len(m._forward_hooks) for m in model.modules()] == before and sum(before) > 0


class Owner(nn.Module):
    "A module with hooks of its own, in each way a module can hold one."

    def __init__(self):
        super().__init__()
        self.lin, self.seen = nn.Linear(3, 3), []
        self.lin.register_forward_hook(self.note)
        self.lin.register_forward_pre_hook(functools.partial(self.pre, scale=2.0), with_kwargs=True)
        self.function = lambda m, i, o: o + 1
        self.lin.register_forward_hook(self.function)
        self._register_load_state_dict_pre_hook(self.loading)

    def note(self, m, i, o):
        self.seen.append(id(m))

    def pre(self, m, args, kwargs, scale):
        return tuple(a * scale for a in args), kwargs

    def loading(self, *args):
        self.seen.append('loading')

    def forward(self, x):
        return self.lin(x)


def test_a_models_own_hooks_are_copied_and_fastais_left_out():
    model, watched = Owner(), []
    Hook(model.lin, lambda *a: watched.append(1))
    res, x = clean_copy(model), torch.randn(2, 3)
    assert torch.equal(res(x), nn.functional.linear(2 * x, model.lin.weight, model.lin.bias) + 1)
    assert watched == [] and res.seen == [id(res.lin)] and model.seen == []
    assert (
        len(res.lin._forward_hooks) == 2
        and len(res.lin._forward_pre_hooks) == len(res.lin._forward_pre_hooks_with_kwargs) == 1
    )
    assert not res._backward_hooks and dropped_hooks(model) == []
    res.load_state_dict(model.state_dict())
    assert res.seen[-1] == 'loading' and model.seen == []


# what is set on the instance: hooks, patched methods


def three_layers():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


class Scaling:
    "A hook with a state of its own."

    def __init__(self):
        self.scale = 2.0

    def __call__(self, m, args, out):
        return out * self.scale

    def shift(self, m, args, out):
        return out + self.scale


def doubled(m, args, out):
    return out * 2


def two_hooks(model):
    model[0].register_forward_hook(doubled)
    model[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def hooks_of_objects(model):
    model[0].register_forward_hook(Scaling())
    model[2].register_forward_hook(Scaling().shift)


def a_hook_with_arguments(model):
    model[1].register_forward_hook(functools.partial(lambda scale, m, args, out: out * scale, 3.0))


def a_hook_that_reads_another_layers_weight(model):
    weight = model[2].weight
    model[0].register_forward_hook(lambda m, args, out: out @ weight)


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend='eager')


def compiled_forward_inside(model):
    model[0].forward = torch.compile(model[0].forward, backend='eager')


def a_closure(model):
    old = model.forward

    def forward(x):
        return old(x) * 2

    model.forward = forward


def a_bound_closure(model):
    old = model.forward

    def forward(self, x):
        return old(x) + self[0](x)

    model.forward = types.MethodType(forward, model)


def a_default(model):
    model.forward = lambda x, model=model: model[0](x)


def a_partial(model):
    model.forward = functools.partial(lambda model, scale, x: model[2](model[0](x)) * scale, model, 2.0)


def decorated(model):
    model.forward = torch.no_grad()(model.forward)


def an_object(model):
    class Forward:
        def __init__(self, model):
            self.model = model

        def __call__(self, x):
            return self.model[0](x)

    model.forward = Forward(model)


def a_weak_reference(model):
    model[1].owner = weakref.ref(model)
    model[1].forward = types.MethodType(reads_owner, model[1])


def reads_owner(self, x):
    return x @ self.owner()[0].weight


PATCHES = [
    two_hooks,
    hooks_of_objects,
    a_hook_with_arguments,
    a_hook_that_reads_another_layers_weight,
    compiled_forward,
    compiled_forward_inside,
    a_closure,
    a_bound_closure,
    a_default,
    a_partial,
    decorated,
    an_object,
    a_weak_reference,
]


@pytest.mark.parametrize('patch', PATCHES, ids=lambda f: f.__name__)
def test_what_hooks_and_patched_methods_compute_the_copy_computes_with_its_own_weights(patch):
    torch.manual_seed(0)
    model, x = three_layers(), torch.randn(3, 4)
    patch(model)
    check_copyable(model)
    res = clean_copy(model)
    twin = three_layers()
    twin.load_state_dict(model.state_dict())
    patch(twin)  # made anew instead of copied
    assert torch.equal(model(x), twin(x)) and torch.equal(res(x), twin(x))
    for changed in (model, twin):
        with torch.no_grad():
            [p.add_(1.0) for p in changed.parameters()]
        assert torch.equal(model(x), twin(x)) == (changed is twin), (
            'the twin follows the model only once both have changed'
        )
        before = res(x)
        assert not torch.equal(before, model(x))
    with torch.no_grad():
        [p.add_(1.0) for p in res.parameters()]
    assert torch.equal(res(x), twin(x))
    assert dropped_hooks(model) == []
    ref = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert ref() is None, 'the copy keeps the model alive'


def test_the_state_of_a_hook_is_not_shared_with_the_model():
    model, calls = three_layers(), []
    model[0].register_forward_hook(lambda m, args, out: calls.append(1))
    res = clean_copy(model)
    res(torch.randn(2, 4))
    assert calls == []
    model(torch.randn(2, 4))
    assert calls == [1]


def by_a_global(model):
    global the_model
    the_model = model
    model.forward = lambda x: the_model[0](x)


def a_hook_by_a_global(model):
    global the_model
    the_model = model
    model[2].register_forward_hook(lambda m, args, out: out @ the_model[0].weight)


def a_view(model):
    weight = model[0].weight.data
    model[0].forward = lambda x: x @ weight


def cached(model):
    model[0].forward = functools.lru_cache(model[0].forward)


def a_lock(model):
    old, lock = model[0].forward, threading.Lock()

    def forward(x):
        with lock:
            return old(x)

    model[0].forward = forward


@pytest.mark.parametrize(
    'patch, where',
    [
        (by_a_global, "'forward' of the model itself"),
        (a_hook_by_a_global, "'_forward_hooks' of module '2'"),
        (a_view, "'forward' of module '0'"),
        (cached, "'forward' of module '0'"),
        (a_lock, "'forward' of module '0'"),
    ],
    ids=lambda f: getattr(f, '__name__', ''),
)
def test_what_would_go_on_using_the_model_in_training_is_refused_by_name(patch, where):
    model = three_layers()
    patch(model)
    for f in (check_copyable, clean_copy):
        with pytest.raises(ValueError, match='^cannot copy the model: .*; pass a swa_model of your own$') as e:
            f(model)
        assert where in str(e.value)


def test_a_function_that_cannot_be_copied_and_does_not_know_the_model_is_shared():
    model, lock = three_layers(), threading.Lock()

    def twice(x):
        with lock:
            return x * 2

    model[1].forward = twice
    x = torch.randn(2, 4)
    assert torch.equal(clean_copy(model)(x), model(x))


def test_hooks_that_reach_a_learner_are_left_out_and_named():
    learn = learner()
    learn.model[2].register_forward_hook(lambda m, args, out: out * learn.epoch)
    learn.model.register_forward_hook(lambda m, args, out: None)
    for shared in ((), (learn,)):
        assert dropped_hooks(learn.model, shared) == ['2']
        res = clean_copy(learn.model, shared)
        assert not res[2]._forward_hooks and len(res._forward_hooks) == 1


def test_a_hook_of_a_callback_never_takes_the_learner_along():
    learn = learner(cbs=ActivationStats())
    learn.fit(1)
    learn.activation_stats._register()

    def count():
        gc.collect()
        return sum(type(o) is type(learn) for o in gc.get_objects())

    before = count()
    for shared in ((), (learn,)):
        res = clean_copy(learn.model, shared=shared)
        assert not any(m._forward_hooks for m in res.modules())
        assert count() == before


def test_what_is_shared_is_referred_to_and_not_copied():
    model, owner = net(), {'data': torch.randn(5)}
    model.owner, model.also = owner, [owner]
    res = clean_copy(model, shared=(owner,))
    assert res.owner is owner and res.also[0] is owner and res.also is not model.also


def test_modes_ties_buffers_attributes_and_parameter_order_are_kept():
    model = net().train()
    model[1].eval()
    model[5].weight = model[1].weight
    model.scale, model.text = torch.ones(2), 'text'
    model.register_buffer('hidden', torch.ones(3), persistent=False)
    res = clean_copy(model)
    assert [m.training for m in res.modules()] == [m.training for m in model.modules()]
    assert res[5].weight is res[1].weight and res.text == 'text'
    assert torch.equal(res.scale, model.scale) and res.scale is not model.scale
    assert 'hidden' not in res.state_dict() and torch.equal(res.hidden, model.hidden)
    assert [n for n, _ in res.named_parameters()] == [n for n, _ in model.named_parameters()]


def test_the_copy_does_not_keep_the_model_alive():
    model = net()
    res, ref = clean_copy(model), weakref.ref(model)
    del model
    gc.collect()
    assert ref() is None and res is not None


def test_a_lazy_module_that_saw_no_batch_is_one_clear_error_and_afterwards_copied():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="'0.weight' belongs to a lazy module .* run one batch"):
        clean_copy(model)
    model(torch.randn(4, 5))
    assert_clean_copy_of(clean_copy(model), model, torch.randn(4, 5))


def test_a_model_that_deepcopy_refuses_for_what_a_forward_left_in_it_is_copied():
    model = net()
    model.cache = {'last': model(torch.randn(4, 6))}
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    assert clean_copy(model).cache == {'last': None}


def test_a_wrapper_that_delegates_to_a_compiled_body_is_not_taken_for_one():
    class Delegates(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.compile(nn.Linear(3, 3), backend='eager'), nn.Linear(3, 2)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__('body'), name)

        def forward(self, x):
            return self.head(self.body(x))

    model = Delegates()
    assert unwrap(model) is model
    assert list(clean_copy(model).state_dict()) == ['body.weight', 'body.bias', 'head.weight', 'head.bias']


def test_modules_compiled_inside_compiled_modules_have_plain_keys():
    inner = nn.Sequential(torch.compile(nn.Linear(3, 3), backend='eager'))
    model = nn.Sequential(torch.compile(inner, backend='eager'))
    assert list(clean_copy(model).state_dict()) == ['0.0.weight', '0.0.bias']


# modes that move weights


@pytest.fixture(params=lora.models)
def merging(request):
    torch.manual_seed(0)
    return lora.models[request.param]()


def everything(model):
    "Tensors, modes, and attributes with the insides of lists, bitwise."
    attributes = [{k: copy.copy(v) for k, v in vars(m).items() if k[0] != '_'} for m in model.modules()]
    return {k: v.clone() for k, v in model.state_dict().items()}, attributes


def assert_as_before(model, before):
    tensors, attributes = everything(model)
    for k, v in before[0].items():
        assert torch.equal(v, tensors[k]), k
    assert attributes == before[1]


def test_a_model_moves_weights_where_a_train_or_an_eval_is_its_own(merging):
    assert moves_weights(merging) and moves_weights(nn.Sequential(merging)) and not moves_weights(net())
    model = net()
    model[2].eval = functools.partial(nn.Module.eval, model[2])
    assert moves_weights(model) and moves_weights(nn.DataParallel(model))


@pytest.mark.parametrize('error', [None, KeyboardInterrupt])
def test_reading_in_train_mode_shows_the_weights_in_training_and_leaves_every_bit_as_it_was(merging, error):
    trained = everything(merging)[0]
    merging.eval()
    before, pointers = everything(merging), [p.data_ptr() for p in merging.parameters()]
    assert any(not torch.allclose(v, trained[k]) for k, v in before[0].items())
    try:
        with in_train_mode(merging):
            for k, v in merging.state_dict().items():
                torch.testing.assert_close(v, trained[k])
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert_as_before(merging, before)
    assert [p.data_ptr() for p in merging.parameters()] == pointers
    merging.train()
    for k, v in merging.state_dict().items():
        torch.testing.assert_close(v, trained[k])


def test_weights_written_in_train_mode_are_merged_as_the_mode_asks(merging):
    x, trained = torch.randn(4, 6), everything(merging)[0]
    norm = next(m for m in merging.modules() if isinstance(m, nn.BatchNorm1d))
    out = merging.eval()(x)
    norm.train()
    with torch.no_grad(), written_in_train_mode(merging):
        assert [m for m in merging.modules() if m.training and not has_own_modes(m)] == [norm]
        for p in merging.parameters():
            p.zero_()
        merging.load_state_dict(trained)
    assert [m for m in merging.modules() if m.training] == [norm]
    torch.testing.assert_close(merging.eval()(x), out)
    for k, v in merging.train().state_dict().items():
        torch.testing.assert_close(v, trained[k])


@pytest.mark.parametrize('context', [in_train_mode, written_in_train_mode])
def test_nothing_is_done_to_a_model_that_moves_no_weights_or_is_in_train_mode(context, merging, monkeypatch):
    plain = net().eval()
    plain[1].train()
    for model in (plain, merging):
        before = everything(model)
        calls = []
        with monkeypatch.context() as m, context(model):
            m.setattr(torch.Tensor, 'clone', lambda self: calls.append(self))
        assert calls == []
        assert_as_before(model, before)


def test_a_copy_of_a_merged_model_is_merged_and_computes_the_same(merging):
    x, trained = torch.randn(4, 6), everything(merging)[0]
    merging.eval()
    res = clean_copy(merging)
    assert torch.equal(res(x), merging(x))
    for k, v in res.train().state_dict().items():
        torch.testing.assert_close(v, trained[k])


class FrozenStatistics(nn.Module):
    "As in mmdetection: the model's `train` keeps batch norm in eval mode."

    def __init__(self):
        super().__init__()
        self.net = net()

    def train(self, mode=True):
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.eval()
        return self


def test_modes_set_by_hand_or_by_a_train_of_its_own_come_back_one_by_one():
    model = FrozenStatistics().train()
    model.net[0].eval()
    for mode in (True, False):
        model.training = mode
        modes = [m.training for m in model.modules()]
        for context in (in_train_mode, written_in_train_mode):
            with context(model):
                assert model.training
            assert [m.training for m in model.modules()] == modes


# plain attributes


class Kind(enum.Enum):
    one = 1


@dataclasses.dataclass
class Settings:
    rate: float
    names: list


def test_plain_data_of_a_module_is_what_holds_no_part_of_a_model_or_program():
    model = net()
    data = {
        'number': 1,
        'text': 'a',
        'kind': Kind.one,
        'settings': Settings(0.1, ['a']),
        'nested': {(1, 2): [torch.ones(2)]},
        'array': np.arange(3),
        'tensor': torch.ones(2),
        'function': nn.functional.relu,
    }
    others = {
        'layers': [nn.Linear(1, 1)],
        'weight': {'w': model[0].weight},
        'method': model.forward,
        'closure': lambda: data,
        'generator': torch.Generator(),
        'rng': np.random.default_rng(0),
        'activation': model(torch.ones(2, 6)),
        'ref': weakref.ref(model),
        'lock': [threading.Lock()],
    }
    vars(model).update(data, **others)
    assert plain_data(model).keys() == data.keys()
    for value in data.values():
        same = copy.deepcopy(value)
        assert same_data(value, same)
    for a, b in (
        (1, 1.0),
        ({'a': [1]}, {'a': [2]}),
        (torch.ones(2), torch.zeros(2)),
        (np.ones(2), np.ones(3)),
        (Settings(0.1, []), Settings(0.1, [1])),
    ):
        assert not same_data(a, b)
