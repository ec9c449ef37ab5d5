import math
import re
import warnings

import pytest
import torch
from fastai.callback.core import Callback

from fastai_swa import SWACallback

from .helpers import At, Snapshots, assert_close, column, learner, parameters
from .reference import twins
from .test_combinations import two_groups


class Rates(Callback):
    "The learning rates of every step, by parameter group, and the momentum."

    order = 100
    run_valid = False

    def __init__(self):
        self.rates, self.momenta = [], set()

    def after_batch(self):
        self.rates.append((self.epoch, [h['lr'] for h in self.opt.hypers]))
        self.momenta.add(self.opt.hypers[-1].get('mom'))


@pytest.mark.parametrize(
    'n_epoch, swa_start', [(10, 0.75), (12, 5), (7, 0), (3, 0.99), (6, 0.5), (4, 1), (2, 1), (1, 0.75), (16, 11)]
)
def test_fit_swa_follows_the_papers_schedule_and_averages(n_epoch, swa_start):
    learn, rates, snaps = learner(), Rates(), Snapshots()
    swa = learn.fit_swa(n_epoch, lr=0.1, swa_lr=0.02, swa_start=swa_start, cbs=[rates, snaps])
    first = swa_start if isinstance(swa_start, int) else min(math.ceil(swa_start * n_epoch - 1e-9), n_epoch - 1)
    assert isinstance(swa, SWACallback) and swa.averaged_epochs == list(range(first, n_epoch))
    for epoch, (lr,) in rates.rates:
        assert lr == pytest.approx(twins.averaging_lr(epoch, first, 0.1, 0.02))
    assert len(rates.momenta) == 1
    assert_close(parameters(swa.swa_model), twins.mean(snaps.weights[first:]))
    assert not math.isnan(column(learn, 'swa_valid_loss')[-1])
    with swa.averaged():
        learn.validate()


def test_fit_swa_defaults_to_the_learners_rate_and_a_tenth_of_it():
    learn, rates = learner(lr=0.05), Rates()
    learn.fit_swa(8, cbs=rates)
    assert rates.rates[0][1] == [0.05] and rates.rates[-1][1] == [pytest.approx(0.005)]


def test_fit_swa_scales_the_rates_of_all_groups_along():
    learn, rates = learner(splitter=two_groups), Rates()
    learn.fit_swa(8, lr=slice(0.01, 0.1), swa_lr=0.05, cbs=rates)
    for epoch, (low, high) in rates.rates:
        assert high == pytest.approx(twins.averaging_lr(epoch, 6, 0.1, 0.05)) and low == pytest.approx(high / 10)


def test_fit_swa_with_a_pair_falls_from_hi_to_lo_over_each_cycle_and_folds_at_lo():
    learn, rates = learner(), Rates()
    swa = learn.fit_swa(9, lr=0.1, swa_lr=(0.05, 0.01), swa_start=4, cycle_len=2, cbs=rates)
    n = len(learn.dls.train)
    assert swa.averaged_epochs == [4, 6, 8]
    lrs = [lr for _, (lr,) in rates.rates]
    for fold in swa.averaged_epochs:
        assert lrs[(fold + 1) * n - 1] == pytest.approx(0.01)
        cycle = lrs[(fold - 1) * n : (fold + 1) * n]
        assert cycle == pytest.approx([0.05 - 0.04 * i / (2 * n) for i in range(1, 2 * n + 1)])
    assert all(lr == pytest.approx(twins.averaging_lr(e, 4, 0.1, 0.05)) for e, (lr,) in rates.rates if e < 3)
    learn.recorder.plot_sched()
    assert len(learn.recorder.hps['lr']) == 9 * n


def test_fit_swa_passes_its_other_arguments_on():
    learn, seen = learner(), []

    class Look(Callback):
        def before_fit(self):
            seen.append(self.opt.hypers[-1]['wd'])

    swa = learn.fit_swa(4, wd=0.03, cbs=Look(), swa_eval_freq=0, bn_batches=2)
    assert seen == [0.03] and swa.bn_batches == 2 and math.isnan(column(learn, 'swa_valid_loss')[-2])


@pytest.mark.parametrize(
    'kwargs, error, match',
    [
        (dict(n_epoch=0), ValueError, 'n_epoch must be at least 1, not 0'),
        (dict(n_epoch=2.0), TypeError, 'n_epoch must be an int'),
        (dict(swa_lr='a'), TypeError, 'swa_lr must be a number or a pair'),
        (dict(swa_lr=(1, 2, 3)), TypeError, 'swa_lr must be a number or a pair'),
        (dict(swa_lr=0), ValueError, 'swa_lr must be positive'),
        (dict(swa_lr=-0.1), ValueError, 'swa_lr must be positive'),
        (dict(swa_lr=(0.01, 0.05)), ValueError, r'hi >= lo, not \(0.01, 0.05\)'),
        (dict(swa_start=2.5), ValueError, 'swa_start'),
        (dict(cycle_len=0), ValueError, 'cycle_len'),
        (dict(lr=0.0), ValueError, 'lr must be positive'),
        (dict(bn=1), TypeError, 'bn'),
    ],
)
def test_bad_input_gets_one_clear_sentence_before_anything_changes(kwargs, error, match):
    learn = learner()
    learn.create_opt()
    with pytest.raises(error, match=match):
        learn.fit_swa(**{'n_epoch': 3, **kwargs})
    assert learn.opt.hypers[-1]['lr'] == 0.1


