"""Weight space: directions, planes and curves in it, and what is read off a profile. Pure functions
of flat vectors and numbers; plain PyTorch."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.integrate import quad, trapezoid
from scipy.optimize import brentq
from scipy.special import comb

__all__ = [
    'direction',
    'Frame',
    'bezier',
    'chain',
    'CURVES',
    'inner_products',
    'norm_at',
    'arc_lengths',
    'crossing',
    'mean_height',
]


def direction(n: int, seed: int, number: int) -> torch.Tensor:
    """Unit vector number `number` of those that `seed` gives: float64, shape (n,), on the CPU,
    uniformly distributed on the sphere.
    """
    state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
    v = torch.randn(n, generator=torch.Generator().manual_seed(int(state) & (2**63 - 1)), dtype=torch.float64)
    return v / v.norm()


@dataclass(frozen=True)
class Frame:
    """An orthonormal frame of the plane through three points of weight space: the first is its
    origin, the second lies on its first axis.

    `u`, `v`: unit vectors by Gram-Schmidt on w2 - w1 and w3 - w1 (Garipov et al. 2018, appendix
    A.3), float64; `corners`: the coordinates of the three points, shape (3, 2).
    """

    origin: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor
    corners: np.ndarray

    @classmethod
    def through(cls, points, names=('the first', 'the second', 'the third')):
        """Raises `ValueError`, by their `names`, if two of the `points` are equal or the three lie
        on a line.
        """
        a, b, c = (p.double() for p in points)
        resolution = 1e-6 * max(float(a.norm()), 1e-30)  # of float32
        for (one, p), (other, q) in combinations(zip(names, (a, b, c)), 2):
            if float((p - q).norm()) <= resolution:
                raise ValueError(f'{one} and {other} are the same weights: a plane needs three that differ')
        width = float((b - a).norm())
        u = (b - a) / (b - a).norm()
        to_third = c - a
        across = to_third - (to_third @ u) * u
        height = float(across.norm())
        if height < 1e-3 * float(to_third.norm()) or height <= resolution:
            raise ValueError(
                f'{", ".join(names)} lie on a line: a plane needs three solutions that do not; take another third one, '
                'or draw the line'
            )
        corners = np.array([[0, 0], [width, 0], [float(to_third @ u), height]])
        return cls(a, u, across / height, corners)

    def project(self, w: torch.Tensor) -> tuple[float, float, float]:
        "Coordinates of the point of the plane nearest to `w`, and the distance between the two."
        off = w.double() - self.origin
        x = float(off @ self.u)
        y = float(off @ self.v)
        return x, y, float((off - x * self.u - y * self.v).norm())

    def shares(self, x: float, y: float) -> np.ndarray:
        "What the three points count for in the point (x, y): shape (3,), its sum is 1."
        (_, _), (bx, _), (cx, cy) = self.corners
        third = y / cy
        second = (x - third * cx) / bx
        return np.array([1 - second - third, second, third])


# curves: what each of `n` points counts for at t in [0, 1]; the first and last points are the ends,
# those between them the bends


def bezier(t: float, n: int) -> np.ndarray:
    """Bernstein's polynomials of degree n - 1: the Bezier curve (Garipov et al. 2018, equation 3
    for n = 3).
    """
    k = np.arange(n)
    return comb(n - 1, k) * t**k * (1 - t) ** (n - 1 - k)


def chain(t: float, n: int) -> np.ndarray:
    """The polygonal chain, each of whose n - 1 pieces takes an equal share of t (Garipov et al.
    2018, section 3.3).
    """
    return np.clip(1 - np.abs(t * (n - 1) - np.arange(n)), 0, None)


CURVES = {'bezier': bezier, 'chain': chain}


def inner_products(vectors) -> np.ndarray:
    "Of all pairs of `vectors`, in float64."
    vs = [v.double().cpu() for v in vectors]
    return np.array([[float(a @ b) for b in vs] for a in vs])


def norm_at(shares: np.ndarray, products: np.ndarray) -> float:
    "Euclidean norm of the sum of points times `shares`, from their `inner_products`."
    return float(np.sqrt(max(0.0, shares @ products @ shares)))


def arc_lengths(kind: str, products: np.ndarray, ts: np.ndarray) -> np.ndarray:
    "Length of the curve from t = 0 to each of `ts` in [0, 1], in Euclidean distance."
    n = len(products)
    if kind == 'chain':
        pieces = [norm_at(step, products) for step in np.diff(np.eye(n), axis=0)]
        return np.interp(ts, np.linspace(0, 1, n), np.cumsum([0, *pieces]))

    def speed(t):  # of the derivative, one degree less
        shares = -np.diff(bezier(t, n - 1), prepend=0, append=0)
        return (n - 1) * norm_at(shares, products)

    return np.array([quad(speed, 0, float(t))[0] for t in ts])


# profiles


def crossing(xs, ys, level: float) -> float:
    """The first x at which `ys` come to the other side of `level` than where they begin; nan if
    they never do, or are not finite before they do.

    Between two points by the cubic through the nearest four of them, which is exact for polynomials
    up to the third degree.
    """
    xs = np.asarray(xs, float)
    ys = np.asarray(ys, float) - level
    if ys[0] == 0:
        return float(xs[0])
    for i in range(len(xs) - 1):
        if not np.isfinite(ys[i : i + 2]).all():
            return float('nan')
        if ys[i + 1] == 0:
            return float(xs[i + 1])
        if (ys[i] > 0) == (ys[i + 1] > 0):
            continue
        first = max(0, min(i - 1, len(xs) - 4))
        near = slice(first, first + 4)
        if not np.isfinite(ys[near]).all():
            near = slice(i, i + 2)
        return float(brentq(_through, xs[i], xs[i + 1], args=(xs[near], ys[near]), xtol=1e-12 * xs[-1], rtol=1e-12))
    return float('nan')


def _through(x, xs, ys):
    "Value at `x` of Lagrange's polynomial through the points; at these it is exact."
    value = 0.0
    for i, y in enumerate(ys):
        others = np.delete(xs, i)
        value += y * np.prod((x - others) / (xs[i] - others))
    return value


def mean_height(xs, ys, low: float, high: float) -> float:
    """The mean of a quantity over the stretch from `low` to `high` of `xs`, straight between the
    points.
    """
    inside = (xs > low) & (xs < high)
    at = np.array([low, *xs[inside], high])
    return float(trapezoid(np.interp(at, xs, ys), at) / (high - low))
