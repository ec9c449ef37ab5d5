"""The objects that a learner holds beside its weights: loaders, samplers, data sets, transforms,
modules, losses, callbacks and what is in them, each with a path. Found without running any of it:
no data set is iterated, since that runs its transforms.
"""

import random
import weakref
from functools import lru_cache, partial
from types import CellType, FunctionType, GeneratorType, MethodType, ModuleType, SimpleNamespace

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import _BaseOptimizer
from torch import nn
from torch.utils import data

from .contents import ATOMS, CONTAINERS, attributes, elements, is_foreign, values_of
from .modules import unwrap
from .replay import Replay
from .warn import warn

__all__ = [
    'walk',
    'can_hold',
    'entries',
    'MAX_OBJECTS',
    'loaders',
    'named_callbacks',
    'keeps_state',
    'is_own',
    'owned_modules',
    'not_copied',
    'below',
    'found_in',
    'LEARNED',
    'OF_PASS',
    'is_of_pass',
    'readable',
    'name_once',
]


# what stands where in a learner


def loaders(learn) -> list:
    """The loaders of `learn`, also where its `dls` is no `DataLoaders` but an object with `train`
    and `valid`.
    """
    own = getattr(learn.dls, 'loaders', None)
    return own or [dl for name in ('train', 'valid') if (dl := getattr(learn.dls, name, None)) is not None]


# where a class was when the first files were written that name it: they are read by that name, and so still written
_NAMED_AS = {'fastai_swa.saving.SaveSWAModelCallback': 'fastai_swa.callback.SaveSWAModelCallback'}


def named_callbacks(learn):
    "(name, callback) pairs, as checkpoints have them; callbacks of one class are counted."
    seen = {}
    for cb in learn.cbs:
        cls = f'{type(cb).__module__}.{type(cb).__qualname__}'
        cls = _NAMED_AS.get(cls, cls)
        seen[cls] = seen.get(cls, -1) + 1
        yield f'{cls}.{getattr(cb, "key", seen[cls])}', cb  # an average is known by its name


def keeps_state(cb) -> bool:
    "Does the callback say itself what is to be kept of it?"
    return hasattr(type(cb), 'state_dict') and hasattr(type(cb), 'load_state_dict')


def is_own(cb) -> bool:
    "Is it a callback of this package? These take no part in passes, and look after themselves."
    return any(cls.__module__.split('.')[0] == __name__.split('.')[0] for cls in type(cb).__mro__)


def owned_modules(owner) -> list:
    "`owner` if it is a module, else those that it holds as attributes, as fastai's losses do."
    held = [unwrap(owner)] if isinstance(owner, nn.Module) else getattr(owner, '__dict__', {}).values()
    return [m for m in held if isinstance(m, nn.Module)]


def not_copied(learn) -> tuple:
    "What a copy of the model refers to instead of copying, should the model refer to it."
    return learn, learn.dls, *learn.cbs


def _roots(learn, callbacks) -> list:
    """(path, object): where what `learn` holds begins; `callbacks`: the named ones that belong to
    it.

    Callbacks come late: one may refer to the model or to a loader, which then have their own paths
    already.
    """
    own = [(f'loaders.{i}', dl) for i, dl in enumerate(loaders(learn))]
    return [*own, ('model', unwrap(learn.model)), ('loss', learn.loss_func), *callbacks, ('dls', learn.dls)]


def below(learn, is_left) -> tuple[list, list]:
    """What `walk` takes for all that `learn` holds, but the callbacks for which `is_left` holds,
    and what only they hold.
    """
    callbacks = [(name, cb) for name, cb in named_callbacks(learn) if not is_left(cb)]
    return _roots(learn, callbacks), [learn, *filter(is_left, learn.cbs)]


def found_in(learn) -> list:
    """(path, object) for what a pass aside from training must leave as it is: all that `learn`
    holds but this package's callbacks.
    """
    return list(walk(*below(learn, is_own)))


OF_PASS = 'it', '_DataLoader__idxs', '_iterator'  # what a loader holds while it is gone through, and makes anew

LEARNED = '_n_inp', '_types'  # what fastai's finds out once about its batches, from a sample


def is_of_pass(o, name) -> bool:
    "Is that attribute of `o` a loader's, and made anew for each pass?"
    return name in OF_PASS and isinstance(o, DataLoader | data.DataLoader)


# the walk


def walk(roots, but=(), stop=lambda path, o: False):
    """(path, object) for each object below `roots` that can hold others, or a random state. Those
    in `but`, and those where `stop(path, object)`, are passed by, with what only they hold."""
    seen = {id(o) for o in but}
    for root in roots:
        stack = [root]
        while stack:
            path, o = stack.pop()
            if id(o) in seen:
                continue
            seen.add(id(o))
            if isinstance(o, CONTAINERS):
                inner = [*entries(o)] if len(o) <= MAX_OBJECTS else []
                # a class of one's own may count in attributes
                if type(o) not in CONTAINERS and not is_foreign(type(o)):
                    yield path, o
                    inner += attributes(o)
            elif isinstance(o, Replay):
                continue
            elif (can_hold(o) or o is root[1] and type(o) not in ATOMS) and not stop(path, o):
                yield path, o
                inner = attributes(o)
            else:
                continue
            if isinstance(o, CellType):  # its contents are the function's
                stack.extend((path, v) for _, v in inner if _leads_on(type(v)))
            else:
                stack.extend((f'{path}.{k}', v) for k, v in inner if _leads_on(type(v)))


# a longer container holds samples, not transforms and the like: it is not searched for objects that hold something
MAX_OBJECTS = 100


def entries(o):
    "(name, value) for what a container holds."
    return elements(o) if isinstance(o, dict) else enumerate(values_of(o))


# what is the program's, has a state that is kept otherwise, or a path of its own
_STOPS = (
    type,
    ModuleType,
    GeneratorType,
    torch.Tensor,
    np.ndarray,
    Learner,
    Callback,
    _BaseOptimizer,
    torch.optim.Optimizer,
)

_OF_TORCH = (nn.Module, data.DataLoader, data.Dataset, data.Sampler, torch.Generator)


def can_hold(o) -> bool:
    "Is it of a kind that may hold something that training or a pass changes?"
    return _can_hold(type(o))


@lru_cache(5000)
def _can_hold(cls) -> bool:
    if issubclass(cls, (FunctionType, MethodType, partial, CellType, SimpleNamespace)):
        return True
    if issubclass(cls, (*_STOPS, *CONTAINERS, Replay)):
        return False
    return issubclass(cls, _OF_TORCH) or not is_foreign(cls) or issubclass(cls, _WITH_RANDOM_STATE)


@lru_cache(5000)
def _leads_on(cls) -> bool:
    "Can objects of that class be on the way to one that can hold something?"
    return cls not in ATOMS and (issubclass(cls, CONTAINERS) or _can_hold(cls))


_WITH_RANDOM_STATE = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


# paths in messages


def readable(path: str) -> str:
    "`path` as a user would write it."
    for i, name in enumerate(('train', 'valid')):
        if path == f'loaders.{i}' or path.startswith(f'loaders.{i}.'):
            return f'dls.{name}{path.removeprefix(f"loaders.{i}")}'
    return path


_named = weakref.WeakKeyDictionary()  # learner -> paths that a warning has named


def name_once(learn, path, sentence):
    "Warn, once for a path of a learner."
    said = _named.setdefault(learn, set())
    if path not in said:
        said.add(path)
        warn(sentence)
