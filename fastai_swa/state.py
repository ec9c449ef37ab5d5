"""The whole state of a fit as plain data: taken from a learner between two epochs, put back into that or another one."""
import random, warnings
from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial
from pathlib import Path
from types import CellType, FunctionType, MethodType, ModuleType

import numpy as np
import pandas as pd
import torch
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from fastai.optimizer import Optimizer
from fastai.torch_core import get_random_states, set_random_states
from fastcore.foundation import L
from fastcore.xtras import ReindexCollection
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader

from .modules import named_tensors, plain_name, unwrap

__all__ = ['take', 'restore', 'plain_attributes', 'not_copied', 'named_callbacks', 'keeps_state', 'generators', 'own_generators',
           'seed_generators', 'loaders', 'owned_modules', 'pack', 'unpack']


def take(learn: Learner, unchanged: dict | None = None) -> dict:
    """The state of `learn` before an epoch of a fit, as numbers, strings, tensors on the CPU, and lists, tuples and dicts of these.

    It holds copies of the weights, buffers and gradients, the optimizer with its hyperparameters, the gradient scaler, all random
    generators (of Python, NumPy, torch, each GPU, and those found in loaders, callbacks, model and loss), the counters of the learner
    and what callbacks keep: their `state_dict()` if they have one, else their attributes that are plain data, but for tensors of the
    model. `torch.save` writes it and `torch.load(weights_only=True)` reads it.

    - `unchanged`: an earlier `plain_attributes(learn)`; attributes of callbacks that still equal it are settings, and left out.

    Raises `TypeError`, naming it, if the optimizer keeps something that is not plain data.
    """
    pack = _Packer()
    model, opt = unwrap(learn.model), learn.opt
    own = {id(p) for p in model.parameters()}
    params = [p for group in opt.param_lists for p in group]
    callbacks, unchanged = plain_attributes(learn), unchanged or {}
    for key, attrs in callbacks.items():
        same = unchanged.get(key, {})
        callbacks[key] = {k: v for k, v in attrs.items() if not (k in same and _equal(v, same[k]))}
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
        'random': pack(_random_states(learn)),
        'learner': _Packer(lenient=True)({k: vars(learn)[k] for k in _COUNTERS if k in vars(learn)}),
        'callbacks': callbacks,
        'states': {key: pack(cb.state_dict(), key) for key, cb in named_callbacks(learn) if keeps_state(cb)},
    }


def restore(learn: Learner, state: dict):
    """Put a state of `take` into `learn`, which is before an epoch of a fit; what follows is bitwise what would have followed there.

    Raises `ValueError`, naming the tensors and before anything changes, if the model or the optimizer is another one. Callbacks
    that the state knows nothing of stay as they are; a random generator that is not found any more is named in a warning.
    """
    model, opt = unwrap(learn.model), learn.opt
    weights, params = unpack(state['model']), [p for group in opt.param_lists for p in group]
    check_tensors(model, weights)
    own = {id(p) for p in model.parameters()}
    masters = [p for p in params if id(p) not in own]
    if len(masters) != len(state['masters']) or len(state['gradients']) != len(params):
        raise ValueError('the optimizer has other parameters than the one of the state')
    with torch.no_grad():
        _set_tensors(model, weights)
        for m, tensors in zip(owned_modules(learn.loss_func), unpack(state['losses'])): _set_tensors(m, tensors)
        for p, value in zip(masters, unpack(state['masters'])): p.copy_(value)
        for p, value in zip(params, unpack(state['gradients'])): p.grad = _gradient(p, value)
    if state['extra']: model.load_state_dict(unpack(state['extra']), strict=False)
    for p, flag in zip(model.parameters(), state['requires_grad']): p.requires_grad_(flag)
    _load_optimizer(opt, unpack(state['optimizer']), params)
    opt.frozen_idx = state['frozen_idx']
    if state['scaler'] and getattr(learn, 'scaler', None) is not None: learn.scaler.load_state_dict(unpack(state['scaler']))
    for k, v in state['learner'].items(): setattr(learn, k, unpack(v))
    for key, cb in named_callbacks(learn):
        if keeps_state(cb) and key in state['states']: cb.load_state_dict(unpack(state['states'][key]))
        vars(cb).update({k: unpack(v) for k, v in state['callbacks'].get(key, {}).items() if not k.startswith(_SMOOTH)})
        if isinstance(cb, Recorder) and _SMOOTH in state['callbacks'].get(key, {}):
            cb.smooth_loss.count, cb.smooth_loss.val = unpack(state['callbacks'][key][_SMOOTH])
    _set_random_states(learn, unpack(state['random']))    # last: nothing after it may draw


