"""Points of weight space: a model as one of them, and grids of them around and between solutions. No
pass is made here."""

import hashlib
from collections.abc import Callable, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from torch import nn

from ..averaging import all_finite
from ..checks import check_count, check_numbers
from ..interrupts import uninterrupted
from ..modules import clean_copy, in_train_mode, modes_of, plain_name, set_modes, to_train_form, unwrap
from ..passes import refreshable
from ..processes import Processes
from ..solutions import named_solutions, source_of
from ..walk import not_copied
from ..warn import warn
from ..weights import load_into
from .geometry import Frame, direction, distance_between, norm
from .surfaces import Plane, Profile, Rays, Surface

__all__ = [
    'Space',
    'Point',
    'as_real',
    'Grid',
    'rays_grid',
    'line_grid',
    'plane_grid',
    'weighted_sum',
    'fingerprint',
    'check_ts',
    'modes_put_back',
]


class Point(NamedTuple):
    "A point of weight space."

    weights: torch.Tensor  # all parameters, end to end, shape (n,)
    buffers: dict  # name -> tensor: what the model holds beside


class Space:
    """The weights of a learner's model as one flat vector: all its parameters, in float32 at least,
    end to end.

    - `scratch`: a clean copy of the model, on the device of the data, which takes on the weights of
      one point after the other. Where modes move weights (LoRA that merges its update in `eval()`),
      these are the weights as training has them: all points are sums of such.
    """

    def __init__(self, learn: Learner):
        if not isinstance(learn, Learner):
            raise TypeError(f'learn must be a Learner, which comes first, not {type(learn).__name__}')
        if Processes(learn).size > 1:
            raise RuntimeError('the loss surface is measured in one process: call it outside of distrib_ctx')
        self.learn = learn
        self.scratch = clean_copy(learn.model, not_copied(learn))
        device = getattr(learn.dls, 'device', None)
        if device is not None:
            self.scratch.to(device)
        to_train_form(self.scratch)
        # name -> parameter of `scratch`; and the same as views of real numbers
        self.originals = {k: p for k, p in self.scratch.named_parameters() if p.is_floating_point() or p.is_complex()}
        self.params = [as_real(p) for p in self.originals.values()]
        if not self.params:
            raise ValueError('the model has no parameters: there is nothing to move')
        self.device = self.params[0].device
        self.dtype = torch.float32
        for p in self.params:
            self.dtype = torch.promote_types(self.dtype, p.dtype)

    @property
    def shows_progress(self) -> bool:
        return any(isinstance(cb, ProgressCallback) for cb in self.learn.cbs)

    def pieces(self, weights: torch.Tensor) -> list[torch.Tensor]:
        "Views of `weights` in the shapes of the parameters, complex ones as pairs of real numbers."
        pieces = weights.split([p.numel() for p in self.params])
        return [w.view(p.shape) for w, p in zip(pieces, self.params)]

    def load(self, solution, name: str) -> Point:
        """The point where a `solution` lies, on the CPU. Raises as `weights.load_into` does, and
        `ValueError` for weights that are not finite.
        """
        source = source_of(solution)
        if isinstance(source, nn.Module):
            with in_train_mode(source):
                load_into(self.scratch, unwrap(source).state_dict(), name)
        else:
            load_into(self.scratch, source, name)
        weights = torch.cat([p.to('cpu', self.dtype).flatten() for p in self.params])
        if not all_finite(self.pieces(weights)):
            raise ValueError(f'{name} has weights that are not finite')
        return Point(weights, {k: b.clone() for k, b in self.scratch.named_buffers()})

    def load_all(self, named: dict) -> dict[str, Point]:
        "Name -> point, of solutions by name."
        return {name: self.load(solution, name) for name, solution in named.items()}

    def one_set_of_buffers(self, points: list[Point]) -> dict:
        """The buffers of the first of the `points`, which serve for all that lie between; if others
        have others that are not recomputed, that is said.
        """
        modules = dict(unwrap(self.learn.model).named_modules())
        recomputed = set()
        for name in refreshable(self.learn):
            recomputed |= {plain_name(f'{name}.{k}' if name else k) for k in modules[name]._buffers}
        first, *others = (point.buffers for point in points)
        for k, b in first.items():
            if not b.is_floating_point() or k in recomputed:
                continue
            if not all(torch.equal(b, other[k]) for other in others):
                warn(f'{k} is not recomputed and differs between the solutions: all points have that of the first')
                break
        return first

    def put(self, weights: torch.Tensor, buffers: dict):
        "Give `scratch` these `weights` and `buffers`."
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.pieces(weights.to(self.device)))
        for k, b in self.scratch.named_buffers():
            b.data = buffers[k].clone()

    def state_dict(self, weights: torch.Tensor, buffers: dict) -> dict:
        "`weights` as a state dict of copies on the CPU."
        self.put(weights, buffers)
        res = {}
        for k, v in self.scratch.state_dict().items():
            res[k] = v.detach().to('cpu', copy=True) if isinstance(v, torch.Tensor) else v
        return res


