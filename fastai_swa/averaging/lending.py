"An average's tensors in the model that is in use."

import copy
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..interrupts import uninterrupted, unwound_whole
from ..modules import (
    MODULES_OWN,
    Kept,
    has_own_modes,
    modes_of,
    paired_modules,
    plain_name,
    set_modes,
    to_train_form,
    unwrap,
    written_in_train_mode,
)
from .following import may_follow
from .tensors import catch_up, refuse_mismatch

__all__ = ['lent', 'Exchange']


@contextmanager
def lent(source: nn.Module, model: nn.Module):
    """Within this context `model` holds the very tensors of `source`, a module of the same shapes
    and dtypes; afterwards its own again.

    Parameters and buffers keep their identity, only their data is exchanged, so that optimizers,
    compiled code and wrappers go on referring to them; no tensor is copied. What the model does to
    its buffers inside happens to `source`. The model has the plain attributes of `source`, too, as
    copies. Modes stay the model's own.

    Where `train()` and `eval()` move weights, the model gets the weights of `source` as training
    has them, is brought to its mode by real calls, and its own tensors, attributes and modes are
    put back without any; `source` gets the bits of its parameters back, for which those of the
    modules with such modes are copied. (A module's own buffers, where it has modes of its own, as
    well; but for statistics of batch norm.)

    Raises `ValueError`, naming the parameters and before anything changes, if the two do not match.
    """
    with Exchange(source, model).out():
        yield


class Exchange:
    """A model and the source whose tensors it is lent, again and again as long as both are made of
    the same modules and tensors. Raises `ValueError`, naming the parameters, if the two do not
    match.
    """

    def __init__(self, source, model):
        self.source, self.model = unwrap(source), unwrap(model)
        self.is_out = False  # does the model hold the source's tensors?
        theirs = list(self.source.named_modules(remove_duplicate=False))
        own = list(self.model.named_modules(remove_duplicate=False))
        own_params = _tensors_at(own, '_parameters')
        params = _tensors_at(theirs, '_parameters')
        refuse_mismatch('the model', own_params, params)
        self.buffers = _tensors_at(theirs, '_buffers')
        self.slots = [
            (m, plain_name(f'{path}.{leaf}' if path else leaf), leaf, t)
            for path, m in own
            for leaf, t in m._buffers.items()
            if t is not None
        ]
        # id -> (the model's, the source's): each tensor once, under however many names
        self.tensors = {id(t): (t, params[name]) for name, t in own_params.items()}
        self.tensors |= {id(t): (t, self.buffers[name]) for _, name, _, t in self.slots if name in self.buffers}
        self.pairs = paired_modules(theirs, own)
        self.movers = list(dict.fromkeys(m for _, m in own if has_own_modes(m)))
        self.source_moves = any(has_own_modes(m) for _, m in theirs)
        self.moved = self._moved_tensors()

    @contextmanager
    def out(self):
        with unwound_whole(), written_in_train_mode(self.source) if self.source_moves else nullcontext():
            try:
                try:
                    with uninterrupted():
                        self._lend()
                    yield
                finally:
                    self._take_back()
            finally:
                self._take_back()  # for an interruption that arrived just before the line above

    def _lend(self):
        catch_up(self.model)
        self.own_data = [(t, t.data) for t, _ in self.tensors.values()]
        self.own_attributes = []  # (attributes of a module, name, value)
        self.own_movers = Kept(self.movers, bits=False)
        self.bits = [(t, t.detach().clone()) for t in self.moved]  # of the source
        self.own_modes = modes_of(self.model) if self.movers else {}
        self.is_out = True
        for t, theirs in self.tensors.values():
            t.data = theirs.data
        for theirs, m in self.pairs:
            self._lend_attributes(vars(theirs), vars(m))
        if self.movers:
            for theirs, m in self.pairs:
                if has_own_modes(m):
                    m.training = theirs.training  # as its weights are now
            set_modes(self.model, self.own_modes)

    def _lend_attributes(self, theirs, own):
        for name in theirs.keys() - MODULES_OWN:
            value = theirs[name]
            if name not in own or value is own[name] or not may_follow(value, own[name]):
                continue
            self.own_attributes.append((own, name, own[name]))
            try:
                own[name] = copy.deepcopy(value)
            except Exception:
                own[name] = value

    def _moved_tensors(self) -> list:
        "The source's counterparts of what `train` and `eval` may move in the model."
        if not self.movers:
            return []
        inner = {m for outer in self.movers for m in outer.modules()}
        moved = {id(t) for m in inner for t in m._parameters.values()}
        moved |= {id(t) for m in self.movers if not isinstance(m, _NormBase) for t in m._buffers.values()}
        return [theirs for key, (_, theirs) in self.tensors.items() if key in moved]

    def _take_back(self):
        with uninterrupted():
            if not self.is_out:
                return
            try:
                if self.movers:
                    to_train_form(self.model)
                self._hand_over_buffers()
            finally:
                with torch.no_grad():
                    for t, bits in self.bits:
                        t.copy_(bits)
                for own, name, value in self.own_attributes:
                    own[name] = value
                self.own_movers.put_back()
                for m, mode in self.own_modes.items():  # the weights are those of these modes
                    m.training = mode
                for t, data in self.own_data:
                    t.data = data
                self.is_out = False
                self.own_data = self.own_attributes = self.own_movers = self.own_modes = self.bits = None

    def _hand_over_buffers(self):
        "A buffer that was rebound inside is the source's."
        for m, name, leaf, t in self.slots:
            now = getattr(m, leaf, None)
            if now is t or now is None:
                continue
            if name in self.buffers:
                self.buffers[name].data = now.data
            m._buffers[leaf] = t


def _tensors_at(modules, kind) -> dict[str, torch.Tensor]:
    """Plain name -> tensor for the `_parameters` or `_buffers` of `modules`, (name, module) pairs:
    what `named_tensors` gives, without a walk of its own."""
    return {
        plain_name(f'{path}.{leaf}' if path else leaf): t
        for path, m in modules
        for leaf, t in getattr(m, kind).items()
        if t is not None
    }
