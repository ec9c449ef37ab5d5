"""What holds in every fit with `SWACallback`: the mean is the mean, training is untouched, the
columns are true, batch norm is exact, the average survives whatever ends the fit, no average means
no change, and bad input gets one clear sentence. For any learner: `test_combinations.py`.
"""

import copy
import gc
import math
import random
import warnings
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fastai.callback.core import (
    Callback,
    CancelEpochException,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
)
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.callback.training import BnFreeze
from fastai.learner import AvgMetric, Learner, Metric
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from torch import nn

from fastai_swa import SWACallback, ema, equal, update_bn

from .helpers import (
    At,
    Snapshots,
    assert_close,
    assert_same,
    column,
    fingerprint,
    learner,
    loaders,
    net,
    parameters,
    raising,
    training_set,
)
from .reference import twins


def evaluated(learn, model):
    "Loss and accuracy of `model` on the validation set, by the slow twin."
    return twins.evaluate(
        model, list(learn.dls[1]), nn.functional.cross_entropy, (lambda p, t: (p.argmax(1) == t).float().mean(),)
    )


# 1. the mean is the mean


@pytest.mark.parametrize('seed', range(12))
def test_the_mean_is_the_mean_for_random_starts_cycles_and_lengths(seed):
    rng = random.Random(seed)
    n_epoch, cycle_len = rng.randint(1, 9), rng.randint(1, 3)
    start = rng.choice([rng.randrange(n_epoch), rng.random()])
    first = start if isinstance(start, int) else min(math.ceil(start * n_epoch - 1e-9), n_epoch - 1)
    weight = rng.choice([equal, equal, ema(0.7)])
    learn, snaps, swa = learner(seed=seed), Snapshots(), SWACallback(start, cycle_len=cycle_len, weight=weight)
    learn.fit(n_epoch, cbs=[swa, snaps])
    assert swa.averaged_epochs == twins.folded_epochs(first, cycle_len, n_epoch)
    assert swa.n_averaged == len(swa.averaged_epochs)
    assert_close(
        parameters(swa.swa_model), twins.weighted_average([snaps.weights[e] for e in swa.averaged_epochs], weight)
    )


# Lightning: 2..5 and not the last
def test_the_mean_is_the_mean_of_the_ends_of_the_epochs_from_swa_start_to_the_last():
    learn, snaps, swa = learner(), Snapshots(), SWACallback(swa_start=3)
    learn.fit(6, cbs=[snaps, swa])
    assert swa.averaged_epochs == [3, 4, 5]
    assert_close(parameters(swa.swa_model), twins.mean(snaps.weights[3:6]))


def test_a_later_fit_starts_a_new_average_at_its_first_fold_and_until_then_the_old_one_stays():
    learn, snaps, swa = learner(), Snapshots(), SWACallback(swa_start=1)
    learn.fit(3, cbs=swa)
    old, values = swa.swa_model, [t.clone() for t in parameters(swa.swa_model)]
    seen = []
    learn.fit(
        4, cbs=[swa, snaps, At('after_epoch', 0, lambda cb: seen.append((swa.swa_model is old, swa.averaged_epochs)))]
    )
    assert seen == [(True, [1, 2])]
    assert swa.averaged_epochs == [1, 2, 3] and swa.n_averaged == 3 and swa.swa_model is not old
    assert_close(parameters(swa.swa_model), twins.mean(snaps.weights[1:]))
    for a, b in zip(parameters(old), values):
        assert torch.equal(a, b)


def test_the_users_own_swa_model_is_used_as_given():
    own = net()
    learn, snaps, swa = learner(), Snapshots(), SWACallback(swa_start=1, swa_model=own)
    assert swa.swa_model is own
    for _ in range(2):
        learn.fit(3, cbs=[swa, snaps])
    assert swa.swa_model is own
    assert_close(parameters(own), twins.mean(snaps.weights[-2:]))


def test_what_folds_is_an_epoch_whose_training_part_ended():
    for exception, event, folded in (
        (CancelTrainException, 'after_batch', [0, 1, 2, 3]),
        (CancelEpochException, 'after_batch', [0, 1, 3]),
        (CancelFitException, 'after_batch', [0, 1]),
        (CancelFitException, 'before_validate', [0, 1, 2]),
        (CancelEpochException, 'before_validate', [0, 1, 2, 3]),
    ):
        learn, snaps, swa = learner(), Snapshots(), SWACallback(swa_start=0)
        learn.fit(
            4,
            cbs=[
                swa,
                snaps,
                At(
                    event,
                    2,
                    raising(exception()),
                    batch=1 if event == 'after_batch' else None,
                    training=event == 'after_batch' or None,
                ),
            ],
        )
        assert swa.averaged_epochs == folded, (exception, event)
        assert_close(
            parameters(swa.swa_model), twins.mean([w for e, w in zip(snaps.epochs, snaps.weights) if e in folded])
        )


def test_weights_that_are_not_finite_are_not_folded_and_that_is_said_once():
    def spoil(cb):
        with torch.no_grad():
            cb.learn.model[0].bias[0] = float('nan')

    def mend(cb):
        with torch.no_grad():
            for p in cb.learn.model.parameters():
                p.copy_(torch.randn_like(p) * 0.1)

    learn, snaps, swa = learner(), Snapshots(), SWACallback(swa_start=0)
    with pytest.warns(UserWarning, match='not finite') as said:
        learn.fit(5, cbs=[swa, snaps, At('after_batch', 1, spoil, batch=5), At('before_train', 3, mend)])
    assert sum('not finite' in str(w.message) for w in said) == 1
    assert swa.averaged_epochs == [0, 3, 4]
    assert_close(parameters(swa.swa_model), twins.mean([snaps.weights[e] for e in (0, 3, 4)]))


