"""Loss and metrics around and between solutions, by the learner's own loop: along rays, on a line, in a plane."""

import warnings
from collections.abc import Sized
from functools import lru_cache
from numbers import Integral, Real

import numpy as np
import torch
from fastai.learner import Learner
from fastcore.meta import delegates
from fastprogress.fastprogress import progress_bar

from ..averaging import lent
from ..checks import check_count, check_numbers
from ..interrupts import unwound_whole
from ..modules import in_train_mode
from ..passes import PassCancelled, kept_batches, refresh_bn, refreshable, untouched, validate_aside
from ..solutions import named_solutions
from ..state import loaders
from .geometry import Frame, direction
from .space import Space, check_ts, fingerprints, modes_put_back, weighted_sum
from .surfaces import MemoryRows, Plane, PointFile, Profile, Rays

__all__ = ['rays', 'line', 'plane', 'measured']


def measured(
    space,
    kind,
    about,
    points,
    at,
    sets=('train', 'valid'),  # on which data: 'train', 'valid' or both
    bn_batches: int = None,  # training batches used to refresh batch norm at each point; None: the whole training set
    train_batches: int = None,  # training batches that the 'train' columns are of; None: the whole training set
    # of all that is drawn: directions, and order and augmentation of training samples, which are
    # the same at each point
    seed: int = 0,
    file=None,  # gets a line for each point as it is measured; the same call goes on with a file that is not complete
    progress=None,  # called with the numbers of points done and of all before each, instead of a progress bar
):
    """A surface of class `kind`, with loss and metrics at each of the `points`. `at(i)` gives
    weights and buffers of point i.

    At each point batch norm is refreshed as a `SWACallback` does it, and the learner's own loop
    validates, with all its callbacks that do not record, show or steer training. Batches are drawn
    once and kept, if they are not more than a GiB. The learner is afterwards as it was, also after
    an error or Ctrl-C: weights, statistics, modes, optimizer, callbacks and all random generators.
    """
    learn, sets = space.learn, _check_sets(sets)
    if 'valid' in sets and len(loaders(learn)) < 2:
        raise ValueError("sets='valid' needs a validation set, and the learner has none: sets='train'")
    bn_batches = check_count('bn_batches', bn_batches, optional=True)
    train_batches = check_count('train_batches', train_batches, optional=True)
    columns = [f'{ds}_{name}' for ds in sets for name in _measures(learn)] + ['norm']
    spec = {
        'kind': about['kind'],
        **about['spec'],
        'columns': columns,
        'bn_batches': bn_batches,
        'train_batches': train_batches,
        'seed': check_count('seed', seed, least=0),
        'data': [_size(dl) for dl in loaders(learn)[: 1 + ('valid' in sets)]],
    }
    surface = kind(about | {'columns': columns, 'spec': spec}, points)
    rows = MemoryRows(surface) if file is None else PointFile(file, surface)
    try:
        todo, remarks = np.flatnonzero(~rows.surface.is_measured).tolist(), {}
        bar = progress_bar(todo) if space.shows_progress and progress is None else todo
        names = refreshable(learn)  # asked while the learner is as it stands
        # each pass puts the generators back, so that all begin the same
        with unwound_whole(), untouched(learn, seed), in_train_mode(learn.model):
            batches = _Batches(learn, names, sets, bn_batches, train_batches) if todo else None
            for done, i in enumerate(bar, len(points) - len(todo)):
                if progress is not None:
                    progress(done, len(points))
                weights, buffers = at(i)
                space.put(weights, buffers)
                with lent(space.scratch, learn.model), modes_put_back(learn.model):
                    # here, so that what it merges is merged once: passes put attributes back, not weights
                    learn.model.eval()
                    row = _measure(learn, names, batches, remarks)
                rows.add(i, row | {'norm': _norm(weights)})
    except PassCancelled:
        raise RuntimeError(
            'a callback of the learner cancels validations or batch-norm passes: remove it first'
        ) from None
    finally:
        rows.close()
    for what, sentence in remarks.items():
        if what != 'infinite':  # far from the solutions that is no surprise, and the loss shows it
            warnings.warn(sentence)
    return rows.surface