def test_to_swa_attaches_for_all_later_fits_and_remove_swa_detaches():
    learn = learner()
    assert (
        learn.to_swa(swa_start=0, cycle_len=2) is learn
        and isinstance(learn.swa, SWACallback)
        and learn.swa.cycle_len == 2
    )
    learn.fit(3)
    assert learn.swa.averaged_epochs == [0, 2]
    learn.fit_one_cycle(1)
    assert learn.swa.averaged_epochs == [0]
    swa = learn.swa
    assert learn.remove_swa() is learn and not hasattr(learn, 'swa')
    learn.remove_swa()
    swa.apply()
    for a, b in zip(parameters(learn.model), parameters(swa.swa_model)):
        assert torch.equal(a, b)


def test_any_other_schedule_is_left_alone():
    rates = [Rates(), Rates()]
    learner().fit_one_cycle(4, 0.1, cbs=rates[0])
    learner().fit_one_cycle(4, 0.1, cbs=[rates[1], SWACallback(swa_start=1)])
    assert rates[0].rates == rates[1].rates and rates[0].momenta == rates[1].momenta


def test_fit_swa_says_when_its_start_is_never_reached():
    with pytest.warns(UserWarning, match='swa_start=9 was not reached'):
        swa = learner().fit_swa(3, swa_start=9)
    assert swa.n_averaged == 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner().fit_swa(1)


@pytest.mark.parametrize(
    'args, kwargs, said',
    [
        ((5, 0.1, 3), {}, 'swa_lr=3 is above lr=0.1'),  # meant as "from epoch 3"
        ((2, 0.1, 0.75), {}, 'swa_lr=0.75 is above lr=0.1'),  # and as "the last quarter"
        ((2,), dict(swa_lr=0.2), 'swa_lr=0.2 is above lr=0.1'),
        ((1, 0.1, 0.2), {}, 'swa_lr=0.2 is above lr=0.1'),
        ((4, 0.1), dict(swa_lr=(0.2, 0.05), swa_start=1), r'swa_lr=\(0.2, 0.05\) is above lr=0.1'),
        ((2, slice(0.01, 0.1), 0.11), {}, 'swa_lr=0.11 is above lr=0.1'),
    ],
)
def test_a_rate_of_averaging_above_lr_is_one_warning_before_the_first_step_that_names_both(args, kwargs, said):
    learn, said_by_then = learner(splitter=two_groups), []
    with pytest.warns(UserWarning) as caught:
        look = At('before_batch', 0, lambda cb: said_by_then.append(len(caught)), batch=0, training=True)
        learn.fit_swa(*args, **kwargs, cbs=look)
    assert len(caught) == 1 and said_by_then == [1] and caught[0].filename == __file__
    sentence = str(caught[0].message)
    assert re.search(said, sentence) and 'swa_start' in sentence  # which may have been meant


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(lr=0.1, swa_lr=0.1),
        dict(lr=0.1, swa_lr=0.2, swa_start=0),
        dict(lr=0.1, swa_lr=0.1, swa_start=0),
        dict(lr=0.1, swa_lr=(0.3, 0.01), swa_start=0),
        dict(lr=slice(0.01, 0.1), swa_lr=0.05),
        dict(lr=0.3, swa_lr=0.1 * 3),
        dict(lr=0.1, swa_lr=(0.1, 0.01)),
        dict(),
    ],
)
def test_a_rate_of_averaging_up_to_lr_or_the_tail_after_a_training_needs_no_warning(kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner(splitter=two_groups).fit_swa(2, **kwargs)


def test_fit_swa_takes_the_rate_of_the_optimizer_function():
    from functools import partial

    from fastai.optimizer import SGD

    learn, rates = learner(opt_func=partial(SGD, lr=0.5)), Rates()
    learn.fit_swa(2, cbs=rates)
    assert rates.rates[0][1] == [0.5]


def test_what_is_not_there_yet_is_said_to_be_that():
    learn = learner()
    with pytest.raises(AttributeError, match=r'learn.swa is there after learn.to_swa\(\)'):
        _ = learn.swa
    assert not hasattr(learn, 'swa') and getattr(learn, 'swa', 1) == 1
    with pytest.raises(AttributeError, match="'Sequential' object has no attribute 'nothing'"):
        _ = learn.nothing
    learn.to_swa()
    assert learn.swa in list(learn.cbs)
    learn.remove_swa()
    with pytest.raises(AttributeError, match='after learn.to_swa'):
        _ = learn.swa


@pytest.mark.parametrize('plot', ['plot_width', 'plot_line'])
def test_an_average_that_is_not_there_yet_cannot_be_drawn(plot):
    with pytest.raises(
        ValueError, match='this SWACallback has averaged nothing yet: pass it to a fit .* swa_start=0.75'
    ):
        getattr(learner(), plot)(SWACallback())
