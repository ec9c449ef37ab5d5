"""Trains one seed of a recipe: part by part, resumable, on `Learner` with `SWACallback` and
`CheckpointCallback`."""

import gc
from pathlib import Path
from time import monotonic, time

import torch
from fastai.callback.core import Callback, CancelFitException
from fastcore.foundation import noop

from ..aside import autocast_left
from ..averaging import ema, power_ema
from ..callback import SWACallback
from ..checkpoint import CheckpointCallback
from ..files import Lock
from ..history import WeightHistory
from ..learner import EpochScheduler
from ..modules import unwrap
from ..snapshots import SnapshotCallback
from ..state import restore
from ..walk import named_callbacks
from .machine import TimeIsUp, process_settings
from .plan import Beside, Part
from .recipe_learner import recipe_data, recipe_learner
from .recipes import PRETRAINED, Recipe, scaled
from .record import Record, Settings

__all__ = ['run_seed']

_SECONDS = 30  # between two checkpoints
_ALL = 10**9  # batches, more than there are: batch norm is refreshed on the whole training set, within a fit, too


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
    and the average of a run named SWA, as state dicts: seed-<seed>-<run>.pth. A run with a history
    leaves that, too, all averages beside it and the weights of its best epochs.

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
                record.keep_baseline(_baseline(record, data))
            while (todo := record.next()) is not None:
                number, state = todo
                _train_part(record, number, state, data, until, show)
                record.clean_up()
                gc.collect()  # the part's learner, and what it has on the GPU
        record.clean_up()
        return record.data
    finally:
        lock.release()


def _baseline(record: Record, data) -> dict:
    "What the weights that tails go on from get in validation; of other tasks, what another method gets."
    recipe = record.recipe
    if not recipe.tails:
        return recipe.task.baseline(data, record.seed)
    learn = recipe_learner(recipe, record.seed, record.settings, data)
    with learn.no_logging(), autocast_left():
        loss, metric = learn.validate()
    return {'name': PRETRAINED, 'metric': metric, 'loss': loss}


def _train_part(record: Record, number: int, state: dict | None, data, until: float, show):
    "Train part `number` of a seed's runs, from the `state` in which its parent ended."
    part = record.parts[number]
    learn = recipe_learner(record.recipe, record.seed, record.settings, data)
    if state is not None:
        restore(learn, _without_callbacks_of_the_fit(state, learn))
    cbs = [EpochScheduler(_hyper_parameters(part)), _Checkpoint(record, until)]
    kept = {}
    if part.is_last:
        averages = _average_callbacks(part, len(learn.dls.train))
        cbs += averages
        if part.runs[0].keeps_average:
            kept[f'{part.runs[0].name} average'] = averages[0]
        if part.runs[0].snapshots is not None:
            cbs.append(_snapshot_callback(part, record))
        if part.runs[0].n_segments is not None:
            kept = {f'{part.runs[0].name} {swa.name}': swa for swa in averages}
            cbs += _history_callbacks(part, record)
    cbs.append(_Log(record, kept, show))
    with learn.no_logging(), autocast_left():
        learn.fit(part.end - part.begin, part.runs[0].lr(part.begin, 0, 1), cbs=cbs)
    if not record.is_done(number):
        raise TimeIsUp


def _without_callbacks_of_the_fit(state: dict, learn) -> dict:
    """A `state` in which a part ended, without what was of its own callbacks, for the `learn` of
    the next one.
    """
    names = dict(named_callbacks(learn))
    kept = {name: attributes for name, attributes in state['callbacks'].items() if name in names}
    return state | {'callbacks': kept}


# a part counts its epochs from its own beginning, its run from the first epoch of all


def _hyper_parameters(part: Part) -> dict:
    "Hyper-parameter -> its value at an epoch of the part, a step and a number of steps."
    run = part.runs[0]
    res = {'lr': lambda epoch, step, n_steps: run.lr(part.begin + epoch, step, n_steps)}
    if run.momentum is not None:
        res['mom'] = lambda epoch, step, n_steps: run.momentum(part.begin + epoch, step, n_steps)
    return res


