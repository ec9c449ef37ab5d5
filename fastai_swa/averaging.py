"""Running averages of weights, and lending an average's tensors to the model that is in use. Plain
PyTorch."""

import copy
import math
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from operator import getitem, is_

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .checks import check_number, listed
from .interrupts import uninterrupted, unwound_whole
from .modules import (
    MODULES_OWN,
    Kept,
    away_from_training,
    clean_copy,
    has_own_modes,
    in_train_mode,
    is_plain,
    modes_of,
    named_tensors,
    paired_modules,
    plain_name,
    same_data,
    set_modes,
    to_train_form,
    unwrap,
    written_in_train_mode,
)
from .warn import warn
from .weightings import power_gamma
from .weights import NoSolution

__all__ = ['WeightAverage', 'equal', 'ema', 'power_ema', 'lent', 'all_finite', 'check_match']


def equal(n_averaged: int) -> float:
    "Each point weighs the same: `1 / (n_averaged + 1)` (Izmailov et al. 2018, Algorithm 1)."
    return 1 / (n_averaged + 1)


def ema(decay: float, warmup: bool = False):
    """Exponential moving average: the old average keeps `decay` of its weight, the new point gets
    `1 - decay`.

    The first point is taken whole, so the average never contains weights from before it. `warmup`:
    point n, from 0, gets `max(1 - decay, (n + 1)**(-2/3))`, so that early points are forgotten
    soon, while the weights still improve fast. Raises `TypeError` or `ValueError` if `decay` is not
    a number in [0, 1).
    """
    if not 0 <= check_number('decay', decay) < 1:
        raise ValueError(f'decay must be in [0, 1), not {decay!r}')
    return partial(_warm_ema_weight if warmup else _ema_weight, decay)


def power_ema(width: float):
    """Power-function EMA (Karras et al. 2023, arXiv 2312.02696): an average that grows with the fit, and needs no
    warm-up, since its memory is a share of the points so far.

    - `width`: the standard deviation of its weighting as a share of the points so far, in (0, 12**-0.5], the largest
      of which is `equal`; .05 to .25 are usual.

    Point n, from 0, gets 1 - (1 - 1 / (n + 1))**(g + 1), where g is the largest root of
    (g + 2)**2 (g + 3) = (g + 1) / width**2. Raises `TypeError` or `ValueError` for a width that is none.
    """
    return partial(_power_weight, power_gamma(check_number('width', width)))


def _power_weight(gamma, n_averaged):
    return 1.0 - (1.0 - 1.0 / (n_averaged + 1)) ** (gamma + 1)


def _ema_weight(decay, n_averaged):
    return 1.0 if n_averaged == 0 else 1.0 - decay


def _warm_ema_weight(decay, n_averaged):
    return max(1.0 - decay, (n_averaged + 1) ** (-2 / 3))


def check_weight(weight):
    """Raise `TypeError` or `ValueError` unless `weight` is a function from a number of points to a
    number in [0, 1].
    """
    if not callable(weight):
        raise TypeError(f'weight must be a function such as equal or ema(0.99), not {weight!r}')
    try:
        fits = 0 <= weight(1) <= 1
    except Exception:
        fits = False
    if not fits:
        raise ValueError(
            f'weight must give a number in [0, 1] for a number of points, as equal and ema(0.99) do, and {weight!r} '
            'does not'
        )


def check_swa_model(swa_model):
    "Raise `TypeError` unless `swa_model` is a module or `None`."
    if not isinstance(swa_model, nn.Module | None):
        raise TypeError(f'swa_model must be an nn.Module or None, not {type(swa_model).__name__}')


BLOCK = 128  # points: the longest sum of the two levels, and how many are folded before there are two


@dataclass
class _Block:
    "The points that are not in the average yet; their mean lies beside the tensors it is of."

    weight: float = 0.0  # of all of them together, once they are in the average
    n: int = 0  # how many
    carries: bool = False  # with none yet: does what the merge before lost to rounding lie where their mean will be?