_COUNTERS = 'train_iter pct_train smooth_loss final_record'.split()
_SMOOTH = 'smooth_loss.'    # the state of an object that the Recorder holds


# models and optimizers

def _tensors(module) -> dict:
    "Plain name -> parameter or buffer, those that the module's own state dict leaves out as well."
    return {**named_tensors(module.named_parameters), **named_tensors(module.named_buffers)}

def _extra_state(module):
    return {plain_name(k): v for k, v in module.state_dict().items() if k.endswith('_extra_state') and not isinstance(v, torch.Tensor)}


def check_tensors(model, tensors: dict):
    "Raise `ValueError`, naming them, unless `model` has parameters of the names and shapes of those in `tensors`."
    own = named_tensors(model.named_parameters)
    def kind(t): return f'{tuple(t.shape)} {str(t.dtype).removeprefix("torch.")}'
    faults = [f'{name!r} is {kind(p)}, {kind(tensors[name])} in the state' if name in tensors else f'{name!r} is not in the state'
              for name, p in own.items() if name not in tensors or kind(tensors[name]) != kind(p)]
    buffers = named_tensors(model.named_buffers)
    faults += [f'{name!r} is in the state only' for name in tensors.keys() - own.keys() - buffers.keys()
               if not _module_of(model, name) or tensors[name].requires_grad]
    if faults: raise ValueError('the model is another one: ' + '; '.join(faults[:3]) + (f'; and {len(faults) - 3} more' if len(faults) > 3 else ''))


def _module_of(model, name):
    try: return model.get_submodule(name.rpartition('.')[0])
    except AttributeError: return None


def _set_tensors(module, tensors):
    own = _tensors(module)
    for name, value in tensors.items():
        t = own.get(name)
        if t is not None and t.shape == value.shape and t.dtype == value.dtype: t.copy_(value)
        else:    # a buffer that came, or changed, since the module was made
            device = next((p.device for p in module.parameters()), value.device)
            _module_of(module, name)._buffers[name.rpartition('.')[2]] = value.to(device)


def _gradients(params) -> list:
    "For each parameter its gradient, or whether it has one: between epochs they are zero, but where gradients accumulate."
    grads = [None if p.grad is None or p.grad.is_sparse else p.grad.detach() for p in params]
    dense = [g for g in grads if g is not None]
    accumulated = dense and torch.stack([n.to(dense[0].device, torch.float32) for n in torch._foreach_norm(dense, float('inf'))]).ne(0).any()
    return [False if g is None else g if accumulated else True for g in grads]

def _gradient(p, value):
    if isinstance(value, torch.Tensor): return value.to(p.device)
    return torch.zeros_like(p) if value else None


def _load_optimizer(opt, state, params):
    own = opt.opt if hasattr(opt, 'slow_weights') else opt    # Lookahead's own weights beside the optimizer inside it
    if isinstance(own, Optimizer):
        state['hypers'] = L(state['hypers'])
        for p, s in zip(params, state['state']): s.update({k: v.to(p.device) for k, v in s.items() if isinstance(v, torch.Tensor)})
        if state.get('slow_weights'):
            state['slow_weights'] = L(L(w.to(p.device) for w, p in zip(ws, ps)) for ws, ps in zip(state['slow_weights'], opt.param_lists))
    opt.load_state_dict(state)
    if isinstance(own, Optimizer): own.state = defaultdict(dict, own.state)    # fastai leaves a plain dict, which knows no new parameter


