"""What becomes of a fit, its average and its files when things go wrong: faults done to real
processes, counted.

    python benchmarks/faults.py              # 100 kills and the other faults; some minutes on two
    cores python benchmarks/faults.py --kills 5 --times 1

Each run is a process of its own. After a fault the same call is made again, in a new process with
other weights, another order of the data and another random state, until it ends. It *survived* if
it then ended bitwise as the run that nothing happened to (weights, optimizer, average with its
batch norm, columns, losses, learning rates, random states) and no file was ever half written; where
the fault is one to refuse, if it was refused in one sentence and nothing else was touched; where it
is one of the average's passes, if only the values of that epoch are lost, and that is said.
Everything else is *lost*.

- Ctrl-C while averaging, every step being folded: survived if the learner holds weights that the
  undisturbed fit passed through, each tensor those before or after the step under way; if the
  average is the mean of as many of those weights as it says; if it can be used; and if callbacks,
  hooks and the learner serve another fit.
- Each writer of the package (`writers.py`): survived if what was there before is there bitwise,
  nothing else was left, and one `OSError`, or in a fit one warning, names the file; killed in the
  middle, if there is the old or the new, and the next write leaves nothing else.
- Two processes with one folder: survived if what is in the folder at the end is what the one
  process that reports success has trained, and the other was refused before its first step.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback, TerminateOnNaNCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import AvgMetric, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from torch import nn
from writers import WRITERS

import fastai_swa
from fastai_swa import CheckpointCallback, SWACallback, files

EPOCHS = 6


# the run


class Samples(list):
    "A data set of which one sample may kill the process that fetches it."

    deadly = lambda self: False

    def __getitem__(self, i):
        if self.deadly():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def learner(folder, seed, num_workers=0, metrics=None):
    set_seed(seed)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 32, generator=g)
    samples = list(zip(x, (x @ torch.randn(32, 4, generator=g)).argmax(1)))
    train = DataLoader(Samples(samples[:500]), bs=32, shuffle=True, num_workers=num_workers)
    dls = DataLoaders(train, DataLoader(samples[500:], bs=64), device='cpu')
    model = nn.Sequential(
        nn.Linear(32, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(256, 256),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 4),
    )
    metrics = metrics or [AvgMetric(accuracy)]
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func=Adam, metrics=metrics, path=folder)


def accuracy(preds, targets):
    return (preds.argmax(1) == targets).float().mean()


def fit(learn, cbs=(), path='run.ckpt'):
    swa = SWACallback(2)
    cbs = [swa, SaveModelCallback('accuracy'), CheckpointCallback(learn.path / path), *cbs]
    with learn.no_bar():
        learn.fit_one_cycle(EPOCHS, 1e-2, cbs=cbs)
    return swa


def digest(learn, swa) -> str:
    "One number for all that a fit leaves behind."
    h = hashlib.sha256()

    def add(o):
        if isinstance(o, torch.Tensor):
            h.update(o.detach().numpy().tobytes())
        else:
            h.update(repr(o).encode())

    for model in (learn.model, swa.swa_model):
        for k, v in model.state_dict().items():
            add(k), add(v)
    for s in learn.opt.state_dict()['state']:
        for k, v in s.items():
            add(k), add(v)
    rows = [list(row) for row in learn.recorder.values]
    add([rows, list(map(float, learn.recorder.losses)), list(map(float, learn.recorder.lrs)), swa.averaged_epochs])
    add(random.getstate())
    add(torch.get_rng_state())
    add(np.random.get_state()[1].tolist())  # noqa: NPY002
    add(learn.dls.train.rng.getstate())
    return h.hexdigest()


# processes


def child(f, *args) -> int:
    "Run `f(*args)` in a process of its own; its number."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    try:
        torch.set_num_threads(1)
        with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            warnings.simplefilter('ignore')
            f(*args)
        code = 0
    except KeyboardInterrupt:
        code = 2
    except BaseException as e:
        (args[0] / 'error').write_text(f'{type(e).__name__}: {e}')
    finally:
        os._exit(code)


def ended(pid) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(folder, seed, cbs=(), **kwargs):
    """Leaves its digest when it ends. `seed` counts where there is a checkpoint, else the run
    begins as all do.
    """
    learn = learner(folder, seed if (folder / 'run.ckpt').exists() else 0, **kwargs)
    swa = fit(learn, cbs)
    torch.save([list(row) for row in learn.recorder.values], folder / 'rows')
    (folder / 'done').write_text(digest(learn, swa))


def read(folder):
    return files.read(folder / 'run.ckpt', 'checkpoint', version=99)


def half_written_beside(folder) -> list:
    return list(folder.rglob('*.fastai_swa.tmp'))


def half_written(folder) -> bool:
    "Is there a checkpoint that cannot be read?"
    try:
        return (folder / 'run.ckpt').exists() and not read(folder)
    except ValueError:
        return True


def finish(folder, seed=1000) -> bool:
    "Start the run again; did it end as the one that nothing happened to?"
    if half_written(folder):
        return False
    code = ended(child(run, folder, seed))
    left = list(folder.glob('run.ckpt*'))
    return code == 0 and not left and (folder / 'done').read_text() == WHOLE['digest']


WHOLE = {}  # of the runs that nothing happens to: digest, seconds, and the file of the weights after each step
SEEN = Counter()  # of the row under way: faults that were done, and where they met the run


# the faults: each does it once, in an empty folder, and returns whether the run survived


def killed(folder, rng, signal=signal.SIGKILL, most=4):
    """Kill up to `most` times at random moments, every other one while a checkpoint is written;
    then let it end.
    """
    for i in range(rng.randint(1, most)):
        pid = child(run, folder, i)
        end = time.time() + rng.uniform(0, 1.2 * WHOLE['seconds'])
        late = end + WHOLE['seconds'] * (rng.random() < 0.5)
        while time.time() < end or (time.time() < late and not half_written_beside(folder)):
            time.sleep(0.0001)
        writing = bool(half_written_beside(folder))
        os.kill(pid, signal)
        code = ended(pid)
        if code != 0:
            SEEN['hits'] += 1
            SEEN['while writing'] += writing
        if half_written(folder):
            return False
        if code == 0:
            return (folder / 'done').read_text() == WHOLE['digest']
    return finish(folder)


def interrupted(folder, rng):
    return killed(folder, rng, signal.SIGINT)


class Once(Callback):
    "Does `f` at the start of batch `batch` of epoch `epoch`, in training."

    order = 70

    def __init__(self, epoch, batch, f):
        self.at, self.f = (epoch, batch), f

    def before_batch(self):
        if self.training and (self.epoch, self.iter) == self.at:
            self.f(self.learn)


def disk_full(folder, rng):
    """From a random moment on files cannot grow beyond some bytes; training goes on without. Then
    the machine dies.
    """
    epoch, limit = rng.randrange(1, EPOCHS - 1), rng.randrange(1, 1 << 20)

    def fill(learn):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def die(learn):
        os.kill(os.getpid(), signal.SIGKILL)

    cbs = [Once(epoch, 3, fill), Once(EPOCHS - 1, 5, die)]

    def unsaved(folder, seed):  # SaveModelCallback would raise: it writes too
        learn = learner(folder, seed)
        learn.save = lambda *args, **kwargs: None
        fit(learn, cbs)

    return ended(child(unsaved, folder, 0)) == -signal.SIGKILL and not half_written_beside(folder) and finish(folder)


def read_only(folder, rng):
    """A folder that cannot be written is refused in one sentence before the first epoch; as another
    user than root.
    """
    folder.chmod(0o555)

    def start(parent, seed):
        if os.getuid() == 0:
            os.setuid(65534)
        learn = learner(folder, seed)
        before = [p.clone() for p in learn.model.parameters()]
        try:
            fit(learn)
        except OSError:
            same = all(map(torch.equal, before, learn.model.parameters()))
        else:
            same = False
        if not same:
            raise RuntimeError('not refused')

    with tempfile.TemporaryDirectory() as other:
        refused = ended(child(start, Path(other), 0)) == 0
    folder.chmod(0o755)
    return refused and not list(folder.iterdir()) and finish(folder)


def worker_dies(folder, rng):
    "A process of the loader is killed at a random batch."
    after = rng.randrange(EPOCHS - 1)

    def start(folder, seed):
        learn = learner(folder, seed, num_workers=2)

        def arm(learn):
            learn.dls.train.dataset.deadly = lambda: True

        class Arm(Callback):
            def before_epoch(self):
                if self.epoch == after:
                    arm(self.learn)

        fit(learn, [Arm()])

    return ended(child(start, folder, 0)) == 1 and finish(folder)


def metric_raises(folder, rng):
    "In the learner's own validation, at a random batch: the fit ends, and can be made again."
    epoch, batch = rng.randrange(EPOCHS), rng.randrange(2)

    def start(folder, seed):
        run(folder, seed, metrics=[failing_metric(N_CALLS_BEFORE[epoch] + batch)])

    return ended(child(start, folder, 0)) == 1 and finish(folder)


def metric_raises_aside(folder, rng):
    "In the validation of the average, at a random batch: only the values of that epoch are lost."
    epoch, batch = rng.randrange(2, EPOCHS), rng.randrange(2)

    def start(folder, seed):
        run_without(folder, epoch, 'in a metric', metrics=[failing_metric(N_CALLS_BEFORE[epoch] + 2 + batch)])

    return ended(child(start, folder, 0)) == 0 and (folder / 'done').read_text() == WHOLE['digest']


# of the metric, before each epoch: two batches, and from epoch 2 on as many for the average
N_CALLS_BEFORE = [0, 2, 4, 8, 12, 16]


def failing_metric(n):
    "Accuracy, but the call after `n` others raises."
    calls = iter(range(n + 1))  # not an attribute, which passes put back

    def metric(preds, targets):
        if next(calls, None) == n:
            raise ZeroDivisionError('in a metric')
        return accuracy(preds, targets)

    metric.__name__ = 'accuracy'
    return AvgMetric(metric)


def run_without(folder, epoch, error, cbs=(), **kwargs):
    """The run, in which `error` keeps the average of `epoch` from being evaluated; leaves its
    digest with those values.

    Raises `RuntimeError` if that is not said in a warning, or if the columns of the average have a
    value.
    """
    learn = learner(folder, 0, **kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        swa = fit(learn, cbs)
    if not any(error in str(w.message) for w in caught):
        raise RuntimeError(f'no warning says {error!r}')
    names = learn.recorder.metric_names[1:]
    for i, name in enumerate(names):
        if name.startswith('swa_'):
            if not np.isnan(learn.recorder.values[epoch][i]):
                raise RuntimeError(f'{name} has a value')
            learn.recorder.values[epoch][i] = WHOLE['rows'][epoch][i]
    (folder / 'done').write_text(digest(learn, swa))


def nan_loss(folder, rng):
    """The loss turns NaN: the fit stops, the average so far stays of use, the checkpoint keeps the
    last good epoch.
    """
    epoch, batch = rng.randrange(3, EPOCHS), rng.randrange(10)

    def spoil(learn):
        next(learn.model.parameters()).data.fill_(float('nan'))

    def start(folder, seed):
        learn = learner(folder, seed)
        swa = fit(learn, [Once(epoch, batch, spoil), TerminateOnNaNCallback()])
        with swa.averaged():
            loss = learn.validate()[0]
        if not (swa.averaged_epochs == list(range(2, epoch)) and loss < 5):
            raise RuntimeError('the average is lost')
        (folder / 'model').write_text('average kept')

    if ended(child(start, folder, 0)) != 0:
        return False
    state = read(folder)['state']
    return state['epoch'] == epoch and all(t.isfinite().all() for t in state['model'].values()) and finish(folder)


def out_of_memory(folder, rng):
    "The batch-norm pass of an epoch runs out of memory: only the values of that epoch are lost."
    epoch, batch = rng.randrange(2, EPOCHS - 1), rng.randrange(10)

    class Memory(Callback):
        def before_batch(self):
            in_pass = not self.training and self.learn.dl.dataset is self.learn.dls.train.dataset
            if in_pass and self.learn.recorder.log[0] == epoch and self.iter == batch:
                raise torch.OutOfMemoryError('CUDA out of memory')

    def start(folder, seed):
        run_without(folder, epoch, 'CUDA out of memory', [Memory()])

    return ended(child(start, folder, 0)) == 0 and (folder / 'done').read_text() == WHOLE['digest']


def two_runs(folder, rng):
    """A second run on the path of a live one is refused and disturbs nothing; after a kill the path
    is free.
    """
    pid = child(run, folder, 0)
    while not (folder / 'run.ckpt').exists():
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.3 * WHOLE['seconds']))

    def second(other, seed):
        try:
            fit(learner(other, seed), path=folder / 'run.ckpt')
        except RuntimeError as e:
            if 'another run is using' in str(e):
                return
        raise RuntimeError('not refused')

    with tempfile.TemporaryDirectory() as other:
        refused = ended(child(second, Path(other), 1)) == 0
    if rng.random() < 0.5:
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        return refused and finish(folder)
    return refused and ended(pid) == 0 and (folder / 'done').read_text() == WHOLE['digest']


def spoiled_file(folder, rng):
    """A checkpoint with a flipped bit, or cut short: refused in one sentence, never overwritten,
    never half believed.
    """

    def die(learn):
        os.kill(os.getpid(), signal.SIGKILL)

    ended(child(run, folder, 0, [Once(3, 1, die)]))
    data = bytearray((folder / 'run.ckpt').read_bytes())
    good = bytes(data)
    if rng.random() < 0.5:
        del data[rng.randrange(len(data)) :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (folder / 'run.ckpt').write_bytes(data)
    code = ended(child(run, folder, 1))
    if code == 0:
        return (folder / 'done').read_text() == WHOLE['digest']  # the bit was one that nothing depends on
    refused = 'is damaged, or it is no checkpoint' in (folder / 'error').read_text()
    refused = refused and (folder / 'run.ckpt').read_bytes() == bytes(data)
    (folder / 'run.ckpt').write_bytes(good)
    return refused and finish(folder)


# Ctrl-C while every step is folded into the average

N_EPOCHS = 4  # of the fit in small steps


class ManyTensors(nn.Module):
    """So many that putting them back takes as long as two Ctrl-Cs are apart; some batch norm for
    the passes.
    """

    def __init__(self):
        super().__init__()
        blocks = [layer for _ in range(20) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8))]
        self.layers = nn.Sequential(*blocks, nn.Linear(8, 3))
        self.many = nn.ParameterList(nn.Parameter(torch.randn(3)) for _ in range(2_000))

    def forward(self, x):
        return self.layers(x) + 20 * torch.stack(list(self.many)).mean(0)


def many_tensors(folder) -> Learner:
    set_seed(0)
    samples = [(torch.randn(8), torch.tensor(i % 3)) for i in range(96)]
    dls = DataLoaders(DataLoader(samples[:64], bs=16, shuffle=True), DataLoader(samples[64:], bs=16), device='cpu')
    plain_sgd = partial(SGD, mom=0.0)  # a step changes each tensor once
    return Learner(dls, ManyTensors(), CrossEntropyLossFlat(), opt_func=plain_sgd, wd=0.0, path=folder)


class Points(Callback):
    "All that the model holds after each optimizer step, after the start: a vector a step."

    order = -100

    def __init__(self, learn):
        self.vectors = [vector_of(learn.model.state_dict())]

    def after_step(self):
        self.vectors.append(vector_of(self.learn.model.state_dict()))


def vector_of(state) -> torch.Tensor:
    return torch.cat([v.flatten().double() for v in state.values()])  # float32 and counts, exactly


def all_points(folder):
    "The fit that nothing happens to, without an average."
    learn = many_tensors(folder)
    points = Points(learn)
    start = time.time()
    with learn.no_bar():
        learn.fit(N_EPOCHS, 0.05, cbs=points)
    torch.save({'vectors': points.vectors, 'seconds': time.time() - start}, folder / 'points')


def averaged_until_interrupted(folder, pipe):
    "The same fit with an average of all steps, until Ctrl-C; leaves what is wrong with it then."
    learn = many_tensors(folder)
    points, swa = Points(learn), SWACallback(0, every=1)
    os.write(pipe, b'.')
    met = None
    try:
        try:
            with learn.no_bar():
                learn.fit(N_EPOCHS, 0.05, cbs=[swa, points])
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what comes later does not meet the fit
    except KeyboardInterrupt as e:
        package = str(Path(fastai_swa.__file__).parent)
        met = any(frame.f_code.co_filename.startswith(package) for frame, _ in traceback.walk_tb(e.__traceback__))
    if not met:
        torch.set_grad_enabled(True)  # two interruptions of fastai's own validation may leave it off
    wrong = list(wrong_after(learn, swa, len(points.vectors) - 1))
    found = {'interrupted': met is not None, 'while averaging': bool(met), 'wrong': wrong}
    (folder / 'found').write_text(json.dumps(found))


def wrong_after(learn, swa, n_steps):
    """What is not as it must be after an interruption in the fit in small steps, after at least
    `n_steps` of them.
    """
    vectors = torch.load(WHOLE['points'])['vectors']
    own = vector_of(learn.model.state_dict())
    sizes = [v.numel() for v in learn.model.state_dict().values()]
    before_and_after = [vector.split(sizes) for vector in vectors[n_steps : n_steps + 2]]
    of_fit = [any(torch.equal(v, state) for state in states) for v, *states in zip(own.split(sizes), *before_and_after)]
    if not all(of_fit):
        yield f'{of_fit.count(False)} of {len(sizes)} tensors of the learner are not its own'
    if not torch.is_grad_enabled():
        yield 'no gradients are computed any more'
        torch.set_grad_enabled(True)
    wrong_runs = [cb.name for cb in learn.cbs if not cb.run]
    if wrong_runs:
        yield f'{wrong_runs} have run=False'
    if any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules()):
        yield 'hooks are left on the model'
    # fastai's own tidying of its callbacks may be cut short
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, SWACallback | Points)])
    if swa.n_averaged:
        yield from wrong_average(learn, swa, vectors[1 : swa.n_averaged + 1])
        if not torch.equal(vector_of(learn.model.state_dict()), own):
            yield 'using the average has changed the learner'
    again = SWACallback(0, every=1)
    with learn.no_bar():
        learn.fit(1, 0.05, cbs=again)
    if again.n_averaged != 4:
        yield f'the next fit averages {again.n_averaged} points, not 4'


def wrong_average(learn, swa, points):
    """What is not as it must be with an average that claims to be the mean of `points`, but for its
    batch norm.
    """
    if len(points) < swa.n_averaged:
        yield f'{swa.n_averaged} points are claimed, and there were {len(points)}'
    mean = torch.stack(points).mean(0)
    average = swa.swa_model.state_dict()
    names = dict(learn.model.named_parameters())
    means = zip(average, mean.split([v.numel() for v in average.values()]))
    distances = {k: (average[k].flatten().double() - v).abs().max() for k, v in means if k in names}
    far = [k for k, distance in distances.items() if distance > 1e-5]
    if far:
        yield f'{len(far)} parameters, such as {far[0]}, are not the mean of the {swa.n_averaged} points claimed'
    with swa.averaged():
        if any(not torch.equal(p, average[k]) for k, p in names.items()):
            yield 'averaged() lends something else'
        if not np.isfinite(learn.validate()[0]):
            yield 'the average cannot be validated'


def interrupted_averaging(folder, rng, gaps=()):
    "Ctrl-C at a random moment, and again after each of the `gaps` in seconds."
    ours, theirs = os.pipe()
    pid = child(averaged_until_interrupted, folder, theirs)
    os.read(ours, 1)
    os.close(ours)
    os.close(theirs)
    time.sleep(rng.uniform(0, WHOLE['seconds in small steps']))
    os.kill(pid, signal.SIGINT)
    for gap in gaps:
        time.sleep(gap)
        os.kill(pid, signal.SIGINT)
    if ended(pid) != 0:
        return False
    found = json.loads((folder / 'found').read_text())
    SEEN['hits'] += found['interrupted']
    SEEN['while averaging'] += found['while averaging']
    (folder / 'error').write_text('; '.join(found['wrong']))
    return not found['wrong']


def interrupted_twice(folder, rng):
    return interrupted_averaging(folder, rng, gaps=[rng.uniform(0, 0.002)])


# each writer


def contents(folder) -> dict:
    "Of the files that are to stay: path -> bytes."
    return {file: file.read_bytes() for file in folder.rglob('*') if file.is_file() and file.suffix != '.lock'}


@contextlib.contextmanager
def no_file_beyond(n_bytes):
    """As on a full disk: a file cannot grow beyond so many bytes. (Python ignores the signal that
    comes with it.)
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wrong_on_full_disk(name, folder, rng) -> list[str]:
    "What is not as it must be where writer `name` meets a full disk; in the process that calls."
    writer, before, said = WRITERS[name], {}, []
    writer.make(folder)
    with contextlib.ExitStack() as stack, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')

        def begin():
            before.update(contents(folder))
            sizes = [len(content) for content in before.values()]
            stack.enter_context(no_file_beyond(rng.choice(writer.limits(sizes))))

        try:
            writer.again(folder, begin)
        except OSError as e:
            said.append(str(e))
        except Exception as e:
            return [f'it raised {type(e).__name__}: {e}']
    said += [str(w.message) for w in caught]
    named = [text for text in said if 'cannot be written' in text and str(folder) in text]
    wrong = []
    if not named:
        wrong.append(f'no sentence names the file: {said}')
    after = contents(folder)
    wrong += [f'{file.name} is not as before' for file in before if after.get(file) != before[file]]
    wrong += [f'{file.name} is left' for file in after if file not in before]
    wrong += [f'{file.name} is left' for file in folder.rglob('*.lock')]
    return wrong


