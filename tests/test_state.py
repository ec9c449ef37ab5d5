"""The state of a fit as plain data."""
import random
from collections import Counter, OrderedDict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai_swa import SWACallback
from fastai_swa.state import generators, pack, restore, take, unpack
from fastcore.foundation import L
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from .helpers import At, assert_same, fingerprint, learner, net

leaves = (st.none() | st.booleans() | st.integers(-2**130, 2**130) | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
          | st.builds(lambda x: torch.tensor(x), st.floats(width=32)) | st.builds(lambda n: torch.arange(n).view(1, n), st.integers(0, 4))
          | st.builds(np.float32, st.floats(width=32)) | st.builds(np.int64, st.integers(-9, 9)) | st.builds(lambda n: np.arange(n, dtype=np.uint8), st.integers(0, 3))
          | st.just(Path('a/b')) | st.just(torch.Size([2, 3])) | st.just(range(1, 9, 2)) | st.builds(lambda s: deque(s, 3), st.lists(st.integers(), max_size=5))
          | st.sets(st.integers()) | st.builds(Counter, st.text(max_size=4)) | st.builds(OrderedDict, st.just({'b': 1, 'a': (2,)})))
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.lists(inner, max_size=4).map(L)
                      | st.dictionaries(st.text(max_size=3) | st.integers(-3, 3), inner, max_size=3), max_leaves=12)


def same(a, b):
    if isinstance(a, torch.Tensor): return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, np.ndarray): return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.tolist() == b.tolist()
    if type(a) is not type(b): return False
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple | L): return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(values)
def test_what_is_packed_written_and_unpacked_is_the_same_in_value_and_type(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp()/'packed'
    torch.save(pack(value), path)
    assert same(value, unpack(torch.load(path, weights_only=True)))


@pytest.mark.parametrize('value', [object(), lambda: 0, nn.Linear(1, 1), {'a': [1, object()]}, {(1, 2): 3}, np.array(['a']), torch.zeros(2, device='meta')])
def test_what_is_no_plain_data_is_refused(value):
    with pytest.raises(TypeError, match='checkpoint'): pack(value)


def test_the_losses_of_all_steps_are_one_tensor(): assert len(pack([torch.tensor(float(i)) for i in range(1000)])) == 2


def test_a_tied_tensor_is_written_once():
    t = torch.randn(3)
    a, b = pack([t, t])
    assert a.data_ptr() == b.data_ptr() != t.data_ptr()


# forks: a state taken in one run, restored in others

def at_epoch(epoch, f): return At('before_epoch', epoch, f)


def test_a_fork_goes_on_as_its_origin_and_a_state_serves_many_times():
    "What issue 4's runs do: run on from a common past, each in a learner of its own."
    whole, taken = learner(), []
    whole.fit(4, cbs=[SWACallback(1), at_epoch(2, lambda cb: taken.append(take(cb.learn)))])
    for seed in (5, 6):
        class Jump(Callback):
            order = -2000
            def before_epoch(self):
                if self.learn.epoch == 2: restore(self.learn, taken[0])
        fork = learner(seed=seed)
        fork.fit(4, cbs=[SWACallback(1), Jump()])
        assert_same(fingerprint(fork), fingerprint(whole))
        assert type(fork.opt.state) is type(whole.opt.state)


def test_a_state_is_a_copy_that_training_does_not_touch():
    learn, taken = learner(), []
    learn.fit(3, cbs=at_epoch(1, lambda cb: taken.extend([take(cb.learn), take(cb.learn)])))
    assert repr(taken[0]) == repr(taken[1])
    assert not torch.equal(taken[0]['model']['0.weight'], learn.model[0].weight)
    before = repr(taken[0])
    other = learner(seed=3)
    other.fit(3, cbs=At('before_epoch', 1, lambda cb: restore(cb.learn, taken[0])))
    assert repr(taken[0]) == before


@pytest.mark.parametrize('model, match', [(lambda: net(width=9), r"'0.weight' is \(9, 6\) float32, \(8, 6\) float32 in the state"), (lambda: net()[:-1], "'7.weight' is in the state only|other parameters"),
                                          (lambda: nn.Sequential(*net(), nn.Linear(3, 3)), "'8.weight' is not in the state")])
def test_another_model_is_named_and_nothing_changes(model, match):
    origin, taken, other = learner(), [], learner(model)
    origin.fit(1, cbs=at_epoch(0, lambda cb: taken.append(take(cb.learn))))
    other.create_opt()
    before = [p.clone() for p in other.model.parameters()]
    with pytest.raises(ValueError, match=match): restore(other, taken[0])
    assert all(map(torch.equal, other.model.parameters(), before))


def test_a_generator_that_is_gone_is_named_in_a_warning():
    learn, taken = learner(), []
    learn.dls.train.own = torch.Generator()
    learn.fit(1, cbs=at_epoch(0, lambda cb: taken.append(take(cb.learn))))
    other = learner()
    other.create_opt()
    with pytest.warns(UserWarning, match='loaders.0.own'): restore(other, taken[0])


def test_generators_are_found_wherever_a_loader_may_hold_them():
    class Holder: pass
    root, deep = Holder(), Holder()
    closed, default = random.Random(2), np.random.RandomState(3)
    def inside(x, rng=default): return closed.random() + rng.rand()
    deep.tfms = [inside, {'a': (np.random.default_rng(1),)}]
    root.generator, root.deep, root.self = torch.Generator(), deep, root
    found = {path: get() for path, get, _ in generators(root, 'x')}
    assert len(found) == 4 and 'x.generator' in found
