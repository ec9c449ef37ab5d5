"""What lies under a wrapper, a clean copy of it, and models whose modes move weights. Plain PyTorch."""
import copy, functools, gc, types
from collections import OrderedDict, deque
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .interrupts import uninterrupted, unwound_whole

__all__ = ['unwrap', 'plain_name', 'named_tensors', 'clean_copy', 'check_copyable', 'moves_weights', 'in_train_mode', 'written_in_train_mode']


def unwrap(model: nn.Module) -> nn.Module:
    "The module inside `DataParallel`, `DistributedDataParallel` and `torch.compile`; any other module is returned as it is."
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)): model = model.module
        elif _is_compiled(model): model = model._orig_mod
        else: return model


def _is_compiled(module): return type(module).__name__ == 'OptimizedModule'    # torch._dynamo's, which is slow to import


def plain_name(name: str) -> str:
    "`name` of a parameter or module as it reads without `torch.compile`."
    return name.replace('_orig_mod.', '')


def named_tensors(named) -> dict[str, torch.Tensor]:
    "Plain name -> tensor for `named`, a model's `named_parameters` or `named_buffers`; tied tensors appear under each of their names."
    return {plain_name(name): tensor for name, tensor in named(remove_duplicate=False)}


def clean_copy(model: nn.Module, shared=()) -> nn.Module:
    """A copy of `model` that shares no tensor with it and carries nothing foreign along.

    The copy has the model's modes, ties and memory formats, and neither wrappers (`unwrap`), nor compiled code, nor gradients.
    Hooks that belong to the model stay, as copies: those of `torch.nn.utils`, and those whose function or object the model's
    modules hold as an attribute (how a U-Net gets at its encoder's features). All other hooks are left out, so that what they
    point to (a callback, its `Learner`, its data) is never copied. `shared`: objects that the copy refers to instead of copying.

    Raises `ValueError` for a lazy module that has not seen a batch yet, and for a model that holds something that cannot be copied.
    """
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(t, nn.parameter.UninitializedTensorMixin):
            raise ValueError(f'cannot copy the model: {name!r} belongs to a lazy module that has not seen a batch yet; '
                             'run one batch through the model first')
    return _one_chunk(_copy(model, shared, _copy_tensor))


def check_copyable(model: nn.Module, shared=()):
    "Raise `ValueError` if `clean_copy` could not copy `model` for what it holds besides tensors. No tensor is copied."
    _copy(model, shared, lambda tensor, is_attribute: tensor)


def _copy(model, shared, copy_tensor):
    model = unwrap(model)
    hooks = [[vars(m)[k] for k in _HOOK_DICTS if k in vars(m)] for m in model.modules()]
    held = _reachable(model, stop=[*(d for dicts in hooks for d in dicts), *shared])
    attributes = {id(o) for m in model.modules() for d in (vars(m), m._parameters, m._buffers) for o in d.values()}
    # deepcopy consults `memo` first: what stands in it is taken, not copied
    memo = {id(o): o for o in shared}
    memo |= {id(d): OrderedDict() for dicts in hooks for d in dicts}
    memo |= {id(o): copy_tensor(o, id(o) in attributes) for o in held.values() if isinstance(o, torch.Tensor)}
    try:
        for m in reversed(list(model.modules())):    # the innermost first
            if _is_compiled(m): memo[id(m)] = copy.deepcopy(unwrap(m), memo)
        res = copy.deepcopy(model, memo)
        for dicts in hooks:
            kept = {number for d in dicts for number, hook in d.items() if hook is not True and _belongs(hook, held)}
            for d in dicts: memo[id(d)].update({k: copy.deepcopy(hook, memo) for k, hook in d.items() if k in kept})
    except Exception as e: raise ValueError(f'cannot copy the model ({e}); pass a swa_model of your own') from e
    return res


def _one_chunk(model):
    "Lay the weights of each recurrent layer out in one piece again, which cuDNN asks for; no effect on other devices."
    for m in model.modules():
        if isinstance(m, nn.RNNBase): m.flatten_parameters()
    return model


_HOOK_DICTS = [name for name in vars(nn.Module()) if 'hooks' in name]    # hooks, and flags (True) under their hook's number
_ATOMIC = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, torch.Tensor, torch.Generator)

def _reachable(root, stop) -> dict:
    "id -> object for all that a deepcopy of `root` would meet without passing through an object in `stop`."
    seen, stopped, stack = {}, {id(o) for o in stop}, [root]
    while stack:
        o = stack.pop()
        if id(o) in seen or id(o) in stopped: continue
        seen[id(o)] = o
        if not isinstance(o, _ATOMIC): stack.extend(gc.get_referents(o))
    return seen


def _belongs(hook, held) -> bool:
    "Is `hook` PyTorch's own (weight_norm, spectral_norm, pruning), or does the model hold it, or the object whose method it is?"
    if type(hook).__name__ == '_WrappedHook': hook = hook.hook           # how load_state_dict's hooks are kept
    while isinstance(hook, functools.partial): hook = hook.func
    return (getattr(hook, '__module__', None) or '').startswith('torch.nn.utils.') or id(getattr(hook, '__self__', hook)) in held


