"""What is said at the end of a fit with an average: both models' numbers and what to call next; and,
where it applies, why they are as they are.

Pure functions of what the callback and the Recorder know already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .checks import counted
from .fit_history import FitHistory

__all__ = [
    'Outcome',
    'described',
    'lines',
    'result',
    'remark_on_one_point',
    'remark_on_rate',
    'remark_on_first_point',
    'remark_on_progress',
    'share_of_first',
    'relative_lag',
]

_NEAR = 0.05  # an average that lies so far behind the last weights, by `relative_lag`, is nearly these
_DOMINATES = 1 / 3  # of all weight, for the first point
_NOTED = 0.1  # so much of a fall in loss is worth a word


@dataclass
class Outcome:
    "A fit that has averaged, at its end."

    history: FitHistory
    described: str  # 'average of 3 epochs (3-5)'
    call: str  # how users write the callback, as in 'learn.swa'
    n_averaged: int
    by_steps: bool  # were steps averaged, and not ends of epochs?
    is_new: bool  # or does the average go on with an earlier one?
    has_batch_norm: bool  # whose statistics are refreshed for the average
    weight: Callable  # `n_averaged` -> weight of the new point
    lrs: Sequence[float]  # of each step of the fit
    n_before: int  # steps before the first point


def lines(fit: Outcome) -> list[str]:
    "One line, or two."
    first = result(fit.history, fit.described, fit.call)
    if fit.n_averaged == 1:
        remarks = [remark_on_one_point(fit.history, fit.by_steps, fit.has_batch_norm)]
    else:
        remarks = [
            remark_on_rate(fit.lrs, fit.n_before) if fit.is_new else '',
            remark_on_first_point(fit.weight, fit.n_averaged),
            remark_on_progress(fit.history),
        ]
    second = '; '.join(filter(None, remarks))
    return [f'{fit.history.prefix}: {line}' for line in (first, second) if line]


# the first line


def described(n_averaged: int, epochs: list[int], by_steps: bool, with_start: bool = False) -> str:
    """As in 'average of 3 epochs (2-4)', or 'average of 30 steps (epochs 2-4)'.

    - `with_start`: is one of the points the weights that the fit started from?
    """
    start = 'the start and ' if with_start else ''
    n = n_averaged - with_start
    if not n:
        return 'average of the start alone'
    if not by_steps:
        return f'average of {start}{counted(n, "epoch")} ({_ranges(epochs)})'
    label = 'epoch' if len(epochs) == 1 else 'epochs'
    return f'average of {start}{counted(n, "step")} ({label} {_ranges(epochs)})'


def _ranges(epochs) -> str:
    "[3, 4, 5, 9] -> '3-5, 9'"
    runs = []
    for e in epochs:
        if runs and runs[-1][1] == e - 1:
            runs[-1][1] = e
        else:
            runs.append([e, e])
    return ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)


def result(history: FitHistory, described: str, call: str) -> str:
    "Both models' loss and metrics where the average was validated last, and what to call next."
    then = f'next: `with {call}.averaged():`, or `{call}.apply()` for good'
    row = _last_validated(history)
    if row is None:
        return f'{described}, not validated; {then}'
    numbers = []
    for column in history.columns:
        beside = history.column(history.beside(column))[row]
        numbers.append(f'{history.measure(column)} {history.column(column)[row]:.6f} (in training {beside:.6f})')
    epoch = history.epochs[row]
    when = '' if row == len(history.rows) - 1 else f' after epoch {epoch}'
    return f'{described}{when}: {", ".join(numbers)}; {then}'


def _last_validated(history) -> int | None:
    "The last row with a number in a column of the average."
    columns = [history.column(name) for name in history.columns]
    rows = [i for i, values in enumerate(zip(*columns)) if any(v == v for v in values)]
    return rows[-1] if rows else None


# the second line; each remark is empty where it does not apply


def remark_on_one_point(history: FitHistory, by_steps: bool, has_batch_norm: bool) -> str:
    "Of an average of one epoch, or of one step."
    if by_steps:
        return 'an average of one step is the weights after it: a smaller `every` or a longer fit averages more'
    [epoch] = history.averaged
    more = 'average more epochs by a lower swa_start or a longer fit'
    if history.epochs and history.epochs[-1] > epoch:
        return f'an average of one epoch is the model as it was after that, epoch {epoch}: {more}'
    if has_batch_norm and _last_validated(history) is not None:
        return (
            'an average of one epoch is the model itself, and the difference between the columns is refreshed batch '
            f'norm, neither gain nor loss by averaging: {more}'
        )
    return f'an average of one epoch is the model itself: {more}'


def remark_on_rate(lrs: Sequence[float], n_before: int) -> str:
    "Of learning rates `lrs`, step by step, that keep the points close; the first point came after `n_before` steps."
    lrs = np.asarray(lrs, float)
    after = lrs[n_before:]
    if len(after) == 0:
        return ''
    highest = lrs.max()
    if not (relative_lag(after, highest) < _NEAR and after[-1] < _NEAR * highest):
        return ''
    return (
        f'the learning rate ends near zero ({after[-1]:.2g}, after {highest:.2g} at its highest), so the average is '
        'nearly the last weights: a constant or cyclic end, as in fit_swa, gives it something to average'
    )


def relative_lag(lrs: np.ndarray, highest: float) -> float:
    """How far the mean of points taken after every step lies behind the last one, if each step goes as
    far as its rate in `lrs` and all in one direction, in units of what it would be at the rate `highest`.

    A step is between the last point and all points before it, a share of all that grows with its number.
    """
    share = np.arange(1, len(lrs) + 1)
    return float((share * lrs).sum() / (share.sum() * highest))


def remark_on_first_point(weight: Callable, n_averaged: int) -> str:
    "Of an average that has not forgotten its first point as it should, as an EMA of too few points."
    share = share_of_first(weight, n_averaged)
    if not share > max(_DOMINATES, 1.5 / n_averaged):  # an equal average has 1 / n_averaged
        return ''
    return (
        f'its first point still has {100 * share:.0f} % of the weight: a lower decay, `ema(decay, warmup=True)` or a '
        'later swa_start forgets it sooner'
    )


def share_of_first(weight: Callable, n_averaged: int) -> float:
    """The weight that the first of `n_averaged` points has in the average, or less than what matters
    once it is below that.
    """
    share = 1.0
    for n in range(1, n_averaged):
        share *= 1 - float(weight(n))
        if share < _DOMINATES:
            break
    return share


def remark_on_progress(history: FitHistory) -> str:
    """Of weights whose validation loss kept falling while they were averaged (by more than half of all its
    movement), to noticeably below that of the average.
    """
    row = _last_validated(history)
    if row is None or not history.averaged:
        return ''
    loss = history.columns[0]
    average = history.column(loss)[row]
    raw = history.column(history.beside(loss))
    among = [i for i, epoch in enumerate(history.epochs[: row + 1]) if epoch >= history.averaged[0]]
    losses = [raw[i] for i in among]
    if len(losses) < 2:
        return ''
    moved = sum(abs(b - a) for a, b in zip(losses, losses[1:]))
    fallen = losses[0] - losses[-1]
    is_behind = average - losses[-1] > _NOTED * fallen
    if not (fallen > moved / 2 and is_behind):
        return ''
    first, last = history.epochs[among[0]], history.epochs[row]
    return (
        f'the weights were still improving ({history.beside(loss)} {losses[0]:.4f} after epoch {first}, '
        f'{losses[-1]:.4f} after epoch {last}), so the average is behind them: start later, train longer, or forget '
        'sooner (weight=ema(0.9))'
    )
