"""Ensembles at one training budget: what the members that a recipe's seeds have left predict
together, what that costs, and the report on it."""

from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from ..ensemble import Ensemble
from ..plot import plot_sizes
from ..weights import read_index
from .record import json_number, snapshots_folder, weights_file
from .rows import error_of, run_lengths
from .scores import disagreement, measures
from .store import store, stored
from .tables import difference_rows, differences, spread, summary, table

__all__ = ['METHODS', 'evaluate', 'is_compared', 'load', 'sections', 'numbers', 'draw', 'size_curves']

METHODS = 'SGD', 'SWA', 'snapshots', 'FGE'
_TOGETHER = -1  # in the place of a seed, in the file of the row


def evaluate(out: Path, seeds, learn) -> dict:
    """Predict the test set of `learn` with what `seeds` have left in `out`, and measure it; returns
    what the file of the row then holds of it.

    - 'sizes': one row for each seed, method and number of members m: of the snapshots the last m,
      as their paper has it, of FGE the first.
    - 'budgets': one row for each method, k, and group of k seeds, of which none is in two: all
      their members. For SGD these are independent runs.
    - 'costs': of each method with all members of one seed: least seconds for one sample and for the
      test set, bytes of weights.
    """
    members = {seed: _members(Path(out), seed) for seed in seeds}
    preds, targets = {}, None
    for seed in seeds:
        for method in METHODS:
            preds[seed, method], targets = Ensemble(members[seed][method], learn).member_preds()

    def row(ps, **keys):
        return (
            keys | measures(ps.mean(0), targets) | {'members': len(ps), 'disagreement': json_number(disagreement(ps))}
        )

    sizes = [
        row(ps[-m:] if method == 'snapshots' else ps[:m], seed=seed, method=method)
        for (seed, method), ps in preds.items()
        for m in range(1, len(ps) + 1)
    ]
    groups = [(k, seeds[i : i + k]) for k in range(1, len(seeds) + 1) for i in range(0, len(seeds) - k + 1, k)]
    budgets = [
        row(torch.cat([preds[seed, method] for seed in group]), budgets=k, method=method)
        for method in METHODS
        for k, group in groups
    ]
    found = {
        'kind': 'ensembles',
        'seed': _TOGETHER,
        'seeds': list(seeds),
        'sizes': sizes,
        'budgets': budgets,
        'costs': _costs(members[seeds[0]], learn),
    }
    store(Path(out), found)
    return found


def _members(out, seed) -> dict:
    def files(run):
        folder = snapshots_folder(out, seed, run)
        return [folder / file for file in read_index(folder)['files']]

    return {
        'SGD': [weights_file(out, seed, 'SGD 1B')],
        'SWA': [weights_file(out, seed, 'SWA average')],
        'snapshots': files('snapshots'),
        'FGE': files('FGE'),
    }


def _costs(members, learn) -> list[dict]:
    batches, models = [x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid], {}
    for method, files in members.items():
        with Ensemble(files, learn).active():
            models[method] = learn.model

    def seconds(model, xs):
        start = perf_counter()
        for x in xs:
            out = model(x)
        out.sum().item()  # all is done
        return perf_counter() - start

    best = {method: [float('inf')] * 2 for method in members}
    for _ in range(7):  # in turn, so that what else the machine does falls on all
        for method, model in models.items():
            model.eval()
            with torch.no_grad():
                seconds(model, batches[:1])  # warm
                best[method] = [
                    min(old, seconds(model, xs)) for old, xs in zip(best[method], ([batches[0][:1]], batches))
                ]
    size = sum(t.numel() * t.element_size() for t in learn.model.state_dict().values())
    return [
        {'method': m, 'members': len(files), 'sample': best[m][0], 'test set': best[m][1], 'bytes': size * len(files)}
        for m, files in members.items()
    ]


def load(folder: Path) -> dict:
    "What `evaluate` found. Raises `ValueError` if it is not there or damaged."
    found = _stored(folder)
    if found is None:
        raise ValueError(f'{folder} has no comparison of its ensembles: the same reproduce command makes it')
    return found


def is_compared(folder: Path, seeds) -> bool:
    "Is what `seeds` have left part of a comparison already?"
    found = _stored(folder)
    return found is not None and set(seeds) <= set(found['seeds'])


def _stored(folder):
    return stored(folder, 'ensembles').get(_TOGETHER)


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
