"The tensors of a model beside those of its average."

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..modules import has_own_modes, named_tensors, paired_modules, plain_name, unwrap
from .following import Attributes, may_change
from .kernels import Group, LowGroup, Vectors, by_kind, low_groups
from .lending import Exchange
from .tensors import (
    Places,
    Tensors,
    is_inexact,
    is_low,
    is_short_vector,
    kind,
    refuse_mismatch,
    resizable,
    slots,
    tensors_of,
)

__all__ = ['Link', 'check_match']


def check_match(model: nn.Module, swa_model: nn.Module):
    """Raise `ValueError`, naming the tensors, unless `swa_model` can hold an average of `model`;
    change nothing.
    """
    _pair_params(unwrap(model), unwrap(swa_model))


# weight of a block's first point; beside a smaller one what is carried, divided by it, would drown the point
_LEAST_CARRYING = 1e-6


class Link:
    """The tensors of a model beside those of its average, in lists for the multi-tensor kernels.

    Making one checks all names and shapes first, then gives the average the model's dtypes and
    devices.
    """

    def __init__(self, model, swa_model, master):
        pairs = _pair_params(model, swa_model)
        for name, (d, p) in pairs.items():
            _convert(name, d, p, master)
        for name in master.keys() - {n for n, (d, _) in pairs.items() if is_low(d)}:
            del master[name]
        self.model, self.swa_model = model, swa_model
        self.params = [d for d, _ in pairs.values()], [p for _, p in pairs.values()]
        buffers = _pair_buffers(model, swa_model)
        self.buffers = by_kind(buffers)
        self.source = tensors_of(model)
        self.average = Tensors(swa_model)
        self.source.links.add(self)
        inexact = [(d, p) for d, p in pairs.values() if is_inexact(p) and not is_low(p)]
        vectors = by_kind([pair for pair in inexact if is_short_vector(pair[0])])
        others = by_kind([pair for pair in inexact if not is_short_vector(pair[0])])
        low = [(d, p, master[name]) for name, (d, p) in pairs.items() if is_low(p)]
        self.vectors = [Vectors(*group) for group in vectors]
        self.groups = [*(Group(*group) for group in others), *low_groups(low), *self.vectors]
        integers = [(d, p) for d, p in pairs.values() if not is_inexact(p)]
        statistics = {id(b) for m in model.modules() if isinstance(m, _NormBase) for b in m._buffers.values()}
        self.latest = by_kind([*integers, *((d, b) for d, b in buffers if id(b) not in statistics)])
        self.is_behind = False  # are the statistics of batch norm those of an earlier model?
        self.movers = [m for m in model.modules() if has_own_modes(m)]
        self.swa_movers = [m for m in swa_model.modules() if has_own_modes(m)]
        self.attributes, self.changing, self.norms = [], [], []
        for m, s in paired_modules(model.named_modules(), swa_model.named_modules()):
            attributes = Attributes(vars(m), vars(s))
            self.attributes.append(attributes)
            if may_change(m):
                self.changing.append(attributes)
            if isinstance(m, _NormBase):
                self.norms.append((m, s))
        # what `holds` compares
        self.places = Places(slots(model) + slots(swa_model))
        self.resizable = resizable(model)
        self.kinds = list(map(kind, self.resizable))
        self.low_ptrs = self._low_ptrs()
        self._exchange = None

    @property
    def exchange(self) -> 'Exchange':
        "For lending the average to the model; made once, since it stays right as long as this link `holds`."
        if self._exchange is None:
            self._exchange = Exchange(self.swa_model, self.model)
        return self._exchange

    def _low_ptrs(self):
        has_low = any(isinstance(group, LowGroup) for group in self.groups)
        return [t.data_ptr() for t in (*self.params[0], *self.params[1])] if has_low else None

    def holds(self, model) -> bool:
        """Is `model` still made of the linked tensors, and are the two sides of one dtype and
        device?
        """
        dst, src = self.params
        return (
            model is self.model
            and self.places.are_as_before()
            and list(map(kind, dst)) == list(map(kind, src))
            and list(map(kind, self.resizable)) == self.kinds
            and self._low_ptrs() == self.low_ptrs
        )

    def has_train_form(self, model) -> bool:
        "Is `model` the linked one, with its weights as training has them?"
        return model is self.model and (not self.movers or all(m.training for m in self.movers))

    @property
    def is_average_away(self) -> bool:
        "Was `swa_model` put into eval mode, where that moves weights?"
        return bool(self.swa_movers) and not all(m.training for m in self.swa_movers)

    def join(self) -> bool:
        "Put short vectors of the model together, for a block; `False` if they cannot be what they were."
        return all(group.join() for group in self.vectors)

    def fold(self, weight):
        "average <- average + weight * (model - average)"
        with torch.inference_mode():  # some per cent faster than without gradients
            for group in self.groups:
                group.fold(weight)

    def open_block(self, weight, carries):
        """mean of the block <- model, a point of `weight`, and if the block `carries` it, what was
        lost to rounding when the one before was merged."""
        for group in self.groups:
            group.open_block((1 - weight) / weight if carries and weight > _LEAST_CARRYING else 0.0)

    def collect(self, weight):
        "mean of the block <- mean + weight * (model - mean)"
        with torch.inference_mode():
            for group in self.groups:
                group.collect(weight)

    def merge(self, weight):
        """average <- average + weight * (mean of the block - average); what is lost to rounding is
        left in place of the mean.
        """
        self.average.look()
        for group in self.groups:
            group.merge(weight, self.average.pointers)

    def copy_latest(self):
        "What has no mean is that of the latest model; of batch norm, see `catch_up`."
        for average, model in self.latest:
            torch._foreach_copy_(average, model)

    def catch_up(self):
        "The statistics of batch norm are those of the latest model."
        if not self.is_behind:
            return
        for name in _STATISTICS:
            pairs = [(s._buffers.get(name), m._buffers.get(name)) for m, s in self.norms]
            for average, model in by_kind([(d, p) for d, p in pairs if _are_alike(d, p)]):
                torch._foreach_copy_(average, model)
        self.is_behind = False

    def look(self):
        "Where it still `holds`, parameters may have other memory by now."
        for tensors in (self.source, self.average):
            tensors.look()


