"""Tables in Markdown, and the statistics in them."""
import numpy as np
from scipy.stats import t

__all__ = ['table', 'spread', 'mean_and_half', 'difference_rows']


def table(rows: list[list[str]]) -> str:
    "Markdown; the first row is the head."
    head, *body = ('| ' + ' | '.join(row) + ' |' for row in rows)
    return '\n'.join([head, '|---' * len(rows[0]) + '|', *body])


def spread(x: np.ndarray, digits: int) -> str: return f'{x.mean():.{digits}f}' + (f' +- {x.std(ddof=1):.{digits}f}' if len(x) > 1 else '')


def mean_and_half(x: np.ndarray) -> tuple[float, float]:
    "Mean of the sample `x`, and half the width of its 95 % confidence interval by Student's t; infinite for one value."
    return float(x.mean()), float(t.ppf(.975, len(x) - 1) * x.std(ddof=1) / len(x)**.5) if len(x) > 1 else float('inf')


def difference_rows(values: dict[str, np.ndarray], pairs, published: dict | None = None, less: bool = False) -> list[list[str]]:
    """Rows with the paired differences of `values` (for each seed) by name: of accuracies in points, beside what was `published` in per cent; or,
    where `less` is better, of losses."""
    rows = [['', 'difference', '95 % interval', 'better in', *(['published'] if published is not None else [])]]
    for a, b in pairs:
        if a not in values or b not in values: continue
        gain = (values[a] - values[b]) * (1 if less else 100)
        (mean, half), digits = mean_and_half(gain), 4 if less else 2
        interval = f'{mean - half:+.{digits}f} to {mean + half:+.{digits}f}' if half < float('inf') else ''
        row = [f'{a} - {b}', f'{mean:+.{digits}f}', interval, f'{((gain < 0) if less else (gain > 0)).sum()} of {len(gain)}']
        if published is not None: row.append(f'{published[a][0] - published[b][0]:+.2f}' if a in published and b in published else '')
        rows.append(row)
    return rows
