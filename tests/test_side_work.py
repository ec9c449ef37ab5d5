"""What the averaging does beside a training does not end it."""

import math
import warnings

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastai.learner import AvgMetric
from fastai.metrics import accuracy

from fastai_swa import CheckpointCallback, SaveSWAModelCallback, SWACallback

from .helpers import At, Snapshots, assert_close, assert_same, column, fingerprint, learner, net, parameters, raising
from .reference import twins


class InPass(Callback):
    """Calls `f` in the passes aside from training over the data `which`, in the epochs given:
    'train' is batch norm's, 'valid' the validation of the average.
    """

    def __init__(self, which, epochs, f):
        self.which, self.epochs, self.f, self.n = which, epochs, f, 0

    def before_epoch(self):
        self.n, self.at = 0, self.learn.epoch

    def before_validate(self):
        self.n += 1
        is_bn = len(self.dl.dataset) == len(self.dls.train.dataset)
        if self.n > 1 and self.at in self.epochs and is_bn == (self.which == 'train'):
            self.f()


def fails():
    raise MemoryError('out of memory')


def trained(*cbs, n_epoch=5, **kwargs):
    learn = learner(**kwargs)
    learn.fit(n_epoch, cbs=list(cbs))
    return learn


@pytest.mark.parametrize('which', ['train', 'valid'])
def test_a_pass_that_fails_is_one_warning_with_its_text_and_leaves_nan(which):
    swa = SWACallback(1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        learn = trained(swa, InPass(which, (2, 3), fails))
    texts = [str(w.message) for w in warned if 'the average' in str(w.message)]
    assert (
        len(texts) == 2
        and 'out of memory' in texts[0]
        and 'training goes on' in texts[0]
        and texts[1].endswith('failed 2 times in this fit')
    )
    losses = column(learn, 'swa_valid_loss')
    assert [math.isnan(x) for x in losses] == [True, False, True, True, False] and swa.n_averaged == 4
    plain = trained(InPass(which, (2, 3), lambda: None))
    assert all(torch.equal(a, b) for a, b in zip(parameters(learn.model), parameters(plain.model)))
    with swa.averaged():
        assert learn.validate()[0] == pytest.approx(losses[-1])


def test_training_is_bitwise_as_without_the_callback_when_all_side_work_fails():
    plain, learn = trained(), trained(SWACallback(0), InPass('train', range(5), fails))
    a, b = fingerprint(plain), fingerprint(learn)
    assert_same(a, b)


@pytest.mark.parametrize('error', [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_is_no_exception_still_ends_the_fit(error):
    def ends():
        raise error

    with pytest.raises(error):
        trained(SWACallback(1), InPass('valid', (2,), ends))


def test_what_the_learners_own_training_and_validation_raise_is_still_raised():
    class Fails(Callback):
        def before_validate(self):
            raise ZeroDivisionError('in a callback')

    with pytest.raises(ZeroDivisionError):
        trained(SWACallback(0), Fails())


def test_a_fold_that_fails_leaves_the_average_as_before_and_the_row_nan():
    def weight(n):
        if n == 2:
            raise ZeroDivisionError('no weight')
        return 1 / (n + 1)

    snaps, swa = Snapshots(), SWACallback(0, weight=weight)
    with pytest.warns(UserWarning, match='taking the weights into the average failed.*no weight'):
        learn = trained(snaps, swa)
    assert swa.averaged_epochs == [0, 1] and swa.n_averaged == 2
    assert_close(parameters(swa.swa_model), twins.mean(snaps.weights[:2]))
    assert [math.isnan(x) for x in column(learn, 'swa_valid_loss')] == [
        False,
        False,
        True,
        True,
        False,
    ]  # in the last epoch it is validated as it is


def test_a_model_that_cannot_be_copied_at_the_first_fold_does_not_end_the_fit():
    def uncopyable(cb):
        cb.learn.model.handle = open('/dev/null')  # noqa: SIM115

    swa = SWACallback(2)
    with pytest.warns(UserWarning, match='taking the weights'):
        trained(swa, At('before_train', 1, uncopyable))
    assert swa.n_averaged == 0


@pytest.mark.parametrize('kind', [EarlyStoppingCallback, ReduceLROnPlateau])
def test_trackers_on_the_column_neither_count_nor_act_where_its_value_failed(kind):
    tracker = kind('swa_valid_loss', min_delta=-10.0, patience=2)  # any value is an improvement
    lrs = []

    class LogsRates(Callback):
        def after_train(self):
            lrs.append(self.opt.hypers[-1]['lr'])

    with pytest.warns(UserWarning, match='failed'):
        learn = trained(SWACallback(0), tracker, LogsRates(), InPass('valid', (1, 2, 3), fails), n_epoch=6)
    assert len(learn.recorder.values) == 6 and len(set(lrs)) == 1 and tracker.wait == 0


def test_trackers_count_a_nan_for_want_of_a_fold_as_ever():
    with pytest.warns(UserWarning, match='for want of values'):
        learn = trained(SWACallback(4), EarlyStoppingCallback('swa_valid_loss', patience=2), n_epoch=6)
    assert len(learn.recorder.values) == 2


def test_a_tracker_works_again_after_the_epoch_that_failed():
    tracker = EarlyStoppingCallback('swa_valid_loss', min_delta=10.0, patience=2)  # nothing but the first value is one
    with pytest.warns(UserWarning, match='failed'):
        learn = trained(SWACallback(0), tracker, InPass('valid', (1,), fails), n_epoch=8)
    assert len(learn.recorder.values) == 4 and tracker.run


def test_a_callback_that_cancels_a_pass_does_not_cancel_the_fit():
    def cancels():
        raise CancelFitException

    swa = SWACallback(1)
    with pytest.warns(UserWarning, match='cancel'):
        learn = trained(swa, InPass('valid', (2,), cancels))
    assert [math.isnan(x) for x in column(learn, 'swa_valid_loss')] == [True, False, True, False, False]


def test_a_file_that_cannot_be_written_is_a_warning_and_the_next_better_value_is_saved(tmp_path, monkeypatch):
    from fastai_swa import saving

    save, calls = saving.save_weights, []

    def full(file, weights):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, 'No space left on device')
        save(file, weights)

    monkeypatch.setattr(saving, 'save_weights', full)
    swa = SWACallback(0)
    with pytest.warns(UserWarning, match='saving the average failed.*No space left'):
        trained(swa, SaveSWAModelCallback(comp=lambda a, b: True), path=tmp_path)
    saved = torch.load(tmp_path / 'models' / 'swa_model.pth', weights_only=True)
    assert len(calls) == 5 and all(torch.equal(v, saved[k]) for k, v in swa.swa_model.state_dict().items())


def test_a_metric_that_fails_on_the_average_alone_costs_one_row():
    calls = []

    def picky(preds, targets):
        calls.append(1)
        if len(calls) == 7:
            raise ValueError('a single class')  # epoch 1: two batches of the fit's own, two of the average's
        return accuracy(preds, targets)

    swa = SWACallback(0)
    with pytest.warns(UserWarning, match='a single class'):
        learn = trained(swa, metrics=AvgMetric(picky), n_epoch=3)
    assert sum(math.isnan(x) for x in column(learn, 'swa_valid_loss')) == 1


def test_what_is_known_before_the_first_step_is_still_raised():
    steps = []

    class Count(Callback):
        def after_step(self):
            steps.append(1)

    with pytest.raises(ValueError, match='does not match'):
        trained(SWACallback(0, swa_model=net(width=5)), Count())
    assert not steps


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path):
    (tmp_path / 'models').write_text('no folder')
    with pytest.warns(UserWarning, match='saving the average failed'):
        learn = trained(SWACallback(0), SaveSWAModelCallback(), path=tmp_path, n_epoch=3)
    assert len(learn.recorder.values) == 3


def test_a_model_that_cannot_be_looked_through_costs_the_average_alone():
    class Extra(torch.nn.Sequential):
        def get_extra_state(self):
            return open

        def set_extra_state(self, state):
            pass

    for every in (None, 1):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert len(trained(SWACallback(0, every=every), model=Extra(*net()), n_epoch=3).recorder.values) == 3


def test_warnings_made_errors_leave_no_callback_on_the_learner():
    learn = learner()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(Exception, match='out of memory'):
            learn.fit(3, cbs=[SWACallback(0), InPass('valid', (1,), fails)])
    assert not [cb for cb in learn.cbs if isinstance(cb, SWACallback | InPass)] and not hasattr(learn, 'swa')


def test_a_tracker_muted_for_a_failed_value_is_not_muted_by_a_resume(tmp_path):
    def start(*cbs):
        learn = learner()
        tracker = EarlyStoppingCallback('swa_valid_loss', min_delta=10.0, patience=3)
        learn.fit(
            10,
            cbs=[
                SWACallback(0),
                tracker,
                InPass('valid', (2,), fails),
                CheckpointCallback(tmp_path / 'run.ckpt'),
                *cbs,
            ],
        )
        return len(learn.recorder.values)

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        whole = start()
        with pytest.raises(KeyboardInterrupt):
            start(At('after_step', 3, raising(KeyboardInterrupt()), batch=2))
        assert start() == whole < 10
