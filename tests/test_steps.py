"""`SWACallback(every=k)`: averages over optimizer steps."""

import random

import pytest
import torch
from fastai.callback.core import Callback, CancelEpochException
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation
from torch import nn

from fastai_swa import SWACallback, ema, equal

from .helpers import (
    At,
    Overflow,
    assert_close,
    assert_same,
    column,
    fingerprint,
    learner,
    mixed_precision_on_cpu,
    net,
    parameters,
    raising,
)
from .reference import twins


class Steps(Callback):
    """The parameters after each optimizer step that changed something, with its epoch; an oracle
    that only looks at the weights.
    """

    order = 60

    def before_fit(self):
        self.weights, self.epochs, self._last = [], [], self._now()

    def _now(self):
        return [p.detach().clone() for p in self.learn.model.parameters()]

    def after_batch(self):
        if not self.training:
            return
        now = self._now()
        if all(map(torch.equal, now, self._last)):
            return
        self._last = now
        self.weights.append(now)
        self.epochs.append(self.epoch)


def folded(steps, start, every):
    return [w for w, e in zip(steps.weights, steps.epochs) if e >= start][every - 1 :: every]


def poisoned(event):
    "Weights that turn nan in batch 2 of epoch 3, at `event`."

    def f(cb):
        for p in cb.learn.model.parameters():
            p.data.fill_(float('nan'))

    return At(event, 3, f, batch=2, training=True)


@pytest.mark.parametrize('seed', range(8))
def test_the_average_over_steps_is_the_mean_of_every_kth_from_epoch_swa_start_on(seed):
    rng = random.Random(seed)
    n_epoch, every, weight = rng.randint(2, 4), rng.randint(1, 9), rng.choice([equal, ema(0.9)])
    start = rng.randrange(n_epoch - 1)
    learn, steps, swa = learner(seed=seed), Steps(), SWACallback(start, every=every, weight=weight)
    learn.fit(n_epoch, cbs=[steps, swa])
    expected = folded(steps, start, every)
    assert swa.n_averaged == len(expected)
    assert swa.averaged_epochs == sorted(set([e for e in steps.epochs if e >= start][every - 1 :: every]))
    assert_close(parameters(swa.swa_model), twins.weighted_average(expected, weight), tol=1e-5)


def test_steps_of_gradient_accumulation_count_once_and_the_count_goes_on_across_epochs():
    learn, steps, swa = learner(), Steps(), SWACallback(1, every=3)
    learn.fit(
        4, cbs=[GradientAccumulation(40), steps, swa]
    )  # 90 samples an epoch: batches of 16 make a step of every third, roughly
    assert len(steps.weights) == 8 and swa.n_averaged == len(folded(steps, 1, 3)) == 2
    assert_close(parameters(swa.swa_model), twins.mean(folded(steps, 1, 3)))


@pytest.mark.parametrize('skipped', [[0], [1], [0, 1, 2], [5]])
def test_steps_that_the_scaler_skips_do_not_count(monkeypatch, skipped):
    mixed_precision_on_cpu(monkeypatch, enabled=True)
    learn, steps, swa = learner().to_fp16(), Steps(), SWACallback(0, every=2)
    learn.fit(2, cbs=[Overflow(skipped), steps, swa])
    assert len(steps.weights) == 12 - len(skipped) and swa.n_averaged == (12 - len(skipped)) // 2
    assert_close(parameters(swa.swa_model), twins.mean(folded(steps, 0, 2)))
    assert next(swa.swa_model.parameters()).dtype == torch.float32


def test_columns_per_step_are_those_of_the_average_at_the_end_of_the_epoch_and_follow_the_frequency():
    learn, swa = learner(), SWACallback(1, every=4, swa_eval_freq=2)
    models = []

    class Copies(Callback):
        order = 1000

        def after_epoch(self):
            models.append({k: v.clone() for k, v in swa.swa_model.state_dict().items()} if swa.n_averaged else None)

    learn.fit(5, cbs=[swa, Copies()])
    values = column(learn, 'swa_valid_loss')
    assert [v == v for v in values] == [False, True, False, True, True]  # 1st and 3rd epoch that folded, and the last
    for e in (1, 3, 4):
        model = net()
        model.load_state_dict(models[e])
        assert values[e] == pytest.approx(
            twins.evaluate(model, list(learn.dls[1]), nn.functional.cross_entropy)[0], rel=1e-5
        )


