"""Tables in Markdown, and the statistics in them and in report.json."""

import numpy as np
from scipy.stats import t

__all__ = ['table', 'spread', 'signed', 'mean_and_half', 'difference_rows', 'summary', 'difference_summary']


def table(rows: list[list[str]]) -> str:
    "Markdown; the first row is the head."
    head, *body = ('| ' + ' | '.join(row) + ' |' for row in rows)
    return '\n'.join([head, '|---' * len(rows[0]) + '|', *body])


def spread(x: np.ndarray, digits: int) -> str:
    return f'{x.mean():.{digits}f}' + (f' +- {x.std(ddof=1):.{digits}f}' if len(x) > 1 else '')


def mean_and_half(x: np.ndarray) -> tuple[float, float]:
    "Mean of the sample `x`, and half the width of its 95 % confidence interval by Student's t; infinite for one value."
    return float(x.mean()), float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5) if len(x) > 1 else float(
        'inf'
    )


def summary(x: np.ndarray) -> dict:
    "Mean, standard deviation (`None` for one value) and size of a sample, for report.json."
    return {'mean': float(x.mean()), 'std': float(x.std(ddof=1)) if len(x) > 1 else None, 'n': len(x)}


def difference_summary(x: np.ndarray) -> dict:
    "Mean, 95 % confidence interval (`None` for one value) and size of a sample of paired differences, for report.json."
    mean, half = mean_and_half(x)
    low, high = (None, None) if half == float('inf') else (mean - half, mean + half)
    return {'mean': mean, 'low': low, 'high': high, 'n': len(x)}


def signed(x: np.ndarray, digits: int) -> list[str]:
    "Two cells: the mean of `x`, and its 95 % confidence interval, empty for one value."
    mean, half = mean_and_half(x)
    return [
        f'{mean:+.{digits}f}',
        f'{mean - half:+.{digits}f} to {mean + half:+.{digits}f}' if half < float('inf') else '',
    ]


def difference_rows(
    values: dict[str, np.ndarray],
    pairs,
    digits: int,
    published: dict | None = None,
    losses: dict[str, np.ndarray] | None = None,
) -> list[list[str]]:
    """Rows with the paired differences of `values` (for each seed) by name, of which less is better; if given, beside
    the difference of what was `published` (name -> mean and something) and those of the `losses`."""
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
        row = [f'{a} - {b}', *signed(gain, digits), f'{(gain < 0).sum()} of {len(gain)}']
        if published is not None:
            row.append(f'{published[a][0] - published[b][0]:+.2f}' if a in published and b in published else '')
        if losses is not None:
            row += signed(losses[a] - losses[b], 4)
        rows.append(row)
    return rows
