"""Runs a recipe: seed by seed, resumable, on `Learner` with `SWACallback` and `CheckpointCallback`."""
import hashlib, os, sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from random import Random
from time import monotonic, time

import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, Metric, Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastcore.foundation import noop

from ..callback import SWACallback
from ..checkpoint import CheckpointCallback
from ..files import InUse, Lock
from ..learner import EpochScheduler
from ..snapshots import SnapshotCallback
from ..vision import cifar
from ..vision.tensors import tensor_loaders
from .ensembles import evaluate
from .recipes import RECIPES, Recipe, optimizer, runs, scaled
from .record import Record, Settings

__all__ = ['reproduce', 'run_seed', 'TimeIsUp', 'EpochRecorder']


class TimeIsUp(Exception):
    "There is no time for another epoch; the same call goes on."


def reproduce(name: str, seeds: int = 1, out=None, source=None, settings: Settings = Settings(), jobs: int = 1, threads: int | None = None,
              until: float = float('inf'), stream=None) -> dict:
    """Train the recipe `name` with the seeds 0 to `seeds` - 1, or what earlier calls have left of them, into the folder `out`.

    - `out`: default results/`name`; for each seed what `run_seed` writes. More seeds join those that are there.
    - `jobs`: so many seeds at a time, each in a process of its own; `threads`: of the CPU for each (default: an equal share).
    - `source`, `settings`, `until`: as in `run_seed`. `stream`: where a line of progress for each seed goes; default: stdout.

    A comparison of ensembles ends with `ensembles.evaluate`. Returns seed -> one sentence for each seed that is not complete: why, and what
    to do. Raises `ValueError` for an unknown name, and for a `settings.scale` that leaves too few epochs.
    """
    if name not in RECIPES: raise ValueError(f'name must be one of {", ".join(RECIPES)}, not {name!r}')
    runs(scaled(RECIPES[name], settings.scale))    # raises
    out, threads = Path(out or f'results/{name}'), threads or max(1, torch.get_num_threads() // jobs)
    lines, attempt = _Lines(stream or sys.stdout), partial(_attempt, name, out=out, settings=settings, source=source, threads=threads, until=until)
    if jobs == 1: outcomes = {seed: attempt(seed, show=lines.show) for seed in range(seeds)}
    else: outcomes = _side_by_side(attempt, seeds, jobs, lines)
    lines.end()
    missing = {seed: sentence for seed, sentence in outcomes.items() if sentence}
    if RECIPES[name].ensembles and not missing: _predict_together(name, out, range(seeds), settings, source)
    return missing


def _predict_together(name, out, seeds, settings, source):
    recipe = scaled(RECIPES[name], settings.scale)
    dls, _ = _images(recipe.n_classes, source or recipe.source, settings.images or recipe.images)
    evaluate(out, seeds, _learner(recipe, 0, settings, dls))


def run_seed(recipe: Recipe, seed: int, out: Path, settings: Settings = Settings(), source=None, threads: int | None = None,
             until: float = float('inf'), show=noop) -> dict:
    """Train all runs of `recipe` with one seed, or what an earlier call has left of them; returns what `out`/seed-<seed>.json then holds.

    The runs share the epochs before they part. While it goes on, a checkpoint and the states at the forks stand beside the file; at the end the
    weights at the end of each run, and the average, as state dicts: seed-<seed>-<run>.pth.

    - `source`: of the images, as in `vision.cifar`; `threads`: of the CPU, on which its results depend in the last bits (a seed that goes on
      keeps its number); `until`: the `time.time()` by which it ends; `show`: called as `show(seed, line)` after each epoch.

    Raises `TimeIsUp` if time does not suffice; `ValueError` if the file there was run with other settings or other data; `RuntimeError` if
    another process is at it; `OSError` if a file cannot be written; and what `cifar` raises. Nothing is lost by any of them.
    """
    recipe = scaled(recipe, settings.scale)
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out/f'seed-{seed}.json')
    try:
        dls, images = _images(recipe.n_classes, source or recipe.source, settings.images or recipe.images)
        record = Record(recipe, seed, out, settings, images, threads or torch.get_num_threads())
        if settings.device == 'cpu': torch.set_num_threads(record.data['threads'])
        for number in range(len(record.parts)):
            if not record.is_done(number): _train(record, number, dls, until, show)
            record.clean_up()
        return record.data
    finally: lock.release()


