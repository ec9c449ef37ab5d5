"""What the seeds of a recipe have found: tables beside the published numbers, curves, and the same
numbers as JSON."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ..files import replacing
from ..plot import plot_lengths, plot_runs
from . import compare_ensembles, report_ensembles
from .recipes import RECIPES
from .record import read_records, seconds_text
from .report_surfaces import has_landscapes, report_landscapes
from .rows import REFRESHED, curves, curves_of_lengths, error_of, pairs_of, rows_of, values
from .store import write_report
from .tables import difference_rows, differences, spread, summary, table

__all__ = ['report', 'compare', 'papers_table', 'is_of_budgets', 'load']


def report(folder) -> str:
    """The report on the seeds that `reproduce` has left in `folder`, as Markdown; also written
    there as report.md, with its figures, and its numbers as report.json: 'rows', with mean,
    standard deviation and number of seeds of test error (in per cent) and test loss, and
    'differences' of pairs of rows, with mean, 95 % confidence interval and number of seeds. Seeds
    whose run diverged do not count there.

    Only complete seeds count. Raises `ValueError` if `folder` has none, if its file is damaged, or
    if its seeds are of different settings.
    """
    folder = Path(folder)
    if has_landscapes(folder):
        return report_landscapes(folder)
    records, unfinished = load(folder)
    recipe = RECIPES[records[0]['recipe']]
    fig, axs = plt.subplots(1, 2, figsize=(12, 4.8), layout='constrained')
    if recipe.ensembles:
        found = compare_ensembles.load(folder)
        unfinished += [r for r in records if r['seed'] not in found['seeds']]
        records = [r for r in records if r['seed'] in found['seeds']]
        sections, numbers = report_ensembles.sections(records, found), report_ensembles.numbers(found)
        report_ensembles.draw(found, axs)
    else:
        errors, losses = values(records, 'error'), values(records, 'valid_loss')
        sections, numbers = _sections(records, errors, losses), _numbers(records, errors, losses)
        _draw(records, axs)
    text = '\n\n'.join([*_head(records, unfinished), *sections]) + '\n'
    fig.suptitle(f'{recipe.name}, {_seeds(len(records))}' + ': mean and its 95 % interval' * (len(records) > 1))
    with replacing(folder / 'curves.png') as f:
        fig.savefig(f, format='png', dpi=110)
    plt.close(fig)
    write_report(folder, text, records, numbers)
    return text


def load(folder: Path) -> tuple[list[dict], list[dict]]:
    """The records of the complete seeds in `folder`, and those of the others, in the order of the
    seeds.

    Raises as `report` does.
    """
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder')
    records = list(read_records(folder).values())
    complete = [r for r in records if r['finished']]
    if not complete:
        raise ValueError(f'{folder} has no complete seed' + (f', and {len(records)} begun' if records else ''))
    first, *others = complete
    if first['recipe'] not in RECIPES:
        raise ValueError(f'{folder} is of a recipe that is not known: {first["recipe"]}')
    for r in others:
        for k in ('recipe', 'trained', 'settings', 'images'):
            if r.get(k) != first.get(k):
                was = f'seed {first["seed"]} {first.get(k)}'
                raise ValueError(f'{folder} mixes runs: seed {r["seed"]} has {k} {r.get(k)}, {was}')
    return complete, [r for r in records if not r['finished']]


def is_of_budgets(folder) -> bool:
    "Does `folder` compare SGD and SWA at 1 and more budgets? Raises as `report` does."
    if has_landscapes(folder):
        return False
    recipe = RECIPES[load(Path(folder))[0][0]['recipe']]
    return not recipe.ensembles and not recipe.lengths


# the head


def _head(records, unfinished):
    first = records[0]
    recipe, settings, images = RECIPES[first['recipe']], first['settings'], first['images']
    what = 'images' if recipe.task is None else 'samples'
    n_train, n_test = f'{images["train"]:,}', f'{images["valid"]:,}'
    yield f'# {recipe.name}'
    said = [
        f'{_seeds(len(records))} ({", ".join(str(r["seed"]) for r in records)}); {images["kind"]}, {n_train} training '
        f'and {n_test} test {what} (SHA-256 {images["sha256"]}...)'
    ]
    if not _is_whole(first):
        lost = ': the published row is not reproduced' if recipe.published else ''
        said.append(f'**not at full length: lengths times {settings["scale"]:g}, {n_train} training {what}{lost}**')
    if 'JPEG' in images['kind']:
        said.append("the images are JPEG-compressed: absolute errors are not comparable with the papers'")
    compiled = f', torch.compile {settings["compile"]}' if settings['compile'] else ''
    said.append(f'{_hardware(records)}; {settings["precision"]}{compiled}; {_versions(records)}')
    plain, folding = (seconds_text(_seconds(records, folds)) for folds in (False, True))
    said.append(f'{plain} an epoch, {folding} where the average is validated (medians){_side_by_side(records)}')
    said += [
        f'seed {r["seed"]}: the {run} run diverged, nothing of it is finite' for r in records for run in _diverged(r)
    ]
    if not recipe.ensembles:
        nothing = [name for name, x in values(records, 'error').items() if has_learned_nothing(x, first)]
        said += [f'**at chance, with nothing learned: {", ".join(nothing)}**'] if nothing else []
    said += [f'seed {r["seed"]} is not complete and not counted' for r in unfinished if not r['finished']]
    said += [f'seed {r["seed"]} is not yet compared with the others' for r in unfinished if r['finished']]
    yield '\n'.join(f'- {s}' for s in said)


def _is_whole(record) -> bool:
    "Was it run at its full length, on all that its recipe takes?"
    recipe, settings, images = RECIPES[record['recipe']], record['settings'], record['images']
    if recipe.task is not None:
        is_all = (settings['images'], settings['test_images']) == (None, None)
    else:
        is_all = (images['train'], images['valid']) == (recipe.images or 50_000, 10_000) or recipe.source == images[
            'kind'
        ]
    return settings['scale'] == 1 and is_all


def has_learned_nothing(errors: np.ndarray, record: dict) -> bool:
    """Is the mean of `errors`, in per cent, within three standard errors of what guessing gets?

    On images one of the classes at random; of a number to be predicted its mean. Of tables' classes
    it is not known.
    """
    recipe = RECIPES[record['recipe']]
    if recipe.metric == 'r2_score':
        return bool(np.nanmean(errors) >= 100)
    if recipe.n_classes is None:
        return False
    guessed = 1 / recipe.n_classes
    by_chance = (guessed * (1 - guessed) / record['images']['valid']) ** 0.5
    return bool(np.nanmean(errors) > 100 * (1 - guessed - 3 * by_chance))


def _seeds(n):
    return f'{n} seed{"s" * (n > 1)}'


def _hardware(records):
    def machine(r, h):
        return h['gpu'] if 'gpu' in h else f'CPU, {h["machine"]}, {r["threads"]} thread{"s" * (r["threads"] > 1)}'

    return '; '.join(dict.fromkeys(machine(r, s['hardware']) for r in records for s in r['sessions']))


def _versions(records):
    def text(versions):
        return ', '.join(f'{k} {v}' for k, v in versions.items())

    return ' / '.join(dict.fromkeys(text(s['versions']) for r in records for s in r['sessions']))


def _side_by_side(records):
    jobs = sorted({s['jobs'] for r in records for s in r['sessions']})
    return '' if jobs == [1] else f', {" or ".join(map(str, jobs))} seeds side by side'


def _seconds(records, folds):
    rows = [row for r in records for p in r['parts'] for row in p['epochs']]
    return np.median([row['seconds'] for row in rows if (row.get('swa_valid_loss') is not None) == folds])


def _diverged(record):
    last = {p['runs'][0]: p['epochs'][-1] for p in record['parts'] if len(p['runs']) == 1}
    return [run for run, row in last.items() if row['swa_valid_loss'] is None]


# tables and numbers


def _sections(records, errors, losses):
    recipe = RECIPES[records[0]['recipe']]
    published = {name: (100 - mean, std) for name, (mean, std) in recipe.published.items()}
    of_three = ' (n = 3)' if any(std for _, std in published.values()) else ''
    head = ['', 'epochs', f'{_error_name(recipe)} (n = {len(records)})', 'test loss']
    rows = [head + [f'published, %{of_three}'] if published else head]
    at_chance = {name for name in errors if has_learned_nothing(errors[name], records[0])}
    for name, row in rows_of(records[0]).items():
        cells = [name, str(row.epochs), spread(errors[name], 2), spread(losses[name], 4)]
        if published:
            cells.append(_published(published.get(name), name in at_chance, recipe))
        rows.append(cells)
    if 'baseline' in records[0]:
        name, error, loss = _baseline(records)
        rows.append([f'{name} (scikit-learn)', '', spread(error, 2), spread(loss, 4)])
    yield table(rows)

    if len(records) > 1:
        yield 'Paired differences, seed by seed, in points of error and in test loss (less is better):'
    else:
        yield 'Differences in points of error and in test loss (less is better); one seed cannot tell them from chance:'
    compared = {name: pair for name, pair in published.items() if name not in at_chance}
    yield table(difference_rows(errors, pairs_of(records[0]), 2, compared if published else None, losses))
    yield '![test error and loss over the epochs](curves.png)'


def _published(pair, is_at_chance, recipe):
    if pair is None:
        return ''
    if is_at_chance:
        return f'learned nothing: chance is {100 - 100 / recipe.n_classes:g}'
    mean, std = pair
    return f'{mean:.2f}' if std is None else f'{mean:.2f} +- {std:.2f}'


def _baseline(records) -> tuple[str, np.ndarray, np.ndarray]:
    "What another method gets on the same data: its name, error and loss for each seed."
    found = [r['baseline'] for r in records]
    return found[0]['name'], np.array([error_of(b['metric']) for b in found]), np.array([b['loss'] for b in found])


def _numbers(records, errors, losses) -> dict:
    rows = {}
    for name, row in rows_of(records[0]).items():
        rows[name] = {'epochs': row.epochs, 'error': summary(errors[name]), 'loss': summary(losses[name])}
    if 'baseline' in records[0]:
        name, error, loss = _baseline(records)
        rows[name] = {'error': summary(error), 'loss': summary(loss)}
    return {'rows': rows, 'differences': differences(errors, losses, pairs_of(records[0]))}


def papers_table(folders) -> str:
    """The SWA paper's Table 1 (Izmailov et al. 2018) of `folders`, a line each: test accuracy in
    per cent, what was measured and, in brackets, what was published, as Markdown. What was not run
    at full length, or on other images, has no brackets, and is said to be so.

    Raises `ValueError` as `report` does. All must be as `is_of_budgets` says.
    """
    columns = 'SGD 1B', 'SWA 1B', 'SWA 1.25B', 'SWA 1.5B'
    rows = [['test accuracy, %', 'seeds', *columns]]
    for folder in folders:
        records = load(Path(folder))[0]
        recipe, errors = RECIPES[records[0]['recipe']], values(records, 'error')
        is_comparable = _is_whole(records[0]) and 'JPEG' not in records[0]['images']['kind']
        cells = [recipe.name if is_comparable else f'{recipe.name} (not comparable)', str(len(records))]
        for name in columns:
            if has_learned_nothing(errors[name], records[0]):
                cells.append('learned nothing')
            else:
                published = recipe.published.get(name) if is_comparable else None
                cells.append(spread(100 - errors[name], 2) + _in_brackets(published))
        rows.append(cells)
    return table(rows)


def _in_brackets(published):
    if published is None:
        return ''
    mean, std = published
    return f' ({mean:.2f})' if std is None else f' ({mean:.2f} +- {std:.2f})'


def compare(folder, other) -> str:
    """The paired differences between two folders of `reproduce`, row by row, for the seeds that
    both have, as Markdown.

    Raises `ValueError` as `report` does, if their lengths differ, if they have no seed in common,
    or if they are of another kind.
    """
    if not all(map(is_of_budgets, (folder, other))):
        raise ValueError('only folders of SGD and SWA at several budgets are compared row by row')
    both = [{r['seed']: r for r in load(Path(f))[0]} for f in (folder, other)]
    seeds = sorted(both[0].keys() & both[1].keys())
    if not seeds:
        raise ValueError(f'{folder} and {other} have no seed in common')
    if len({r['budget'] for records in both for r in records.values()}) > 1:
        raise ValueError(f'{folder} and {other} are of different lengths')
    names = [Path(f).name for f in (folder, other)]
    if names[0] == names[1]:
        names = [str(folder), str(other)]
    a, b = (values([records[s] for s in seeds], 'error') for records in both)
    errors = {f'{name}, {names[0]}': x for name, x in a.items()} | {f'{name}, {names[1]}': x for name, x in b.items()}
    pairs = [(f'{name}, {names[0]}', f'{name}, {names[1]}') for name in a if name in b and REFRESHED not in name]
    rows = difference_rows(errors, pairs, 2)
    return f'Paired differences of {_seeds(len(seeds))}, in points of error:\n\n{table(rows)}\n'


# figures


def _draw(records, axs):
    recipe = RECIPES[records[0]['recipe']]
    read, draw = (curves_of_lengths, plot_lengths) if recipe.lengths else (curves, plot_runs)
    draw(read(records, 'error'), axs[0], _error_name(recipe))
    draw(read(records, 'valid_loss'), axs[1], 'test loss')


def _error_name(recipe):
    return 'test error, %' if recipe.metric == 'accuracy' else 'unexplained variance, %'