_STATISTICS = 'running_mean', 'running_var', 'num_batches_tracked'


def _are_alike(a, b) -> bool:
    return a is not None and b is not None and a.shape == b.shape


def _pair_params(model, swa_model):
    """Name -> (average's, model's) parameter, each once; raises `ValueError` if the two do not
    match.
    """
    src = named_tensors(model.named_parameters)
    dst = named_tensors(swa_model.named_parameters)
    refuse_mismatch('the model', src, dst)
    first = {}
    for name, p in src.items():
        if first.setdefault(id(dst[name]), (name, p))[1] is not p:
            raise ValueError(
                f'the model does not match the average: {name!r} is tied to {first[id(dst[name])][0]!r} in the average '
                'only'
            )
        if p.numel() and p.data_ptr() == dst[name].data_ptr():
            raise ValueError(f'swa_model shares {name!r} with the model in training; pass a separate module')
    for name, _ in model.named_buffers():
        try:
            swa_model.get_submodule(plain_name(name).rpartition('.')[0])
        except AttributeError:
            raise ValueError(f'the model does not match the average: its buffer {name!r} has no place there') from None
    return {name: (dst[name], p) for name, p in first.values()}


def _convert(name, d, p, master):
    """Give `d`, the average of `p`, the dtype and device of `p`; a float32 master appears and
    disappears with low precision.
    """
    if is_low(p):
        master[name] = master.get(name, d.data).to(p.device, torch.float32, copy=name not in master)
        source = master[name]
    else:
        source = master.pop(name, d.data)
    if d.dtype != p.dtype or d.device != p.device:
        d.data = source.to(p.device, p.dtype, copy=is_low(p))


def _pair_buffers(model, swa_model):
    """(average's, model's) buffers; those that came, went, or changed shape since the copy follow
    the model.
    """
    src = named_tensors(model.named_buffers)
    dst = named_tensors(swa_model.named_buffers)
    for name in src.keys() | dst.keys():
        p, d = src.get(name), dst.get(name)
        if p is not None and d is not None and kind(p) == kind(d):
            continue
        path, _, leaf = name.rpartition('.')
        swa_model.get_submodule(path)._buffers[leaf] = None if p is None else p.detach().clone()
    dst = named_tensors(swa_model.named_buffers)
    return list({id(d): (d, src[name]) for name, d in dst.items()}.values())