@delegates(measured)
def rays(
    learn: Learner,  # gives model, data, loss and metrics
    solutions,  # from which the rays start, see `solutions.gathered`
    # at which to measure: numbers, or the greatest, to which there are 20; default: twice the norm
    # of the first one's weights
    distances=None,
    n_rays: int = 10,  # random directions, uniform on the sphere, the same for each solution
    **kwargs,
) -> Rays:
    """Loss and metrics along random rays from `solutions`: how wide the optimum is that each lies
    in.

    Izmailov et al. 2018 (arXiv 1803.05407), section 4.1 and Fig. 4. Distances are Euclidean, in the
    space of all parameters. `Rays.widths` says where a metric crosses a level. A solution is a
    state dict, a module, a learner, a path to what `learn.save(with_opt=False)` or `torch.save`
    wrote; several are a list or a dict whose keys name them. What has `solutions()` stands for
    these, in a list or a dict, too: a `SWACallback` or `WeightAverage` for its average, an
    `Ensemble`, a `SnapshotCallback`; so does the folder of an ensemble.

    - `sets`: 'train', 'valid' or both; `bn_batches`, `train_batches`: training batches that batch
      norm is refreshed on, and that the 'train' columns are of (default: all); `seed`: of the
      directions, and of the order and augmentation of the training samples, the same at each point.
    - `file`: gets a line for each point as it is measured, and the same call goes on with it;
      `progress(done, total)` is called before each point, instead of a progress bar.

    Raises `ValueError`, `TypeError` or `FileNotFoundError`, naming it, for what cannot be
    used.
    """
    n_rays, space = check_count('n_rays', n_rays), Space(learn)
    named = named_solutions(solutions)
    loaded = [space.load(o, name) for name, o in named.items()]
    norms = [float(w.double().norm()) for w, _ in loaded]
    distances = _check_distances(float(f'{2 * norms[0]:.6g}') if distances is None else distances)
    spec = {
        'solutions': fingerprints({k: w for k, (w, _) in zip(named, loaded)}),
        'n_rays': n_rays,
        'distances': distances,
    }
    points = [
        (k, *p) for k in range(len(named)) for p in ((-1, 0), *((r, d) for r in range(n_rays) for d in distances))
    ]
    about = {
        'kind': 'rays',
        'solutions': dict(zip(named, norms)),
        'n_rays': n_rays,
        'distances': distances,
        'spec': spec,
    }
    starts = [(w.to(space.device), b) for w, b in loaded]
    seed = kwargs.get('seed', 0)

    @lru_cache(1)  # the points of a ray follow each other
    def ray(number):
        return direction(len(starts[0][0]), seed, number).to(space.device, space.dtype)

    def at(i):
        k, number, distance = points[i]
        weights, buffers = starts[k]
        return weights if number < 0 else weights.add(ray(number), alpha=distance), buffers

    return measured(space, Rays, about, points, at, **kwargs)


@delegates(measured)
def line(
    learn: Learner,  # gives model, data, loss and metrics
    solutions,  # two: from the first one, t = 0, through the second one, t = 1
    ts=41,  # where to measure: values of t, or so many from -0.5 to 1.5, and the two solutions
    **kwargs,
) -> Profile:
    """Loss and metrics on the straight line through two solutions, and beyond both. What is neither
    a parameter nor a statistic that is recomputed, as of frozen batch norm, is the first solution's
    everywhere.

    Izmailov et al. 2018, section 4.2 and Fig. 5. Solutions and further arguments as for `rays`.
    Raises what that raises, and `ValueError` for two equal solutions.
    """
    space, named = Space(learn), named_solutions(solutions, 2, 'a line')
    (a, _), (b, _) = loaded = [space.load(o, name) for name, o in named.items()]
    buffers = space.one_set_of_buffers(loaded)
    ts = check_ts([0, 1, *check_ts(ts, -0.5, 1.5)]) if isinstance(ts, Integral) else check_ts(ts)
    length = float((b.double() - a.double()).norm())
    if not length:
        raise ValueError(f'{" and ".join(named)} are the same weights: a line needs two that differ')
    about = {
        'kind': 'line',
        'solutions': {name: float(w.double().norm()) for name, (w, _) in zip(named, loaded)},
        'length': length,
        'arc': [t * length for t in ts],
        'spec': {'solutions': fingerprints({k: w for k, (w, _) in zip(named, loaded)}), 'ts': ts},
    }
    a, b = a.to(space.device), b.to(space.device)
    return measured(space, Profile, about, [(t,) for t in ts], lambda i: (torch.lerp(a, b, ts[i]), buffers), **kwargs)


