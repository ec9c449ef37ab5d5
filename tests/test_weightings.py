"""How much each point weighs in an average, and how well segments give it."""

import math

import numpy as np
import pytest
import torch

from fastai_swa import WeightAverage, power_ema
from fastai_swa.weightings import (
    Cuts,
    Segment,
    called,
    check_which,
    coefficients,
    missed,
    place_in_epochs,
    power_gamma,
    power_weights,
    weighting,
)

EPOCHS = [[0, 10], [1, 20], [2, 23], [3, 40]]  # the third was cut short


def of(n=40, every=1, **which):
    return weighting(check_which(which), n, EPOCHS, every)


@pytest.mark.parametrize(
    'which',
    [
        {'last': 0.25},
        {'last': 1},
        {'last': 1e-9},
        {'epochs': (1, 3)},
        {'ema': 0.9},
        {'ema': 0},
        {'power': 0.1},
        {'decay': 'cosine', 'last': 0.5},
        {'decay': 'linear', 'last': 0.5},
        {'decay': 'sqrt', 'last': 0.5},
    ],
    ids=called,
)
def test_the_weights_of_all_points_sum_to_one_and_none_is_negative(which):
    weights = of(**which)
    assert len(weights) == 40 and weights.sum() == pytest.approx(1, abs=1e-12) and weights.min() >= 0


@pytest.mark.parametrize('share, n_points', [(0.25, 10), (0.26, 11), (1, 40), (1e-9, 1), (0.1, 4), (0.3, 12)])
def test_last_is_a_plain_mean_of_the_share_rounded_up_to_whole_points(share, n_points):
    assert of(last=share).tolist() == pytest.approx([0] * (40 - n_points) + [1 / n_points] * n_points)


def test_epochs_are_the_points_taken_in_them_parts_of_epochs_parts_of_their_points():
    assert np.flatnonzero(of(epochs=(1, 3))).tolist() == list(range(10, 23))
    assert np.flatnonzero(of(epochs=(2, 3))).tolist() == [20, 21, 22]
    assert np.flatnonzero(of(epochs=(0.5, 1.2))).tolist() == list(range(5, 12))
    assert np.flatnonzero(of(epochs=(3, 9))).tolist() == list(range(23, 40))


@pytest.mark.parametrize('pair', [(4, 6), (40, 41)])
def test_a_window_without_a_point_is_refused_with_the_epochs_that_there_are(pair):
    with pytest.raises(ValueError, match=r'holds no point of this fit: its epochs, from 0, are 0 to 3'):
        of(epochs=pair)


def test_the_place_of_a_border_in_epochs_is_found_again():
    for n in range(1, 41):
        weights = of(epochs=(0, place_in_epochs(n, EPOCHS)))
        assert np.flatnonzero(weights).tolist() == list(range(n))


def test_an_ema_forgets_by_optimizer_steps_however_many_lie_between_two_points():
    every_step, every_third = of(n=40, ema=0.9), of(n=40, every=3, ema=0.9)
    assert every_step[-1] / every_step[-2] == pytest.approx(1 / 0.9)
    assert every_third[-1] / every_third[-2] == pytest.approx(1 / 0.9**3)


def test_power_weights_are_what_the_live_power_ema_gives_each_point():
    live = np.zeros(50)
    weight = power_ema(0.1)
    for n in range(50):
        live *= 1 - weight(n)
        live[n] += weight(n)
    np.testing.assert_allclose(power_weights(50, 0.1), live, rtol=1e-12)


@pytest.mark.parametrize('width', [0.02, 0.05, 0.1, 0.25, 12**-0.5])
def test_a_power_ema_is_as_wide_as_it_says(width):
    n = 200_000
    t = (np.arange(n) + 0.5) / n
    weights = power_weights(n, width)
    assert weights @ (t - weights @ t) ** 2 == pytest.approx(width**2, rel=1e-3)


def test_the_widest_power_ema_averages_all_points_alike():
    assert power_gamma(12**-0.5) == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(power_weights(7, 12**-0.5), np.full(7, 1 / 7), rtol=1e-9)


@pytest.mark.parametrize('width', [0, -1, 0.3, float('nan')])
def test_a_width_beyond_that_is_refused(width):
    with pytest.raises(ValueError, match='width must be in'):
        power_ema(width)


@pytest.mark.parametrize('law', ['linear', 'cosine', 'sqrt'])
def test_a_decay_is_what_scaled_updates_sum_to(law):
    "Points of a walk whose later updates are scaled down one by one, beside the weighted sum of the plain walk."
    updates = np.random.default_rng(0).normal(size=8)
    points = np.cumsum(updates)
    x = np.arange(8) / 8
    scale = {'linear': 1 - x, 'cosine': (1 + np.cos(np.pi * x)) / 2, 'sqrt': 1 - np.sqrt(x)}[law]
    scaled = np.sum(scale * updates)  # the first is whole
    weights = weighting({'decay': law, 'last': 1}, 8, [[0, 8]], 1)
    assert weights @ points == pytest.approx(scaled, rel=1e-12)


