"""The whole state of a fit as plain data: taken from a learner between two epochs, put back into
that or another one."""

from collections import defaultdict

import torch
from fastai.data.core import TfmdDL
from fastai.learner import Learner
from fastai.optimizer import Optimizer
from fastcore.foundation import L

from .attributes import plain_attributes, put_attributes, without_unchanged
from .histories import Histories
from .modules import in_train_mode, named_tensors, plain_name, unwrap, written_in_train_mode
from .packing import Packer, unpack
from .randomness import random_states, set_random_states_of
from .walk import LEARNED, keeps_state, loaders, named_callbacks, owned_modules

__all__ = ['take', 'restore']


def take(learn: Learner, unchanged: dict | None = None, histories: Histories | None = None) -> dict:
    """The state of `learn` before an epoch of a fit, as numbers, strings, tensors on the CPU, and
    lists, tuples and dicts of these.

    It holds copies of the weights, buffers and gradients, the optimizer with its hyperparameters,
    the gradient scaler, all random generators (of Python, NumPy, torch, each GPU, and those found
    in loaders, callbacks, model and loss), the counters of the learner, what callbacks keep: their
    `state_dict()` if they have one, else what is plain data in their attributes, but for tensors of
    the model; and, as far as it is small (`contents.MAX_LEAVES`), what is plain data in samplers,
    data sets, transforms, losses, modules and the objects of callbacks. `torch.save` writes it and
    `torch.load(weights_only=True)` reads it.

    - `unchanged`: an earlier `plain_attributes(learn)`; attributes that still equal it are
      settings, and left out.
    - `histories`: gets the lists of callbacks that only grow, and the state what stands for them.

    What a callback or the data have exchanged since the last time and cannot be kept is named in
    one warning, as is what can be gone through only once. Raises `TypeError`, naming it, if the
    optimizer keeps something that is not plain data.
    """
    with in_train_mode(unwrap(learn.model)):  # where modes move weights, they are those that training has
        return _taken(learn, unchanged or {}, histories)


def _taken(learn, unchanged, histories) -> dict:
    pack = Packer()
    model = unwrap(learn.model)
    opt = learn.opt
    own = {id(p) for p in model.parameters()}
    params = [p for group in opt.param_lists for p in group]
    names = [name for name, _ in named_callbacks(learn)]
    callbacks, held = without_unchanged(plain_attributes(learn, histories), unchanged, names)
    return {
        'epoch': vars(learn).get('epoch', 0),  # none before the first fit
        'model': pack(_tensors(model)),
        'extra': pack(_extra_state(model)),
        'losses': pack([_tensors(m) for m in owned_modules(learn.loss_func)]),
        'requires_grad': [p.requires_grad for p in model.parameters()],
        'optimizer': pack(opt.state_dict(), 'the optimizer'),
        'masters': pack([p for p in params if id(p) not in own]),
        'frozen_idx': opt.frozen_idx,
        'gradients': pack(_gradients(params)),
        'scaler': pack(learn.scaler.state_dict() if getattr(learn, 'scaler', None) is not None else {}),
        'random': pack(random_states(learn)),
        'learner': Packer(lenient=True)({k: vars(learn)[k] for k in _COUNTERS if k in vars(learn)}),
        'callbacks': callbacks,
        'held': held,
        'loaders': [_knows_batches(dl) for dl in loaders(learn)],
        'states': {key: pack(cb.state_dict(), key) for key, cb in named_callbacks(learn) if keeps_state(cb)},
    }


def restore(learn: Learner, state: dict, unchanged: dict | None = None):
    """Put a state of `take` into `learn`, which is before an epoch of a fit; what follows is
    bitwise what would have followed there.

    - `unchanged`: what `take` was given; attributes that the state does not have get these values
      again, should they have moved on since.

    Raises `ValueError`, naming the tensors and before anything changes, if the model or the
    optimizer is another one. Callbacks that the state knows nothing of stay as they are; a random
    generator, or an object with attributes, that is not found any more is named in a warning.
    """
    model = unwrap(learn.model)
    opt = learn.opt
    weights = state['model']  # names and tensors, which are copied one by one
    params = [p for group in opt.param_lists for p in group]
    check_tensors(model, weights)
    own = {id(p) for p in model.parameters()}
    masters = [p for p in params if id(p) not in own]
    if len(masters) != len(state['masters']) or len(state['gradients']) != len(params):
        raise ValueError('the optimizer has other parameters than the one of the state')
    with written_in_train_mode(model):
        _put(learn, state, weights, params, masters, unchanged or {})


