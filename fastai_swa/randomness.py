"""Every random generator of a learner: found, read, put back, begun with a seed."""

import random
from contextlib import contextmanager
from functools import singledispatch

import numpy as np
import torch
from fastai.torch_core import get_random_states, set_random_states, set_seed
from fastcore.xtras import ReindexCollection

from .contents import set_items
from .walk import below, found_in, keeps_state, walk
from .warn import warn

__all__ = [
    'sources',
    'sources_in',
    'randomness_kept',
    'generators_kept',
    'seed_all',
    'random_states',
    'set_random_states_of',
    'get',
    'put',
    'seed',
]


# those of a learner


def sources(learn):
    """(path, source) for those in the loaders, callbacks without a `state_dict`, model and loss of
    `learn`. A source is a random generator, or an order that is shuffled in place.
    """
    return sources_in(*below(learn, keeps_state))


def sources_in(roots, but=()):
    "(path, source) for each one that `walk` finds."
    for path, o in walk(roots, but):
        if is_source(o):
            yield path, o


def randomness_kept(learn, found=None):
    """A context at whose end all random generators, those of the libraries and those that `learn`
    holds, stand where they stood.

    - `found`: what `found_in(learn)` gives.
    """
    return generators_kept(o for _, o in found or found_in(learn))


@contextmanager
def generators_kept(objects):
    """The sources among `objects`, and the random generators of Python, NumPy, torch and each GPU,
    stand at the end of this context where they stood.
    """
    libraries = get_random_states()
    states = [(o, get(o)) for o in objects if is_source(o)]
    try:
        yield
    finally:
        set_random_states(**libraries)
        for o, state in states:
            put(o, state)


def seed_all(learn, n: int):
    "Begin all random generators, those of the libraries and those that `learn` holds, with `n`."
    set_seed(n)
    for _, o in found_in(learn):
        if is_source(o):
            seed(o, n)


_LIBRARIES = 'random_state', 'numpy_state', 'torch_state', 'torch_cuda_state'  # not the settings of cuDNN


def random_states(learn) -> dict:
    "The states of all random generators of `learn` and of the libraries."
    libraries = {k: v for k, v in get_random_states().items() if k in _LIBRARIES}
    return {'libraries': libraries, 'own': {path: get(source) for path, source in sources(learn)}}


def set_random_states_of(learn, states: dict):
    """Put what `random_states` gave back. A random generator that is not found any more is named in
    a warning.
    """
    now = get_random_states()
    libraries = states['libraries']
    kept = dict(states['own'])
    if len(libraries['torch_cuda_state']) != len(now['torch_cuda_state']):  # another machine
        libraries = {k: v for k, v in libraries.items() if k != 'torch_cuda_state'}
    set_random_states(**{**now, **libraries})
    for path, source in sources(learn):
        if path in kept:
            put(source, kept.pop(path))
    if kept:
        warn(f'random generators are not there any more, or not yet: {", ".join(sorted(kept)[:3])}')


# what a source is: what `get`, `put` and `seed` know


def is_source(o) -> bool:
    return get.dispatch(type(o)) is not get.dispatch(object)


@singledispatch
def get(source):
    """The state of a random generator, or of an order that is shuffled in place; `None` for
    anything else, which has none.
    """
    return None


@singledispatch
def put(source, state):
    "Put a state of `get` back."
    raise TypeError(f'{type(source).__name__} is no random generator')


@singledispatch
def seed(source, n: int):
    "Begin a random generator with `n`; an order stays as it is."
    raise TypeError(f'{type(source).__name__} is no random generator')


@get.register
def _(source: torch.Generator):
    return source.get_state()


@put.register
def _(source: torch.Generator, state):
    source.set_state(state)


@seed.register
def _(source: torch.Generator, n):
    source.manual_seed(n)


@get.register
def _(source: random.Random):
    return source.getstate()


@put.register
def _(source: random.Random, state):
    source.setstate(state)


@seed.register
def _(source: random.Random, n):
    source.seed(n)


@get.register
def _(source: np.random.RandomState):
    return source.get_state()


@put.register
def _(source: np.random.RandomState, state):
    source.set_state(state)


@seed.register
def _(source: np.random.RandomState, n):
    source.seed(n)


@get.register
def _(source: np.random.BitGenerator):
    return source.state


@put.register
def _(source: np.random.BitGenerator, state):
    source.state = state


@seed.register
def _(source: np.random.BitGenerator, n):
    source.state = type(source)(n).state


@get.register
def _(source: np.random.Generator):
    return get(source.bit_generator)


@put.register
def _(source: np.random.Generator, state):
    put(source.bit_generator, state)


@seed.register
def _(source: np.random.Generator, n):
    seed(source.bit_generator, n)


@get.register
def _(source: ReindexCollection):
    return list(source.idxs)


@put.register
def _(source: ReindexCollection, state):
    set_items(source.idxs, state)  # in place: a language model's loader shares it between its texts and their lengths


@seed.register
def _(source: ReindexCollection, n):
    pass
