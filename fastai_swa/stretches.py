"""The means of the weights over consecutive stretches of a fit: kept in memory or in a folder, merged
where there are too many, and summed. Plain PyTorch, no learner.

In a folder each mean is a file of its own, and `index.json`, which is written last, says what they are. So whatever
ends the program, the folder is what its index says.
"""

import json
import math
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .files import parsed, save_weights, write_text
from .weightings import Cuts, Segment
from .weights import indexed_files, is_plain_name, read_weights, refuse_nan, sha256

__all__ = ['Stretch', 'Stretches', 'FoldersIndex', 'Remains', 'remains', 'read_history', 'is_count', 'LAST']

_FORMAT = 'fastai_swa history 1'
_INDEX = 'index.json'
LAST = 'last.pth'
_CACHED = 2**31  # bytes
_FIELDS = 'n', 'wanted', 'ends_epoch', 'file', 'sha256', 'is_lost'  # of a `Stretch`, as files have them


@dataclass
class Stretch(Segment):
    "A segment, with its mean."

    mean: dict | None = None  # name -> tensor in the host's memory; None: in `file`
    file: str | None = None  # its name within the folder, once it has one
    sha256: str | None = None  # of that file
    is_lost: bool = False  # was its mean not finite?

    def record(self) -> dict:
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_record(cls, record: dict, mean: dict | None = None) -> 'Stretch':
        "Raises `ValueError`, `KeyError` or `TypeError` if it is none."
        res = cls(**{name: record[name] for name in _FIELDS}, mean=mean)
        has_file = _is_file_name(res.file) and _is_hash(res.sha256)
        if not (has_file or res.file is None and res.sha256 is None and (res.is_lost or mean is not None)):
            raise ValueError('a segment without a file of its own folder')
        if mean is not None and not (
            isinstance(mean, dict) and all(isinstance(t, torch.Tensor) for t in mean.values())
        ):
            raise ValueError('a mean that holds no tensors')
        is_right = is_count(res.n) and res.n > 0 and type(res.wanted) in (int, float) and math.isfinite(res.wanted)
        if not is_right or type(res.ends_epoch) is not bool or type(res.is_lost) is not bool:
            raise ValueError('a segment without points')
        return res


