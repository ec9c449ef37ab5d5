"What a module is made of, and whether it still is."

import math
import weakref
from operator import getitem, is_

import torch
from torch.nn.modules.batchnorm import _NormBase

from ..checks import listed

__all__ = [
    'refuse_mismatch',
    'all_finite',
    'is_inexact',
    'is_low',
    'is_short_vector',
    'kind',
    'resizable',
    'slots',
    'Places',
    'Tensors',
    'tensors_of',
    'catch_up',
]


# a state dict may hold a module's extra state, which need not be a tensor
def _shape(o):
    return getattr(o, 'shape', None)


def refuse_mismatch(what, src, dst):
    """Raise a `ValueError` that names how `src` and `dst`, both name -> tensor, differ in names or
    shapes.
    """
    wrong = {
        'missing': dst.keys() - src.keys(),
        'not in the average': src.keys() - dst.keys(),
        'of another shape': {k for k, t in src.items() if k in dst and _shape(t) != _shape(dst[k])},
    }
    faults = [f'{listed(sorted(names))} {fault}' for fault, names in wrong.items() if names]
    if faults:
        raise ValueError(f'{what} does not match the average: ' + '; '.join(faults))


def all_finite(tensors) -> bool:
    "Whether no tensor holds a NaN or an infinity; one read from each device."
    groups = {}
    for t in tensors:
        if is_inexact(t) and t.numel():
            groups.setdefault((t.dtype, t.device), []).append(t.detach())
    # the largest magnitude, unlike a sum or a 2-norm, cannot overflow
    return all(math.isfinite(torch.stack(torch._foreach_norm(ts, math.inf)).max().item()) for ts in groups.values())


def is_inexact(t):
    return t.is_floating_point() or t.is_complex()


def is_low(t):
    return t.is_floating_point() and torch.finfo(t.dtype).bits < 32


_SHORT = 2**12  # elements: above it a kernel's work is more than its call


def is_short_vector(t) -> bool:
    return t.dim() == 1 and t.numel() <= _SHORT and t.device.type == 'cpu'


def kind(t):
    return t.shape, t.dtype, t.device


class Places:
    "Dicts of tensors and modules, and whether they hold the same ones as when this was made."

    def __init__(self, dicts: list[dict]):
        self.dicts = dicts
        self.snapshot = [dict(d) for d in dicts]
        # a comparison of dicts takes those for equal whose values are
        single = [(d, k, t) for d in dicts for k, t in d.items() if isinstance(t, torch.Tensor) and t.numel() <= 1]
        self.single_elements = list(zip(*single)) or ((), (), ())

    def are_as_before(self) -> bool:
        # dicts compare by identity first: no tensor is read while all is as it was
        try:
            same = self.dicts == self.snapshot
        # "truth value of a tensor is ambiguous": there is another tensor in its place
        except RuntimeError:
            return False
        dicts, keys, tensors = self.single_elements
        return same and all(map(is_, map(getitem, dicts, keys), tensors))


def resizable(module) -> list:
    "Buffers that may change their shape in place."
    res = []
    for m in module.modules():
        if not isinstance(m, _NormBase):
            res += [b for b in m._buffers.values() if b is not None]
    return res


def slots(model):
    return [d for m in model.modules() for d in (m._parameters, m._buffers, m._modules)]


def _pointers(tensors):
    return list(map(torch.Tensor.data_ptr, tensors))


class Tensors:
    """What a module is made of, and whether it still is.

    That is asked in each fold, so it is told by identity and by address alone: other parameters, submodules, and
    buffers that are no statistics of batch norm; other memory under a parameter, as after a cast. The averages of a
    model share one.
    """

    def __init__(self, module):
        self.module = module
        params = list(module.parameters())
        self.vectors = [p for p in params if is_short_vector(p)]
        self.others = [p for p in params if not is_short_vector(p)]
        modules = list(module.modules())
        dicts = [d for m in modules for d in (m._parameters, m._modules) if d]
        dicts += [m._buffers for m in modules if m._buffers and not isinstance(m, _NormBase)]
        self.places = Places(dicts)
        self.resizable = resizable(module)
        self.kinds = list(map(kind, self.resizable))
        self.links = weakref.WeakSet()  # of the averages of this module
        self.look()

    def look(self):
        "The parameters may have other memory by now, of the same kinds."
        self.pointers = _pointers(self.others)
        self.vector_pointers = _pointers(self.vectors)
        self.seen_in = None  # the step in which it was found unchanged, and whether the vectors were looked at

    def is_unchanged(self, step=None, vectors=True) -> bool:
        """Is `module` what it was, as far as is looked at in each fold?

        - `step`: where it was found so in this one, it is not looked at again.
        - `vectors`: whether the memory of short vectors is, too.
        """
        if step is not None and self.seen_in in ((step, True), (step, vectors)):
            return True
        self.seen_in = None
        if (
            _pointers(self.others) != self.pointers
            or vectors
            and _pointers(self.vectors) != self.vector_pointers
            or not self.places.are_as_before()
            or list(map(kind, self.resizable)) != self.kinds
        ):
            return False
        self.seen_in = step, vectors
        return True


_in_training = weakref.WeakValueDictionary()  # id of a model -> its `Tensors`, while an average is linked to it


def tensors_of(model) -> Tensors:
    known = _in_training.get(id(model))
    if known is None or not known.is_unchanged():
        known = _in_training[id(model)] = Tensors(model)
    return known


def catch_up(model):
    "The averages of `model` take over what they need of it, before it is given other tensors or values."
    known = _in_training.get(id(model))
    for link in [] if known is None else list(known.links):
        with torch.no_grad():
            link.catch_up()