def written_on_full_disk(name, folder, rng):
    "One writer meets a full disk."

    def start(folder):
        (folder / 'there').mkdir()
        wrong = wrong_on_full_disk(name, folder / 'there', rng)
        if wrong:
            raise RuntimeError(f'{name}: {"; ".join(wrong)}')

    SEEN['hits'] += 1
    return ended(child(start, folder)) == 0


def digests_of(name, folder) -> dict:
    "Of what writer `name` has left in `folder`, by its parts."
    parts = WRITERS[name].content(folder)
    return {part: hashlib.sha256(repr(content).encode()).hexdigest() for part, content in parts.items()}


def written_again(name, folder, seconds=None) -> float:
    """Writer `name` writes over what is in `folder`/there, and is killed after so many `seconds`;
    `None`: it is let be.

    Leaves the digests of what was there at its beginning as 'old'. Seconds from there to its end.
    """
    ours, theirs = os.pipe()

    def begin():
        (folder / 'old').write_text(json.dumps(digests_of(name, folder / 'there')))
        os.write(theirs, b'.')

    pid = child(lambda folder: WRITERS[name].again(folder / 'there', begin), folder)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    start = time.time()
    if seconds is not None:
        time.sleep(seconds)
        SEEN['while writing'] += bool(half_written_beside(folder / 'there'))
        os.kill(pid, signal.SIGKILL)
    ended(pid)
    return time.time() - start


