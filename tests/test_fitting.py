"""Which events a `FitCallback` gets, and what an interruption leaves."""

import warnings

import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import CrossEntropyLossFlat

from fastai_swa import CheckpointCallback, SWACallback
from fastai_swa.fitting import FitCallback, SideWork

from .helpers import At, assert_same, fingerprint, learner, raising

EVENTS = (
    'before_epoch before_train after_step after_train before_validate '
    'after_validate after_cancel_fit after_epoch after_fit'
).split()


class Log(FitCallback):
    "The events of one fit, with the learner's epoch; how often it was over."

    order = 2

    def __init__(self):
        self.events, self.n_over = [], 0

    def before_fit(self):
        self._fit = 'under way'
        self.events.append('before_fit')

    def over(self):
        self.n_over += 1


def _logged(name):
    def f(self):
        self.events.append((name, self.epoch))

    return f


for _name in EVENTS:
    setattr(Log, _name, _logged(_name))


def calls(what):
    "A callback's handler that has the learner do something else in the middle of a fit."

    def f(cb):
        learn = cb.learn
        if what == 'get_preds':
            learn.get_preds()
        elif what == 'inner get_preds':
            learn.get_preds(inner=True)
        elif what == 'validate':
            learn.validate()
        elif what == 'predict':
            learn.get_preds(dl=[learn.dls.valid.one_batch()])
        elif what == 'tta':
            tta(learn)
        elif what == 'fit':
            learn.fit(2, cbs=No())
        elif what == 'failing fit':
            with pytest.raises(ZeroDivisionError):
                learn.fit(2, cbs=[No(), At('after_step', 1, raising(ZeroDivisionError('x')), batch=0)])
        elif what == 'failing get_preds':
            with pytest.raises(ZeroDivisionError):
                learn.get_preds(cbs=Fails())

    return f


def tta(learn):
    "What `Learner.tta` does around its predictions."

    def tta(self):
        try:
            self(['before_fit', 'before_epoch'])
            self.get_preds(inner=True)
        finally:
            self('after_fit')

    tta(learn)


class Fails(Callback):
    def after_pred(self):
        raise ZeroDivisionError('x')


class No(Callback):
    "Lets a fit within a fit not begin another one."

    order = -5

    def before_fit(self):
        self.learn.is_within = True

    def after_fit(self):
        self.learn.is_within = False


@pytest.mark.parametrize(
    'event', ['before_train', 'after_step', 'after_train', 'before_validate', 'after_validate', 'after_epoch']
)
@pytest.mark.parametrize('what', ['get_preds', 'validate', 'inner get_preds', 'predict', 'tta', 'failing get_preds'])
def test_it_gets_the_events_of_its_fit_whatever_another_callback_calls_in_between(event, what):
    expected, log = Log(), Log()
    learner().fit(3, cbs=expected)

    class Calls(Callback):
        order = 3

    done = []

    def handler(self):
        if done and event == 'after_step':
            return
        if self.learn.lock.locked():
            return
        done.append(1)
        training, dl = self.learn.training, self.learn.dl  # what a careful callback puts back for its own fit
        calls(what)(self)
        self.learn.training, self.learn.dl = training, dl
        self.learn.model.train(training)

    setattr(Calls, event, handler)
    learner().fit(3, cbs=[log, Calls()])
    assert done and [name if isinstance(name, str) else name[0] for name in log.events] == [
        name if isinstance(name, str) else name[0] for name in expected.events
    ]
    assert log.n_over == 1 and log._fit is None


@pytest.mark.parametrize('what', ['fit', 'failing fit'])
def test_a_fit_within_the_fit_is_another_one(what):
    expected, log, done = Log(), Log(), []
    learner().fit(3, cbs=expected)

    class Calls(Callback):
        order = 3

        def after_train(self):
            if not done:
                done.append(1)
                calls(what)(self)

    learner().fit(3, cbs=[log, Calls()])
    names = [[e if isinstance(e, str) else e[0] for e in cb.events] for cb in (log, expected)]
    assert done and names[0] == names[1] and log.n_over == 1


def test_no_event_of_what_is_no_fit():
    learn, log = learner(), Log()
    learn.add_cb(log)
    learn.validate(), learn.get_preds(), tta(learn), learn.lr_find(show_plot=False, num_it=5)
    with learn:
        pass
    assert log.events == [] and log.n_over == 0


@pytest.mark.parametrize('attached', [False, True])
@pytest.mark.parametrize('end', [KeyboardInterrupt(), ZeroDivisionError('x'), CancelFitException()])
def test_it_is_over_once_however_the_fit_ends(end, attached):
    learn, log = learner(), Log()
    if attached:
        learn.add_cb(log)
    try:
        learn.fit(3, cbs=[At('after_step', 1, raising(end), batch=1)] + [log] * (not attached))
    except (KeyboardInterrupt, ZeroDivisionError):
        pass
    if attached:
        learn.fit(1)
    assert log.n_over == 1 + attached and log._fit is None


def test_over_can_still_reach_the_learner():
    seen = []

    class Sees(Log):
        def over(self):
            seen.append(self.learn)

    learn = learner()
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[Sees(), At('after_step', 1, raising(KeyboardInterrupt()), batch=1)])
    assert seen == [learn]


def test_switched_off_it_is_off_for_one_fit():
    learn, log = learner(), Log()
    learn.add_cb(log)
    log.run = False
    learn.fit(1)
    assert log.events == []
    learn.fit(1)
    assert log.events[0] == 'before_fit'


