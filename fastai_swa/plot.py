"""Figures of fits, and what all figures share. Each function draws one, returns its axes, and leaves
showing and saving to the caller."""

import matplotlib.pyplot as plt
import numpy as np
from fastai.learner import Recorder
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.stats import t

from .fit_history import FitHistory

__all__ = [
    'plot_swa',
    'plot_history',
    'plot_histories',
    'plot_runs',
    'plot_sizes',
    'plot_lengths',
    'plot_differences',
    'axes_or_new',
    'labelled',
    'styles',
]

_WITH_LEGEND = 4.8  # height of axes with a legend below them


def plot_swa(recorder: Recorder, axs=None):
    """Loss and each metric of the last fit with an average over its epochs, for the model in training and
    for its average, or its averages, if there are several; averaged epochs marked.

    - `recorder`: a learner's `Recorder`, or the learner.
    - `axs`: as for `plot_history`.

    It is the last fit with the average 'swa', or where there is none the last one with another. Returns the array of
    axes. Raises `ValueError` if the recorder has seen no epoch of a fit with a `SWACallback`; `SWACallback.plot` draws
    its own average alone.
    """
    recorder = getattr(recorder, 'recorder', recorder)
    kept = {name: value for name, value in vars(recorder).items() if name.endswith('_history')}
    histories = [FitHistory(**value) for value in kept.values() if isinstance(value, dict) and value.get('rows')]
    if not histories:
        raise ValueError(
            'the recorder holds no fit with a SWACallback: there was none, or it was not enabled; the plot() of a '
            'SWACallback draws its own last fit'
        )
    first = next((h for h in histories if h.prefix == 'swa'), histories[-1])
    others = [h for h in histories if h is not first and h.is_of_the_fit_of(first)]
    return plot_histories([first, *others], axs)


def plot_history(history: FitHistory, axs=None):
    """Loss and each metric over the epochs of a fit, for the model in training and for its average;
    averaged epochs marked.

    - `axs`: one axes for the loss and one for each metric; made if `None`.

    Returns the array of axes.
    """
    return plot_histories([history], axs)


def plot_histories(histories: list[FitHistory], axs=None):
    "As `plot_history`, for several averages of one fit, by their names."
    first = histories[0]
    if axs is None:
        n = len(first.columns)
        _, axs = plt.subplots(1, n, figsize=(5.5 * n, 4), layout='constrained', squeeze=False)
    axs = np.ravel(axs)
    for i, (ax, column) in enumerate(zip(axs, first.columns)):
        title = first.measure(column)
        raw = first.beside(column)
        if title == 'valid_loss' and 'train_loss' in first.names:
            ax.plot(first.epochs, first.column('train_loss'), color='0.65', lw=1, ls=':', label='training loss')
        if raw:
            ax.plot(first.epochs, first.column(raw), color='C0', lw=1, marker='.', label='model in training')
        for k, history in enumerate(histories):
            _draw_average(ax, history, history.columns[i], k, is_alone=len(histories) == 1)
        ax.set(xlabel='epoch', ylabel=title.replace('_', ' '))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _set_log_if_steep(ax)
        ax.grid(alpha=0.25)
        ax.legend(fontsize='small')
    return axs


_AVERAGES = 'C3', 'C2', 'C1', 'C4', 'C5'  # their colours


def _draw_average(ax, history: FitHistory, column: str, number: int, is_alone: bool):
    "The values of one of the averages of a fit, and marks at the epochs averaged, in a row of its own."
    color = _AVERAGES[number % len(_AVERAGES)]
    values = history.column(column)
    validated = [i for i, v in enumerate(values) if v == v]  # these only, joined
    at = [history.epochs[i] for i in validated]
    label = 'average' if is_alone else f'average {history.prefix!r}'
    ax.plot(at, [values[i] for i in validated], color=color, lw=2, marker='o', ms=4, label=label)
    mark = dict(color='0.25' if is_alone else color, ms=5, transform=ax.get_xaxis_transform())
    for i, epoch in enumerate(history.averaged):
        label = 'averaged' if i == 0 and number == 0 else None
        ax.plot(epoch, 0.03 + 0.04 * number, '^', label=label, **mark)


