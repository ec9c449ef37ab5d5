"How much a new point weighs in a running average."

from functools import partial

from ..checks import check_number
from ..weightings import power_gamma

__all__ = ['equal', 'ema', 'power_ema', 'check_weight']


def equal(n_averaged: int) -> float:
    "Each point weighs the same: `1 / (n_averaged + 1)` (Izmailov et al. 2018, Algorithm 1)."
    return 1 / (n_averaged + 1)


def ema(decay: float, warmup: bool = False):
    """Exponential moving average: the old average keeps `decay` of its weight, the new point gets
    `1 - decay`.

    The first point is taken whole, so the average never contains weights from before it. `warmup`:
    point n, from 0, gets `max(1 - decay, (n + 1)**(-2/3))`, so that early points are forgotten
    soon, while the weights still improve fast. Raises `TypeError` or `ValueError` if `decay` is not
    a number in [0, 1).
    """
    if not 0 <= check_number('decay', decay) < 1:
        raise ValueError(f'decay must be in [0, 1), not {decay!r}')
    return partial(_warm_ema_weight if warmup else _ema_weight, decay)


def power_ema(width: float):
    """Power-function EMA (Karras et al. 2023, arXiv 2312.02696): an average that grows with the fit, and needs no
    warm-up, since its memory is a share of the points so far.

    - `width`: the standard deviation of its weighting as a share of the points so far, in (0, 12**-0.5], the largest
      of which is `equal`; .05 to .25 are usual.

    Point n, from 0, gets 1 - (1 - 1 / (n + 1))**(g + 1), where g is the largest root of
    (g + 2)**2 (g + 3) = (g + 1) / width**2. Raises `TypeError` or `ValueError` for a width that is none.
    """
    return partial(_power_weight, power_gamma(check_number('width', width)))


def _power_weight(gamma, n_averaged):
    return 1.0 - (1.0 - 1.0 / (n_averaged + 1)) ** (gamma + 1)


def _ema_weight(decay, n_averaged):
    return 1.0 if n_averaged == 0 else 1.0 - decay


def _warm_ema_weight(decay, n_averaged):
    return max(1.0 - decay, (n_averaged + 1) ** (-2 / 3))


def check_weight(weight):
    """Raise `TypeError` or `ValueError` unless `weight` is a function from a number of points to a
    number in [0, 1].
    """
    if not callable(weight):
        raise TypeError(f'weight must be a function such as equal or ema(0.99), not {weight!r}')
    try:
        fits = 0 <= weight(1) <= 1
    except Exception:
        fits = False
    if not fits:
        raise ValueError(
            f'weight must give a number in [0, 1] for a number of points, as equal and ema(0.99) do, and {weight!r} '
            'does not'
        )