# 2. training is untouched


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(swa_start=0),
        dict(swa_start=1, bn_batches=2, weight=ema(0.5)),
        dict(swa_start=0, cycle_len=2, swa_eval_freq=0),
    ],
)
def test_training_is_untouched_bitwise(num_workers, kwargs):
    class Noisy(Callback):  # consumes every generator, in training
        def before_batch(self):
            self.learn.xb = (self.xb[0] + torch.rand(1) * 0.01 + random.random() * 0.01 + np.random.rand() * 0.01,)

        run_valid = False

    prints = []
    for cbs in ([], [SWACallback(**kwargs)]):
        learn = learner(dls=loaders(num_workers=num_workers), opt_func=Adam)
        learn.fit(3, cbs=[Noisy(), *cbs])
        prints.append(fingerprint(learn))
    assert_same(*prints)


def test_training_is_untouched_with_the_callback_attached_over_several_fits_and_validations():
    prints = []
    for attach in (False, True):
        learn = learner()
        if attach:
            learn.to_swa(swa_start=1)
        learn.fit_one_cycle(2)
        learn.validate()
        learn.get_preds()
        learn.fit(2)
        res = fingerprint(learn)
        prints.append({k: v for k, v in res.items() if k != 'cbs'})
    assert_same(*prints)


def test_training_is_untouched_on_plain_pytorch_loaders():
    prints = []
    for cbs in ([], [SWACallback(swa_start=0)]):
        torch.manual_seed(0)
        pairs = list(loaders().train.dataset)
        g = torch.Generator().manual_seed(5)
        dls = [
            torch.utils.data.DataLoader(pairs, 16, shuffle=True, drop_last=True, generator=g),
            torch.utils.data.DataLoader(pairs[:30], 16),
        ]
        from fastai.data.core import DataLoaders

        learn = learner(dls=DataLoaders(*dls))
        learn.fit(3, cbs=cbs)
        prints.append([*parameters(learn.model), g.get_state(), torch.get_rng_state()])
        if cbs:
            last = learn, cbs[0]
    for a, b in zip(*prints, strict=True):
        assert torch.equal(a, b)
    learn, swa = last
    expected = twins.bn_statistics(swa.swa_model, [(torch.stack([x for x, _ in pairs]),)])[
        '1'
    ]  # the dropped last batch is in
    torch.testing.assert_close(swa.swa_model[1].running_mean.double(), expected[0], rtol=1e-5, atol=1e-5)


def test_the_learner_is_left_as_it_was_between_the_events():
    names = 'dl xb yb pred loss iter n_iter training'.split()
    seen = []

    class Look(Callback):
        order = 56  # right after the SWACallback

        def after_validate(self):
            self.last = [vars(self.learn)[n] if n != 'dl' else self.dl is self.dls.valid for n in names] + [
                [m.training for m in self.model.modules()]
            ]  # the last of the epoch is the fit's own

        def after_epoch(self):
            seen.append(self.last)

    results = []
    for cbs in ([], [SWACallback(swa_start=0)]):
        seen.clear()
        learner().fit(2, cbs=[Look(), *cbs])
        results.append(repr(seen))
    assert results[0] == results[1]


# 3. the columns are true


@pytest.mark.parametrize('kwargs', [dict(), dict(cycle_len=2), dict(bn_batches=3), dict(weight=ema(0.3))])
def test_the_columns_are_true(kwargs):
    learn, swa, expected = learner(), SWACallback(swa_start=1, **kwargs), {}

    def evaluate(cb):
        if not math.isnan(column(cb.learn, 'swa_valid_loss')[-1]):
            expected[cb.epoch] = evaluated(cb.learn, copy.deepcopy(swa.swa_model))

    class Judge(Callback):
        order = 80

        def after_epoch(self):
            evaluate(self)

    learn.fit(5, cbs=[swa, Judge()])
    assert list(learn.recorder.metric_names) == [
        'epoch',
        'train_loss',
        'valid_loss',
        'accuracy',
        'swa_valid_loss',
        'swa_accuracy',
        'time',
    ]
    rows = list(zip(column(learn, 'swa_valid_loss'), column(learn, 'swa_accuracy')))
    for epoch, row in enumerate(rows):
        if epoch in expected:
            np.testing.assert_allclose(row, expected[epoch], rtol=1e-4)
        else:
            assert all(map(math.isnan, row))
    assert set(expected) == {*swa.averaged_epochs, 4} and len(expected) >= 2


def test_the_columns_of_the_model_in_training_keep_its_own_values():  # metric objects are shared with the Recorder
    a = learner()
    a.fit(3)
    b = learner()
    b.fit(3, cbs=SWACallback(swa_start=0))
    for name in ('train_loss', 'valid_loss', 'accuracy'):
        assert column(a, name) == column(b, name)
    assert b.metrics[0].value == column(b, 'accuracy')[-1] and b.recorder.loss.value == column(b, 'valid_loss')[-1]
    assert column(b, 'accuracy') != column(b, 'swa_accuracy')


@pytest.mark.parametrize(
    'freq, start, cycle, n_epoch, evaluated_at',
    [
        (1, 2, 1, 6, [2, 3, 4, 5]),
        (2, 1, 1, 7, [1, 3, 5, 6]),
        (3, 0, 2, 9, [0, 6, 8]),
        (0, 1, 1, 4, [3]),
        (1, 1, 3, 6, [1, 4, 5]),
    ],
)
def test_the_average_is_validated_at_the_folds_asked_for_and_in_the_last_epoch(
    freq, start, cycle, n_epoch, evaluated_at
):
    learn = learner()
    learn.fit(n_epoch, cbs=SWACallback(start, cycle_len=cycle, swa_eval_freq=freq))
    assert [e for e, v in enumerate(column(learn, 'swa_valid_loss')) if not math.isnan(v)] == evaluated_at


def test_the_columns_are_true_under_any_recorder_and_without_time():
    for settings, names in (
        (dict(train_metrics=True), 'train_loss train_accuracy valid_loss valid_accuracy'),
        (dict(train_metrics=True, valid_metrics=False), 'train_loss accuracy'),
    ):
        for add_time in (True, False):
            learn, swa = learner(), SWACallback(swa_start=1)
            for k, v in dict(settings, add_time=add_time).items():
                setattr(learn.recorder, k, v)
            learn.fit(2, cbs=swa)
            assert list(learn.recorder.metric_names) == [
                'epoch',
                *names.split(),
                'swa_valid_loss',
                'swa_accuracy',
                *['time'] * add_time,
            ]
            assert all(len(row) == len(names.split()) + 2 for row in learn.recorder.values)
            np.testing.assert_allclose(
                [column(learn, 'swa_valid_loss')[-1], column(learn, 'swa_accuracy')[-1]],
                evaluated(learn, swa.swa_model),
                rtol=1e-4,
            )


