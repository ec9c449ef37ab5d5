"""Trains one seed of a recipe: part by part, resumable, on `Learner` with `SWACallback` and
`CheckpointCallback`."""

import gc
from pathlib import Path
from time import monotonic, time

import torch
from fastai.callback.core import Callback, CancelFitException
from fastcore.foundation import noop

from ..averaging import ema
from ..callback import SWACallback
from ..checkpoint import CheckpointCallback
from ..files import Lock
from ..holders import named_callbacks
from ..learner import EpochScheduler
from ..passes import autocast_left
from ..snapshots import SnapshotCallback
from ..state import restore
from .machine import TimeIsUp, process_settings
from .recipe_learner import recipe_data, recipe_learner
from .recipes import Recipe, scaled
from .record import Record, Settings

__all__ = ['run_seed']


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
        data, images = recipe_data(recipe, source, settings)
        record = Record(recipe, seed, out, settings, images, threads or torch.get_num_threads(), jobs)
        with process_settings(settings, record.data['threads']):
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

    __module__ = 'fastai_swa.experiments.run'  # under which checkpoints know it

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

    __module__ = 'fastai_swa.experiments.run'  # under which checkpoints know it

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
