"""What a loss takes an output for, and means of outputs."""

import pytest
import torch
from fastai.losses import (
    BCEWithLogitsLossFlat,
    CrossEntropyLossFlat,
    FocalLossFlat,
    LabelSmoothingCrossEntropyFlat,
    MSELossFlat,
)
from torch import nn
from torch.nn import functional as F

from fastai_swa.probabilities import Probabilities, features, vote


@pytest.mark.parametrize(
    'loss, kind',
    [
        (CrossEntropyLossFlat(), 'softmax'),
        (nn.CrossEntropyLoss(), 'softmax'),
        (F.cross_entropy, 'softmax'),
        (FocalLossFlat(), 'softmax'),
        (LabelSmoothingCrossEntropyFlat(), 'softmax'),
        (BCEWithLogitsLossFlat(), 'sigmoid'),
        (nn.BCEWithLogitsLoss(), 'sigmoid'),
        (MSELossFlat(), 'none'),
        (nn.L1Loss(), 'none'),
    ],
)
def test_the_loss_says_what_an_output_is(loss, kind):
    assert Probabilities(loss).kind == kind


def test_segmentation_takes_classes_at_axis_1():
    outputs = [torch.randn(2, 4, 5, 5) for _ in range(3)]
    p = Probabilities(CrossEntropyLossFlat(axis=1))
    torch.testing.assert_close(p.of(p.mean(outputs)), torch.stack([o.softmax(1) for o in outputs]).mean(0))


def test_what_loss_and_metrics_get_is_the_log_of_the_mean_probability():
    outputs = [torch.randn(5, 3) for _ in range(4)]
    p = torch.stack([o.softmax(1) for o in outputs]).mean(0)
    torch.testing.assert_close(Probabilities(nn.CrossEntropyLoss()).mean(outputs), p.log())
    q = torch.stack([o.sigmoid() for o in outputs]).mean(0)
    torch.testing.assert_close(Probabilities(nn.BCEWithLogitsLoss()).mean(outputs), q.logit())


def test_a_running_sum_is_the_mean_of_all_at_once():
    outputs = [torch.randn(5, 3) for _ in range(4)]
    for loss in nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss():
        p = Probabilities(loss)
        total = p.terms(outputs[0])
        for o in outputs[1:]:
            total = p.merged(total, p.terms(o))
        torch.testing.assert_close(p.output(total, 4), p.mean(outputs))
        expected = torch.stack([p.of(o) for o in outputs]).mean(0)
        torch.testing.assert_close(p.of(p.mean(outputs)), expected)


def test_a_vote_counts_members_and_leaves_none_impossible():
    ps = torch.tensor([[[0.9, 0.1, 0.0]], [[0.4, 0.6, 0.0]], [[0.7, 0.3, 0.0]]])
    p = vote(ps, ps.mean(0), Probabilities(nn.CrossEntropyLoss()))
    torch.testing.assert_close(p, torch.tensor([[2 / 3, 1 / 3, 0.0]]), rtol=0, atol=2e-3)
    assert (p > 0).all()


def test_features_are_a_row_for_each_sample():
    ps = torch.arange(24.0).view(2, 4, 3)  # members, samples, classes
    assert features(ps).shape == (4, 6)
    assert torch.equal(features(ps)[1], torch.cat([ps[0, 1], ps[1, 1]]))
    assert torch.equal(features(ps[..., 0]), ps[..., 0].T)
