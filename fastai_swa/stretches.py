"""The means of the weights over consecutive stretches of a fit: kept in memory or in a folder, merged
where there are too many, and summed. Plain PyTorch, no learner.

In a folder each mean is a file of its own, and `index.json`, which is written last, says what they are. So whatever
ends the program, the folder is what its index says.
"""

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .files import save_weights, write_text
from .weightings import Cuts, Segment
from .weights import read_weights, sha256

__all__ = ['Stretch', 'Stretches', 'FoldersIndex', 'Remains', 'remains', 'read_history', 'read_last', 'LAST']

_FORMAT = 'fastai_swa history 1'
_INDEX = 'index.json'
LAST = 'last.pth'
_CACHED = 2**31  # bytes
_FIELDS = 'n', 'wanted', 'ends_epoch', 'file', 'sha256', 'is_lost'  # of a `Stretch`, as the index has them


@dataclass
class Stretch(Segment):
    "A segment, with its mean."

    mean: dict | None = None  # name -> tensor in the host's memory; None: in `file`
    file: str | None = None  # its name within the folder, once it has one
    sha256: str | None = None  # of that file, once it is written
    is_lost: bool = False  # was its mean not finite?

    def record(self) -> dict:
        return {name: getattr(self, name) for name in _FIELDS}


