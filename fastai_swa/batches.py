"""The batches of passes aside from training: each sample once, drawn from loaders of their own,
kept where they are the same again and again."""

import copy
import inspect
import math
import weakref
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from fastai.data.core import TfmdDL
from fastai.data.load import DataLoader
from fastai.torch_core import apply
from fastcore.basics import GetAttr
from torch.utils.data import BatchSampler, sampler
from torch.utils.data import DataLoader as TorchDataLoader

from .aside import objects_kept
from .walk import LEARNED

__all__ = [
    'fresh_loader',
    'training_loader',
    'as_an_epoch',
    'has_validation_set',
    'Taken',
    'share',
    'FirstBatches',
    'KeptBatches',
]


def training_loader(learn, n_batches, taken=None):
    "The training set `as_an_epoch` takes it, or `n_batches` of it, each sample once."
    dl = _each_once(fresh_loader(learn.dls.train, drop_last=False))
    return as_an_epoch(dl, taken) if n_batches is None else FirstBatches(dl, n_batches)


def batches_for(learn, n_samples: int, n_processes: int, taken=None) -> int | None:
    """How many first batches of the training set hold `n_samples`, for each of the processes; `None` where it has fewer
    than four times as many, or where its loader does not say how large its batches are.
    """
    dl = learn.dls.train
    bs = getattr(dl, 'bs', None) or getattr(dl, 'batch_size', None)
    if not bs:
        return None
    inner = getattr(dl, 'dl', dl) if hasattr(dl, 'world_size') else dl
    n = bs * (len(as_an_epoch(inner, taken)) + 1)  # or less: the last batch may be left out
    n = min(n, getattr(inner, 'n', None) or n)
    return None if n < 4 * n_samples else math.ceil(n_samples / (bs * n_processes))


@dataclass
class Taken:
    "What epochs of a fit took from a loader."

    n: int = 0  # batches, in the longest
    reached_end: bool = False  # did one go on until the loader ended?

    def add(self, n: int, was_cut: bool):
        self.n = max(self.n, n)
        self.reached_end |= not was_cut


def has_validation_set(learn) -> bool:
    "Has `learn` samples to validate on?"
    return len(learn.dls.loaders) > 1 and len(learn.dls.valid) > 0


def as_an_epoch(dl, taken: Taken | None = None):
    """`dl`, but no more of it than an epoch takes, if it may be a stream without an end.

    - `taken`: by the epochs that were seen. Where these were all cut short, it is what the longest
      took; else what the length of `dl` says.
    """
    if _surely_ends(dl):
        return dl
    if taken is None or not taken.n:
        return FirstBatches(dl, len(dl))
    return FirstBatches(dl, max(taken.n, len(dl)) if taken.reached_end else taken.n)


def _surely_ends(dl) -> bool:
    "Does it follow from what `dl` is that it ends? A length says nothing: a stream must have one to be trained on."
    if isinstance(dl, DataLoader):
        return hasattr(dl, 'world_size') or dl.n is not None  # it has so many indices
    if not isinstance(dl, TorchDataLoader):
        return False
    samplers = [s for s in (dl.sampler, dl.batch_sampler) if s is not None]
    return all(type(s).__module__ == sampler.__name__ for s in samplers)  # torch's own for a stream is elsewhere


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

    return _with_settings(Share(inner, dl.rank, dl.world_size, dl.device), dl)


def fresh_loader(dl, processes=None, **kwargs):
    """A loader like `dl`, over the same data; `kwargs` as for fastai's `DataLoader.new`. `dl`
    itself where its class makes none.

    - `processes`: those that go through it together; they agree on the order by it, so that an
      error in one ends that in all.
    """
    if isinstance(dl, DataLoader) and hasattr(dl, 'world_size'):  # fastai's DistributedDL, which has no `new`
        cls = type(dl) if processes is None else _agreeing(type(dl), processes)
        return _with_settings(cls(fresh_loader(dl.dl, **kwargs), dl.rank, dl.world_size, dl.device), dl)
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
        for name, default in _own_arguments(type(dl)).items():
            if name not in kwargs and vars(new).get(name, _UNSET) is default and name in vars(dl):
                vars(new)[name] = vars(dl)[name]
        return _with_settings(new, dl)
    return _fresh_torch_loader(dl, kwargs.get('drop_last')) if isinstance(dl, TorchDataLoader) else dl


_UNSET = object()


def _own_arguments(cls) -> dict:
    """Name -> default for what the constructors of a class of loaders take beyond fastai's own: `new`
    does not know it, and makes a loader with the default (`PartialDL`'s `partial_n`)."""
    res = {}
    for c in cls.__mro__[: cls.__mro__.index(DataLoader)]:
        if c is not TfmdDL and '__init__' in vars(c):
            res = _defaults(c) | res
    return {name: default for name, default in res.items() if name not in _defaults(DataLoader) | _defaults(TfmdDL)}


def _defaults(cls) -> dict:
    return {
        name: p.default
        for name, p in inspect.signature(cls.__init__).parameters.items()
        if p.default is not inspect.Parameter.empty
    }


def _with_settings(new, dl):
    """`new`, fastai's loader, with what `dl` says about worker processes and pinned memory, such as
    `prefetch_factor`. Its workers are its own, and end with the pass."""
    own = new.fake_l
    own.__class__ = type(dl.fake_l)
    of_one_loader = 'd', 'dataset', 'default', 'num_workers', 'persistent_workers'
    vars(own).update({k: v for k, v in vars(dl.fake_l).items() if k not in of_one_loader})
    return new


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