def test_a_row_is_complete_whatever_was_cancelled_in_its_epoch():
    for exception, event in (
        (CancelValidException, 'after_batch'),
        (CancelEpochException, 'after_batch'),
        (CancelEpochException, 'before_epoch'),
    ):
        learn = learner()
        learn.fit(
            3,
            cbs=[
                SWACallback(swa_start=0),
                At(
                    event,
                    1,
                    raising(exception()),
                    batch=0 if event == 'after_batch' else None,
                    training=exception is not CancelValidException if event == 'after_batch' else None,
                ),
            ],
        )
        assert [len(row) for row in learn.recorder.values] == [5] * 3, (exception, event)
        assert math.isnan(column(learn, 'valid_loss')[1]) and not math.isnan(column(learn, 'valid_loss')[2])


def test_a_learner_without_recorder_is_averaged_without_columns():
    learn, snaps, swa = learner(), Snapshots(), SWACallback(swa_start=1)
    learn.remove_cbs([learn.progress, learn.recorder])
    learn.fit(3, cbs=[swa, snaps])
    assert_close(parameters(swa.swa_model), twins.mean(snaps.weights[1:]))


# 4. batch norm is exact


def assert_bn_exact(learn, swa, frozen=()):
    """The first layer's statistics do not depend on how samples are batched; the second's do, so it
    is checked by `update_bn`'s own tests.
    """
    mean, var = twins.bn_statistics(swa.swa_model, training_set(learn), frozen)['1']
    torch.testing.assert_close(swa.swa_model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(swa.swa_model[1].running_var.double(), var, rtol=1e-5, atol=1e-5)


def test_batch_norm_is_exact_over_the_whole_training_set_with_the_last_batch_though_training_drops_it():
    learn, swa = learner(dls=loaders(n=90, bs=16, drop_last=True)), SWACallback(swa_start=1)
    learn.fit(3, cbs=swa)
    assert_bn_exact(learn, swa)


def test_batch_norm_is_exact_in_every_layer_as_update_bn_makes_it():
    learn, swa = learner(dls=loaders(n=90, bs=90)), SWACallback(swa_start=1)  # one batch: no dependence on the order
    learn.fit(3, cbs=swa)
    twin = copy.deepcopy(swa.swa_model)
    update_bn(training_set(learn), twin)
    for (k, a), b in zip(swa.swa_model.state_dict().items(), twin.state_dict().values()):
        torch.testing.assert_close(a, b, msg=k)


def test_batch_norm_takes_bn_batches_of_the_training_set():
    learn, swa, seen = learner(), SWACallback(swa_start=2, bn_batches=2), []

    class Count(Callback):
        def after_batch(self):
            if not self.training:
                seen.append(len(self.yb[0]))

    learn.fit(3, cbs=[swa, Count()])
    assert seen[-4:] == [16, 16, 32, 8]  # two training batches, then the validation set
    assert swa.swa_model[1].num_batches_tracked == 2


class Freeze(Callback):
    def before_train(self):
        self.model[1].eval()


class FrozenFirst(nn.Sequential):
    "A network that keeps its first batch norm frozen by itself."

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize('freeze', ['callback', 'BnFreeze', 'train'])
def test_frozen_batch_norm_keeps_its_statistics(freeze):
    model = FrozenFirst(*net()) if freeze == 'train' else net()
    model[1].running_mean.uniform_(), model[1].running_var.uniform_(0.5, 2)
    if freeze == 'BnFreeze':
        model[1].weight.requires_grad_(False), model[1].bias.requires_grad_(False)
    learn, swa = learner(model), SWACallback(swa_start=1)
    learn.fit(3, cbs=[swa, *{'callback': [Freeze()], 'BnFreeze': [BnFreeze()], 'train': []}[freeze]])
    assert torch.equal(swa.swa_model[1].running_mean, learn.model[1].running_mean)
    assert not torch.equal(swa.swa_model[5].running_mean, learn.model[5].running_mean)


@pytest.mark.parametrize('every', [None, 1])
def test_batch_norm_with_a_fixed_gamma_is_refreshed(every):
    model = net(dropout=0)
    for m in model:
        if isinstance(m, nn.BatchNorm1d):
            m.weight.requires_grad_(False)
    learn, swa = learner(model), SWACallback(swa_start=1, every=every)
    learn.fit(3, cbs=swa)
    assert not torch.equal(swa.swa_model[1].running_mean, learn.model[1].running_mean)
    assert_bn_exact(learn, swa)


def test_a_layer_frozen_from_some_epoch_on_counts_as_the_latest_fold_had_it():
    class Later(Callback):
        def before_train(self):
            if self.epoch >= 2:
                self.model[1].eval()

    learn, swa = learner(net(dropout=0)), SWACallback(swa_start=1)
    learn.fit(4, cbs=[swa, Later()])
    assert torch.equal(swa.swa_model[1].running_mean, learn.model[1].running_mean)
    assert not torch.equal(swa.swa_model[5].running_mean, learn.model[5].running_mean)


def test_without_batch_norm_there_is_no_pass_and_with_a_fresh_one_no_second():
    for model, extra in ((nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 0), (net(), 6)):
        learn, swa, n = learner(model), SWACallback(swa_start=0), []

        class Count(Callback):
            def before_batch(self):
                if not self.training:
                    n.append(1)

        learn.fit(1, cbs=[swa, Count()])
        assert len(n) == 2 + 2 + extra
        n.clear()
        learn.add_cb(Count())
        with swa.averaged():
            pass
        swa.swa_model, swa.refresh()
        assert n == []


def test_batch_norm_is_exact_before_anything_reads_the_average_after_a_stop():
    for stop in (CancelFitException, KeyboardInterrupt):
        learn, swa = learner(), SWACallback(swa_start=0, swa_eval_freq=0)
        try:
            learn.fit(5, cbs=[swa, At('after_batch', 3, raising(stop()), batch=1, training=True)])
        except KeyboardInterrupt:
            pass
        history = repr((learn.recorder.values, learn.recorder.lrs, learn.epoch, learn.train_iter, learn.n_epoch))
        assert swa.averaged_epochs == [0, 1, 2]
        stale = copy.deepcopy(swa.swa_model.state_dict())
        assert all(torch.equal(v, swa.swa_model.state_dict()[k]) for k, v in stale.items())  # reading runs no pass
        with swa.averaged():
            pass
        assert_bn_exact(learn, swa)
        assert history == repr(
            (learn.recorder.values, learn.recorder.lrs, learn.epoch, learn.train_iter, learn.n_epoch)
        )


def test_a_batch_that_cannot_be_normalised_is_skipped_and_said_once_in_a_fit():
    learn, swa = (
        learner(dls=loaders(n=49, bs=16, drop_last=True)),
        SWACallback(swa_start=0),
    )  # the pass meets a batch of one
    with pytest.warns(UserWarning, match='1 of 4 batches were left out') as said:
        learn.fit(3, cbs=swa)
    assert sum('left out' in str(w.message) for w in said) == 1
    assert not any(map(math.isnan, column(learn, 'swa_valid_loss')))


# 5. whatever ends the fit, the average survives


def bad_metric(left, fails=math.inf):
    "After so many calls that go well it fails so many times."

    def bad(preds, targs):
        left[0] -= 1
        if -fails <= left[0] < 0:
            raise ZeroDivisionError('in a metric')
        return (preds.argmax(1) == targs).float().mean()

    return bad


@pytest.mark.parametrize(
    'ending',
    [
        'last',
        'stop',
        'interrupt',
        'interrupt_in_validation',
        'interrupt_in_bn_pass',
        'interrupt_in_swa_validation',
        'metric',
        'swa_metric',
    ],
)
@pytest.mark.parametrize('attached', [False, True])
def test_whatever_ends_the_fit_the_average_survives(ending, attached):
    learn, snaps, swa = learner(), Snapshots(), SWACallback(swa_start=1)
    nested = []

    class InNested(Callback):
        def before_validate(self):
            nested.append(self.dl is self.dls.valid)
            which = len(nested) - 1  # epoch 0: 1 validation; then validation, pass, validation an epoch
            if ending == {
                4: 'interrupt_in_validation',
                5: 'interrupt_in_bn_pass',
                6: 'interrupt_in_swa_validation',
            }.get(which):
                raise KeyboardInterrupt

    cbs = [snaps, InNested()]
    if attached:
        learn.add_cb(swa)
    else:
        cbs.append(swa)
    if ending == 'stop':
        cbs.append(At('after_epoch', 2, raising(CancelFitException())))
    if ending == 'interrupt':
        cbs.append(At('after_batch', 3, raising(KeyboardInterrupt()), batch=1, training=True))
    if 'metric' in ending:
        learn.metrics = [accuracy, AvgMetric(bad_metric([9], fails=1) if ending == 'swa_metric' else bad_metric([6]))]
    ends_early = ending not in ('last', 'swa_metric')
    with (
        pytest.warns(UserWarning, match='validating the average failed.*in a metric')
        if ending == 'swa_metric'
        else nullcontext()
    ):
        try:
            learn.fit(5, cbs=cbs)
        except (KeyboardInterrupt, ZeroDivisionError):
            assert ends_early and ending != 'stop'
        else:
            assert not ends_early or ending == 'stop'
    assert [type(cb).__name__ for cb in learn.cbs] == [
        'TrainEvalCallback',
        'Recorder',
        'CastToTensor',
        'ProgressCallback',
    ] + ['SWACallback'] * attached
    if ending != 'interrupt':  # else a step was made after the last snapshot
        for a, b in zip(parameters(learn.model), snaps.weights[-1]):
            assert torch.equal(a, b), 'the learner must hold its own weights'
    assert not {p.data_ptr() for p in parameters(learn.model)} & {p.data_ptr() for p in parameters(swa.swa_model)}
    assert_close(
        parameters(swa.swa_model),
        twins.mean([w for e, w in zip(snaps.epochs, snaps.weights) if e in swa.averaged_epochs]),
    )
    assert swa.averaged_epochs == ([1, 2] if ends_early else [1, 2, 3, 4])
    learn.metrics = accuracy
    with swa.averaged():
        preds = learn.get_preds()[0]
    assert_bn_exact(learn, swa)
    torch.testing.assert_close(
        preds, torch.cat([swa.swa_model.eval()(x) for x, _ in learn.dls.valid]).softmax(1).detach()
    )
    raw = learn.get_preds()[0]
    assert not torch.equal(raw, preds)
    learn.fit(2, cbs=[] if attached else swa)
    assert swa.averaged_epochs == [1]


def test_whatever_stops_a_pass_of_the_average_training_goes_on():
    class Cancels(Callback):  # in passes aside, which follow the validation of the model in training
        def __init__(self, e):
            self.e, self.n = e, 0

        def before_train(self):
            self.n = 0

        def before_validate(self):
            self.n += 1

        def after_batch(self):
            if not self.training and self.n > 1:
                raise self.e()

    reference = learner()
    reference.fit(3)
    for exception in (CancelFitException, CancelEpochException, CancelTrainException, CancelValidException):
        learn, swa = learner(), SWACallback(swa_start=0)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.fit(3, cbs=[swa, Cancels(exception)])
        for a, b in zip(parameters(learn.model), parameters(reference.model)):
            assert torch.equal(a, b)
        assert swa.averaged_epochs == [0, 1, 2] and all(map(math.isnan, column(learn, 'swa_valid_loss')))


def test_a_nan_loss_of_the_average_does_not_stop_the_training():
    from fastai.callback.tracker import TerminateOnNaNCallback

    class NaNForTheAverage(CrossEntropyLossFlat):
        def __call__(self, *args, **kwargs):
            res = super().__call__(*args, **kwargs)
            return res * float('nan') if nested[0] else res

    nested = [False]
    learn, swa = learner(), SWACallback(swa_start=0)
    learn.loss_func = NaNForTheAverage()
    evaluate = swa._evaluate

    def watched():
        nested[0] = True
        try:
            return evaluate()
        finally:
            nested[0] = False

    swa._evaluate = watched
    learn.fit(2, cbs=[swa, TerminateOnNaNCallback()])
    assert swa.averaged_epochs == [0, 1] and all(map(math.isnan, column(learn, 'swa_valid_loss')))


# 6. no average, no change


def test_no_average_no_change_when_the_start_is_not_reached():
    a, swa = learner(), SWACallback(swa_start=7)
    a.fit(3)
    plain, b = fingerprint(a), learner()
    with pytest.warns(UserWarning, match='swa_start=7 was not reached') as said:
        b.fit(3, cbs=swa)
    assert sum('swa_start' in str(w.message) for w in said) == 1
    assert_same(plain, fingerprint(b))
    assert swa.swa_model is None and swa.n_averaged == 0 and swa.averaged_epochs == []
    assert all(map(math.isnan, column(b, 'swa_accuracy')))


def test_a_fit_stopped_before_the_start_warns():
    swa = SWACallback(swa_start=2)
    with pytest.warns(UserWarning, match='swa_start=2 was not reached'):
        learner().fit(4, cbs=[swa, At('after_epoch', 0, raising(CancelFitException()))])


def test_no_average_no_change_while_disabled():
    a, swa = learner(), SWACallback(swa_start=0)
    swa.enabled = False
    a.fit(3)
    plain, b = fingerprint(a), learner()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        b.fit(3, cbs=swa)
    assert_same(plain, fingerprint(b))
    assert list(a.recorder.metric_names) == list(b.recorder.metric_names) and swa.swa_model is None
    swa.enabled = True
    b.fit(1, cbs=swa)
    assert swa.averaged_epochs == [0]
    swa.enabled, kept = False, swa.swa_model
    b.fit(2, cbs=swa)
    assert swa.averaged_epochs == [0] and swa.swa_model is kept


@pytest.mark.parametrize('call', ['lr_find', 'validate', 'get_preds', 'tta', 'predict', 'show_results'])
def test_no_average_no_change_from_calls_that_only_look_like_fits(call):
    from fastai_swa.vision import digits

    learn = Learner(
        digits(n_train=60),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)),
        CrossEntropyLossFlat(),
        metrics=accuracy,
    )
    learn.to_swa(swa_start=0)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)

        def run():
            return {
                'lr_find': lambda: learn.lr_find(num_it=6, suggest_funcs=None, show_plot=False),
                'predict': lambda: learn.predict(0),
            }.get(call, lambda: getattr(learn, call)())()

        run()
        assert learn.swa.swa_model is None and learn.swa.n_averaged == 0
        learn.fit(2)
        model, values = learn.swa.swa_model, [t.clone() for t in parameters(learn.swa.swa_model)]
        run()
    assert learn.swa.swa_model is model and learn.swa.averaged_epochs == [0, 1]
    for a, b in zip(parameters(model), values):
        assert torch.equal(a, b)


