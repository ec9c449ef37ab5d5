"""What the rows and curves of a report read off the records of the seeds: names, values, the pairs
compared."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from .recipes import PRETRAINED, RECIPES

__all__ = [
    'REFRESHED',
    'Row',
    'rows_of',
    'values',
    'pairs_of',
    'error_name',
    'error_of',
    'run_lengths',
    'curves',
    'curves_of_lengths',
]


class Row(NamedTuple):
    "What a row of a table reads off a record."

    run: str
    epochs: int
    average: str  # what its column begins with: '' for the weights in training


REFRESHED = ', batch norm refreshed'
_BESIDE = {'third': 'mean of its last third', 'fifth': 'mean of its last fifth', 'ema': 'EMA over steps'}


def rows_of(record: dict) -> dict[str, Row]:
    "Name -> `Row`, in the order of the table."
    recipe = RECIPES[record['recipe']]
    if recipe.lengths:
        return _rows_of_lengths(record)
    if recipe.tails:
        return _rows_of_tails(record)
    lengths = run_lengths(record)
    swa = recipe.swa_label
    rows = {}
    for run in ('SGD 1B', 'SGD 1.5B'):
        if run in lengths:
            rows |= _rows_of_run(record, run)
    epochs_at = {f'{budgets:g}B': int(record['budget'] * budgets) for budgets in (1, 1.25, 1.5)}
    for budgets, epochs in epochs_at.items():
        rows[f'{swa} run at {budgets}, single weights'] = Row('SWA', epochs, '')
    for budgets, epochs in epochs_at.items():
        rows[f'{swa} {budgets}'] = Row('SWA', epochs, 'swa_')
    rows |= _rows_beside(record, 'SWA', f'{swa} run at 1.5B')
    for run in lengths:
        if run.startswith('one-cycle'):
            rows |= _rows_of_run(record, run)
    return rows


def _rows_of_lengths(record) -> dict[str, Row]:
    rows = {}
    for run, n in run_lengths(record).items():
        if run.startswith('SWA'):
            rows[f'{run}, single weights'] = Row(run, n, '')
            rows[run] = Row(run, n, 'swa_')
            rows |= _rows_beside(record, run, run)
        else:
            rows |= _rows_of_run(record, run)
    return dict(sorted(rows.items(), key=lambda item: item[1].epochs))


def _rows_of_tails(record) -> dict[str, Row]:
    rows = {}
    for tail in RECIPES[record['recipe']].tails:
        n = run_lengths(record)[tail.name]
        if tail.n_averaged == 0:
            rows |= _rows_of_run(record, tail.name)
        else:
            rows[f'{tail.name}, single weights'] = Row(tail.name, n, '')
            rows[tail.name] = Row(tail.name, n, 'swa_')
    return rows


def _rows_of_run(record, run) -> dict[str, Row]:
    "Its end, the same with its batch norm refreshed, and the averages beside it."
    n = run_lengths(record)[run]
    recipe = RECIPES[record['recipe']]
    rows = {run: Row(run, n, '')}
    if _has_batch_norm(recipe.network, recipe.n_classes):
        rows[run + REFRESHED] = Row(run, n, 'swa_')
    return rows | _rows_beside(record, run, run)


def _rows_beside(record, run, label) -> dict[str, Row]:
    "The averages beside a run, which are validated at its end."
    epochs = _epochs(record, run)
    rows = {}
    for name, said in _BESIDE.items():
        if f'{name}_valid_loss' in epochs[-1]:
            rows[f'{label}, {said}'] = Row(run, len(epochs), f'{name}_')
    return rows


def run_lengths(record) -> dict[str, int]:
    "Run -> its number of epochs."
    res = {}
    for part in record['parts']:
        for run in part['runs']:
            res[run] = max(res.get(run, 0), part['end'])
    return res


def _epochs(record, run) -> list[dict]:
    "The rows of the epochs of `run`, those included that it shares with others."
    rows = []
    for part in sorted(record['parts'], key=lambda part: part['begin']):
        if run in part['runs']:
            rows += part['epochs']
    return rows


def values(records: list[dict], name: str) -> dict[str, np.ndarray]:
    """Row of the table -> `name` ('error', in per cent, or 'valid_loss') for each seed; nan where
    it has no value.
    """
    metric = RECIPES[records[0]['recipe']].metric
    res = {}
    for label, row in rows_of(records[0]).items():
        ends = [_epochs(record, row.run)[row.epochs - 1] for record in records]
        res[label] = np.array([_read_off(end, row.average, name, metric) for end in ends])
    return res


def _read_off(epoch: dict, average: str, name: str, metric: str) -> float:
    "`name` of an `average` in the row of an `epoch`."
    value = epoch.get(average + (metric if name == 'error' else name))
    if value is None:
        return float('nan')
    return error_of(value) if name == 'error' else value


def error_name(recipe) -> str:
    "Of what `error_of` gives."
    return 'test error, %' if recipe.metric == 'accuracy' else 'unexplained variance, %'


def error_of(metric: float) -> float:
    "In per cent: the samples read wrong, or the share of the variance that R2 leaves."
    return 100 * (1 - metric)


def pairs_of(record) -> list[tuple[str, str]]:
    """The rows of the table whose differences answer a question.

    What is averaged is compared with ends whose batch norm is refreshed, too: else the gain may be
    that of the refresh.
    """
    recipe = RECIPES[record['recipe']]
    if recipe.lengths:
        pairs = []
        for n in sorted(set(run_lengths(record).values())):
            pairs += _pairs_of_length(f'SWA {n}', f'SWA {n}', f'{recipe.opt} {n}', f'one-cycle {n}')
    elif recipe.tails:
        pairs = _pairs_of_tails(recipe)
    else:
        swa = recipe.swa_label
        pairs = [
            (f'{swa} 1.25B', 'SGD 1B'),
            (f'{swa} 1.5B', 'SGD 1B'),
            ('SGD 1.5B', 'SGD 1B'),
            (f'{swa} run at 1B, single weights', 'SGD 1B'),
            (f'{swa} run at 1.5B, single weights', 'SGD 1.5B'),
            (f'{swa} 1.5B', f'{swa} run at 1.5B, single weights'),
            *_pairs_of_length(f'{swa} 1B', f'{swa} run at 1B', 'SGD 1B', 'one-cycle 1B'),
            *_pairs_of_length(f'{swa} 1.5B', f'{swa} run at 1.5B', 'SGD 1.5B', 'one-cycle 1.5B'),
        ]
    there = {PRETRAINED, *rows_of(record)}
    return [(a, b) for a, b in pairs if a in there and b in there]


def _pairs_of_tails(recipe):
    "Each with what all go on from; what is averaged with the controls, and with its own end."
    controls = []
    for tail in recipe.tails:
        if tail.n_averaged == 0:
            controls += [tail.name, tail.name + REFRESHED]
    pairs = [(control, PRETRAINED) for control in controls]
    for tail in recipe.tails:
        if tail.n_averaged > 0:
            others = [PRETRAINED, *controls, f'{tail.name}, single weights']
            pairs += [(tail.name, other) for other in others]
    return pairs


def _pairs_of_length(swa, swa_run, plain, one_cycle):
    "Of the rows at one length; `swa_run`: what the rows of SWA's run beside its average begin with."
    third = f'{one_cycle}, mean of its last third'
    swa_ema = f'{swa_run}, EMA over steps'
    return [
        (swa, plain),
        (swa, plain + REFRESHED),
        (swa, one_cycle),
        (swa, one_cycle + REFRESHED),
        (swa_ema, plain),
        (swa_ema, plain + REFRESHED),
        (swa_ema, one_cycle),
        (swa_ema, swa),
        (plain + REFRESHED, plain),
        (f'{plain}, EMA over steps', plain),
        (f'{plain}, EMA over steps', plain + REFRESHED),
        (one_cycle, plain),
        (one_cycle + REFRESHED, one_cycle),
        (third, one_cycle),
        (third, one_cycle + REFRESHED),
        (third, swa),
    ]


# curves


def curves(records: list[dict], name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Curve -> its epochs (counted from 1: after so many), and `name` ('error', in per cent, or
    'valid_loss') at each for each seed, shape (seeds, epochs)."""
    lengths = run_lengths(records[0])
    recipe = RECIPES[records[0]['recipe']]
    swa = recipe.swa_label
    wanted = {
        'SGD 1B': ('SGD 1B', ''),
        'SGD 1.5B': ('SGD 1.5B', ''),
        'one-cycle 1.5B': ('one-cycle 1.5B', ''),
        f'{swa} run, single weights': ('SWA', ''),
        f'{swa} run, average': ('SWA', 'swa_'),
    }
    for tail in recipe.tails:
        wanted[f'{tail.name}, single weights'] = (tail.name, '')
        if tail.n_averaged > 0:
            wanted[f'{tail.name}, average at its end'] = (tail.name, 'swa_')
    res = {}
    for label, (run, average) in wanted.items():
        if run not in lengths:
            continue
        by_seed = np.array([_read_curve(record, run, average, name) for record in records])
        shown = ~np.isnan(by_seed).all(0)
        res[label] = np.flatnonzero(shown) + 1, by_seed[:, shown]
    return res


def _read_curve(record, run, average, name) -> list[float]:
    metric = RECIPES[record['recipe']].metric
    return [_read_off(epoch, average, name, metric) for epoch in _epochs(record, run)]


def curves_of_lengths(records: list[dict], name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Method -> the numbers of epochs trained, and `name` at the end of each for each seed, shape
    (seeds, lengths).
    """
    found = values(records, name)
    lengths = sorted(set(run_lengths(records[0]).values()))
    plain = RECIPES[records[0]['recipe']].opt
    methods = {
        plain: plain + ' {}',
        f'{plain}, EMA over steps': plain + ' {}, EMA over steps',
        'one-cycle': 'one-cycle {}',
        'one-cycle, mean of its last third': 'one-cycle {}, mean of its last third',
        'SWA': 'SWA {}',
        'SWA run, EMA over steps': 'SWA {}, EMA over steps',
    }
    res = {}
    for method, row in methods.items():
        if row.format(lengths[0]) in found:
            res[method] = np.array(lengths), np.stack([found[row.format(n)] for n in lengths], 1)
    return res


@cache  # a row of the table each asks
def _has_batch_norm(network, n_classes) -> bool:
    if network is None:  # a task's own
        return True
    with torch.device('meta'):
        model = network(n_classes)
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