def _set_log_if_steep(ax):
    "Or the start of its lines would hide their end."
    drawn = []
    for line in ax.lines:
        if len(line.get_xdata()) > 1:
            drawn += [v for v in line.get_ydata() if v == v]
    if drawn and 0 < 5 * min(drawn) < max(drawn):
        ax.set_yscale('log')
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter('{x:g}')
        ax.yaxis.set_minor_formatter('')


# a run looks the same in every figure, by how its name ends
_RUNS = {
    'SGD 1B': dict(color='0.55', ls='--'),
    'SGD 1.5B': dict(color='0.2', ls=':', lw=1.5),
    'one-cycle 1.5B': dict(color='C2', ls='-.'),
    ' run, single weights': dict(color='C0'),
    ' run, average': dict(color='C3', lw=2.5),
}


def plot_runs(curves: dict, ax=None, ylabel: str = ''):
    """A quantity over the epochs of several runs: the mean over their seeds, with its 95 %
    confidence interval at a few epochs.

    `curves`: name -> epochs (n) and values (seeds, n). Drawn from the back to the front: singles in
    thin lines, the last one, the average, in a thick one. The axis shows what the runs' second
    halves need. Returns the axes.
    """
    ax = axes_or_new(ax, _WITH_LEGEND)
    last = max((epochs[-1] for epochs, _ in curves.values() if len(epochs)), default=0)
    for i, (name, (epochs, values)) in enumerate(curves.items()):
        if len(epochs) == 0:
            continue
        style = dict(lw=1, ms=4, marker='' if len(epochs) > 1 else '.') | _look_of_run(name, i)
        ax.plot(epochs, values.mean(0), label=name, **style)
        every = max(1, last // 6)
        aside = i * every // 5  # the intervals of the runs are not all at the same epochs
        is_shown = (epochs == epochs[-1]) | ((last - epochs + aside) % every == 0)
        _intervals(ax, epochs, values, style, np.flatnonzero(is_shown))
    late = np.concatenate([values[:, epochs > last / 2].mean(0) for epochs, values in curves.values()])
    late = late[np.isfinite(late)]
    if len(late):
        beyond = 0.1 * np.ptp(late) + 1e-9
        ax.set_ylim(late.min() - beyond, late.max() + beyond)
    return _over_counts(ax, 'epochs', ylabel)


def _look_of_run(name: str, number: int) -> dict:
    "Of the run of that `number` in a figure."
    for ending, look in _RUNS.items():
        if name.endswith(ending):
            return look
    return dict(color=f'C{(number + 4) % 10}')


_SIZES = (
    dict(color='0.2', marker='s'),
    dict(color='C0', marker='^'),
    dict(color='C2', marker='o'),
    dict(color='C3', ls='--', lw=2),
)


def plot_sizes(curves: dict, ax=None, ylabel: str = ''):
    """A quantity over the number of models that predict together: the mean over the seeds, with its
    95 % confidence interval.

    `curves`: name -> numbers of models (n) and values (seeds, n); one with a single number is a
    level. Returns the axes.
    """
    most = max(sizes[-1] for sizes, _ in curves.values())
    ax = axes_or_new(ax, _WITH_LEGEND)
    for i, ((name, (sizes, values)), style) in enumerate(zip(curves.items(), _SIZES)):
        if len(sizes) == 1:
            ax.plot([1, most], [values.mean()] * 2, label=name, **style)
            _intervals(ax, np.array([most]), values, style, [0])
            continue
        ax.plot(sizes, values.mean(0), label=name, **{'lw': 1, 'ms': 4} | style)
        _intervals(ax, sizes + 0.04 * i, values, style, range(len(sizes)))
    return _over_counts(ax, 'models', ylabel)


def plot_lengths(curves: dict, ax=None, ylabel: str = ''):
    """A quantity at the end of trainings of several lengths: the mean over the seeds, with its 95 %
    confidence interval.

    `curves`: name -> numbers of epochs (n) and values (seeds, n). Returns the axes.
    """
    ax = axes_or_new(ax, _WITH_LEGEND)
    for i, ((name, (epochs, values)), style) in enumerate(zip(curves.items(), styles(len(curves)))):
        beside = epochs * 1.012 ** (i - (len(curves) - 1) / 2)  # or the intervals would lie on one another
        ax.plot(beside, values.mean(0), label=name, marker='o', ms=4, lw=1.5, **style)
        _intervals(ax, beside, values, style, range(len(epochs)))
    ticks = next(iter(curves.values()))[0]
    ax.set_xscale('log')
    ax.set_xticks(ticks, [str(n) for n in ticks])
    ax.set_xticks([], minor=True)
    return _legend_below(labelled(ax, 'epochs of the whole training', ylabel), ncols=2)


def plot_differences(groups: dict, ax=None, xlabel: str = ''):
    """Differences from a reference, a line of the figure for each: the mean over the seeds, with its 95 % confidence
    interval.

    `groups`: name -> name of a line -> values (seeds). The lines of all groups are the same. Returns the axes.
    """
    ax = axes_or_new(ax, _WITH_LEGEND)
    for i, ((group, rows), style) in enumerate(zip(groups.items(), styles(len(groups)))):
        values = np.stack(list(rows.values()), 1)
        heights = np.arange(len(rows)) + 0.22 * (i - (len(groups) - 1) / 2)  # or the intervals would lie on one another
        half = _halves(values)
        drawn = dict(fmt='os^D'[i % 4], ms=4, color=style['color'], elinewidth=1.2, capsize=2.5)
        ax.errorbar(values.mean(0), heights, xerr=half, label=group, **drawn)
    ax.axvline(0, color='0.4', lw=1)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.invert_yaxis()
    ax.xaxis.set_major_locator(MaxNLocator(5))
    return _legend_below(labelled(ax, xlabel, ''))


def _intervals(ax, x, values, style, at):
    "95 % confidence intervals of the mean, by Student's t, at the points `at`; none for one seed."
    half = _halves(values)
    if half is None:
        return
    at = list(at)
    ax.errorbar(x[at], values.mean(0)[at], half[at], fmt='none', ecolor=style['color'], elinewidth=1.2, capsize=2.5)


def _halves(values):
    "Half the widths of the 95 % confidence intervals of the means of `values` (seeds, n); `None` for one seed."
    n = len(values)
    if n < 2:
        return None
    return t.ppf(0.975, n - 1) * values.std(0, ddof=1) / n**0.5


def _over_counts(ax, xlabel, ylabel):
    "Ticks at whole numbers alone."
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _legend_below(labelled(ax, xlabel, ylabel))


def _legend_below(ax, ncols=3):
    "Off the data."
    ax.legend(fontsize='small', loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=ncols, frameon=False)
    return ax


# what all figures share


def axes_or_new(ax, height: float = 4.2):
    "`ax`, or new axes of that height where it is `None`."
    if ax is None:
        _, ax = plt.subplots(figsize=(6, height), layout='constrained')
    return ax


def labelled(ax, xlabel: str, ylabel: str):
    "`ax`, with these labels and a grid."
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.25)
    return ax


_COLOURS = 'C0', 'C3', 'C2', '0.3', 'C4', 'C1', 'C5'
_STROKES = '-', '--', '-.', ':', (0, (5, 1, 1, 1)), (0, (1, 1))


def styles(n: int) -> list[dict]:
    "Of `n` lines: told apart without colour, too."
    return [dict(color=_COLOURS[i % len(_COLOURS)], ls=_STROKES[i % len(_STROKES)]) for i in range(n)]


Recorder.plot_swa = plot_swa