def owned_modules(owner) -> list:
    "`owner` if it is a module, else those that it holds as attributes, as fastai's losses do."
    held = [unwrap(owner)] if isinstance(owner, nn.Module) else getattr(owner, '__dict__', {}).values()
    return [m for m in held if isinstance(m, nn.Module)]


# callbacks

def not_copied(learn) -> tuple:
    "What a copy of the model refers to instead of copying, should the model refer to it."
    return learn, learn.dls, *learn.cbs


def named_callbacks(learn):
    "(name, callback) pairs; callbacks of one class are counted."
    seen = {}
    for cb in learn.cbs:
        cls = f'{type(cb).__module__}.{type(cb).__qualname__}'
        seen[cls] = seen.get(cls, -1) + 1
        yield f'{cls}.{getattr(cb, "key", seen[cls])}', cb    # an average is known by its name

def keeps_state(cb): return hasattr(type(cb), 'state_dict') and hasattr(type(cb), 'load_state_dict')


def plain_attributes(learn) -> dict:
    "Name -> attribute -> packed value of what the callbacks of `learn` without a `state_dict` keep as plain data."
    params = [p for group in learn.opt.param_lists for p in group]
    own = {t.data_ptr() for t in (*_tensors(unwrap(learn.model)).values(), *params, *(p.grad for p in params if p.grad is not None))}
    pack, res = _Packer(refused=own - {0}, keep_devices=True), {}
    for key, cb in named_callbacks(learn):
        if keeps_state(cb): continue
        attrs = res[key] = {}
        for k, v in vars(cb).items():
            if k == 'learn' or k in _KEPT: continue
            pack.lenient = isinstance(cb, Recorder) and k in ('values', 'log')    # a metric may give anything
            try: attrs[k] = pack(v)
            except (TypeError, RecursionError): pass    # a function, a file, a module, a progress bar: belongs to the process, not to the fit
        if isinstance(cb, Recorder): attrs[_SMOOTH] = pack((cb.smooth_loss.count, cb.smooth_loss.val))
    return res

_KEPT = 'start_epoch',    # when the Recorder's clock started


# random generators

def _random_states(learn) -> dict:
    libraries = {k: v for k, v in get_random_states().items() if k in _LIBRARIES}    # not the settings of cuDNN
    return {'libraries': libraries, 'own': {path: get() for path, get, _ in own_generators(learn)}}

_LIBRARIES = 'random_state', 'numpy_state', 'torch_state', 'torch_cuda_state'


def _set_random_states(learn, states):
    now, libraries, kept = get_random_states(), states['libraries'], states['own']
    if len(libraries['torch_cuda_state']) != len(now['torch_cuda_state']): del libraries['torch_cuda_state']    # another machine
    set_random_states(**{**now, **libraries})
    for path, _, put in own_generators(learn):
        if path in kept: put(kept.pop(path))
    if kept: warnings.warn(f'random generators are not there any more, or not yet: {", ".join(sorted(kept)[:3])}')


def own_generators(learn):
    "What `generators` finds in the loaders, callbacks, model and loss of `learn`."
    seen = set()
    for i, dl in enumerate(loaders(learn)): yield from generators(dl, f'loaders.{i}', seen)
    # callbacks come last: one may refer to the model, and a progress bar to the loader that it went through last
    others = [(name, cb) for name, cb in named_callbacks(learn) if not keeps_state(cb)]
    for name, root in (('model', unwrap(learn.model)), ('loss', learn.loss_func), *others):
        yield from generators(root, name, seen, but=(DataLoader, TorchDataLoader))


def seed_generators(learn, seed: int):
    "Begin all random generators that `own_generators` finds with `seed`."
    for _, _, put in own_generators(learn):
        o = put.args[0] if isinstance(put, partial) else getattr(put, '__self__', None)
        if isinstance(o, torch.Generator): o.manual_seed(seed)
        elif isinstance(o, random.Random | np.random.RandomState): o.seed(seed)
        elif isinstance(o, np.random.BitGenerator): o.state = type(o)(seed).state


