"""Which average of a fit is the best? Candidates, their values on held-out samples, and whether one
beats the last weights by more than chance."""

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import AvgMetric
from fastai.torch_core import find_bs
from matplotlib.ticker import MaxNLocator

from .batches import KeptBatches, Taken, fresh_loader, has_validation_set
from .checks import check_known
from .columns import less_is_better, validated_columns
from .passes import kept_batches, validate_aside
from .plot import labelled
from .weightings import called, place_in_epochs, weighting

__all__ = ['STARTS', 'candidates', 'choose', 'Scores', 'gain', 'plot_choice', 'seconds_to_choose', 'remark_on_choice']

STARTS = 0.0, 0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95  # of windows, as shares of the fit
_ENDS = 0.5, 0.75, 0.9, 1.0
_N_SINGLE = 12  # single stretches at most
_HORIZONS = 0.02, 0.05, 0.1, 0.25  # of EMAs: their mean age, as a share of the fit
_WIDTHS = 0.05, 0.1, 0.15, 0.25  # of power EMAs
_FEWEST_BATCHES = 10  # from which a standard error over batches is taken


# candidates


class Candidate(NamedTuple):
    "An average to compare."

    kind: str  # 'last', 'refreshed' (the last weights, their batch norm refreshed), 'single', 'window', 'ema', 'power'
    which: dict  # its keywords; {}: the last weights
    points: float  # how many it is the mean of; where they weigh differently, 1 / sum of the squared weights


def candidates(ends, epochs: list, every: int, with_ends: bool = True) -> list[Candidate]:
    """At most 60 averages to compare; the first is the last weights.

    Windows begin and end where segments do, so that they are exact: a grid of starts and ends, finer towards the end
    of the fit, and single segments; EMAs and power EMAs of several lengths. The last point alone is the control of
    models with batch norm, which is refreshed for all candidates but the first.

    - `ends`: of each segment, the number of points up to its end; `epochs`: pairs of an epoch's number and the points
      up to its end; `every`: optimizer steps from one point to the next. `with_ends`: also windows that end before
      the fit does?
    """
    n_points = int(ends[-1])
    borders = np.concatenate([[0], ends])

    def nearest(share):
        return int(borders[np.abs(borders - share * n_points).argmin()])

    windows = {}  # first point, first one after it -> kind; each once
    for i in _spread(len(ends), _N_SINGLE):
        windows[int(borders[i]), int(borders[i + 1])] = 'single'
    for end in _ENDS if with_ends else _ENDS[-1:]:
        for start in STARTS:
            first, after = nearest(start), nearest(end)
            if first < after:
                windows.setdefault((first, after), 'window')
    res = [Candidate('last', {}, 1)]
    if (n_points - 1, n_points) in windows:
        windows[n_points - 1, n_points] = 'refreshed'
    for (first, after), kind in windows.items():
        pair = place_in_epochs(first, epochs), place_in_epochs(after, epochs)
        res.append(Candidate(kind, {'epochs': pair}, after - first))
    n_steps = n_points * every
    others = [('ema', 1 - 1 / (h * n_steps)) for h in _HORIZONS if h * n_steps > 1]
    others += [('power', width) for width in _WIDTHS]
    for kind, value in others:
        weights = weighting({kind: value}, n_points, epochs, every)
        res.append(Candidate(kind, {kind: value}, float(1 / (weights**2).sum())))
    return res


def _spread(n: int, most: int) -> list[int]:
    "At most so many of the numbers 0 to n - 1, evenly, the last among them."
    return sorted({n - 1 - round(i * (n - 1) / max(1, most - 1)) for i in range(min(n, most))})


# values


@dataclass
class Scores:
    "What an average has on the samples to choose on."

    values: dict  # column -> loss or metric
    parts: dict = field(default_factory=dict)  # column -> of each sample, or batch: its value
    weights: dict = field(default_factory=dict)  # column -> what each of these counts


def gain(scores: Scores, last: Scores, column: str, less_is_better: bool) -> tuple[float, float]:
    """By how much `scores` are better than those of the last weights, and the standard error of that, paired: the same
    samples, or batches, are compared. The latter is `nan` where the column has no parts, or too few.
    """
    sign = -1 if less_is_better else 1
    better = sign * (scores.values[column] - last.values[column])
    ours, theirs = scores.parts.get(column), last.parts.get(column)
    if ours is None or theirs is None or len(ours) != len(theirs) or len(ours) < 2:
        return better, math.nan
    weights = np.asarray(scores.weights[column], float)
    weights = weights / weights.sum()
    differences = sign * (np.asarray(ours) - np.asarray(theirs))
    n = len(differences)
    deviations = differences - weights @ differences
    return better, float(np.sqrt(n / (n - 1) * (weights**2) @ deviations**2))