def killed_while_writing(name, folder, rng):
    "One writer is killed while it writes, at a random moment."

    def look(folder):
        (folder / 'found').write_text(json.dumps(digests_of(name, folder / 'there')))

    def found():
        return json.loads((folder / 'found').read_text()) if ended(child(look, folder)) == 0 else {}

    there = folder / 'there'
    there.mkdir()
    ended(child(lambda folder: WRITERS[name].make(folder / 'there'), folder))
    shutil.copytree(there, folder / 'kept')
    seconds = written_again(name, folder)
    new = found()
    shutil.rmtree(there)
    (folder / 'kept').rename(there)
    written_again(name, folder, rng.uniform(0, seconds))
    SEEN['hits'] += 1
    old, after = json.loads((folder / 'old').read_text()), found()
    if after.keys() != old.keys() or any(after[part] not in (old[part], new[part]) for part in old):
        (folder / 'error').write_text(f'{name}: half written')
        return False
    if ended(child(lambda folder: WRITERS[name].again(folder / 'there', lambda: None), folder)) != 0:
        return name == 'SnapshotCallback'  # which leaves the folder of another fit alone
    left = [file.name for file in half_written_beside(there)]
    (folder / 'error').write_text(f'{name}: {left} are left')
    return not left


# two processes, one folder


