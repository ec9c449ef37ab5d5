"""The average of a fit: the running average itself, what it is of, and how it is written down and read again.

A `SWACallback` holds one; `average=` goes on with one.
"""

import copy
import weakref
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastai.learner import Learner
from torch import nn

from .averaging import WeightAverage, refuse_mismatch
from .batches import Taken
from .batchnorm import following
from .interrupts import uninterrupted
from .modules import MODULES_OWN, clean_copy, named_tensors, plain_data, plain_name, unwrap
from .packing import pack, unpack
from .walk import not_copied
from .weights import read_weights

__all__ = ['FitAverage', 'packed_points', 'weights_with_points']


@dataclass
class FitAverage:
    "A running average, and what it is of."

    running: WeightAverage
    learner: weakref.ref  # of the learner whose weights were averaged
    structure: list  # of the model that `swa_model` is a copy of
    epochs: list = field(default_factory=list)  # with points in it, from 0
    bn: list = field(default_factory=list)  # names of the layers whose statistics follow the weights
    stale: bool = False  # whether these statistics are of other weights
    provisional: bool = False  # whether they are of the part of the training set that does within a fit
    taken: Taken | None = None  # training batches of the epochs of its fit; `None`: not known

    @classmethod
    def begin(cls, learn: Learner, weight, swa_model: nn.Module | None, continued: dict | None) -> 'FitAverage':
        """An average without a point yet, or with those of the one that is gone on with.

        - `swa_model`: what to average into; `None`: a clean copy of the learner's model.
        - `continued`: the `packed_points` of an earlier average.
        """
        model = unwrap(learn.model)
        if swa_model is None:
            swa_model = clean_copy(model, not_copied(learn))
        res = cls(WeightAverage(model, weight, swa_model), weakref.ref(learn), _structure(model))
        if continued is not None:
            res.running.load_state_dict(unpack(continued['state']))
            res.epochs = list(continued['epochs'])
        return res

    def follow(self, model: nn.Module, moved: list):
        """After an epoch with points, take over what else of `model` is theirs: attributes, and which statistics of
        batch norm follow the weights.

        - `moved`: for each process the names of the layers whose statistics training has moved, `None` where it does
          not know.
        """
        self.bn = following(moved, self.bn, model)
        self.running.settle(model)
        self.stale = bool(self.bn)

    def has_structure_of(self, model: nn.Module) -> bool:
        """Is `model` still made as when `swa_model` was copied from it? Training may exchange
        modules, hooks and functions.
        """
        return _structure(model) == self.structure

    def copy_anew(self, learn: Learner, weight):
        "Let `swa_model` be a copy of the learner's model as that is made now, with the same average."
        model = unwrap(learn.model)
        running = WeightAverage(model, weight, clean_copy(model, not_copied(learn)))
        running.load_state_dict(self.running.state_dict())
        running.settle(model)
        structure = _structure(model)
        with uninterrupted():
            self.running = running
            self.structure = structure

    def copied(self, swa_model: nn.Module | None, memo: dict) -> 'FitAverage':
        """A copy, for a deep copy of the callback, or of the learner: then it is an average of the latter's copy.

        - `swa_model`: the copy of what it is averaged into, if that was the user's own; `memo`: as `copy.deepcopy` has
          it.
        """
        source = self.learner()
        learn = memo.get(id(source), source)
        if swa_model is None and (source is None or self.running.is_lent):
            swa_model = clean_copy(self.running.swa_model, () if source is None else not_copied(source))
        elif swa_model is None:
            swa_model = copy.deepcopy(self.running.swa_model, memo)
        structure = self.structure
        if learn is not source:
            model = unwrap(copy.deepcopy(source.model, memo))
            structure = _structure(model) if self.has_structure_of(unwrap(source.model)) else []
        return replace(
            self,
            running=self.running.copied(swa_model),
            learner=self.learner if learn is source else weakref.ref(learn),
            structure=structure,
            epochs=list(self.epochs),
            bn=list(self.bn),
            taken=copy.copy(self.taken),
        )

    # for checkpoints

    def state_dict(self) -> dict:
        "As plain data, without its learner; tensors are live."
        return {
            'average': self._state_of_running(),
            'epochs': list(self.epochs),
            'bn': list(self.bn),
            'stale': self.stale,
            'provisional': self.provisional,
        }

    def load_state_dict(self, state: dict, learn: Learner, taken: Taken | None):
        "Take over a `state_dict`, as an average of `learn`. Raises `ValueError` if it is not one of its model."
        if not all(type(epoch) is int for epoch in state['epochs']):
            raise ValueError(f'the epochs of an average are not {state["epochs"]}')
        self._load_running(state['average'])
        self.learner = weakref.ref(learn)
        self.epochs = list(state['epochs'])
        self.bn = list(state['bn'])
        self.stale = state['stale']
        self.provisional = state.get('provisional', False)  # a file of an earlier version has none
        self.taken = taken

    def _state_of_running(self) -> dict:
        "The running average with all that its module holds."
        swa_model = unwrap(self.running.swa_model)
        in_state_dict = swa_model.state_dict()
        buffers = named_tensors(swa_model.named_buffers)
        return self.running.state_dict() | {
            'buffers': {name: b for name, b in buffers.items() if name not in in_state_dict},
            'training': [m.training for m in swa_model.modules()],
            'attributes': [_packed_attributes(m) for m in swa_model.modules()],
        }

    def _load_running(self, state: dict):
        self.running.load_state_dict(state)
        swa_model = unwrap(self.running.swa_model)
        own = named_tensors(swa_model.named_buffers)
        for name, value in state['buffers'].items():
            if name in own:
                own[name].data = value.to(own[name].device, copy=True)
        for m, mode in zip(swa_model.modules(), state['training']):
            m.training = mode
        for m, attributes in zip(swa_model.modules(), state.get('attributes', ())):
            data = {name: unpack(value) for name, value in attributes.items() if not _is_made(m, name)}
            vars(m).update(data)