class WeightAverage:
    """The running average of a model's weights: `swa_model <- swa_model + weight * (model -
    swa_model)` at each `update`.

    - `model`: the module in training; `torch.compile`d and data-parallel ones are seen through,
      names are those of the bare module.
    - `weight`: function from `n_averaged`, the number of points so far, to the new point's weight
      in [0, 1]: `equal`, `ema(decay)` or any other. The first point is always taken whole.
    - `swa_model`: module to average into, of the same architecture; by default a clean copy of
      `model` (`modules.clean_copy`).

    `swa_model` follows the model's dtypes and devices. Where the model is in low precision (under
    32 bits) the average is kept in float32 beside it, since an average in bfloat16 soon stops
    moving. Buffers and plain attributes are those of the latest model: the statistics of batch norm
    belong to those weights, not to the average, until `update_bn` has recomputed them. (They are
    many, and stale anyway: they are not copied in `update`, but with the block that is open.)

    Frozen parameters are copied as well, although they do not move: a weight that is shared with the
    model and edited there later (unfrozen, merged, cast, loaded into) would change in the average,
    and not every such edit can be seen. So a LoRA on a large model costs the whole model once more.

    Beyond the first 128 points the average is summed in two levels, which costs one more float32
    set of weights: points go into the mean of a block of at most 128, and the block into the
    average; what that merge loses to rounding goes into the next block. So the error does not grow
    with the number of points: it is at most that of one sum over 128 points, 64 roundings of
    float32 (6e-8 of a weight each), and commonly a tenth of that. Measured for 10,000 points near 1
    that drift by 1e-3: .03 % of the drift, for 50,000: .02 %, for `ema(.9999)`: .05 % (in one
    level: 10, 50 and 4 %). The attribute `swa_model` and all methods merge the open block by
    themselves; who holds the module itself calls `settle()` before using it.

    Where `train()` and `eval()` move weights (LoRA that is merged in `eval()`), the average is one
    of the weights as training has them: `swa_model` is kept in train mode, `update` puts it there
    again, and its own `eval()` merges the average.

    Raises `TypeError` for arguments of the wrong kind and `ValueError`, naming the tensors, for a
    `swa_model` that does not match.
    """

    block_len = BLOCK

    def __init__(self, model: nn.Module, weight=equal, swa_model: nn.Module | None = None):
        if not isinstance(model, nn.Module):
            raise TypeError(f'model must be an nn.Module, not {type(model).__name__}')
        check_weight(weight)
        check_swa_model(swa_model)
        self.weight = weight
        self.n_averaged = 0  # points, those in the open block included
        self._master = {}  # name -> float32 average of a parameter in low precision
        self._block = _Block()
        self._linked = None  # the _Link to the model folded last
        self._exchange = None  # the _Exchange of the latest lending
        self._left = set()  # attributes that could not be copied, each said once
        self._swa_model = swa_model
        if swa_model is None:
            self._swa_model = clean_copy(model)
            to_train_form(self._swa_model)
        self._link(model)

    @property
    def swa_model(self) -> nn.Module:
        "The module that holds the average of all points."
        self.settle()
        return self._swa_model

    @property
    def master(self) -> dict[str, torch.Tensor]:
        "Name -> float32 average for each parameter in low precision."
        self.settle()
        return self._master

    def solutions(self) -> dict[str, nn.Module]:
        """The average, called 'average': so `rays`, `Curve`, `Ensemble` and `average_checkpoints` take
        the object itself. Raises `ValueError` if nothing is averaged yet.
        """
        if not self.n_averaged:
            raise NoSolution('average', 'has averaged nothing yet')
        return {'average': self.swa_model}

    @property
    def is_lent(self) -> bool:
        "Are the average's tensors in a model, within `lent_to`?"
        return self._exchange is not None and self._exchange.is_out

    def update(self, model: nn.Module, step=None):
        """Take the weights of `model` into the average. Nothing is read back from the device.

        - `step`: what tells this optimizer step from all others, until the average is used. Where several averages
          take the weights of one step, it is looked at once whether the model is still made of the same tensors.

        Raises `ValueError` before anything changes if the parameters of `model` no longer match the
        average's, naming them, or if `weight` gives something outside [0, 1]; `RuntimeError` while
        the average's tensors are lent to a model. After any error, and Ctrl-C, weights and
        `n_averaged` are those before the call or after it; only a kernel that fails when others
        have already run (a device that is lost) leaves what cannot be undone.
        """
        if self.is_lent:
            raise RuntimeError('the average cannot be updated while its weights are lent to the model')
        weight = self._next_weight()
        model = unwrap(model)
        with self._read(model):
            link = self._link_in_step(model, weight, step)
            with uninterrupted(), torch.no_grad():
                if link.is_average_away:
                    to_train_form(link.swa_model)
                self._fold(link, weight)
                self.n_averaged += 1
                link.is_behind = True
                self._take_attributes(link.changing)

    def _next_weight(self) -> float:
        weight = 1.0 if self.n_averaged == 0 else self.weight(self.n_averaged)
        if not isinstance(weight, Real) or not 0 <= weight <= 1:
            raise ValueError(f'weight({self.n_averaged}) must be a number in [0, 1], not {weight!r}')
        return float(weight)

    def _is_direct(self, weight) -> bool:
        "Does the next point go into the average itself, not into the block?"
        return weight == 1 or self.n_averaged < self.block_len

    def _fold(self, link, weight):
        block = self._block
        if self._is_direct(weight):
            link.fold(weight)
            if weight == 1:
                self._block = _Block()  # nothing of what was before is left
        elif block.weight or weight:
            total = block.weight + weight - block.weight * weight
            if block.n == 0:
                link.open_block(weight, block.carries)
            else:
                link.collect(weight / total)
            block.weight = total
            block.n += 1
            if block.n == self.block_len:
                self._merge(carries=True)
        link.copy_latest()

    def settle(self, model: nn.Module | None = None):
        """Merge the open block of points into the average, so that the module that is `swa_model`
        holds the average of all.

        - `model`: the model averaged last, as it was then. All its plain attributes are taken over;
          `update` passes over those of PyTorch's own layers with parameters, which are settings
          that no training changes, and of modules that had none at first.
        """
        link = self._linked
        if link is not None and (self._block.n or link.is_behind):
            with uninterrupted(), torch.no_grad():
                if link.is_average_away:
                    to_train_form(link.swa_model)
                if self._block.n:
                    self._merge()
                link.catch_up()
        self._block.carries = False  # whoever goes on from a saved average knows nothing of it
        if model is not None:
            model = unwrap(model)
            with self._read(model):
                link = self._link(model)
                with uninterrupted():
                    self._take_attributes(link.attributes)

    def _merge(self, carries=False):
        self._linked.merge(self._block.weight)
        self._block = _Block(carries=carries)

    def _take_attributes(self, attributes):
        left = {name for a in attributes for name in a.follow()} - self._left
        self._left |= left
        if left:
            warn(f'swa_model keeps its own {listed(sorted(left))}: what the model has there now cannot be copied')

    def _read(self, model):
        "A context in which the weights of `model` are as training has them."
        if self._linked is not None and self._linked.has_train_form(model):
            return nullcontext()
        return in_train_mode(model)

    def _link(self, model):
        model = unwrap(model)
        if self._linked is None or not self._linked.holds(model):
            self.settle()
            self._linked = _Link(model, unwrap(self._swa_model), self._master)
        self._linked.look()
        return self._linked

    def _link_in_step(self, model, weight, step):
        "As `_link`, but of what it looks at only what a fold needs."
        link = self._linked
        is_direct = self._is_direct(weight)
        needs_average = is_direct or self._block.n + 1 >= self.block_len
        if (
            link is None
            or model is not link.model
            or not link.source.is_unchanged(step, vectors=is_direct)
            or needs_average
            and not link.average.is_unchanged()
            or not is_direct
            and not link.join()
        ):
            link = self._link(model)
            if not is_direct:
                link.join()
        return link

    def copied(self, swa_model: nn.Module) -> 'WeightAverage':
        "The same average, held by `swa_model`, which is a copy of this one's module."
        self.settle()
        res = WeightAverage.__new__(WeightAverage)
        vars(res).update(vars(self))
        res._swa_model = swa_model
        res._master = {name: t.clone() for name, t in self._master.items()}
        res._block = _Block()
        res._linked = res._exchange = None
        res._left = set(self._left)
        return res

    def release(self):
        """Forget the model averaged last and the memory for blocks, so that the average alone does
        not keep them; the next `update` links again."""
        self.settle()
        self._linked = None
        if not self.is_lent:
            self._exchange = None

    @contextmanager
    def lent_to(self, model: nn.Module):
        """Within this context `model` holds the average's own tensors (see `lent`), after
        `swa_model` took on its dtypes and device.

        Raises `ValueError` if `model` does not match the average, `RuntimeError` if the average is
        lent already.
        """
        if self.is_lent:
            raise RuntimeError('the average is lent to a model already; leave that context first')
        self.settle()
        self._exchange = self._link(model).exchange
        with self._exchange.out():
            yield self._swa_model

    def copy_to(self, model: nn.Module):
        """Write the average into the parameters, buffers and plain attributes of `model`, in place,
        as training has them; the model keeps its modes. Raises like `lent_to`."""
        if self.is_lent:
            raise RuntimeError('the average is lent to a model; leave that context first')
        self.settle()
        with in_train_mode(self._swa_model), written_in_train_mode(model):
            link = self._link(model)
            _catch_up(link.model)
            with uninterrupted(), torch.no_grad():
                for average, own in (link.params, *link.buffers):
                    torch._foreach_copy_(own, average)
                for a in link.attributes:
                    a.reversed().follow()

    def state_dict(self) -> dict:
        """`{'swa_model': plain state dict, 'n_averaged': int, 'master': {name: float32 tensor}}`;
        tensors are live, as in PyTorch.

        `master` is empty unless the model is in low precision. Where modes move weights, these are
        the weights as training has them, as copies if `swa_model` is in eval mode.
        """
        self.settle()
        model = unwrap(self._swa_model)
        copies = bool(away_from_training(model))
        with in_train_mode(model):
            state = {plain_name(k): v for k, v in model.state_dict().items()}
            if copies:
                state = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        return {'swa_model': state, 'n_averaged': self.n_averaged, 'master': dict(self._master)}

    def load_state_dict(self, state: dict):
        """Take over a `state_dict`. Raises `ValueError` before anything changes if it is none, or
        belongs to another model, and `RuntimeError` while the average is lent."""
        if self.is_lent:
            raise RuntimeError('a state cannot be loaded while the average is lent to a model')
        if not isinstance(state, dict) or not {'swa_model', 'n_averaged', 'master'} <= set(state):
            raise ValueError('not the state of a WeightAverage: expected a dict with swa_model, n_averaged and master')
        if type(state['n_averaged']) is not int or state['n_averaged'] < 0:
            raise ValueError(f'not the state of a WeightAverage: n_averaged is {state["n_averaged"]!r}, no number')
        model = unwrap(self._swa_model)
        own = {plain_name(k): (k, v) for k, v in model.state_dict().items()}
        refuse_mismatch('the state', state['swa_model'], {name: v for name, (_, v) in own.items()})
        params = named_tensors(model.named_parameters)
        foreign = {k for k, t in state['master'].items() if k not in params or t.shape != params[k].shape}
        if foreign:
            raise ValueError(f'the state does not match the average: master has {listed(sorted(foreign))}')
        with uninterrupted(), written_in_train_mode(model), torch.no_grad():
            model.load_state_dict({own[name][0]: v for name, v in state['swa_model'].items()})
            self._block = _Block()
            self._linked = None
            self._master.clear()
            for name, t in state['master'].items():
                params[name].copy_(t)
                if is_low(params[name]):
                    self._master[name] = t.detach().to(params[name].device, torch.float32, copy=True)
            self.n_averaged = state['n_averaged']

    def __repr__(self):
        return f'{type(self).__name__}({type(unwrap(self._swa_model)).__name__}, n_averaged={self.n_averaged})'


