"""The tail after a training: what it starts from can be the first point of its average."""

import pytest
import torch
from fastai.callback.core import CancelFitException

from fastai_swa import CheckpointCallback

from .helpers import At, Snapshots, assert_close, learner, parameters, raising
from .reference import twins


def started(n=2, **kwargs):
    "A learner that was trained, snapshots of its further epochs, and its weights now."
    learn = learner(**kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(n)
    return learn, Snapshots(), [p.detach().clone() for p in learn.model.parameters()]


def test_a_tail_averages_the_weights_it_starts_from_first():
    learn, snaps, start = started()
    swa = learn.fit_swa(3, 0.05, swa_lr=0.05, swa_start=0, include_start=True, cbs=snaps)
    assert swa.n_averaged == 4 and swa.averaged_epochs == [0, 1, 2]
    assert_close(parameters(swa.swa_model), twins.mean([start, *snaps.weights]))
    assert 'average of the start and 3 epochs (0-2)' in repr(swa)


def test_a_tail_over_steps_averages_the_start_and_each_step():
    learn, _, start = started()
    steps = []
    every = At('after_step', 0, lambda cb: steps.append([p.detach().clone() for p in cb.model.parameters()]))
    swa = learn.fit_swa(1, 0.05, swa_lr=0.05, swa_start=0, every=1, include_start=True, cbs=every)
    assert swa.n_averaged == len(steps) + 1
    assert_close(parameters(swa.swa_model), twins.mean([start, *steps]))


def test_the_line_at_the_end_of_a_tail_names_the_start(capsys):
    learn, _, _ = started()
    learn.fit_swa(2, 0.05, swa_lr=0.05, swa_start=0, include_start=True)
    assert 'swa: average of the start and 2 epochs (0-1): ' in capsys.readouterr().out


def test_a_tail_with_its_start_leaves_training_as_it_is():
    plain, _, _ = started()
    plain.fit(2, 0.05)
    learn, _, _ = started()
    learn.fit_swa(2, 0.05, swa_lr=0.05, swa_start=0, include_start=True)
    assert all(torch.equal(a, b) for a, b in zip(parameters(plain.model), parameters(learn.model)))
    assert plain.recorder.losses == learn.recorder.losses


@pytest.mark.parametrize('epoch', [0, 1, 2])
def test_a_tail_that_is_killed_goes_on_with_its_start(epoch, tmp_path):
    def tail(cbs):
        learn, _, _ = started()
        kept = [CheckpointCallback(tmp_path / 'tail'), *cbs]
        return learn.fit_swa(3, 0.05, swa_lr=0.05, swa_start=0, include_start=True, cbs=kept)

    whole = tail([])
    with pytest.raises(KeyboardInterrupt):
        tail([At('before_batch', epoch, raising(KeyboardInterrupt), batch=2)])
    resumed = tail([])
    assert resumed.n_averaged == whole.n_averaged == 4
    for a, b in zip(parameters(resumed.swa_model), parameters(whole.swa_model)):
        assert torch.equal(a, b)


def test_of_a_tail_that_ends_in_its_first_epoch_the_start_is_the_average():
    learn, _, start = started()
    stop = At('before_batch', 0, raising(CancelFitException), batch=2)
    swa = learn.fit_swa(3, 0.05, swa_lr=0.05, swa_start=0, include_start=True, cbs=stop)
    assert swa.n_averaged == 1 and swa.averaged_epochs == []
    assert all(torch.equal(a, b) for a, b in zip(parameters(swa.swa_model), start))
    assert 'average of the start alone' in repr(swa)


@pytest.mark.parametrize(
    'kwargs, error, words',
    [
        (dict(swa_start=1, include_start=True), ValueError, 'include_start=True .* needs swa_start=0, not 1'),
        (dict(include_start=True), ValueError, 'needs swa_start=0, not 0.75'),
        (dict(swa_start=0, include_start=1), TypeError, 'include_start must be True or False, not 1'),
    ],
)
def test_an_include_start_that_cannot_be_used_is_refused_before_the_first_step(kwargs, error, words):
    learn = learner()
    with pytest.raises(error, match=words):
        learn.fit_swa(2, 0.05, swa_lr=0.05, **kwargs)
