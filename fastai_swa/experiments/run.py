"""Runs a recipe: seed by seed, resumable, on `Learner` with `SWACallback` and `CheckpointCallback`."""

import gc
import os
import re
import shutil
import sys
import traceback
from functools import partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from threading import Thread
from time import monotonic, time

import torch
from fastai.callback.core import Callback, CancelFitException
from fastcore.foundation import noop

from ..averaging import ema
from ..callback import SWACallback
from ..checkpoint import CheckpointCallback
from ..checks import check_known, check_positive
from ..files import InUse, Lock
from ..holders import named_callbacks
from ..learner import EpochScheduler
from ..passes import autocast_left
from ..snapshots import SnapshotCallback
from ..state import restore
from .compare_ensembles import evaluate, is_compared
from .measure_surfaces import check_solutions, measure_seed
from .recipe_learner import TimeIsUp, recipe_data, recipe_learner, settings_restored
from .recipes import LANDSCAPES, RECIPES, Recipe, runs, scaled
from .record import Record, Settings, check_record, read_records, what_is_run

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
    out, jobs, lines = Path(out or f'results/{name}'), min(jobs, seeds), _Lines(stream or sys.stdout)
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
    attempt = partial(_attempt, name, **kwargs)
    outcomes = (
        {seed: attempt(seed, show=lines.show) for seed in range(seeds)}
        if jobs == 1
        else _side_by_side(attempt, seeds, jobs, lines)
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
    with settings_restored():
        if settings.device == 'cpu':
            torch.set_num_threads(threads)
        evaluate(out, seeds, recipe_learner(recipe, 0, settings, recipe_data(recipe, source, settings)[0]))


def run_seed(
    recipe: Recipe,
    seed: int,
    out: Path,
    settings: Settings = Settings(),
    source=None,
    threads: int | None = None,
    until: float = float('inf'),
    show=noop,
    jobs: int = 1,
) -> dict:
    """Train all runs of `recipe` with one seed, or what an earlier call has left of them; returns
    the record that `out`/runs.jsonl then holds.

    The runs share the epochs before they part. While it goes on, seed-<seed>.json, a checkpoint and
    the states at the forks stand beside the file; at the end the weights at the end of each run,
    and the average of a run named SWA, as state dicts: seed-<seed>-<run>.pth.

    - `source`: of the images, as in `vision.cifar`, or the folder of a task's files; `threads`: of
      the CPU, on which its results depend in the last bits (a seed that goes on keeps its number);
      `until`: the `time.time()` by which it ends; `show`: called as `show(seed, line)` after each
      epoch; `jobs`: how many seeds are trained side by side, for the record.

    Raises `TimeIsUp` if time does not suffice; `ValueError` if the record there was run with other
    settings or other data; `RuntimeError` if another process is at it; `OSError` if a file cannot
    be written; and what `cifar` raises. Nothing is lost by any of them.
    """
    if time() > until:
        raise TimeIsUp
    recipe = scaled(recipe, settings.scale)
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out / f'seed-{seed}.json')
    try:
        with settings_restored():
            data, images = recipe_data(recipe, source, settings)
            record = Record(recipe, seed, out, settings, images, threads or torch.get_num_threads(), jobs)
            if settings.device == 'cpu':
                torch.set_num_threads(record.data['threads'])
            if recipe.task is not None and 'baseline' not in record.data:
                record.keep_baseline(recipe.task.baseline(data, seed))
            while (task := record.next()) is not None:
                _train(record, *task, data, until, show)
                record.clean_up()
                gc.collect()  # the part's learner, and what it has on the GPU
            record.clean_up()
            return record.data
    finally:
        lock.release()


def _train(record, number, state, data, until, show):
    "Train one part of a seed's runs, from the `state` in which its parent ended."
    part = record.parts[number]
    run, learn = part.runs[0], recipe_learner(record.recipe, record.seed, record.settings, data)
    if state is not None:
        restore(learn, _without_callbacks_of_the_fit(state, learn))
    schedules = {'lr': lambda epoch, step, n_steps: run.lr(part.begin + epoch, step, n_steps)}
    if run.momentum:
        schedules['mom'] = lambda epoch, step, n_steps: run.momentum(part.begin + epoch, step, n_steps)
    cbs, swa = [EpochScheduler(schedules), _Checkpoint(record, until)], None
    if part.is_last:
        swa = SWACallback(run.swa_start - part.begin, swa_eval_freq=run.swa_eval_freq)
        cbs += [swa, *(_beside(average, part.begin) for average in run.beside)]
        if run.snapshots:
            cbs.append(SnapshotCallback(run.snapshots[0] - part.begin, run.snapshots[1], record.folder(run.name)))
    with learn.no_logging(), autocast_left():
        learn.fit(part.end - part.begin, run.lr(part.begin, 0, 1), cbs=[*cbs, _Log(record, swa, show)])
    if not record.is_done(number):
        raise TimeIsUp


def _without_callbacks_of_the_fit(state, learn) -> dict:
    """A `state` in which a part ended, without what was of its own callbacks, for the `learn` of
    the next one.
    """
    names = dict(named_callbacks(learn))
    return state | {'callbacks': {name: kept for name, kept in state['callbacks'].items() if name in names}}


def _beside(average, begin) -> SWACallback:
    "The callback that keeps `average` in a part that begins with epoch `begin`."
    if average.decay is None:
        return SWACallback(average.start - begin, swa_eval_freq=0, name=average.name)
    return SWACallback(0, swa_eval_freq=0, every=1, weight=ema(average.decay, warmup=True), name=average.name)


