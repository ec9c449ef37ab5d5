"""`cycle_len` for cycles of different lengths."""

import warnings

import pytest
import torch
from fastai.callback.core import CancelFitException

from fastai_swa import CheckpointCallback, SWACallback

from .helpers import At, Snapshots, learner, parameters, raising


@pytest.mark.parametrize('cycle_len', [[0, 2, 6], (0, 2, 6), range(0, 7, 2), lambda epoch: epoch in (0, 2, 6)])
def test_the_mean_is_that_of_the_ends_of_cycles_that_grow(cycle_len):
    learn, snaps, swa = learner(), Snapshots(), SWACallback(swa_start=0, cycle_len=cycle_len)
    learn.fit_sgdr(3, 1, cycle_mult=2, cbs=[snaps, swa])
    ends = [0, 2, 4, 6] if isinstance(cycle_len, range) else [0, 2, 6]
    assert swa.averaged_epochs == ends
    for i, p in enumerate(parameters(swa.swa_model)):
        mean = sum(snaps.weights[e][i].double() for e in ends) / len(ends)
        assert torch.allclose(p.double(), mean, atol=2e-6)


def test_of_a_list_the_epochs_from_swa_start_on_are_averaged():
    swa = SWACallback(swa_start=1, cycle_len=[0, 1, 3, 9])
    learner().fit(5, cbs=swa)
    assert swa.averaged_epochs == [1, 3]


def test_fit_swa_takes_a_list_and_refuses_it_where_the_rate_goes_through_cycles():
    assert learner().fit_swa(4, swa_start=1, cycle_len=[1, 3]).averaged_epochs == [1, 3]
    with pytest.raises(ValueError, match=r'cycle_len must be an int where swa_lr is a pair \(hi, lo\), not \[1, 3\]'):
        learner().fit_swa(4, 0.1, (0.1, 0.01), swa_start=1, cycle_len=[1, 3])


@pytest.mark.parametrize(
    'cycle_len, error, sentence',
    [
        ('2', TypeError, "cycle_len must be an int .*, a list .*, or a function .*, not '2'"),
        (True, TypeError, 'cycle_len must be an int'),
        ([], ValueError, 'cycle_len must have one epoch at least'),
        ([1, 2.5], TypeError, 'cycle_len must be an int, not 2.5'),
        ([-1, 2], ValueError, 'cycle_len must be at least 0, not -1'),
        ([3, 2], ValueError, r'rising order, not \[3, 2\]: of cycles of these lengths they are \[2, 4\]'),
        ([4, 4, 4], ValueError, r'they are \[3, 7, 11\]'),
    ],
)
def test_what_names_no_epochs_is_refused_at_construction(cycle_len, error, sentence):
    with pytest.raises(error, match=sentence):
        SWACallback(cycle_len=cycle_len)


def test_a_function_that_fails_is_one_sentence_before_the_first_step():
    learn = learner()
    before = [p.clone() for p in parameters(learn.model)]
    with pytest.raises(ValueError, match='cycle_len could not be asked for the epochs 1 to 2: ZeroDivisionError'):
        learn.fit(3, cbs=SWACallback(swa_start=1, cycle_len=lambda epoch: epoch / 0))
    assert all(map(torch.equal, before, parameters(learn.model)))


def said_before_the_first_batch(n_epoch, swa):
    "The warnings until then, in a fit that ends there."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        stop = At('before_batch', 0, raising(CancelFitException()), batch=0, training=True)
        learner().fit(n_epoch, cbs=[swa, stop])
    return [str(w.message) for w in said]


@pytest.mark.parametrize(
    'kwargs, sentence',
    [
        (dict(swa_start=3), 'swa_start=3 was not reached'),
        (dict(swa_start=2, cycle_len=[0, 1, 3]), 'cycle_len has no epoch from 2 (swa_start=2) to 2'),
        (dict(swa_start=0, cycle_len=lambda e: False), 'cycle_len has no epoch from 0'),
        (dict(swa_start=2, every=7), 'every=7 was not reached: this fit has at most 6 optimizer steps from epoch 2 on'),
    ],
)
def test_that_nothing_will_be_averaged_is_said_before_the_first_step(kwargs, sentence):
    said = said_before_the_first_batch(3, SWACallback(**kwargs))
    assert len(said) == 1 and sentence in said[0] and 'averages nothing' in said[0]


def test_lengths_given_for_epochs_are_noticed():
    [sentence] = said_before_the_first_batch(7, SWACallback(swa_start=0, cycle_len=[1, 2, 4]))[:1]
    assert 'cycle_len=[1, 2, 4] are the epochs, counted from 0' in sentence and 'epochs are [0, 2, 6]' in sentence
    assert 'cycle_len' not in ''.join(said_before_the_first_batch(7, SWACallback(swa_start=0, cycle_len=[0, 2, 6])))


def test_a_killed_fit_goes_on_to_the_same_epochs_and_another_list_is_refused(tmp_path):
    file = tmp_path / 'run.ckpt'
    learn = learner()
    with pytest.raises(KeyboardInterrupt):
        kill = At('before_train', 4, raising(KeyboardInterrupt()))
        learn.fit(7, cbs=[SWACallback(0, cycle_len=lambda e: e in (0, 2, 6)), CheckpointCallback(file), kill])
    with pytest.raises(ValueError, match='cycle_len'):
        learner().fit(7, cbs=[SWACallback(0, cycle_len=[0, 3, 6]), CheckpointCallback(file)])
    swa = SWACallback(0, cycle_len=[0, 2, 6])
    learner().fit(7, cbs=[swa, CheckpointCallback(file)])
    whole = SWACallback(0, cycle_len=[0, 2, 6])
    learner().fit(7, cbs=whole)
    assert swa.averaged_epochs == whole.averaged_epochs == [0, 2, 6]
    assert all(map(torch.equal, parameters(swa.swa_model), parameters(whole.swa_model)))
