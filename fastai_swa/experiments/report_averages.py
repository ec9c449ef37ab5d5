"""The part of a report that is on averages chosen after trainings: its tables, figures and numbers."""

import numpy as np

from ..plot import plot_differences, plot_lengths
from .choose_averages import LIVE
from .recipes import RECIPES
from .rows import REFRESHED, error_name, error_of
from .tables import difference_cell, difference_rows, differences, markdown_table, spread, summary

__all__ = ['sections', 'numbers', 'draw']

_LIVE = dict(zip(LIVE, ('SWA from {start}', 'EMA over steps', 'power EMA over steps')))


def sections(records: list[dict], found: list[dict]) -> list[str]:
    "The tables of the report. `found`: for each record, what `evaluate_seed` has found."
    errors, losses = _values(records, found)
    recipe = RECIPES[records[0]['recipe']]
    res = [_reservation(records, found)]
    for run in _schedules(found):
        res += [f'## {run}', markdown_table(_rows_of_schedule(run, errors, losses, error_name(recipe)))]
    pairs = _pairs_of_stops(found, recipe.metric)
    names = _names_of_stops(found, recipe.metric)
    rows = [['', f'{error_name(recipe)} (n = {len(found)})', 'test loss']]
    rows += [[name, spread(errors[name], 2), spread(losses[name], 4)] for name in names]
    res += [
        '## A constant rate, stopped and averaged, against one-cycle of that length',
        'Of the constant run the mean of its last epochs up to there; how many, was chosen.',
        markdown_table(rows),
        markdown_table(difference_rows(errors, pairs, 2, losses=losses)),
        '## What was chosen',
        markdown_table(_rows_of_choices(found, recipe.metric)),
        'Gains are in loss, or in points of the metric, over the last weights, their batch norm as training has left '
        'it; those that chose flatter. Starts and ends of windows are in epochs, means over the seeds.',
        '![differences of test error and loss](curves.png)',
    ]
    return res


def _reservation(records, found) -> str:
    images = records[0]['images']
    noise = RECIPES[records[0]['recipe']].averages.label_noise
    noisy = f' {100 * noise:g} % of the labels that are trained on are wrong, no other.' if noise else ''
    if len(found) > 1:
        said = (
            'Differences are paired, seed by seed, with 95 % intervals, in points of error and in loss: less is better.'
        )
    else:
        said = 'Differences are in points of error and in loss: less is better; one seed cannot tell them from chance.'
    run = next(iter(found[0]['runs'].values()))
    n = next(iter(run['choices'].values()))['n']
    return (
        f'Chosen on {images["choose"]:,} samples that are in no training, of {n} averages a run, and of all single '
        f'epochs; reported on the test set. Batch norm is refreshed on the whole training set, but for the last '
        f'weights as training has left them, the first row of each table.{noisy} {said}'
    )


# rows


def _rows_of_schedule(run: str, errors, losses, label: str) -> list[list[str]]:
    "Values, and differences from the last weights, as they are and with their batch norm refreshed."
    references = {'the last weights': run, 'these refreshed': run + REFRESHED}
    head = ['', f'{label} (n = {len(errors[run])})', 'test loss']
    for said in references:
        head += [f'error - {said}', f'loss - {said}']
    rows = [head]
    for name in _rows_of_run(errors, run):
        row = [_shown(name, run), spread(errors[name], 2), spread(losses[name], 4)]
        for reference in references.values():
            if name == reference:
                row += ['', '']
                continue
            row.append(difference_cell(errors[name] - errors[reference], 2))
            row.append(difference_cell(losses[name] - losses[reference], 4))
        rows.append(row)
    return rows


def _rows_of_run(values, run: str) -> list[str]:
    return [name for name in values if name == run or name.startswith(f'{run}, ')]


def _shown(name: str, run: str) -> str:
    return name.removeprefix(f'{run}, ') if name != run else 'last weights'


def _schedules(found) -> list[str]:
    "The runs of the greatest length."
    runs = found[0]['runs']
    longest = max(run['epochs'] for run in runs.values())
    return [name for name, run in runs.items() if run['epochs'] == longest]


def _label(row: str, run: str, record: dict) -> str:
    "What a row of a run is called in the tables."
    kind, _, column = row.partition(' ')
    by = f'by {column.removeprefix("valid_")}'
    if kind in _LIVE:
        start = record['swa_start'] / record['budget']
        return f'{run}, {_LIVE[kind].format(start=f"{start:g}")}'
    named = {
        'last': '',
        'refreshed': REFRESHED,
        'best': f', best epoch {by}',
        'mean': f', mean of the best epoch {by}',
        'chosen': f', chosen {by}',
    }
    return run + named[kind]


_ORDER = 'last', 'refreshed', 'best', 'mean', *LIVE, 'chosen'


def _values(records, found) -> tuple[dict, dict]:
    "Name of a row -> its test error, in per cent, for each seed; and the same of the test loss."
    errors, losses = {}, {}

    def add(name, results):
        tested = np.array([result['test'] for result in results], float)  # None: nan
        losses[name] = tested[:, 0]
        errors[name] = error_of(tested[:, 1])

    for run, of_run in found[0]['runs'].items():
        for row in sorted(of_run['rows'], key=lambda row: _ORDER.index(row.partition(' ')[0])):
            name = _label(row, run, records[0])
            add(name, [of_seed['runs'][run]['rows'][row] for of_seed in found])
        for end, columns in of_run.get('stopped', {}).items():
            for column in columns:
                results = [of_seed['runs'][run]['stopped'][end][column] for of_seed in found]
                add(_stopped(end, column), results)
    return errors, losses


def _stopped(end, column: str) -> str:
    return f'constant rate stopped at {end}, chosen by {column.removeprefix("valid_")}'