# callbacks

_SECONDS = 30  # between two checkpoints


class _Checkpoint(CheckpointCallback):
    """Written every `_SECONDS`, and when there is no time for another epoch, before which it then
    ends the fit.
    """

    def __init__(self, record, until):
        super().__init__(record.file(f'part{record.number}.ckpt'))
        self.timer = _Timer(record.clock, until)

    def _tell(self, text):
        pass  # the progress says where it stands

    def _not_written(self, error):
        if self.timer.failed:
            raise error  # twice: not by chance, and all that is trained from here on could be lost
        self.timer.failed = True
        super()._not_written(error)

    def before_epoch(self):
        self.timer.look()
        super().before_epoch()
        if self.timer.is_up:
            raise CancelFitException

    def _due(self):
        due = self.learn.epoch == 0 or self.timer.is_up or monotonic() - self.timer.written >= _SECONDS
        if due:
            self.timer.written = monotonic()
        return due


class _Timer:
    def __init__(self, clock, until):
        self.clock, self.until, self.is_up, self.written, self.failed = clock, until, False, monotonic(), False

    def look(self):
        self.is_up = time() + self.clock.next_epoch() > self.until


class _Log(Callback):
    "Takes the rows of the table to the record, and at the end what is to be kept."

    order = 100  # behind all that fill a row; before the checkpoint goes

    def __init__(self, record, swa, show):
        self.record, self.swa, self.show, self.rows = record, swa, show, []

    # what a checkpoint keeps of it: the record is that of this session
    def state_dict(self) -> dict:
        return {'rows': self.rows}

    def load_state_dict(self, state: dict):
        self.rows = state['rows']

    def before_epoch(self):
        self.record.clock.start()

    def after_epoch(self):
        row = {'lr': self.opt.hypers[-1]['lr']} | dict(zip(self.recorder.metric_names[1:], self.recorder.log[1:]))
        self.rows.append(row | {'seconds': self.record.clock.stop(len(self.rows))})
        self.record.epoch_is_over(self.rows)
        self.show(self.record.seed, self.record.line())

    def after_fit(self):
        if len(self.rows) == self.n_epoch:
            self.record.part_is_over(self.rows, self.learn, self.swa and self.swa.swa_model)


# many seeds

_GOES_ON = 'the same command goes on from there'
STOPPED = f'stopped in time; {_GOES_ON}'


def _attempt(name, seed, show, **kwargs) -> str | None:
    "Run a seed; `None`, or a sentence that says why it is not complete."
    run = partial(measure_seed, LANDSCAPES[name]) if name in LANDSCAPES else partial(run_seed, RECIPES[name])
    try:
        run(seed, show=show, **kwargs)
    except TimeIsUp:
        return STOPPED
    except (ValueError, OSError, InUse) as e:
        return _said(e)
    except RuntimeError as e:  # torch.AcceleratorError is one, too
        if 'out of memory' in str(e):
            return f'the GPU is out of memory ({_said(e).split(". ")[0]}); {_GOES_ON}: with fewer --jobs, perhaps'
        traceback.print_exc()
        return f'failed ({type(e).__name__}: {_said(e)[:200]}); {_GOES_ON}'
    show(seed, f'seed {seed}  complete')


# fastai's
def _said(error) -> str:
    return re.sub('^Exception occured in `.*?` when calling event `.*?`: ', '', ' '.join(str(error).split()))


def _side_by_side(attempt, seeds, jobs, lines) -> dict:
    "Each seed in a process of its own, `jobs` at a time."
    # CUDA cannot be used in a fork
    context, todo, running, outcomes = get_context('spawn'), list(range(seeds)), {}, {}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                seed, (ours, theirs) = todo.pop(0), context.Pipe(duplex=False)
                process = context.Process(target=_attempt_aside, args=(attempt, seed, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = seed, process
            for pipe in connection.wait(list(running)):
                seed, process = running[pipe]
                try:
                    kind, text = pipe.recv()
                except EOFError:
                    process.join()
                    outcomes.setdefault(seed, f'its process ended with {process.exitcode}; {_GOES_ON}')
                    del running[pipe]
                else:
                    if kind == 'line':
                        lines.show(seed, text)
                    else:
                        outcomes[seed] = text
    finally:
        for _, process in running.values():
            process.terminate()
    return dict(sorted(outcomes.items()))


def _attempt_aside(attempt, seed, pipe):
    Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(('end', attempt(seed, show=lambda seed, line: pipe.send(('line', line)))))


def _end_with_parent():
    connection.wait([parent_process().sentinel])
    os._exit(1)


class _Lines:
    "A line for each seed, written over on a terminal; elsewhere written anew once a minute."

    def __init__(self, stream):
        self.stream, self.in_place, self.texts, self.times = stream, stream.isatty(), {}, {}

    def show(self, key, text):
        # a longer one would take two lines
        text = text[: shutil.get_terminal_size().columns - 1] if self.in_place else text
        if self.in_place:
            up = f'\033[{len(self.texts)}A' if self.texts else ''
            self.texts[key] = text
            self.stream.write(up + ''.join(f'\033[2K{t}\n' for t in self.texts.values()))
        else:
            self.texts[key] = text
            if monotonic() - self.times.get(key, -60) < 60:
                return
            self.times[key] = monotonic()
            self.stream.write(text + '\n')
        self.stream.flush()

    def end(self):
        if not self.in_place:
            self.stream.writelines(f'{text}\n' for text in self.texts.values())
