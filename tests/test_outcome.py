"""The lines at the end of a fit with an average."""

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import combined_cos
from fastai.callback.tracker import EarlyStoppingCallback
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastai_swa import SWACallback, ema, equal
from fastai_swa.fit_history import FitHistory
from fastai_swa.outcome import (
    Outcome,
    described,
    lines,
    relative_lag,
    remark_on_first_point,
    remark_on_one_point,
    remark_on_progress,
    remark_on_rate,
    result,
    share_of_first,
)
from fastai_swa.schedules import swa_lr_factor

from .helpers import At, assert_same, column, fingerprint, learner, raising

NAN = float('nan')


def history(raw, average, averaged, first=0):
    "A table with losses alone."
    h = FitHistory('swa', ['swa_valid_loss'], ['train_loss', 'valid_loss', 'swa_valid_loss'], averaged=list(averaged))
    for i, (r, a) in enumerate(zip(raw, average)):
        h.add(first + i, {'train_loss': 1.0, 'valid_loss': r, 'swa_valid_loss': a})
    return h


# the first line


@pytest.mark.parametrize(
    'n, epochs, by_steps, expected',
    [
        (1, [4], False, 'average of 1 epoch (4)'),
        (3, [2, 3, 4], False, 'average of 3 epochs (2-4)'),
        (6, [0, 3, 4, 5, 9, 11], False, 'average of 6 epochs (0, 3-5, 9, 11)'),
        (5, [7, 8, 3, 4, 5], False, 'average of 5 epochs (7-8, 3-5)'),  # the former gone on with
        (1, [2], True, 'average of 1 step (epoch 2)'),
        (30, [2, 3], True, 'average of 30 steps (epochs 2-3)'),
    ],
)
def test_an_average_is_described_by_its_points(n, epochs, by_steps, expected):
    assert described(n, epochs, by_steps) == expected


def test_the_result_names_both_models_numbers_of_the_last_validated_epoch():
    h = history([0.5, 0.4, 0.3], [NAN, NAN, 0.25], [2])
    assert result(h, 'average of 1 epoch (2)', 'swa') == (
        'average of 1 epoch (2): valid_loss 0.250000 (in training 0.300000); next: `with swa.averaged():`, or '
        '`swa.apply()` for good'
    )
    h = history([0.5, 0.4, 0.3], [NAN, 0.35, NAN], [1], first=4)
    assert 'after epoch 5: valid_loss 0.350000 (in training 0.400000)' in result(h, 'average of 1 epoch (5)', 'swa')
    h = history([0.5], [NAN], [0])
    assert result(h, 'average of 1 epoch (0)', 'learn.ema') == (
        'average of 1 epoch (0), not validated; next: `with learn.ema.averaged():`, or `learn.ema.apply()` for good'
    )


# the learning rate


@given(st.lists(st.floats(1e-3, 10), min_size=1, max_size=30))
def test_the_lag_is_that_of_the_mean_of_points_that_walk_straight(lrs):
    def lag(rates):
        places = np.concatenate([[0], np.cumsum(rates)])
        return places[-1] - places.mean()

    expected = lag(lrs) / lag([10.0] * len(lrs))
    assert relative_lag(np.array(lrs), 10.0) == pytest.approx(expected, rel=1e-9)


def rates(schedule, n_epoch, n_steps=20):
    return [schedule(e, i) for e in range(n_epoch) for i in range(n_steps)]