class _Parts(Callback):
    "Takes the loss of each sample, and the metrics of each batch, that are means over samples."

    def __init__(self, learn):
        self.losses = []  # of each batch: a loss for each sample; `None` once that cannot be had
        self.batch_losses = []
        self.sizes = []
        self.metrics = {m.name: (m.func, []) for m in learn.metrics if type(m) is AvgMetric}

    def after_batch(self):
        if not len(self.yb):
            return
        n = find_bs(self.yb)
        self.sizes.append(n)
        self.batch_losses.append(float(self.learn.loss))
        if self.losses is not None:
            losses = _sample_losses(self.learn, n)
            if losses is None:
                self.losses = None
            else:
                self.losses.append(losses)
        pred, yb = self.learn.to_detach((self.learn.pred, self.learn.yb), cpu=False)
        for name in list(self.metrics):
            func, values = self.metrics[name]
            try:
                values.append(float(func(pred, *yb)))
            except Exception:  # the metric itself has raised, or will
                del self.metrics[name]

    def scores(self, values: dict) -> Scores:
        res = Scores(values)
        enough = len(self.sizes) >= _FEWEST_BATCHES
        if self.losses:
            res.parts['valid_loss'] = np.concatenate(self.losses)
            res.weights['valid_loss'] = np.ones(len(res.parts['valid_loss']))
        elif enough:
            res.parts['valid_loss'] = np.array(self.batch_losses)
            res.weights['valid_loss'] = self.sizes
        for name, (_, parts) in self.metrics.items():
            if enough and name in values:
                res.parts[name] = np.array(parts)
                res.weights[name] = self.sizes
        return res


def _sample_losses(learn, n: int):
    "The loss of each of `n` samples of the batch; `None` where the loss cannot say it, or their mean is not the loss."
    with suppress(Exception), learn.loss_not_reduced():
        losses = learn.loss_func(learn.pred, *learn.yb).detach().double()
        losses = losses.reshape(n, -1).mean(1).cpu().numpy()
        if math.isclose(losses.mean(), float(learn.loss), rel_tol=1e-3, abs_tol=1e-6):
            return losses
    return None


# choosing


def choose(
    learn, found: list[Candidate], lent: Callable, by: str, dl, bn_batches, comp, taken: Taken, validated: Taken
) -> tuple[pd.DataFrame, dict, str]:
    """The table of all averages in `found`, of which the first is the last weights; the best of them; and a sentence
    that says so.

    - `lent(which, dl)`: a context in which the learner's model has that average, its batch norm refreshed on `dl`.
    - `taken`, `validated`: what the epochs of the fit took of the training and of the validation set.
    - The others are as for `WeightHistory.choose`.
    """
    columns = validated_columns(learn)
    check_known('by', by, columns)
    is_less = less_is_better(by, comp)
    if dl is None and not has_validation_set(learn):
        raise ValueError('there is no validation set to choose on: pass dl=, a loader of held-out samples')
    if dl is None:
        validation = kept_batches(learn, train=False, taken=validated)
    else:
        validation = KeptBatches(lambda: fresh_loader(dl))
    training = kept_batches(learn, bn_batches, taken=taken)
    scores = []
    for candidate in _shown(found, learn):
        with learn.no_bar(), lent(candidate.which, training):
            parts = _Parts(learn)
            values = validate_aside(learn, validation, in_fit=False, also=parts)
            scores.append(parts.scores(dict(zip(columns, values))))
    gains = [gain(s, scores[0], by, is_less) for s in scores]
    best = _best(gains) if math.isfinite(scores[0].values[by]) else _first_of_all(scores, by, is_less)
    where = f'the {sum(parts.sizes)} samples of {"the validation set" if dl is None else "dl"}'
    table = _table(found, scores, gains, columns).iloc[_order(scores, by, is_less)]
    table.columns.name = f'on {where}'
    table.attrs['by'] = by
    table.attrs['less_is_better'] = is_less
    return table, found[best].which, _sentence(found, scores, gains, best, by, where)


def _best(gains) -> int:
    """The number of the best average: the one that gains most, or 0, the last weights, where that is no more than two
    standard errors.
    """
    finite = [g if g == g else -math.inf for g, _ in gains]
    best = int(np.argmax(finite))
    most, error = gains[best]
    return best if most > 2 * (0.0 if error != error else error) else 0


def _order(scores, by, less_is_better) -> np.ndarray:
    "The numbers of the averages, the best first, those without a value last."
    sign = 1 if less_is_better else -1
    return np.argsort([sign * s.values[by] for s in scores], kind='stable')  # sorts nan to the end


def _first_of_all(scores, by, less_is_better) -> int:
    "The best where the last weights have no value; these where none has."
    best = int(_order(scores, by, less_is_better)[0])
    return best if math.isfinite(scores[best].values[by]) else 0


