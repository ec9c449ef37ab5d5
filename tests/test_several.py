"""Several averages in one fit."""

import itertools

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback
from torch import nn

from fastai_swa import CheckpointCallback, SaveSWAModelCallback, SWACallback, ema

from .helpers import At, column, learner, raising
from .reference import twins

KINDS = {
    'swa': dict(swa_start=1),
    'ema': dict(swa_start=0, every=1, weight=ema(0.9)),
    'late': dict(swa_start=2, cycle_len=2, swa_eval_freq=2, bn_batches=3),
}


def made(*names):
    return [SWACallback(name=name, **KINDS[name]) for name in names]


def state(learn, swa, name):
    return {k: v.clone() for k, v in swa.swa_model.state_dict().items()} | {
        'loss': column(learn, f'{name}_valid_loss'),
        'accuracy': column(learn, f'{name}_accuracy'),
        'epochs': swa.averaged_epochs,
    }


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else repr(a[k]) == repr(b[k]), k


@pytest.fixture(scope='module')
def alone():
    res = {}
    for name in KINDS:
        learn, swa = learner(), *made(name)
        learn.fit(4, cbs=swa)
        res[name] = state(learn, swa, name)
    return res


@pytest.mark.parametrize('order', list(itertools.permutations(KINDS)))
def test_each_is_bitwise_what_it_would_be_alone_in_any_order(order, alone):
    learn, averages = learner(), made(*order)
    learn.fit(4, cbs=averages)
    for name, swa in zip(order, averages):
        assert_equal(state(learn, swa, name), alone[name])


def test_columns_stay_with_their_names_beside_a_callback_that_shuffles_the_learners(alone):
    class Shuffles(Callback):
        "What fastai's FetchPredsCallback does: callbacks come back at the end of the list."

        order = 1

        def after_train(self):
            with self.learn.removed_cbs([self.learn.late, self.learn.swa]):
                pass

    learn, averages = learner(), made('swa', 'late')
    learn.fit(4, cbs=[*averages, Shuffles()])
    for name, swa in zip(('swa', 'late'), averages):
        assert_equal(state(learn, swa, name), alone[name])


def test_each_is_an_attribute_of_the_learner_under_its_name():
    learn = learner().to_swa(swa_start=0).to_swa(swa_start=0, name='ema', every=1, weight=ema(0.9))
    assert learn.swa is not learn.ema
    learn.fit(2)
    assert learn.swa.n_averaged == 2 and learn.ema.n_averaged == 12
    learn.to_swa(name='ema', swa_start=1)
    assert (
        learn.swa.n_averaged == 2
        and learn.ema.n_averaged == 0
        and len([cb for cb in learn.cbs if isinstance(cb, SWACallback)]) == 2
    )
    learn.remove_swa('ema')
    assert not hasattr(learn, 'ema') and hasattr(learn, 'swa')
    learn.to_swa(name='ema').remove_swa()
    assert not hasattr(learn, 'ema') and not hasattr(learn, 'swa')


@pytest.mark.parametrize('name', ['model', 'opt', 'xb', 'fit', 'recorder', 'loss_func', 'n_epoch', 'lock', 'validate'])
def test_a_name_that_is_the_learners_own_is_refused_and_nothing_is_overwritten(name):
    learn = learner()
    with pytest.raises(ValueError, match=f"name='{name}'"):
        learn.to_swa(name=name)
    learn = learner()
    model = learn.model
    with pytest.raises(ValueError, match=f"name='{name}'"):
        learn.fit(1, cbs=SWACallback(name=name))
    assert (
        learn.model is model
        and not isinstance(getattr(learn, name, None), SWACallback)
        and not [cb for cb in learn.cbs if isinstance(cb, SWACallback)]
    )


def test_a_name_of_a_part_of_the_model_is_refused():
    learn = learner()
    learn.model.head = torch.nn.Identity()
    with pytest.raises(ValueError, match='head'):
        learn.to_swa(name='head')


@pytest.mark.parametrize(
    'name, error',
    [
        ('a b', ValueError),
        ('', ValueError),
        ('class', ValueError),
        ('1st', ValueError),
        (3, TypeError),
        (None, TypeError),
    ],
)
def test_a_name_that_can_be_no_attribute_is_refused_at_construction(name, error):
    with pytest.raises(error, match='name must be'):
        SWACallback(name=name)


def test_columns_that_would_collide_are_refused():
    def valid_loss(preds, targets):
        return (preds.argmax(1) == targets).float().mean()

    valid_loss.__name__ = 'swa_valid_loss'
    with pytest.raises(ValueError, match='swa_valid_loss'):
        learner(metrics=valid_loss).fit(1, cbs=SWACallback())


