"""The state of a fit as plain data."""

import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from fastai_swa import SWACallback
from fastai_swa.state import restore, take

from .helpers import At, assert_same, fingerprint, learner, net

# forks: a state taken in one run, restored in others


def at_epoch(epoch, f):
    return At('before_epoch', epoch, f)


def test_a_fork_goes_on_as_its_origin_and_a_state_serves_many_times():
    "As the runs of the experiments do: on from a common past, each in a learner of its own."
    whole, taken = learner(), []
    whole.fit(4, cbs=[SWACallback(1), at_epoch(2, lambda cb: taken.append(take(cb.learn)))])
    for seed in (5, 6):

        class Jump(Callback):
            order = -2000

            def before_epoch(self):
                if self.learn.epoch == 2:
                    restore(self.learn, taken[0])

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


@pytest.mark.parametrize(
    'model, match',
    [
        (lambda: net(width=9), r"'0.weight' is \(9, 6\) float32, \(8, 6\) float32 in the state"),
        (lambda: net()[:-1], "'7.weight' is in the state only|other parameters"),
        (lambda: nn.Sequential(*net(), nn.Linear(3, 3)), "'8.weight' is not in the state"),
    ],
)
def test_another_model_is_named_and_nothing_changes(model, match):
    origin, taken, other = learner(), [], learner(model)
    origin.fit(1, cbs=at_epoch(0, lambda cb: taken.append(take(cb.learn))))
    other.create_opt()
    before = [p.clone() for p in other.model.parameters()]
    with pytest.raises(ValueError, match=match):
        restore(other, taken[0])
    assert all(map(torch.equal, other.model.parameters(), before))


def test_a_generator_that_is_gone_is_named_in_a_warning():
    learn, taken = learner(), []
    learn.dls.train.own = torch.Generator()
    learn.fit(1, cbs=at_epoch(0, lambda cb: taken.append(take(cb.learn))))
    other = learner()
    other.create_opt()
    with pytest.warns(UserWarning, match='loaders.0.own'):
        restore(other, taken[0])
