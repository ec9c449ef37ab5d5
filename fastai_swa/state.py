"""The whole state of a fit as plain data: taken from a learner between two epochs, put back into
that or another one."""

import weakref
from collections import defaultdict
from functools import partial
from types import FunctionType, MethodType

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.data.core import TfmdDL
from fastai.learner import Learner, Recorder
from fastai.optimizer import Optimizer
from fastcore.foundation import L

from .contents import CONTAINERS, MAX_BYTES, MAX_LEAVES, attributes, is_record, nested, set_attribute
from .modules import in_train_mode, named_tensors, plain_name, unwrap, written_in_train_mode
from .packing import Packer, Unpacker, class_name, equal, pack, unpack
from .randomness import random_states, set_random_states_of
from .replay import is_used_up
from .walk import (
    LEARNED,
    OF_PASS,
    below,
    can_hold,
    keeps_state,
    loaders,
    name_once,
    named_callbacks,
    owned_modules,
    readable,
    walk,
)

__all__ = [
    'take',
    'restore',
    'plain_attributes',
    'not_copied',
    'named_callbacks',
    'keeps_state',
    'loaders',
    'owned_modules',
    'pack',
    'unpack',
]


def take(learn: Learner, unchanged: dict | None = None) -> dict:
    """The state of `learn` before an epoch of a fit, as numbers, strings, tensors on the CPU, and
    lists, tuples and dicts of these.

    It holds copies of the weights, buffers and gradients, the optimizer with its hyperparameters,
    the gradient scaler, all random generators (of Python, NumPy, torch, each GPU, and those found
    in loaders, callbacks, model and loss), the counters of the learner, what callbacks keep: their
    `state_dict()` if they have one, else what is plain data in their attributes, but for tensors of
    the model; and, as far as it is small (`holders.MAX_LEAVES`), what is plain data in samplers,
    data sets, transforms, losses, modules and the objects of callbacks. `torch.save` writes it and
    `torch.load(weights_only=True)` reads it.

    - `unchanged`: an earlier `plain_attributes(learn)`; attributes that still equal it are
      settings, and left out.

    What a callback or the data have exchanged since the last time and cannot be kept is named in
    one warning, as is what can be gone through only once. Raises `TypeError`, naming it, if the
    optimizer keeps something that is not plain data.
    """
    with in_train_mode(unwrap(learn.model)):  # where modes move weights, they are those that training has
        return _taken(learn, unchanged or {})


