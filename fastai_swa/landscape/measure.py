"""Loss and metrics around and between solutions, by the learner's own loop: along rays, on a line, in a plane."""

from collections import Counter

import numpy as np
from fastai.learner import Learner
from fastcore.meta import delegates
from fastprogress.fastprogress import progress_bar

from ..aside import untouched
from ..averaging import lent
from ..batches import KeptBatches, fresh_loader
from ..checks import check_count
from ..interrupts import unwound_whole
from ..modules import in_train_mode
from ..one_model import OneModel
from ..passes import PassCancelled, kept_batches, refresh_bn, refreshable, validate_aside
from ..walk import loaders
from ..warn import warn
from .geometry import norm
from .space import Grid, Space, line_grid, modes_put_back, plane_grid, rays_grid
from .surfaces import MemoryRows, Plane, PointFile, Profile, Rays, Surface

__all__ = ['rays', 'line', 'plane', 'measured', 'measured_line']


def measured(
    grid: Grid,
    dl=None,  # a further loader, of other samples; its columns are 'dl_loss' and 'dl_<metric>'
    sets=('train', 'valid'),  # on which data: 'train', 'valid' or both
    bn_batches: int = None,  # training batches used to refresh batch norm at each point; None: the whole training set
    train_batches: int = None,  # training batches that the 'train' columns are of; None: the whole training set
    # of all that is drawn: directions, and order and augmentation of training samples, which are
    # the same at each point
    seed: int = 0,
    file=None,  # gets a line for each point as it is measured; the same call goes on with a file that is not complete
    progress=None,  # called with the numbers of points done and of all before each, instead of a progress bar
) -> Surface:
    """The surface with loss and metrics at each point of `grid`.

    At each point batch norm is refreshed as a `SWACallback` does it, and the learner's own loop
    validates, with all its callbacks that do not record, show or steer training. Batches are drawn
    once and kept, if they are not more than a GiB. The learner is afterwards as it was, also after
    an error or Ctrl-C: weights, statistics, modes, optimizer, callbacks and all random generators.
    """
    learn = grid.space.learn
    sets = _check_sets(sets)
    if 'valid' in sets and len(loaders(learn)) < 2:
        raise ValueError("sets='valid' needs a validation set, and the learner has none: sets='train'")
    bn_batches = check_count('bn_batches', bn_batches, optional=True)
    train_batches = check_count('train_batches', train_batches, optional=True)
    seed = check_count('seed', seed, least=0)
    columns = _columns(learn, sets if dl is None else (*sets, 'dl'))
    spec = {
        'kind': grid.about['kind'],
        **grid.spec,
        'columns': columns,
        'bn_batches': bn_batches,
        'train_batches': train_batches,
        'seed': seed,
        'data': [_size(dl) for dl in loaders(learn)[: 2 if 'valid' in sets else 1]],
    }
    if dl is not None:
        spec['dl'] = _size(dl)
    surface = grid.surface(grid.about | {'spec': spec, 'columns': columns}, grid.points)
    rows = MemoryRows(surface) if file is None else PointFile(file, surface)
    try:
        todo = np.flatnonzero(~rows.surface.is_measured).tolist()
        # both asked while the learner is as it stands
        names = refreshable(learn)
        shown = progress_bar(todo) if grid.space.shows_progress and progress is None else todo
        # each pass puts the generators back, so that all begin the same
        with unwound_whole(), untouched(learn, seed), in_train_mode(learn.model):
            batches = _Batches(learn, names, sets, bn_batches, train_batches, dl) if todo else None
            remarks = {}
            for n_done, i in enumerate(shown, len(grid.points) - len(todo)):
                if progress is not None:
                    progress(n_done, len(grid.points))
                rows.add(i, _measured_at(grid, i, names, batches, remarks))
    except PassCancelled:
        raise RuntimeError(
            'a callback of the learner cancels validations or batch-norm passes: remove it first'
        ) from None
    finally:
        rows.close()
    for what, sentence in remarks.items():
        if what != 'infinite':  # far from the solutions that is no surprise, and the loss shows it
            warn(sentence)
    return rows.surface


