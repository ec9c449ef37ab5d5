"""How much each point of a fit weighs in an average of its weights, and how well the means of
stretches can give it. Pure mathematics, without a tensor.

A *point* is a set of weights that was taken, after every so many optimizer steps; a *segment* is a stretch of
consecutive points of which the mean is kept. A weighting is an array of the points' weights, which sum to 1.
"""

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np

from .checks import check_choice, check_number

__all__ = [
    'Cuts',
    'Segment',
    'called',
    'check_which',
    'coefficients',
    'decayed',
    'ema_weights',
    'missed',
    'place_in_epochs',
    'power_gamma',
    'power_weights',
    'weighting',
    'window',
    'window_of_share',
]


def window(n_points: int, first: int, end: int) -> np.ndarray:
    "The points `first` to `end` - 1 of `n_points` weigh the same, the others nothing."
    res = np.zeros(n_points)
    res[first:end] = 1 / (end - first)
    return res


def window_of_share(n_points: int, share: float) -> int:
    "The first of the last `share` of `n_points`: at least one point is in it, and a part of one counts as one."
    return n_points - max(1, math.ceil(share * n_points - 1e-9))


def ema_weights(n_points: int, decay: float, every: int = 1) -> np.ndarray:
    "A point weighs `decay` to the power of the optimizer steps after it; `every`: steps from one point to the next."
    weights = decay ** (every * np.arange(n_points - 1, -1, -1.0))
    return weights / weights.sum()


def power_gamma(width: float) -> float:
    """The exponent of the power-function EMA of a relative `width` (its standard deviation, as a share of the fit so
    far): the largest root of (g + 2)**2 (g + 3) = (g + 1) / width**2 (Karras et al. 2023, arXiv 2312.02696).

    Raises `ValueError` if `width` is not in (0, 12**-0.5].
    """
    if not 0 < width <= 12**-0.5 + 1e-12:
        raise ValueError(
            f'width must be in (0, {12**-0.5:.4f}], 12**-0.5, which averages all points alike, not {width!r}'
        )
    inverse = width**-2
    # (g + 2)^2 (g + 3) = g^3 + 7 g^2 + 16 g + 12
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return max(0.0, float(roots.real[np.abs(roots.imag) < 1e-6 * np.abs(roots.real).clip(1)].max()))


def power_weights(n_points: int, width: float) -> np.ndarray:
    """What `power_ema(width)` gives each of `n_points`: point p, from 0, gets
    ((p + 1)**(g + 1) - p**(g + 1)) / n_points**(g + 1).
    """
    edges = (np.arange(n_points + 1) / n_points) ** (power_gamma(width) + 1)
    return np.diff(edges)


def decayed(n_points: int, first: int, law: str) -> np.ndarray:
    """The weighting of the points from `first` on that stands for a learning rate that decays over them: a constant
    rate whose updates are scaled by w_1 >= ... >= w_k gives the same as merging with c_j = w_j - w_(j+1) (arXiv
    2507.17634).

    - `law`: 'linear', which is a plain mean; 'cosine'; or 'sqrt', which falls as 1 - sqrt of the share done.
    """
    k = n_points - first
    scale = _LAWS[law](np.arange(k + 1) / k)
    res = np.zeros(n_points)
    res[first:] = scale[:-1] - scale[1:]
    return res


_LAWS = {
    'linear': lambda x: 1 - x,
    'cosine': lambda x: (1 + np.cos(np.pi * x)) / 2,
    'sqrt': lambda x: 1 - np.sqrt(x),
}
LAWS = tuple(_LAWS)


# averages by name


def check_which(which: dict) -> dict:
    """The keywords of one average: `last=`, `epochs=`, `ema=`, `power=`, or `decay=` with `last=`. Raises `TypeError`
    or `ValueError`, naming it, for one that is none.
    """
    names = set(which)
    if names not in ({'last'}, {'epochs'}, {'ema'}, {'power'}, {'decay', 'last'}):
        if names == {'decay'}:
            raise ValueError('decay needs last=, the share of the fit over which the learning rate would have decayed')
        raise ValueError(
            'an average is one of last=.25, epochs=(a, b), ema=.999, power=.1, and decay= with last=, not '
            + (', '.join(sorted(names)) or 'nothing')
        )
    if 'last' in which and not 0 < check_number('last', which['last']) <= 1:
        raise ValueError(f'last must be a share of the fit in (0, 1], not {which["last"]!r}')
    if 'ema' in which and not 0 <= check_number('ema', which['ema']) < 1:
        raise ValueError(f'ema must be a decay in [0, 1), not {which["ema"]!r}')
    if 'power' in which:
        power_gamma(check_number('power', which['power']))
    if 'decay' in which:
        check_choice('decay', which['decay'], LAWS)
    if 'epochs' in which:
        a, b = _pair(which['epochs'])
        if not 0 <= a < b:
            raise ValueError(f'epochs must be a pair (a, b) with 0 <= a < b, the epochs a to b - 1, not ({a}, {b})')
        which = {'epochs': (a, b)}
    return which


def _pair(epochs):
    try:
        a, b = epochs
    except (TypeError, ValueError):
        a = b = None
    if not all(isinstance(e, Real) and not isinstance(e, bool) for e in (a, b)):
        raise TypeError(f'epochs must be a pair of numbers such as (10, 20), not {epochs!r}')
    return a, b