@pytest.mark.parametrize('n_epoch', [5, 8, 12, 30, 100, 300])
def test_a_one_cycle_end_is_near_zero(n_epoch):
    f = combined_cos(0.25, 0.1 / 25, 0.1, 0.1 / 1e5)
    lrs = rates(lambda e, i: float(f((20 * e + i) / (20 * n_epoch))), n_epoch)
    start = -(-3 * n_epoch // 4)
    if start + 1 < n_epoch:
        said = remark_on_rate(lrs, 20 * (start + 1))
        assert (
            'the learning rate ends near zero' in said and 'nearly the last weights' in said and 'after 0.1 at' in said
        )
    assert not remark_on_rate(lrs, 20)  # averaged from the first epoch on, it is far from the last weights


@pytest.mark.parametrize('swa_lr', [0.1, 0.5, 1.0, (0.5, 0.0001)])
@pytest.mark.parametrize('n_epoch', [4, 12, 100])
def test_a_constant_or_cyclic_end_is_not(swa_lr, n_epoch):
    start = n_epoch // 2
    lrs = rates(lambda e, i: swa_lr_factor(e, i, 20, start, swa_lr, 2), n_epoch)
    assert not remark_on_rate(lrs, 20 * (start + 1))


def test_where_no_rate_is_known_nothing_is_said_of_it():
    assert not remark_on_rate([], 0) and not remark_on_rate([0.1] * 3, 3) and not remark_on_rate([0.1] * 3, 9)


# the first point


@pytest.mark.parametrize('weight', [equal, ema(0.9), ema(0.5), ema(0.99), ema(0.99, warmup=True)])
@pytest.mark.parametrize('n', [1, 2, 3, 7, 40, 200])
def test_the_share_of_the_first_point_is_what_an_average_of_it_and_zeros_has(weight, n):
    average = 1.0
    for k in range(1, n):
        average += weight(k) * (0.0 - average)
    share = share_of_first(weight, n)
    assert share == pytest.approx(average) if average >= 1 / 3 else share < 1 / 3


@pytest.mark.parametrize(
    'weight, n, is_said',
    [
        (ema(0.9), 2, True),
        (ema(0.9), 5, True),
        (ema(0.9), 20, False),
        (ema(0.999), 100, True),
        (ema(0.999), 5000, False),
        (ema(0.5), 2, False),
        (ema(0.999, warmup=True), 3, False),
        *((equal, n, False) for n in (2, 3, 4, 100)),
    ],
)
def test_a_first_point_that_dominates_is_said(weight, n, is_said):
    said = remark_on_first_point(weight, n)
    assert bool(said) == is_said
    if is_said:
        assert f'still has {100 * share_of_first(weight, n):.0f} % of the weight' in said


# progress


@pytest.mark.parametrize(
    'raw, average, start, is_said',
    [
        ([1.0, 0.8, 0.6, 0.4], [NAN, 0.8, 0.7, 0.55], 1, True),
        ([1.0, 0.8, 0.6, 0.4], [NAN, 0.8, 0.7, 0.35], 1, False),  # the average is ahead
        ([1.0, 0.8, 0.6, 0.4], [NAN, 0.8, 0.7, 0.41], 1, False),  # hardly behind
        ([1.0, 0.4, 0.6, 0.4], [NAN, 0.4, 0.7, 0.55], 1, False),  # it went up and down
        ([1.0, 0.3, 0.4, 0.5], [NAN, 0.3, 0.5, 0.55], 1, False),  # it rose
        ([1.0, 0.8, 0.6, 0.4], [NAN, NAN, NAN, 0.4], 3, False),  # one epoch
        ([NAN] * 4, [NAN] * 4, 0, False),
    ],
)
def test_weights_that_were_still_improving_are_said(raw, average, start, is_said):
    said = remark_on_progress(history(raw, average, range(start, 4)))
    assert bool(said) == is_said
    if is_said:
        assert 'valid_loss 0.8000 after epoch 1, 0.4000 after epoch 3' in said and 'the average is behind' in said


# one point


def test_one_point_is_said_to_be_no_average():
    h = history([0.5, 0.4], [NAN, 0.3], [1])
    assert 'refreshed batch norm' in remark_on_one_point(h, False, True)
    without = remark_on_one_point(h, False, False)
    assert 'is the model itself' in without and 'batch norm' not in without
    h = history([0.5, 0.4, 0.3], [NAN, 0.3, 0.3], [1])
    assert 'is the model as it was after that, epoch 1' in remark_on_one_point(h, False, True)
    assert 'one step' in remark_on_one_point(h, True, True)
    h = history([0.5], [NAN], [1])  # stopped in the validation of that epoch
    said = remark_on_one_point(h, False, True)
    assert 'is the model itself' in said and 'columns' not in said


def test_there_are_two_lines_at_most():
    h = history([1.0, 0.8, 0.6], [NAN, 0.8, 0.75], [1, 2])
    lrs = [0.1] * 20 + [1e-5] * 10
    said = lines(Outcome(h, 'average of 2 epochs (1-2)', 'swa', 2, False, True, True, ema(0.9), lrs, 20))
    assert len(said) == 2 and all(line.startswith('swa: ') and '\n' not in line for line in said)
    assert 'near zero' in said[1] and 'first point' in said[1] and 'still improving' in said[1]
    gone_on = Outcome(h, 'average of 9 epochs', 'swa', 9, False, False, True, equal, lrs, 20)
    assert 'near zero' not in ''.join(lines(gone_on))  # earlier points are elsewhere


# in a fit


def said(capsys, prefix='swa: '):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(prefix)]