def _shown(found, learn):
    "The averages one by one, with the time left on the line below, unless the learner shows no progress."
    is_shown = any(isinstance(cb, ProgressCallback) for cb in learn.cbs)
    began = time.perf_counter()
    for i, candidate in enumerate(found):
        if is_shown:
            left = (time.perf_counter() - began) / i * (len(found) - i) if i else math.nan
            print(f'\r{i + 1} of {len(found)}: {called(candidate.which)}, {left:.0f} s left'.ljust(79), end='')
        yield candidate
    if is_shown:
        print('\r' + ' ' * 79 + '\r', end='')


def _table(found, scores, gains, columns) -> pd.DataFrame:
    rows = []
    for c, s, (better, error) in zip(found, scores, gains):
        values = {name: s.values[name] for name in columns}
        row = {'average': called(c.which), 'kind': c.kind, **values}
        rows.append(row | {'gain': better, 'std_error': error, 'points': c.points})
    table = pd.DataFrame(rows)
    table.attrs['epochs'] = [list(c.which.get('epochs', ())) for c in found]  # of each window, by the row's label
    return table


def _sentence(found, scores, gains, best, by, where) -> str:
    last = scores[0].values[by]
    if not best:
        most = max((g for g, _ in gains if g == g), default=0.0)
        return (
            f'No average beats the last weights ({by} {last:.4f}) by more than chance: the best gains {most:.4f}. '
            f'Chosen: the last weights, by {where}.'
        )
    better, error = gains[best]
    chance = f' +- {2 * error:.4f}' if error == error else ', without a measure of chance'
    name = called(found[best].which)
    if found[best].kind == 'refreshed':
        name += ', which are the last weights, their batch norm refreshed'
    elif found[best].points == 1:
        name += ', which is one step, its batch norm refreshed'
    alone = [g for c, (g, _) in zip(found, gains) if c.kind == 'refreshed' and c is not found[best]]
    of_it = f'; refreshed batch norm alone: {alone[0]:.4f}' if alone else ''
    return (
        f'Chosen: {name}, {by} {scores[best].values[by]:.4f} against {last:.4f} of the last '
        f'weights (better by {better:.4f}{chance}{of_it}), on {where}, which therefore flatter it.'
    )


# what is said after a fit, before anything is compared


def seconds_to_choose(n_averages: int, validation: float, training_batch: float, bn_batches: int) -> float:
    """About how long `choose` takes, in seconds, by how long the fit took for a `validation` and for a
    `training_batch`, of which the forward pass is about a third.
    """
    return n_averages * (validation + bn_batches * training_batch / 3)


def remark_on_choice(n_averages: int, seconds: float, call: str) -> str:
    "`call`: how users write the history."
    return f'WeightHistory: {n_averages} averages of this fit can be compared: `{call}.choose()`, {_about(seconds)}'


def _about(seconds: float) -> str:
    if seconds < 1:
        return 'in about a second'
    if seconds < 100:
        return f'in about {seconds:.0f} s'
    return f'in about {seconds / 60:.0f} min'


# the figure


def plot_choice(table: pd.DataFrame, axs=None):
    "See `WeightHistory.plot`."
    by = table.attrs['by']
    best_of = np.min if table.attrs['less_is_better'] else np.max
    if axs is None:
        _, axs = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    windows = table[table['kind'].isin(['refreshed', 'single', 'window'])]
    starts, ends = np.array([table.attrs['epochs'][number] for number in windows.index]).T
    values = windows[by].to_numpy()
    # early windows are far worse than all others: they shall not use up the colours
    lowest, highest = np.nanpercentile(values, [0, 90] if table.attrs['less_is_better'] else [10, 100])
    shown = axs[0].scatter(starts, ends, c=values, s=60, cmap='viridis', vmin=lowest, vmax=highest)
    extend = 'max' if table.attrs['less_is_better'] else 'min'
    axs[0].figure.colorbar(shown, ax=axs[0], label=by.replace('_', ' '), extend=extend)
    labelled(axs[0], 'the window begins in epoch', 'and ends in epoch')
    to_end = np.flatnonzero(ends == ends.max())
    to_end = to_end[starts[to_end].argsort()]
    axs[1].plot(starts[to_end], values[to_end], color='C3', marker='o', ms=4, label='mean from there to the end')
    axs[1].axhline(table.loc[0, by], color='0.4', ls='--', label='the last weights')
    singles = windows.loc[windows['kind'] == 'single', by]
    axs[1].axhline(best_of(singles), color='C0', ls=':', label='best single stretch')
    labelled(axs[1], 'the window begins in epoch', by.replace('_', ' '))
    axs[1].legend(fontsize='small')
    for ax in axs:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axs