class Steps(Callback):
    """Counts the batches that are trained on, and keeps a digest of the weights at each end of an
    epoch's training.
    """

    def __init__(self):
        self.n, self.digests = 0, []

    def before_batch(self):
        self.n += self.training

    def after_train(self):
        self.digests.append(digest_of(self.learn.model.state_dict()))


def digest_of(state) -> str:
    h = hashlib.sha256()
    for k, v in state.items():
        h.update(k.encode())
        h.update(v.numpy().tobytes())
    return h.hexdigest()


def reported_run(folder, fit_it, seed):
    "A run whose files may be another's, too: what it reports."
    learn, steps, error = learner(folder, seed), Steps(), None
    try:
        fit_it(learn, steps)
    except (RuntimeError, ValueError) as e:
        error = str(e)
    (folder / 'report').write_text(json.dumps({'error': error, 'steps': steps.n, 'members': steps.digests}))


def both(folder, rng, fit_it) -> list[dict]:
    """Two processes run `fit_it(learn, steps)`, the second one a random time after the first; what
    they report.
    """
    runs = [folder / 'first', folder / 'second']
    pids = []
    for seed, own in enumerate(runs):
        own.mkdir()
        pids.append(child(reported_run, own, fit_it, seed))
        if seed == 0 and rng.random() < 0.7:  # else at once
            time.sleep(rng.uniform(0, 0.7 * WHOLE['seconds']))
    if any(ended(pid) for pid in pids):
        raise RuntimeError('a run has not reported')
    SEEN['hits'] += 1
    return [json.loads((own / 'report').read_text()) for own in runs]