def test_a_fit_ends_with_both_models_metrics_and_what_to_call_next(capsys):
    learn = learner()
    learn.fit(5, cbs=SWACallback(swa_start=2))
    first, *_ = said(capsys)
    assert first.startswith('swa: average of 3 epochs (2-4): valid_loss ')
    for name in ('valid_loss', 'accuracy'):
        own, average = column(learn, name)[-1], column(learn, f'swa_{name}')[-1]
        assert f'{name} {average:.6f} (in training {own:.6f})' in first
    assert first.endswith('next: `with swa.averaged():`, or `swa.apply()` for good')


def test_short_fits_and_both_stages_of_fine_tune_say_that_one_epoch_is_no_average(capsys):
    learn = learner(splitter=lambda m: [list(m[:2].parameters()), list(m[2:].parameters())])
    learn.to_swa()
    learn.fine_tune(4)
    out = said(capsys)
    assert len(out) == 4 and all('`learn.swa.apply()`' in line for line in out[::2])
    assert all('the model itself' in line and 'refreshed batch norm' in line for line in out[1::2])
    for n in (1, 2, 3, 4):
        learner().fit(n, cbs=SWACallback())
        assert 'the model itself' in said(capsys)[1]
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    learner(plain).fit(1, cbs=SWACallback())
    assert 'batch norm' not in said(capsys)[1]


def test_one_cycle_says_that_its_average_is_nearly_the_last_weights(capsys):
    learner().fit_one_cycle(8, 0.1, cbs=SWACallback())
    assert 'the learning rate ends near zero' in said(capsys)[1]
    learner().fit_swa(8, 0.1, 0.1)
    assert 'near zero' not in ''.join(said(capsys))


def test_each_of_several_averages_has_its_own_lines(capsys):
    averages = [SWACallback(1), SWACallback(0, every=1, weight=ema(0.999), name='ema')]
    learner().fit(3, cbs=averages)
    out = said(capsys, ('swa: ', 'ema: '))
    of_swa = [line for line in out if line.startswith('swa: ')]
    of_ema = [line for line in out if line.startswith('ema: ')]
    assert of_swa[0].startswith('swa: average of 2 epochs (1-2): valid_loss') and len(of_ema) == 2
    assert of_ema[0].startswith('ema: average of 18 steps (epochs 0-2): valid_loss') and '`ema.apply()`' in of_ema[0]
    assert of_ema[1].startswith('ema: its first point still has 98 % of the weight')


def test_a_fit_that_is_stopped_says_what_it_has(capsys):
    learner().fit(9, cbs=[SWACallback(0, swa_eval_freq=2), EarlyStoppingCallback(min_delta=9.0, patience=3)])
    assert 'swa: average of 4 epochs (0-3) after epoch 2: valid_loss' in said(capsys)[0]
    stop = At('before_validate', 0, raising(CancelFitException()))
    learner().fit(3, cbs=[SWACallback(0), stop])
    assert 'swa: average of 1 epoch (0), not validated' in said(capsys)[0]


def test_nothing_is_said_without_an_average_without_a_table_or_under_no_logging(capsys):
    learn = learner()
    with pytest.warns(UserWarning, match='was not reached'):
        learn.fit(1, cbs=SWACallback(swa_start=3))
    with learn.no_logging():
        learn.fit(2, cbs=SWACallback(swa_start=0))
    with learn.no_mbar():
        learn.fit(2, cbs=SWACallback(swa_start=0))
    learn.remove_cbs([learn.progress, learn.recorder])
    learn.fit(2, cbs=SWACallback(swa_start=0))
    assert 'swa: ' not in capsys.readouterr().out


