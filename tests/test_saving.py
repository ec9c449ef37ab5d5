"""`SaveSWAModelCallback`: which average it saves and when, and what is said where it cannot."""

import copy

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException

from fastai_swa import CheckpointCallback, SaveSWAModelCallback, SnapshotCallback, SWACallback
from fastai_swa.walk import named_callbacks

from .helpers import At, Snapshots, column, learner, parameters, raising, training_set
from .reference import twins


def test_save_swa_model_saves_the_best_average_and_loads_nothing(tmp_path):
    learn, swa, snaps = learner(path=tmp_path), SWACallback(swa_start=1), Snapshots()
    saver = SaveSWAModelCallback('swa_accuracy', fname='best')
    kept = {}

    class Keep(Callback):
        order = 90

        def after_epoch(self):
            if swa.n_averaged:
                kept[self.epoch] = copy.deepcopy(swa.swa_model.state_dict())

    learn.fit(6, cbs=[swa, saver, snaps, Keep()])
    for a, b in zip(parameters(learn.model), snaps.weights[-1]):
        assert torch.equal(a, b)
    accuracies = column(learn, 'swa_accuracy')
    best = max(range(1, 6), key=lambda e: (accuracies[e], -e))
    saved = learner(path=tmp_path, seed=9).load('best', with_opt=False).model.state_dict()
    for k, v in saved.items():
        assert torch.equal(v, kept[best][k]), k
    assert saver.best == accuracies[best] and saver.last_saved_path.exists()


def test_save_swa_model_every_epoch_and_at_the_end_with_fresh_batch_norm(tmp_path):
    learn = learner(path=tmp_path)
    learn.fit(4, cbs=[SWACallback(swa_start=1, swa_eval_freq=0), SaveSWAModelCallback(every_epoch=True)])
    assert sorted(p.name for p in (tmp_path / 'models').iterdir()) == [f'swa_model_{e}.pth' for e in (1, 2, 3)]
    saved = learner(path=tmp_path).load('swa_model_2', with_opt=False).model
    mean, _ = twins.bn_statistics(saved, training_set(learn))['1']
    torch.testing.assert_close(saved[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    swa = SWACallback(swa_start=0, swa_eval_freq=0)
    learn.fit(
        3,
        cbs=[swa, SaveSWAModelCallback(at_end=True, fname='end'), At('after_epoch', 1, raising(CancelFitException()))],
    )
    for k, v in torch.load(tmp_path / 'models' / 'end.pth', weights_only=True).items():
        assert torch.equal(v, swa.swa_model.state_dict()[k])


def test_save_swa_model_stands_aside_or_says_what_it_lacks(tmp_path):
    learn = learner(path=tmp_path)
    with pytest.raises(ValueError, match='needs a SWACallback in the same fit'):
        learn.fit(1, cbs=SaveSWAModelCallback())
    with pytest.raises(ValueError, match="monitor must be one of swa_valid_loss, swa_accuracy, not 'accuracy'"):
        learn.fit(1, cbs=[SWACallback(), SaveSWAModelCallback('accuracy')])
    with pytest.raises(ValueError, match='every_epoch and at_end'):
        SaveSWAModelCallback(every_epoch=True, at_end=True)
    learn.to_swa(swa_start=0).add_cb(SaveSWAModelCallback())
    learn.swa.enabled = False
    learn.fit(1), learn.validate()
    learn.swa.enabled = True
    learn.fit(1), learn.validate()
    assert [p.name for p in (tmp_path / 'models').iterdir()] == ['swa_model.pth']


def test_checkpoints_name_the_packages_callbacks_as_the_first_files_did():
    class OfAUser(SaveSWAModelCallback):
        pass

    learn = learner()
    cbs = [SWACallback(), SWACallback(name='ema'), SaveSWAModelCallback(), CheckpointCallback('x'), SnapshotCallback(0)]
    learn.add_cbs([*cbs, OfAUser()])
    names = {name for name, _ in named_callbacks(learn) if not name.startswith('fastai.')}
    assert names == {
        'fastai_swa.callback.SWACallback.0',
        'fastai_swa.callback.SWACallback.ema',
        'fastai_swa.callback.SaveSWAModelCallback.0',
        'fastai_swa.checkpoint.CheckpointCallback.0',
        'fastai_swa.snapshots.SnapshotCallback.0',
        f'{__name__}.{OfAUser.__qualname__}.0',
    }
