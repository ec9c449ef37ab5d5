"""Have two data sets samples in common? What a model was trained on is known again by what data
sets are made from."""

from numbers import Number
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

from .aside import objects_kept

__all__ = ['Samples', 'Overlaps', 'in_common', 'length']

_N_LOOKED_AT = 8  # samples that are loaded to see whether equal numbers mean equal samples
_N_ROWS = 1000  # of frames, likewise
_N_VALUES = 64  # of a tensor, by which it is told from others
_FEW = 0.01  # share of samples that data sets have in common by chance: images do occur twice
_DISTINCT = 0.95  # share of different samples from which on equal ones are no chance
_ALIKE = 0.9  # least correlation of a column with itself, normalised or encoded in another way


class Samples:
    """What the samples of a data set can be known by.

    - Proofs: files and texts, the objects in a list, the memory of tensors and arrays, a place in a
      data set that `Subset`s share.
    - Labels: numbers, such as the items of `Datasets(range(n))`, and the index of a data frame.
      They mean the same samples only where the source is the same, which is seen by looking at a
      few samples with equal labels.
    - Contents: values of tensors that are held in memory, for copies such as
      `TensorDataset(x[train], y[train])`. They count where the samples of both sets differ from
      each other, and where more than a hundredth is in common.

    A stream, and a set whose samples are made as they are read, are known as a whole only.
    """

    def __init__(self, data):
        self.data = data
        self.base, self.places = _base(data)  # the set inside `Subset`s, and which of its samples these are
        self.items = _items(self.base)
        self.proofs = {}  # proof -> position
        self.labels = {}  # label -> position
        self._contents = None
        if self.is_frame:
            labels = self.items.index[self.places].tolist()
            self.labels = {label: i for i, label in enumerate(labels)}
        elif self.items is not None:
            self._read_items()

    def __len__(self):
        return len(self.places)

    @property
    def is_frame(self) -> bool:
        return hasattr(self.items, 'iloc')

    def _read_items(self):
        for i, place in enumerate(self.places):
            kind, key = _key(self.items[place])
            known = {'proof': self.proofs, 'label': self.labels}.get(kind)
            if known is not None:
                known[key] = i

    def sample(self, i: int):
        return self.base[self.places[i]]

    def rows(self, positions):
        return self.items.iloc[[self.places[i] for i in positions]]

    @property
    def contents(self) -> dict:
        """Values of a sample -> its position; empty where samples are not in memory, or too many of
        them are equal.
        """
        if self._contents is None:
            are_numbers = bool(self.labels) and not self.is_frame  # then the samples are somewhere else
            keys = [] if are_numbers else _row_keys(self.base, self.items, self.places)
            found = {key: i for i, key in enumerate(keys) if key is not None}
            self._contents = found if len(found) >= _DISTINCT * max(1, len(keys)) else {}
        return self._contents


def in_common(a: Samples, b: Samples) -> list[int]:
    """The positions of those samples of `a` that are in `b`, too. Data sets and random generators
    stay as they were.
    """
    if a.base is b.base:
        places = set(b.places)
        return [i for i, place in enumerate(a.places) if place in places]
    proven = [i for key, i in a.proofs.items() if key in b.proofs]
    if proven:
        return sorted(proven)
    pairs = [(i, b.labels[label]) for label, i in a.labels.items() if label in b.labels]
    if pairs and _same_source(a, b, pairs):
        return sorted(i for i, _ in pairs)
    equal = [i for key, i in a.contents.items() if key in b.contents]
    return sorted(equal) if len(equal) > _FEW * len(a) else []


class Overlaps:
    "Which samples of a data set are in others; what is known of these is kept."

    def __init__(self):
        self._known = {}  # id of a data set -> its Samples, which keep the data set and so its id

    def count(self, scored, sets) -> tuple[int, int]:
        """How many samples of the data set `scored` are in some of the data `sets`, and in how many
        of these some are; of what is `None` nothing is known.
        """
        found, n_sets = set(), 0
        if scored is None:
            return 0, 0
        for data in sets:
            if data is None:
                continue
            common = in_common(self._samples(scored, keep=False), self._samples(data, keep=True))
            found.update(common)
            n_sets += bool(common)
        return len(found), n_sets

    def _samples(self, data, keep) -> Samples:
        known = self._known.get(id(data))
        if known is not None and known.data is data and len(known) == length(data):
            return known
        samples = Samples(data)
        if keep:
            self._known[id(data)] = samples
        return samples


def length(data) -> int | None:
    return len(data) if hasattr(data, '__len__') else None


def _base(data):
    places = None
    while isinstance(data, Subset):
        indices = [int(i) for i in data.indices]
        places = indices if places is None else [indices[i] for i in places]
        data = data.dataset
    if places is None:
        places = range(len(data)) if hasattr(data, '__len__') and hasattr(data, '__getitem__') else []
    return data, places


