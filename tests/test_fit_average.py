"""The average of a fit as an object of its own; in fits: `test_callback.py`, `test_continuing.py`."""

import weakref

import pytest
import torch
from torch import nn

from fastai_swa import equal
from fastai_swa.batches import Taken
from fastai_swa.files import save_weights
from fastai_swa.fit_average import FitAverage, packed_points, weights_with_points
from fastai_swa.packing import unpack

from .helpers import learner, net


def averaged(learn, n=3):
    "The average of `n` points, the model times 1, 2, ... in epochs 0, 1, ..., and their mean as a factor."
    average = FitAverage.begin(learn, equal, None, None)
    start = [p.detach().clone() for p in learn.model.parameters()]
    for epoch in range(n):
        with torch.no_grad():
            for p, before in zip(learn.model.parameters(), start):
                p.copy_((epoch + 1) * before)
        average.running.update(learn.model)
        average.epochs.append(epoch)
    return average, [before * (n + 1) / 2 for before in start]


def assert_is(average, mean, epochs):
    assert average.running.n_averaged == len(epochs) and average.epochs == epochs
    for p, expected in zip(average.running.swa_model.parameters(), mean):
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize(
    'before, moved, bn',
    [
        ([], [['1']], ['1']),
        (['5'], [[]], []),
        (['1'], [['5'], None, ['5', '1']], ['5', '1']),  # the union of those processes that know
        (['5'], [None], ['5']),  # as in the epoch before
        ([], [None, None], ['1', '5']),  # as the model stands
    ],
)
def test_which_statistics_follow_the_weights_is_what_training_has_moved(before, moved, bn):
    learn = learner()
    average, _ = averaged(learn)
    average.bn = before
    average.follow(learn.model, moved)
    assert average.bn == bn and average.stale == bool(bn)


def test_plain_attributes_follow_the_model():
    learn = learner()
    average, _ = averaged(learn)
    learn.model.temperature = 0.5
    average.follow(learn.model, [None])
    assert average.running.swa_model.temperature == 0.5 and average.has_structure_of(learn.model)
    learn.model[2] = nn.Tanh()
    assert not average.has_structure_of(learn.model)
    average.copy_anew(learn, equal)
    assert average.has_structure_of(learn.model) and isinstance(average.running.swa_model[2], nn.Tanh)
    assert average.running.n_averaged == 3


def test_its_state_is_put_into_an_average_of_another_learner():
    learn = learner()
    average, mean = averaged(learn)
    average.bn, average.stale = ['5'], True
    other, taken = learner(seed=3), Taken(4, True)
    res = FitAverage.begin(learner(seed=4), equal, None, None)
    res.load_state_dict(average.state_dict(), other, taken)
    assert_is(res, mean, [0, 1, 2])
    assert res.bn == ['5'] and res.stale and res.taken is taken and res.learner == weakref.ref(other)


@pytest.mark.parametrize(
    'changes', [{'epochs': ['a']}, {'average': {'n_averaged': -5}}, {'average': {'n_averaged': 'x'}}]
)
def test_a_state_with_points_that_cannot_be_counted_is_refused(changes):
    learn = learner()
    average, _ = averaged(learn)
    state = average.state_dict()
    for key, value in changes.items():
        state[key] = state[key] | value if isinstance(value, dict) else value
    res = FitAverage.begin(learner(seed=4), equal, None, None)
    with pytest.raises(ValueError, match='n_averaged is|epochs of an average are not'):
        res.load_state_dict(state, learn, None)
    assert res.running.n_averaged == 0 and res.epochs == []


@pytest.mark.parametrize('as_file', [False, True])
def test_points_are_gone_on_with_from_an_average_and_from_a_file(as_file, tmp_path):
    average, mean = averaged(learner())
    source = average
    if as_file:
        source = tmp_path / 'average.pth'
        save_weights(source, weights_with_points(average.running.swa_model, 3, [0, 1, 2]))
    points = packed_points(source, net())
    average.running.swa_model[0].weight.data.zero_()  # they are a copy
    average.epochs.clear()
    assert set(points) == {'state', 'epochs'} and unpack(points['state'])['n_averaged'] == 3
    assert_is(FitAverage.begin(learner(seed=3), equal, None, points), mean, [0, 1, 2])
    with pytest.raises(ValueError, match='average does not match'):
        packed_points(source, net(width=9))


def test_a_file_that_says_nothing_of_points_is_refused(tmp_path):
    torch.save(net().state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(ValueError, match='plain.pth does not say of how many points'):
        packed_points(tmp_path / 'plain.pth', net())
