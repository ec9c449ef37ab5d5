"""The part of a report that is on ensembles at one training budget: its tables, figures and
numbers."""

import numpy as np

from ..plot import plot_sizes
from .compare_ensembles import METHODS
from .rows import error_of, run_lengths
from .tables import difference_rows, differences, spread, summary, table

__all__ = ['sections', 'numbers', 'draw', 'size_curves']


def of_whole_seeds(found: dict, name: str) -> dict[str, np.ndarray]:
    "Method -> `name` of all members of a seed, for each seed."
    last = {(r['method'], r['seed']): r[name] for r in found['sizes']}  # sizes grow: the last row of each has all
    return {method: np.array([last[method, seed] for seed in found['seeds']]) for method in METHODS}


def size_curves(found: dict, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Curve -> numbers of members, and `name` at each for each seed, shape (seeds, sizes);
    independent runs count as one seed, up to as many members.
    """
    most = max(r['members'] for r in found['sizes'])
    sizes = range(1, min(most, len(found['seeds'])) + 1)
    res = {
        'independent runs, a budget each': (
            np.array(sizes),
            np.array([[_at(found, 'SGD', k, name).mean() for k in sizes]]),
        )
    }
    for method in ('snapshots', 'FGE', 'SWA'):
        res[method] = _curve(
            [[r for r in found['sizes'] if r['method'] == method and r['seed'] == seed] for seed in found['seeds']],
            name,
        )
    return res


def _at(found, method, k, name):
    return np.array([r[name] for r in found['budgets'] if (r['method'], r['budgets']) == (method, k)])


def _curve(rows, name):
    return np.array([r['members'] for r in rows[0]]), np.array([[r[name] for r in seed] for seed in rows])


_PAIRS = ('SWA', 'SGD'), ('snapshots', 'SGD'), ('FGE', 'SGD'), ('FGE', 'SWA'), ('FGE', 'snapshots')


def numbers(found: dict) -> dict:
    """What report.json holds of them: the rows of one run, those of several, as far as they go, and
    the differences.
    """
    error, loss = _errors(found), of_whole_seeds(found, 'loss')
    rows = {m: {'error': summary(error[m]), 'loss': summary(loss[m])} for m in METHODS}
    for m in METHODS:
        for k in _shown_budgets(found)[1:]:
            of_runs = error_of(_at(found, m, k, 'accuracy'))
            rows[f'{m}, {k} runs'] = {'error': summary(of_runs), 'loss': summary(_at(found, m, k, 'loss'))}
    return {'rows': rows, 'differences': differences(error, loss, _PAIRS)}


def _errors(found) -> dict:
    return {m: error_of(x) for m, x in of_whole_seeds(found, 'accuracy').items()}


def _shown_budgets(found):
    return [k for k in (1, 2, 3, 5, 10) if k <= len(found['seeds'])]


def draw(found: dict, axs):
    "Error and loss over the number of models."
    of_error = {name: (sizes, error_of(x)) for name, (sizes, x) in size_curves(found, 'accuracy').items()}
    plot_sizes(of_error, axs[0], 'test error, %')
    plot_sizes(size_curves(found, 'loss'), axs[1], 'test loss')


def sections(records: list[dict], found: dict):
    "The tables of the report."
    n, epochs, error = len(found['seeds']), run_lengths(records[0]), _errors(found)
    names = {'SGD': 'SGD 1B', 'SWA': 'SWA', 'snapshots': 'snapshots', 'FGE': 'FGE'}
    values = {k: of_whole_seeds(found, k) for k in ('loss', 'calibration_error', 'disagreement')}
    costs, one = {c['method']: c for c in found['costs']}, found['costs'][0]
    rows = [
        [
            'one run',
            'epochs',
            'models',
            f'test error, % (n = {n})',
            'test loss',
            'calibration error, %',
            'disagreement, %',
            'time, one sample',
            'time, test set',
            'weights, MB',
        ]
    ]
    for m in METHODS:
        c = costs[m]
        rows.append(
            [
                m,
                str(epochs[names[m]]),
                str(c['members']),
                spread(error[m], 2),
                spread(values['loss'][m], 4),
                spread(100 * values['calibration_error'][m], 2),
                spread(100 * values['disagreement'][m].astype(float), 1) if c['members'] > 1 else '',
                f'{c["sample"] / one["sample"]:.1f} x',
                f'{c["test set"] / one["test set"]:.1f} x',
                f'{c["bytes"] / 1e6:.1f}',
            ]
        )
    yield table(rows)
    yield (
        f'Times are multiples of one model\'s: {1e3 * one["sample"]:.2g} ms a sample, {one["test set"]:.2g} s the test '
        'set. Disagreement: the share of samples that two members read differently, mean over the pairs.'
    )
    yield (
        'Paired differences, seed by seed, in points of error and in test loss (less is better):'
        if n > 1
        else 'Differences in points of error and in test loss; one seed cannot tell them from chance:'
    )
    yield table(difference_rows(error, _PAIRS, 2, losses=values['loss']))
    if n > 1:
        budgets = _shown_budgets(found)
        yield (
            'Several budgets: all models of so many runs together. Error in %, mean +- std over groups of runs of '
            'which none is in two:'
        )
        rows = [['', *(f'{k} budget{"s" * (k > 1)} (n = {n // k})' for k in budgets)]]
        for m in METHODS:
            name = {'SGD': 'independent SGD runs', 'SWA': 'averages of independent runs'}.get(
                m, f'{m} of independent runs'
            )
            rows.append([name, *(spread(error_of(_at(found, m, k, 'accuracy')), 2) for k in budgets)])
        yield table(rows)
    yield '![test error and loss over the number of models](curves.png)'
