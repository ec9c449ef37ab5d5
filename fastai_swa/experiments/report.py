"""What the seeds of a recipe have found: tables beside the published numbers, curves, and the same
numbers as JSON."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ..checks import counted
from . import report_averages, report_ensembles, report_trainings
from .choose_averages import load_evaluations
from .compare_ensembles import load_comparison
from .machine import hardware_text, versions_text
from .recipes import RECIPES
from .record import read_records, seconds_text
from .report_surfaces import has_surfaces, report_surfaces
from .report_trainings import has_learned_nothing
from .report_transfers import has_transfers, report_transfers
from .rows import REFRESHED, values
from .store import write_figure, write_report
from .tables import difference_rows, markdown_table, spread

__all__ = ['report', 'compare', 'papers_table', 'is_of_budgets', 'load_records']


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
    if has_surfaces(folder):
        return report_surfaces(folder)
    if has_transfers(folder):
        return report_transfers(folder)
    records, unfinished = load_records(folder)
    recipe = RECIPES[records[0]['recipe']]
    if recipe.ensembles:
        found = load_comparison(folder)
        unfinished += [r for r in records if r['seed'] not in found['seeds']]
        records = [r for r in records if r['seed'] in found['seeds']]
        sections = report_ensembles.sections(records, found)
        numbers = report_ensembles.numbers(found)
    elif recipe.averages:
        evaluations = load_evaluations(folder)
        unfinished += [r for r in records if r['seed'] not in evaluations]
        records = [r for r in records if r['seed'] in evaluations]
        if not records:
            raise ValueError(f'{folder} has no seed whose averages are chosen: the same reproduce command goes on')
        found = [evaluations[r['seed']] for r in records]
        sections = report_averages.sections(records, found)
        numbers = report_averages.numbers(records, found)
    else:
        sections = report_trainings.sections(records)
        numbers = report_trainings.numbers(records)
    text = '\n\n'.join([*_head(records, unfinished), *sections]) + '\n'

    n_rows = 2 if recipe.lengths or recipe.averages else 1
    fig, axs = plt.subplots(n_rows, 2, figsize=(12, 4.8 * n_rows), layout='constrained')
    if recipe.ensembles:
        report_ensembles.draw(found, axs)
    elif recipe.averages:
        report_averages.draw(records, found, axs)
    else:
        report_trainings.draw(records, axs)
    title = f'{recipe.name}, {counted(len(records), "seed")}'
    if len(records) > 1:
        title += ': mean and its 95 % interval'
    fig.suptitle(title)
    write_figure(folder / 'curves.png', fig)
    write_report(folder, text, records, numbers)
    return text


# what a folder holds


def load_records(folder: Path) -> tuple[list[dict], list[dict]]:
    """The records of the complete seeds in `folder`, and those of the others, in the order of the
    seeds.

    Raises as `report` does.
    """
    if not folder.is_dir():
        raise ValueError(f'{folder} is no folder')
    records = list(read_records(folder).values())
    complete = [r for r in records if r['finished']]
    unfinished = [r for r in records if not r['finished']]
    if not complete:
        begun = f', and {len(records)} begun' if records else ''
        raise ValueError(f'{folder} has no complete seed{begun}')
    _check_alike(folder, complete)
    return complete, unfinished


def _check_alike(folder, records):
    first, *others = records
    if first['recipe'] not in RECIPES:
        raise ValueError(f'{folder} is of a recipe that is not known: {first["recipe"]}')
    for record in others:
        for name in ('recipe', 'trained', 'settings', 'images'):
            value = record.get(name)
            first_value = first.get(name)
            if value != first_value:
                raise ValueError(
                    f'{folder} mixes runs: seed {record["seed"]} has {name} {value}, seed {first["seed"]} {first_value}'
                )


def is_of_budgets(folder) -> bool:
    "Does `folder` compare SGD and SWA at 1 and more budgets? Raises as `report` does."
    if has_surfaces(folder) or has_transfers(folder):
        return False
    complete, _ = load_records(Path(folder))
    recipe = RECIPES[complete[0]['recipe']]
    return not recipe.ensembles and not recipe.lengths and not recipe.averages and not recipe.tails


# the head


def _head(records, unfinished) -> list[str]:
    "The title, and what the numbers are of and what they are not."
    said = [
        _data_text(records),
        *_reservations(records[0]),
        _machine_text(records),
        _seconds_of_epochs_text(records),
        *_failures(records),
        *_not_counted(unfinished),
    ]
    return [f'# {records[0]["recipe"]}', '\n'.join(f'- {sentence}' for sentence in said)]


def _data_text(records) -> str:
    images = records[0]['images']
    seeds = ', '.join(str(r['seed']) for r in records)
    return (
        f'{counted(len(records), "seed")} ({seeds}); {images["kind"]}, {images["train"]:,} training and '
        f'{images["valid"]:,} test {_samples_noun(records[0])} (SHA-256 {images["sha256"]}...)'
    )


def _samples_noun(record) -> str:
    return 'images' if RECIPES[record['recipe']].task is None else 'samples'


def _reservations(record) -> list[str]:
    said = []
    images = record['images']
    if not _is_whole(record):
        lost = ': the published row is not reproduced' if RECIPES[record['recipe']].published else ''
        said.append(
            f'**not at full length: lengths times {record["settings"]["scale"]:g}, {images["train"]:,} training '
            f'{_samples_noun(record)}{lost}**'
        )
    if 'weights' in images:
        said.append(f'the weights at the beginning: {images["weights"]}')
    note = RECIPES[record['recipe']].note
    if note:
        said.append(note)
    if 'JPEG' in images['kind']:
        said.append("the images are JPEG-compressed: absolute errors are not comparable with the papers'")
    return said


def _is_whole(record) -> bool:
    "Was it run at its full length, on all that its recipe takes?"
    recipe = RECIPES[record['recipe']]
    settings = record['settings']
    images = record['images']
    if settings['scale'] != 1:
        return False
    if recipe.task is not None:
        takes_all = (settings['images'], settings['test_images']) == (None, None)
        return takes_all and (not recipe.tails or images['kind'] == 'ImageNet')
    all_images = recipe.images or 50_000, 10_000
    return (images['train'], images['valid']) == all_images or images['kind'] == recipe.source


def _machine_text(records) -> str:
    machines = {}  # as ordered sets
    versions = {}
    for record in records:
        for session in record['sessions']:
            machines[hardware_text(session['hardware'], record['threads'])] = None
            versions[versions_text(session['versions'])] = None
    settings = records[0]['settings']
    compiled = f', torch.compile {settings["compile"]}' if settings['compile'] else ''
    return f'{"; ".join(machines)}; {settings["precision"]}{compiled}; {" / ".join(versions)}'


def _seconds_of_epochs_text(records) -> str:
    plain = []
    with_average = []
    for record in records:
        for part in record['parts']:
            for row in part['epochs']:
                seconds = plain if row.get('swa_valid_loss') is None else with_average
                seconds.append(row['seconds'])
    return (
        f'{seconds_text(np.median(plain))} an epoch, {seconds_text(np.median(with_average))} where the average is '
        f'validated (medians){_side_by_side_text(records)}'
    )


def _side_by_side_text(records) -> str:
    jobs = set()
    for record in records:
        jobs.update(session['jobs'] for session in record['sessions'])
    if jobs == {1}:
        return ''
    return f', {" or ".join(map(str, sorted(jobs)))} seeds side by side'


def _failures(records) -> list[str]:
    said = []
    for record in records:
        for run in _diverged(record):
            said.append(f'seed {record["seed"]}: the {run} run diverged, nothing of it is finite')
    recipe = RECIPES[records[0]['recipe']]
    if recipe.ensembles or recipe.averages:
        return said
    errors = values(records, 'error')
    at_chance = [name for name in errors if has_learned_nothing(errors[name], records[0])]
    if at_chance:
        said.append(f'**at chance, with nothing learned: {", ".join(at_chance)}**')
    return said


def _diverged(record) -> list[str]:
    "The runs whose average has no value at their end."
    res = []
    for part in record['parts']:
        if len(part['runs']) == 1 and part['epochs'][-1]['swa_valid_loss'] is None:
            res.append(part['runs'][0])
    return res


def _not_counted(unfinished) -> list[str]:
    incomplete = [f'seed {r["seed"]} is not complete and not counted' for r in unfinished if not r['finished']]
    to_compare = [f'seed {r["seed"]} is not yet {_next_step(r)}' for r in unfinished if r['finished']]
    return incomplete + to_compare


def _next_step(record) -> str:
    return 'evaluated' if RECIPES[record['recipe']].averages else 'compared with the others'


# several folders


def papers_table(folders) -> str:
    """The SWA paper's Table 1 (Izmailov et al. 2018) of `folders`, a line each: test accuracy in
    per cent, what was measured and, in brackets, what was published, as Markdown. What was not run
    at full length, or on other images, has no brackets, and is said to be so.

    Raises `ValueError` as `report` does. All must be as `is_of_budgets` says.
    """
    rows = [['test accuracy, %', 'seeds', 'SGD 1B', 'SWA 1B', 'SWA 1.25B', 'SWA 1.5B']]
    for folder in folders:
        records, _ = load_records(Path(folder))
        recipe = RECIPES[records[0]['recipe']]
        is_comparable = _is_whole(records[0]) and 'JPEG' not in records[0]['images']['kind']
        published = recipe.published if is_comparable else {}
        errors = values(records, 'error')
        swa = recipe.swa_label
        columns = 'SGD 1B', f'{swa} 1B', f'{swa} 1.25B', f'{swa} 1.5B'
        cells = [_accuracy_cell(errors[name], published.get(name), records[0]) for name in columns]
        name = recipe.name
        if swa != 'SWA':
            name += f' ({swa})'
        if not is_comparable:
            name += ' (not comparable)'
        rows.append([name, str(len(records)), *cells])
    return markdown_table(rows)


def _accuracy_cell(errors, published, record) -> str:
    if has_learned_nothing(errors, record):
        return 'learned nothing'
    measured = spread(100 - errors, 2)
    if published is None:
        return measured
    mean, std = published
    if std is None:
        return f'{measured} ({mean:.2f})'
    return f'{measured} ({mean:.2f} +- {std:.2f})'


def compare(folder, other) -> str:
    """The paired differences between two folders of `reproduce`, row by row, for the seeds that
    both have, as Markdown.

    Raises `ValueError` as `report` does, if their lengths differ, if they have no seed in common,
    or if they are of another kind.
    """
    if not is_of_budgets(folder) or not is_of_budgets(other):
        raise ValueError('only folders of SGD and SWA at several budgets are compared row by row')
    one = _by_seed(folder)
    two = _by_seed(other)
    seeds = sorted(one.keys() & two.keys())
    if not seeds:
        raise ValueError(f'{folder} and {other} have no seed in common')
    budgets = {record['budget'] for record in (*one.values(), *two.values())}
    if len(budgets) > 1:
        raise ValueError(f'{folder} and {other} are of different lengths')
    is_named_alike = Path(folder).name == Path(other).name
    labels = [str(f) if is_named_alike else Path(f).name for f in (folder, other)]
    of_one = values([one[seed] for seed in seeds], 'error')
    of_two = values([two[seed] for seed in seeds], 'error')
    errors = {}
    pairs = []
    for name in of_one:
        if name in of_two and REFRESHED not in name:
            pair = f'{name}, {labels[0]}', f'{name}, {labels[1]}'
            errors[pair[0]] = of_one[name]
            errors[pair[1]] = of_two[name]
            pairs.append(pair)
    table = markdown_table(difference_rows(errors, pairs, 2))
    return f'Paired differences of {counted(len(seeds), "seed")}, in points of error:\n\n{table}\n'


def _by_seed(folder) -> dict[int, dict]:
    complete, _ = load_records(Path(folder))
    return {record['seed']: record for record in complete}
