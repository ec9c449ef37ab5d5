"""Choosing an average: candidates, paired gains, and whether one helps at all."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Metric
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import F1Score, accuracy
from torch.nn import functional as F

from fastai_swa import WeightHistory
from fastai_swa.choosing import (
    Candidate,
    Scores,
    _best,
    _sentence,
    candidates,
    gain,
    remark_on_choice,
    seconds_to_choose,
)

from .helpers import fingerprint, learner, loaders
from .reference.twins import AllSteps


def test_candidates_are_at_most_sixty_the_last_weights_first_and_windows_are_exact():
    ends = np.cumsum([100] * 16 + [50, 40, 30, 20, 10, 8, 6, 4, 3, 2, 1, 1])
    epochs = [[e, (e + 1) * 100] for e in range(17)]
    epochs[-1][1] = int(ends[-1])
    found = candidates(ends, epochs, 1)
    assert len(found) <= 60 and found[0].which == {}
    assert {c.kind for c in found} == {'last', 'refreshed', 'single', 'window', 'ema', 'power'}
    history = WeightHistory()
    borders = {0, *ends.tolist()}
    for c in found:
        if 'epochs' in c.which:
            from fastai_swa.weightings import weighting

            points = np.flatnonzero(weighting(c.which, int(ends[-1]), epochs, 1))
            assert {points[0], points[-1] + 1} <= borders and len(points) == c.points
    del history


def test_without_ends_all_windows_reach_the_end():
    ends = np.arange(10, 110, 10)
    found = candidates(ends, [[e, (e + 1) * 10] for e in range(10)], 1, with_ends=False)
    windows = [c.which['epochs'] for c in found if c.kind == 'window']
    assert windows and all(b == 10 for _, b in windows)


def test_the_standard_error_of_a_gain_is_that_of_the_paired_differences():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200), rng.normal(size=200)
    scores = [Scores({'valid_loss': x.mean()}, {'valid_loss': x}, {'valid_loss': np.ones(200)}) for x in (a, b)]
    better, error = gain(*scores, 'valid_loss', True)
    assert better == pytest.approx(b.mean() - a.mean())
    assert error == pytest.approx((a - b).std(ddof=1) / 200**0.5)


def test_over_batches_it_is_weighted_by_their_sizes():
    "Beside a bootstrap over the batches."
    rng = np.random.default_rng(0)
    sizes = np.array([32] * 15 + [8])
    a, b = rng.normal(size=16), rng.normal(size=16)
    scores = [Scores({'m': np.average(x, weights=sizes)}, {'m': x}, {'m': sizes}) for x in (a, b)]
    better, error = gain(*scores, 'm', False)
    assert better == pytest.approx(np.average(a - b, weights=sizes))
    picks = rng.integers(0, 16, (20_000, 16))
    booted = ((a - b)[picks] * sizes[picks]).sum(1) / sizes[picks].sum(1)
    assert error == pytest.approx(booted.std(), rel=0.1)


@pytest.mark.parametrize(
    'gains, best',
    [
        ([(0, 0), (0.1, 0.01), (0.3, 0.01)], 2),
        ([(0, 0), (0.1, 0.06), (-0.3, 0.01)], 0),  # within two standard errors
        ([(0, 0), (-0.1, 0.01)], 0),
        ([(0, 0), (0.1, math.nan)], 1),  # no measure of chance
        ([(0, 0), (math.nan, math.nan)], 0),
    ],
)
def test_an_average_helps_where_it_gains_more_than_two_standard_errors(gains, best):
    assert _best(gains) == best


def fitted(n_epoch=8, **kwargs):
    learn = learner(**kwargs)
    history, steps = WeightHistory(n_segments=12), AllSteps()
    learn.fit(n_epoch, cbs=[history, steps])
    return learn, history, steps


def test_the_table_has_what_an_independent_validation_has():
    learn, history, _ = fitted()
    table = history.choose(bn_batches=None)
    with history.averaged(epochs=(4, 8)):
        loss, acc = learn.validate()
    row = table[table['average'] == 'epochs=(4, 8)'].iloc[0]
    assert row['valid_loss'] == pytest.approx(loss, rel=0.05)  # batches for batch norm are drawn in another order
    last = table[table['kind'] == 'last'].iloc[0]
    assert [last['valid_loss'], last['accuracy']] == pytest.approx(list(learn.validate()), rel=1e-6)
    assert last['gain'] == 0 and table['gain'].is_monotonic_decreasing


def test_the_standard_error_is_over_the_samples_of_the_validation_set():
    learn, history, _ = fitted()
    table = history.choose(bn_batches=None)
    row = table[table['average'] == 'epochs=(7, 8)'].iloc[0]

    def losses():
        preds, targets = learn.get_preds(act=lambda x: x)
        return F.cross_entropy(preds, targets, reduction='none').numpy()

    last = losses()
    with history.averaged(epochs=(7, 8)):
        d = last - losses()
    assert row['std_error'] == pytest.approx(d.std(ddof=1) / len(d) ** 0.5, rel=0.2)


def test_the_best_is_chosen_and_used_without_arguments(capsys):
    learn, history, _ = fitted()
    table = history.choose()
    assert 'valid_loss' in capsys.readouterr().out.splitlines()[-1]
    best = table.iloc[0]
    if history.chosen:
        assert best['gain'] > 2 * best['std_error']
        with history.averaged() as inside:
            assert inside.validate()[0] == pytest.approx(best['valid_loss'], rel=0.05)
    assert repr(history).count('chosen') == 1


def test_where_no_average_helps_it_says_so_and_keeps_the_last_weights(capsys):
    "A training that has only just begun: every average is behind."
    learn, history, _ = fitted(2, lr=0.02, model=torch.nn.Linear(6, 3))
    history.choose()
    assert history.chosen == {}
    assert 'No average beats the last weights' in capsys.readouterr().out
    for name, t in history.average().items():
        assert torch.equal(t, learn.model.state_dict()[name])
    with history.averaged() as inside:
        inside.validate()
    assert 'chosen: the last weights' in repr(history)


def test_samples_of_ones_own_choose_where_they_are_given(capsys):
    learn, history, _ = fitted()
    other = loaders(n_valid=64, seed=3).valid
    table = history.choose(dl=other)
    assert 'the 64 samples of dl' in capsys.readouterr().out
    last = table[table['kind'] == 'last'].iloc[0]
    assert last['valid_loss'] == pytest.approx(learn.validate(dl=other)[0], rel=1e-5)


def test_a_metric_is_compared_as_fastais_trackers_do():
    learn, history, _ = fitted(metrics=[accuracy, F1Score(average='macro')])
    by_accuracy = history.choose(by='accuracy')
    assert by_accuracy['accuracy'].iloc[0] == by_accuracy['accuracy'].max()
    by_f1 = history.choose(by='f1_score')
    assert by_f1['f1_score'].iloc[0] == by_f1['f1_score'].max() and by_f1['std_error'].iloc[1:].isna().all()
    worst = history.choose(by='accuracy', comp=np.less)
    assert worst['accuracy'].iloc[0] == worst['accuracy'].min()


def test_ten_batches_give_a_metric_its_standard_error():
    dls = loaders(n_valid=120)
    small = dls.valid.new(bs=8)
    learn, history, _ = fitted(dls=DataLoaders(dls.train, small, device='cpu'))
    table = history.choose(by='accuracy')
    assert table['std_error'].notna().all() and (table['std_error'] > 0).any()


def test_a_loss_that_has_none_for_a_sample_is_compared_by_batches_or_by_value():
    def loss(pred, y):
        return F.cross_entropy(pred, y)

    learn = learner()
    learn.loss_func = loss
    history = WeightHistory(n_segments=12)
    learn.fit(4, cbs=history)
    table = history.choose()
    assert table['std_error'].iloc[1:].isna().all()


def test_class_weights_do_not_pass_for_a_mean_over_samples():
    learn = learner()
    learn.loss_func = CrossEntropyLossFlat(weight=torch.tensor([1.0, 5.0, 0.1]))
    history = WeightHistory(n_segments=12)
    learn.fit(4, cbs=history)
    assert history.choose()['std_error'].iloc[1:].isna().all()


def test_a_missing_metric_and_a_missing_validation_set_are_named():
    learn, history, _ = fitted()
    with pytest.raises(ValueError, match='by'):
        history.choose(by='error_rate')
    learn.dls = DataLoaders(learn.dls.train, device='cpu')
    with pytest.raises(ValueError, match='no validation set to choose on'):
        history.choose()


def test_choosing_leaves_learner_random_state_and_recorder_as_they_were():
    learn, history, _ = fitted()
    before = fingerprint(learn)
    history.choose()
    after = fingerprint(learn)
    assert before.keys() == after.keys()
    for k in before:
        same = torch.equal(before[k], after[k]) if isinstance(before[k], torch.Tensor) else before[k] == after[k]
        assert same or repr(before[k]) == repr(after[k]), k


def test_the_figure_shows_windows_and_the_two_lines():
    _, history, _ = fitted()
    history.choose()
    axs = history.plot()
    labels = axs[1].get_legend_handles_labels()[1]
    assert labels == ['mean from there to the end', 'the last weights', 'best single stretch']
    plt.close('all')


class Failing(Metric):
    name = 'failing'

    def reset(self):
        pass

    def accumulate(self, learn):
        pass

    @property
    def value(self):
        return None


def test_a_metric_without_a_value_does_not_choose():
    _, history, _ = fitted(metrics=[accuracy, Failing()])
    history.choose(by='failing')
    assert history.chosen == {}


def test_the_table_says_on_which_samples_it_was_chosen():
    _, history, _ = fitted()
    table = history.choose()
    assert table.columns.name == 'on the 40 samples of the validation set'
    assert list(table) == ['average', 'kind', 'valid_loss', 'accuracy', 'gain', 'std_error', 'points']
    assert 'on the 40 samples' in table.to_string()


@pytest.mark.parametrize(
    'kind, points, said',
    [
        ('single', 1, ', which is one step, its batch norm refreshed, '),
        ('refreshed', 1, ', which are the last weights, their batch norm refreshed, '),
        ('window', 5, 'epochs=(1, 2), valid_loss'),
    ],
)
def test_one_step_that_is_chosen_for_its_batch_norm_is_not_called_an_average(kind, points, said):
    found = [Candidate('last', {}, 1), Candidate(kind, {'epochs': (1, 2)}, points)]
    scores = [Scores({'valid_loss': 0.5}), Scores({'valid_loss': 0.4})]
    assert said in _sentence(found, scores, [(0, 0), (0.1, 0.01)], 1, 'valid_loss', 'the 40 samples of dl')


def test_beside_the_gain_of_an_average_is_said_what_its_batch_norm_alone_gives():
    found = [
        Candidate('last', {}, 1),
        Candidate('refreshed', {'epochs': (1.9, 2)}, 1),
        Candidate('window', {'epochs': (1, 2)}, 5),
    ]
    scores = [Scores({'valid_loss': loss}) for loss in (0.5, 0.42, 0.4)]
    gains = [(0, 0), (0.08, 0.01), (0.1, 0.01)]
    said = _sentence(found, scores, gains, 2, 'valid_loss', 'the 40 samples of dl')
    assert '(better by 0.1000 +- 0.0200; refreshed batch norm alone: 0.0800), on' in said


def test_where_the_last_weights_have_no_value_the_best_of_the_others_is_chosen():
    learn, history, _ = fitted()
    with torch.no_grad():
        next(iter(history._kept.last.values())).fill_(float('nan'))
    table = history.choose()
    assert history.chosen and np.isfinite(table['valid_loss'].iloc[0])
    assert table['valid_loss'].iloc[0] == table['valid_loss'].min() and np.isnan(table['valid_loss'].iloc[-1])


def test_how_long_choosing_takes_follows_from_the_times_of_the_fit():
    assert seconds_to_choose(50, 2.0, 0.3, 20) == pytest.approx(50 * (2 + 20 * 0.1))
    assert remark_on_choice(49, 0.3, 'history').endswith(
        '49 averages of this fit can be compared: `history.choose()`, in about a second'
    )
    assert remark_on_choice(49, 8.4, 'learn.weight_history').endswith('`learn.weight_history.choose()`, in about 8 s')
    assert remark_on_choice(49, 600, 'history').endswith('in about 10 min')
