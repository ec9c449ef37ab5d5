"""What predictions are judged by, against slow twins."""

import math

import pytest
import torch

from fastai_swa.experiments.scores import calibration_error, disagreement, scores


def random_case(seed, n=200, n_classes=4):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, n_classes, generator=g) * 2).softmax(1), torch.randint(n_classes, (n,), generator=g)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('n_bins', [1, 10, 15])
def test_the_calibration_error_equals_a_loop_over_bins(seed, n_bins):
    probs, y = random_case(seed)
    total = 0
    for b in range(n_bins):
        inside = [
            (float(p.max()), int(p.argmax()) == int(t))
            for p, t in zip(probs.double(), y)
            if b / n_bins < p.max() <= (b + 1) / n_bins
        ]
        if inside:
            total += (
                len(inside)
                / len(y)
                * abs(sum(c for c, _ in inside) / len(inside) - sum(r for _, r in inside) / len(inside))
            )
    assert calibration_error(probs, y, n_bins) == pytest.approx(total, abs=1e-9)


def test_certainty_that_is_right_or_wrong_has_the_least_and_the_greatest_calibration_error():
    probs = torch.eye(3).repeat(4, 1)
    assert (
        calibration_error(probs, torch.arange(12) % 3) == 0
        and calibration_error(probs, (torch.arange(12) + 1) % 3) == 1
    )


def test_disagreement_is_the_mean_over_pairs():
    probs = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.8, 0.2], [0.2, 0.8]], [[0.1, 0.9], [0.3, 0.7]]])  # 00, 01, 11
    assert (
        disagreement(probs) == pytest.approx((0.5 + 1 + 0.5) / 3)
        and math.isnan(disagreement(probs[:1]))
        and disagreement(probs[[0, 0]]) == 0
    )


def test_accuracy_and_loss():
    probs, y = random_case(9)
    found = scores(probs, y)
    assert found['accuracy'] == pytest.approx(sum(int(p.argmax()) == int(t) for p, t in zip(probs, y)) / 200)
    assert found['loss'] == pytest.approx(-sum(math.log(p[t]) for p, t in zip(probs, y)) / 200, rel=1e-5)
    assert scores(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))['loss'] > 80  # not infinite