def test_toggling_back_and_forth():
    learn = learner().to_swa(swa_start=1)
    swa = learn.swa
    learn.fit(2)
    learn.remove_swa()
    assert not hasattr(learn, 'swa') and swa.n_averaged == 1
    learn.fit(1)
    assert 'swa_valid_loss' not in learn.recorder.metric_names
    with swa.averaged():
        learn.validate()
    learn.to_swa(swa_start=0).to_swa(swa_start=1)
    assert sum(isinstance(cb, SWACallback) for cb in learn.cbs) == 1 and learn.swa.swa_start == 1


# averaged, apply


def test_averaged_lends_the_average_for_predicting_validating_and_saving_and_gives_the_weights_back(tmp_path):
    learn, swa = learner(path=tmp_path), SWACallback(swa_start=1)
    learn.fit(4, cbs=swa)
    raw = copy.deepcopy(learn.model.state_dict())
    before = learn.validate()
    with swa.averaged() as same:
        assert same is learn and not learn.model.training
        np.testing.assert_allclose(learn.validate(), evaluated(learn, swa.swa_model), rtol=1e-4)
        learn.save('average', with_opt=False)
        assert {p.data_ptr() for p in learn.model.parameters()} == {p.data_ptr() for p in swa.swa_model.parameters()}
    assert list(learn.validate()) == list(before)
    for k, v in learn.model.state_dict().items():
        assert torch.equal(v, raw[k])
    fresh = learner(path=tmp_path, seed=5).load('average')
    for k, v in fresh.model.state_dict().items():
        assert torch.equal(v, swa.swa_model.state_dict()[k])


