"""What the seeds of a recipe have found: tables beside the published numbers, curves, and the same numbers as
report.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from ..files import replacing, write_text
from ..plot import plot_lengths, plot_runs
from . import ensembles
from .landscape_report import has_landscapes, report_landscapes
from .recipes import RECIPES
from .record import read_records, seconds_text
from .tables import difference_rows, difference_summary, spread, summary, table

__all__ = [
    'report',
    'compare',
    'papers_table',
    'is_of_budgets',
    'load',
    'rows_of',
    'values',
    'curves',
    'curves_of_lengths',
]


def report(folder) -> str:
    """The report on the seeds that `reproduce` has left in `folder`, as Markdown; also written there as report.md, with
    its figures, and its numbers as report.json: 'rows', with mean, standard deviation and number of seeds of test error
    (in per cent) and test loss, and 'differences' of pairs of rows, with mean, 95 % confidence interval and number of
    seeds.

    Only complete seeds count. Raises `ValueError` if `folder` has none, if its file is damaged, or if its seeds are of
    different settings.
    """
    folder = Path(folder)
    if has_landscapes(folder):
        return report_landscapes(folder)
    records, unfinished = load(folder)
    recipe = RECIPES[records[0]['recipe']]
    fig, axs = plt.subplots(1, 2, figsize=(12, 4.8), layout='constrained')
    if recipe.ensembles:
        found = ensembles.load(folder)
        sections, numbers = ensembles.sections(records, found), ensembles.numbers(found)
        ensembles.draw(found, axs)
    else:
        errors, losses = values(records, 'error'), values(records, 'valid_loss')
        pairs = [pair for pair in _pairs(records[0]) if pair[0] in errors and pair[1] in errors]
        sections = _sections(records, errors, losses, pairs)
        numbers = _numbers(records, errors, losses, pairs)
        draw = _draw_lengths if recipe.lengths else _draw_runs
        draw(records, axs)
    text = '\n\n'.join([*_head(records, unfinished), *sections]) + '\n'
    fig.suptitle(f'{recipe.name}, {_seeds(len(records))}' + ': mean and its 95 % interval' * (len(records) > 1))
    with replacing(folder / 'curves.png') as f:
        fig.savefig(f, format='png', dpi=110)
    plt.close(fig)
    what = {
        'recipe': recipe.name,
        'seeds': [r['seed'] for r in records],
        'images': records[0]['images'],
        'settings': records[0]['settings'],
    }
    write_text(folder / 'report.json', json.dumps(what | numbers, indent=1) + '\n')
    write_text(folder / 'report.md', text)
    return text


def load(folder: Path) -> tuple[list[dict], list[dict]]:
    """The records of the complete seeds in `folder`, and those of the others, in the order of the seeds. Raises as
    `report` does.
    """
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder')
    records = list(read_records(folder).values())
    complete = [r for r in records if r['finished']]
    if not complete:
        raise ValueError(f'{folder} has no complete seed' + (f', and {len(records)} begun' if records else ''))
    if complete[0]['recipe'] not in RECIPES:
        raise ValueError(f'{folder} is of a recipe that is not known: {complete[0]["recipe"]}')
    for r in complete[1:]:
        for k in ('recipe', 'settings', 'images'):
            if r[k] == complete[0][k]:
                continue
            raise ValueError(
                f'{folder} mixes runs: seed {r["seed"]} has {k} {r[k]}, seed {complete[0]["seed"]} {complete[0][k]}'
            )
    return complete, [r for r in records if not r['finished']]


def is_of_budgets(folder) -> bool:
    "Does `folder` compare SGD and SWA at 1 and more budgets? Raises as `report` does."
    if has_landscapes(folder):
        return False
    recipe = RECIPES[load(Path(folder))[0][0]['recipe']]
    return not recipe.ensembles and not recipe.lengths


# the rows of the tables


class Row(NamedTuple):
    "What a row of a table reads off a record."

    run: str
    epochs: int
    average: str  # what its column begins with: '' for the weights in training


_REFRESHED = ', batch norm refreshed'
_BESIDE = {'third': 'mean of its last third', 'fifth': 'mean of its last fifth', 'ema': 'EMA over steps'}


def rows_of(record: dict) -> dict[str, Row]:
    "Name -> `Row`, in the order of the table."
    recipe, lengths = RECIPES[record['recipe']], _lengths(record)
    if recipe.lengths:
        return dict(sorted(_rows_of_lengths(record, lengths), key=lambda row: row[1].epochs))
    rows = {}
    for run in ('SGD 1B', 'SGD 1.5B'):
        rows[run] = Row(run, lengths[run], '')
        if _has_batch_norm(recipe):
            rows[run + _REFRESHED] = Row(run, lengths[run], 'swa_')
        rows |= _beside(record, run, run)
    budgets = {f'{b:g}B': int(record['budget'] * b) for b in (1, 1.25, 1.5)}
    for b, epochs in budgets.items():
        rows[f'SWA run at {b}, single weights'] = Row('SWA', epochs, '')
    for b, epochs in budgets.items():
        rows[f'SWA {b}'] = Row('SWA', epochs, 'swa_')
    rows |= _beside(record, 'SWA', 'SWA run at 1.5B')
    for run in lengths:
        if run.startswith('one-cycle'):
            rows |= {run: Row(run, lengths[run], ''), **_beside(record, run, run)}
    return rows


def _rows_of_lengths(record, lengths):
    has_batch_norm = _has_batch_norm(RECIPES[record['recipe']])
    for run, n in lengths.items():
        if run.startswith('SWA'):
            yield f'{run}, single weights', Row(run, n, '')
            yield run, Row(run, n, 'swa_')
        else:
            yield run, Row(run, n, '')
            if has_batch_norm:
                yield run + _REFRESHED, Row(run, n, 'swa_')
        yield from _beside(record, run, run).items()


def _lengths(record) -> dict[str, int]:
    "Run -> its number of epochs."
    res = {}
    for part in record['parts']:
        for run in part['runs']:
            res[run] = max(res.get(run, 0), part['end'])
    return res


def _beside(record, run, label) -> dict[str, Row]:
    "The averages beside a run, which are validated at its end."
    last = _epochs(record, run)[-1]
    return {
        f'{label}, {said}': Row(run, len(_epochs(record, run)), f'{name}_')
        for name, said in _BESIDE.items()
        if f'{name}_valid_loss' in last
    }


def _epochs(record, run) -> list[dict]:
    "The rows of the epochs of `run`, those included that it shares with others."
    parts = sorted((p for p in record['parts'] if run in p['runs']), key=lambda p: p['begin'])
    return [row for p in parts for row in p['epochs']]


def values(records: list[dict], name: str) -> dict[str, np.ndarray]:
    "Row of the table -> `name` ('error', in per cent, or 'valid_loss') for each seed; nan where it has no value."
    rows = rows_of(records[0])
    return {
        label: np.array([_value(r, row.run, row.epochs - 1, row.average, name) for r in records])
        for label, row in rows.items()
    }


def _value(record, run, epoch, average, name) -> float:
    row, metric = _epochs(record, run)[epoch], RECIPES[record['recipe']].metric
    value = row.get(average + (metric if name == 'error' else name))
    if value is None:
        return float('nan')
    return _error(value) if name == 'error' else value


def _error(metric: float) -> float:
    "In per cent: the samples read wrong, or the share of the variance that R2 leaves."
    return 100 * (1 - metric)


def _pairs(record) -> Iterator[tuple[str, str]]:
    "The rows whose differences answer a question."
    recipe = RECIPES[record['recipe']]
    if recipe.lengths:
        for n in sorted(set(_lengths(record).values())):
            plain = f'{recipe.opt} {n}'
            yield from (
                (f'SWA {n}', plain),
                (f'SWA {n}', plain + _REFRESHED),
                (f'SWA {n}', f'one-cycle {n}'),
                (plain + _REFRESHED, plain),
                (f'{plain}, EMA over steps', plain),
                (f'one-cycle {n}, mean of its last third', f'one-cycle {n}'),
                (f'one-cycle {n}, mean of its last third', f'one-cycle {n}{_REFRESHED}'),
                (f'one-cycle {n}', plain),
            )
        return
    yield from (
        ('SWA 1B', 'SGD 1B'),
        ('SWA 1B', f'SGD 1B{_REFRESHED}'),
        ('SWA 1.25B', 'SGD 1B'),
        ('SWA 1.5B', 'SGD 1B'),
        ('SWA 1.5B', 'SGD 1.5B'),
        ('SWA 1.5B', f'SGD 1.5B{_REFRESHED}'),
        ('SWA 1.5B', 'SWA run at 1.5B, single weights'),
        ('SGD 1.5B', 'SGD 1B'),
        ('SWA run at 1B, single weights', 'SGD 1B'),
        ('SWA run at 1.5B, single weights', 'SGD 1.5B'),
    )
    for b in ('1B', '1.5B'):
        yield from (
            (f'SWA {b}', f'one-cycle {b}'),
            (f'one-cycle {b}, mean of its last third', f'one-cycle {b}'),
            (f'one-cycle {b}, mean of its last third', f'SWA {b}'),
            (f'SGD {b}, EMA over steps', f'SGD {b}'),
        )


def _numbers(records, errors, losses, pairs) -> dict:
    rows = {
        name: {'epochs': row.epochs, 'error': summary(errors[name]), 'loss': summary(losses[name])}
        for name, row in rows_of(records[0]).items()
    }
    if 'baseline' in records[0]:
        found = [r['baseline'] for r in records]
        error, loss = np.array([_error(b['metric']) for b in found]), np.array([b['loss'] for b in found])
        rows[found[0]['name']] = {'error': summary(error), 'loss': summary(loss)}
    differences = {
        f'{a} - {b}': {
            'error': difference_summary(errors[a] - errors[b]),
            'loss': difference_summary(losses[a] - losses[b]),
        }
        for a, b in pairs
    }
    return {'rows': rows, 'differences': differences}


# the report


def _head(records, unfinished):
    first = records[0]
    recipe, settings, images = RECIPES[first['recipe']], first['settings'], first['images']
    n_train = 50_000 if recipe.images is None else recipe.images
    is_all = (images['train'], images['valid']) == (n_train, 10_000) or recipe.source == images['kind']
    if recipe.task is not None:
        is_all = (settings['images'], settings['test_images']) == (None, None)
    is_whole = settings['scale'] == 1 and is_all
    what = 'images' if recipe.task is None else 'samples'
    yield f'# {recipe.name}'
    said = [
        f'{_seeds(len(records))} ({", ".join(str(r["seed"]) for r in records)}); {images["kind"]}, {images["train"]:,} '
        'training and '
        f'{images["valid"]:,} test {what} (SHA-256 {images["sha256"]}...)'
    ]
    if not is_whole:
        said.append(
            f'**not at full length: lengths times {settings["scale"]:g}, {images["train"]:,} training {what}'
            + ': the published row is not reproduced' * bool(recipe.published)
            + '**'
        )
    if 'JPEG' in images['kind']:
        said.append("the images are JPEG-compressed: absolute errors are not comparable with the papers'")
    said += [
        f'{_hardware(records)}; {settings["precision"]}'
        + f', torch.compile {settings["compile"]}' * bool(settings['compile'])
        + '; '
        + _versions(records),
        f'{seconds_text(_seconds(records, False))} an epoch, {seconds_text(_seconds(records, True))} where the average '
        'is validated (medians)'
        + _side_by_side(records),
    ]
    said += [
        f'seed {r["seed"]}: the {run} run diverged, nothing of it is finite' for r in records for run in _diverged(r)
    ]
    said += [f'seed {r["seed"]} is not complete and not counted' for r in unfinished]
    yield '\n'.join(f'- {s}' for s in said)


def _sections(records, errors, losses, pairs):
    published = _published_errors(RECIPES[records[0]['recipe']])
    of_three = ' (n = 3)' * any(std for _, std in published.values())
    head = ['', 'epochs', f'{_error_name(records)} (n = {len(records)})', 'test loss']
    rows = [head + [f'published, %{of_three}'] * bool(published)]
    for name, row in rows_of(records[0]).items():
        cells = [name, str(row.epochs), spread(errors[name], 2), spread(losses[name], 4)]
        if published:
            cells.append(_published(published.get(name), errors[name], records[0]))
        rows.append(cells)
    if 'baseline' in records[0]:
        found = [r['baseline'] for r in records]
        cells = (
            spread(np.array([_error(b['metric']) for b in found]), 2),
            spread(np.array([b['loss'] for b in found]), 4),
        )
        rows.append([f'{found[0]["name"]} (scikit-learn)', '', *cells])
    yield table(rows)

    yield (
        'Paired differences, seed by seed, in points of error and in test loss (less is better):'
        if len(records) > 1
        else 'Differences in points of error and in test loss (less is better); one seed cannot tell them from chance:'
    )
    yield table(difference_rows(errors, pairs, 2, published or None, losses))
    yield '![test error and loss over the epochs](curves.png)'


def _published_errors(recipe) -> dict:
    "Row -> error in per cent and its standard deviation."
    return {name: (100 - mean, std) for name, (mean, std) in recipe.published.items()}


def _published(pair, errors, record):
    if pair is None:
        return ''
    if has_learned_nothing(errors, record):
        return f'learned nothing: chance is {100 - 100 / _n_classes(record):g}'
    return f'{pair[0]:.2f}' + ('' if pair[1] is None else f' +- {pair[1]:.2f}')


def has_learned_nothing(errors: np.ndarray, record: dict) -> bool:
    "Is the mean of `errors`, in per cent, within three standard errors of what guessing gets on the test images?"
    guessed = 1 / _n_classes(record)
    by_chance = (guessed * (1 - guessed) / record['images']['valid']) ** 0.5
    return bool(np.mean(errors) > 100 * (1 - guessed - 3 * by_chance))


def _n_classes(record):
    return RECIPES[record['recipe']].n_classes


def papers_table(folders) -> str:
    """The SWA paper's Table 1 (Izmailov et al. 2018) of `folders`, a line each: test accuracy in per cent, what was
    measured and, in brackets, what was published, as Markdown.

    Raises `ValueError` as `report` does. All must be as `is_of_budgets` says.
    """
    columns = 'SGD 1B', 'SWA 1B', 'SWA 1.25B', 'SWA 1.5B'
    rows = [['test accuracy, %', 'seeds', *columns]]
    for folder in folders:
        records = load(Path(folder))[0]
        recipe, errors = RECIPES[records[0]['recipe']], values(records, 'error')
        cells = [recipe.name, str(len(records))]
        for name in columns:
            if has_learned_nothing(errors[name], records[0]):
                cells.append('learned nothing')
            else:
                cells.append(spread(100 - errors[name], 2) + _in_brackets(recipe.published.get(name)))
        rows.append(cells)
    return table(rows)


def _in_brackets(published):
    if published is None:
        return ''
    mean, std = published
    return f' ({mean:.2f})' if std is None else f' ({mean:.2f} +- {std:.2f})'


def compare(folder, other) -> str:
    """The paired differences between two folders of `reproduce`, row by row, for the seeds that both have, as Markdown.

    Raises `ValueError` as `report` does, if their lengths differ, if they have no seed in common, or if they are of
    another kind.
    """
    if not all(map(is_of_budgets, (folder, other))):
        raise ValueError('only folders of SGD and SWA at several budgets are compared row by row')
    both = [{r['seed']: r for r in load(Path(f))[0]} for f in (folder, other)]
    seeds, names = sorted(both[0].keys() & both[1].keys()), [Path(f).name for f in (folder, other)]
    if not seeds:
        raise ValueError(f'{folder} and {other} have no seed in common')
    if len({r['budget'] for records in both for r in records.values()}) > 1:
        raise ValueError(f'{folder} and {other} are of different lengths')
    a, b = (values([records[s] for s in seeds], 'error') for records in both)
    errors = {f'{name}, {names[0]}': x for name, x in a.items()} | {f'{name}, {names[1]}': x for name, x in b.items()}
    pairs = [(f'{name}, {names[0]}', f'{name}, {names[1]}') for name in a if name in b and _REFRESHED not in name]
    return (
        f'Paired differences of {_seeds(len(seeds))}, in points of error:\n\n'
        + table(difference_rows(errors, pairs, 2))
        + '\n'
    )


# figures


def curves(records: list[dict], name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Curve -> its epochs (counted from 1: after so many), and `name` ('error', in per cent, or 'valid_loss') at each
    for each seed, shape (seeds, epochs)."""
    res, lengths = {}, _lengths(records[0])
    wanted = {
        'SGD 1B': ('SGD 1B', ''),
        'SGD 1.5B': ('SGD 1.5B', ''),
        'one-cycle 1.5B': ('one-cycle 1.5B', ''),
        'SWA run, single weights': ('SWA', ''),
        'SWA run, average': ('SWA', 'swa_'),
    }
    for label, (run, average) in wanted.items():
        if run not in lengths:
            continue
        all_epochs = np.array([[_value(r, run, e, average, name) for e in range(lengths[run])] for r in records])
        shown = ~np.isnan(all_epochs).all(0)
        res[label] = np.flatnonzero(shown) + 1, all_epochs[:, shown]
    return res