def _put(learn, state, weights, params, masters, unchanged):
    model = unwrap(learn.model)
    opt = learn.opt
    with torch.no_grad():
        _set_tensors(model, weights)
        for m, tensors in zip(owned_modules(learn.loss_func), unpack(state['losses'])):
            _set_tensors(m, tensors)
        for p, value in zip(masters, unpack(state['masters'])):
            p.copy_(value)
        for p, value in zip(params, unpack(state['gradients'])):
            p.grad = _gradient(p, value)
    if state['extra']:
        model.load_state_dict(unpack(state['extra']), strict=False)
    for p, flag in zip(model.parameters(), state['requires_grad']):
        p.requires_grad_(flag)
    _load_optimizer(opt, unpack(state['optimizer']), params)
    opt.frozen_idx = state['frozen_idx']
    if state['scaler'] and getattr(learn, 'scaler', None) is not None:
        learn.scaler.load_state_dict(unpack(state['scaler']))
    for k in _COUNTERS:
        if k in state['learner']:
            setattr(learn, k, unpack(state['learner'][k]))
    for key, cb in named_callbacks(learn):
        if keeps_state(cb) and key in state['states']:
            cb.load_state_dict(unpack(state['states'][key]))
    for dl, knows in zip(loaders(learn), state.get('loaders', ())):
        _let_know(dl, knows)
    put_attributes(learn, {**state.get('held', {}), **state['callbacks']}, unchanged)
    set_random_states_of(learn, unpack(state['random']))  # last: nothing after it may draw


_COUNTERS = 'train_iter pct_train smooth_loss final_record'.split()


# models and optimizers


def _tensors(module) -> dict:
    "Plain name -> parameter or buffer, those that the module's own state dict leaves out as well."
    return {**named_tensors(module.named_parameters), **named_tensors(module.named_buffers)}


def _extra_state(module):
    return {
        plain_name(k): v
        for k, v in module.state_dict().items()
        if k.endswith('_extra_state') and not isinstance(v, torch.Tensor)
    }


def check_tensors(model, tensors: dict):
    """Raise `ValueError`, naming them, unless `model` has parameters of the names and shapes of
    those in `tensors`.
    """
    own = named_tensors(model.named_parameters)

    def kind(t):
        return f'{tuple(t.shape)} {str(t.dtype).removeprefix("torch.")}'

    faults = []
    for name, p in own.items():
        if name not in tensors:
            faults.append(f'{name!r} is not in the state')
        elif kind(tensors[name]) != kind(p):
            faults.append(f'{name!r} is {kind(p)}, {kind(tensors[name])} in the state')
    buffers = named_tensors(model.named_buffers)
    for name in tensors.keys() - own.keys() - buffers.keys():
        if not _module_of(model, name) or tensors[name].requires_grad:
            faults.append(f'{name!r} is in the state only')
    if faults:
        more = f'; and {len(faults) - 3} more' if len(faults) > 3 else ''
        raise ValueError(f'the model is another one: {"; ".join(faults[:3])}{more}')


def _module_of(model, name):
    try:
        return model.get_submodule(name.rpartition('.')[0])
    except AttributeError:
        return None


def _set_tensors(module, tensors):
    own = _tensors(module)
    for name, value in tensors.items():
        t = own.get(name)
        if t is not None and t.shape == value.shape and t.dtype == value.dtype:
            t.copy_(value)
        else:  # a buffer that came, or changed, since the module was made
            device = next((p.device for p in module.parameters()), value.device)
            _module_of(module, name)._buffers[name.rpartition('.')[2]] = value.to(device, copy=True)


def _gradients(params) -> list:
    """For each parameter its gradient, or whether it has one: between epochs they are zero, but
    where gradients accumulate.
    """
    grads = [None if p.grad is None or p.grad.is_sparse else p.grad.detach() for p in params]
    dense = [g for g in grads if g is not None]
    accumulated = False
    if dense:
        largest = torch._foreach_norm(dense, float('inf'))
        accumulated = torch.stack([n.to(dense[0].device, torch.float32) for n in largest]).ne(0).any()
    return [False if g is None else g if accumulated else True for g in grads]


def _gradient(p, value):
    if isinstance(value, torch.Tensor):
        return value.to(p.device)
    return torch.zeros_like(p) if value else None


def _load_optimizer(opt, state, params):
    own = opt.opt if hasattr(opt, 'slow_weights') else opt  # Lookahead's own weights beside the optimizer inside it
    if isinstance(own, Optimizer):
        state['hypers'] = L(state['hypers'])
        for p, s in zip(params, state['state']):
            s.update({k: v.to(p.device) for k, v in s.items() if isinstance(v, torch.Tensor)})
        if state.get('slow_weights'):
            pairs = zip(state['slow_weights'], opt.param_lists)
            state['slow_weights'] = L(L(w.to(p.device) for w, p in zip(ws, ps)) for ws, ps in pairs)
    opt.load_state_dict(state)
    # fastai leaves a plain dict, which knows no new parameter
    if isinstance(own, Optimizer):
        own.state = defaultdict(dict, own.state)


# what a loader knows about its batches


def _knows_batches(dl) -> bool:
    """Has fastai's loader sent a sample through its transforms, to see what a batch is made of? It
    does so once, when that is first asked.
    """
    # fastai's loader for several processes, which has a `world_size`, leaves that to the one inside
    is_asked = isinstance(dl, TfmdDL) and not hasattr(dl, 'world_size')
    return not is_asked or '_n_inp' in vars(dl)


def _let_know(dl, knows):
    """A loader that knows what a batch is made of does not draw or count for it again, one that
    does not, does.
    """
    if knows == _knows_batches(dl):
        return
    if knows:
        dl._one_pass()
    else:
        for name in vars(dl).keys() & set(LEARNED):
            delattr(dl, name)
