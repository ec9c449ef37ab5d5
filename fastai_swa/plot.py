"""Figures. Each function draws one, returns its axes, and leaves showing and saving to the caller."""
import matplotlib.pyplot as plt
import numpy as np
from fastai.learner import Recorder
from matplotlib.ticker import LogLocator, MaxNLocator

__all__ = ['plot_swa', 'plot_runs', 'plot_sizes']


def plot_swa(recorder: Recorder, axs=None):
    """Loss and each metric of the last fit over its epochs, for the model in training and for its average; folded epochs marked.

    - `recorder`: a learner's `Recorder`, or the learner.
    - `axs`: one axes for the loss and one for each metric; made if `None`.

    Returns the array of axes. Raises `ValueError` if the recorder holds no fit with a `SWACallback`; fastai's own `validate` and
    `tta` clear it, as every new fit does.
    """
    recorder = getattr(recorder, 'recorder', recorder)
    names = list(getattr(recorder, 'metric_names', []))[1:]
    swa = [name for name in names if name.startswith('swa_')]
    if 'swa_valid_loss' not in swa:
        raise ValueError('the recorder holds no fit with a SWACallback: there was none, it was not enabled, or validate, tta or '
                         'another fit has cleared the recorder since; plot right after the fit')
    raws = [_raw_column(name, names) for name in swa]
    if axs is None: _, axs = plt.subplots(1, len(swa), figsize=(5.5*len(swa), 4), layout='constrained', squeeze=False)
    axs = np.ravel(axs)
    epochs = range(len(recorder.values))
    def column(name): return [row[names.index(name)] if len(row) > names.index(name) else float('nan') for row in recorder.values]
    for ax, avg, raw in zip(axs, swa, raws):
        title = avg.removeprefix('swa_')
        if title == 'valid_loss' and 'train_loss' in names:
            ax.plot(epochs, column('train_loss'), color='0.65', lw=1, ls=':', label='training loss')
        if raw: ax.plot(epochs, column(raw), color='C0', lw=1, marker='.', label='model in training')
        points = [(e, v) for e, v in zip(epochs, column(avg)) if v == v]    # validated epochs only, joined
        ax.plot(*zip(*points) if points else ([], []), color='C3', lw=2, marker='o', ms=4, label='average')
        for i, e in enumerate(recorder.swa_epochs):
            ax.plot(e, .03, '^', color='0.25', ms=5, transform=ax.get_xaxis_transform(),
                    label='folded into the average' if i == 0 else None)
        ax.set(xlabel='epoch', ylabel=title.replace('_', ' '))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawn = [v for line in ax.lines if len(line.get_xdata()) > 1 for v in line.get_ydata() if v == v]
        if drawn and 0 < 5*min(drawn) < max(drawn):    # else the start hides the end
            ax.set_yscale('log')
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter('{x:g}')
            ax.yaxis.set_minor_formatter('')
        ax.grid(alpha=.25)
        ax.legend(fontsize='small')
    return axs


def _raw_column(name, names):
    "The column of the model in training beside `name`, if the Recorder keeps it."
    name = name.removeprefix('swa_')
    return next((c for c in (name, f'valid_{name}') if c in names), None)


def plot_runs(curves: dict, ax=None, ylabel: str = ''):
    """A quantity over the epochs of several runs: the mean over their seeds, in a band from the least to the greatest.

    `curves`: name -> epochs (n) and values (seeds, n). Drawn from the back to the front: singles in thin lines, the last one, the average, in
    a thick one. The axis shows what the runs' second halves need. Returns the axes.
    """
    styles = dict(color='0.55', ls='--'), dict(color='0.2', ls=':'), dict(color='C0'), dict(color='C3', lw=2.5)
    ax = _bands(curves, styles[-len(curves):], ax, lambda values: (values.min(0), values.max(0)))
    last = max((epochs[-1] for epochs, _ in curves.values() if len(epochs)), default=0)
    late = np.concatenate([values[:, epochs > last / 2].ravel() for epochs, values in curves.values()])
    late = late[np.isfinite(late)]
    if len(late): ax.set_ylim(late.min() - .05 * np.ptp(late) - 1e-9, late.max() + .05 * np.ptp(late) + 1e-9)
    return _labelled(ax, 'epochs', ylabel)


def plot_sizes(curves: dict, ax=None, ylabel: str = ''):
    """A quantity over the number of models that predict together: the mean over the seeds, in a band of its standard error.

    `curves`: name -> numbers of models (n) and values (seeds, n); one with a single number is a level. Returns the axes.
    """
    styles = dict(color='0.2', marker='s'), dict(color='C0', marker='^'), dict(color='C2', marker='o'), dict(color='C3', ls='--', lw=2)
    most = max(sizes[-1] for sizes, _ in curves.values())
    levels = {name: (np.array([1, most]), values.repeat(2, 1)) if len(sizes) == 1 else (sizes, values) for name, (sizes, values) in curves.items()}
    def error(values): return values.mean(0) + np.array([[-1], [1]]) * values.std(0, ddof=1) / len(values)**.5
    return _labelled(_bands(levels, styles[-len(curves):], ax, error), 'models', ylabel)


def _bands(curves, styles, ax, limits):
    if ax is None: _, ax = plt.subplots(figsize=(6, 4.2), layout='constrained')
    for (name, (x, values)), style in zip(curves.items(), styles, strict=True):
        if len(x) == 0: continue
        ax.plot(x, values.mean(0), label=name, **{'lw': 1, 'ms': 4, 'marker': '.' * (len(x) < 2)} | style)
        if len(values) > 1: ax.fill_between(x, *limits(values), color=style['color'], alpha=.2, lw=0)
    return ax


def _labelled(ax, xlabel, ylabel):
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=.25)
    ax.legend(fontsize='small')
    return ax


Recorder.plot_swa = plot_swa
