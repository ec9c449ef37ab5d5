"""The recipes as a table, with their sizes and, where they were run, their times."""

from pathlib import Path

import torch

from .choose_averages import load_evaluations
from .machine import hardware_text
from .plan import parts, runs
from .recipes import LANDSCAPES, RECIPES, Landscape, Recipe
from .record import duration
from .store import stored
from .transfer_tasks import HalfOfClasses
from .transfers import TRANSFERS, Transfer

__all__ = ['listing']

_HEADER = 'recipe', 'parameters', 'images', 'epochs a seed', 'a seed took'


def listing(results='results') -> str:
    """All recipes, a line each: the network's parameters, training images (or rows), the epochs that a seed
    trains, and what a seed took, on what, in the runs that lie in the folder `results`.
    """
    results = Path(results)
    rows = [_HEADER]
    rows += [_of_recipe(recipe, results / name) for name, recipe in RECIPES.items()]
    rows += [_of_transfer(recipe, results / name) for name, recipe in TRANSFERS.items()]
    rows += [_of_landscape(landscape, results / name) for name, landscape in LANDSCAPES.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = []
    for row in rows:
        name, *sizes, took = row
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(sizes, widths[1:])), took]
        lines.append('  '.join(cells).rstrip())
    note = f'Times are medians of the runs in {results}/; small-... recipes are made for a CPU, the others for a GPU.'
    return '\n'.join([*lines, '', note])


def _of_recipe(recipe: Recipe, folder: Path) -> tuple:
    n_epochs = sum(part.end - part.begin for part in parts(runs(recipe)))
    records = stored(folder, 'training')
    seconds = {}
    for seed, record in records.items():
        seconds[seed] = sum(epoch['seconds'] for part in record['parts'] for epoch in part['epochs'])
    if recipe.averages:
        choosing = load_evaluations(folder)
        records = {seed: record for seed, record in records.items() if seed in choosing}
        seconds = {seed: seconds[seed] + _seconds_of_choosing(choosing[seed]) for seed in records}
    took = _took(records.values(), list(seconds.values()))
    return recipe.name, _n_parameters(recipe), _n_images(recipe), str(n_epochs), took


def _of_transfer(recipe: Transfer, folder: Path) -> tuple:
    records = stored(folder, 'transfer').values()
    took = _took(records, [sum(record['seconds'].values()) for record in records])
    if took == '-':
        took = f'about {recipe.minutes} min (CPU, 1 thread), not run here'
    task = recipe.task
    parameters, images = '-', 'all'
    if isinstance(task, HalfOfClasses):
        images = f'{task.n_train:,}'
        with torch.device('meta'):
            parameters = f'{sum(p.numel() for p in task.network_to_pretrain().parameters()):,}'
    return recipe.name, parameters, images, str(recipe.n_epochs), took


def _seconds_of_choosing(found: dict) -> float:
    return sum(run['seconds'] for run in found['runs'].values())


def _of_landscape(landscape: Landscape, folder: Path) -> tuple:
    records = stored(folder, 'landscape').values()
    seconds = [sum(session.get('seconds', 0) for session in record['sessions']) for record in records]
    of_curve = str(landscape.epochs) if landscape.kind == 'curve' else '-'
    return landscape.name, '-', '-', of_curve, _took(records, seconds)


def _n_parameters(recipe) -> str:
    if recipe.network is None:
        return '-'
    with torch.device('meta'):  # no memory is taken
        model = recipe.network(recipe.n_classes)
    return f'{sum(p.numel() for p in model.parameters()):,}'


def _n_images(recipe) -> str:
    if recipe.images is not None:
        return f'{recipe.images:,}'
    return '50,000' if 'cifar' in recipe.name else 'all'


def _took(records, seconds) -> str:
    if not seconds:
        return '-'
    record = next(iter(records))
    session = record['sessions'][-1]
    where = hardware_text(session['hardware'], session.get('threads', record.get('threads')))
    return f'{duration(sorted(seconds)[len(seconds) // 2])} ({where})'
