"""Runs a recipe: seed by seed, resumable, on `Learner` with `SWACallback` and `CheckpointCallback`."""
import gc, hashlib, os, re, shutil, sys, traceback
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from random import Random
from threading import Thread
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
from ..passes import autocast_left
from ..snapshots import SnapshotCallback
from ..state import restore
from ..vision import cifar
from ..vision.tensors import tensor_loaders
from .ensembles import evaluate
from .recipes import RECIPES, Recipe, optimizer, runs, scaled
from .record import Record, Settings, read_record, seed_files, what_is_run

__all__ = ['reproduce', 'run_seed', 'TimeIsUp', 'STOPPED', 'EpochRecorder']


class TimeIsUp(Exception):
    "There is no time for another epoch; the same call goes on."


def reproduce(name: str, seeds: int = 1, out=None, source=None, settings: Settings = Settings(), jobs: int = 1, threads: int | None = None,
              until: float = float('inf'), stream=None) -> dict:
    """Train the recipe `name` with the seeds 0 to `seeds` - 1, or what earlier calls have left of them, into the folder `out`.

    - `out`: default results/`name`; for each seed what `run_seed` writes. More seeds join those that are there.
    - `jobs`: so many seeds at a time, each in a process of its own; `threads`: of the CPU for each (default: an equal share).
    - `source`, `settings`, `until`: as in `run_seed`. `stream`: where a line of progress for each seed goes; default: stdout.

    A comparison of ensembles ends with `ensembles.evaluate`. Returns seed -> one sentence for each seed that is not complete: why, and what
    to do. Raises `ValueError` for an unknown name, settings that cannot be used, and a folder whose seeds were run with others; and what `cifar`
    raises.
    """
    if name not in RECIPES: raise ValueError(f'name must be one of {", ".join(RECIPES)}, not {name!r}')
    _check(settings)
    recipe = scaled(RECIPES[name], settings.scale)
    runs(recipe)    # raises where the scale leaves too little
    out, jobs = Path(out or f'results/{name}'), min(jobs, seeds)
    lines, common = _Lines(stream or sys.stdout), what_is_run(recipe, settings, _images(recipe, source, settings)[1])
    for file in seed_files(out).values(): read_record(file, common)    # all of a folder are of one kind
    attempt = partial(_attempt, name, out=out, settings=settings, source=source, threads=threads or max(1, torch.get_num_threads() // jobs),
                      until=until, jobs=jobs)
    outcomes = {seed: attempt(seed, show=lines.show) for seed in range(seeds)} if jobs == 1 else _side_by_side(attempt, seeds, jobs, lines)
    lines.end()
    missing = {seed: sentence for seed, sentence in outcomes.items() if sentence}
    if recipe.ensembles and not missing: _predict_together(recipe, out, range(seeds), settings, source, attempt.keywords['threads'])
    return missing


def _check(settings):
    if not 0 < settings.scale < float('inf'): raise ValueError(f'scale must be a positive number, not {settings.scale}')
    if settings.precision == 'bf16' and not settings.device.startswith('cuda'): raise ValueError('precision bf16 is autocast on a GPU: use fp32 here')
    try: torch.empty(1, device=settings.device)
    except (RuntimeError, AssertionError) as e: raise ValueError(f'device {settings.device!r} cannot be used: {str(e).splitlines()[0]}') from None


def _predict_together(recipe, out, seeds, settings, source, threads):
    with _settings_restored():
        if settings.device == 'cpu': torch.set_num_threads(threads)
        evaluate(out, seeds, _learner(recipe, 0, settings, _images(recipe, source, settings)[0]))


def run_seed(recipe: Recipe, seed: int, out: Path, settings: Settings = Settings(), source=None, threads: int | None = None,
             until: float = float('inf'), show=noop, jobs: int = 1) -> dict:
    """Train all runs of `recipe` with one seed, or what an earlier call has left of them; returns what `out`/seed-<seed>.json then holds.

    The runs share the epochs before they part. While it goes on, a checkpoint and the states at the forks stand beside the file; at the end the
    weights at the end of each run, and the average, as state dicts: seed-<seed>-<run>.pth.

    - `source`: of the images, as in `vision.cifar`; `threads`: of the CPU, on which its results depend in the last bits (a seed that goes on
      keeps its number); `until`: the `time.time()` by which it ends; `show`: called as `show(seed, line)` after each epoch; `jobs`:
      how many seeds are trained side by side, for the record.

    Raises `TimeIsUp` if time does not suffice; `ValueError` if the file there was run with other settings or other data; `RuntimeError` if
    another process is at it; `OSError` if a file cannot be written; and what `cifar` raises. Nothing is lost by any of them.
    """
    if time() > until: raise TimeIsUp
    recipe = scaled(recipe, settings.scale)
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out/f'seed-{seed}.json')
    try:
        with _settings_restored():
            dls, images = _images(recipe, source, settings)
            record = Record(recipe, seed, out, settings, images, threads or torch.get_num_threads(), jobs)
            if settings.device == 'cpu': torch.set_num_threads(record.data['threads'])
            while (task := record.next()) is not None:
                _train(record, *task, dls, until, show)
                record.clean_up()
                gc.collect()    # the part's learner, and what it has on the GPU
            record.clean_up()
            return record.data
    finally: lock.release()