@pytest.mark.parametrize(
    'which, kind, text',
    [
        ({}, ValueError, 'not nothing'),
        ({'last': 0.2, 'ema': 0.9}, ValueError, 'an average is one of'),
        ({'mean': 3}, ValueError, 'not mean'),
        ({'decay': 'cosine'}, ValueError, 'decay needs last='),
        ({'decay': 'exp', 'last': 0.2}, ValueError, 'decay'),
        ({'last': 0}, ValueError, r'last must be a share of the fit in \(0, 1\]'),
        ({'last': 1.5}, ValueError, 'last must be'),
        ({'last': 'a'}, TypeError, 'last'),
        ({'ema': 1}, ValueError, r'ema must be a decay in \[0, 1\)'),
        ({'power': 0.5}, ValueError, 'width must be in'),
        ({'epochs': 3}, TypeError, 'epochs must be a pair'),
        ({'epochs': (3, 3)}, ValueError, '0 <= a < b'),
        ({'epochs': (-1, 3)}, ValueError, '0 <= a < b'),
    ],
)
def test_what_is_no_average_is_refused_by_name(which, kind, text):
    with pytest.raises(kind, match=text):
        check_which(which)


def test_coefficients_are_the_parts_of_a_weighting_in_each_segment():
    weights = np.random.default_rng(0).random(12)
    assert coefficients(weights, [3, 7, 12]).tolist() == pytest.approx(
        [weights[:3].sum(), weights[3:7].sum(), weights[7:].sum()]
    )


def test_a_window_on_borders_misses_nothing_and_others_what_a_random_walk_would_miss():
    ends = [10, 25, 40]
    assert missed(of(epochs=(0, 1)), ends) == 0
    weights = of(last=0.2)
    share = coefficients(weights, ends) / [10, 15, 15]
    given = np.repeat(share, [10, 15, 15])
    walks = np.cumsum(np.random.default_rng(0).normal(size=(20_000, 40)), 1)
    gap = ((walks @ weights - walks @ given) ** 2).mean() ** 0.5
    way = ((walks @ weights - walks[:, -1]) ** 2).mean() ** 0.5
    assert missed(weights, ends) == pytest.approx(gap / way, rel=0.03)


def test_the_last_point_alone_is_had_or_not_had():
    last = of(last=1e-9)
    assert missed(last, [39, 40]) == 0 and missed(last, [20, 40]) == math.inf


def cut(n_batches, n_epoch, n_segments=32):
    "The points up to the end of each segment of a fit with a point in each batch, as `WeightHistory` cuts it."
    cuts = Cuts(n_segments, n_epoch, n_batches)
    segments, n, wanted = [], 0, 0.0
    for i in range(n_batches):
        n, wanted = n + 1, wanted + cuts.wanted(n_batches - 1 - i)
        ends_epoch = (i + 1) % (n_batches // n_epoch) == 0
        if wanted >= 1 - 1e-9 or ends_epoch and cuts.keeps_epochs or i == n_batches - 1:
            segments.append(Segment(n, wanted, ends_epoch))
            n, wanted = 0, 0.0
        while (j := cuts.merging(segments)) is not None:
            a, b = segments[j : j + 2]
            segments[j : j + 2] = [Segment(a.n + b.n, a.wanted + b.wanted, b.ends_epoch)]
    return np.cumsum([s.n for s in segments])


@pytest.mark.parametrize('n_batches, n_epoch', [(5, 1), (40, 1), (500, 25), (5000, 20), (3000, 100), (64, 32)])
def test_there_are_never_more_segments_than_wanted_and_all_points_are_in_them(n_batches, n_epoch):
    ends = cut(n_batches, n_epoch)
    assert len(ends) <= 32 and ends[-1] == n_batches


@pytest.mark.parametrize('n_epoch', [1, 5, 20, 24])
def test_ends_of_epochs_are_borders_while_they_are_at_most_three_quarters_of_the_segments(n_epoch):
    ends = cut(1200, n_epoch)
    assert set(range(1200 // n_epoch, 1201, 1200 // n_epoch)) <= set(ends.tolist())


def test_the_end_is_cut_finest():
    lengths = np.diff(cut(5000, 20))
    assert lengths[-1] <= 5 and lengths[0] == 250


@pytest.mark.parametrize(
    'n_batches, n_epoch, which, at_most',
    [
        (500, 25, {'ema': 0.999}, 0.0005),
        (500, 25, {'ema': 0.99}, 0.003),
        (500, 25, {'ema': 0.9}, 0.04),
        (500, 25, {'power': 0.05}, 0.0125),
        (500, 25, {'power': 0.1}, 0.006),
        (5000, 20, {'ema': 0.999}, 0.004),
        (5000, 20, {'ema': 0.99}, 0.03),
        (5000, 20, {'ema': 0.9}, 0.08),
        (5000, 20, {'power': 0.05}, 0.015),
        (5000, 20, {'power': 0.1}, 0.008),
    ],
)
def test_usual_averages_are_had_within_a_few_per_cent_of_their_way(n_batches, n_epoch, which, at_most):
    epochs = [[e, (e + 1) * n_batches // n_epoch] for e in range(n_epoch)]
    assert missed(weighting(which, n_batches, epochs, 1), cut(n_batches, n_epoch)) <= at_most


def test_a_live_power_ema_of_weights_equals_the_weighted_mean_of_all_of_them():
    model = torch.nn.Linear(3, 2)
    average = WeightAverage(model, power_ema(0.15))
    points = []
    for _ in range(30):
        with torch.no_grad():
            model.weight.normal_()
        points.append(model.weight.detach().double().clone())
        average.update(model)
    want = sum(float(c) * p for c, p in zip(power_weights(30, 0.15), points))
    torch.testing.assert_close(average.swa_model.weight.double(), want, rtol=1e-5, atol=1e-6)
