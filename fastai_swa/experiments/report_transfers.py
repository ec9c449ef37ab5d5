"""The report on transfer learning: what each way of making one model of fine-tunings is worth, on test images and on
shifted ones, and the numbers as report.json."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ..checks import counted
from ..plot import plot_differences
from .machine import hardware_text, versions_text
from .measure_transfers import BEST, FROZEN, TESTS, label_of
from .record import duration
from .rows import REFRESHED, error_of
from .store import write_figure, write_report
from .tables import difference_cell, differences, markdown_table, spread, summary
from .transfer_record import read_transfers
from .transfers import TRANSFERS, Transfer

__all__ = ['has_transfers', 'report_transfers']

_SOUPS = 'uniform', 'greedy', 'stock'


def has_transfers(folder) -> bool:
    "Is `folder` of transfer learning?"
    return bool(read_transfers(Path(folder)))


def report_transfers(folder: Path) -> str:
    """The report on what `reproduce` has found in `folder`, as Markdown; written there as report.md, too, with its
    figure and report.json.

    Only complete seeds count. Raises `ValueError` if there is none, if a file is damaged, or if seeds were run
    differently.
    """
    records = list(read_transfers(folder).values())
    complete = [record for record in records if record['finished']]
    if not complete:
        raise ValueError(f'{folder} has no complete seed, and {len(records)} begun')
    _check_alike(folder, complete)
    recipe = TRANSFERS[complete[0]['recipe']].scaled(complete[0]['settings']['scale'])
    values = _values(complete)
    text = '\n\n'.join([*_head(recipe, complete, records), *_sections(recipe, complete, values)]) + '\n'
    write_figure(folder / 'curves.png', _figure(recipe, complete, values))
    write_report(folder, text, complete, _report_numbers(recipe, values))
    return text


def _check_alike(folder, records):
    first, *others = records
    if first['recipe'] not in TRANSFERS:
        raise ValueError(f'{folder} is of a recipe that is not known: {first["recipe"]}')
    for record in others:
        for name in ('recipe', 'trained', 'settings', 'images'):
            if record[name] != first[name]:
                raise ValueError(
                    f'{folder} mixes runs: seed {record["seed"]} has {name} {record[name]}, '
                    f'seed {first["seed"]} {first[name]}'
                )


# values


def _values(records) -> dict:
    "Set of images -> 'error' (in per cent) and 'loss' -> name of a row -> its value for each seed; nan: there is none."
    names = {}  # as an ordered set
    for record in records:
        names.update(dict.fromkeys(record['rows']))
    names.update(dict.fromkeys(f'{how} soup' for how in _SOUPS))
    res = {}
    for images in TESTS:
        errors, losses = {}, {}
        for name in names:
            pairs = [record['rows'].get(name, {}).get(images, [None, None]) for record in records]
            tested = np.array(pairs, float)  # None: nan
            losses[name] = tested[:, 0]
            errors[name] = error_of(tested[:, 1])
        res[images] = {'error': errors, 'loss': losses}
    return res


def _rows_in_order(recipe: Transfer, values) -> list[str]:
    "The single models, then what is made of them."
    single = [FROZEN, *(label_of(recipe, run) for run in recipe.runs(0)), BEST]
    both = []
    for name in single:
        both += [name, name + REFRESHED]
    made = [
        *(f'{how} soup' for how in _SOUPS),
        'ensemble of the runs',
        'WiSE-FT',
        *(f'WiSE-FT, t chosen on {images.removeprefix("test ")} images' for images in TESTS[1:]),
        'EMA over its steps',
        'tail, averaged',
        'tail, single weights',
        'tail, single weights' + REFRESHED,
        'longer one-cycle',
        'longer one-cycle' + REFRESHED,
    ]
    return [name for name in [*both, *made] if name in values['test']['error']]


def _references(recipe: Transfer) -> list[str]:
    "What the others are compared with: the best run, and plain `fine_tune` at its usual rate."
    usual = label_of(recipe, recipe.runs(0)[0])
    return [BEST, BEST + REFRESHED, usual]


# the head


def _head(recipe, complete, records) -> list[str]:
    images = complete[0]['images']
    seeds = ', '.join(str(r['seed']) for r in complete)
    said = [
        f'{counted(len(complete), "seed")} ({seeds}); {images["kind"]}, {images["train"]:,} images to fine-tune on, '
        f'{images["choose"]:,} to choose on, {images["valid"]:,} to test on (SHA-256 {images["sha256"]}...)'
    ]
    if 'pretrain' in images:
        said.append(
            f'pretrained on {images["pretrain"]:,} images of the other classes, {recipe.pretrain_epochs} epochs of '
            f'one-cycle; a pretraining a seed'
        )
    said.append(_recipe_text(recipe))
    task = recipe.task
    said.append(
        f'shifted are the test images: blurred by {task.blur:g} pixels, or with noise of {task.noise:g} of the range'
    )
    settings = complete[0]['settings']
    if settings['scale'] != 1 or settings['images'] or settings['test_images']:
        said.append(f'**not at full size: lengths times {settings["scale"]:g}**')
    if 'JPEG' in images['kind']:
        said.append("the images are JPEG-compressed: absolute errors are not comparable with the papers'")
    said.append(_machine_text(complete))
    said += [f'seed {r["seed"]} is not complete and not counted' for r in records if not r['finished']]
    return [f'# {recipe.name}', '\n'.join(f'- {sentence}' for sentence in said)]


def _recipe_text(recipe) -> str:
    return (
        f'{counted(recipe.freeze_epochs, "frozen epoch")}, then {counted(len(recipe.runs(0)), "fine-tuning")} of '
        f'{counted(recipe.epochs, "epoch")} from there; the tail takes {recipe.tail_epochs} at a constant rate of '
        f'{recipe.tail_rate:g} of the best run\'s highest'
    )


def _machine_text(records) -> str:
    machines, versions = {}, {}  # as ordered sets
    seconds = []
    for record in records:
        seconds.append(sum(record['seconds'].values()))
        for session in record['sessions']:
            machines[hardware_text(session['hardware'], record['threads'])] = None
            versions[versions_text(session['versions'])] = None
    took = duration(float(np.median(seconds)))
    precision = records[0]['settings']['precision']
    return f'{"; ".join(machines)}; {precision}; {took} a seed (median); {" / ".join(versions)}'


# tables


def _sections(recipe, records, values) -> list[str]:
    if len(records) > 1:
        said = (
            'Differences are paired, seed by seed, with 95 % intervals, in points of error and in loss: less is better.'
        )
    else:
        said = 'Differences are in points of error and in loss: less is better; one seed cannot tell them from chance.'
    res = [
        f'The best run is that with the best {recipe.metric} on the images to choose on, by which the greedy soup and '
        f"WiSE-FT's t are chosen, too; nothing is chosen on test images. Batch norm is refreshed on the whole training "
        f'set, but in the rows of single models without that note, and in the ensemble, which predicts '
        f'{len(recipe.runs(0))} times. {said}',
        markdown_table(_rows_of_values(recipe, values, len(records))),
    ]
    for images in TESTS:
        res += [f'## Differences on {images} images', markdown_table(_rows_of_differences(recipe, values[images]))]
    return [
        *res,
        '## What was chosen',
        markdown_table(_rows_of_choices(recipe, records)),
        *_refusals(records),
        '![differences from the best single run](curves.png)',
    ]


def _rows_of_values(recipe, values, n) -> list[list[str]]:
    head = [f'(n = {n})', 'epochs']
    for images in TESTS:
        head += [f'{images} error, %', f'{images} loss']
    rows = [head]
    for name in _rows_in_order(recipe, values):
        row = [name, str(_epochs_of(recipe, name))]
        for images in TESTS:
            row.append(_cell(values[images]['error'][name], 2))
            row.append(_cell(values[images]['loss'][name], 4))
        rows.append(row)
    return rows


def _cell(x, digits) -> str:
    return spread(x, digits) if np.isfinite(x).any() else 'none'


def _epochs_of(recipe, name: str) -> int:
    "Of all fine-tuning, the frozen stage aside, that a row needs, the runs among which the best is found included."
    if name.startswith(FROZEN):
        return 0
    if name.startswith('fine_tune'):
        return recipe.epochs
    everything = len(recipe.runs(0)) * recipe.epochs
    if name.startswith('tail'):
        return everything + recipe.tail_epochs
    if name.startswith('longer'):
        return everything + recipe.epochs + recipe.tail_epochs
    return everything


def _rows_of_differences(recipe, of_images) -> list[list[str]]:
    references = _references(recipe)
    head = ['']
    for reference in references:
        head += [f'error - {reference}', f'loss - {reference}']
    rows = [head]
    for name in _rows_in_order(recipe, {'test': of_images}):
        if name.startswith('fine_tune') and name != references[-1]:
            continue
        row = [name]
        for reference in references:
            for what, digits in (('error', 2), ('loss', 4)):
                difference = of_images[what][name] - of_images[what][reference]
                row.append('' if name == reference else difference_cell(difference, digits))
        rows.append(row)
    return rows


def _rows_of_choices(recipe, records) -> list[list[str]]:
    rows = [['seed', 'best run', *(f'{how} soup' for how in _SOUPS), *_names_of_t(records)]]
    for record in records:
        best = next(run['label'] for run in record['runs'] if run['name'] == record['best'])
        cells = [str(record['seed']), best]
        for how in _SOUPS:
            soup = record['soups'][how]
            cells.append('refused' if soup['refused'] else counted(len(soup['members']), 'run'))
        chosen = record['wise']['chosen']
        rows.append(cells + [f'{t:g}' for t in chosen.values()])
    return rows


def _names_of_t(records) -> list[str]:
    names = []
    for images in records[0]['wise']['chosen']:
        on = images.removeprefix('choose').strip()
        names.append(f't, {on}' if on else 't')
    return names


def _refusals(records) -> list[str]:
    said = []
    for record in records:
        for how, soup in record['soups'].items():
            if soup['refused']:
                said.append(f'- seed {record["seed"]}, {how}: {soup["refused"]}')
    return ['Refused soups:', '\n'.join(said)] if said else []


# numbers and figure


def _key(what: str, images: str) -> str:
    "In report.json: 'error' and 'loss' are those of the test images as they are."
    return what if images == 'test' else f'{what}, {images.removeprefix("test ")}'


def _report_numbers(recipe, values) -> dict:
    rows, pairs = {}, []
    for name in _rows_in_order(recipe, values):
        rows[name] = {}
        for images in TESTS:
            for what in ('error', 'loss'):
                rows[name][_key(what, images)] = summary(values[images][what][name])
        pairs += [(name, reference) for reference in _references(recipe) if name != reference]
    compared = {}
    for images in TESTS:
        for pair, found in differences(values[images]['error'], values[images]['loss'], pairs).items():
            compared.setdefault(pair, {}).update({_key(what, images): x for what, x in found.items()})
    return {'rows': rows, 'differences': compared}


def _figure(recipe, records, values):
    "Differences of error and loss from the best run, its batch norm refreshed, for each set of images."
    reference = BEST + REFRESHED
    names = _rows_in_order(recipe, values)
    made = [name for name in names[names.index(reference) + 1 :] if np.isfinite(values['test']['error'][name]).any()]
    fig, axs = plt.subplots(1, 2, figsize=(12, 7.5), layout='constrained')
    for ax, what, label in zip(axs, ('error', 'loss'), ('error, %', 'loss')):
        groups = {}
        for images in TESTS:
            of_images = values[images][what]
            shown = [name for name in made if np.isfinite(of_images[name] - of_images[reference]).all()]
            groups[images] = {name: of_images[name] - of_images[reference] for name in shown}
        plot_differences(groups, ax, f'{label}: difference from the best single run')
    axs[1].set_yticklabels([])
    title = f'{recipe.name}, {counted(len(records), "seed")}'
    fig.suptitle(title + (': mean and its 95 % interval' if len(records) > 1 else ''))
    return fig