def _taken(learn, unchanged) -> dict:
    pack = Packer()
    model, opt = unwrap(learn.model), learn.opt
    own = {id(p) for p in model.parameters()}
    params = [p for group in opt.param_lists for p in group]
    names = [name for name, _ in named_callbacks(learn)]
    callbacks, held = _without_unchanged(plain_attributes(learn), unchanged, names)
    return {
        'epoch': learn.epoch,
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
    model, opt = unwrap(learn.model), learn.opt
    weights, params = unpack(state['model']), [p for group in opt.param_lists for p in group]
    check_tensors(model, weights)
    own = {id(p) for p in model.parameters()}
    masters = [p for p in params if id(p) not in own]
    if len(masters) != len(state['masters']) or len(state['gradients']) != len(params):
        raise ValueError('the optimizer has other parameters than the one of the state')
    with written_in_train_mode(model):
        _put(learn, state, weights, params, masters, unchanged or {})


def _put(learn, state, weights, params, masters, unchanged):
    model, opt = unwrap(learn.model), learn.opt
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
    for k, v in state['learner'].items():
        setattr(learn, k, unpack(v))
    for key, cb in named_callbacks(learn):
        if keeps_state(cb) and key in state['states']:
            cb.load_state_dict(unpack(state['states'][key]))
    for dl, knows in zip(loaders(learn), state.get('loaders', ())):
        _let_know(dl, knows)
    _put_attributes(learn, {**state.get('held', {}), **state['callbacks']}, unchanged)
    set_random_states_of(learn, unpack(state['random']))  # last: nothing after it may draw


_COUNTERS = 'train_iter pct_train smooth_loss final_record'.split()
_SMOOTH = 'smooth_loss.'  # the state of an object that the Recorder holds


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
            _module_of(module, name)._buffers[name.rpartition('.')[2]] = value.to(device)


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


# what callbacks, data, modules and losses keep


def not_copied(learn) -> tuple:
    "What a copy of the model refers to instead of copying, should the model refer to it."
    return learn, learn.dls, *learn.cbs


_KEPT = ('start_epoch',)  # when the Recorder's clock started
# what a loader makes anew for each pass, and its random generator, whose state is kept with the others
_OF_LOADERS = 'rng', *OF_PASS, *LEARNED


def plain_attributes(learn) -> dict:
    """Name -> attribute -> packed value of what is plain data in callbacks without a `state_dict`,
    under the names of `named_callbacks`, and in loaders, samplers, data sets, transforms, losses,
    modules and the objects of callbacks, under their paths.

    What cannot be packed is left out, or leaves a hole in the container that it is in.
    """
    params = [p for group in learn.opt.param_lists for p in group]
    tensors = (*_tensors(unwrap(learn.model)).values(), *params, *(p.grad for p in params if p.grad is not None))
    own = {t.data_ptr() for t in tensors} - {0}
    res, found = {}, list(_holders(learn))
    held = {id(o) for _, o in found}
    holes = []
    for path, o in found:
        attrs = _packed_attributes(path, o, own, holes)
        if attrs or isinstance(o, Callback):
            res[path] = attrs
    _name_unkept(learn, [(path, owner, v) for path, owner, v in holes if id(v) not in held])
    return res


def _holders(learn):
    """(path, object) for all whose attributes are kept; no callback with a state of its own, nor
    what it holds.
    """
    for path, o in walk(*below(learn, keeps_state), _is_the_programs):
        if path != 'dls' and type(o) is not L and not is_record(o):
            yield path, o


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


def _is_the_programs(path, o) -> bool:
    """Functions of callbacks, as the logger of a table, and what the Recorder measures with are
    made anew.
    """
    if path.startswith('fastai.learner.Recorder.0.'):
        return True
    return isinstance(o, FunctionType | MethodType | partial) and path.split('.')[0] not in ('loaders', 'model', 'loss')


def _packed_attributes(path, o, own, holes) -> dict:
    """Attribute -> packed value for the object `o`; (path, owner, value) of what cannot be packed
    is added to `holes`.
    """
    missed, res = [], {}
    packer = Packer(refused=own, keep_devices=True, holes=missed)
    n_leaves, n_bytes = MAX_LEAVES, MAX_BYTES
    for k, v in attributes(o):
        k = str(k)
        if k in _OF_LOADERS or isinstance(o, Callback) and k in ('learn', *_KEPT):
            continue
        if _has_a_path(v):
            holes.append((f'{path}.{k}', o, v))
            continue
        if not isinstance(o, Callback) and isinstance(v, _SIZED):
            if (size := nested(v, n_leaves, n_bytes)) is None:
                continue
            n_leaves, n_bytes = n_leaves - size[2], n_bytes - size[3]
        packer.lenient = isinstance(o, Recorder) and k in ('values', 'log')  # a metric may give anything
        packed = packer(v, f'{path}.{k}')
        if not _is_hole(packed):
            res[k] = packed
    if isinstance(o, Recorder):
        res[_SMOOTH] = pack((o.smooth_loss.count, o.smooth_loss.val))
    holes.extend((where, o, v) for where, v in missed)
    return res


_SIZED = (*CONTAINERS, torch.Tensor, np.ndarray, L)


def _has_a_path(v) -> bool:
    "Is the value of an attribute walked by itself?"
    return can_hold(v) and type(v) is not L and not is_record(v)


def _is_hole(packed) -> bool:
    return type(packed) is tuple and packed[0] == 'hole'


def _is_plain(v) -> bool:
    "Can the value of an attribute be kept with it?"
    return not _has_a_path(v) and not _is_hole(Packer(keep_devices=True, holes=[])(v))


def _without_unchanged(packed, unchanged, names) -> tuple[dict, dict]:
    "What of `packed` is not in `unchanged`: that of callbacks, and the rest."
    callbacks, held = {}, {}
    for key, attrs in packed.items():
        same = unchanged.get(key, {})
        changed = {k: v for k, v in attrs.items() if not (k in same and equal(v, same[k]))}
        if key in names:
            callbacks[key] = changed
        elif changed:
            held[key] = changed
    return callbacks, held


def _put_attributes(learn, state, unchanged):
    "Put packed attributes back into the objects that have the same paths."
    found = dict(_holders(learn))
    tensors = _tensors(unwrap(learn.model)).values()
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    unpacker = Unpacker(storages, {class_name(type(o)): type(o) for o in found.values()})
    for path in {**unchanged, **state}:
        o = found.get(path)
        attrs = {**unchanged.get(path, {}), **state.get(path, {})}
        if o is None:
            if path in state and attrs:
                name_once(
                    learn,
                    path,
                    f'{readable(path)} is not there any more, or not yet: its state in the checkpoint is left out',
                )
            continue
        now = {str(k): v for k, v in attributes(o)}
        for k, v in attrs.items():
            # None before the fit, an object within it: as the autocast of a MixedPrecision
            if k not in state.get(path, {}) and k in now and not _is_plain(now[k]):
                continue
            if k == _SMOOTH:
                o.smooth_loss.count, o.smooth_loss.val = unpack(v)
            elif not k.startswith(_SMOOTH):
                value = unpacker(v, now[k], f'{path}.{k}') if k in now else unpacker(v, what=f'{path}.{k}')
                try:
                    if k not in now or value is not now[k]:
                        set_attribute(o, k, value)
                except TypeError:
                    unpacker.missing.append(f'{path}.{k}')
    for where in unpacker.missing:
        name_once(
            learn,
            where,
            f'{readable(where)} cannot be put back from the checkpoint: there is nothing of its class in its place, '
            'and it is no dataclass, named tuple or enum of a module',
        )


# learner -> path -> what identifies the object there that no checkpoint can hold
_holes = weakref.WeakKeyDictionary()


def _name_unkept(learn, holes):
    """Warn of what cannot be kept and has changed. (What stays the same belongs to the call: the
    next run makes it anew.)
    """
    known = _holes.setdefault(learn, {})
    for path, owner, v in holes:
        sign = id(v), len(v) if isinstance(v, CONTAINERS) else None
        changed = known.setdefault(path, sign) != sign
        if type(owner).__module__.split('.')[0] in _LIBRARIES or not (changed or is_used_up(v)):
            continue
        name_once(
            learn,
            f'kept {path}',
            f'{readable(path)} is a {type(v).__qualname__}, which a checkpoint cannot hold: a fit that is killed and '
            'goes on has the one that the new run makes',
        )


# their callbacks and objects know what they hold
_LIBRARIES = 'fastai', 'fastcore', 'torch', 'torchvision', __name__.split('.')[0]