def _train(record, number, state, dls, until, show):
    "Train one part of a seed's runs, from the `state` in which its parent ended."
    part = record.parts[number]
    run, learn = part.runs[0], _learner(record.recipe, record.seed, record.settings, dls)
    if state is not None: restore(learn, state)
    schedule = EpochScheduler({'lr': lambda epoch, step, n_steps: run.lr(part.begin + epoch, step, n_steps)})
    cbs, swa = [schedule, _Checkpoint(record, until)], None
    if part.is_last:
        swa = SWACallback(run.swa_start - part.begin)
        cbs.append(swa)
        if run.snapshots: cbs.append(SnapshotCallback(run.snapshots[0] - part.begin, run.snapshots[1], record.folder(run.name)))
    with learn.no_logging(), autocast_left():
        learn.fit(part.end - part.begin, run.lr(part.begin, 0, 1), cbs=[*cbs, _Log(record, swa, show)])
    if not record.is_done(number): raise TimeIsUp


@contextmanager
def _settings_restored():
    "What a seed sets for the whole process."
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    kept = cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    try: yield
    finally:
        cudnn.benchmark, cudnn.deterministic = kept[:2]
        torch.use_deterministic_algorithms(kept[2])
        torch.set_num_threads(threads)


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


def _images(recipe, source, settings): return _loaded(recipe.n_classes, source or recipe.source, settings.images or recipe.images)

@cache    # the seeds of a process share the images
def _loaded(n_classes, source, n_images):
    dls = cifar(n_classes, source, n_images=n_images, device=torch.device('cpu'))
    return dls, {'kind': dls.kind, 'train': len(dls.train_ds), 'valid': len(dls.valid_ds), 'sha256': _fingerprint(dls)}

def _fingerprint(dls) -> str:
    digest = hashlib.sha256()
    for ds in (dls.train_ds, dls.valid_ds):
        for t in (ds.images, ds.labels): digest.update(t.contiguous().numpy())
    return digest.hexdigest()[:16]


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

    def _not_written(self, error):
        if self.timer.failed: raise error    # twice: not by chance, and all that is trained from here on could be lost
        self.timer.failed = True
        super()._not_written(error)

    def before_epoch(self):
        self.timer.look()
        super().before_epoch()
        if self.timer.is_up: raise CancelFitException

    def _due(self):
        due = self.learn.epoch == 0 or self.timer.is_up or monotonic() - self.timer.written >= _SECONDS
        if due: self.timer.written = monotonic()
        return due


class _Timer:
    def __init__(self, clock, until): self.clock, self.until, self.is_up, self.written, self.failed = clock, until, False, monotonic(), False
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

STOPPED = 'stopped in time; the same command goes on from there'


def _attempt(name, seed, show, **kwargs) -> str | None:
    "Run a seed; `None`, or a sentence that says why it is not complete."
    try: run_seed(RECIPES[name], seed, show=show, **kwargs)
    except TimeIsUp: return STOPPED
    except (ValueError, OSError, InUse) as e: return _said(e)
    except RuntimeError as e:    # torch.AcceleratorError is one, too
        if 'out of memory' in str(e):
            return f'the GPU is out of memory ({_said(e).split(". ")[0]}); the same command goes on from there: with fewer --jobs, perhaps'
        traceback.print_exc()
        return f'failed ({type(e).__name__}: {_said(e)[:200]}); the same command goes on from there'
    show(seed, f'seed {seed}  complete')

def _said(error) -> str: return re.sub('^Exception occured in `.*?` when calling event `.*?`: ', '', ' '.join(str(error).split()))    # fastai's


def _side_by_side(attempt, seeds, jobs, lines) -> dict:
    "Each seed in a process of its own, `jobs` at a time."
    context, todo, running, outcomes = get_context('spawn'), list(range(seeds)), {}, {}    # CUDA cannot be used in a fork
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
                try: kind, text = pipe.recv()
                except EOFError:
                    process.join()
                    outcomes.setdefault(seed, f'its process ended with {process.exitcode}; the same command goes on from there')
                    del running[pipe]
                else:
                    if kind == 'line': lines.show(seed, text)
                    else: outcomes[seed] = text
    finally:
        for _, process in running.values(): process.terminate()
    return dict(sorted(outcomes.items()))


def _attempt_aside(attempt, seed, pipe):
    Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(('end', attempt(seed, show=lambda seed, line: pipe.send(('line', line)))))

def _end_with_parent():
    connection.wait([parent_process().sentinel])
    os._exit(1)


class _Lines:
    "A line for each seed, written over on a terminal; elsewhere written anew once a minute."
    def __init__(self, stream): self.stream, self.in_place, self.texts, self.times = stream, stream.isatty(), {}, {}

    def show(self, key, text):
        text = text[:shutil.get_terminal_size().columns - 1] if self.in_place else text    # a longer one would take two lines
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