def _pairs_of_run(own: list[str], run: str) -> list[tuple[str, str]]:
    refreshed = run + REFRESHED
    pairs = [(name, run) for name in own if name != run]
    return pairs + [(name, refreshed) for name in own if name not in (run, refreshed)]


def _names_of_stops(found, metric) -> list[str]:
    "The rows at each length, one-cycle's first."
    names = {}
    for stopped, cycle in _pairs_of_stops(found, metric):
        length = cycle.partition(',')[0]
        names.setdefault(length, []).extend([cycle, stopped])
    res = []
    for of_length in names.values():
        res += sorted(set(of_length), key=lambda name: (not name.startswith('one-cycle'), of_length.index(name)))
    return res


def _pairs_of_stops(found, metric) -> list[tuple[str, str]]:
    pairs = []
    for run in found[0]['runs'].values():
        for end in run.get('stopped', {}):
            for column in ('valid_loss', metric):
                stopped = _stopped(end, column)
                cycle = f'one-cycle {end}'
                chosen = f'{cycle}, chosen by {column.removeprefix("valid_")}'
                pairs += [(stopped, cycle), (stopped, cycle + REFRESHED), (stopped, chosen)]
    return pairs


# what was chosen


_HEAD_OF_CHOICES = [
    'run',
    'chosen by',
    'the last weights',
    'windows',
    'EMAs',
    'start',
    'end',
    'gain where it was chosen',
    'gain on the test set',
    'worse there',
    'seconds to choose',
]


def _rows_of_choices(found, metric) -> list[list[str]]:
    rows = [_HEAD_OF_CHOICES]
    for run in found[0]['runs']:
        of_runs = [of_seed['runs'][run] for of_seed in found]
        rows += [_row_of_choices(run, of_runs, column) for column in ('valid_loss', metric)]
    return rows


def _row_of_choices(run: str, of_runs: list[dict], column: str) -> list[str]:
    "What was chosen by `column` in one run, over the seeds."
    chosen = [of_run['rows'][f'chosen {column}'] for of_run in of_runs]
    n_last = sum(not row['which'] for row in chosen)
    windows = np.array([row['which']['epochs'] for row in chosen if 'epochs' in row['which']], float)
    start, end = '', ''
    if len(windows):
        start, end = (f'{x:.1f}' for x in windows.mean(0))
    digits = 4 if column == 'valid_loss' else 2
    tested = _gains(of_runs, column, 'test')
    return [
        run,
        column.removeprefix('valid_'),
        f'{n_last} of {len(chosen)}',
        str(len(windows)),
        str(len(chosen) - n_last - len(windows)),
        start,
        end,
        spread(_gains(of_runs, column, 'choose'), digits),
        spread(tested, digits),
        f'{(tested < 0).sum()} of {len(chosen)}',
        f'{np.mean([of_run["choices"][column]["seconds"] for of_run in of_runs]):.0f}',
    ]


def _gains(of_runs: list[dict], column: str, place: str) -> np.ndarray:
    """By how much what was chosen by `column` is better than the last weights, for each seed; in points where that is
    not the loss. `place`: the samples, 'choose' or 'test'.
    """
    number, scale = (0, -1) if column == 'valid_loss' else (1, 100)
    ours = np.array([of_run['rows'][f'chosen {column}'][place][number] for of_run in of_runs], float)
    theirs = np.array([of_run['rows']['last'][place][number] for of_run in of_runs], float)
    return scale * (ours - theirs)


# numbers


def numbers(records: list[dict], found: list[dict]) -> dict:
    "What report.json holds of them."
    errors, losses = _values(records, found)
    rows = {name: {'error': summary(errors[name]), 'loss': summary(losses[name])} for name in errors}
    pairs = []
    for run in found[0]['runs']:
        pairs += _pairs_of_run(_rows_of_run(errors, run), run)
    pairs += _pairs_of_stops(found, RECIPES[records[0]['recipe']].metric)
    return {'rows': rows, 'differences': differences(errors, losses, pairs)}


# figure


def draw(records: list[dict], found: list[dict], axs):
    """On two axes the differences of error and loss from the last weights, batch norm refreshed; below, on two more,
    those of the constant rate, stopped at several lengths, from one-cycle of that length."""
    recipe = RECIPES[records[0]['recipe']]
    labels = error_name(recipe), 'test loss'
    for (above, below), values, label in zip(np.transpose(axs), _values(records, found), labels):
        groups = {}
        for run in _schedules(found):
            reference = values[run + REFRESHED]
            own = [name for name in _rows_of_run(values, run) if name not in (run, run + REFRESHED)]
            groups[run] = {_shown(name, run): values[name] - reference for name in own}
        plot_differences(groups, above, f'{label}: difference from the last weights')
        plot_lengths(_curves(values, found, recipe.metric), below, f'{label}: difference from one-cycle')
        below.axhline(0, color='0.4', lw=1)
    axs[0][1].set_yticklabels([])


def _curves(values, found, metric) -> dict:
    "Curve -> lengths, and the differences from the end of one-cycle, batch norm refreshed, at each for each seed."
    ends = next(list(run['stopped']) for run in found[0]['runs'].values() if 'stopped' in run)
    lengths = np.array([int(end) for end in ends])
    names = {}
    for column in ('valid_loss', metric):
        by = column.removeprefix('valid_')
        names[f'one-cycle, chosen by {by}'] = f'one-cycle {{}}, chosen by {by}'
        names[f'constant rate, chosen by {by}'] = _stopped('{}', column)
    res = {}
    for curve, name in names.items():
        at_each = [values[name.format(end)] - values[f'one-cycle {end}{REFRESHED}'] for end in ends]
        res[curve] = lengths, np.stack(at_each, 1)
    return res