def _draw_runs(records, axs):
    for ax, name, label in zip(axs, ('error', 'valid_loss'), (_error_name(records), 'test loss')):
        plot_runs(curves(records, name), ax, label)


def _draw_lengths(records, axs):
    for ax, name, label in zip(axs, ('error', 'valid_loss'), (_error_name(records), 'test loss')):
        plot_lengths(curves_of_lengths(records, name), ax, label)


def _error_name(records):
    return 'test error, %' if RECIPES[records[0]['recipe']].metric == 'accuracy' else 'unexplained variance, %'


def curves_of_lengths(records: list[dict], name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    "Method -> the numbers of epochs trained, and `name` at the end of each for each seed, shape (seeds, lengths)."
    found, lengths = values(records, name), sorted(set(_lengths(records[0]).values()))
    plain = RECIPES[records[0]['recipe']].opt
    methods = {
        plain: plain + ' {}',
        f'{plain}, EMA over steps': plain + ' {}, EMA over steps',
        'one-cycle': 'one-cycle {}',
        'one-cycle, mean of its last third': 'one-cycle {}, mean of its last third',
        'SWA': 'SWA {}',
    }
    return {
        method: (np.array(lengths), np.stack([found[row.format(n)] for n in lengths], 1))
        for method, row in methods.items()
        if row.format(lengths[0]) in found
    }


# what the head says


def _seeds(n):
    return f'{n} seed{"s" * (n > 1)}'


def _hardware(records):
    def machine(r, h):
        return h['gpu'] if 'gpu' in h else f'CPU, {h["machine"]}, {r["threads"]} thread{"s" * (r["threads"] > 1)}'

    return '; '.join(dict.fromkeys(machine(r, s['hardware']) for r in records for s in r['sessions']))


def _versions(records):
    return ' / '.join(
        dict.fromkeys(', '.join(f'{k} {v}' for k, v in s['versions'].items()) for r in records for s in r['sessions'])
    )


def _side_by_side(records):
    jobs = sorted({s['jobs'] for r in records for s in r['sessions']})
    return '' if jobs == [1] else f', {" or ".join(map(str, jobs))} seeds side by side'


def _seconds(records, folds):
    rows = [row for r in records for p in r['parts'] for row in p['epochs']]
    return np.median([row['seconds'] for row in rows if (row.get('swa_valid_loss') is not None) == folds])


def _diverged(record):
    return [p['runs'][0] for p in record['parts'] if len(p['runs']) == 1 and p['epochs'][-1]['swa_valid_loss'] is None]


def _has_batch_norm(recipe):
    if recipe.network is None:
        return True
    with torch.device('meta'):
        model = recipe.network(recipe.n_classes)
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