def test_two_of_one_name_passed_to_a_fit_or_attached_to_a_learner_are_refused():
    with pytest.raises(ValueError, match='two SWACallbacks'):
        learner().fit(1, cbs=[SWACallback(0), SWACallback(0)])
    learn = learner(cbs=[SWACallback(0), SWACallback(0)])
    with pytest.raises(ValueError, match='two SWACallbacks'):
        learn.fit(1)


def test_one_that_is_passed_wins_over_the_attached_one_of_its_name_which_stays():
    learn = learner().to_swa(swa_start=0)
    attached = learn.swa
    with pytest.warns(UserWarning, match='learn.swa stands aside') as warned:
        swa = learn.fit_swa(2, 0.1, swa_start=1)
        learn.fit_swa(1, 0.1, swa_start=0)
    assert len([w for w in warned if 'stands aside' in str(w.message)]) == 1
    assert swa.averaged_epochs == [1] and attached.n_averaged == 0 and learn.swa is attached
    learn.fit(2)
    assert attached.averaged_epochs == [0, 1]


def test_fine_tune_with_a_callback_works_on_a_learner_that_has_one():
    learn, swa = learner().to_swa(swa_start=0), SWACallback(swa_start=0)
    with pytest.warns(UserWarning, match='stands aside'):
        learn.fine_tune(2, cbs=swa)
    assert swa.averaged_epochs == [0, 1] and learn.swa.n_averaged == 0


def test_a_disabled_namesake_is_in_nobodys_way():
    learn = learner().to_swa(swa_start=0)
    learn.swa.enabled = False
    swa = SWACallback(0)
    learn.fit(1, cbs=swa)
    assert swa.n_averaged == 1


def test_trackers_and_files_go_by_the_prefix_of_their_column(tmp_path):
    learn, averages = learner(path=tmp_path), made('swa', 'ema')
    learn.fit(
        3,
        cbs=[
            *averages,
            SaveSWAModelCallback('ema_valid_loss'),
            SaveSWAModelCallback('swa_valid_loss', every_epoch=True),
        ],
    )
    files = sorted(p.name for p in (tmp_path / 'models').iterdir())
    assert files == ['ema_model.pth', 'swa_model_1.pth', 'swa_model_2.pth']
    losses = column(learn, 'ema_valid_loss')
    saved = torch.load(tmp_path / 'models' / 'ema_model.pth', weights_only=True)
    if np.argmin(losses) == 2:
        assert all(torch.equal(v, saved[k]) for k, v in averages[1].swa_model.state_dict().items())
    assert all(
        torch.equal(v, torch.load(tmp_path / 'models' / 'swa_model_2.pth', weights_only=True)[k])
        for k, v in averages[0].swa_model.state_dict().items()
    )
    with pytest.raises(ValueError, match='monitor must be one of swa_valid_loss'):
        learner().fit(1, cbs=[SWACallback(0), SaveSWAModelCallback('ema_valid_loss')])


def test_a_tracker_is_warned_about_by_the_average_whose_column_it_watches():
    with pytest.warns(UserWarning, match="monitor='late_valid_loss', patience=1") as warned:
        learner().fit(3, cbs=[*made('swa', 'late'), EarlyStoppingCallback('late_valid_loss', patience=1)])
    assert len([w for w in warned if 'for want of values' in str(w.message)]) == 1


@pytest.mark.parametrize('order', [('swa', 'ema', 'late'), ('late', 'ema', 'swa')])
def test_a_checkpoint_keeps_each_by_its_name(order, alone, tmp_path):
    def start(names, *cbs):
        learn, averages = learner(), made(*names)
        learn.fit(4, cbs=[*averages, CheckpointCallback(tmp_path / 'run.ckpt'), *cbs])
        return learn, averages

    with pytest.raises(KeyboardInterrupt):
        start(('swa', 'ema', 'late'), At('after_batch', 3, raising(KeyboardInterrupt()), batch=2, training=True))
    learn, averages = start(order)
    for name, swa in zip(order, averages):
        assert_equal(state(learn, swa, name), alone[name])


def test_within_averaged_of_one_the_other_is_left_alone():
    learn, averages = learner(), made('swa', 'ema')
    learn.fit(3, cbs=averages)
    before = {k: v.clone() for k, v in averages[1].swa_model.state_dict().items()}
    with averages[0].averaged():
        with averages[1].averaged():
            inner = learn.validate()
        outer = learn.validate()
    assert inner[0] == pytest.approx(
        twins.evaluate(averages[1].swa_model, list(learn.dls.valid), nn.functional.cross_entropy)[0], rel=1e-5
    )
    assert outer[0] == pytest.approx(
        twins.evaluate(averages[0].swa_model, list(learn.dls.valid), nn.functional.cross_entropy)[0], rel=1e-5
    )
    assert all(torch.equal(v, before[k]) for k, v in averages[1].swa_model.state_dict().items())