def test_apply_puts_the_average_into_the_learners_model_in_place_and_training_goes_on_from_there():
    learn, swa = learner(), SWACallback(swa_start=1, swa_eval_freq=0)
    try:
        learn.fit(4, cbs=[swa, At('after_batch', 3, raising(KeyboardInterrupt()), batch=0, training=True)])
    except KeyboardInterrupt:
        pass
    objects = list(learn.model.parameters())
    swa.apply()
    assert_bn_exact(learn, swa)
    assert all(a is b for a, b in zip(objects, learn.model.parameters()))
    for (k, a), b in zip(learn.model.state_dict().items(), swa.swa_model.state_dict().values()):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), k
    values = [t.clone() for t in parameters(swa.swa_model)]
    learn.fit(1)
    assert not torch.equal(learn.model[0].weight, swa.swa_model[0].weight)
    for a, b in zip(parameters(swa.swa_model), values):
        assert torch.equal(a, b)


def test_a_fit_inside_averaged_is_refused_and_changes_nothing():
    learn, swa = learner(), SWACallback(swa_start=0)
    learn.fit(2, cbs=swa)
    history, raw = copy.deepcopy(list(learn.recorder.values)), copy.deepcopy(learn.model.state_dict())
    average = copy.deepcopy(swa.swa_model.state_dict())
    requires = [p.requires_grad for p in learn.model.parameters()]
    with swa.averaged():
        for name in ('fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_sgdr', 'fine_tune', 'lr_find', 'fit_swa'):
            with pytest.raises(RuntimeError, match=rf'{name} inside averaged\(\) would train the average'):
                getattr(learn, name)(1)
    assert list(learn.recorder.values) == history and requires == [p.requires_grad for p in learn.model.parameters()]
    for k, v in raw.items():
        assert torch.equal(v, learn.model.state_dict()[k]) and torch.equal(average[k], swa.swa_model.state_dict()[k])
    learn.fit(1)
    assert 'fit' not in vars(learn)


