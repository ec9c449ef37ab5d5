"""Tables in Markdown, and the statistics in them and in report.json.

A sample has a value for each seed; what diverged is nan, counts for nothing, and is said.
"""

import numpy as np
from scipy.stats import t

__all__ = [
    'markdown_table',
    'spread',
    'mean_and_half',
    'difference_rows',
    'difference_cell',
    'summary',
    'difference_summary',
    'differences',
]


def markdown_table(rows: list[list[str]]) -> str:
    "The first row is the head."
    head, *body = [f'| {" | ".join(row)} |' for row in rows]
    line = '|---' * len(rows[0]) + '|'
    return '\n'.join([head, line, *body])


def mean_and_half(x: np.ndarray) -> tuple[float, float]:
    """Mean of the sample `x`, and half the width of its 95 % confidence interval by Student's t;
    infinite for one value.
    """
    if len(x) < 2:
        return float(x.mean()), float('inf')
    half = t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(half)


def spread(x: np.ndarray, digits: int) -> str:
    "Mean +- standard deviation of a sample."
    found = _finite(x)
    if not len(found):
        return 'diverged'
    text = f'{found.mean():.{digits}f}'
    if len(found) > 1:
        text += f' +- {found.std(ddof=1):.{digits}f}'
    return text + _of_all(found, x)


def _signed(x: np.ndarray, digits: int) -> list[str]:
    """Two cells: the mean of a sample of differences, and its 95 % confidence interval, empty for
    one value.
    """
    found = _finite(x)
    if not len(found):
        return ['', '']
    mean, half = mean_and_half(found)
    interval = ''
    if half < float('inf'):
        interval = f'{mean - half:+.{digits}f} to {mean + half:+.{digits}f}'
    return [f'{mean:+.{digits}f}' + _of_all(found, x), interval]


def difference_cell(x: np.ndarray, digits: int) -> str:
    "The mean of a sample of differences, and its 95 % confidence interval, none for one value."
    mean, interval = _signed(x, digits)
    return f'{mean} ({interval})' if interval else mean


def _of_all(found, x):
    return '' if len(found) == len(x) else f' ({len(found)} of {len(x)})'


def _finite(x):
    return x[np.isfinite(x)]


def summary(x: np.ndarray) -> dict:
    """Mean, standard deviation (`None` for fewer than two values) and size of a sample, for
    report.json.
    """
    found = _finite(x)
    std = float(found.std(ddof=1)) if len(found) > 1 else None
    return {'mean': _mean_or_none(found), 'std': std, 'n': len(found)}


def difference_summary(x: np.ndarray) -> dict:
    """Mean, 95 % confidence interval (`None` for fewer than two values) and size of a sample of
    paired differences.
    """
    found = _finite(x)
    if len(found) < 2:
        return {'mean': _mean_or_none(found), 'low': None, 'high': None, 'n': len(found)}
    mean, half = mean_and_half(found)
    return {'mean': mean, 'low': mean - half, 'high': mean + half, 'n': len(found)}


def _mean_or_none(found):
    return float(found.mean()) if len(found) else None


def differences(errors: dict, losses: dict, pairs) -> dict:
    """Of each pair of rows 'a - b' -> the summaries of the paired differences of error and of loss,
    for report.json.
    """
    res = {}
    for a, b in pairs:
        res[f'{a} - {b}'] = {
            'error': difference_summary(errors[a] - errors[b]),
            'loss': difference_summary(losses[a] - losses[b]),
        }
    return res


def difference_rows(
    values: dict[str, np.ndarray],
    pairs,
    digits: int,
    published: dict | None = None,
    losses: dict[str, np.ndarray] | None = None,
) -> list[list[str]]:
    """Rows with the paired differences of `values` (for each seed) by name, of which less is
    better; if given, beside the difference of what was `published` (name -> mean and something) and
    those of the `losses`."""
    head = ['', 'difference', '95 % interval', 'better in']
    if published is not None:
        head.append('published')
    if losses is not None:
        head += ['in test loss', '95 % interval']
    rows = [head]
    for a, b in pairs:
        if a not in values or b not in values:
            continue
        gain = values[a] - values[b]
        row = [f'{a} - {b}', *_signed(gain, digits), f'{(gain < 0).sum()} of {len(gain)}']
        if published is not None:
            is_published = a in published and b in published
            row.append(f'{published[a][0] - published[b][0]:+.2f}' if is_published else '')
        if losses is not None:
            row += _signed(losses[a] - losses[b], 4)
        rows.append(row)
    return rows
