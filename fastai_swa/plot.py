"""Figures. Each function draws one, returns its axes, and leaves showing and saving to the caller."""

import matplotlib.pyplot as plt
import numpy as np
from fastai.learner import Recorder
from matplotlib.colors import BoundaryNorm
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.stats import t

from .checks import check_share
from .surfaces import Plane, Profile, Rays, Surface

__all__ = [
    'plot_swa',
    'plot_runs',
    'plot_sizes',
    'plot_lengths',
    'plot_width',
    'plot_line',
    'plot_plane',
    'plot_planes',
    'plot_paths',
]


def plot_swa(recorder: Recorder, axs=None):
    """Loss and each metric of the last fit over its epochs, for the model in training and for its
    average; averaged epochs marked.

    - `recorder`: a learner's `Recorder`, or the learner.
    - `axs`: one axes for the loss and one for each metric; made if `None`.

    Returns the array of axes. Raises `ValueError` if the recorder holds no fit with a
    `SWACallback`; fastai's own `validate` and `tta` clear it, as every new fit does.
    """
    recorder = getattr(recorder, 'recorder', recorder)
    names = list(getattr(recorder, 'metric_names', []))[1:]
    swa = [name for name in names if name.startswith('swa_')]
    if 'swa_valid_loss' not in swa:
        raise ValueError(
            'the recorder holds no fit with a SWACallback: there was none, it was not enabled, or validate, tta or '
            'another fit has cleared the recorder since; plot right after the fit'
        )
    raws = [_raw_column(name, names) for name in swa]
    if axs is None:
        _, axs = plt.subplots(1, len(swa), figsize=(5.5 * len(swa), 4), layout='constrained', squeeze=False)
    axs = np.ravel(axs)
    epochs = range(len(recorder.values))

    def column(name):
        return [row[names.index(name)] if len(row) > names.index(name) else float('nan') for row in recorder.values]

    for ax, avg, raw in zip(axs, swa, raws):
        title = avg.removeprefix('swa_')
        if title == 'valid_loss' and 'train_loss' in names:
            ax.plot(epochs, column('train_loss'), color='0.65', lw=1, ls=':', label='training loss')
        if raw:
            ax.plot(epochs, column(raw), color='C0', lw=1, marker='.', label='model in training')
        points = [(e, v) for e, v in zip(epochs, column(avg)) if v == v]  # validated epochs only, joined
        ax.plot(*zip(*points) if points else ([], []), color='C3', lw=2, marker='o', ms=4, label='average')
        for i, e in enumerate(recorder.swa_epochs):
            ax.plot(
                e,
                0.03,
                '^',
                color='0.25',
                ms=5,
                transform=ax.get_xaxis_transform(),
                label='averaged' if i == 0 else None,
            )
        ax.set(xlabel='epoch', ylabel=title.replace('_', ' '))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn = [v for line in ax.lines if len(line.get_xdata()) > 1 for v in line.get_ydata() if v == v]
        if drawn and 0 < 5 * min(drawn) < max(drawn):  # else the start hides the end
            ax.set_yscale('log')
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter('{x:g}')
            ax.yaxis.set_minor_formatter('')
        ax.grid(alpha=0.25)
        ax.legend(fontsize='small')
    return axs


def _raw_column(name, names):
    "The column of the model in training beside `name`, if the Recorder keeps it."
    name = name.removeprefix('swa_')
    return next((c for c in (name, f'valid_{name}') if c in names), None)