def test_the_callback_remembers_its_learner_weakly():
    learn, swa = learner(), SWACallback(swa_start=0)
    learn.fit(1, cbs=swa)
    ref = weakref.ref(learn)
    del learn
    gc.collect()
    assert ref() is None and swa.swa_model is not None
    for call in (swa.apply, swa.refresh, lambda: swa.averaged().__enter__()):
        with pytest.raises(RuntimeError, match='the learner that was averaged, and it is gone'):
            call()


def test_repr_says_what_was_averaged_and_what_to_call():
    swa = SWACallback(swa_start=1)
    assert repr(swa) == 'SWACallback: nothing averaged yet; averages from epoch 1 on'
    learner().fit(4, cbs=swa)
    assert (
        repr(swa)
        == 'SWACallback: average of 3 epochs (1-3); use it within `averaged()`, or put it into the learner with '
        '`apply()`'
    )


# 8. bad input gets one clear sentence


@pytest.mark.parametrize(
    'kwargs, error',
    [
        (dict(swa_start=-1), ValueError),
        (dict(swa_start=1.0), ValueError),
        (dict(swa_start=-0.1), ValueError),
        (dict(swa_start=float('nan')), ValueError),
        (dict(swa_start='3'), TypeError),
        (dict(swa_start=None), TypeError),
        (dict(swa_start=True), TypeError),
        (dict(cycle_len=0), ValueError),
        (dict(cycle_len=1.5), TypeError),
        (dict(cycle_len=None), TypeError),
        (dict(swa_eval_freq=-1), ValueError),
        (dict(swa_eval_freq='1'), TypeError),
        (dict(bn_batches=0), ValueError),
        (dict(bn_batches=0.5), TypeError),
        (dict(weight=0.9), TypeError),
        (dict(weight=ema), ValueError),
        (dict(swa_model='net'), TypeError),
        (dict(every=0), ValueError),
        (dict(every=2.0), TypeError),
        (dict(every=True), TypeError),
    ],
)
def test_bad_input_gets_one_clear_sentence_at_construction(kwargs, error):
    ((name, value),) = kwargs.items()
    with pytest.raises(error) as e:
        SWACallback(**kwargs)
    assert name in str(e.value) and '\n' not in str(e.value)
    assert (type(value).__name__ if name == 'swa_model' else str(value)) in str(e.value)


def test_an_average_asked_for_before_it_exists_is_one_clear_sentence():
    learn, swa = learner(), SWACallback(swa_start=3)
    for call in (swa.apply, swa.refresh, lambda: swa.averaged().__enter__()):
        with pytest.raises(RuntimeError, match=r'there is none yet: run a fit that reaches swa_start=3'):
            call()
    with pytest.warns(UserWarning, match='swa_start'):
        learn.fit(1, cbs=swa)
    with pytest.raises(RuntimeError, match='there is none yet'), swa.averaged():
        pass


def test_averaged_nested_or_applied_inside_is_one_clear_sentence_and_leaves_the_weights():
    learn, swa = learner(), SWACallback(swa_start=0)
    learn.fit(2, cbs=swa)
    raw = copy.deepcopy(learn.model.state_dict())
    with swa.averaged():
        with pytest.raises(RuntimeError, match='leave that context first'), swa.averaged():
            pass
        with pytest.raises(RuntimeError, match='leave that context first'):
            swa.apply()
        learn.validate()
    for k, v in raw.items():
        assert torch.equal(v, learn.model.state_dict()[k])


def test_a_foreign_swa_model_is_one_clear_sentence_before_any_training():
    for own, match in (
        (net(width=9), "does not match the average: '0.bias'.* of another shape"),
        (nn.Linear(2, 2), 'missing|not in the average'),
    ):
        learn = learner()
        raw = copy.deepcopy(learn.model.state_dict())
        with pytest.raises(ValueError, match=match):
            learn.fit(2, cbs=SWACallback(0, swa_model=own))
        for k, v in raw.items():
            assert torch.equal(v, learn.model.state_dict()[k])
    learn = learner()
    with pytest.raises(ValueError, match='shares .* with the model in training'):
        learn.fit(2, cbs=SWACallback(0, swa_model=learn.model))


def test_a_changed_learner_is_refused_by_name_and_nothing_is_lost():
    learn, swa = learner(), SWACallback(swa_start=0)
    learn.fit(1, cbs=swa)
    learn.model[7] = nn.Linear(8, 5)
    for call in (swa.apply, lambda: swa.averaged().__enter__()):
        with pytest.raises(ValueError, match="'7.bias', '7.weight' of another shape"):
            call()
    assert swa.n_averaged == 1


# trackers


def test_early_stopping_that_cannot_reach_the_start_warns():
    for cb, acts, kwargs, first, pause in (
        (EarlyStoppingCallback, 'stops this fit', dict(swa_start=4), 4, 4),
        (ReduceLROnPlateau, 'cuts the learning rate', dict(swa_start=3), 3, 3),
        (EarlyStoppingCallback, 'stops this fit', dict(swa_start=0, cycle_len=2, swa_eval_freq=2), 0, 3),
    ):
        with pytest.warns(UserWarning, match=f'patience=2.* {acts} .* first in epoch {first} .* above {pause}$'):
            learner().fit(6, cbs=[SWACallback(**kwargs), cb('swa_valid_loss', patience=2)])
    for patience, start in ((3, 2), (2, 0)):
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            learner().fit(
                4, cbs=[SWACallback(swa_start=start), EarlyStoppingCallback('swa_valid_loss', patience=patience)]
            )


