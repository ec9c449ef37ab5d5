"""Figures of the loss surface. Each function draws one, returns its axes, and leaves showing and saving to
the caller."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import BoundaryNorm
from matplotlib.patheffects import withStroke

from ..checks import check_share
from ..plot import _axes, _labelled_only, _styles
from .surfaces import Plane, Profile, Rays, Surface

__all__ = ['plot_width', 'plot_line', 'plot_paths', 'plot_plane', 'plot_planes']


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
    ax = _axes(ax)
    widths = {} if level is None else rays.widths(column, level, wd)
    for (name, values), style in zip(rays.profiles(column, wd).items(), _styles(len(rays.names))):
        ax.plot(rays.distances, scale * values.T, color=style['color'], ls=style['ls'], lw=0.6, alpha=0.5)
        w = widths.get(name)
        is_crossed = w is not None and w.n_crossed == len(w.distances)
        said = (
            ''
            if w is None
            else f': {w.distance:.3g} +- {w.std:.2g}'
            if is_crossed
            else f': {w.n_crossed} of {len(w.distances)} rays reach it'
        )
        ax.plot(rays.distances, scale * values.mean(0), lw=2.2, label=name + said, **style)
        if is_crossed:
            ax.errorbar(
                w.distance, scale * level, xerr=w.std, color=style['color'], capsize=4, lw=1.5, marker='o', ms=5
            )
    if level is not None:
        seen = ax.get_ylim()
        ax.axhline(scale * level, color='0.4', lw=0.8, ls=':')
        ax.set_ylim(seen)  # a level far off must not flatten the rest
    _clip_top(ax, scale * np.concatenate([v.mean(0) for v in rays.profiles(column, wd).values()]))
    return _dressed(ax, 'distance in weight space, Euclidean', label)


def plot_line(profile: Profile, columns=None, ax=None, wd: float = 0.0):
    """Two columns along a line through two solutions, which are marked (Izmailov et al. 2018, Fig.
    5).

    `columns`: one on the left axis, another on the right; default: the training loss and the last
    metric of the validation set. `wd` (see `Surface.column`) is added to losses. Returns the array
    of axes. Raises `ValueError` for a column that there is not.
    """
    _check_kind('plot_line', profile, Profile)
    ax = _axes(ax)
    columns = (columns,) if isinstance(columns, str) else columns
    if columns is None:
        columns = list(dict.fromkeys(c for c in ('train_loss', _main_column(profile)) if c in profile.values))
    axs = [ax, *(ax.twinx() for _ in columns[1:])]
    for side, column, style in zip(axs, columns, _styles(len(columns))):
        decay = wd if column.endswith('_loss') else 0.0
        scale, label = _scale_and_label(column, decay)
        side.plot(profile.arc, scale * profile.column(column, decay), lw=2, label=label, **style)
        side.set_ylabel(label, color=style['color'])
        _clip_top(side, scale * profile.column(column, decay))
    # the names outside of the stretch between them
    for at, name, side in zip((0, profile.length), profile.names, (-1, 1)):
        ax.axvline(at, color='0.5', lw=0.8, ls='--')
        ax.annotate(
            name,
            (at, 0.5),
            xycoords=('data', 'axes fraction'),
            xytext=(4 * side, 0),
            textcoords='offset points',
            rotation=90,
            ha='right' if side < 0 else 'left',
            va='center',
            fontsize='small',
        )
    ax.set_xlabel(f'distance from {profile.names[0]} in weight space, Euclidean')
    ax.grid(alpha=0.25)
    lines = [side.lines[0] for side in axs]
    if len(lines) > 1:
        ax.legend(lines, [line.get_label() for line in lines], fontsize='small')
    return np.array(axs)


def plot_paths(profiles: dict, column: str | None = None, ax=None, wd: float = 0.0):
    """`column` along several ways between two solutions, such as the straight line, a chain and a
    curve, over the share of the way done.

    `profiles`: name -> `Profile`. Returns the axes. Raises `ValueError` for a column that there is
    not (Garipov et al. 2018, Fig. 2).
    """
    _check_kind('plot_paths', profiles, Profile, several=True)
    ax = _axes(ax)
    column = column or _main_column(next(iter(profiles.values())))
    scale, label = _scale_and_label(column, wd)
    for (name, p), style in zip(profiles.items(), _styles(len(profiles))):
        ax.plot(p.arc / p.length, scale * p.column(column, wd), lw=2, label=f'{name}, {p.length:.3g} long', **style)
    ends = next(iter(profiles.values())).names
    return _dressed(ax, f'share of the way from {ends[0]} to {ends[1]}', label)


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
    grids = [
        np.ma.array(scale * p.grid(column, wd), mask=~p.is_measured.reshape(len(p.ys), len(p.xs)))
        for p in planes.values()
    ]
    finite = np.concatenate([g.compressed() for g in grids])
    finite = finite[np.isfinite(finite)]
    if not len(finite):
        raise ValueError('no point of the plane is measured, or none is finite')
    sign = 1 if any(word in column for word in _LESS_IS_BETTER) else -1
    best, worst = (sign * finite).min(), (sign * finite).max() if top is None else sign * scale * top
    if top is not None and worst <= best:
        raise ValueError(f'top must be worse than the best value, {sign * best / scale:.4g}, not {top!r}')
    spread = max(worst - best, 1e-6 * max(1, abs(best)))  # a plane may be flat
    levels = np.sort(sign * (best + spread * np.concatenate([[0], np.geomspace(0.01, 1, 9)])))
    beyond, colours = ('max', 'viridis_r') if sign > 0 else ('min', 'viridis')
    norm = BoundaryNorm(levels, 256, extend=beyond)
    for (title, p), grid, ax in zip(planes.items(), grids, axs):
        # it diverged: beyond all levels
        shown = np.ma.where(np.isfinite(grid.filled(0)), grid, sign * (2 * abs(worst) + 1))
        filled = ax.contourf(p.xs, p.ys, shown, levels, cmap=colours, norm=norm, extend=beyond)
        ax.contour(p.xs, p.ys, shown, levels, colors='0.25', linewidths=0.4)
        _draw_points(ax, p)
        is_flat = not 0.4 < np.ptp(p.xs) / np.ptp(p.ys) < 2.5  # it would be a strip
        distance = 'distance in weight space, Euclidean'
        ax.set(
            xlabel=distance + ' (axes not to scale)' * bool(is_flat),
            ylabel=distance,
            title=title,
            aspect='auto' if is_flat else 'equal',
        )
    bar = axs[0].figure.colorbar(filled, ax=list(axs), label=label, ticks=levels, spacing='uniform')
    bar.ax.set_yticklabels(_told_apart(levels))
    return axs


# of other metrics more is, as fastai has it
_LESS_IS_BETTER = 'loss', 'error', 'norm', 'mse', 'mae', 'msle', 'rmspe', 'perplexity', 'hamming'


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
        put(x, y, name + f', {off:.2g} off' * bool(off > 1e-3 * np.ptp(plane.xs)), marker='*', ms=12)


def _check_kind(call, given, kind, several=False):
    surfaces = given.values() if several and isinstance(given, dict) else [given]
    if several and not isinstance(given, dict) or not all(isinstance(s, kind) for s in surfaces):
        what = f'a dict of {kind.__name__} objects by name' if several else f'a {kind.__name__}'
        raise TypeError(
            f'{call} draws {what}, as rays, line, plane and Curve.evaluate measure them, not {type(given).__name__}'
        )


def _main_column(surface: Surface):
    """The last metric of the validation set, or the loss if there is none, or what there is of the
    training set.
    """
    columns = [c for c in surface.about['columns'] if c != 'norm']
    return next((c for c in reversed(columns) if c.startswith('valid_')), columns[-1])


def _scale_and_label(column, wd):
    "What to multiply `column` by, and what to call it then."
    data, _, name = column.partition('_')
    label = f'{ {"train": "training", "valid": "validation"}.get(data, data) } {name.strip("_").replace("_", " ")}'
    if name in ('accuracy', 'error_rate'):
        return 100, f'{label}, %'
    return 1, label + f' + {wd:g}/2 |w|²' * bool(wd)


def _clip_top(ax, values):
    "What explodes far out must not flatten the rest."
    finite = values[np.isfinite(values)]
    if len(finite) and finite.max() > 20 * max(np.median(finite), 1e-12):
        ax.set_ylim(top=5 * np.median(finite))


def _dressed(ax, xlabel, ylabel):
    _labelled_only(ax, xlabel, ylabel).legend(fontsize='small')
    return ax
