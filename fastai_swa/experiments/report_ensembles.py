"""The part of a report that is on ensembles at one training budget: its tables, figures and
numbers."""

import numpy as np

from ..checks import counted
from ..plot import plot_sizes
from .compare_ensembles import METHODS
from .rows import error_of, run_lengths
from .tables import difference_rows, differences, markdown_table, spread, summary

__all__ = ['sections', 'numbers', 'draw', 'size_curves']

_PAIRS = ('SWA', 'SGD'), ('snapshots', 'SGD'), ('FGE', 'SGD'), ('FGE', 'SWA'), ('FGE', 'snapshots')
_RUNS = {'SGD': 'SGD 1B', 'SWA': 'SWA', 'snapshots': 'snapshots', 'FGE': 'FGE'}
_SHOWN_BUDGETS = 1, 2, 3, 5, 10


# what `evaluate` found, for each seed


def _of_whole_seeds(found: dict, name: str) -> dict[str, np.ndarray]:
    "Method -> `name` of all members of a seed, for each seed."
    last = {}
    for row in found['sizes']:  # sizes grow: the last row of each has all
        last[row['method'], row['seed']] = row[name]
    res = {}
    for method in METHODS:
        res[method] = np.array([last[method, seed] for seed in found['seeds']])
    return res


def _errors_of_whole_seeds(found) -> dict[str, np.ndarray]:
    return {method: error_of(x) for method, x in _of_whole_seeds(found, 'accuracy').items()}


def _of_groups(found, method, k, name) -> np.ndarray:
    "`name` of all members of `k` seeds, for each group of so many."
    rows = [row for row in found['budgets'] if (row['method'], row['budgets']) == (method, k)]
    return np.array([row[name] for row in rows])


def _shown_budgets(found) -> list[int]:
    return [k for k in _SHOWN_BUDGETS if k <= len(found['seeds'])]


# tables


def sections(records: list[dict], found: dict) -> list[str]:
    "The tables of the report."
    n = len(found['seeds'])
    one = found['costs'][0]
    if n > 1:
        said = 'Paired differences, seed by seed, in points of error and in test loss (less is better):'
    else:
        said = 'Differences in points of error and in test loss; one seed cannot tell them from chance:'
    losses = _of_whole_seeds(found, 'loss')
    res = [
        markdown_table(_rows_of_one_run(records, found)),
        f"Times are multiples of one model's: {1e3 * one['sample']:.2g} ms a sample, {one['test set']:.2g} s the test "
        'set. Disagreement: the share of samples that two members read differently, mean over the pairs.',
        said,
        markdown_table(difference_rows(_errors_of_whole_seeds(found), _PAIRS, 2, losses=losses)),
    ]
    if n > 1:
        res += [
            'Several budgets: all models of so many runs together. Error in %, mean +- std over groups of runs of '
            'which none is in two:',
            markdown_table(_rows_of_several_runs(found)),
        ]
    return [*res, '![test error and loss over the number of models](curves.png)']


def _rows_of_one_run(records, found) -> list[list[str]]:
    errors = _errors_of_whole_seeds(found)
    losses = _of_whole_seeds(found, 'loss')
    calibration = _of_whole_seeds(found, 'calibration_error')
    disagreement = _of_whole_seeds(found, 'disagreement')
    epochs = run_lengths(records[0])
    costs = {cost['method']: cost for cost in found['costs']}
    one = found['costs'][0]
    rows = [
        [
            'one run',
            'epochs',
            'models',
            f'test error, % (n = {len(found["seeds"])})',
            'test loss',
            'calibration error, %',
            'disagreement, %',
            'time, one sample',
            'time, test set',
            'weights, MB',
        ]
    ]
    for method in METHODS:
        cost = costs[method]
        is_of_several = cost['members'] > 1
        rows.append(
            [
                method,
                str(epochs[_RUNS[method]]),
                str(cost['members']),
                spread(errors[method], 2),
                spread(losses[method], 4),
                spread(100 * calibration[method], 2),
                spread(100 * disagreement[method].astype(float), 1) if is_of_several else '',
                f'{cost["sample"] / one["sample"]:.1f} x',
                f'{cost["test set"] / one["test set"]:.1f} x',
                f'{cost["bytes"] / 1e6:.1f}',
            ]
        )
    return rows


def _rows_of_several_runs(found) -> list[list[str]]:
    budgets = _shown_budgets(found)
    n = len(found['seeds'])
    names = {'SGD': 'independent SGD runs', 'SWA': 'averages of independent runs'}
    rows = [['', *(f'{counted(k, "budget")} (n = {n // k})' for k in budgets)]]
    for method in METHODS:
        name = names.get(method, f'{method} of independent runs')
        errors = [error_of(_of_groups(found, method, k, 'accuracy')) for k in budgets]
        rows.append([name, *(spread(x, 2) for x in errors)])
    return rows


# numbers


def numbers(found: dict) -> dict:
    """What report.json holds of them: the rows of one run, those of several, as far as they go, and
    the differences.
    """
    errors = _errors_of_whole_seeds(found)
    losses = _of_whole_seeds(found, 'loss')
    rows = {}
    for method in METHODS:
        rows[method] = {'error': summary(errors[method]), 'loss': summary(losses[method])}
    for method in METHODS:
        for k in _shown_budgets(found)[1:]:
            error = error_of(_of_groups(found, method, k, 'accuracy'))
            loss = _of_groups(found, method, k, 'loss')
            rows[f'{method}, {k} runs'] = {'error': summary(error), 'loss': summary(loss)}
    return {'rows': rows, 'differences': differences(errors, losses, _PAIRS)}


# figure


def draw(found: dict, axs):
    "Error and loss over the number of models."
    of_error = {name: (sizes, error_of(x)) for name, (sizes, x) in size_curves(found, 'accuracy').items()}
    plot_sizes(of_error, axs[0], 'test error, %')
    plot_sizes(size_curves(found, 'loss'), axs[1], 'test loss')


def size_curves(found: dict, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Curve -> numbers of members, and `name` at each for each seed, shape (seeds, sizes);
    independent runs count as one seed, up to as many members.
    """
    most = max(row['members'] for row in found['sizes'])
    sizes = range(1, min(most, len(found['seeds'])) + 1)
    of_runs = [_of_groups(found, 'SGD', k, name).mean() for k in sizes]
    res = {'independent runs, a budget each': (np.array(sizes), np.array([of_runs]))}
    for method in ('snapshots', 'FGE', 'SWA'):
        res[method] = _curve_of_method(found, method, name)
    return res


def _curve_of_method(found, method, name) -> tuple[np.ndarray, np.ndarray]:
    by_seed = []
    for seed in found['seeds']:
        rows = [row for row in found['sizes'] if (row['method'], row['seed']) == (method, seed)]
        by_seed.append([row[name] for row in rows])
    sizes = [row['members'] for row in rows]  # the same for each seed
    return np.array(sizes), np.array(by_seed)