def _train(record, number, dls, until, show):
    "Train one part of a seed's runs."
    part = record.parts[number]
    run, learn = part.runs[0], _learner(record.recipe, record.seed, record.settings, dls)
    record.begin(number, learn)
    schedule = EpochScheduler({'lr': lambda epoch, step, n_steps: run.lr(part.begin + epoch, step, n_steps)})
    cbs, swa = [schedule, _Checkpoint(record, until)], None
    if part.is_last:
        swa = SWACallback(run.swa_start - part.begin)
        cbs.append(swa)
        if run.snapshots: cbs.append(SnapshotCallback(run.snapshots[0] - part.begin, run.snapshots[1], record.folder(run.name)))
    with learn.no_logging(): learn.fit(part.end - part.begin, run.lr(part.begin, 0, 1), cbs=[*cbs, _Log(record, swa, show)])
    if not record.is_done(number): raise TimeIsUp


def _learner(recipe, seed, settings, dls) -> Learner:
    set_seed(seed)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not settings.deterministic, settings.deterministic
    torch.use_deterministic_algorithms(settings.deterministic)
    if settings.deterministic: os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')    # or cuBLAS refuses
    device = torch.device(settings.device)
    model = recipe.network(recipe.n_classes).to(device, memory_format=torch.channels_last)
    if settings.compile: model = torch.compile(model, mode=settings.compile, dynamic=False)    # a graph for each size of batch
    dls = tensor_loaders(*((ds.images, ds.labels) for ds in (dls.train_ds, dls.valid_ds)), dls.vocab, recipe.stats, bs=recipe.bs,
                         padding=recipe.padding, seed=seed, chunk=16, device=device)
    dls.train.rng = Random(seed)
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=optimizer(recipe, fused=device.type == 'cuda' or None), lr=recipe.lr, wd=recipe.wd,
                    wd_bn_bias=True, metrics=accuracy)
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.add_cb(EpochRecorder())
    if settings.precision == 'bf16': learn.add_cb(MixedPrecision('bf16'))
    learn.create_opt()
    return learn


@cache    # the seeds of a process share the images
def _images(n_classes, source, n_images):
    dls = cifar(n_classes, source, n_images=n_images, device=torch.device('cpu'))
    digest = hashlib.sha256()
    for ds in (dls.train_ds, dls.valid_ds):
        for t in (ds.images, ds.labels): digest.update(t.contiguous().numpy())
    return dls, {'kind': dls.kind, 'train': len(dls.train_ds), 'valid': len(dls.valid_ds), 'sha256': digest.hexdigest()[:16]}


# callbacks

class _EpochMean(Metric):
    "The mean of the training loss over an epoch's samples, summed on the device."
    def __init__(self): self.reset()
    def reset(self): self.val, self.count = 0., 0
    def accumulate(self, learn):
        n = len(learn.yb[0])
        self.val, self.count = self.val + learn.loss.detach() * n, self.count + n
    @property
    def value(self): return self.val / max(self.count, 1)


class EpochRecorder(Recorder):
    """A Recorder that reads nothing from the device in a step; fastai's reads the loss of each.

    It keeps no losses of single steps, and `train_loss` is the mean over the samples of the epoch, not the smoothed loss at its end.
    """
    name = 'recorder'

    def __init__(self):
        super().__init__(add_time=False)
        self.smooth_loss = _EpochMean()

    def before_train(self): self.smooth_loss.reset()

    def after_batch(self):
        if self.training: self.smooth_loss.accumulate(self.learn)
        else: super().after_batch()


_SECONDS = 30    # between two checkpoints