def _structure(model) -> list:
    """What a copy of `model` has from the time that it was made: the classes of its modules, their
    hooks, and forwards of their own."""
    res = []
    for name, m in model.named_modules():
        hooks = [*m._forward_pre_hooks.values(), *m._forward_hooks.values()]
        res.append((name, type(m), [id(hook) for hook in hooks], id(vars(m).get('forward'))))
    return res


def _packed_attributes(module) -> dict:
    "What `module` has in plain attributes, but for what no file can hold."
    res = {}
    for name, value in plain_data(module).items():
        with suppress(TypeError, ValueError):
            packed = pack(value)
            unpack(packed)  # what is made anew from an object that is there is left out
            res[name] = packed
    return res


def _is_made(module, name) -> bool:
    "Is `name` a method of the `module`, or one of PyTorch's own attributes, which no file changes?"
    return name in MODULES_OWN or callable(getattr(type(module), name, None))


# files of weights that say what they are the average of, in what torch keeps beside them for each module

_POINTS = 'fastai_swa'


def weights_with_points(swa_model: nn.Module, n_averaged: int, epochs: list) -> dict:
    "The weights of `swa_model`, with the number of their points and the epochs these are of."
    weights = unwrap(swa_model).state_dict()
    if '' not in getattr(weights, '_metadata', {}):  # of a model that makes its own
        weights = OrderedDict(weights)
        weights._metadata = OrderedDict({'': {}})
    weights._metadata[''][_POINTS] = {'n_averaged': n_averaged, 'epochs': epochs}
    return weights


# going on with an average


def packed_points(average: FitAverage | Path, model: nn.Module) -> dict:
    """The points of an average to go on with, or of a file of `weights_with_points`: packed 'state' of the running
    average, and the 'epochs' it is of.

    Raises `ValueError` if it is another file, or not an average of `model`.
    """
    if isinstance(average, Path):
        state, epochs = _read_points(average)
    else:
        state, epochs = average.running.state_dict(), list(average.epochs)
    own = {plain_name(k): v for k, v in unwrap(model).state_dict().items()}
    refuse_mismatch('average', state['swa_model'], own)
    return {'state': pack(state), 'epochs': epochs}


def _read_points(path) -> tuple[dict, list]:
    weights = read_weights(path)
    points = getattr(weights, '_metadata', {}).get('', {}).get(_POINTS)
    if points is None:
        raise ValueError(
            f'{path} does not say of how many points it is the average: it was not written by SaveSWAModelCallback'
        )
    state = {'swa_model': weights, 'n_averaged': points['n_averaged'], 'master': {}}
    return state, list(points['epochs'])
