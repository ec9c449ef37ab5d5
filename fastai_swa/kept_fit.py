"""What a `WeightHistory` has kept of a fit that is over: any average of its weights."""

import copy
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fastai.learner import Learner

from .stretches import LAST, FoldersIndex, Stretches, read_history
from .warn import warn
from .weightings import Cuts, called, coefficients, missed, weighting
from .weights import weights_of

__all__ = ['KeptFit', 'folder_of_fit']

_FAR = 0.05  # share of an average's way from the last weights, from which on missing it is said


def folder_of_fit(folder: Path, number: int) -> Path:
    "Where the fit of that number, from 1, keeps its files."
    return folder if number == 1 else folder / f'fit-{number}'


@dataclass
class KeptFit:
    "A fit that is over."

    index: FoldersIndex
    stretches: Stretches
    learner: weakref.ref  # of the learner whose weights they are
    last: dict | None = None  # the last weights and buffers, in the host's memory; `None`: in the folder, if anywhere
    has_said_no_end: bool = False

    @classmethod
    def read(cls, folder: Path, learn: weakref.ref) -> tuple['KeptFit', int]:
        """What the latest fit that has written to `folder` has kept, and its number. Raises `FileNotFoundError` or
        `ValueError`, naming it, if there is none that can be read, or it holds nothing.
        """
        index, stretches = read_history(folder)
        number = 1
        while folder_of_fit(folder, number + 1).is_dir():
            later = _read_if_any(folder_of_fit(folder, number + 1))
            if later is None:
                break
            index, stretches = later
            number += 1
        if not stretches.segments:
            raise ValueError(f'{folder} holds no means: its fit ended before the first one')
        return cls(index, stretches, learn), number

    @property
    def came_to_its_end(self) -> bool:
        "`False`: it was killed, and what is kept ends before it."
        return self.last is not None or self.index.last is not None

    @property
    def epochs(self) -> list:
        "Pairs of an epoch's number and the points up to its end, of what is kept."
        n_points = self.stretches.n_points
        return [[number, min(end, n_points)] for number, end in self.index.epochs]

    def last_weights(self) -> dict:
        """Name -> tensor. A fit that was killed has kept none: its last segment stands for them, and the buffers are
        the learner's.
        """
        if self.last is not None:
            return self.last
        if self.index.last is not None:
            return self.stretches.read(LAST, self.index.last)
        if not self.has_said_no_end:
            self.has_said_no_end = True
            warn(
                f'the fit in {self.stretches.folder} did not come to its end: the last mean that it wrote stands for '
                'its last weights, and buffers are those that the learner has now'
            )
        learn = self.learner()
        if learn is None:
            raise RuntimeError('the learner of this history is gone, and with it the buffers of its model')
        usable = [s for s in self.stretches.segments if not s.is_lost]
        own = weights_of(learn.model)
        if not usable:
            return own
        return own | {name: t.to(own[name].dtype) for name, t in self.stretches.mean_of(usable[-1]).items()}

    def weighting(self, which: dict):
        "Of each point: what it weighs in the average."
        return weighting(which, self.stretches.n_points, self.epochs, self.index.every)

    def missed(self, which: dict) -> float:
        return missed(self.weighting(which), self.stretches.ends) if which else 0.0

    def is_near(self, which: dict) -> bool:
        "Can the segments give this average well enough?"
        return self.missed(which) <= _FAR

    def share_of(self, which: dict, segments) -> float:
        "What the `segments` of these numbers weigh in the average."
        if not which:
            return 0.0
        shares = coefficients(self.weighting(which), self.stretches.ends)
        return float(sum(shares[i] for i in segments))

    def average(self, which: dict) -> dict:
        "The state dict of an average; of the last weights for {}. What is missed or was lost of it is said."
        res = dict(self.last_weights())
        if not which:
            return {name: _cloned(t) for name, t in res.items()}
        far = self.missed(which)
        if far > _FAR:
            warn(
                f'{called(which)} is missed by about {100 * far:.0f} % of its way from the last weights: a larger '
                'n_segments keeps more of the fit'
            )
        shares = coefficients(self.weighting(which), self.stretches.ends)
        dtypes = {name: t.dtype for name, t in res.items() if isinstance(t, torch.Tensor)}
        mean, lost = self.stretches.average(shares, dtypes)
        if lost > 1e-9:
            warn(f'{100 * lost:.0f} % of {called(which)} is of weights that were not finite, and left out')
        return {name: _cloned(t) for name, t in (res | mean).items()}

    def copied(self, memo: dict) -> 'KeptFit':
        "A copy, which is of the learner's copy where that is copied with it; `memo`: as `copy.deepcopy` has it."
        source = self.learner()
        learn = memo.get(id(source), source)
        stretches = replace(self.stretches, segments=list(self.stretches.segments))
        of = self.learner if learn is None else weakref.ref(learn)
        return replace(self, index=copy.deepcopy(self.index), stretches=stretches, learner=of)

    # for checkpoints

    def state_dict(self) -> dict:
        index = self.index.state_dict() | {'n_epoch': self.index.n_epoch}
        return {'index': index, 'stretches': self.stretches.state_dict(), 'last': self.last}

    @classmethod
    def from_state(cls, state: dict, every: int, n_segments: int, folder: Path | None, learn: Learner) -> 'KeptFit':
        "Raises `ValueError` or `KeyError` if `state` is none, or a file that it names is missing."
        n_epoch = int(state['index']['n_epoch'])
        index = FoldersIndex('', every, n_segments, n_epoch)
        index.load_state_dict(state['index'])
        stretches = Stretches(Cuts(n_segments, n_epoch, None), folder)
        stretches.load_state_dict(state['stretches'])
        return cls(index, stretches, weakref.ref(learn), state['last'])


def _read_if_any(folder: Path):
    "The history in `folder`, if it has a segment. Raises `ValueError`, naming it, if it is damaged."
    try:
        index, stretches = read_history(folder)
    except FileNotFoundError:  # the fit ended before its first step
        return None
    return (index, stretches) if stretches.segments else None


def _cloned(value):
    return value.clone() if isinstance(value, torch.Tensor) else value