def snapshots_of_two(folder, rng):
    "`fit_snapshots` twice with one folder."
    shared = folder / 'snapshots'

    def fit_it(learn, steps):
        with learn.no_bar():
            learn.fit_snapshots(EPOCHS, 1, 1e-2, folder=shared, cbs=steps)

    reports = both(folder, rng, fit_it)
    good = [report for report in reports if report['error'] is None]
    others = [report for report in reports if report['error'] is not None]
    refused = [report for report in others if report['steps'] == 0 and str(shared) in report['error']]
    names = json.loads((shared / 'index.json').read_text())['files']
    members = [digest_of(torch.load(shared / name, weights_only=True)) for name in names]
    said = [(report['error'], report['steps'], report['members'] == members) for report in reports]
    (folder / 'error').write_text(f'error, steps, whether the members are its own: {said}')
    return len(good) == len(refused) == 1 and good[0]['members'] == members and not list(shared.glob('*.lock'))


def checkpoints_of_two(folder, rng):
    """Two fits with one checkpoint, from the same seed; the second is refused, or comes when the
    first is over.
    """

    def fit_it(learn, steps):
        set_seed(0)
        fit(learner(learn.path, 0), [steps], folder / 'run.ckpt')

    reports = both(folder, rng, fit_it)
    (folder / 'error').write_text(str([(report['error'], report['steps']) for report in reports]))
    good = [report['members'] for report in reports if report['error'] is None]
    others = [report for report in reports if report['error'] is not None]
    refused = [report for report in others if 'another run is using' in report['error'] and report['steps'] == 0]
    all_good = bool(good) and all(members == WHOLE['members'] for members in good)
    return all_good and len(refused) == len(others) and not list(folder.glob('run.ckpt*'))