def loaders(learn) -> list:
    "The loaders of `learn`, also where its `dls` is no `DataLoaders` but an object with `train` and `valid`."
    return getattr(learn.dls, 'loaders', None) or [dl for name in ('train', 'valid') if (dl := getattr(learn.dls, name, None)) is not None]


def generators(root, name='', seen=None, but=()):
    """(path, getter, setter of the state) for each random generator, and each order shuffled in place, that `root` holds: a loader, with
    its samplers, its data set and their transforms; a callback; a module. Objects whose ids are in `seen`, or of the types `but`, are passed by."""
    seen, stack = set() if seen is None else seen, [(name, root)]
    def push(path, items): stack.extend((f'{path}.{k}', v) for k, v in items if type(v) not in _NO_HOLDERS)
    while stack:
        path, o = stack.pop()
        if id(o) in seen or isinstance(o, but): continue
        seen.add(id(o))
        if isinstance(o, torch.Generator): yield path, o.get_state, o.set_state
        elif isinstance(o, random.Random): yield path, o.getstate, o.setstate
        elif isinstance(o, np.random.Generator): yield path, partial(getattr, o.bit_generator, 'state'), partial(setattr, o.bit_generator, 'state')
        elif isinstance(o, np.random.RandomState): yield path, o.get_state, o.set_state
        elif isinstance(o, ReindexCollection): yield path, partial(list, o.idxs), partial(_reorder, o)
        elif type(o) in (list, tuple, dict):    # not a subclass: to iterate a data set is to run its transforms
            if len(o) <= 100: push(path, o.items() if type(o) is dict else enumerate(o))    # transforms and the like, not samples
        elif isinstance(o, nn.Module):
            push(path, ((k, v) for k, v in vars(o).items() if k not in _MODULES_OWN))
            push(path, o._modules.items())
        elif isinstance(o, FunctionType):
            push(path, enumerate(c.cell_contents for c in o.__closure__ or () if c != CellType()))
            push(path, [('defaults', o.__defaults__)])
        elif isinstance(o, MethodType): push(path, [('self', o.__self__), ('func', o.__func__)])
        elif isinstance(o, partial): push(path, [('func', o.func), ('args', o.args), ('keywords', o.keywords)])
        elif not isinstance(o, torch.Tensor | np.ndarray | pd.DataFrame | pd.Series | type | ModuleType | Learner):
            push(path, getattr(o, '__dict__', {}).items())

_NO_HOLDERS = {type(None), bool, int, float, str, bytes, torch.Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device}
_MODULES_OWN = set(vars(nn.Module()))    # parameters, buffers, submodules, hooks, flags


def _reorder(o, idxs): o.idxs[:] = idxs    # in place: a language model's loader shares it between its texts and their lengths


# plain data

