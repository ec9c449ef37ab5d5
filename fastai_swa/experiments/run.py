"""Runs a recipe: trains its seeds, or measures the loss surface around those of another recipe."""

import sys
from functools import partial
from pathlib import Path

import torch

from ..checks import check_known, check_positive
from .compare_ensembles import evaluate, is_compared
from .machine import process_settings
from .measure_surfaces import check_solutions
from .pool import STOPPED, attempt, side_by_side
from .progress import ProgressLines
from .recipe_learner import recipe_data, recipe_learner
from .recipes import LANDSCAPES, RECIPES, runs, scaled
from .record import Settings, check_record, read_records, what_is_run
from .train import run_seed

__all__ = ['reproduce', 'run_seed', 'STOPPED']


def reproduce(
    name: str,
    seeds: int = 1,
    out=None,
    source=None,
    settings: Settings = Settings(),
    jobs: int = 1,
    threads: int | None = None,
    until: float = float('inf'),
    stream=None,
    solutions=None,
) -> dict:
    """Train the recipe `name` with the seeds 0 to `seeds` - 1, or what earlier calls have left of
    them, into the folder `out`.

    A name in `LANDSCAPES` measures the loss surface around the weights that the seeds of another
    recipe have left.

    - `out`: default results/`name`; for each seed what `run_seed` writes, or `measure_seed`. More
      seeds join those that are there.
    - `solutions`: where the weights are that a landscape is of; default: the folder beside `out`
      that has the recipe's name.
    - `jobs`: so many seeds at a time, each in a process of its own; `threads`: of the CPU for each
      (default: an equal share).
    - `source`, `settings`, `until`: as in `run_seed`. `stream`: where a line of progress for each
      seed goes; default: stdout.

    A comparison of ensembles ends with `compare_ensembles.evaluate`. Returns seed -> one sentence for each
    seed that is not complete: why, and what to do. Raises `ValueError` for an unknown name,
    settings that cannot be used, and a folder whose seeds were run with others; and what `cifar`
    raises.
    """
    check_known('name', name, (*RECIPES, *LANDSCAPES))
    _check(settings)
    out, jobs, lines = Path(out or f'results/{name}'), min(jobs, seeds), ProgressLines(stream or sys.stdout)
    threads, recipe = threads or max(1, torch.get_num_threads() // jobs), None
    kwargs = {'out': out, 'settings': settings, 'source': source, 'threads': threads, 'until': until}
    if name in LANDSCAPES:
        kwargs['solutions'] = Path(solutions or out.parent / LANDSCAPES[name].base)
        for seed in range(seeds):
            check_solutions(LANDSCAPES[name], seed, kwargs['solutions'])
    else:
        if solutions is not None:
            raise ValueError(f'solutions are of width-, plane- and curve- only, and {name} trains its own')
        recipe = scaled(RECIPES[name], settings.scale)
        runs(recipe)  # raises where the scale leaves too little
        common = what_is_run(recipe, settings, recipe_data(recipe, source, settings)[1])
        for data in read_records(out).values():
            check_record(data, out, common)  # all of a folder are of one kind
        kwargs['jobs'] = jobs
    run = partial(attempt, name, **kwargs)
    outcomes = (
        {seed: run(seed, show=lines.show) for seed in range(seeds)}
        if jobs == 1
        else side_by_side(run, seeds, jobs, lines)
    )
    lines.end()
    missing = {seed: sentence for seed, sentence in outcomes.items() if sentence}
    if recipe is not None and recipe.ensembles and not missing and not is_compared(out, range(seeds)):
        _predict_together(recipe, out, range(seeds), settings, source, threads)
    return missing


def _check(settings):
    check_positive('scale', settings.scale)
    try:
        torch.empty(1, device=settings.device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'device {settings.device!r} cannot be used: {str(e).splitlines()[0]}') from None


def _predict_together(recipe, out, seeds, settings, source, threads):
    with process_settings(settings, threads):
        evaluate(out, seeds, recipe_learner(recipe, 0, settings, recipe_data(recipe, source, settings)[0]))