@dataclass
class Row:
    "A fault, and how often it is tried."

    name: str
    cases: list[Callable]  # each does it once, in an empty folder, and returns whether the run survived
    seen: str = ''  # what the name of the row says besides, of what was counted


AVERAGING = '{hits} met the fit, {while averaging} of them the averaging'
KILLS = Row('kill -9 at random moments', [killed], '{hits} kills, {while writing} of them while writing')
FAULTS = [
    KILLS,
    Row('Ctrl-C at random moments', [interrupted]),
    Row('disk full', [disk_full]),
    Row('read-only folder', [read_only]),
    Row('loader worker killed', [worker_dies]),
    Row('exception in a metric', [metric_raises, metric_raises_aside]),
    Row('NaN loss', [nan_loss]),
    Row('out of memory in the batch-norm pass', [out_of_memory]),
    Row('two runs on one path', [two_runs]),
    Row('damaged or truncated file', [spoiled_file]),
    Row('Ctrl-C while averaging', [interrupted_averaging], AVERAGING),
    Row('two Ctrl-Cs in a row', [interrupted_twice], AVERAGING),
    Row('full disk in each writer', [partial(written_on_full_disk, name) for name in WRITERS]),
    Row(
        'kill -9 in each writer', [partial(killed_while_writing, name) for name in WRITERS], '{while writing} half-way'
    ),
    Row('two processes on one folder', [snapshots_of_two, checkpoints_of_two]),
]