def _items(base):
    "What a data set makes its samples from, one for each, if it has such."
    is_frame = hasattr(base, 'iloc') and hasattr(base, 'columns')
    if is_frame or isinstance(base, list | tuple | range | np.ndarray | torch.Tensor):
        return base
    items = getattr(base, 'items', None)
    if items is None or callable(items) or not hasattr(items, '__getitem__') or len(items) != len(base):
        return None
    return items


def _key(item):
    "Whether an item proves which sample it is, or only labels it, and how."
    if isinstance(item, str | Path):
        return 'proof', str(item)
    if isinstance(item, torch.Tensor | np.ndarray) and item.ndim == 0 or isinstance(item, np.generic):
        item = item.item()
    if isinstance(item, Number):
        return 'label', item
    if isinstance(item, torch.Tensor):
        return 'proof', ('memory', item.data_ptr(), tuple(item.shape), item.stride())
    if isinstance(item, np.ndarray):
        return 'proof', ('memory', item.__array_interface__['data'][0], item.shape, item.strides)
    if type(item) in (tuple, list) and item:
        kinds, keys = zip(*map(_key, item))
        if None in kinds:
            return 'proof', ('object', id(item))
        return 'proof' if 'proof' in kinds else 'label', keys
    if item is None:
        return None, None
    return 'proof', ('object', id(item))


def _same_source(a, b, pairs) -> bool:
    """Do equal labels stand for equal samples? `pairs`: positions in `a` and `b` of samples with
    equal labels.
    """
    if a.is_frame and b.is_frame:
        pairs = pairs[:_N_ROWS]
        return _frames_agree(a.rows([i for i, _ in pairs]), b.rows([j for _, j in pairs]))
    if a.is_frame or b.is_frame:
        return False
    looked_at = pairs[:: max(1, len(pairs) // _N_LOOKED_AT)][:_N_LOOKED_AT]
    try:
        with objects_kept(a.base, b.base):
            n_equal = sum(_equal(a.sample(i), b.sample(j)) for i, j in looked_at)
    except Exception:  # samples that cannot be loaded are not known
        return False
    return 2 * n_equal >= len(looked_at)  # some may be augmented at random


def _equal(a, b) -> bool:
    "Is the one sample the other? Where one has no target, what both have counts."
    if type(a) in (tuple, list) and type(b) in (tuple, list):
        return bool(a) and bool(b) and all(map(_equal, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool((a.detach().cpu() == b.detach().cpu()).all())
    if isinstance(a, str | Number):
        return a == b
    a, b = np.asarray(a), np.asarray(b)  # PIL's images as well
    return a.dtype != object and np.array_equal(a, b)


def _frames_agree(a, b) -> bool:
    """Are the rows of two frames the same, in their order? Each may be normalised and encoded by
    statistics of its own, as fastai does it, so that a column need not equal the other, but go
    along with it."""
    names = [c for c in a.columns if c in b.columns]
    n_told_apart = 0  # columns that could have differed
    all_equal = bool(names)
    for name in names:
        u, v = a[name].reset_index(drop=True), b[name].reset_index(drop=True)
        if u.astype(str).equals(v.astype(str)):
            n_told_apart += u.astype(str).nunique() > 1
            continue
        all_equal = False
        try:
            u, v = u.astype(float), v.astype(float)
        except (TypeError, ValueError):  # texts
            return False
        both = np.isfinite(u) & np.isfinite(v)
        u, v = u[both], v[both]
        if len(u) < 3:
            return False
        if not u.std() or not v.std():
            continue
        if not np.corrcoef(u, v)[0, 1] > _ALIKE:
            return False
        n_told_apart += 1
    return n_told_apart > 0 or len(a) < 3 and all_equal


def _row_keys(base, items, places) -> list:
    "Values of each sample, `None` where they are not in memory."
    if hasattr(items, 'iloc'):
        from pandas.util import hash_pandas_object

        try:
            return hash_pandas_object(items.iloc[list(places)], index=False).tolist()
        except TypeError:  # what is in it cannot be hashed
            return []
    columns = _columns(base)
    if columns:
        keys = [[_values(row) for row in column[torch.as_tensor(list(places))]] for column in columns]
        return list(zip(*keys))
    if items is None:
        return []
    return [_content(items[place]) for place in places]


def _columns(base) -> list:
    "Tensors and arrays of a value for each sample, which a data set holds."
    held = getattr(base, 'tensors', None)
    if held is None:
        held = getattr(base, '__dict__', {}).values()
    return [torch.as_tensor(t) for t in held if _is_of_numbers(t) and t.ndim and len(t) == len(base)]


def _is_of_numbers(o) -> bool:
    return isinstance(o, torch.Tensor) or isinstance(o, np.ndarray) and o.dtype.kind in 'fiub'


def _content(item):
    if isinstance(item, torch.Tensor):
        return _values(item.detach())
    if _is_of_numbers(item):
        return _values(torch.as_tensor(item))
    if type(item) in (tuple, list):
        contents = tuple(map(_content, item))
        return None if None in contents else contents
    return item if isinstance(item, Number) else None


def _values(t):
    flat = t.flatten()
    step = max(1, len(flat) // _N_VALUES)
    return tuple(t.shape), tuple(flat[::step][:_N_VALUES].tolist())