def check_match(model: nn.Module, swa_model: nn.Module):
    """Raise `ValueError`, naming the tensors, unless `swa_model` can hold an average of `model`;
    change nothing.
    """
    _pair_params(unwrap(model), unwrap(swa_model))


class _Tensors:
    """What a module is made of, and whether it still is.

    That is asked in each fold, so it is told by identity and by address alone: other parameters, submodules, and
    buffers that are no statistics of batch norm; other memory under a parameter, as after a cast. The averages of a
    model share one.
    """

    def __init__(self, module):
        self.module = module
        params = list(module.parameters())
        self.vectors = [p for p in params if _is_short_vector(p)]
        self.others = [p for p in params if not _is_short_vector(p)]
        modules = list(module.modules())
        self.slots = [d for m in modules for d in (m._parameters, m._modules) if d]
        self.slots += [m._buffers for m in modules if m._buffers and not isinstance(m, _NormBase)]
        self.snapshot = [dict(d) for d in self.slots]
        self.single = _single(self.slots)
        self.resizable = _resizable(module)
        self.kinds = list(map(_kind, self.resizable))
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
            or not _are_as_before(self.slots, self.snapshot, self.single)
            or list(map(_kind, self.resizable)) != self.kinds
        ):
            return False
        self.seen_in = step, vectors
        return True


