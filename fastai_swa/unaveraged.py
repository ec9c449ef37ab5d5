"""What an average leaves out: weights that are not finite, and what training changes beside the weights, which are
parameters of a loss and buffers that act as weights. Plain PyTorch."""

import inspect
import math
from functools import partial
from types import FunctionType, MethodType, ModuleType

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from .batchnorm import INTEGERS, statistics
from .checks import listed
from .modules import unwrap

__all__ = [
    'infinite_sentence',
    'loss_parameters',
    'loss_sentence',
    'weightlike_buffers',
    'buffers_sentence',
    'beside_weights',
    'sentences_on_moved',
    'SampleWatch',
]


def infinite_sentence(epoch: int, by_steps: bool) -> str:
    where = 'in' if by_steps else 'at the end of'
    return f'the weights {where} epoch {epoch} are not finite; such epochs are left out of the average'


def loss_parameters(loss_func, model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter with gradients that `loss_func` has and `model` has not.

    `loss_func` is a module, a method of one, or anything that holds or names modules: an object, as
    fastai's losses are, with its lists and dicts, a partial, or a function with its variables.
    """
    of_model = {id(p) for p in model.parameters()}
    res = {}
    for path, root in _modules_in(loss_func, '', _DEPTH, set()):
        if root is model:
            continue
        for name, p in root.named_parameters(path):
            if p.requires_grad and id(p) not in of_model:
                res[name] = p
    return res


_DEPTH = 4  # as a function that names an object with a list of modules
_MANY = 100  # elements of a list, which is then no list of modules


def _modules_in(o, path: str, depth: int, seen: set):
    "(path, module) for the outermost modules that `o` is or holds; each once."
    if id(o) in seen:
        return
    seen.add(id(o))
    if isinstance(o, nn.Module):
        yield path, o
    elif depth:
        for name, part in _parts(o).items():
            yield from _modules_in(part, '.'.join(filter(None, (path, str(name)))), depth - 1, seen)


def _parts(o) -> dict:
    "Name -> what `o` holds; the owner of a method, and what a partial calls, have the name of that."
    if isinstance(o, MethodType):
        return {'': o.__self__}
    if isinstance(o, partial):
        return {'': o.func, **dict(enumerate(o.args)), **o.keywords}
    if isinstance(o, FunctionType):
        return _variables(o)
    if isinstance(o, dict | list | tuple):
        named = o if isinstance(o, dict) else dict(enumerate(o))
        return named if len(o) <= _MANY else {}
    if isinstance(o, type | ModuleType):
        return {}
    return {name: v for name, v in getattr(o, '__dict__', {}).items() if isinstance(v, _LOSSES)}


# what an object that is a loss may be made of; other objects in it, as the callbacks of a learner, are not looked into
_LOSSES = nn.Module, dict, list, tuple, partial, FunctionType, MethodType


def _variables(function) -> dict:
    "Name -> value of the variables of others that `function` names: those around it, and global ones."
    try:
        found = inspect.getclosurevars(function)
    except ValueError:  # one of them has no value yet
        return {}
    return {**found.globals, **found.nonlocals}


def loss_sentence(what: str, names: list[str]) -> str:
    return (
        f'{what} leaves out what is trained in the loss: {listed(names, 5)}; its columns are computed with the loss in '
        'training. Make it a part of the model, or average it by a WeightAverage of your own'
    )


# observers and scales of quantisation; vectors of spectral norm. They follow the weights, and are no weights
_FOLLOW = 'torch.ao.', 'torchao.', 'torch.nn.utils.'


def weightlike_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer for those of `model` that may act as weights, as a codebook does, should training
    move them: floating-point ones of several elements that are neither statistics of a normalising
    layer nor PyTorch's own.
    """
    res = {}
    for path, m in unwrap(model).named_modules():
        if statistics(m) or type(m).__module__.startswith(_FOLLOW):
            continue
        hooks = [hook for hook in m._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
        of_hooks = {f'{hook.name}_{vector}' for hook in hooks for vector in 'uv'}
        for name, b in m._buffers.items():
            if b is not None and name not in of_hooks and b.is_floating_point() and _is_comparable(b):
                res[f'{path}.{name}' if path else name] = b
    return res


def buffers_sentence(what: str, names: list[str]) -> str:
    return (
        f'{what} leaves out buffers that training moves: {listed(names, 5)}; swa_model has those of the latest '
        'weights. Where they act as weights, as a codebook does, hold them as parameters with requires_grad=False, '
        'which are averaged, or average them by a WeightAverage of your own'
    )


def _is_comparable(t) -> bool:
    return t.layout is torch.strided and t.numel() > 1 and not t.is_meta


# both, where only training tells what it moves


def beside_weights(model: nn.Module, loss_func) -> dict[tuple, torch.Tensor]:
    "(kind, name) -> tensor that training may move beside the weights; `loss_func`: `None` to leave that out."
    res = {('buffers', name): b for name, b in weightlike_buffers(model).items()}
    if loss_func is not None:
        res |= {('loss', name): p for name, p in loss_parameters(loss_func, model).items()}
    return res


def sentences_on_moved(what: str, moved: list[tuple]) -> dict[str, str]:
    "Kind -> sentence on what training has `moved`, as `beside_weights` names it."
    res = {}
    for kind, sentence in {'buffers': buffers_sentence, 'loss': loss_sentence}.items():
        names = [name for of_kind, name in moved if of_kind == kind]
        if names:
            res[kind] = sentence(what, names)
    return res


_N_SAMPLED = 4096  # elements of a tensor: all that is kept, since a codebook can be large


class SampleWatch:
    """Which of some tensors, key -> tensor, training moves: told by the bits of at most 4,096 elements
    of each, evenly spread. Making one reads nothing from the device."""

    def __init__(self, tensors: dict):
        self._before = {key: _sample(t) for key, t in tensors.items()}

    def moved(self, tensors: dict) -> list:
        """The keys of those in `tensors`, as they are now, whose bits differ. One that was not there, or had
        another shape, dtype or device, is another tensor, and does not count. One read from each device."""
        asked = {}  # device -> keys
        differ = {}  # device -> for each of these whether it differs
        for key, t in tensors.items():
            now, before = _sample(t), self._before.get(key)
            if before is not None and _kind(now) == _kind(before):
                asked.setdefault(now.device, []).append(key)
                differ.setdefault(now.device, []).append((now != before).any())
        res = set()
        for device, keys in asked.items():
            answers = torch.stack(differ[device]).tolist()
            res.update(key for key, answer in zip(keys, answers) if answer)
        return [key for key in tensors if key in res]


def _kind(t):
    return t.shape, t.dtype, t.device


def _sample(t):
    flat = t.detach().flatten()
    step = max(1, math.ceil(flat.numel() / _N_SAMPLED))
    return flat[::step].clone().view(INTEGERS[t.dtype.itemsize])
