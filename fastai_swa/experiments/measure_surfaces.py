"""The loss surface around the weights that a recipe's seeds have left: measured seed by seed,
resumable."""

from dataclasses import replace
from pathlib import Path
from time import monotonic, time

import numpy as np
from fastai.callback.core import Callback
from fastai.metrics import error_rate
from fastcore.foundation import L, noop

from ..checkpoint import CheckpointCallback
from ..connectivity import Curve
from ..files import Lock
from ..landscape import line, plane, rays
from ..weight_space import Space
from ..weights import read_index
from .machine import TimeIsUp, process_settings
from .recipe_learner import recipe_data, recipe_learner
from .recipes import RECIPES
from .record import duration, find_record, snapshots_folder, weights_file
from .surface_record import SurfaceRecord, images_text

__all__ = ['measure_seed', 'check_solutions']


def check_solutions(recipe, seed: int, solutions: Path) -> list[dict]:
    """The records of the seeds whose solutions number `seed` of `recipe` needs: one of the same
    number, or for a curve the pair 2n and 2n + 1.

    Raises `ValueError` if one is not there or not complete.
    """
    res = []
    for s in _seeds_of(recipe, seed):
        data = find_record(solutions, s)
        if data is None:
            many = f'{s + 1} seed{"s" * (s > 0)}'
            raise ValueError(
                f'seed {s} is missing in {solutions}: reproduce {recipe.base} with {many} makes it, or give --solutions'
            )
        if data['recipe'] != recipe.base:
            raise ValueError(f'{solutions} is of the recipe {data["recipe"]}, not {recipe.base}')
        if not data['finished']:
            raise ValueError(f'seed {s} in {solutions} is not complete: reproduce {recipe.base} goes on with it')
        res.append(data)
    if recipe.kind == 'plane' and (n := len(_trajectory(solutions, seed))) < 3:
        raise ValueError(
            f'the SWA run in {solutions} has averaged {n} weights only, and a plane needs 3: reproduce {recipe.base} '
            'with a greater scale'
        )
    return res


def _seeds_of(recipe, seed):
    return (2 * seed, 2 * seed + 1) if recipe.kind == 'curve' else (seed,)


def measure_seed(
    recipe,
    seed: int,
    out: Path,
    settings,
    source=None,
    threads: int | None = None,
    until: float = float('inf'),
    show=noop,
    solutions: Path | None = None,
) -> dict:
    """Measure what `recipe` says around the solutions number `seed` in the folder `solutions`
    (default: beside `out`), or go on with it.

    Each measurement is a file in `out` that grows point by point, seed-<seed>.<what>.jsonl;
    seed-<seed>.landscape.json says what was measured on what. At the end all go into the file of
    the row. `settings.images`, `settings.test_images`: on so many of each; default: those that the
    solutions were trained and tested on. Returns what was measured on what.

    Raises `TimeIsUp` if time does not suffice; `ValueError` if solutions are missing, or of other
    data, or a file is of another measurement; `OSError`; and what `cifar` raises. Nothing is lost
    by any of them.
    """
    solutions = Path(solutions or out.parent / recipe.base)
    records, base, recipe = (
        check_solutions(recipe, seed, solutions),
        RECIPES[recipe.base],
        recipe.scaled(settings.scale),
    )
    trained, used = records[0]['images'], records[0]['settings']
    numbers = {k: getattr(settings, k) or used[k] for k in ('images', 'test_images')}
    dls, images = recipe_data(base, source, replace(settings, **numbers))
    is_same = images == trained or settings.images or settings.test_images
    if not is_same or images['kind'] != trained['kind'] or images['train'] > trained['train']:
        raise ValueError(
            f'{solutions} was trained on {images_text(trained)}, and these are {images_text(images)}: give the same'
        )
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out / f'seed-{seed}')
    try:
        with process_settings(settings, threads):
            learn = recipe_learner(base, seed, settings, dls)
            learn.metrics = L(error_rate)
            note, watch, complete = (
                SurfaceRecord(recipe, seed, out, settings, images, records),
                _Watch(seed, until, show),
                False,
            )
            if note.data['finished']:
                return note.data
            try:
                with learn.no_logging():
                    {'width': _width, 'plane': _plane, 'curve': _curve}[recipe.kind](
                        recipe, seed, out, learn, solutions, watch
                    )
                complete = True
            finally:
                note.end(watch, complete)
            return note.data
    finally:
        lock.release()


