"""What is said before the first step, as functions of their own; in fits: `test_callback.py`, `test_cycles.py`."""

import pytest

from fastai_swa.preflight import nothing_sentence, remarks_on_cycles, validated_epochs
from fastai_swa.schedules import due_epochs, start_epoch


def why(n_epoch, swa_start=0.75, cycle_len=1, every=None, n_steps='took 3'):
    start = start_epoch(swa_start, n_epoch)
    return nothing_sentence(swa_start, every, start, due_epochs(start, n_epoch, cycle_len), n_epoch, n_steps)


@pytest.mark.parametrize(
    'kwargs, sentence',
    [
        (dict(swa_start=5), 'swa_start=5 was not reached: epoch 5 (from 0) would be the first one '),
        # stopped before it
        (
            dict(cycle_len=[1, 3]),
            'swa_start=0.75 was not reached: epoch 3 (from 0) would be the first one averaged, so ',
        ),
        (dict(swa_start=2, cycle_len=[0, 1, 7]), 'cycle_len has no epoch from 2 (swa_start=2) to 3, the last one, '),
        (dict(swa_start=2, every=7), 'every=7 was not reached: this fit took 3 optimizer steps from epoch 2 on and '),
        (dict(swa_start=9, every=7), 'swa_start=9 was not reached: epoch 9 '),
    ],
)
def test_why_a_fit_averages_nothing(kwargs, sentence):
    said = why(4, **kwargs)
    assert said.startswith(sentence) and said.endswith('averages nothing')


@pytest.mark.parametrize('freq', range(5))
@pytest.mark.parametrize('averaged', [[2], [0, 1, 2, 3], [1, 4, 5, 8, 9]])
def test_an_average_is_validated_with_every_so_many_of_its_points_and_in_the_last_epoch(averaged, freq):
    expected = {9}
    for n_points, epoch in enumerate(averaged, 1):
        if freq and n_points in range(1, 100, freq):
            expected.add(epoch)
    assert validated_epochs(averaged, 10, freq) == sorted(expected)


def test_a_list_is_taken_for_lengths_only_where_it_fills_the_fit_and_leaves_out_its_last_epoch():
    assert 'the last epochs are [0, 2, 6]' in remarks_on_cycles([1, 2, 4], [1, 2, 4], 7)['cycles']
    assert not remarks_on_cycles([1, 2, 4], [1, 2, 4], 8) and not remarks_on_cycles([0, 1, 2], [0, 1, 2], 3)
    assert not remarks_on_cycles(7, [0], 7)