_in_training = weakref.WeakValueDictionary()  # id of a model -> its `_Tensors`, while an average is linked to it


def _tensors_of(model) -> _Tensors:
    known = _in_training.get(id(model))
    if known is None or not known.is_unchanged():
        known = _in_training[id(model)] = _Tensors(model)
    return known


def _catch_up(model):
    "The averages of `model` take over what they need of it, before it is given other tensors or values."
    known = _in_training.get(id(model))
    for link in [] if known is None else list(known.links):
        with torch.no_grad():
            link.catch_up()


def _pointers(tensors):
    return list(map(torch.Tensor.data_ptr, tensors))


def _are_as_before(slots, snapshot, single) -> bool:
    # dicts compare by identity first: no tensor is read while all is as it was
    try:
        same = slots == snapshot
    # "truth value of a tensor is ambiguous": there is another tensor in its place
    except RuntimeError:
        return False
    dicts, keys, tensors = single
    return same and all(map(is_, map(getitem, dicts, keys), tensors))


def _single(slots):
    """(dicts, keys, tensors) for those tensors in `slots` that a comparison of dicts takes for equal where their values
    are.
    """
    single = [(d, k, t) for d in slots for k, t in d.items() if isinstance(t, torch.Tensor) and t.numel() <= 1]
    return list(zip(*single)) or ((), (), ())


