"""Runs a recipe: trains its seeds, or measures the loss surface around those of another recipe."""

import sys
from difflib import get_close_matches
from pathlib import Path

import torch

from .jobs import SurfaceJob, TrainingJob, TransferJob
from .pool import STOPPED, run_all
from .progress import ProgressLines
from .recipes import LANDSCAPES, RECIPES
from .record import Settings
from .train import run_seed
from .transfers import TRANSFERS

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
    recipe have left; one in `TRANSFERS` fine-tunes, as `fine_tune_seed` says.

    - `out`: default results/`name`; for each seed what `run_seed` writes, or `measure_seed`. More
      seeds join those that are there.
    - `solutions`: where the weights are that a landscape is of; default: the folder beside `out`
      that has the recipe's name.
    - `jobs`: so many seeds at a time, each in a process of its own; `threads`: of the CPU for each
      (default: an equal share).
    - `source`, `settings`, `until`: as in `run_seed`. `stream`: where a line of progress for each
      seed goes; default: stdout.

    A comparison of ensembles ends with `compare_ensembles.evaluate`. Returns seed -> one sentence
    for each seed that is not complete: why, and what to do. Raises `ValueError` for an unknown name,
    settings that cannot be used, and a folder whose seeds were run with others; and what `cifar`
    raises.
    """
    _check_recipe(name)
    jobs = min(jobs, seeds)
    threads = threads or max(1, torch.get_num_threads() // jobs)
    kind = _kind_of_job(name)
    job = kind(
        name=name,
        seeds=range(seeds),
        out=Path(out or f'results/{name}'),
        settings=settings,
        source=source,
        threads=threads,
        until=until,
        jobs=jobs,
        solutions=solutions,
    )
    job.check()
    lines = ProgressLines(stream or sys.stdout)
    outcomes = run_all(job, lines)
    lines.end()
    missing = {seed: sentence for seed, sentence in outcomes.items() if sentence}
    if not missing:
        job.finish()
    return missing


def _kind_of_job(name: str):
    if name in LANDSCAPES:
        return SurfaceJob
    return TransferJob if name in TRANSFERS else TrainingJob


def _check_recipe(name: str):
    known = (*RECIPES, *TRANSFERS, *LANDSCAPES)
    if name in known:
        return
    near = get_close_matches(name, known)
    if not near:  # a network, or a data set
        near = [k for k in known if get_close_matches(name, k.split('-'))][:3]
    meant = f'did you mean {" or ".join(near)}? ' if near else ''
    raise ValueError(f'there is no recipe of the name {name!r}; {meant}`reproduce --list` prints all {len(known)}')