@delegates(measured)
def plane(
    learn: Learner,  # gives model, data, loss and metrics
    solutions,  # three; the first is the origin, the second lies on the x axis
    n_points=21,  # of the grid on each axis, or a pair for x and y
    margin=0.2,  # the grid goes beyond the solutions by this share of their spread on each axis, or a pair for x and y
    marks=None,  # more solutions, as a dict that names them: projected onto the plane, for the figure
    trajectory=(),  # a path of solutions, likewise
    **kwargs,
) -> Plane:
    """Loss and metrics on a grid in the plane through three solutions, with axes by Gram-Schmidt; x
    and y are Euclidean distances. What is neither a parameter nor a statistic that is recomputed is
    the first solution's everywhere.

    Garipov et al. 2018 (arXiv 1802.10026), appendix A.3; Izmailov et al. 2018, Figs. 1 and 3.
    Solutions and further arguments as for `rays`. Raises what that raises, and `ValueError` for
    solutions of which two are equal or that lie on a line.
    """
    space, named = Space(learn), named_solutions(solutions, 3, 'a plane')
    counts = [check_count('n_points', n, least=2) for n in _pair('n_points', n_points)]
    margins = np.array([float(check_numbers('margin', m)[0]) for m in _pair('margin', margin)])
    if (margins < 0).any():
        raise ValueError(f'margin must be at least 0, not {margin!r}')
    loaded = [space.load(o, name) for name, o in named.items()]
    frame, buffers = Frame.through([w for w, _ in loaded], list(named)), space.one_set_of_buffers(loaded)

    def projected(others):
        return {name: frame.project(space.load(o, name)[0]) for name, o in others.items()}

    trajectory = (
        {}
        if trajectory is None or isinstance(trajectory, Sized) and not len(trajectory)
        else named_solutions(trajectory)
    )
    low, high = frame.corners.min(0), frame.corners.max(0)
    beyond = margins * (high - low)
    xs, ys = (np.linspace(*ends).tolist() for ends in zip(low - beyond, high + beyond, counts))
    about = {
        'kind': 'plane',
        'solutions': dict(zip(named, frame.corners.tolist())),
        'xs': xs,
        'ys': ys,
        'marks': projected(named_solutions(marks)) if marks else {},
        'trajectory': list(projected(trajectory).values()) if trajectory else [],
        'spec': {
            'solutions': fingerprints({k: w for k, (w, _) in zip(named, loaded)}),
            'n_points': counts,
            'margin': margins.tolist(),
        },
    }
    points, corners = [(x, y) for y in ys for x in xs], [w.to(space.device) for w, _ in loaded]
    return measured(
        space, Plane, about, points, lambda i: (weighted_sum(corners, frame.shares(*points[i])), buffers), **kwargs
    )


def _check_distances(distances) -> list[float]:
    if isinstance(distances, Real) and not isinstance(distances, bool):
        ds = np.linspace(0, distances, 21)[1:]
    else:
        ds = check_numbers('distances', distances)
    ds = np.unique(ds[ds != 0])  # at 0 it is measured anyway
    if not len(ds) or ds[0] < 0:
        raise ValueError(f'distances must be positive numbers, not {distances!r}')
    return ds.tolist()


def _pair(name, value):
    if not isinstance(value, tuple | list):
        return value, value
    if len(value) != 2:
        raise ValueError(f'{name} must be one for both axes or a pair for x and y, not {value!r}')
    return value


class _Batches:
    "What is run through the model at each point: for batch norm, and for each of the `sets`."

    def __init__(self, learn, names, sets, bn_batches, train_batches):
        wanted = [bn_batches] * bool(names) + [train_batches] * ('train' in sets)
        training = {n: kept_batches(learn, n) for n in dict.fromkeys(wanted)}  # for both the same, if as many
        self.bn = training.get(bn_batches)
        self.sets = {ds: training[train_batches] if ds == 'train' else kept_batches(learn, train=False) for ds in sets}


def _measure(learn, names, batches, remarks) -> dict:
    if names:
        remarks |= refresh_bn(learn, names, None, in_fit=False, dl=batches.bn).remarks
    row = {}
    for ds, dl in batches.sets.items():
        values = validate_aside(learn, dl, in_fit=False)
        row |= {f'{ds}_{name}': _number(v) for name, v in zip(_measures(learn), values)}
    return row


def _measures(learn) -> list[str]:
    "'loss' and the names of the metrics, numbered where two have the same."
    names = ['loss', *(m.name for m in learn.metrics)]
    return [name if names.index(name) == i else f'{name}_{names[: i + 1].count(name)}' for i, name in enumerate(names)]


def _norm(weights):
    return float(torch.linalg.vector_norm(weights, dtype=None if weights.device.type == 'mps' else torch.float64))


def _number(v):
    try:
        return float(v)
    except (TypeError, ValueError):
        return float('nan')  # a metric may give anything


def _size(dl):
    "Samples, if that is known, and batch size."
    n = getattr(dl, 'n', None) or (len(dl.dataset) if hasattr(getattr(dl, 'dataset', None), '__len__') else None)
    return [n, getattr(dl, 'bs', None) or getattr(dl, 'batch_size', None)]


def _check_sets(sets):
    sets = (sets,) if isinstance(sets, str) else tuple(sets)
    if sets not in (('train',), ('valid',), ('train', 'valid'), ('valid', 'train')):
        raise ValueError(f"sets must be 'train', 'valid' or both, not {sets!r}")
    return sets
