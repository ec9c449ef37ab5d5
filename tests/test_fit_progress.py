"""How far a fit with an average has come, as an object of its own."""

from types import SimpleNamespace

import pytest

from fastai_swa.fit_history import FitHistory
from fastai_swa.fit_progress import Epoch, Fit


class Watch:
    def moved(self):
        return ['1']


def test_which_statistics_moved_is_known_only_where_a_batch_was_seen_and_watched():
    epoch = Epoch(3, train_iter_before=20)
    seen, unseen = SimpleNamespace(train_iter=26), SimpleNamespace(train_iter=20)
    assert epoch.n_batches(seen) == 6 and epoch.statistics_moved(seen) is None
    epoch.watch = Watch()
    assert epoch.statistics_moved(seen) == ['1'] and epoch.statistics_moved(unseen) is None
    epoch.is_open = True
    epoch.close()
    assert not epoch.is_open and epoch.statistics_moved(seen) is None


@pytest.mark.parametrize('freq', range(4))
def test_the_average_is_validated_with_every_so_many_epochs_of_points_and_in_the_last_epoch(freq):
    fit = Fit(start=1, due=[])
    has_points = [False, True, True, False, True, True, False]
    validated = []
    for number, folded in enumerate(has_points):
        fit.epoch = Epoch(number, folded=folded)
        fit.n_epochs += folded
        fit.n_folds += 2 * folded
        if fit.is_validated(freq, is_last=number == len(has_points) - 1):
            validated.append(number)
    assert validated == {0: [6], 1: [1, 2, 4, 5, 6], 2: [1, 4, 6], 3: [1, 5, 6]}[freq]
    assert not Fit(start=1, due=[]).is_validated(1, is_last=True)


def table(history):
    res = SimpleNamespace(history=history)
    res.go_on = lambda history: vars(res).update(history=history)
    return res


def test_its_state_is_put_into_another_one():
    fit = Fit(2, [2, 3], table(FitHistory('swa', ['swa_valid_loss'], ['valid_loss', 'swa_valid_loss'])))
    fit.n_folds, fit.n_epochs, fit.n_steps, fit.n_before = 3, 2, 7, 40
    fit.table.history.add(1, {'valid_loss': 0.5})
    other = Fit(0, [0], table(None))
    other.load_state_dict(fit.state_dict(), 'the average')
    assert other.state_dict()['fit'] == dict(start=2, n_folds=3, n_epochs=2, n_steps=7, n_before=40)
    assert other.table.history.column('valid_loss') == [0.5] and other.due == [0]  # that is the caller's
    assert Fit(2, []).state_dict()['history'] is None


def test_a_state_of_an_earlier_version_leaves_what_it_lacks():
    fit = Fit(2, [2, 3], table('its own'), n_before=8)
    fit.load_state_dict({'fit': {'n_folds': 3}}, 'the average')
    assert (fit.n_folds, fit.n_before, fit.start, fit.table.history) == (3, 8, 2, 'its own')


@pytest.mark.parametrize('value', ['3', 3.0, True, None])
def test_a_count_that_is_none_is_one_sentence_and_changes_nothing(value):
    fit = Fit(2, [2, 3])
    with pytest.raises(ValueError, match="the state of the average 'ema' has counts that are none"):
        fit.load_state_dict({'fit': {'n_steps': 5, 'n_folds': value}}, "the average 'ema'")
    assert fit.n_steps == fit.n_folds == 0