@dataclass
class Stretches:
    """The segments of one fit, in their order.

    - `folder`: for the files; `None`: all stay in memory.
    - `dtype`: of the stored means; `None`: that of the tensors given.
    """

    cuts: Cuts
    folder: Path | None = None
    dtype: torch.dtype | None = None
    segments: list[Stretch] = field(default_factory=list)
    n_named: int = 0  # file names given out so far: none is given twice
    superseded: list[str] = field(default_factory=list)  # files whose segments were merged; a checkpoint may name them
    cache: dict | None = None  # file -> its mean, within `cached`

    @property
    def ends(self) -> np.ndarray:
        "Of each segment, the number of points up to its end."
        return np.cumsum([s.n for s in self.segments], dtype=int)

    @property
    def n_points(self) -> int:
        return sum(s.n for s in self.segments)

    @property
    def n_bytes_in_memory(self) -> int:
        return sum(_n_bytes(s.mean) for s in self.segments if s.mean is not None)

    # taking segments in

    def add(self, segment: Segment, mean: dict | None):
        """Take a `segment` in, with its `mean`, name -> tensor in the host's memory; `None`: it is not finite. Then
        segments are merged until none is too many.
        """
        new = Stretch(segment.n, segment.wanted, segment.ends_epoch, is_lost=mean is None)
        if mean is not None:
            new.mean = _stored(mean, self.dtype)
        self.segments.append(new)
        self._merge_down()

    def _merge_down(self):
        while (i := self.cuts.merging(self.segments)) is not None:
            self.segments[i : i + 2] = [self._merged(*self.segments[i : i + 2])]

    def _merged(self, a: Stretch, b: Stretch) -> Stretch:
        "One segment of two neighbours, weighted by their points. Where one is lost, the other stands for both."
        res = Stretch(a.n + b.n, a.wanted + b.wanted, b.ends_epoch)
        usable = [s for s in (a, b) if not s.is_lost]
        if usable:
            shares = np.array([s.n for s in usable]) / sum(s.n for s in usable)
            res.mean = self._sum(usable, shares)
        res.is_lost = not usable
        self.superseded += [s.file for s in (a, b) if s.file is not None]
        return res

    # sums

    def mean_of(self, segment: Stretch) -> dict:
        """The mean of a `segment`, name -> tensor. Raises `FileNotFoundError` or `ValueError`, naming its file, if that
        is missing or not what was written.
        """
        if segment.mean is not None:
            return segment.mean
        if self.cache is not None and segment.file in self.cache:
            return self.cache[segment.file]
        mean = _checked_weights(self.folder / segment.file, segment.sha256)
        if self.cache is not None and sum(map(_n_bytes, self.cache.values())) < _CACHED:
            self.cache[segment.file] = mean
        return mean

    @contextmanager
    def cached(self):
        "Within this context means that were read stay in memory, up to 2 GB."
        self.cache = {}
        try:
            yield
        finally:
            self.cache = None

    def average(self, shares: np.ndarray, dtypes: dict) -> tuple[dict, float]:
        """The sum of the segments' means, each times its share, and how much of the shares was of lost segments.

        What is lost is left out, and the rest is scaled up to 1. Sums are made in float64.

        - `shares`: one for each segment, sum 1; `dtypes`: name -> dtype of the result.

        Raises `ValueError` if nothing is left, and what `mean_of` raises.
        """
        usable = [(s, c) for s, c in zip(self.segments, shares) if not s.is_lost and c != 0]
        left = math.fsum(c for _, c in usable)
        if not left > 0:
            raise ValueError('the weights of this part of the fit were not finite: there is nothing to average')
        total = self._sum([s for s, _ in usable], np.array([c for _, c in usable]) / left)
        return {name: t.to(dtypes.get(name, t.dtype)) for name, t in total.items()}, 1 - left

    def _sum(self, segments: list[Stretch], shares: np.ndarray) -> dict:
        "Sum of means times shares, in float64 where there are several; in the dtype of the first."
        if len(segments) == 1:
            return self.mean_of(segments[0])
        total, dtypes = {}, {}
        for segment, share in zip(segments, shares):
            for name, t in self.mean_of(segment).items():
                wide = torch.complex128 if t.is_complex() else torch.float64
                if name not in total:
                    total[name] = torch.zeros_like(t, dtype=wide)
                    dtypes[name] = t.dtype
                total[name].add_(t.to(wide), alpha=float(share))
        return {name: t.to(dtypes[name]) for name, t in total.items()}

    # the folder

    def write(self):
        "Write what is only in memory. Raises `OSError`; what could not be written stays in memory."
        for segment in self.segments:
            if segment.mean is None:
                continue
            self._name(segment)
            file = self.folder / segment.file
            save_weights(file, segment.mean)
            segment.sha256 = sha256(file)
            segment.mean = None

    def leave_to_first(self):
        "Of several processes the first one writes: what this one has in memory is in the same files."
        for segment in self.segments:
            if segment.mean is not None:
                self._name(segment)
                segment.mean = None

    def _name(self, segment):
        if segment.file is None:
            self.n_named += 1
            segment.file = f'segment-{self.n_named:04}.pth'

    def remove_superseded(self, but=()):
        "Remove the files of segments that were merged, all `but` those of these names."
        kept = set(but)
        for name in self.superseded:
            if name not in kept:
                (self.folder / name).unlink(missing_ok=True)
        self.superseded = [name for name in self.superseded if name in kept]

    # for checkpoints

    def state_dict(self) -> dict:
        "Plain data and tensors."
        segments = [s.record() | {'mean': s.mean} for s in self.segments]
        return {'segments': segments, 'n_named': self.n_named, 'superseded': list(self.superseded)}

    def load_state_dict(self, state: dict):
        """Take over a `state_dict`. Raises `ValueError` if a file that it names is missing."""
        segments = [Stretch(**s) for s in state['segments']]
        for s in segments:
            if s.mean is None and not s.is_lost and not (self.folder / s.file).is_file():
                raise ValueError(f'{self.folder / s.file} is missing: this fit wrote it before it was interrupted')
        self.segments = segments
        self.n_named = state['n_named']
        self.superseded = list(state['superseded'])