@pytest.mark.parametrize('num_workers', [0, 2])
def test_training_is_untouched_by_folding_steps(num_workers):
    from .helpers import loaders

    plain, averaged = learner(dls=loaders(num_workers=num_workers)), None
    plain.fit(3)
    expected = fingerprint(plain)
    averaged = learner(dls=loaders(num_workers=num_workers))
    averaged.fit(3, cbs=SWACallback(1, every=2))
    assert_same(fingerprint(averaged) | {'cbs': 0}, expected | {'cbs': 0})


def test_the_step_reads_nothing_from_the_device(monkeypatch):
    learn, swa, reads = learner(), SWACallback(0, every=1), []
    fold = swa._fold

    def watched():
        with monkeypatch.context() as m:
            for name in ('item', 'tolist', 'numpy', 'cpu', '__bool__', '__float__', '__int__'):
                m.setattr(torch.Tensor, name, lambda self, *args, name=name, **kwargs: reads.append(name))
            fold()

    monkeypatch.setattr(swa, '_fold', watched)
    learn.fit(2, cbs=swa)
    assert swa.n_averaged == 12 and reads == []


def test_weights_that_turn_nan_within_an_epoch_take_its_steps_back_and_leave_the_average_of_the_epochs_before():
    learn, steps, swa = learner(), Steps(), SWACallback(1, every=2)
    poison = poisoned('after_batch')
    with pytest.warns(UserWarning, match='not finite'):
        learn.fit(6, cbs=[steps, swa, poison])
    assert swa.n_averaged == 6 and swa.averaged_epochs == [1, 2]
    assert_close(
        parameters(swa.swa_model), twins.mean([w for w, e in zip(steps.weights, steps.epochs) if e in (1, 2)][1::2])
    )
    with swa.averaged():
        assert learn.validate()[0] < 5


def test_nan_weights_at_the_end_of_a_stopped_fit_are_taken_back_too():
    learn, swa = learner(), SWACallback(1, every=1)
    poison = poisoned('before_batch')
    with pytest.warns(UserWarning, match='not finite'):
        learn.fit(6, cbs=[swa, poison, TerminateOnNaNCallback()])
    assert swa.averaged_epochs == [1, 2] and all(p.isfinite().all() for p in swa.swa_model.parameters())


def test_a_look_at_the_average_within_the_epoch_does_not_end_the_watch():
    learn, swa = learner(), SWACallback(1, every=1)
    poison = At(
        'after_batch',
        3,
        lambda cb: [p.data.fill_(float('nan')) for p in cb.learn.model.parameters()],
        batch=3,
        training=True,
    )
    with pytest.warns(UserWarning, match='not finite'):
        learn.fit(5, cbs=[swa, At('after_batch', 3, lambda cb: swa.refresh(), batch=2, training=True), poison])
    assert swa.averaged_epochs == [1, 2] and swa.n_averaged == 12


def test_nan_weights_before_ctrl_c_are_taken_back():
    learn, swa = learner(), SWACallback(1, every=1)

    def f(cb):
        for p in cb.learn.model.parameters():
            p.data.fill_(float('nan'))
        swa._fold()
        assert swa.n_averaged == 17
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match='not finite'), pytest.raises(KeyboardInterrupt):
        learn.fit(5, cbs=[swa, At('after_batch', 3, f, batch=3, training=True)])
    assert swa.n_averaged == 12 and all(p.isfinite().all() for p in swa.swa_model.parameters())