def prepare(base):
    "What the runs are compared with: those that nothing happens to."
    (base / 'whole').mkdir()
    steps = Steps()
    start = time.time()

    def whole(folder, seed):
        run(folder, seed, [steps])
        (folder / 'members').write_text(json.dumps(steps.digests))

    assert ended(child(whole, base / 'whole', 0)) == 0, (base / 'whole' / 'error').read_text()
    WHOLE.update(digest=(base / 'whole' / 'done').read_text(), seconds=time.time() - start)
    WHOLE['rows'] = torch.load(base / 'whole' / 'rows', weights_only=False)
    WHOLE['members'] = json.loads((base / 'whole' / 'members').read_text())
    assert ended(child(all_points, base / 'whole')) == 0, (base / 'whole' / 'error').read_text()
    WHOLE['points'] = base / 'whole' / 'points'
    # folds and passes take at least as long as the steps
    WHOLE['seconds in small steps'] = 2 * torch.load(WHOLE['points'])['seconds']


def tried(row, base, rng, kills, times, say) -> tuple:
    "Do what `row` says; (name, tried, survived, lost)."
    SEEN.clear()
    n = survived = 0
    while SEEN['hits'] < kills if row is KILLS else n < times * len(row.cases):
        case = row.cases[n % len(row.cases)]
        folder = base / 'run'
        folder.mkdir()
        kept = case(folder, rng)
        if not kept:
            say(f'lost: {row.name} {n}', (folder / 'error').read_text() if (folder / 'error').exists() else '')
        n += 1
        survived += kept
        shutil.rmtree(folder)
    seen = row.seen.format_map(SEEN)  # a Counter has 0 for what was not met
    return (f'{row.name}: {seen}' if seen else row.name), n, survived, n - survived


def measure(kills=100, times=10, seed=0, say=print, only=''):
    "Rows (fault, tried, survived, lost), of those whose name contains `only`."
    torch.set_num_threads(1)
    base, rng, rows = Path(tempfile.mkdtemp()), random.Random(seed), []
    base.chmod(0o755)
    try:
        prepare(base)
        for row in FAULTS:
            if only in row.name:
                rows.append(tried(row, base, rng, kills, times, say))
                say('| {} | {} | {} | {} |'.format(*rows[-1]))
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--times', type=int, default=10, help='tries of each other fault, and of each writer')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', default='', metavar='TEXT', help='the faults whose name contains it')
    parser.add_argument('--json', type=Path, help='write the rows there too')
    args = parser.parse_args()
    print('| fault | runs tried | survived | lost |\n|---|---|---|---|', flush=True)
    rows = measure(args.kills, args.times, args.seed, lambda *a: print(*a, flush=True), args.only)
    if args.json:
        found = {'rows': rows, 'whole_run_seconds': WHOLE['seconds'], 'torch': torch.__version__}
        args.json.write_text(json.dumps(found, indent=1))
    sys.exit(any(lost for *_, lost in rows))


if __name__ == '__main__':
    main()