@dataclass
class FoldersIndex:
    "What `index.json` says of a fit, beside its segments."

    id: str  # of the fit
    every: int  # optimizer steps from one point to the next
    n_steps: int = 0  # optimizer steps taken
    epochs: list = field(default_factory=list)  # pairs: the number of an epoch, and the points up to its end
    n_segments: int = 32  # at most
    n_epoch: int = 0  # of the fit
    bn: list = field(default_factory=list)  # names of the layers whose statistics follow the weights
    last: str | None = None  # SHA-256 of the file of the last weights, once the fit is over

    def write(self, stretches: Stretches):
        "Write the index of the folder of `stretches`, whose means are in their files. Raises `OSError`."
        segments = [s.record() for s in stretches.segments if s.mean is None]
        text = json.dumps({'format': _FORMAT, **vars(self), 'segments': segments}, indent=1)
        write_text(stretches.folder / _INDEX, text)

    def write_last(self, stretches: Stretches, weights: dict):
        "Write the last weights, and the index that names them. Raises `OSError`."
        file = stretches.folder / LAST
        save_weights(file, weights)
        self.last = sha256(file)
        self.write(stretches)


@dataclass
class Remains:
    "What a folder holds before a fit writes to it."

    id: str | None  # of the fit whose history it is; `None`: there is no index that can be read
    files: list[str]  # those that a history may have written

    def remove(self, folder: Path, but=()):
        "Remove these files, the index first, all `but` those of these names."
        for name in sorted(set(self.files) - set(but), key=lambda name: name != _INDEX):
            (folder / name).unlink(missing_ok=True)


def remains(folder: Path) -> Remains:
    "What is in `folder`."
    if not folder.is_dir():
        return Remains(None, [])
    files = [f.name for f in folder.iterdir() if f.name in (_INDEX, LAST) or f.match('segment-*.pth')]
    try:
        index, _ = read_history(folder)
    except (FileNotFoundError, ValueError):
        return Remains(None, files)
    return Remains(index.id, files)


def read_last(folder: Path, sha256: str) -> dict:
    "The last weights in `folder`. Raises `FileNotFoundError` or `ValueError`, naming the file."
    return _checked_weights(folder / LAST, sha256)


def read_history(folder: Path) -> tuple[FoldersIndex, Stretches]:
    """What is in the folder of a history. Raises `FileNotFoundError` or `ValueError`, naming it, if there is no index
    that can be read; the segments' files are looked at when they are used.
    """
    file = folder / _INDEX
    if not file.exists():
        raise FileNotFoundError(f'{folder} has no {_INDEX}: it is no folder of a WeightHistory')
    try:
        content = json.loads(file.read_text())
        if content.pop('format') != _FORMAT:
            raise ValueError('of another format')
        segments = [Stretch(**{name: s[name] for name in _FIELDS}) for s in content.pop('segments')]
        if not all(s.is_lost or _is_name(s.file) for s in segments):
            raise ValueError('names of other places')
        if not all(type(s.n) is int and s.n > 0 for s in segments):
            raise ValueError('segments without points')
        index = FoldersIndex(**content)
        cuts = Cuts(int(index.n_segments), int(index.n_epoch), None)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ValueError(f'{file} is damaged, or it is no index of a WeightHistory ({_first_line(e)})') from None
    return index, Stretches(cuts, folder, segments=segments)


def _checked_weights(file: Path, expected: str | None) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f'{file} is missing')
    if expected is not None and sha256(file) != expected:  # None: another process wrote it
        raise ValueError(f'{file} is damaged, or it is another file than the one that was written')
    return read_weights(file)


def _is_name(file) -> bool:
    "Is it the name of a file within its folder?"
    return isinstance(file, str) and file not in ('', '.', '..') and Path(file).name == file and '\\' not in file


def _stored(mean: dict, dtype) -> dict:
    "The tensors as they are stored: in `dtype`, if they are floats."
    if dtype is None:
        return mean
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in mean.items()}


def _n_bytes(mean: dict) -> int:
    return sum(t.numel() * t.element_size() for t in mean.values())


def _first_line(e) -> str:
    return f'{type(e).__name__}: {e}'.split('\n')[0][:100]
