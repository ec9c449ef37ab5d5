"""What predictions are judged by. Pure functions of tensors."""

import torch

__all__ = ['scores', 'calibration_error', 'disagreement']


def scores(probs: torch.Tensor, targets: torch.Tensor) -> dict:
    "Accuracy, loss (mean negative log-likelihood) and calibration error of `probs` (n, classes)."
    picked = probs.double()[torch.arange(len(targets)), targets]
    return {
        'accuracy': float((probs.argmax(1) == targets).double().mean()),
        'loss': float(-picked.clamp_min(1e-45).log().mean()),
        'calibration_error': calibration_error(probs, targets),
    }


def calibration_error(probs: torch.Tensor, targets: torch.Tensor, n_bins: int = 15) -> float:
    """The expected calibration error: over bins of equal width in the confidence, the mean distance
    of confidence and accuracy.

    `probs` (n, classes), `targets` (n) of class indices. Guo et al. 2017 (arXiv 1706.04599),
    equation 3; the same 15 bins.
    """
    confidence, predicted = probs.double().max(1)
    bins = (confidence * n_bins).ceil().long().clamp(1, n_bins) - 1  # of (0, 1/n], (1/n, 2/n], ...
    gap = (predicted == targets).double() - confidence
    gaps = torch.zeros(n_bins, dtype=torch.double).scatter_add_(0, bins, gap)
    return float(gaps.abs().sum() / len(probs))


def disagreement(probs: torch.Tensor) -> float:
    """The share of samples on which two members predict different classes, the mean over all pairs
    of members; nan for one.

    `probs` (members, n, classes).
    """
    votes = probs.argmax(2)
    pairs = []
    for i in range(len(votes)):
        for j in range(i):
            pairs.append((votes[i] != votes[j]).double().mean())
    return float(torch.stack(pairs).mean()) if pairs else float('nan')
