"""Weight space: directions, planes and curves in it, and what is read off a profile. Pure functions
of flat vectors and numbers; plain PyTorch.

A vector of float64 takes as much memory as two models. So what is computed in float64 of whole vectors is computed
stretch by stretch.
"""

from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import torch
from scipy.integrate import quad, trapezoid
from scipy.optimize import brentq
from scipy.special import comb

__all__ = [
    'direction',
    'norm',
    'distance_between',
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


_STRETCH = 1 << 18  # numbers of a vector that are looked at together


def direction(n: int, seed: int, number: int, dtype=torch.float64) -> torch.Tensor:
    """Unit vector number `number` of those that `seed` gives: shape (n,), on the CPU, uniformly
    distributed on the sphere. It is drawn in float64 and rounded to `dtype`.
    """
    # the last stretch has 16 numbers at least: fewer are drawn in another way
    starts = range(0, max(1, n - 15), _STRETCH)
    lengths = np.diff([*starts, n]).tolist()
    state = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) & (2**63 - 1)

    def drawn():
        generator = torch.Generator().manual_seed(state)
        return (torch.randn(length, generator=generator, dtype=torch.float64) for length in lengths)

    length = _norm_of([v.norm() for v in drawn()])
    res = torch.empty(n, dtype=dtype)
    for start, v in zip(starts, drawn()):
        res[start : start + len(v)] = v / length
    return res


def norm(vector: torch.Tensor) -> float:
    "Euclidean, in float64 where the device has it."
    dtype = None if vector.device.type == 'mps' else torch.float64
    return float(_norm_of([torch.linalg.vector_norm(v, dtype=dtype) for v in vector.split(_STRETCH)]))


def _norm_of(norms: list) -> torch.Tensor:
    "The norm of a vector, of those of its stretches."
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()


def distance_between(a: torch.Tensor, b: torch.Tensor) -> float:
    "Euclidean, in float64."
    (squared,) = _summed(lambda a, b: [(b - a).square().sum()], a, b)
    return float(np.sqrt(squared))


def _summed(terms, *vectors) -> np.ndarray:
    "The sums of what `terms` gives, a few numbers, of each stretch of the `vectors`, in float64."
    total = 0.0
    for stretches in zip(*(v.split(_STRETCH) for v in vectors)):
        total = total + np.array([float(x) for x in terms(*(v.double() for v in stretches))])
    return total


@dataclass(frozen=True)
class Frame:
    """An orthonormal frame of the plane through three points of weight space: the first is its
    origin, the second lies on its first axis.

    The axes `u` and `v` are unit vectors by Gram-Schmidt on w2 - w1 and w3 - w1 (Garipov et al.
    2018, appendix A.3). They are made of the points, as far as needed, whenever they are needed.
    """

    points: tuple  # the three vectors
    corners: np.ndarray  # their coordinates, shape (3, 2)

    @classmethod
    def through(cls, points, names=('the first', 'the second', 'the third')):
        """Raises `ValueError`, by their `names`, if two of the `points` are equal or the three lie
        on a line.
        """
        a, b, c = points
        resolution = 1e-6 * max(norm(a), 1e-30)  # of float32
        for (one, p), (other, q) in combinations(zip(names, points), 2):
            if distance_between(p, q) <= resolution:
                raise ValueError(f'{one} and {other} are the same weights: a plane needs three that differ')
        width = distance_between(a, b)
        (along,) = _summed(lambda a, b, c: [(c - a) @ ((b - a) / width)], a, b, c)
        (across,) = _summed(lambda a, b, c: [(c - a - along * ((b - a) / width)).square().sum()], a, b, c)
        height = float(np.sqrt(across))
        if height < 1e-3 * distance_between(a, c) or height <= resolution:
            raise ValueError(
                f'{", ".join(names)} lie on a line: a plane needs three solutions that do not; take another third one, '
                'or draw the line'
            )
        return cls((a, b, c), np.array([[0, 0], [width, 0], [along, height]]))

    @property
    def u(self) -> torch.Tensor:
        "In float64."
        return self._axes(*(p.double() for p in self.points))[0]

    @property
    def v(self) -> torch.Tensor:
        "In float64."
        return self._axes(*(p.double() for p in self.points))[1]

    def _axes(self, a, b, c) -> tuple:
        "Both axes, or of stretches of the points these stretches of them."
        (_, _), (width, _), (along, height) = self.corners.tolist()
        u = (b - a) / width
        return u, (c - a - along * u) / height

    def project(self, w: torch.Tensor) -> tuple[float, float, float]:
        "Coordinates of the point of the plane nearest to `w`, and the distance between the two."

        def coordinates(w, a, b, c):
            u, v = self._axes(a, b, c)
            return (w - a) @ u, (w - a) @ v

        x, y = _summed(coordinates, w, *self.points).tolist()

        def squared_distance(w, a, b, c):
            u, v = self._axes(a, b, c)
            return [(w - a - x * u - y * v).square().sum()]

        (squared,) = _summed(squared_distance, w, *self.points)
        return x, y, float(np.sqrt(squared))

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
    products = _summed(lambda *vs: [a @ b for a, b in product(vs, vs)], *vectors)
    return products.reshape(len(vectors), len(vectors))


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