def _copy_tensor(t, is_attribute):
    if t.grad_fn is None and type(t) not in (torch.Tensor, nn.Parameter):
        res = copy.deepcopy(t)
        res.grad = None
        return res
    if t.grad_fn is not None and not is_attribute: return None           # an activation that a training forward left in a hook
    res = t.detach().clone()                                             # deepcopy takes gradients along and refuses non-leaves
    return nn.Parameter(res, t.requires_grad) if isinstance(t, nn.Parameter) else res


# modes that move weights

def moves_weights(model: nn.Module) -> bool:
    """May `train()` and `eval()` do more to `model` than set modes, as where LoRA merges its update into the weights in `eval()`?

    So it is taken to be where the class of one of its modules, or the module itself, has a `train` or an `eval` of its own.
    """
    return any(map(has_own_modes, unwrap(model).modules()))


def has_own_modes(module: nn.Module) -> bool:
    "Does `module` itself have a `train` or an `eval` of its own?"
    cls = type(module)
    return cls.train is not nn.Module.train or cls.eval is not nn.Module.eval or not {'train', 'eval'}.isdisjoint(vars(module))


def away_from_training(model: nn.Module) -> list[nn.Module]:
    "The modules whose `eval()` may have moved weights: those with modes of their own that are not in train mode, the outer ones first."
    return [m for m in model.modules() if has_own_modes(m) and not m.training]


@contextmanager
def in_train_mode(model: nn.Module):
    """Within this context the weights of `model` can be *read* as training has them: not merged, where its `eval()` merges something into them.

    Afterwards all is bitwise as before, since it is put back and not moved back: `(w + d) - d` is not always `w`. The price is a copy of
    the tensors that could have moved. Where no weights move, or the model is in train mode, nothing is done. Modes of modules whose
    `train` is PyTorch's own stay as they are throughout.
    """
    model = unwrap(model)
    moved = away_from_training(model)
    if not moved:
        yield
        return
    with unwound_whole():
        kept = Kept(moved)
        try:
            to_train_form(model)
            yield
        finally:
            with uninterrupted():
                kept.put_back()


@contextmanager
def written_in_train_mode(model: nn.Module):
    """Within this context the weights of `model` can be *written* as training has them; afterwards the model is in the modes it was in.

    Both by real calls of `train` and `eval`, so that the new weights are merged where the modes ask for it. Where no weights move, or
    the model is in train mode, nothing is done.
    """
    model = unwrap(model)
    if not away_from_training(model):
        yield
        return
    with unwound_whole():
        modes = modes_of(model)
        try:
            to_train_form(model)
            yield
        finally:
            with uninterrupted():
                set_modes(model, modes)


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    "Module -> whether it is in train mode."
    return {m: m.training for m in model.modules()}


def to_train_form(model: nn.Module):
    "Put the modules of `model` that have modes of their own into train mode, by their `train()`; all others keep their modes."
    modes = modes_of(model)
    set_modes(model, {m: mode or has_own_modes(m) for m, mode in modes.items()})


def set_modes(model: nn.Module, modes: dict[nn.Module, bool]):
    """Give the modules of `model` the `modes`, by their own `train` and `eval` where they have such.

    As in PyTorch, `model.eval()` reaches the `eval` of `model` itself, and the `train` of the modules inside.
    """
    for m, mode in modes.items():
        if has_own_modes(m) and m.training != mode:
            if m is model and not mode:
                m.eval()
            else:
                m.train(mode)
    for m, mode in modes.items():
        m.training = mode


class Kept:
    """What `train()` and `eval()` of `modules` can change in them and in their submodules: to be put back bitwise, without calling these.

    That is which tensors, submodules and other attributes they have, what is in tensors, and what is in their lists, dicts and sets.
    """
    def __init__(self, modules):
        inner = dict.fromkeys(m for outer in modules for m in outer.modules())    # each once
        self.containers = []    # (container, shallow copy)
        self.tensors = []    # (tensor, its data, copy of these)
        seen = set()
        for m in inner:
            self._keep(vars(m), seen)    # parameters, buffers and submodules are dicts among the attributes

    def _keep(self, value, seen):
        if id(value) in seen:
            return
        if isinstance(value, torch.Tensor):
            seen.add(id(value))
            if value.grad_fn is None and not isinstance(value, nn.parameter.UninitializedTensorMixin):
                self.tensors.append((value, value.data, value.detach().clone()))
        elif type(value) in (*_CONTAINERS, tuple):
            seen.add(id(value))
            if type(value) is not tuple:
                self.containers.append((value, copy.copy(value)))
            for inner in value.values() if isinstance(value, dict) else value:
                self._keep(inner, seen)

    def put_back(self):
        "Put everything back as it was."
        for container, before in self.containers:
            container.clear()
            container.extend(before) if isinstance(container, list | deque) else container.update(before)
        for tensor, data, bits in self.tensors:
            tensor.data = data
            data.copy_(bits)


_CONTAINERS = (list, dict, set, deque, OrderedDict)