class _Checkpoint(CheckpointCallback):
    "Written every `_SECONDS`, and when there is no time for another epoch, before which it then ends the fit."
    def __init__(self, record, until):
        super().__init__(record.file(f'part{record.number}.ckpt'))
        self.timer = _Timer(record.clock, until)

    def _tell(self, text): pass    # the progress says where it stands

    def before_epoch(self):
        self.timer.look()
        super().before_epoch()
        if self.timer.is_up: raise CancelFitException

    def _due(self):
        due = self.learn.epoch == 0 or self.timer.is_up or monotonic() - self.timer.written >= _SECONDS
        if due: self.timer.written = monotonic()
        return due


class _Timer:
    def __init__(self, clock, until): self.clock, self.until, self.is_up, self.written = clock, until, False, monotonic()
    def look(self): self.is_up = time() + self.clock.next_epoch() > self.until


class _Log(Callback):
    "Takes the rows of the table to the record, and at the end what is to be kept. (Checkpoints keep `rows`.)"
    order = 100    # behind all that fill a row; before the checkpoint goes

    def __init__(self, record, swa, show): self.record, self.swa, self.show, self.rows = record, swa, show, []

    def before_epoch(self): self.record.clock.start()

    def after_epoch(self):
        row = {'lr': self.opt.hypers[-1]['lr']} | dict(zip(self.recorder.metric_names[1:], self.recorder.log[1:]))
        self.rows.append(row | {'seconds': self.record.clock.stop(len(self.rows))})
        self.record.epoch_is_over(self.rows)
        self.show(self.record.seed, self.record.line())

    def after_fit(self):
        if len(self.rows) == self.n_epoch: self.record.part_is_over(self.rows, self.learn, self.swa and self.swa.swa_model)


# many seeds

def _attempt(name, seed, show, **kwargs) -> str | None:
    "Run a seed; `None`, or a sentence that says why it is not complete."
    again = 'the same command goes on from there'
    try: run_seed(RECIPES[name], seed, show=show, **kwargs)
    except TimeIsUp: return f'stopped in time; {again}'
    except torch.OutOfMemoryError as e: return f'the GPU is out of memory ({str(e).split(". ")[0]}); {again}: with fewer --jobs, perhaps'
    except (ValueError, OSError, InUse) as e: return ' '.join(str(e).split())
    show(seed, f'seed {seed}  complete')


def _side_by_side(attempt, seeds, jobs, lines) -> dict:
    context = get_context('spawn')    # CUDA cannot be used in a fork
    queue, outcomes = context.Queue(), {}
    with ProcessPoolExecutor(min(jobs, seeds), context, _join, (queue,)) as pool:
        futures = {seed: pool.submit(_attempt_aside, attempt, seed) for seed in range(seeds)}
        while not all(f.done() for f in futures.values()) or not queue.empty():
            try: lines.show(*queue.get(timeout=.2))
            except Empty: pass
        for seed, future in futures.items():
            try: outcomes[seed] = future.result()
            except BrokenProcessPool: outcomes[seed] = 'a process was killed, for want of memory perhaps; the same command goes on: with fewer --jobs'
    return outcomes

def _join(queue): _attempt_aside.queue = queue

def _attempt_aside(attempt, seed): return attempt(seed, show=lambda *args: _attempt_aside.queue.put(args))


class _Lines:
    "A line for each seed, written over on a terminal; elsewhere written anew once a minute."
    def __init__(self, stream): self.stream, self.in_place, self.texts, self.times = stream, stream.isatty(), {}, {}

    def show(self, key, text):
        if self.in_place:
            up = f'\033[{len(self.texts)}A' if self.texts else ''
            self.texts[key] = text
            self.stream.write(up + ''.join(f'\033[2K{t}\n' for t in self.texts.values()))
        else:
            self.texts[key] = text
            if monotonic() - self.times.get(key, -60) < 60: return
            self.times[key] = monotonic()
            self.stream.write(text + '\n')
        self.stream.flush()

    def end(self):
        if not self.in_place: self.stream.writelines(f'{text}\n' for text in self.texts.values())