class _Packer:
    """Turns objects into what `torch.load(weights_only=True)` reads: numbers, strings, tensors, lists and dicts as they are, all
    else as a tuple of a tag and its content. Tensors become copies on the CPU, one for all that are the same."""
    def __init__(self, refused=(), keep_devices=False, lenient=False):
        self.copies = {}
        self.refused, self.keep_devices = refused, keep_devices    # data pointers; whether tensors go back to the devices they are on
        self.lenient = lenient    # strings for what is not plain data

    def __call__(self, o, what='it'):
        if o is None or type(o) in (bool, int, float, str): return o
        if type(o) is bytes: return 'bytes', torch.from_numpy(np.frombuffer(o, np.uint8).copy())
        if isinstance(o, torch.Tensor):
            copy = self._tensor(o)
            return ('on', [str(o.device), copy]) if self.keep_devices and o.device.type != 'cpu' else copy
        if type(o) is dict or type(o) is defaultdict: return {self._key(k): self(v, what) for k, v in o.items()}
        if type(o) in (list, L):
            if len(o) > 1 and all(isinstance(v, torch.Tensor) and v.dim() == 0 for v in o) and len({(v.dtype, v.device) for v in o}) == 1:
                packed = 'scalars', torch.stack([v.detach().as_subclass(torch.Tensor) for v in o]).cpu()    # the losses of all steps
            elif len(o) > 1 and all(isinstance(v, np.generic) for v in o) and len({v.dtype for v in o}) == 1:
                packed = 'numbers', self(np.array(list(o)), what)
            else: packed = [self(v, what) for v in o]
            return packed if type(o) is list else ('L', packed)
        if type(o) is tuple: return 'tuple', [self(v, what) for v in o]
        if isinstance(o, np.ndarray | np.generic) and o.dtype.kind in 'biufc':
            return 'array' if isinstance(o, np.ndarray) else 'number', torch.from_numpy(np.array(o))
        if isinstance(o, Path): return 'path', str(o)
        if isinstance(o, torch.Size): return 'size', list(o)
        if type(o) is deque: return 'deque', [[self(v, what) for v in o], o.maxlen]
        if type(o) in (set, frozenset): return type(o).__name__, [self(v, what) for v in o]
        if type(o) in (OrderedDict, Counter): return type(o).__name__, [[self(k, what), self(v, what)] for k, v in o.items()]
        if type(o) is range: return 'range', [o.start, o.stop, o.step]
        if self.lenient: return str(o)
        raise TypeError(f'{what} keeps a {type(o).__module__}.{type(o).__qualname__}, which a checkpoint cannot hold')

    def _key(self, k):
        if k is None or type(k) in (bool, int, float, str): return k
        raise TypeError(f'a dict has the key {k!r}, which a checkpoint cannot hold')

    def _tensor(self, t):
        if id(t) not in self.copies:    # the tensor is kept beside its copy, so that its id stays taken
            if t.data_ptr() in self.refused: raise TypeError('a tensor of the model cannot be in a checkpoint on its own')
            if t.is_sparse or t.is_quantized or t.is_meta or isinstance(t, nn.parameter.UninitializedTensorMixin):
                raise TypeError(f'a {t.layout} tensor cannot be in a checkpoint')
            plain = t.detach().as_subclass(torch.Tensor)
            self.copies[id(t)] = t, plain.cpu() if plain.device.type != 'cpu' else plain.clone()
        return self.copies[id(t)][1]


def pack(o):
    "A copy of `o` as plain data; raises `TypeError` where it holds something else."
    return _Packer()(o)


def unpack(o):
    "What a `_Packer` packed; tensors are copies, so that nothing that is done to the result reaches `o`."
    if isinstance(o, torch.Tensor): return o.clone()
    if type(o) is dict: return {k: unpack(v) for k, v in o.items()}
    if type(o) is list: return [unpack(v) for v in o]
    if type(o) is not tuple: return o
    tag, v = o
    if tag == 'scalars': return list(v.clone().unbind())
    if tag == 'numbers': return list(unpack(v))
    if tag == 'L': return L(unpack(v))
    if tag == 'tuple': return tuple(unpack(v))
    if tag == 'array': return v.clone().numpy()
    if tag == 'number': return v.numpy()[()]
    if tag == 'bytes': return v.numpy().tobytes()
    if tag == 'path': return Path(v)
    if tag == 'size': return torch.Size(v)
    if tag == 'on': return v[1].to(v[0]) if torch.device(v[0]).type != 'cuda' or torch.cuda.is_available() else v[1].clone()
    if tag == 'deque': return deque(unpack(v[0]), v[1])
    if tag in ('set', 'frozenset'): return (set if tag == 'set' else frozenset)(unpack(v))
    if tag in ('OrderedDict', 'Counter'): return (OrderedDict if tag == 'OrderedDict' else Counter)({unpack(k): unpack(x) for k, x in v})
    if tag == 'range': return range(*v)
    raise ValueError(f'unknown kind of data: {tag!r}')


def _equal(a, b) -> bool:
    "Are two packed values the same?"
    if type(a) is not type(b): return False
    if isinstance(a, torch.Tensor): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(_equal(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple): return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