def _measured_at(grid, i, names, batches, remarks) -> dict:
    "Column -> value at point `i`; adds to the `remarks`."
    space = grid.space
    model = space.learn.model
    norm_there = _go_to(grid, i)
    with lent(space.scratch, model), modes_put_back(model):
        # here, so that what it merges is merged once: passes put attributes back, not weights
        model.eval()
        row = _measure(space.learn, names, batches, remarks)
    return row | {'norm': norm_there}


def _go_to(grid, i) -> float:
    """Give the space's model the weights of point `i`; the norm of these. They are held no longer:
    what runs the model makes cycles of references, which may keep its callers' variables for a while.
    """
    weights, buffers = grid.at(i)
    grid.space.put(weights, buffers)
    return norm(weights)


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
      `progress(done, total)` is called before each point, instead of a progress bar; `dl`: a further loader of
      samples, whose columns are 'dl_loss' and 'dl_<metric>'.

    Raises `ValueError`, `TypeError` or `FileNotFoundError`, naming it, for what cannot be
    used.
    """
    grid = rays_grid(Space(learn), solutions, distances, n_rays, kwargs.get('seed', 0))
    return measured(grid, **kwargs)


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

    What is returned gives the weights of any point: `Profile.best`, `Profile.solution`.
    """
    return measured_line(line_grid(Space(learn), solutions, ts), **kwargs)


def measured_line(grid: Grid, **kwargs) -> Profile:
    "As `measured`, of what `line_grid` gives; the profile can give the weights of its points."
    profile = measured(grid, **kwargs)
    profile.way = Way(grid)
    return profile


class Way:
    "Gives the weights on the line of a `Grid`."

    def __init__(self, grid: Grid):
        self.grid = grid

    def solution(self, t: float) -> dict:
        return self.grid.space.state_dict(*self.grid.at_t(t))

    def model(self, t: float) -> OneModel:
        return OneModel(self.grid.space.learn).fill(self.solution(t))


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
    return measured(plane_grid(Space(learn), solutions, n_points, margin, marks, trajectory), **kwargs)


class _Batches:
    "What is run through the model at each point: for batch norm, and for each of the `sets`."

    def __init__(self, learn, names, sets, bn_batches, train_batches, further):
        wanted = []  # numbers of training batches
        if names:
            wanted.append(bn_batches)
        if 'train' in sets:
            wanted.append(train_batches)
        training = {n: kept_batches(learn, n) for n in dict.fromkeys(wanted)}  # for both the same, if as many
        self.bn = training.get(bn_batches)
        self.sets = {}
        for ds in sets:
            self.sets[ds] = training[train_batches] if ds == 'train' else kept_batches(learn, train=False)
        if further is not None:
            self.sets['dl'] = KeptBatches(lambda: fresh_loader(further))


def _measure(learn, names, batches, remarks) -> dict:
    "Column -> value, for the weights that the learner's model has now; adds to the `remarks`."
    if names:
        remarks |= refresh_bn(learn, names, None, in_fit=False, dl=batches.bn).remarks
    row = {}
    for ds, dl in batches.sets.items():
        values = validate_aside(learn, dl, in_fit=False)
        row |= {f'{ds}_{name}': _number(v) for name, v in zip(_measures(learn), values)}
    return row


def _columns(learn, sets) -> list[str]:
    columns = []
    for ds in sets:
        columns += [f'{ds}_{name}' for name in _measures(learn)]
    return [*columns, 'norm']


def _measures(learn) -> list[str]:
    "'loss' and the names of the metrics, numbered where two have the same."
    seen = Counter()
    names = []
    for name in ('loss', *(m.name for m in learn.metrics)):
        seen[name] += 1
        names.append(name if seen[name] == 1 else f'{name}_{seen[name]}')
    return names


def _number(v) -> float:
    try:
        return float(v)
    except (TypeError, ValueError):
        return float('nan')  # a metric may give anything


def _size(dl) -> list:
    "Samples, if that is known, and batch size."
    n = getattr(dl, 'n', None)
    if not n:
        data = getattr(dl, 'dataset', None)
        n = len(data) if hasattr(data, '__len__') else None
    return [n, getattr(dl, 'bs', None) or getattr(dl, 'batch_size', None)]


def _check_sets(sets) -> tuple:
    sets = (sets,) if isinstance(sets, str) else tuple(sets)
    if sets not in (('train',), ('valid',), ('train', 'valid'), ('valid', 'train')):
        raise ValueError(f"sets must be 'train', 'valid' or both, not {sets!r}")
    return sets