def called(which: dict) -> str:
    "How a user would write it."
    if not which:
        return 'the last weights'
    if 'epochs' in which:
        a, b = which['epochs']
        return f'epochs=({a:.6g}, {b:.6g})'
    return ', '.join(f'{k}={v!r}' if isinstance(v, str) else f'{k}={v:.6g}' for k, v in which.items())


def weighting(which: dict, n_points: int, epochs: list, every: int) -> np.ndarray:
    """How much each of `n_points` weighs in the average that `check_which` has passed.

    - `epochs`: pairs of an epoch's number and the points up to its end; `every`: optimizer steps from one point to the
      next.

    Raises `ValueError` for a window without a point.
    """
    if 'ema' in which:
        return ema_weights(n_points, which['ema'], every)
    if 'power' in which:
        return power_weights(n_points, which['power'])
    if 'epochs' in which:
        first, end = _points_in(which['epochs'], epochs)
        if first >= end:
            known = f'{epochs[0][0]} to {epochs[-1][0]}' if epochs else 'none'
            raise ValueError(f'{called(which)} holds no point of this fit: its epochs, from 0, are {known}')
        return window(n_points, first, end)
    first = window_of_share(n_points, which['last'])
    return decayed(n_points, first, which['decay']) if 'decay' in which else window(n_points, first, n_points)


def _points_in(pair, epochs) -> tuple[int, int]:
    "The first point in the epochs a to b - 1, and the first one after them; parts of epochs are parts of their points."
    a, b = pair
    starts = [0, *(end for _, end in epochs)]
    first, end = 0, 0
    for (number, epoch_end), start in zip(epochs, starts):
        n = epoch_end - start
        if number < a:
            first = start + round(min(1, a - number) * n)
        if number < b:
            end = start + round(min(1, b - number) * n)
    return first, end


def place_in_epochs(n_points: int, epochs: list) -> float:
    "Where in the fit, in epochs, the first `n_points` end; `weighting` finds the same point there again."
    start = 0
    for number, end in epochs:
        if n_points <= end and end > start:
            return number + (n_points - start) / (end - start)
        start = end
    return epochs[-1][0] + 1 if epochs else 0.0


# segments


def coefficients(weights: np.ndarray, ends) -> np.ndarray:
    """How much the mean of each segment weighs in an average with these `weights` of the points.

    - `ends`: of each segment, the number of points up to its end. Of a segment that is only partly wanted the mean
      gets the wanted part's weight: among weightings that are constant on the segments that is the nearest.
    """
    total = np.concatenate([[0.0], np.cumsum(weights)])
    edges = np.concatenate([[0], ends])
    return np.diff(total[edges])


def missed(weights: np.ndarray, ends) -> float:
    """How far the segments are from an average with these `weights`, as a share of its way from the last point, if
    the weights walk at random: |cumsum(r - Pr)| / |cumsum r| over all points but the last, P the projection on the
    segments.
    """
    lengths = np.diff(np.concatenate([[0], ends]))
    given = np.repeat(coefficients(weights, ends) / lengths, lengths)
    way = np.linalg.norm(np.cumsum(weights)[:-1])
    gap = np.linalg.norm(np.cumsum(weights - given)[:-1])
    if gap <= 1e-12 * max(way, 1):
        return 0.0
    return float(gap / way) if way else math.inf


@dataclass
class Segment:
    "A stretch of consecutive points."

    n: int  # points
    wanted: float  # how many segments it ought to be, by the density of `Cuts`
    ends_epoch: bool = False  # does an epoch end with it?


@dataclass
class Cuts:
    """Where a fit is cut into at most `n_segments` segments while it runs: evenly, and finer towards its end, where
    averages differ most.

    Ends of epochs are cuts where `n_epoch` is at most 3/4 of the segments, and are never given up. A cut is due when
    the wanted number of segments since the last one reaches 1, at a density of C / B + F / (ln(B + 1) (left + 1)) a
    batch: B batches in the fit, `left` of them to come, C + F = `n_segments`.
    """

    n_segments: int
    n_epoch: int
    n_batches: int | None  # in the fit; None: not known before its first epoch is over

    @property
    def keeps_epochs(self) -> bool:
        "Are all ends of epochs cuts?"
        return self.n_epoch <= 3 / 4 * self.n_segments

    @property
    def n_even(self) -> float:
        "C of the density."
        return self.n_epoch if self.keeps_epochs else 3 / 4 * self.n_segments

    def wanted(self, left: int) -> float:
        "Segments wanted for a batch with `left` batches of the fit after it."
        if not self.n_batches:
            return 0.0
        n_fine = self.n_segments - self.n_even
        left = max(0, left)  # a fit may be longer than it seemed
        return self.n_even / self.n_batches + n_fine / (math.log(self.n_batches + 1) * (left + 1))

    def merging(self, segments: list[Segment]) -> int | None:
        """Which of the `segments` is to be merged with the one after it, so that no more than `n_segments` are left;
        `None` if none need be.
        """
        if len(segments) <= self.n_segments:
            return None
        pairs = [i for i in range(len(segments) - 1) if not (self.keeps_epochs and segments[i].ends_epoch)]
        return min(pairs, key=lambda i: segments[i].wanted + segments[i + 1].wanted)