def as_real(t: torch.Tensor) -> torch.Tensor:
    "A view of `t`, without its gradient; complex numbers as pairs of real ones."
    t = t.detach()
    return torch.view_as_real(t) if t.is_complex() else t


@contextmanager
def modes_put_back(model):
    """At the end of this context `model` is put in the modes it had at its start, by its modules'
    own `train` and `eval`.
    """
    model = unwrap(model)
    modes = modes_of(model)
    try:
        yield
    finally:
        with uninterrupted():
            set_modes(model, modes)


# grids


@dataclass
class Grid:
    "Points of weight space that can be measured, and what they are."

    space: Space  # whose points they are
    surface: type[Surface]  # what their measurement makes
    about: dict  # what it is of, as plain data, without what `measured` adds
    spec: dict  # of that, what must not differ where a measurement goes on from its file
    points: list[tuple]  # the coordinates of each, as `surface` has them
    at: Callable[[int], Point]  # point number i, on the device of the space
    at_t: Callable[[float], Point] | None = None  # of a line: the point at any t


def rays_grid(space: Space, solutions, distances=None, n_rays: int = 10, seed: int = 0) -> Grid:
    "Along random rays from each of the `solutions`; arguments and errors as for `measure.rays`."
    n_rays = check_count('n_rays', n_rays)
    loaded = space.load_all(named_solutions(solutions))
    norms = _norms(loaded)
    if distances is None:
        distances = float(f'{2 * next(iter(norms.values())):.6g}')
    distances = _check_distances(distances)
    points = []
    for k in range(len(loaded)):
        points.append((k, -1, 0))
        for number in range(n_rays):
            points += [(k, number, distance) for distance in distances]
    starts = [_on_device(space, point) for point in loaded.values()]

    @lru_cache(1)  # the points of a ray follow each other
    def ray(number):
        return direction(len(starts[0].weights), seed, number, space.dtype).to(space.device)

    def at(i):
        k, number, distance = points[i]
        weights, buffers = starts[k]
        if number < 0:
            return starts[k]
        return Point(weights.add(ray(number), alpha=distance), buffers)

    about = {'kind': 'rays', 'solutions': norms, 'n_rays': n_rays, 'distances': distances}
    spec = {'solutions': _fingerprints(loaded), 'n_rays': n_rays, 'distances': distances}
    return Grid(space, Rays, about, spec, points, at)


def line_grid(space: Space, solutions, ts=41) -> Grid:
    "On the straight line through two `solutions`; arguments and errors as for `measure.line`."
    loaded = space.load_all(named_solutions(solutions, 2, 'a line'))
    buffers = space.one_set_of_buffers(list(loaded.values()))
    if isinstance(ts, Integral):
        ts = check_ts([0, 1, *check_ts(ts, -0.5, 1.5)])
    else:
        ts = check_ts(ts)
    a, b = (point.weights for point in loaded.values())
    length = distance_between(a, b)
    if not length:
        raise ValueError(f'{" and ".join(loaded)} are the same weights: a line needs two that differ')
    a = a.to(space.device)
    b = b.to(space.device)

    def at_t(t):
        return Point(torch.lerp(a, b, t), buffers)

    def at(i):
        return at_t(ts[i])

    about = {'kind': 'line', 'solutions': _norms(loaded), 'length': length, 'arc': [t * length for t in ts]}
    spec = {'solutions': _fingerprints(loaded), 'ts': ts}
    return Grid(space, Profile, about, spec, [(t,) for t in ts], at, at_t)


