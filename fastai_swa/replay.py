"""Iterators, generators and open files: what is used up when it is gone through, and how what was
taken from one can be given again."""

import io
import itertools
import random
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from types import GeneratorType

import numpy as np
import torch
from fastcore.basics import GetAttr
from torch.utils import data

from .contents import is_foreign, namespace

__all__ = ['Replay', 'is_replayable', 'is_used_up']


class Replay(GetAttr):
    """Stands for an iterator `inner`: what is taken from it between `begin` and `rewind` is given
    once more after that.
    """

    _default = 'inner'  # whose attributes it has

    def __init__(self, inner):
        self.inner = inner
        self.pending = deque()  # taken from `inner`, to be given again
        self.taken = []  # what was taken since each `begin`; they may be nested
        self.draws = False  # whether it has drawn from a library's generator for something that is given twice

    def begin(self):
        self.taken.append([])

    def rewind(self) -> bool:
        "Does it differ from `inner` now?"
        self.pending.extendleft(reversed(self.taken.pop()))
        return bool(self.pending or self.taken)

    def __iter__(self):
        return self

    def __next__(self):
        if self.pending:
            value = self.pending.popleft()
        elif not self.taken:
            return next(self.inner)
        else:
            before = _drawn()
            value = next(self.inner)
            self.draws |= _drawn() != before
        if self.taken:
            self.taken[-1].append(value)
        return value


def _drawn() -> tuple:
    "What differs once a library's generator was drawn from."
    _, keys, *place = np.random.get_state()  # noqa: NPY002
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), keys.tobytes(), place


def is_replayable(v) -> bool:
    "Can a `Replay` stand for it, or does one already?"
    return isinstance(v, Replay) or is_used_up(v) and not isinstance(v, io.IOBase | data.dataloader._BaseDataLoaderIter)


@lru_cache(5000)
def _may_be_used_up(cls) -> bool:
    return issubclass(cls, (Iterator, io.IOBase, data.dataloader._BaseDataLoaderIter))


def is_used_up(v) -> bool:
    "Is it gone when it was gone through, and can it not be put back?"
    if not _may_be_used_up(type(v)):
        return False
    if isinstance(v, io.IOBase):
        return not _has_position(v)
    if isinstance(v, GeneratorType):
        return True
    # an iterator of a user's class counts in attributes, which are put back
    is_built_in = isinstance(v, Iterator) and not namespace(v) and is_foreign(type(v))
    return is_built_in and not isinstance(v, itertools.repeat) or isinstance(v, data.dataloader._BaseDataLoaderIter)


def _has_position(f) -> bool:
    try:
        f.tell()
        return True
    except (OSError, ValueError):
        return f.closed or f.seekable()  # the latter: while it is read line by line