@dataclass
class Stretches:
    """The segments of one fit, in their order.

    - `folder`: for the files; `None`: all stay in memory.
    - `dtype`: of the stored means; `None`: that of the tensors given.
    - `keeps_means`: `False`: another process has them, and here only the borders are known.
    """

    cuts: Cuts
    folder: Path | None = None
    dtype: torch.dtype | None = None
    keeps_means: bool = True
    segments: list[Stretch] = field(default_factory=list)
    n_named: int = 0  # file names given out so far: none is given twice
    superseded: list[str] = field(default_factory=list)  # files whose segments were merged; a checkpoint may name them
    cache: dict | None = None  # file -> what is in it, within `cached`

    @property
    def ends(self) -> np.ndarray:
        "Of each segment, the number of points up to its end."
        return np.cumsum([s.n for s in self.segments], dtype=int)

    @property
    def n_points(self) -> int:
        return sum(s.n for s in self.segments)

    @property
    def n_in_memory(self) -> int:
        return sum(s.mean is not None for s in self.segments)

    @property
    def n_bytes_in_memory(self) -> int:
        return sum(_n_bytes(s.mean) for s in self.segments if s.mean is not None)

    # taking segments in

    def add(self, segment: Segment, mean: dict | None) -> bool:
        """Take a `segment` in, with its `mean`, name -> tensor in the host's memory; then segments are merged until
        none is too many. Was the mean finite, as it is stored? One that is not, or is `None`, is left out.
        """
        stored = None if mean is None else _stored(mean, self.dtype)
        is_finite = stored is not None and all(bool(t.isfinite().all()) for t in stored.values())
        new = Stretch(segment.n, segment.wanted, segment.ends_epoch, is_lost=not is_finite)
        if is_finite and self.keeps_means:
            new.mean = stored
        self.segments.append(new)
        self._merge_down()
        return is_finite

    def _merge_down(self):
        while (i := self.cuts.merging(self.segments)) is not None:
            self.segments[i : i + 2] = [self._merged(*self.segments[i : i + 2])]

    def _merged(self, a: Stretch, b: Stretch) -> Stretch:
        "One segment of two neighbours, weighted by their points. Where one is lost, the other stands for both."
        res = Stretch(a.n + b.n, a.wanted + b.wanted, b.ends_epoch)
        usable = [s for s in (a, b) if not s.is_lost]
        if usable and self.keeps_means:
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
        mean = self.read(segment.file, segment.sha256)
        refuse_nan(mean, self.folder / segment.file)
        return mean

    def read(self, name: str, expected: str) -> dict:
        """The weights in the file `name` of the folder, whose SHA-256 is `expected`. Raises as `mean_of`."""
        if self.cache is not None and name in self.cache:
            return self.cache[name]
        [file] = indexed_files(self.folder, {'files': [name], 'sha256': [expected]})
        res = read_weights(file)
        if self.cache is not None and sum(map(_n_bytes, self.cache.values())) < _CACHED:
            self.cache[name] = res
        return res

    def faults(self) -> dict:
        "Segment's number -> what is wrong with its file, of those that cannot be read."
        res = {}
        for i, segment in enumerate(self.segments):
            try:
                if not segment.is_lost:
                    self.mean_of(segment)
            except (FileNotFoundError, ValueError) as e:
                res[i] = str(e)
        return res

    @contextmanager
    def cached(self):
        "Within this context what was read stays in memory, up to 2 GB."
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
            self.n_named += 1
            name = f'segment-{self.n_named:04}.pth'
            save_weights(self.folder / name, segment.mean)
            segment.sha256 = sha256(self.folder / name)
            segment.file = name
            segment.mean = None

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
        "Take over a `state_dict`. Raises `ValueError` if a file that it names is missing, or if it is none."
        segments = [Stretch.from_record(s, s['mean']) for s in state['segments']]
        if not is_count(state['n_named']) or not all(map(_is_file_name, state['superseded'])):
            raise ValueError('names of files that are none')
        if self.keeps_means:
            for s in segments:
                if s.file is not None and not (self.folder / s.file).is_file():
                    raise ValueError(f'{self.folder / s.file} is missing: this fit wrote it before it was interrupted')
        self.segments = segments
        self.n_named = state['n_named']
        self.superseded = list(state['superseded'])


# the folder's index


@dataclass
class FoldersIndex:
    "What `index.json` says of a fit, beside its segments."

    id: str  # of the fit
    every: int  # optimizer steps from one point to the next
    n_segments: int  # at most
    n_epoch: int  # of the fit
    n_steps: int = 0  # optimizer steps taken
    epochs: list = field(default_factory=list)  # pairs: the number of an epoch, and the points up to its end
    bn: list = field(default_factory=list)  # names of the layers whose statistics follow the weights
    taken: list = field(default_factory=lambda: [0, False])  # of the training set by its epochs: `batches.Taken`
    validated: list = field(default_factory=lambda: [0, False])  # of the validation set by its validations
    last: str | None = None  # SHA-256 of the file of the last weights, once the fit is over

    def state_dict(self) -> dict:
        "Without what the fit was given."
        return {name: value for name, value in vars(self).items() if name in _CHECKS}

    def load_state_dict(self, state: dict):
        "Raises `ValueError` or `KeyError` if it is none."
        for name, is_right in _CHECKS.items():
            if not is_right(state[name]):
                raise ValueError(f'{name!r} is {str(state[name])[:50]}')
        vars(self).update({name: state[name] for name in _CHECKS})

    def write(self, stretches: Stretches):
        """Write the index of the folder of `stretches`: of their means those that are in files, up to the first one
        that is not. Raises `OSError`.
        """
        segments = []
        for s in stretches.segments:
            if s.mean is not None:
                break
            segments.append(s.record())
        text = json.dumps({'format': _FORMAT, **vars(self), 'segments': segments}, indent=1, allow_nan=False)
        write_text(stretches.folder / _INDEX, text)

    def write_last(self, stretches: Stretches, weights: dict):
        "Write the last weights, and the index that names them. Raises `OSError`."
        file = stretches.folder / LAST
        save_weights(file, weights)
        self.last = sha256(file)
        self.write(stretches)