def plane_grid(space: Space, solutions, n_points=21, margin=0.2, marks=None, trajectory=()) -> Grid:
    "In the plane through three `solutions`; arguments and errors as for `measure.plane`."
    named = named_solutions(solutions, 3, 'a plane')
    counts = [check_count('n_points', n, least=2) for n in _pair('n_points', n_points)]
    margins = np.array([_check_margin(m, margin) for m in _pair('margin', margin)])
    loaded = space.load_all(named)
    frame = Frame.through([point.weights for point in loaded.values()], list(named))
    buffers = space.one_set_of_buffers(list(loaded.values()))
    low = frame.corners.min(0)
    high = frame.corners.max(0)
    beyond = margins * (high - low)
    xs, ys = (np.linspace(*ends).tolist() for ends in zip(low - beyond, high + beyond, counts))
    points = [(x, y) for y, x in product(ys, xs)]
    corners = [point.weights.to(space.device) for point in loaded.values()]
    shares = [frame.shares(x, y) for x, y in points]

    def at(i):
        return Point(weighted_sum(corners, shares[i]), buffers)

    about = {
        'kind': 'plane',
        'solutions': dict(zip(named, frame.corners.tolist())),
        'xs': xs,
        'ys': ys,
        'marks': _projected(space, frame, marks),
        'trajectory': list(_projected(space, frame, trajectory).values()),
    }
    spec = {'solutions': _fingerprints(loaded), 'n_points': counts, 'margin': margins.tolist()}
    return Grid(space, Plane, about, spec, points, at)


def _projected(space, frame, solutions) -> dict:
    "Name -> coordinates in the plane, and distance from it; of no solutions none."
    if solutions is None or isinstance(solutions, Sized) and not len(solutions):
        return {}
    # one after the other: a trajectory may be long
    return {name: frame.project(space.load(o, name).weights) for name, o in named_solutions(solutions).items()}


def _norms(loaded: dict[str, Point]) -> dict[str, float]:
    return {name: norm(point.weights) for name, point in loaded.items()}


def _on_device(space, point: Point) -> Point:
    return Point(point.weights.to(space.device), point.buffers)


def weighted_sum(vectors, shares) -> torch.Tensor:
    "One that has a share of 1 beside zeros comes out bitwise."
    res = vectors[0] * float(shares[0])
    for v, share in zip(vectors[1:], shares[1:]):
        res.add_(v, alpha=float(share))
    return res


def fingerprint(weights: torch.Tensor) -> str:
    return hashlib.sha256(weights.numpy().data).hexdigest()[:16]


def _fingerprints(loaded: dict[str, Point]) -> list:
    "Pairs of a name and a fingerprint of the weights, in their order."
    return [[name, fingerprint(point.weights)] for name, point in loaded.items()]


# arguments


def check_ts(ts, low=-float('inf'), high=float('inf')) -> list[float]:
    "Points of a line or curve, ascending; a number of them goes from `low` to `high`."
    if isinstance(ts, Integral) and not isinstance(ts, bool):
        return np.linspace(low, high, check_count('ts', ts, least=2)).round(12).tolist()
    found = np.unique(check_numbers('ts', ts))
    if not len(found):
        raise ValueError('ts is empty: give points, of which 0 and 1 are the solutions')
    if found[0] < low or found[-1] > high:
        raise ValueError(f'ts must be from {low} to {high}, not {ts!r}')
    return found.tolist()


def _check_distances(distances) -> list[float]:
    if isinstance(distances, Real) and not isinstance(distances, bool):
        ds = np.linspace(0, distances, 21)[1:]
    else:
        ds = check_numbers('distances', distances)
    ds = np.unique(ds[ds != 0])  # at 0 it is measured anyway
    if not len(ds) or ds[0] < 0:
        raise ValueError(f'distances must be positive numbers, not {distances!r}')
    return ds.tolist()


def _check_margin(one, margin) -> float:
    one = float(check_numbers('margin', one)[0])
    if one < 0:
        raise ValueError(f'margin must be at least 0, not {margin!r}')
    return one


def _pair(name, value):
    if not isinstance(value, tuple | list):
        return value, value
    if len(value) != 2:
        raise ValueError(f'{name} must be one for both axes or a pair for x and y, not {value!r}')
    return value