def test_early_stopping_on_the_average_keeps_it():
    learn, swa, snaps = learner(), SWACallback(swa_start=1), Snapshots()
    learn.fit(20, cbs=[swa, snaps, EarlyStoppingCallback('swa_valid_loss', min_delta=10, patience=3)])
    assert snaps.epochs == [0, 1, 2, 3, 4][: len(snaps.epochs)] and len(snaps.epochs) < 20
    assert_close(parameters(swa.swa_model), twins.mean(snaps.weights[1:]))


def test_save_model_on_a_swa_column_warns_that_it_saves_other_weights(tmp_path):
    with pytest.warns(UserWarning, match='use SaveSWAModelCallback'):
        learner(path=tmp_path).fit(2, cbs=[SWACallback(swa_start=0), SaveModelCallback('swa_valid_loss')])


# what only unusual learners do


def test_training_is_untouched_where_data_losses_and_models_keep_generators_and_state_of_their_own():
    class Dataset:
        def __init__(self, pairs):
            self.pairs, self.numpy, self.torch, self.python = (
                pairs,
                np.random.default_rng(1),
                torch.Generator().manual_seed(1),
                random.Random(1),
            )

        def __len__(self):
            return len(self.pairs)

        def __getitem__(self, i):
            x, y = self.pairs[i]
            return x + self.numpy.normal() + torch.rand(1, generator=self.torch) + self.python.random(), y

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('mean', torch.zeros(()))
            self.calls = 0

        def forward(self, p, t):
            loss = nn.functional.cross_entropy(p, t)
            self.mean.lerp_(loss.detach(), 0.1)
            self.calls += 1
            return loss * (1 + 0.01 * self.mean + 0.01 * self.calls)

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.n, self.last = net(), 0, torch.zeros(())

        def forward(self, x):
            self.n, self.last = self.n + 1, x.detach().mean()
            return self.net(x * (1 + 0.01 * self.n) + 0.1 * self.last)

    results = []
    for cbs in ([], [SWACallback(swa_start=0)]):
        dls = loaders()
        dls.train.dataset = Dataset(dls.train.dataset)
        learn = learner(Counting, dls=dls)
        learn.loss_func = Loss()
        learn.fit(3, cbs=cbs)
        data = dls.train.dataset
        results.append(
            [*learn.model.state_dict().values(), learn.loss_func.mean, data.torch.get_state(), learn.model.last]
            + [
                torch.tensor(x)
                for x in (learn.model.n, learn.loss_func.calls, data.python.random(), data.numpy.random())
            ]
        )
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def noisy_function():
    rng = np.random.default_rng(1)
    return lambda x: x + rng.normal()


class NoisyTransform:
    def __init__(self):
        self.inner = [{'deep': [random.Random(1)]}]

    def __call__(self, x):
        return x + self.inner[0]['deep'][0].random()


