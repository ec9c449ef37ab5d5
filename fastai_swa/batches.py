"""The batches of passes aside from training: each sample once, drawn from loaders of their own,
kept where they are the same again and again."""

import copy
import math
import weakref
from functools import partial
from itertools import islice

import torch
from fastai.data.load import DataLoader
from fastai.torch_core import apply
from fastcore.basics import GetAttr
from torch.utils.data import BatchSampler
from torch.utils.data import DataLoader as TorchDataLoader

from .aside import objects_kept
from .walk import LEARNED

__all__ = ['fresh_loader', 'training_loader', 'share', 'FirstBatches', 'KeptBatches']


def training_loader(learn, n_batches):
    "The training set, or `n_batches` of it, each sample once."
    dl = _each_once(fresh_loader(learn.dls.train, drop_last=False))
    return dl if n_batches is None else FirstBatches(dl, n_batches)


class FirstBatches(GetAttr):
    "The first `n` batches of a loader."

    _default = 'dl'  # whose attributes it has

    def __init__(self, dl, n):
        self.dl, self.n = dl, n

    def __len__(self):
        return min(len(self.dl), self.n)

    def __iter__(self):
        return islice(iter(self.dl), self.n)


def _each_once(dl):
    # fastai's weighted loaders repeat and omit samples
    if hasattr(dl, 'wgts'):
        dl.get_idxs = partial(DataLoader.get_idxs, dl)
    return dl


# fastai's loader -> what it found out about its batches in a pass; for training it does so again
_learned = weakref.WeakKeyDictionary()


def share(dl, processes, n_batches):
    """Of the samples of `dl`, fastai's loader for several processes, those of this one: each sample
    once, where `dl` itself repeats some.
    """
    inner = _each_once(fresh_loader(dl.dl, drop_last=False))
    idxs = processes.first(lambda: list(inner.get_idxs()))  # shuffled, in one order for all
    low, high = (len(idxs) * r // processes.size for r in (processes.rank, processes.rank + 1))
    mine = idxs[low:high][: None if n_batches is None else n_batches * dl.bs]

    class Share(type(dl)):  # the learner would distribute any other loader once more
        def get_idxs(self):
            return mine

        def __len__(self):
            return math.ceil(len(mine) / self.bs)

    return Share(inner, dl.rank, dl.world_size, dl.device)


def fresh_loader(dl, processes=None, **kwargs):
    """A loader like `dl`, over the same data; `kwargs` as for fastai's `DataLoader.new`. `dl`
    itself where its class makes none.

    - `processes`: those that go through it together; they agree on the order by it, so that an
      error in one ends that in all.
    """
    if isinstance(dl, DataLoader) and hasattr(dl, 'world_size'):  # fastai's DistributedDL, which has no `new`
        cls = type(dl) if processes is None else _agreeing(type(dl), processes)
        return cls(fresh_loader(dl.dl, **kwargs), dl.rank, dl.world_size, dl.device)
    if isinstance(dl, DataLoader):
        # at its first `new` a loader may send a sample through its transforms: what they draw or count must not depend
        # on whether it is the first
        with objects_kept(dl):
            vars(dl).update(_learned.get(dl, {}))
            try:
                new = dl.new(**kwargs)
            except TypeError:
                return dl  # the constructor of a subclass asks for what `new` does not know
            finally:
                _learned[dl] = {k: vars(dl)[k] for k in LEARNED if k in vars(dl)}
        if dl.n is not None and new.dataset is dl.dataset:
            new.n = dl.n  # `new` forgets that the loader stops early
        return new
    return _fresh_torch_loader(dl, kwargs.get('drop_last')) if isinstance(dl, TorchDataLoader) else dl


def _fresh_torch_loader(dl, drop_last):
    """A copy of a torch loader, with its data set and sampler, but with workers of its own: those
    that persist are training's, and what they count and draw cannot be put back. `drop_last`: as
    for the constructor; `None` leaves it. `dl` itself where it cannot be copied."""
    try:
        new = copy.copy(dl)
    except Exception:
        return dl
    own = vars(new)  # torch refuses to set these
    own.update(_iterator=None, persistent_workers=False)
    if drop_last is not None and dl.drop_last != drop_last:
        own['drop_last'] = drop_last
        if type(dl.batch_sampler) is BatchSampler:
            own['batch_sampler'] = BatchSampler(dl.batch_sampler.sampler, dl.batch_size, drop_last)
    return new


def _agreeing(cls, processes):
    "fastai's loader for several processes, whose order comes from the first one by `processes`."

    class Agreeing(cls):
        def get_idxs(self):
            idxs = list(self.dl.get_idxs())  # drawn in all, as fastai's does
            self._agreed = processes.first(lambda: idxs)
            return super().get_idxs()

        def _broadcast(self, t, rank):
            return self._agreed

    return Agreeing


class KeptBatches(GetAttr):
    """The batches of `make()`, a loader that gives the same ones each time: drawn once and kept, or
    drawn anew if they are more than `_LIMIT` bytes.

    Each pass gets copies of its own.
    """

    _default = 'dl'

    def __init__(self, make):
        self.make = make
        self.dl = make()
        self.batches = []  # `None`: drawn anew for each pass
        n_bytes = 0
        for batch in self.dl:
            size = _n_bytes(batch)
            n_bytes += math.inf if size is None else size
            if n_bytes > _limit(batch):
                self.batches = None
                break
            self.batches.append(batch)

    def __len__(self):
        return len(self.dl if self.batches is None else self.batches)

    def __iter__(self):
        return iter(self.make()) if self.batches is None else map(partial(apply, _copy), self.batches)


_LIMIT = 2**30


def _limit(batch):
    device = next((t.device for t in _leaves(batch) if isinstance(t, torch.Tensor)), None)
    if device is None or device.type != 'cuda':
        return _LIMIT
    return min(_LIMIT, torch.cuda.mem_get_info(device)[0] // 4)


def _leaves(o):
    if isinstance(o, list | tuple):
        return [leaf for v in o for leaf in _leaves(v)]
    return [leaf for v in o.values() for leaf in _leaves(v)] if isinstance(o, dict) else [o]


def _n_bytes(batch) -> int | None:
    "`None` for what cannot be copied as a tensor can."
    leaves = _leaves(batch)
    if not all(isinstance(t, torch.Tensor | bool | int | float | str | None) for t in leaves):
        return None
    return sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))


def _copy(o):
    return o.clone() if isinstance(o, torch.Tensor) else o
