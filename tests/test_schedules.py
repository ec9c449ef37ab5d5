import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastai_swa.schedules import (
    cycle_ends,
    due_epochs,
    fge_epochs,
    fge_lr_factor,
    snapshot_lr_factor,
    start_epoch,
    swa_lr_factor,
)

from .reference import twins


@pytest.mark.parametrize('n_epoch', range(1, 60))
def test_a_share_is_rounded_up_to_whole_epochs_and_leaves_the_last(n_epoch):
    for hundredths in range(100):
        epochs_before = -(-hundredths * n_epoch // 100)  # exact, in integers
        assert start_epoch(hundredths / 100, n_epoch) == min(epochs_before, n_epoch - 1)


def test_an_int_is_the_epoch_itself():
    assert [start_epoch(s, 10) for s in (0, 3, 12)] == [0, 3, 12]


@pytest.mark.parametrize(
    'swa_start, lr, swa_lr, n_epoch',
    [(161, 0.05, 0.01, 300), (126, 0.1, 0.01, 225), (126, 0.1, 0.05, 225), (161, 0.1, 0.05, 300), (10, 0.1, 0.01, 15)],
)
def test_the_papers_schedules_at_every_epoch(swa_start, lr, swa_lr, n_epoch):
    for epoch in range(n_epoch):
        ours = lr * swa_lr_factor(epoch, random.randrange(391), 391, swa_start - 1, swa_lr / lr)
        assert ours == pytest.approx(twins.papers_lr(epoch, swa_start, lr, swa_lr), rel=1e-12)


@pytest.mark.parametrize('cycle_len, n_steps, swa_start', [(1, 5, 3), (2, 7, 10), (3, 1, 4), (5, 4, 12), (4, 3, 1)])
def test_the_saw_tooth_is_the_papers_formula_and_reaches_lo_in_the_last_step_before_each_fold(
    cycle_len, n_steps, swa_start
):
    hi, lo, c, first = 0.5, 0.1, cycle_len * n_steps, max(0, swa_start - cycle_len + 1)
    for epoch in range(first, swa_start + 3 * cycle_len + 1):
        for step in range(n_steps):
            i = (
                (epoch - (swa_start - cycle_len + 1)) * n_steps + step + 1
            )  # steps from 1, counted from the start of a cycle
            t = ((i - 1) % c + 1) / c
            assert swa_lr_factor(epoch, step, n_steps, swa_start, (hi, lo), cycle_len) == pytest.approx(
                (1 - t) * hi + t * lo
            )
    for epoch in twins.folded_epochs(swa_start, cycle_len, swa_start + 3 * cycle_len + 1):
        assert swa_lr_factor(epoch, n_steps - 1, n_steps, swa_start, (hi, lo), cycle_len) == pytest.approx(lo)


def test_before_its_first_cycle_the_saw_tooth_is_the_ramp_to_hi():
    for epoch in range(18):
        assert swa_lr_factor(epoch, 2, 9, 19, (0.5, 0.1), 2) == swa_lr_factor(epoch, 0, 9, 19, 0.5)


lengths = settings(max_examples=300, deadline=None, derandomize=True, database=None)
rates = st.sampled_from([0.01, 0.1, 0.5, 0.99, 1.0])


@lengths
@given(n_epoch=st.integers(1, 40), swa_start=st.one_of(st.integers(0, 60), st.floats(0, 0.999)), swa_lr=rates)
def test_every_averaged_epoch_is_trained_at_swa_lr_and_the_rate_only_falls_until_then(n_epoch, swa_start, swa_lr):
    first = start_epoch(swa_start, n_epoch)
    factors = [swa_lr_factor(epoch, 3, 7, first, swa_lr) for epoch in range(n_epoch)]
    assert factors[first:] == [swa_lr] * max(0, n_epoch - first)
    assert all(after <= before + 1e-12 for before, after in zip(factors, factors[1:]))
    assert first == 0 or factors[0] == 1
    expected = [twins.averaging_lr(epoch, first, 1, swa_lr) for epoch in range(n_epoch)]
    assert factors == pytest.approx(expected, rel=1e-12)


@lengths
@given(swa_start=st.integers(0, 400), swa_lr=rates)
def test_it_is_the_papers_schedule_wherever_that_has_come_to_swa_lr_by_the_first_averaged_epoch(swa_start, swa_lr):
    papers = [twins.papers_lr(epoch, swa_start + 1, 1, swa_lr) for epoch in range(swa_start + 50)]
    if swa_start >= 9:
        assert papers[swa_start] == pytest.approx(swa_lr, rel=1e-12)  # this is about nearly all fits
    if papers[swa_start] == pytest.approx(swa_lr, rel=1e-12):
        ours = [swa_lr_factor(epoch, 0, 1, swa_start, swa_lr) for epoch in range(swa_start + 50)]
        assert ours == pytest.approx(papers, rel=1e-12)


@lengths
@given(
    swa_start=st.integers(0, 30),
    cycle_len=st.integers(1, 40),
    n_steps=st.integers(1, 5),
    lo=st.sampled_from([0.01, 0.1]),
)
def test_every_averaged_epoch_of_a_saw_tooth_ends_at_lo_and_each_cycle_falls_from_hi(swa_start, cycle_len, n_steps, lo):
    n_epoch, hi = swa_start + 2 * cycle_len + 1, 0.1

    def factor(epoch, step):
        return swa_lr_factor(epoch, step, n_steps, swa_start, (hi, lo), cycle_len)

    factors = [[factor(epoch, step) for step in range(n_steps)] for epoch in range(n_epoch)]
    for fold in twins.folded_epochs(swa_start, cycle_len, n_epoch):
        assert factors[fold][-1] == pytest.approx(lo, rel=1e-12)
        cycle = sum(factors[max(0, fold - cycle_len + 1) : fold + 1], [])
        assert all(after <= before + 1e-12 for before, after in zip([hi, *cycle], cycle))
        if fold >= cycle_len:
            assert cycle[0] == pytest.approx(hi - (hi - lo) / (cycle_len * n_steps), rel=1e-12)
    for epoch in range(swa_start - cycle_len + 1):
        assert factors[epoch] == pytest.approx([twins.averaging_lr(epoch, swa_start, 1, hi)] * n_steps)


# cycles of the ensembles


@pytest.mark.parametrize('n_steps, n_cycles', [(10, 1), (12, 3), (13, 3), (14, 4), (391 * 40, 5), (7, 7), (3, 5)])
def test_the_snapshot_learning_rate_is_the_papers_at_every_step(n_steps, n_cycles):
    for step in range(n_steps):
        t, m = step + 1, math.ceil(n_steps / n_cycles)  # the paper counts from 1
        assert 0.2 * snapshot_lr_factor(step, n_steps, n_cycles) == pytest.approx(
            0.2 / 2 * (math.cos(math.pi * ((t - 1) % m) / m) + 1), rel=1e-12
        )
    starts = [s for s in range(n_steps) if snapshot_lr_factor(s, n_steps, n_cycles) == 1]
    assert starts == list(range(0, n_steps, math.ceil(n_steps / n_cycles)))


@pytest.mark.parametrize('cycle_len', [2, 4, 6])
@pytest.mark.parametrize('n_steps', [1, 5, 391])
def test_the_fge_learning_rate_is_the_papers_at_every_step(cycle_len, n_steps):
    lr1, lr2 = 0.05, 0.0005
    for epoch in range(2 * cycle_len + 1):
        for step in range(n_steps):
            t = ((epoch % cycle_len) + step / n_steps) / cycle_len
            expected = lr1 * (1 - 2 * t) + lr2 * 2 * t if t < 0.5 else lr1 * (2 * t - 1) + lr2 * (2 - 2 * t)
            assert lr1 * fge_lr_factor(epoch, step, n_steps, cycle_len, lr2 / lr1) == pytest.approx(expected, rel=1e-9)
    # lowest at the first step after the snapshot, which is at the end of the epoch in the middle of a cycle
    lrs = [fge_lr_factor(e, s, n_steps, cycle_len, 0.01) for e in range(cycle_len) for s in range(n_steps)]
    assert lrs.index(min(lrs)) == cycle_len // 2 * n_steps and lrs[0] == 1


def test_an_fge_fit_ends_at_the_low_point_of_its_last_cycle():
    assert [fge_epochs(n, c) for n, c in ((1, 2), (3, 2), (2, 4), (6, 4))] == [1, 5, 6, 22]


# which epochs are averaged


@pytest.mark.parametrize('mult', [1, 2, 3])
@pytest.mark.parametrize('start', [0, 1, 5])
def test_cycles_that_grow_are_averaged_at_their_ends_by_a_list_and_by_a_function(mult, start):
    lengths = [2 * mult**k for k in range(4)]
    ends, epoch = [], -1
    for length in lengths:
        for _ in range(length):
            epoch += 1
        ends.append(epoch)
    assert cycle_ends(lengths) == ends
    due = [e for e in ends if e >= start]
    assert due_epochs(start, sum(lengths), ends) == due
    assert due_epochs(start, sum(lengths), lambda e: e in ends) == due
    assert due_epochs(start, sum(lengths) - 1, ends) == due[:-1]


@pytest.mark.parametrize('start, n_epoch, cycle_len', [(0, 7, 1), (2, 9, 3), (4, 4, 1), (9, 3, 2)])
def test_cycles_of_one_length_are_averaged_at_the_start_and_after_each_cycle(start, n_epoch, cycle_len):
    expected = [e for e in range(n_epoch) if e >= start and (e - start) % cycle_len == 0]
    assert due_epochs(start, n_epoch, cycle_len) == expected
