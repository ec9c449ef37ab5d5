"""The random generators of a learner."""

import random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastcore.xtras import ReindexCollection

from fastai_swa.randomness import get, put, randomness_kept, seed, seed_all, sources, sources_in

from .helpers import learner

SOURCES = {
    'torch': torch.Generator,
    'python': lambda: random.Random(3),
    'numpy': lambda: np.random.default_rng(3),
    'old numpy': lambda: np.random.RandomState(3),
    'bits': lambda: np.random.PCG64(3),
}
DRAW = {
    'torch': lambda g: torch.rand(3, generator=g).tolist(),
    'python': lambda g: g.random(),
    'numpy': lambda g: g.random(),
    'old numpy': lambda g: g.rand(),
    'bits': lambda g: int(g.random_raw()),
}


@pytest.mark.parametrize('kind', SOURCES)
def test_a_generator_goes_on_from_its_state_and_begins_with_a_seed(kind):
    source, draw = SOURCES[kind](), DRAW[kind]
    draw(source)
    state = get(source)
    first = draw(source)
    draw(source)
    put(source, state)
    assert draw(source) == first
    seed(source, 5)
    begun = draw(source)
    draw(source)
    seed(source, 5)
    assert draw(source) == begun != first


def test_an_order_that_is_shuffled_in_place_is_put_back_in_place():
    source = ReindexCollection(list('abcd'), [0, 1, 2, 3])
    idxs, state = source.idxs, get(source)
    source.shuffle()
    put(source, state)
    assert source.idxs is idxs and idxs == [0, 1, 2, 3]
    seed(source, 1)
    assert idxs == [0, 1, 2, 3]


def test_what_is_no_generator_has_no_state():
    assert get(object()) is None
    with pytest.raises(TypeError, match='object is no random generator'):
        put(object(), 1)
    with pytest.raises(TypeError, match='object is no random generator'):
        seed(object(), 1)


def test_generators_are_found_wherever_a_loader_may_hold_them():
    class Holder:
        pass

    class Slots:
        __slots__ = ('rng',)

    root, deep = Holder(), Holder()
    closed, default = random.Random(2), np.random.RandomState(3)

    def inside(x, rng=default):
        return closed.random() + rng.rand()

    slots = Slots()
    slots.rng = random.Random(4)
    deep.tfms = [inside, {'a': (np.random.default_rng(1),)}, slots]
    root.generator, root.deep, root.self = torch.Generator(), deep, root
    found = dict(sources_in([('x', root)]))
    assert len(found) == 5 and 'x.generator' in found and any(o is closed for o in found.values())


def test_all_generators_stand_where_they_stood_also_those_of_callbacks_with_a_state_of_their_own():
    class Stateful(Callback):
        def __init__(self):
            self.rng = np.random.default_rng(1)

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    learn = learner(cbs=Stateful())
    learn.dls.train.own = torch.Generator().manual_seed(1)
    learn.model.rng = random.Random(2)

    def drawn():
        return [
            random.random(),
            np.random.rand(),
            torch.rand(1).item(),
            learn.dls.train.rng.random(),
            learn.stateful.rng.random(),
            learn.model.rng.random(),
            torch.rand(1, generator=learn.dls.train.own).item(),
        ]

    with randomness_kept(learn):
        first = drawn()
    with pytest.raises(KeyError), randomness_kept(learn):
        assert drawn() == first
        raise KeyError
    seed_all(learn, 3)
    begun = drawn()
    seed_all(learn, 3)
    assert drawn() == begun and not set(begun) & set(first)
    assert not any('Stateful' in path for path, _ in sources(learn))  # which are in the callback's own state
