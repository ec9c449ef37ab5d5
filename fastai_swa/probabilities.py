"""What a loss takes a model's output for, and how several outputs become one. Plain PyTorch."""

import math
from functools import partial, reduce

import torch
from torch.nn import functional as F

from .checks import check_choice

__all__ = ['Probabilities', 'as_probabilities', 'features', 'vote']

_LOSSES = {
    'softmax': {
        'CrossEntropyLoss',
        'CrossEntropyLossFlat',
        'FocalLoss',
        'FocalLossFlat',
        'LabelSmoothingCrossEntropy',
        'cross_entropy',
    },
    'sigmoid': {
        'BCEWithLogitsLoss',
        'BCEWithLogitsLossFlat',
        'MultiLabelSoftMarginLoss',
        'binary_cross_entropy_with_logits',
    },
    'none': {'MSELoss', 'L1Loss', 'SmoothL1Loss', 'HuberLoss', 'mse_loss', 'l1_loss', 'smooth_l1_loss', 'huber_loss'},
}
_LITTLE = 1e-3  # below one vote of a hundred members, far above float32's resolution
_LEAST = 1e-6  # of a probability whose log is taken


class Probabilities:
    """What a loss takes a model's output for, and means of that: probabilities of classes
    ('softmax'), of labels ('sigmoid'), or values ('none').

    Means are computed in log space, so that the log of a mean probability is exact however small it
    is. Raises `ValueError` if `loss_func` does not tell and `kind` is not given.
    """

    def __init__(self, loss_func, kind: str | None = None):
        if kind is not None:
            check_choice('activation', kind, ('softmax', 'sigmoid', 'none'))
        self.kind = kind or _kind(loss_func)
        self.axis = getattr(loss_func, 'axis', 1)  # fastai's losses say it, torch's have the classes there

    def of(self, output):
        "The probabilities (regression: values) that `output` stands for."
        if self.kind == 'none':
            return output
        if self.kind == 'softmax':
            return output.softmax(self.axis)
        return output.sigmoid()

    def mean(self, outputs: list):
        "The output that stands for the mean of the probabilities of `outputs`."
        return self.output(reduce(self.merged, map(self.terms, outputs)), len(outputs))

    def merged(self, total, terms):
        "A running sum with the `terms` of another output."
        add = torch.add if self.kind == 'none' else torch.logaddexp
        return tuple(map(add, total, terms))

    def output(self, total, n: int):
        "The output that stands for a running sum of `n` divided by `n`."
        if self.kind == 'none':
            return total[0] / n
        if self.kind == 'softmax':
            return total[0] - math.log(n)
        return total[0] - total[1]

    def terms(self, output) -> tuple:
        "What a running sum starts with."
        if self.kind == 'none':
            return (output,)
        if self.kind == 'softmax':
            return (output.log_softmax(self.axis),)
        return F.logsigmoid(output), F.logsigmoid(-output)

    def log(self, p):
        "The output that stands for the probabilities `p`."
        return p.log() if self.kind == 'softmax' else p.logit()


def _kind(loss_func) -> str:
    f = loss_func.func if isinstance(loss_func, partial) else loss_func
    inner = type(getattr(f, 'func', None)).__name__  # fastai's losses hold torch's
    names = [*(c.__name__ for c in type(f).__mro__), inner, getattr(f, '__name__', '')]
    for kind, known in _LOSSES.items():
        if known & set(names):
            return kind
    raise ValueError(
        f"the loss {names[-1] or names[0]} does not say what the model's output is: pass activation='softmax', "
        "'sigmoid' or 'none'"
    )


def vote(ps, mean, probabilities: Probabilities):
    """Shares of the votes of `ps`, shape (members, ...), with as little of their `mean` as decides
    between equal ones.
    """
    if probabilities.kind == 'sigmoid':
        votes = (ps > 0.5).float().mean(0)
    else:
        axis = probabilities.axis
        axis = axis if axis < 0 else axis + 1  # of `ps`, where the members come first
        votes = torch.zeros_like(ps).scatter_(axis, ps.argmax(axis, keepdim=True), 1).mean(0)
    p = (votes + _LITTLE * mean) / (1 + _LITTLE)
    # none is impossible: its log is finite
    return p.clamp(_LEAST, 1 - _LEAST) if probabilities.kind == 'sigmoid' else p.clamp_min(_LEAST)


def as_probabilities(scores, probabilities: Probabilities):
    "The nearest that a linear model's scores come to probabilities, in their order."
    if probabilities.kind == 'sigmoid':
        return scores.clamp(_LEAST, 1 - _LEAST)
    scores = scores.clamp_min(0) + _LEAST * (1 + scores.clamp(-1, 1))
    return scores / scores.sum(probabilities.axis, keepdim=True)


def features(ps):
    "Probabilities (members, n, ...) as what a linear model takes: (n, members * ...)."
    return ps.transpose(0, 1).flatten(1)
