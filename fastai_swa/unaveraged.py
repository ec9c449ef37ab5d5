"""What training changes beside the weights that an average holds: parameters of a loss, and buffers that act as
weights. Plain PyTorch."""

import math
from types import MethodType

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from .batchnorm import INTEGERS, statistics
from .checks import listed
from .modules import unwrap

__all__ = ['loss_parameters', 'loss_sentence', 'weightlike_buffers', 'buffers_sentence', 'SampleWatch']


def loss_parameters(loss_func, model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter with gradients that `loss_func` has and `model` has not.

    `loss_func` is a module, a method of one, or an object with modules in its attributes, as
    fastai's losses are.
    """
    owner = loss_func.__self__ if isinstance(loss_func, MethodType) else loss_func
    roots = {'': owner} if isinstance(owner, nn.Module) else getattr(owner, '__dict__', {})
    of_model = {id(p) for p in model.parameters()}
    res = {}
    for path, root in roots.items():
        if not isinstance(root, nn.Module) or root is model:
            continue
        for name, p in root.named_parameters(path):
            if p.requires_grad and id(p) not in of_model:
                res[name] = p
    return res


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
