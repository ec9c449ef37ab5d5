"""Figures of the loss surface. Each function draws one, returns its axes, and leaves showing and saving to
the caller."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.patheffects import withStroke

from ..checks import check_share
from ..plot import axes_or_new, labelled, styles
from .surfaces import Plane, Profile, Rays, Surface, Width

__all__ = ['plot_width', 'plot_line', 'plot_paths', 'plot_plane', 'plot_planes']

_DISTANCE = 'distance in weight space, Euclidean'
# of other metrics more is, as fastai has it
_LESS_IS_BETTER = 'loss', 'error', 'norm', 'mse', 'mae', 'msle', 'rmspe', 'perplexity', 'hamming'


def plot_width(rays: Rays, column: str | None = None, level: float | None = None, ax=None, wd: float = 0.0):
    """`column` over the distance from each solution: each ray in a thin line, their mean in a thick
    one (Izmailov et al. 2018, Fig. 4).

    - `column`: default: the last metric of the validation set, or its loss if there is none. `wd`:
      see `Surface.column`.
    - `level`: in the unit of the column (of an error rate a share, though the axis shows per cent);
      it is drawn, with the distances at which the rays cross it: mean and standard deviation, or
      how many do.

    Returns the axes. Raises `ValueError` for a column that there is not or a level in per cent,
    `TypeError` for what is no `Rays`.
    """
    _check_kind('plot_width', rays, Rays)
    column = column or _main_column(rays)
    scale, label = _scale_and_label(column, wd)
    if level is not None and scale == 100:
        check_share('level', level)
    ax = axes_or_new(ax)
    profiles = rays.profiles(column, wd)
    widths = {} if level is None else rays.widths(column, level, wd)
    level_text = '' if level is None else _level_text(column, level, scale)
    for (name, values), style in zip(profiles.items(), styles(len(profiles))):
        w = widths.get(name)
        ax.plot(rays.distances, scale * values.T, color=style['color'], ls=style['ls'], lw=0.6, alpha=0.5)
        ax.plot(rays.distances, scale * values.mean(0), lw=2.2, label=name + _width_text(w, level_text), **style)
        if w is not None and w.is_crossed_by_all:
            at = w.distance, scale * level
            ax.errorbar(*at, xerr=w.std, color=style['color'], capsize=4, lw=1.5, marker='o', ms=5)
    if level is not None:
        seen = ax.get_ylim()
        ax.axhline(scale * level, color='0.4', lw=0.8, ls=':')
        ax.set_ylim(seen)  # a level far off must not flatten the rest
    _clip_top(ax, scale * np.concatenate([values.mean(0) for values in profiles.values()]))
    return _dressed(ax, _DISTANCE, label)


def _level_text(column: str, level: float, scale: float) -> str:
    "As in '50 % error' or 'loss 1.5'."
    measure = column.partition('_')[2].replace('_', ' ').removesuffix(' rate')
    return f'{100 * level:g} % {measure}' if scale == 100 else f'{measure} {level:g}'


def _width_text(width: Width | None, level: str) -> str:
    "What the legend says behind a solution's name."
    if width is None:
        return ''
    if width.is_crossed_by_all:
        return f': {level} at distance {width.distance:.3g} +- {width.std:.2g}'
    return f': {width.n_crossed} of {len(width.distances)} rays reach {level}'


def plot_line(profile: Profile, columns=None, ax=None, wd: float = 0.0):
    """Two columns along a line through two solutions, which are marked (Izmailov et al. 2018, Fig.
    5).

    `columns`: one on the left axis, another on the right; default: the training loss and the last
    metric of the validation set. `wd` (see `Surface.column`) is added to losses. Returns the array
    of axes. Raises `ValueError` for a column that there is not.
    """
    _check_kind('plot_line', profile, Profile)
    ax = axes_or_new(ax)
    if isinstance(columns, str):
        columns = (columns,)
    if columns is None:
        wanted = dict.fromkeys(['train_loss', _main_column(profile)])
        columns = [column for column in wanted if column in profile.values]
    axs = [ax, *(ax.twinx() for _ in columns[1:])]
    for side, column, style in zip(axs, columns, styles(len(columns))):
        decay = wd if column.endswith('_loss') else 0.0
        scale, label = _scale_and_label(column, decay)
        values = scale * profile.column(column, decay)
        side.plot(profile.arc, values, lw=2, label=label, **style)
        side.set_ylabel(label, color=style['color'])
        _clip_top(side, values)
    # outside of the stretch between them
    first, second = profile.names
    _mark(ax, 0, first, xytext=(-4, 0), ha='right')
    _mark(ax, profile.length, second, xytext=(4, 0), ha='left')
    ax.set_xlabel(f'distance from {profile.names[0]} in weight space, Euclidean')
    ax.grid(alpha=0.25)
    lines = [side.lines[0] for side in axs]
    if len(lines) > 1:
        ax.legend(lines, [line.get_label() for line in lines], fontsize='small')
    return np.array(axs)


def _mark(ax, x, name, **kwargs):
    "A solution at `x`: a line across the axes, and its name beside it."
    ax.axvline(x, color='0.5', lw=0.8, ls='--')
    where = dict(xycoords=('data', 'axes fraction'), textcoords='offset points')
    ax.annotate(name, (x, 0.5), rotation=90, va='center', fontsize='small', **where, **kwargs)


def plot_paths(profiles: dict, column: str | None = None, ax=None, wd: float = 0.0):
    """`column` along several ways between two solutions, such as the straight line, a chain and a
    curve, over the share of the way done.

    `profiles`: name -> `Profile`. Returns the axes. Raises `ValueError` for a column that there is
    not (Garipov et al. 2018, Fig. 2).
    """
    _check_kind('plot_paths', profiles, Profile, several=True)
    ax = axes_or_new(ax)
    one = next(iter(profiles.values()))
    column = column or _main_column(one)
    scale, label = _scale_and_label(column, wd)
    for (name, p), style in zip(profiles.items(), styles(len(profiles))):
        ax.plot(p.arc / p.length, scale * p.column(column, wd), lw=2, label=f'{name}, {p.length:.3g} long', **style)
    first, second = one.names
    return _dressed(ax, f'share of the way from {first} to {second}', label)


def plot_plane(plane: Plane, column: str | None = None, ax=None, wd: float = 0.0, top: float | None = None):
    """`column` over a plane in contours, with the solutions, marks and trajectory of the plane
    (Izmailov et al. 2018, Figs. 1 and 3).

    The levels' distances from the best value are spaced in log, up to `top`, in the unit of the
    column; default: the worst value. Points that are not measured yet stay white. Returns the axes.
    Raises `ValueError` for a column that there is not.
    """
    _check_kind('plot_plane', plane, Plane)
    return plot_planes({'': plane}, column, None if ax is None else [ax], wd, top)[0]


def plot_planes(planes: dict, column: str | None = None, axs=None, wd: float = 0.0, top: float | None = None):
    """Planes side by side, in the same colours for the same values; with a curve as its
    `trajectory` each, the panels of mode connectivity.

    `planes`: title -> `Plane`; the rest as in `plot_plane`. Returns the array of axes. Raises as
    that does.
    """
    _check_kind('plot_planes', planes, Plane, several=True)
    column = column or _main_column(next(iter(planes.values())))
    scale, label = _scale_and_label(column, wd)
    if axs is None:
        _, axs = plt.subplots(1, len(planes), figsize=(1 + 4.6 * len(planes), 4.4), layout='constrained', squeeze=False)
    axs = np.ravel(axs)
    grids = [scale * _measured_grid(p, column, wd) for p in planes.values()]
    less_is_better = any(word in column for word in _LESS_IS_BETTER)
    levels, diverged = _levels(grids, less_is_better, scale, top)
    beyond, colours = ('max', 'viridis_r') if less_is_better else ('min', 'viridis')
    norm = BoundaryNorm(levels, 256, extend=beyond)
    for (title, p), grid, ax in zip(planes.items(), grids, axs):
        shown = np.ma.where(np.isfinite(grid.filled(0)), grid, diverged)
        filled = ax.contourf(p.xs, p.ys, shown, levels, cmap=colours, norm=norm, extend=beyond)
        ax.contour(p.xs, p.ys, shown, levels, colors='0.25', linewidths=0.4)
        _draw_points(ax, p)
        ax.set(xlabel=_DISTANCE, ylabel=_DISTANCE, title=title, aspect='equal')
        if not 0.4 < np.ptp(p.xs) / np.ptp(p.ys) < 2.5:  # it would be a strip
            ax.set(xlabel=f'{_DISTANCE} (axes not to scale)', aspect='auto')
    bar = axs[0].figure.colorbar(filled, ax=list(axs), label=label, ticks=levels, spacing='uniform')
    bar.ax.set_yticklabels(_told_apart(levels))
    return axs


def _measured_grid(plane, column, wd) -> np.ma.MaskedArray:
    "`column` over the plane; what is not measured yet is masked."
    grid = plane.grid(column, wd)
    return np.ma.array(grid, mask=~plane.is_measured.reshape(grid.shape))


def _levels(grids, less_is_better: bool, scale: float, top: float | None):
    """The levels of the contours, ascending: their distances from the best value of all `grids` are
    spaced in log, up to the worst one, or to `scale * top`; those between are round numbers. And a
    value beyond all of them, for points where it diverged.
    """
    finite = np.concatenate([grid.compressed() for grid in grids])
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        raise ValueError('no point of the plane is measured, or none is finite')
    sign = 1 if less_is_better else -1
    best = (sign * finite).min()
    worst = (sign * finite).max()
    if top is not None:
        worst = sign * scale * top
        if worst <= best:
            raise ValueError(f'top must be worse than the best value, {sign * best / scale:.4g}, not {top!r}')
    spread = max(worst - best, 1e-6 * max(1, abs(best)))  # a plane may be flat
    shares = np.concatenate([[0], np.geomspace(0.01, 1, 9)])
    return _rounded(np.sort(sign * (best + spread * shares))), sign * (2 * abs(worst) + 1)


def _rounded(levels) -> np.ndarray:
    "The ascending `levels`, those between the ends as round numbers, each within a quarter of the way to its next one."
    gaps = np.diff(levels)
    nearest = np.minimum(gaps[:-1], gaps[1:])
    steps = np.array([_round_step(gap / 2) for gap in nearest])
    return np.concatenate([levels[:1], np.round(levels[1:-1] / steps) * steps, levels[-1:]])


def _round_step(most: float) -> float:
    "The greatest of 1, 2 and 5 times a power of ten that is no more than `most`."
    power = 10.0 ** np.floor(np.log10(most))
    return max(step * power for step in (1, 2, 5) if step * power <= most * (1 + 1e-9))


def _told_apart(numbers):
    "With as few digits as tell them apart, three at least."
    for digits in range(3, 9):
        texts = [f'{v:.{digits}g}' for v in numbers]
        if len(set(texts)) == len(texts):
            break
    return texts


def _draw_points(ax, plane):
    halo = [withStroke(linewidth=2.5, foreground='white')]
    if len(plane.trajectory):
        xs, ys, _ = plane.trajectory.T
        ax.plot(xs, ys, color='black', lw=1.2, marker='.', ms=5, path_effects=halo)

    def put(x, y, name, **style):
        ax.plot(x, y, ls='', color='black', path_effects=halo, **style)
        ax.annotate(name, (x, y), xytext=(6, 5), textcoords='offset points', path_effects=halo, fontsize='small')

    for name, (x, y) in plane.solutions.items():
        put(x, y, name, marker='x', ms=8, mew=2)
    for name, (x, y, off) in plane.marks.items():
        is_off = off > 1e-3 * np.ptp(plane.xs)
        put(x, y, f'{name}, {off:.2g} off' if is_off else name, marker='*', ms=12)


def _check_kind(call, given, kind, several=False):
    if several:
        what = f'a dict of {kind.__name__} objects by name'
        is_right = isinstance(given, dict) and all(isinstance(s, kind) for s in given.values())
    else:
        what = f'a {kind.__name__}'
        is_right = isinstance(given, kind)
    if not is_right:
        raise TypeError(
            f'{call} draws {what}, as rays, line, plane and Curve.evaluate measure them, not {type(given).__name__}'
        )


def _main_column(surface: Surface):
    """The last metric of the validation set, or the loss if there is none, or what there is of the
    training set.
    """
    columns = [column for column in surface.about['columns'] if column != 'norm']
    of_validation = [column for column in columns if column.startswith('valid_')]
    return (of_validation or columns)[-1]


def _scale_and_label(column, wd):
    "What to multiply `column` by, and what to call it then."
    data, _, name = column.partition('_')
    data = {'train': 'training', 'valid': 'validation'}.get(data, data)
    label = f'{data} {name.strip("_").replace("_", " ")}'
    if name in ('accuracy', 'error_rate'):
        return 100, f'{label}, %'
    if wd:
        label += f' + {wd:g}/2 |w|²'
    return 1, label


def _clip_top(ax, values):
    "What explodes far out must not flatten the rest."
    finite = values[np.isfinite(values)]
    if len(finite) and finite.max() > 20 * max(np.median(finite), 1e-12):
        ax.set_ylim(top=5 * np.median(finite))


def _dressed(ax, xlabel, ylabel):
    labelled(ax, xlabel, ylabel).legend(fontsize='small')
    return ax