@pytest.mark.parametrize('every', [None, 1])
def test_a_bf16_model_is_averaged_in_float32_and_measured_in_its_own_precision(every):
    class Cast(Callback):
        def before_batch(self):
            self.learn.xb = (self.xb[0].bfloat16(),)

        def after_pred(self):
            self.learn.pred = self.pred.float()

    learn, steps, swa = learner(lambda: net(dropout=0).bfloat16(), lr=1e-3), Steps(), SWACallback(1, every=every)
    learn.fit(6, cbs=[Cast(), steps, swa])
    points = (
        folded(steps, 1, 1)
        if every
        else [[w for w, e in zip(steps.weights, steps.epochs) if e == epoch][-1] for epoch in range(1, 6)]
    )
    masters = [swa._average.running.master[name] for name, _ in swa.swa_model.named_parameters()]
    assert all(m.dtype == torch.float32 for m in masters) and {p.dtype for p in swa.swa_model.parameters()} == {
        torch.bfloat16
    }
    assert_close(masters, twins.mean(points), tol=1e-6)
    assert_close(parameters(swa.swa_model), [m.bfloat16() for m in masters])
    loss = twins.evaluate(
        swa.swa_model,
        [(x.bfloat16(), y) for x, y in learn.dls.valid],
        lambda p, t: nn.functional.cross_entropy(p.float(), t),
    )[0]
    assert column(learn, 'swa_valid_loss')[-1] == pytest.approx(loss, rel=1e-5)


def test_nan_in_the_very_first_epoch_of_steps_leaves_no_average_and_says_so():
    learn, swa = learner(), SWACallback(1, every=1)
    poison = At(
        'before_batch',
        1,
        lambda cb: [p.data.fill_(float('nan')) for p in cb.learn.model.parameters()],
        batch=2,
        training=True,
    )
    with pytest.warns(UserWarning, match='not finite'):
        learn.fit(3, cbs=[swa, poison])
    assert swa.n_averaged == 0 and swa.averaged_epochs == [] and swa.swa_model is None
    with pytest.raises(RuntimeError, match='there is none yet'):
        swa.apply()


@pytest.mark.parametrize('event', ['after_step', 'after_batch'])
def test_ctrl_c_within_an_epoch_keeps_the_steps_folded_so_far(event):
    learn, steps, swa = learner(), Steps(), SWACallback(1, every=2)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(4, cbs=[steps, swa, At(event, 2, raising(KeyboardInterrupt()), batch=3, training=True)])
    weights = steps.weights + [parameters(learn.model)] * (event == 'after_step')
    expected = [w for w, e in zip(weights, steps.epochs + [2]) if e >= 1][1::2]
    assert swa.averaged_epochs == [1, 2] and swa.n_averaged == len(expected) == 5
    with swa.averaged():
        assert_close(parameters(learn.model), twins.mean(expected))


def test_an_epoch_cancelled_halfway_keeps_its_real_steps():
    learn, steps, swa = learner(), Steps(), SWACallback(0, every=1)
    learn.fit(3, cbs=[steps, swa, At('after_batch', 1, raising(CancelEpochException()), batch=2, training=True)])
    assert swa.n_averaged == len(steps.weights) == 15 and swa.averaged_epochs == [0, 1, 2]
    assert_close(parameters(swa.swa_model), twins.mean(steps.weights))


def test_steps_and_cycles_of_epochs_exclude_each_other():
    with pytest.raises(ValueError, match='cycle_len=2 and every=3'):
        SWACallback(every=3, cycle_len=2)


def test_a_fit_with_fewer_steps_than_every_says_so():
    learn, swa = learner(), SWACallback(1, every=7)
    with pytest.warns(UserWarning, match='every=7'):
        learn.fit(2, cbs=swa)
    assert swa.n_averaged == 0


def test_repr_counts_steps():
    learn, swa = learner(), SWACallback(1, every=4)
    learn.fit(3, cbs=swa)
    assert repr(swa).startswith('SWACallback: average of 3 steps (epochs 1-2);')


def test_a_disabled_callback_folds_no_steps():
    learn, swa = learner(), SWACallback(0, every=1)
    swa.enabled = False
    learn.fit(2, cbs=swa)
    assert swa.n_averaged == 0
