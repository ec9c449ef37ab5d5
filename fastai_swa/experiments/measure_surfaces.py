"""The loss surface around the weights that a recipe's seeds have left: measured seed by seed,
resumable."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, time

import numpy as np
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.metrics import error_rate
from fastcore.foundation import L, noop

from ..checkpoint import CheckpointCallback
from ..files import Lock
from ..landscape import Curve, line, plane, rays
from ..landscape.space import Space
from ..weights import read_index
from .machine import TimeIsUp, process_settings
from .recipe_learner import recipe_data, recipe_learner
from .recipes import RECIPES, Landscape
from .record import duration, find_record, snapshots_folder, weights_file
from .surface_record import SurfaceRecord, images_text

__all__ = ['measure_seed', 'check_solutions']


# the solutions


def check_solutions(recipe: Landscape, seed: int, solutions: Path) -> list[dict]:
    """The records of the seeds whose solutions number `seed` of `recipe` needs: one of the same
    number, or for a curve the pair 2n and 2n + 1.

    Raises `ValueError` if one is not there or not complete.
    """
    records = [_complete_record(recipe, s, solutions) for s in _seeds_of(recipe, seed)]
    if recipe.kind == 'plane':
        n = len(_trajectory(solutions, seed))
        if n < 3:
            raise ValueError(
                f'the SWA run in {solutions} has averaged {n} weights only, and a plane needs 3: reproduce '
                f'{recipe.base} with a greater scale'
            )
    return records


def _seeds_of(recipe, seed) -> tuple[int, ...]:
    return (2 * seed, 2 * seed + 1) if recipe.kind == 'curve' else (seed,)


def _complete_record(recipe, seed, solutions) -> dict:
    data = find_record(solutions, seed)
    if data is None:
        many = '1 seed' if seed == 0 else f'{seed + 1} seeds'
        raise ValueError(
            f'seed {seed} is missing in {solutions}: reproduce {recipe.base} with {many} makes it, or give --solutions'
        )
    if data['recipe'] != recipe.base:
        raise ValueError(f'{solutions} is of the recipe {data["recipe"]}, not {recipe.base}')
    if not data['finished']:
        raise ValueError(f'seed {seed} in {solutions} is not complete: reproduce {recipe.base} goes on with it')
    return data


def _trajectory(solutions: Path, seed: int) -> dict[str, Path]:
    "Name -> file of the weights that the SWA run has kept on its way, and of its last."
    folder = snapshots_folder(solutions, seed, 'SWA')
    try:
        index = read_index(folder)
    except FileNotFoundError:
        raise ValueError(
            f'{folder} is missing: the run is of an older version, which kept no weights on the way'
        ) from None
    record = find_record(solutions, seed)
    part = next(p for p in record['parts'] if p['runs'] == ['SWA'])
    path = {}
    for epoch, file in zip(index['epochs'], index['files']):
        path[f'epoch {part["begin"] + epoch + 1}'] = folder / file
    path.setdefault(f'epoch {part["end"]}', weights_file(solutions, seed, 'SWA'))
    return path


# a seed


@dataclass
class _Measuring:
    "What is under way: one seed of a recipe."

    recipe: Landscape  # scaled
    seed: int
    out: Path
    solutions: Path  # the folder with the weights
    learn: Learner
    watch: '_Watch'

    def weights(self, run: str, seed: int | None = None) -> Path:
        "The file of the weights at the end of a run of the seed, or of another `seed`."
        return weights_file(self.solutions, self.seed if seed is None else seed, run)

    def file(self, what: str) -> Path:
        return self.out / f'seed-{self.seed}.{what}'

    def growing(self, what: str) -> dict:
        "Further arguments of a measurement: its seed, its file, and what is told of its progress."
        return {'seed': self.seed, 'file': self.file(f'{what}.jsonl'), 'progress': self.watch.of(what)}


def measure_seed(
    recipe: Landscape,
    seed: int,
    out: Path,
    settings,
    source=None,
    threads: int | None = None,
    until: float = float('inf'),
    show=noop,
    *,
    solutions: Path,
) -> dict:
    """Measure what `recipe` says around the solutions number `seed` in the folder `solutions`, or
    go on with it.

    Each measurement is a file in `out` that grows point by point, seed-<seed>.<what>.jsonl;
    seed-<seed>.landscape.json says what was measured on what. At the end all go into the file of
    the row. `settings.images`, `settings.test_images`: on so many of each; default: those that the
    solutions were trained and tested on. Returns what was measured on what.

    Raises `TimeIsUp` if time does not suffice; `ValueError` if solutions are missing, or of other
    data, or a file is of another measurement; `OSError`; and what `cifar` raises. Nothing is lost
    by any of them.
    """
    records = check_solutions(recipe, seed, solutions)
    base = RECIPES[recipe.base]
    recipe = recipe.scaled(settings.scale)
    dls, images = _data_to_measure_on(base, settings, source, records[0], solutions)
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out / f'seed-{seed}')
    try:
        with process_settings(settings, threads):
            learn = recipe_learner(base, seed, settings, dls)
            learn.metrics = L(error_rate)
            record = SurfaceRecord(recipe, seed, out, settings, images, records)
            if not record.data['finished']:
                watch = _Watch(seed, until, show)
                _measure_all(_Measuring(recipe, seed, out, solutions, learn, watch), record)
        return record.data
    finally:
        lock.release()


def _data_to_measure_on(base, settings, source, trained: dict, solutions):
    """The data to measure on, and what they are of. Raises `ValueError` if they are not those of
    the record `trained`, or a part of them.
    """
    numbers = {}
    for name in ('images', 'test_images'):
        numbers[name] = getattr(settings, name) or trained['settings'][name]
    dls, images = recipe_data(base, source, replace(settings, **numbers))
    was = trained['images']
    is_a_part = images['kind'] == was['kind'] and images['train'] <= was['train']
    is_a_part_asked_for = is_a_part and (settings.images or settings.test_images)
    if images != was and not is_a_part_asked_for:
        raise ValueError(
            f'{solutions} was trained on {images_text(was)}, and these are {images_text(images)}: give the same'
        )
    return dls, images


def _measure_all(m: _Measuring, record: SurfaceRecord):
    measure = {'width': _measure_width, 'plane': _measure_plane, 'curve': _measure_curve}[m.recipe.kind]
    is_complete = False
    try:
        with m.learn.no_logging():
            measure(m)
        is_complete = True
    finally:
        record.end(m.watch, is_complete)


# what is measured


def _measure_width(m: _Measuring):
    both = {'SGD': m.weights('SGD 1B'), 'SWA': m.weights('SWA average')}
    weights, _ = Space(m.learn).load(both['SGD'], 'SGD')
    furthest = float(f'{2 * float(weights.double().norm()):.6g}')
    distances = np.linspace(0, furthest, m.recipe.n_distances + 1)[1:]
    rays(m.learn, both, n_rays=m.recipe.n_rays, distances=distances, **m.growing('rays'))
    line(m.learn, both, ts=m.recipe.n_line, **m.growing('line'))


def _measure_plane(m: _Measuring):
    path = _trajectory(m.solutions, m.seed)
    average = {'SWA': m.weights('SWA average')}
    names = list(path)
    of_path = {name: path[name] for name in (names[0], names[len(names) // 2], names[-1])}
    of_solutions = {'SGD': m.weights('SGD 1B'), **average, names[0]: path[names[0]]}
    n = m.recipe.n_plane
    plane(m.learn, of_path, n, marks=average, trajectory=path, **m.growing('trajectory'))
    plane(m.learn, of_solutions, n, **m.growing('solutions'))


def _measure_curve(m: _Measuring):
    ends = {f'seed {seed}': m.weights('SGD 1B', seed) for seed in _seeds_of(m.recipe, m.seed)}
    for kind in ('chain', 'bezier'):
        curve = _trained_curve(m, kind, ends)
        curve.evaluate(m.recipe.n_curve, **m.growing(f'{kind}-path'))
        if kind == 'chain':
            curve.straight(m.recipe.n_curve, **m.growing('line-path'))
        corners = {**curve.ends, 'bend': curve.bends[0]}
        on_curve = [curve.solution(t) for t in np.linspace(0, 1, 21)]
        plane(m.learn, corners, m.recipe.n_plane, trajectory=on_curve, **m.growing(f'{kind}-plane'))


def _trained_curve(m: _Measuring, kind: str, ends: dict) -> Curve:
    file = m.file(f'{kind}.pth')
    if file.exists():
        return Curve.load(file, m.learn)
    curve = Curve(m.learn, ends, kind=kind)
    cbs = [CheckpointCallback(file.with_suffix('.ckpt')), _EpochWatch(m.watch, kind)]
    curve.fit(m.recipe.epochs, m.recipe.lr, RECIPES[m.recipe.base].wd, cbs=cbs, seed=m.seed)
    curve.save(file)
    return curve


# time


class _Watch:
    """Says where a measurement stands, ends it when there is no time for another point or epoch,
    and counts both.
    """

    def __init__(self, seed: int, until: float, show: Callable):
        self.seed = seed
        self.until = until  # the `time.time()` by which it ends
        self.show = show
        self.steps = 0  # points and epochs so far
        self.longest = 0.0  # seconds that one of them took
        self.began = monotonic()

    @property
    def seconds(self) -> float:
        return monotonic() - self.began

    def of(self, what: str):
        "A `progress(done, total)` for the points of one measurement."
        times = []

        def progress(done, total):
            times.append(monotonic())
            self.step(times)
            self.steps += 1
            self.show(self.seed, f'seed {self.seed}  {what}  {done} of {total} points{left(total - done)}')

        def left(n):
            pace = (times[-1] - times[0]) / max(1, len(times) - 1)
            return f'  {duration(pace * n)} left' if pace else ''

        return progress

    def step(self, times: list[float]):
        "Raise `TimeIsUp` if there is none for another step; `times`: when the steps began."
        if len(times) > 1:
            self.longest = max(self.longest, times[-1] - times[-2])
        if time() + 1.2 * self.longest > self.until:
            raise TimeIsUp('there is no time for more')


class _EpochWatch(Callback):
    "Tells a `_Watch` of the epochs of a curve."

    __module__ = 'fastai_swa.experiments.landscapes'  # under which checkpoints know it
    order = 70  # behind the checkpoint of this moment

    def __init__(self, watch, what):
        self.watch = watch
        self.what = what
        self.times = []

    def before_epoch(self):
        self.times.append(monotonic())
        self.watch.step(self.times)
        self.watch.steps += 1
        self.watch.show(self.watch.seed, f'seed {self.watch.seed}  {self.what}  epoch {self.epoch} of {self.n_epoch}')