def _average_callbacks(part: Part, n_steps: int) -> list[SWACallback]:
    "The run's own average, then those beside it. `n_steps`: of an epoch."
    run = part.runs[0]
    every = None if run.n_averaged == 1 else max(1, n_steps // run.n_averaged)
    own = SWACallback(run.swa_start - part.begin, swa_eval_freq=run.swa_eval_freq, bn_batches=_ALL, every=every)
    return [own, *(_average_beside(average, part.begin) for average in run.beside)]


def _average_beside(average: Beside, begin: int) -> SWACallback:
    "The callback that keeps `average` in a part that begins with epoch `begin`."
    how = dict(swa_eval_freq=0, bn_batches=_ALL, name=average.name)
    if average.is_of_epochs:
        return SWACallback(average.start - begin, **how)
    weight = power_ema(average.power) if average.decay is None else ema(average.decay, warmup=True)
    return SWACallback(0, every=1, weight=weight, **how)


def _snapshot_callback(part: Part, record: Record) -> SnapshotCallback:
    run = part.runs[0]
    start, cycle_len = run.snapshots
    return SnapshotCallback(start - part.begin, cycle_len, record.folder(run.name))


def _history_callbacks(part: Part, record: Record) -> list[Callback]:
    run = part.runs[0]
    # what is there is of a training that has left no checkpoint
    history = WeightHistory(record.history_folder(run.name), run.n_segments, overwrite=True)
    return [history, _BestEpochs(record, run.name)]


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
        is_due = self.learn.epoch == 0 or self.timer.is_up or monotonic() - self.timer.written >= _SECONDS
        if is_due:
            self.timer.written = monotonic()
        return is_due


class _Timer:
    "When a part's checkpoint was written, and when the part has to end."

    def __init__(self, clock, until):
        self.clock = clock  # knows how long an epoch takes
        self.until = until  # the `time.time()` by which the part ends
        self.is_up = False  # is there no time for another epoch?
        self.written = monotonic()  # when a checkpoint was due last
        self.failed = False  # could one not be written?

    def look(self):
        self.is_up = time() + self.clock.next_epoch() > self.until


class _BestEpochs(Callback):
    "Keeps the weights at the end of the epoch that is best in validation: by loss, and by the recipe's metric."

    __module__ = 'fastai_swa.experiments.run'  # under which checkpoints know it
    order = 99  # behind all that fill a row; before what is kept is written

    def __init__(self, record, run: str):
        self.record = record
        self.run = run
        self.best = {}  # column -> its best value so far, and the weights

    def state_dict(self) -> dict:
        return {'best': self.best}

    def load_state_dict(self, state: dict):
        self.best = state['best']

    def after_epoch(self):
        row = dict(zip(self.recorder.metric_names, self.recorder.log))
        for column in ('valid_loss', self.record.recipe.metric):
            value = float(row[column])
            sign = 1 if column == 'valid_loss' else -1
            if column not in self.best or sign * value < sign * self.best[column][0]:
                weights = {k: v.cpu().clone() for k, v in unwrap(self.model).state_dict().items()}
                self.best[column] = [value, weights]

    def after_fit(self):
        for column, (_, weights) in self.best.items():
            self.record.keep_weights(weights, f'{self.run} best {column}')


class _Log(Callback):
    "Takes the rows of the table to the record, and at the end what is to be kept."

    __module__ = 'fastai_swa.experiments.run'  # under which checkpoints know it
    order = 100  # behind all that fill a row; before the checkpoint goes

    def __init__(self, record, averages: dict, show):
        self.record = record
        self.averages = averages  # name -> callback whose average is to be kept at the end
        self.show = show
        self.rows = []

    # what a checkpoint keeps of it: the record is that of this session
    def state_dict(self) -> dict:
        return {'rows': self.rows}

    def load_state_dict(self, state: dict):
        self.rows = state['rows']

    def before_epoch(self):
        self.record.clock.start()

    def after_epoch(self):
        names = self.recorder.metric_names[1:]
        row = {'lr': self.opt.hypers[-1]['lr']}
        row.update(zip(names, self.recorder.log[1:]))
        row['seconds'] = self.record.clock.stop(len(self.rows))
        self.rows.append(row)
        self.record.epoch_is_over(self.rows)
        self.show(self.record.seed, self.record.line())

    def after_fit(self):
        if len(self.rows) == self.n_epoch:
            models = {name: swa.swa_model for name, swa in self.averages.items()}
            self.record.part_is_over(self.rows, self.learn, models)
