"The running average of a model's weights."

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real

import torch
from torch import nn

from ..checks import listed
from ..interrupts import uninterrupted
from ..modules import (
    away_from_training,
    clean_copy,
    in_train_mode,
    named_tensors,
    plain_name,
    to_train_form,
    unwrap,
    written_in_train_mode,
)
from ..warn import warn
from ..weights import NoSolution
from .links import Link
from .tensors import catch_up, is_low, refuse_mismatch
from .weight import check_weight, equal

__all__ = ['WeightAverage', 'check_swa_model', 'BLOCK']


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

    - `model`: the module in training; compiled and data-parallel ones are seen through,
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
        self._linked = None  # the Link to the model folded last
        self._exchange = None  # the Exchange of the latest lending
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
            self._linked = Link(model, unwrap(self._swa_model), self._master)
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
            catch_up(link.model)
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