@pytest.mark.parametrize('transform', [noisy_function, NoisyTransform])
@pytest.mark.parametrize('where', ['dataset', 'item'])
def test_training_is_untouched_by_generators_deep_in_fastais_transforms(transform, where):
    from fastai.data.core import Datasets

    from fastai_swa.vision.data import _Pick

    pairs = list(loaders().train.dataset)
    results = []
    for cbs in ([], [SWACallback(swa_start=0)]):
        noise = transform()
        tfms = [_Pick([x for x, _ in pairs])] + [noise] * (where == 'dataset')
        dsets = Datasets(
            range(90), [tfms, [_Pick([y for _, y in pairs])]], splits=[list(range(60)), list(range(60, 90))]
        )
        after = dict(after_item=[lambda o: noise(o) if o.dim() else o]) if where == 'item' else {}
        dls = dsets.dataloaders(bs=16, num_workers=0, device='cpu', **after)
        learn = learner(dls=dls)
        learn.fit(2, cbs=cbs)
        results.append(parameters(learn.model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_tta_on_an_attached_callback_with_a_swa_model_of_ones_own_works_inside_averaged():
    from fastai_swa.vision import digits

    def model():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    learn = Learner(digits(n_train=60), model(), CrossEntropyLossFlat(), metrics=accuracy).to_swa(
        swa_start=0, swa_model=model()
    )
    learn.fit(1)
    with learn.swa.averaged():
        preds, _ = learn.tta(n=1)
    assert len(preds) == 1737


def test_a_metric_that_keeps_its_state_in_another_object_keeps_the_values_of_the_model_in_training():
    class Inner:
        def __init__(self):
            self.total, self.n = 0.0, 0

    class Wrapped(Metric):
        def __init__(self):
            self.inner = Inner()

        def reset(self):
            self.inner.total, self.inner.n = 0.0, 0

        def accumulate(self, learn):
            self.inner.total += learn.pred.detach().abs().sum().item()
            self.inner.n += learn.pred.numel()

        @property
        def value(self):
            return self.inner.total / self.inner.n

        @property
        def name(self):
            return 'size'

    learn = learner(metrics=Wrapped())
    learn.fit(2, cbs=SWACallback(swa_start=0))
    assert learn.metrics[0].value == column(learn, 'size')[-1] != column(learn, 'swa_size')[-1]


def test_a_tracker_is_warned_about_by_the_epochs_that_the_fit_really_validates():
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learner().fit(
            6, cbs=[SWACallback(swa_start=0, swa_eval_freq=100), EarlyStoppingCallback('swa_valid_loss', patience=7)]
        )


def test_the_pass_and_the_columns_take_what_the_loaders_take():
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader

    class Strict(DataLoader):  # a subclass whose constructor `new` does not know
        def __init__(self, dataset, must, **kwargs):
            super().__init__(dataset, **kwargs)
            self.must = must

    pairs = list(loaders().train.dataset)

    def stream():
        while True:
            yield from pairs

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(pairs)

        def __len__(self):
            return len(pairs)

    for train, n_batches in (
        (DataLoader(pairs, bs=16, n=32, shuffle=True), 2),
        (Strict(pairs, 1, bs=16, shuffle=True), 6),
        (DataLoader(stream(), bs=16, n=48), 3),
        (torch.utils.data.DataLoader(Stream(), 16), 6),
    ):
        valid = DataLoader(pairs, bs=16, n=16)
        learn, swa = learner(dls=DataLoaders(train, valid, device='cpu')), SWACallback(swa_start=0)
        learn.fit(2, cbs=swa)
        assert swa.swa_model[1].num_batches_tracked == n_batches
        expected = twins.evaluate(copy.deepcopy(swa.swa_model), [next(iter(valid))], nn.functional.cross_entropy)
        np.testing.assert_allclose(column(learn, 'swa_valid_loss')[-1], expected[0], rtol=1e-4)


def test_a_validate_within_the_fit_moves_no_fold():
    class Validates(Callback):
        order = 80

        def after_train(self):
            if self.epoch == 1:
                self.learn.get_preds()

    for start, folded in ((2, [2, 3]), (0, [0, 1, 2, 3])):
        learn, swa = learner(), SWACallback(swa_start=start)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            learn.fit(4, cbs=[swa, Validates()])
        assert swa.averaged_epochs == folded


def test_rows_stay_complete_when_disabled_within_a_fit_or_cancelled_after_the_validation():
    learn, swa = learner(), SWACallback(swa_start=0)
    learn.fit(3, cbs=[swa, At('after_epoch', 0, lambda cb: setattr(swa, 'enabled', False))])
    assert swa.averaged_epochs == [0] and [len(row) for row in learn.recorder.values] == [5] * 3
    learn, swa = learner(), SWACallback(swa_start=0)

    def cancel(cb):
        if cb.learn.dl is cb.learn.dls.valid:
            raise CancelEpochException  # not in the passes of the average

    learn.fit(2, cbs=[swa, At('after_validate', 1, cancel)])
    assert [len(row) for row in learn.recorder.values] == [5] * 2 and not math.isnan(column(learn, 'swa_valid_loss')[1])


def test_a_model_that_cannot_be_copied_is_one_clear_sentence_before_any_training():
    import threading

    model = net()
    model.lock = threading.Lock()
    learn = learner(model)
    raw = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="cannot copy the model .*lock.*; pass a swa_model of your own"):
        learn.fit(2, cbs=SWACallback(swa_start=1))
    for k, v in raw.items():
        assert torch.equal(v, model.state_dict()[k])
    learn.fit(2, cbs=SWACallback(swa_start=1, swa_model=net()))


def test_integers_of_numpy_are_integers():
    swa = SWACallback(np.int64(1), cycle_len=np.int32(1), swa_eval_freq=np.int64(1), bn_batches=np.int64(2))
    learner().fit(2, cbs=swa)
    assert swa.averaged_epochs == [1] and all(
        type(getattr(swa, k)) is int for k in ('swa_start', 'cycle_len', 'swa_eval_freq', 'bn_batches')
    )


# copies of a learner


@pytest.mark.parametrize('kwargs', [{}, {'every': 2, 'weight': ema(0.9)}], ids=['epochs', 'steps'])
@pytest.mark.parametrize('own', [False, True], ids=['default', 'own module'])
def test_a_deep_copy_of_a_learner_keeps_settings_and_an_average_of_its_own(kwargs, own):
    learn = learner().to_swa(swa_start=1, swa_model=net() if own else None, **kwargs)
    learn.fit(3)
    average = copy.deepcopy(learn.swa.swa_model.state_dict())
    n_averaged = learn.swa.n_averaged
    twin = copy.deepcopy(learn)
    assert twin.swa is not learn.swa and twin.swa.learn is twin and twin.swa in twin.cbs
    assert twin.swa.swa_start == 1 and twin.swa.averaged_epochs == [1, 2] and twin.swa.n_averaged == n_averaged
    assert_same(twin.swa.swa_model.state_dict(), average)
    with learn.swa.averaged():
        expected = learn.get_preds()[0]
    with twin.swa.averaged():
        assert torch.equal(twin.get_preds()[0], expected)
    twin.fit(3)
    assert_same(learn.swa.swa_model.state_dict(), average)
    twin.swa.apply()
    assert all(map(torch.equal, twin.model.parameters(), twin.swa.swa_model.parameters()))
    learn.fit(3)
    assert_same(twin.swa.swa_model.state_dict(), twin.model.state_dict())


def test_a_deep_copy_of_a_callback_alone_is_of_the_same_learner():
    learn, swa = learner(), SWACallback(0)
    learn.fit(2, cbs=swa)
    twin = copy.deepcopy(swa)
    twin.apply()
    assert all(map(torch.equal, learn.model.parameters(), swa.swa_model.parameters()))
    assert twin.averaged_epochs == [0, 1] and twin.swa_model is not swa.swa_model
    del learn
    gc.collect()
    assert copy.deepcopy(twin).n_averaged == 2


def test_a_deep_copy_made_inside_averaged_shares_no_tensor_with_its_average():
    learn = learner().to_swa(swa_start=0)
    learn.fit(2)
    with learn.swa.averaged():
        twin = copy.deepcopy(learn)
    average = copy.deepcopy(twin.swa.swa_model.state_dict())
    assert all(map(torch.equal, twin.model.parameters(), twin.swa.swa_model.parameters()))
    twin.remove_swa().fit(1)
    assert_same(learn.swa.swa_model.state_dict(), average)


def test_a_deep_copy_made_in_a_fit_is_not_in_one():
    learn, twins = learner().to_swa(swa_start=0), []
    learn.fit(3, cbs=At('before_train', 2, lambda cb: twins.append(copy.deepcopy(cb.learn))))
    twin = twins[0]
    assert twin.swa.averaged_epochs == [0, 1] and len(twin.validate()) == 2
    twin.remove_cb(twin.cbs[-1])
    twin.fit(2)
    assert twin.swa.averaged_epochs == [0, 1] and learn.swa.averaged_epochs == [0, 1, 2]