def test_without_a_progress_bar_it_is_said_by_the_logger(capsys):
    learn = learner()
    with learn.no_bar():
        learn.fit(2, cbs=SWACallback(swa_start=0))
        assert len(said(capsys)) >= 1
        with learn.no_logging():
            learn.fit(2, cbs=SWACallback(swa_start=0))
    assert not said(capsys)


@pytest.mark.parametrize('progress', [True, False])
def test_loggers_that_take_rows_get_rows_alone(progress, capsys, tmp_path):
    learn, rows = learner(path=tmp_path), []
    if not progress:
        learn.remove_cb(ProgressCallback)
    learn.logger = lambda row: rows.append([float(x) for x in row[:-1]])
    learn.fit(3, cbs=[SWACallback(swa_start=0), CSVLogger()])
    csv = (tmp_path / 'history.csv').read_text().splitlines()
    assert len(csv) == 4 and {line.count(',') for line in csv} == {6}
    assert len(rows) == (0 if progress else 3)  # fastai calls no other logger beside its progress bar
    assert bool(said(capsys)) == progress


def test_in_a_notebook_the_lines_leave_the_table_as_it_is(monkeypatch, capsys):
    "fastai's bar for notebooks shows what it has collected, wherever lines are printed."
    from fastprogress.fastprogress import NBMasterBar, NBProgressBar

    shown = []
    display = type('Out', (), {'update': lambda self, html: shown.append(str(html))})
    monkeypatch.setattr('IPython.display.display', lambda *args, **kwargs: display())
    monkeypatch.setattr('fastai.callback.progress.master_bar', NBMasterBar)
    monkeypatch.setattr('fastai.callback.progress.progress_bar', NBProgressBar)
    learner().fit(3, cbs=SWACallback(swa_start=0))
    assert shown[-1].count('<tr>') == 4 and 'averaged()' not in shown[-1]
    assert len(said(capsys)) >= 1


def test_training_and_its_record_are_untouched_by_what_is_said(capsys):
    def trained(n_epoch, *cbs):
        learn = learner()
        learn.fit_one_cycle(n_epoch, 0.1, cbs=list(cbs))
        return learn

    a, b = trained(5), trained(5, SWACallback())
    assert_same(fingerprint(a), fingerprint(b))
    assert len(said(capsys)) == 2


def test_an_error_in_saying_it_ends_nothing(monkeypatch):
    def fails(*args):
        raise ZeroDivisionError('no line')

    monkeypatch.setattr('fastai_swa.callback.lines', fails)
    learn, swa = learner(), SWACallback(swa_start=0)
    with pytest.warns(UserWarning, match='saying what came of the average failed'):
        learn.fit(2, cbs=swa)
    assert swa.n_averaged == 2


def test_no_pass_and_no_read_from_the_device_is_made_for_it(monkeypatch):
    "The lines are made of the history and of plain numbers, also where tensors cannot be read any more."
    calls = []

    def forbidden(*args, **kwargs):
        calls.append('read')
        raise AssertionError

    class Before(Callback):
        order = SWACallback.order - 1

        def after_fit(self):
            for name in ('item', 'tolist', '__float__', '__bool__', 'cpu', 'numpy', '__array__'):
                monkeypatch.setattr(torch.Tensor, name, forbidden)
            monkeypatch.setattr('fastai_swa.callback.validate_aside', forbidden)
            monkeypatch.setattr('fastai_swa.callback.refresh_bn', forbidden)

    class After(Before):
        order = SWACallback.order + 1

        def after_fit(self):
            monkeypatch.undo()

    learner().fit(3, cbs=[SWACallback(swa_start=1), Before(), After()])
    assert not calls


def test_a_fit_after_an_interrupted_one_ends_with_its_lines(capsys, ctrl_c):
    "fastai's progress callback then has its own logger for the one before."
    learn = learner(cbs=ProgressCallback())
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[SWACallback(0), At('before_batch', 1, raising(KeyboardInterrupt))])
    capsys.readouterr()
    learn.fit(2, cbs=SWACallback(0))
    assert 'swa: average of 2 epochs' in capsys.readouterr().out