def _resizable(module) -> list:
    "Buffers that may change their shape in place."
    res = []
    for m in module.modules():
        if not isinstance(m, _NormBase):
            res += [b for b in m._buffers.values() if b is not None]
    return res


class _Link:
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
        self.buffers = _group(buffers)
        self.source = _tensors_of(model)
        self.average = _Tensors(swa_model)
        self.source.links.add(self)
        inexact = [(d, p) for d, p in pairs.values() if _is_inexact(p) and not is_low(p)]
        vectors = _group([pair for pair in inexact if _is_short_vector(pair[0])])
        others = _group([pair for pair in inexact if not _is_short_vector(pair[0])])
        low = [(d, p, master[name]) for name, (d, p) in pairs.items() if is_low(p)]
        self.vectors = [_Vectors(*group) for group in vectors]
        self.groups = [*(_Group(*group) for group in others), *_low_groups(low), *self.vectors]
        integers = [(d, p) for d, p in pairs.values() if not _is_inexact(p)]
        statistics = {id(b) for m in model.modules() if isinstance(m, _NormBase) for b in m._buffers.values()}
        self.latest = _group([*integers, *((d, b) for d, b in buffers if id(b) not in statistics)])
        self.is_behind = False  # are the statistics of batch norm those of an earlier model?
        self.movers = [m for m in model.modules() if has_own_modes(m)]
        self.swa_movers = [m for m in swa_model.modules() if has_own_modes(m)]
        self.attributes, self.changing, self.norms = [], [], []
        for m, s in paired_modules(model.named_modules(), swa_model.named_modules()):
            attributes = _Attributes(vars(m), vars(s))
            self.attributes.append(attributes)
            if not _is_constant(m) and len(vars(m)) > _N_OWN:
                self.changing.append(attributes)
            if isinstance(m, _NormBase):
                self.norms.append((m, s))
        # what `holds` compares
        self.slots = _slots(model) + _slots(swa_model)
        self.snapshot = [dict(d) for d in self.slots]
        self.single = _single(self.slots)
        self.resizable = _resizable(model)
        self.kinds = list(map(_kind, self.resizable))
        self.low_ptrs = self._low_ptrs()
        self._exchange = None

    @property
    def exchange(self) -> '_Exchange':
        "For lending the average to the model; made once, since it stays right as long as this link `holds`."
        if self._exchange is None:
            self._exchange = _Exchange(self.swa_model, self.model)
        return self._exchange

    def _low_ptrs(self):
        has_low = any(isinstance(group, _LowGroup) for group in self.groups)
        return [t.data_ptr() for t in (*self.params[0], *self.params[1])] if has_low else None

    def holds(self, model) -> bool:
        """Is `model` still made of the linked tensors, and are the two sides of one dtype and
        device?
        """
        dst, src = self.params
        return (
            model is self.model
            and _are_as_before(self.slots, self.snapshot, self.single)
            and list(map(_kind, dst)) == list(map(_kind, src))
            and list(map(_kind, self.resizable)) == self.kinds
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
            for average, model in _group([(d, p) for d, p in pairs if _are_alike(d, p)]):
                torch._foreach_copy_(average, model)
        self.is_behind = False

    def look(self):
        "Where it still `holds`, parameters may have other memory by now."
        for tensors in (self.source, self.average):
            tensors.look()


# weight of a block's first point; beside a smaller one what is carried, divided by it, would drown the point
_LEAST_CARRYING = 1e-6


@dataclass
class _Group:
    "Weights of one dtype and device."

    average: list  # tensors of swa_model
    model: list  # tensors of the model in training
    means: list = field(default_factory=list)  # of the block, once there was one
    pieces: list | None = None  # what is merged at once: of the average, of the means, and room for as much
    pointers: list = field(default_factory=list)  # of the average when these were made

    def fold(self, weight):
        _lerp(self.average, self.model, weight)

    def open_block(self, carried):
        _open_block(self, self.average, self.model, carried)

    def collect(self, weight):
        _lerp(self.means, self.model, weight)

    def merge(self, weight, pointers):
        if self.pieces is None or pointers != self.pointers:
            self.pieces = _pieces(self.average, self.means)
            self.pointers = pointers
        _merge(self.pieces, weight)


@dataclass
class _Vectors:
    """Short vectors of one dtype on a CPU, such as biases and the weights of norms. In small networks
    they are most of the tensors, and a kernel that is called for each costs more than its work; so the
    mean of the block is one long vector. (Whether they are still as long as they were shows when they
    are put together.)
    """

    average: list  # tensors of swa_model
    model: list  # tensors of the model in training
    means: list = field(default_factory=list)  # one vector, once there was a block
    joined: list = field(default_factory=list)  # one vector, once there was a block: the model's

    def join(self) -> bool:
        "Put the model's vectors together; `False` if they are not of one kind and as long as they were."
        if not self.joined:
            self.joined = [torch.empty(sum(t.numel() for t in self.average), dtype=self.average[0].dtype)]
        n = self.joined[0].numel()
        try:
            with torch.inference_mode():
                torch.cat(self.model, out=self.joined[0])  # which makes room for more, or less
        except RuntimeError:
            n = None
        if self.joined[0].numel() != n:
            self.joined = []
        return bool(self.joined)

    def fold(self, weight):
        _lerp(self.average, self.model, weight)

    def open_block(self, carried):
        _open_block(self, self.joined, self.joined, carried)

    def collect(self, weight):
        _lerp(self.means, self.joined, weight)

    def merge(self, weight, pointers):
        own = torch.cat(self.average)
        _merge([([own], self.means, [torch.empty_like(own)])], weight)
        torch._foreach_copy_(self.average, list(own.split([t.numel() for t in self.average])))


@dataclass
class _LowGroup:
    "Pieces of weights in low precision, whose average is kept in float32."

    average: list  # of swa_model
    model: list  # of the model in training
    master: list  # the average itself, in float32
    scratch: list  # room for the model's in float32
    means: list = field(default_factory=list)  # of the block, in float32, once there was one
    pieces: list | None = None  # what is merged at once: of the master, of the means, and room for as much

    def fold(self, weight):
        torch._foreach_copy_(self.scratch, self.model)
        _lerp(self.master, self.scratch, weight)
        torch._foreach_copy_(self.average, self.master)

    def open_block(self, carried):
        _open_block(self, self.master, self.model, carried)

    def collect(self, weight):
        torch._foreach_copy_(self.scratch, self.model)
        _lerp(self.means, self.scratch, weight)

    def merge(self, weight, pointers):
        if self.pieces is None:
            self.pieces = _pieces(self.master, self.means)
        _merge(self.pieces, weight)
        torch._foreach_copy_(self.average, self.master)


def _lerp(dst, src, weight):
    if weight == 1:
        torch._foreach_copy_(dst, src)
    else:
        torch._foreach_lerp_(dst, src, weight)


def _open_block(group, like, model, carried):
    """The means of `group`, tensors like those in `like`, become those of the model and `carried`
    times what they hold.
    """
    if not group.means:
        group.means = [torch.empty_like(t) for t in like]
    if not carried:
        return torch._foreach_copy_(group.means, model)
    torch._foreach_mul_(group.means, carried)
    torch._foreach_add_(group.means, model)


def _merge(pieces, weight):
    """average <- average + weight * (means - average), for `pieces`: lists of tensors of the average, of
    the means, and of room for as much. Then the means hold how much more the average should be (a
    compensated sum, Dekker 1971).
    """
    for own, change, total in pieces:
        torch._foreach_sub_(change, own)
        torch._foreach_mul_(change, weight)
        torch._foreach_copy_(total, own)
        torch._foreach_add_(total, change)
        torch._foreach_sub_(own, total)
        torch._foreach_add_(change, own)
        torch._foreach_copy_(own, total)


def _pieces(average, means) -> list:
    """For `_merge`; the room is that of the largest list. In pieces: room for a whole set of sums
    would be another set of weights in memory.
    """
    n = _SCRATCH if average[0].is_cuda else _CACHED
    runs = [list(map(list, zip(*run))) for run in _runs(zip(average, means), n)]
    size = max(sum(t.numel() for t in own) for own, _ in runs)
    room = torch.empty(size, dtype=average[0].dtype, device=average[0].device)
    return [(own, change, _laid_out(room, own)) for own, change in runs]


def _laid_out(room, tensors) -> list:
    "Views of `room`, a vector, in the shapes of `tensors`."
    sizes = [t.numel() for t in tensors]
    return [s.view(t.shape) for s, t in zip(room[: sum(sizes)].split(sizes), tensors)]


@dataclass
class _Attributes:
    "The attributes of a module of the model beside those of its counterpart in the average."

    source: dict  # of the module that is followed
    target: dict  # of the one that follows
    # those that the target has from the source, or had from the start as the source did
    names: set = field(default_factory=set)

    def follow(self) -> list[str]:
        """Give the target the source's plain attributes, as copies; returns the names of those that
        cannot be copied.
        """
        source, target = self.source, self.target
        left = []
        for name, value in source.items():
            if name in MODULES_OWN:
                continue
            own = target.get(name, _MISSING)
            if value is own or not _may_follow(value, own):
                continue
            try:
                target[name] = copy.deepcopy(value)
            except Exception:
                left.append(name)
        for name in self.names - source.keys():
            target.pop(name, None)
        self.names = source.keys() & target.keys() - MODULES_OWN
        return left

    def reversed(self):
        return _Attributes(self.target, self.source)


_N_OWN = len(vars(nn.Module()))
_MISSING = object()


def _may_follow(value, own) -> bool:
    "Is `value` data that differs from `own`, data as well or nothing?"
    return is_plain(value) and (own is _MISSING or is_plain(own) and not same_data(value, own))


def _is_constant(module) -> bool:
    """Is `module` a layer of PyTorch's own with parameters, whose other attributes say how it was
    made?
    """
    return type(module).__module__.startswith('torch.nn.modules.') and bool(module._parameters)


_STATISTICS = 'running_mean', 'running_var', 'num_batches_tracked'


def _are_alike(a, b) -> bool:
    return a is not None and b is not None and a.shape == b.shape


def _kind(t):
    return t.shape, t.dtype, t.device


# a state dict may hold a module's extra state, which need not be a tensor
def _shape(o):
    return getattr(o, 'shape', None)


def _slots(model):
    return [d for m in model.modules() for d in (m._parameters, m._buffers, m._modules)]


def _is_short_vector(t) -> bool:
    return t.dim() == 1 and t.numel() <= _SHORT and t.device.type == 'cpu'


def _is_inexact(t):
    return t.is_floating_point() or t.is_complex()


def is_low(t):
    return t.is_floating_point() and torch.finfo(t.dtype).bits < 32


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
        if p is not None and d is not None and _kind(p) == _kind(d):
            continue
        path, _, leaf = name.rpartition('.')
        swa_model.get_submodule(path)._buffers[leaf] = None if p is None else p.detach().clone()
    dst = named_tensors(swa_model.named_buffers)
    return list({id(d): (d, src[name]) for name, d in dst.items()}.values())


def _group(pairs):
    """Lists of `pairs`, one for each dtype and device: the multi-tensor kernels are fast on uniform
    lists.
    """
    groups = {}
    for d, p in pairs:
        dst, src = groups.setdefault((p.dtype, p.device), ([], []))
        dst.append(d)
        src.append(p)
    return list(groups.values())


_SCRATCH = 2**20  # elements: enough to fill a GPU, few enough for a CPU's outer cache
_SHORT = 2**12  # elements: above it a kernel's work is more than its call
_CACHED = 2**16  # elements: few enough to stay in the inner cache of a CPU's core through several kernels


def _runs(tuples, size=_SCRATCH):
    """Pieces of the tensors in `tuples`, each of tensors of one shape, in lists of at most `size`
    elements or one row together.
    """
    run, n = [], 0
    for tensors in tuples:
        first = tensors[0]
        rows = max(1, size * len(first) // max(1, first.numel())) if first.dim() else 1
        for piece in zip(*(t.detach().split(rows) if t.dim() else (t.detach(),) for t in tensors)):
            if run and n + piece[0].numel() > size:
                yield run
                run, n = [], 0
            run.append(piece)
            n += piece[0].numel()
    if run:
        yield run


def _low_groups(triples):
    """Groups of the pieces of (average, model, master), one for each dtype, device and run; all of
    a device use one scratch.
    """
    kinds, scratch, groups = {}, {}, []
    for triple in triples:
        kinds.setdefault((triple[1].dtype, triple[1].device), []).append(triple)
    runs = [(device, list(map(list, zip(*run)))) for (_, device), tensors in kinds.items() for run in _runs(tensors)]
    for device, (average, _, _) in runs:
        scratch[device] = max(scratch.get(device, 0), sum(t.numel() for t in average))
    scratch = {device: torch.empty(n, device=device) for device, n in scratch.items()}
    for device, (average, model, master) in runs:
        groups.append(_LowGroup(average, model, master, _laid_out(scratch[device], average)))
    return groups


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
    with _Exchange(source, model).out():
        yield


class _Exchange:
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
        _catch_up(self.model)
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
            if name not in own or value is own[name] or not _may_follow(value, own[name]):
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


def all_finite(tensors) -> bool:
    "Whether no tensor holds a NaN or an infinity; one read from each device."
    groups = {}
    for t in tensors:
        if _is_inexact(t) and t.numel():
            groups.setdefault((t.dtype, t.device), []).append(t.detach())
    # the largest magnitude, unlike a sum or a 2-norm, cannot overflow
    return all(math.isfinite(torch.stack(torch._foreach_norm(ts, math.inf)).max().item()) for ts in groups.values())