def plot_runs(curves: dict, ax=None, ylabel: str = ''):
    """A quantity over the epochs of several runs: the mean over their seeds, with its 95 %
    confidence interval at a few epochs.

    `curves`: name -> epochs (n) and values (seeds, n). Drawn from the back to the front: singles in
    thin lines, the last one, the average, in a thick one. The axis shows what the runs' second
    halves need. Returns the axes.
    """
    ax = _axes(ax, height=4.8)  # with the legend below
    last = max((epochs[-1] for epochs, _ in curves.values() if len(epochs)), default=0)
    for i, (name, (epochs, values)) in enumerate(curves.items()):
        if len(epochs) == 0:
            continue
        style = {'lw': 1, 'ms': 4, 'marker': '.' * (len(epochs) < 2)} | _RUNS.get(name, dict(color='C4'))
        ax.plot(epochs, values.mean(0), label=name, **style)
        every = max(1, last // 6)
        is_shown = (epochs == epochs[-1]) | (
            (last - epochs + i * every // 5) % every == 0
        )  # not all at the same epochs
        _intervals(ax, epochs, values, style, np.flatnonzero(is_shown))
    late = np.concatenate([values[:, epochs > last / 2].mean(0) for epochs, values in curves.values()])
    late = late[np.isfinite(late)]
    if len(late):
        ax.set_ylim(late.min() - 0.1 * np.ptp(late) - 1e-9, late.max() + 0.1 * np.ptp(late) + 1e-9)
    return _labelled(ax, 'epochs', ylabel)


# a run looks the same in every figure
_RUNS = {
    'SGD 1B': dict(color='0.55', ls='--'),
    'SGD 1.5B': dict(color='0.2', ls=':', lw=1.5),
    'one-cycle 1.5B': dict(color='C2', ls='-.'),
    'SWA run, single weights': dict(color='C0'),
    'SWA run, average': dict(color='C3', lw=2.5),
}


def plot_sizes(curves: dict, ax=None, ylabel: str = ''):
    """A quantity over the number of models that predict together: the mean over the seeds, with its
    95 % confidence interval.

    `curves`: name -> numbers of models (n) and values (seeds, n); one with a single number is a
    level. Returns the axes.
    """
    styles = (
        dict(color='0.2', marker='s'),
        dict(color='C0', marker='^'),
        dict(color='C2', marker='o'),
        dict(color='C3', ls='--', lw=2),
    )
    most = max(sizes[-1] for sizes, _ in curves.values())
    ax = _axes(ax, height=4.8)  # with the legend below
    for i, ((name, (sizes, values)), style) in enumerate(zip(curves.items(), styles)):
        if len(sizes) == 1:
            ax.plot([1, most], [values.mean()] * 2, label=name, **style)
            _intervals(ax, np.array([most]), values, style, [0])
            continue
        ax.plot(sizes, values.mean(0), label=name, **{'lw': 1, 'ms': 4} | style)
        _intervals(ax, sizes + 0.04 * i, values, style, range(len(sizes)))
    return _labelled(ax, 'models', ylabel)


def plot_lengths(curves: dict, ax=None, ylabel: str = ''):
    """A quantity at the end of trainings of several lengths: the mean over the seeds, with its 95 %
    confidence interval.

    `curves`: name -> numbers of epochs (n) and values (seeds, n). Returns the axes.
    """
    ax = _axes(ax, height=4.8)  # with the legend below
    for i, ((name, (epochs, values)), style) in enumerate(zip(curves.items(), _styles(len(curves)))):
        beside = epochs * 1.012 ** (i - (len(curves) - 1) / 2)  # or the intervals would lie on one another
        ax.plot(beside, values.mean(0), label=name, marker='o', ms=4, lw=1.5, **style)
        _intervals(ax, beside, values, style, range(len(epochs)))
    ticks = next(iter(curves.values()))[0]
    ax.set_xscale('log')
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.set_xticks([], minor=True)
    return _legend_below(_labelled_only(ax, 'epochs of the whole training', ylabel))


def _axes(ax, height=4.2):
    if ax is None:
        _, ax = plt.subplots(figsize=(6, height), layout='constrained')
    return ax


def _intervals(ax, x, values, style, at):
    "95 % confidence intervals of the mean, by Student's t, at the points `at`; none for one seed."
    n = len(values)
    if n < 2:
        return
    at = list(at)
    half = t.ppf(0.975, n - 1) * values.std(0, ddof=1) / n**0.5
    ax.errorbar(x[at], values.mean(0)[at], half[at], fmt='none', ecolor=style['color'], elinewidth=1.2, capsize=2.5)


def _labelled(ax, xlabel, ylabel):
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _legend_below(_labelled_only(ax, xlabel, ylabel))


def _labelled_only(ax, xlabel, ylabel):
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.25)
    return ax


def _legend_below(ax):
    "Off the data."
    ax.legend(fontsize='small', loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    return ax


# the loss surface


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


def _styles(n):
    "Told apart without colour, too."
    colours, strokes = (
        ('C0', 'C3', 'C2', '0.3', 'C4', 'C1', 'C5'),
        ('-', '--', '-.', ':', (0, (5, 1, 1, 1)), (0, (1, 1))),
    )
    return [dict(color=colours[i % len(colours)], ls=strokes[i % len(strokes)]) for i in range(n)]


def _clip_top(ax, values):
    "What explodes far out must not flatten the rest."
    finite = values[np.isfinite(values)]
    if len(finite) and finite.max() > 20 * max(np.median(finite), 1e-12):
        ax.set_ylim(top=5 * np.median(finite))


def _dressed(ax, xlabel, ylabel):
    _labelled_only(ax, xlabel, ylabel).legend(fontsize='small')
    return ax


Recorder.plot_swa = plot_swa
