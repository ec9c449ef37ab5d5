"""A model as a point of weight space: its weights as one vector, and a vector as its weights."""

import hashlib
import warnings
from contextlib import contextmanager
from numbers import Integral

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from torch import nn

from ..checks import check_count, check_numbers
from ..interrupts import uninterrupted
from ..modules import clean_copy, in_train_mode, modes_of, plain_name, set_modes, to_train_form, unwrap
from ..passes import refreshable
from ..processes import Processes
from ..solutions import source_of
from ..state import not_copied
from ..weights import load_into

__all__ = [
    'Space',
    'weighted_sum',
    'modes_put_back',
    'fingerprints',
    'check_ts',
]


class Space:
    """The weights of a learner's model as one flat vector: all its parameters, in float32 at least,
    end to end.

    - `scratch`: a clean copy of the model, on the device of the data, which takes on the weights of
      one point after the other. Where modes move weights (LoRA that merges its update in `eval()`),
      these are the weights as training has them: all points are sums of such.
    """

    def __init__(self, learn: Learner):
        if not isinstance(learn, Learner):
            raise TypeError(f'learn must be a Learner, which comes first, not {type(learn).__name__}')
        if Processes(learn).size > 1:
            raise RuntimeError('the loss surface is measured in one process: call it outside of distrib_ctx')
        self.learn, self.scratch = learn, clean_copy(learn.model, not_copied(learn))
        device = getattr(learn.dls, 'device', None)
        if device is not None:
            self.scratch.to(device)
        to_train_form(self.scratch)
        self.originals = {k: p for k, p in self.scratch.named_parameters() if p.is_floating_point() or p.is_complex()}
        self.params = [
            torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in self.originals.values()
        ]
        if not self.params:
            raise ValueError('the model has no parameters: there is nothing to move')
        self.device, self.dtype = self.params[0].device, torch.float32
        for p in self.params:
            self.dtype = torch.promote_types(self.dtype, p.dtype)

    @property
    def shows_progress(self) -> bool:
        return any(isinstance(cb, ProgressCallback) for cb in self.learn.cbs)

    def pieces(self, weights: torch.Tensor) -> list[torch.Tensor]:
        "Views of `weights` in the shapes of the parameters, complex ones as pairs of real numbers."
        return [w.view(p.shape) for w, p in zip(weights.split([p.numel() for p in self.params]), self.params)]

    def load(self, solution, name: str):
        """Weights, on the CPU, and buffers of a `solution`. Raises as `weights.load_into` does, and
        `ValueError` for weights that are not finite.
        """
        source = source_of(solution)
        if isinstance(source, nn.Module):
            with in_train_mode(source):
                load_into(self.scratch, unwrap(source).state_dict(), name)
        else:
            load_into(self.scratch, source, name)
        weights = torch.cat([p.to('cpu', self.dtype).flatten() for p in self.params])
        if not weights.isfinite().all():
            raise ValueError(f'{name} has weights that are not finite')
        return weights, {k: b.clone() for k, b in self.scratch.named_buffers()}

    def one_set_of_buffers(self, loaded: list) -> dict:
        """The buffers of the first of `loaded` solutions, which serve for all points; if others
        have others that are not recomputed, that is said.
        """
        modules, recomputed = dict(unwrap(self.learn.model).named_modules()), set()
        for name in refreshable(self.learn):
            recomputed |= {plain_name(f'{name}.{k}' if name else k) for k in modules[name]._buffers}
        first, *others = (buffers for _, buffers in loaded)
        differ = [
            k
            for k, b in first.items()
            if b.is_floating_point() and k not in recomputed and not all(torch.equal(b, o[k]) for o in others)
        ]
        if differ:
            warnings.warn(
                f'{differ[0]} is not recomputed and differs between the solutions: all points have that of the first'
            )
        return first

    def put(self, weights: torch.Tensor, buffers: dict):
        "Give `scratch` these `weights` and `buffers`."
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.pieces(weights.to(self.device)))
        for k, b in self.scratch.named_buffers():
            b.data = buffers[k].clone()

    def state_dict(self, weights: torch.Tensor, buffers: dict) -> dict:
        "`weights` as a state dict of copies on the CPU."
        self.put(weights, buffers)
        return {
            k: v.detach().to('cpu', copy=True) if isinstance(v, torch.Tensor) else v
            for k, v in self.scratch.state_dict().items()
        }


def weighted_sum(vectors, shares) -> torch.Tensor:
    "One that has a share of 1 beside zeros comes out bitwise."
    res = vectors[0] * float(shares[0])
    for v, share in zip(vectors[1:], shares[1:]):
        res.add_(v, alpha=float(share))
    return res


@contextmanager
def modes_put_back(model):
    """At the end of this context `model` is put in the modes it had at its start, by its modules'
    own `train` and `eval`.
    """
    model = unwrap(model)
    modes = modes_of(model)
    try:
        yield
    finally:
        with uninterrupted():
            set_modes(model, modes)


def fingerprints(vectors: dict) -> list:
    "Pairs of a name and a fingerprint, in their order."
    return [[name, hashlib.sha256(w.numpy().data).hexdigest()[:16]] for name, w in vectors.items()]


def check_ts(ts, low=-float('inf'), high=float('inf')) -> list[float]:
    "Points of a line or curve, ascending; a number of them goes from `low` to `high`."
    if isinstance(ts, Integral) and not isinstance(ts, bool):
        return np.linspace(low, high, check_count('ts', ts, least=2)).round(12).tolist()
    found = np.unique(check_numbers('ts', ts))
    if not len(found):
        raise ValueError('ts is empty: give points, of which 0 and 1 are the solutions')
    if found[0] < low or found[-1] > high:
        raise ValueError(f'ts must be from {low} to {high}, not {ts!r}')
    return found.tolist()