def is_count(o) -> bool:
    return type(o) is int and o >= 0


def _is_hash(o) -> bool:
    return type(o) is str and re.fullmatch('[0-9a-f]{64}', o) is not None


def _are_epochs(o) -> bool:
    "Pairs of numbers, none of which falls?"
    if type(o) is not list or not all(type(pair) is list and len(pair) == 2 for pair in o):
        return False
    if not all(is_count(n) for pair in o for n in pair):
        return False
    return all(a[0] < b[0] and a[1] <= b[1] for a, b in zip(o, o[1:]))


def _is_taken(o) -> bool:
    return type(o) is list and len(o) == 2 and is_count(o[0]) and type(o[1]) is bool


_CHECKS = {  # of the fields of an index that are state
    'id': lambda o: type(o) is str and re.fullmatch('[0-9a-f]{16}', o) is not None,
    'n_steps': is_count,
    'epochs': _are_epochs,
    'bn': lambda o: type(o) is list and all(type(name) is str for name in o),
    'taken': _is_taken,
    'validated': _is_taken,
    'last': lambda o: o is None or _is_hash(o),
}


def _is_file_name(o) -> bool:
    return type(o) is str and is_plain_name(o)


@dataclass
class Remains:
    "What a folder holds before a fit writes to it."

    id: str | None  # of the fit whose history it is; `None`: there is no index that can be read
    files: list[str]  # those that a history may have written

    @property
    def is_history_of_nothing(self) -> bool:
        "A fit that ended before its first segment has left no more than an index."
        return self.id is not None and self.files == [_INDEX]

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


def read_history(folder: Path) -> tuple[FoldersIndex, Stretches]:
    """What is in the folder of a history. Raises `FileNotFoundError` or `ValueError`, naming it, if there is no index
    that can be read; the segments' files are looked at when they are used.
    """
    file = folder / _INDEX
    if not file.exists():
        raise FileNotFoundError(f'{folder} has no {_INDEX}: it is no folder of a WeightHistory')
    try:
        content = parsed(file.read_text(), only_finite=True)
        return _history_of(content, folder)
    except (ValueError, TypeError, KeyError, AttributeError, IsADirectoryError) as e:
        raise ValueError(f'{file} is damaged, or it is no index of a WeightHistory ({_first_line(e)})') from None


def _history_of(content: dict, folder: Path) -> tuple[FoldersIndex, Stretches]:
    "Raises an error if `content` is no index."
    if content['format'] != _FORMAT:
        raise ValueError('it is of another format')
    settings = [content[name] for name in ('every', 'n_segments', 'n_epoch')]
    if not all(is_count(n) and n > 0 for n in settings):
        raise ValueError('its counts are none')
    index = FoldersIndex(content['id'], *settings)
    index.load_state_dict(content)
    segments = [Stretch.from_record(s) for s in content['segments']]
    names = [s.file for s in segments if s.file is not None]
    if len(set(names)) < len(names):
        raise ValueError('it names a file twice')
    return index, Stretches(Cuts(index.n_segments, index.n_epoch, None), folder, segments=segments)


def _stored(mean: dict, dtype) -> dict:
    "The tensors as they are stored: in `dtype`, if they are floats."
    if dtype is None:
        return mean
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in mean.items()}


def _n_bytes(mean: dict) -> int:
    return sum(t.numel() * t.element_size() for t in mean.values() if isinstance(t, torch.Tensor))


def _first_line(e) -> str:
    return f'{type(e).__name__}: {e}'.split('\n')[0][:100]