def mixed_loss(cb):
    class Weighted(Callback):
        "Like MixUp: its method stands in the loss's place while it trains."

        def before_train(self):
            self.old, self.learn.loss_func = self.learn.loss_func, cb(self)

        def after_train(self):
            self.learn.loss_func = self.old

        def loss(self, preds, targets):
            return 2 * self.learn.n_epoch * self.old(preds, targets)

        def __call__(self, *args):
            return super().__call__(*args) if isinstance(args[0], str) else self.loss(*args)

    return Weighted


@pytest.mark.parametrize(
    'mix',
    [
        MixUp,
        CutMix,
        mixed_loss(lambda cb: cb.loss),
        mixed_loss(lambda cb: __import__('functools').partial(cb.loss)),
        mixed_loss(lambda cb: cb),
    ],
    ids=['MixUp', 'CutMix', 'method', 'partial', 'callable'],
)
@pytest.mark.parametrize('attached', ['none', 'swa', 'mix'])
@pytest.mark.parametrize('end', [KeyboardInterrupt(), ZeroDivisionError('x')])
def test_the_learner_has_its_own_loss_again_after_an_interruption(mix, attached, end, tmp_path):
    if mix is CutMix:
        pytest.importorskip('fastai')
    learn, swa = learner(), SWACallback(0)
    if mix is CutMix:
        learn = image_learner()
    loss_func = learn.loss_func
    cbs = {'swa': swa, 'mix': mix()}
    if attached != 'none':
        learn.add_cb(cbs.pop(attached))
    with pytest.raises(type(end)):
        learn.fit(4, cbs=[*cbs.values(), At('after_step', 2, raising(end), batch=1)])
    with swa.averaged():
        learn.validate()
    assert learn.loss_func is loss_func
    if attached == 'none':
        learn.fit(1, cbs=[mix(), swa])
    else:
        learn.fit(1, cbs=list(cbs.values()))
    assert swa.n_averaged == 1 and learn.loss_func is loss_func


def image_learner():
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.learner import Learner
    from torch import nn

    g = torch.Generator().manual_seed(0)
    pairs = list(zip(torch.randn(40, 1, 4, 4, generator=g), torch.arange(40) % 3))
    dls = DataLoaders(DataLoader(pairs[:30], bs=10, shuffle=True), DataLoader(pairs[30:], bs=10), device='cpu')
    return Learner(
        dls,
        nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
        CrossEntropyLossFlat(),
        lr=0.1,
    )


def test_a_fit_with_mixup_that_was_interrupted_is_resumed_bitwise_by_the_same_cell(tmp_path):
    def cell(learn, *cbs):
        learn.fit(4, cbs=[MixUp(), SWACallback(1), CheckpointCallback(tmp_path / 'run.ckpt'), *cbs])
        return fingerprint(learn)

    whole = cell(learner())
    learn = learner()
    with pytest.raises(KeyboardInterrupt):
        cell(learn, At('after_step', 2, raising(KeyboardInterrupt()), batch=3))
    assert_same(whole, cell(learn))


def test_a_loss_that_the_user_exchanged_stays():
    learn, swa = learner(), SWACallback(0)
    learn.add_cb(swa)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=At('after_step', 1, raising(KeyboardInterrupt()), batch=1))
    learn.loss_func = own = CrossEntropyLossFlat()
    learn.fit(1)
    assert learn.loss_func is own


def test_side_work_is_said_once_for_each_kind_and_counted():
    side = SideWork()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter('always')
        for text in ('a', 'b', ''):
            with side.attempt('drawing', 'there is no figure'):
                raise OSError(text)
        with side.attempt('reading'):
            pass
        with pytest.raises(KeyboardInterrupt), side.attempt('drawing'):
            raise KeyboardInterrupt
        side.conclude()
    assert [str(w.message) for w in warned] == [
        'drawing failed, and training goes on; there is no figure: OSError: a',
        'drawing failed 3 times in this fit',
    ]


def test_the_epoch_is_the_fits_also_where_an_earlier_callback_has_predicted_in_it():
    class Predicts(Callback):
        order = -5

        def before_epoch(self):
            if not self.learn.lock.locked():
                self.learn.get_preds()

    learn, swa = learner(), SWACallback(2)
    learn.fit(4, cbs=[swa, Predicts()])
    assert swa.averaged_epochs == [2, 3]


@pytest.mark.parametrize(
    'wrap',
    [
        lambda cb, old: lambda p, y: cb.loss(p, y),
        lambda cb, old: lambda p, y: 2 * old(p, y),
        lambda cb, old: Weighted(old),
    ],
    ids=['closure over the callback', 'closure over the loss', 'module'],
)
def test_any_loss_that_a_callback_puts_in_the_place_goes_with_an_interruption(wrap):
    class Replaces(Callback):
        def before_train(self):
            self.old, self.learn.loss_func = self.learn.loss_func, wrap(self, self.learn.loss_func)

        def after_train(self):
            self.learn.loss_func = self.old

        def loss(self, preds, targets):
            return 3 * self.old(preds, targets)

    learn = learner()
    loss_func = learn.loss_func
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[Replaces(), SWACallback(0), At('after_step', 1, raising(KeyboardInterrupt()), batch=1)])
    assert learn.loss_func is loss_func


class Weighted(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, preds, targets):
        return 2 * self.loss(preds, targets)


def test_a_second_ctrl_c_while_callbacks_leave_the_learner_leaves_it_usable():
    import os
    import signal

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        learn, log = learner(), Log()

        def over():
            os.kill(os.getpid(), signal.SIGINT), [0 for _ in range(1000)]

        log.over = over
        with pytest.raises(KeyboardInterrupt):
            learn.fit(3, cbs=[log, At('after_step', 1, raising(KeyboardInterrupt()), batch=2)])
    finally:
        signal.signal(signal.SIGINT, before)
    learn.validate()
    learn.fit(1)