def _width(recipe, seed, out, learn, solutions, watch):
    both = {'SGD': weights_file(solutions, seed, 'SGD 1B'), 'SWA': weights_file(solutions, seed, 'SWA average')}

    def measure(f, what, **kwargs):
        return f(learn, both, seed=seed, file=out / f'seed-{seed}.{what}.jsonl', progress=watch.of(what), **kwargs)

    furthest = 2 * float(Space(learn).load(both['SGD'], 'SGD')[0].double().norm())
    measure(
        rays,
        'rays',
        n_rays=recipe.n_rays,
        distances=np.linspace(0, float(f'{furthest:.6g}'), recipe.n_distances + 1)[1:],
    )
    measure(line, 'line', ts=recipe.n_line)


def _plane(recipe, seed, out, learn, solutions, watch):
    path, average = _trajectory(solutions, seed), {'SWA': weights_file(solutions, seed, 'SWA average')}
    names = list(path)

    def measure(what, three, **kwargs):
        plane(
            learn,
            three,
            recipe.n_plane,
            seed=seed,
            file=out / f'seed-{seed}.{what}.jsonl',
            progress=watch.of(what),
            **kwargs,
        )

    measure(
        'trajectory',
        {name: path[name] for name in (names[0], names[len(names) // 2], names[-1])},
        marks=average,
        trajectory=path,
    )
    measure('solutions', {'SGD': weights_file(solutions, seed, 'SGD 1B'), **average, names[0]: path[names[0]]})


def _trajectory(solutions, seed) -> dict:
    "Name -> file of the weights that the SWA run has kept on its way, and of its last."
    folder = snapshots_folder(solutions, seed, 'SWA')
    try:
        index = read_index(folder)
    except FileNotFoundError:
        raise ValueError(
            f'{folder} is missing: the run is of an older version, which kept no weights on the way'
        ) from None
    record = find_record(solutions, seed)
    begin, end = next((p['begin'], p['end']) for p in record['parts'] if p['runs'] == ['SWA'])
    path = {f'epoch {begin + e + 1}': folder / file for e, file in zip(index['epochs'], index['files'])}
    return path | ({} if f'epoch {end}' in path else {f'epoch {end}': weights_file(solutions, seed, 'SWA')})


def _curve(recipe, seed, out, learn, solutions, watch):
    ends, straight = (
        {f'seed {s}': weights_file(solutions, s, 'SGD 1B') for s in _seeds_of(recipe, seed)},
        np.linspace(0, 1, 21),
    )
    for kind in ('chain', 'bezier'):
        file = out / f'seed-{seed}.{kind}.pth'
        if file.exists():
            curve = Curve.load(file, learn)
        else:
            curve, checkpoint = Curve(learn, ends, kind=kind), CheckpointCallback(file.with_suffix('.ckpt'))
            curve.fit(
                recipe.epochs, recipe.lr, RECIPES[recipe.base].wd, cbs=[checkpoint, _EpochWatch(watch, kind)], seed=seed
            )
            curve.save(file)

        def measure(f, what, *args, **kwargs):
            f(*args, seed=seed, file=out / f'seed-{seed}.{what}.jsonl', progress=watch.of(what), **kwargs)

        measure(curve.evaluate, f'{kind}-path', recipe.n_curve)
        if kind == 'chain':
            measure(curve.straight, 'line-path', recipe.n_curve)
        on_it = [curve.solution(t) for t in straight]
        measure(plane, f'{kind}-plane', learn, {**curve.ends, 'bend': curve.bends[0]}, recipe.n_plane, trajectory=on_it)


class _Watch:
    """Says where a measurement stands, ends it when there is no time for another point or epoch,
    and counts both.
    """

    def __init__(self, seed, until, show):
        self.seed, self.until, self.show, self.steps, self.longest, self.began = seed, until, show, 0, 0.0, monotonic()

    @property
    def seconds(self):
        return monotonic() - self.began

    def of(self, what):
        times = []

        def progress(done, total):
            times.append(monotonic())
            self.step(times)
            self.steps += 1
            pace = (times[-1] - times[0]) / max(1, len(times) - 1)
            self.show(
                self.seed,
                f'seed {self.seed}  {what}  {done} of {total} points'
                + f'  {duration(pace * (total - done))} left' * bool(pace),
            )

        return progress

    def step(self, times):
        if len(times) > 1:
            self.longest = max(self.longest, times[-1] - times[-2])
        if time() + 1.2 * self.longest > self.until:
            raise TimeIsUp('there is no time for more')


class _EpochWatch(Callback):
    __module__ = 'fastai_swa.experiments.landscapes'  # under which checkpoints know it

    order = 70  # behind the checkpoint of this moment

    def __init__(self, watch, what):
        self.watch, self.what, self.times = watch, what, []

    def before_epoch(self):
        self.times.append(monotonic())
        self.watch.step(self.times)
        self.watch.steps += 1
        self.watch.show(self.watch.seed, f'seed {self.watch.seed}  {self.what}  epoch {self.epoch} of {self.n_epoch}')
