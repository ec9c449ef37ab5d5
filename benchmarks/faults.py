"""What becomes of a fit with `CheckpointCallback` when things go wrong: faults done to real processes, counted.

    python benchmarks/faults.py              # 100 kills and the other faults; some minutes on two cores
    python benchmarks/faults.py --kills 5 --times 1

Each run is a process of its own. After a fault the same call is made again, in a new process with other weights, another order of the
data and another random state, until it ends. It *survived* if it then ended bitwise as the run that nothing happened to (weights,
optimizer, average with its batch norm, columns, losses, learning rates, random states) and no file was ever half written; where the
fault is one to refuse, if it was refused in one sentence and nothing else was touched. Everything else is *lost*.
"""
import argparse, contextlib, hashlib, json, os, random, resource, shutil, signal, sys, tempfile, time, warnings
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback, TerminateOnNaNCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import AvgMetric, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam
from fastai.torch_core import set_seed
from fastai_swa import CheckpointCallback, SWACallback, files
from torch import nn

EPOCHS = 6


# the run

class Samples(list):
    "A data set of which one sample may kill the process that fetches it."
    deadly = lambda self: False
    def __getitem__(self, i):
        if self.deadly(): os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def learner(folder, seed, num_workers=0, metrics=None):
    set_seed(seed)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 32, generator=g)
    samples = list(zip(x, (x @ torch.randn(32, 4, generator=g)).argmax(1)))
    dls = DataLoaders(DataLoader(Samples(samples[:500]), bs=32, shuffle=True, num_workers=num_workers), DataLoader(samples[500:], bs=64),
                      device='cpu')
    model = nn.Sequential(nn.Linear(32, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(.1),
                          nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 4))
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func=Adam, metrics=metrics or [AvgMetric(accuracy)], path=folder)


def accuracy(preds, targets): return (preds.argmax(1) == targets).float().mean()


def fit(learn, cbs=(), path='run.ckpt'):
    swa = SWACallback(2)
    with learn.no_bar(): learn.fit_one_cycle(EPOCHS, 1e-2, cbs=[swa, SaveModelCallback('accuracy'), CheckpointCallback(learn.path/path), *cbs])
    return swa


def digest(learn, swa) -> str:
    "One number for all that a fit leaves behind."
    h = hashlib.sha256()
    def add(o):
        if isinstance(o, torch.Tensor): h.update(o.detach().numpy().tobytes())
        else: h.update(repr(o).encode())
    for model in (learn.model, swa.swa_model):
        for k, v in model.state_dict().items(): add(k), add(v)
    for s in learn.opt.state_dict()['state']:
        for k, v in s.items(): add(k), add(v)
    rows = [list(row) for row in learn.recorder.values]
    add([rows, list(map(float, learn.recorder.losses)), list(map(float, learn.recorder.lrs)), swa.averaged_epochs, random.getstate()])
    add(torch.get_rng_state()), add(np.random.get_state()[1].tolist()), add(learn.dls.train.rng.getstate())    # noqa: NPY002
    return h.hexdigest()


# processes

def child(f, *args) -> int:
    "Run `f(*args)` in a process of its own; its number."
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        torch.set_num_threads(1)
        with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            warnings.simplefilter('ignore')
            f(*args)
        code = 0
    except KeyboardInterrupt: code = 2
    except BaseException as e: (args[0]/'error').write_text(f'{type(e).__name__}: {e}')
    finally: os._exit(code)


def ended(pid) -> int: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(folder, seed, cbs=(), **kwargs):
    "The run itself; leaves its digest when it ends. `seed` counts where there is a checkpoint, else the run begins as all do."
    learn = learner(folder, seed if (folder/'run.ckpt').exists() else 0, **kwargs)
    swa = fit(learn, cbs)
    (folder/'done').write_text(digest(learn, swa))


def read(folder): return files.read(folder/'run.ckpt', 'checkpoint', 1)


def half_written(folder) -> bool:
    "Is there a checkpoint that cannot be read?"
    try: return (folder/'run.ckpt').exists() and not read(folder)
    except ValueError: return True


def finish(folder, seed=1000) -> bool:
    "Start the run again; did it end as the one that nothing happened to?"
    if half_written(folder): return False
    code = ended(child(run, folder, seed))
    left = list(folder.glob('run.ckpt*'))
    return code == 0 and not left and (folder/'done').read_text() == WHOLE['digest']


WHOLE = {}    # the digest and the seconds of the run that nothing happens to


# the faults: each does it once, in an empty folder, and returns whether the run survived

def killed(folder, rng, signal=signal.SIGKILL, most=4, counts=None):
    "Kill at random moments, every other one while a checkpoint is being written, up to `most` times in a row; then let it end."
    for i in range(rng.randint(1, most)):
        pid, end, new = child(run, folder, i), time.time() + rng.uniform(0, 1.2 * WHOLE['seconds']), folder/'run.ckpt.fastai_swa.tmp'
        late = end + WHOLE['seconds'] * (rng.random() < .5)
        while time.time() < end or time.time() < late and not new.exists(): time.sleep(.0001)
        writing = new.exists()
        os.kill(pid, signal)
        code = ended(pid)
        if counts is not None and code != 0:
            counts['kills'] += 1
            counts['while writing'] += writing
        if half_written(folder): return False
        if code == 0: return (folder/'done').read_text() == WHOLE['digest']
    return finish(folder)


def interrupted(folder, rng): return killed(folder, rng, signal.SIGINT)


class Once(Callback):
    "Does `f` at the start of batch `batch` of epoch `epoch`, in training."
    order = 70
    def __init__(self, epoch, batch, f): self.at, self.f = (epoch, batch), f
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == self.at: self.f(self.learn)


def disk_full(folder, rng):
    "From a random moment on files cannot grow beyond some bytes; training goes on without. Then the machine dies."
    epoch, limit = rng.randrange(1, EPOCHS - 1), rng.randrange(1, 1 << 20)
    def fill(learn):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    def die(learn): os.kill(os.getpid(), signal.SIGKILL)
    cbs = [Once(epoch, 3, fill), Once(EPOCHS - 1, 5, die)]
    def unsaved(folder, seed):    # SaveModelCallback would raise: it writes too
        learn = learner(folder, seed)
        learn.save = lambda *args, **kwargs: None
        fit(learn, cbs)
    return ended(child(unsaved, folder, 0)) == -signal.SIGKILL and not (folder/'run.ckpt.fastai_swa.tmp').exists() and finish(folder)


def read_only(folder, rng):
    "A folder that cannot be written is refused in one sentence before the first epoch; as another user, if we are the administrator."
    folder.chmod(0o555)
    def start(parent, seed):
        if os.getuid() == 0: os.setuid(65534)
        learn = learner(folder, seed)
        before = [p.clone() for p in learn.model.parameters()]
        try: fit(learn)
        except OSError: same = all(map(torch.equal, before, learn.model.parameters()))
        else: same = False
        if not same: raise RuntimeError('not refused')
    with tempfile.TemporaryDirectory() as other:
        refused = ended(child(start, Path(other), 0)) == 0
    folder.chmod(0o755)
    return refused and not list(folder.iterdir()) and finish(folder)


def worker_dies(folder, rng):
    "A process of the loader is killed at a random batch."
    after = rng.randrange(EPOCHS - 1)
    def start(folder, seed):
        learn = learner(folder, seed, num_workers=2)
        def arm(learn): learn.dls.train.dataset.deadly = lambda: True
        class Arm(Callback):
            def before_epoch(self):
                if self.epoch == after: arm(self.learn)
        fit(learn, [Arm()])
    return ended(child(start, folder, 0)) == 1 and finish(folder)


def metric_raises(folder, rng):
    calls = [rng.randrange(1, 2 * EPOCHS)]
    def metric(preds, targets):
        calls[0] -= 1
        if calls[0] < 0: raise ZeroDivisionError('in a metric')
        return accuracy(preds, targets)
    metric.__name__ = 'accuracy'
    def start(folder, seed): run(folder, seed, metrics=[AvgMetric(metric)])
    return ended(child(start, folder, 0)) == 1 and finish(folder)


def nan_loss(folder, rng):
    "The loss turns NaN: the fit stops, the average of the epochs before stays of use, the checkpoint keeps the last good epoch."
    epoch, batch = rng.randrange(3, EPOCHS), rng.randrange(10)
    def spoil(learn): next(learn.model.parameters()).data.fill_(float('nan'))
    def start(folder, seed):
        learn = learner(folder, seed)
        swa = fit(learn, [Once(epoch, batch, spoil), TerminateOnNaNCallback()])
        with swa.averaged(): loss = learn.validate()[0]
        if not (swa.averaged_epochs == list(range(2, epoch)) and loss < 5): raise RuntimeError('the average is lost')
        (folder/'model').write_text('average kept')
    if ended(child(start, folder, 0)) != 0: return False
    state = read(folder)['state']
    return state['epoch'] == epoch and all(t.isfinite().all() for t in state['model'].values()) and finish(folder)


def out_of_memory(folder, rng):
    "The batch-norm pass runs out of memory: the learner keeps its own weights and statistics, and the run can be made again."
    epoch, batch = rng.randrange(2, EPOCHS), rng.randrange(10)
    def start(folder, seed):
        learn = learner(folder, seed)
        kept = {}
        class Memory(Callback):
            def after_train(self): kept.update({k: v.clone() for k, v in self.learn.model.state_dict().items()})
            def before_batch(self):
                in_pass = not self.training and self.learn.dl.dataset is self.learn.dls.train.dataset
                if in_pass and self.learn.recorder.log[0] == epoch and self.iter == batch: raise torch.OutOfMemoryError('CUDA out of memory')
        try: fit(learn, [Memory()])
        except torch.OutOfMemoryError:
            if not all(torch.equal(v, kept[k]) for k, v in learn.model.state_dict().items()): raise RuntimeError('weights changed')
            return
        raise RuntimeError('no fault')
    return ended(child(start, folder, 0)) == 0 and finish(folder)


def two_runs(folder, rng):
    "A second run on the path of a live one is refused and disturbs nothing; after a kill the path is free."
    pid = child(run, folder, 0)
    while not (folder/'run.ckpt').exists(): time.sleep(.005)
    time.sleep(rng.uniform(0, .3 * WHOLE['seconds']))
    def second(other, seed):
        try: fit(learner(other, seed), path=folder/'run.ckpt')
        except RuntimeError as e:
            if 'another run is using' in str(e): return
        raise RuntimeError('not refused')
    with tempfile.TemporaryDirectory() as other: refused = ended(child(second, Path(other), 1)) == 0
    if rng.random() < .5:
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        return refused and finish(folder)
    return refused and ended(pid) == 0 and (folder/'done').read_text() == WHOLE['digest']


def spoiled_file(folder, rng):
    "A checkpoint with a flipped bit, or cut short: refused in one sentence, never overwritten, never half believed."
    def die(learn): os.kill(os.getpid(), signal.SIGKILL)
    ended(child(run, folder, 0, [Once(3, 1, die)]))
    data = bytearray((folder/'run.ckpt').read_bytes())
    good = bytes(data)
    if rng.random() < .5: del data[rng.randrange(len(data)):]
    else: data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (folder/'run.ckpt').write_bytes(data)
    code = ended(child(run, folder, 1))
    if code == 0: return (folder/'done').read_text() == WHOLE['digest']    # the bit was one that nothing depends on
    refused = 'is damaged, or it is no checkpoint' in (folder/'error').read_text() and (folder/'run.ckpt').read_bytes() == bytes(data)
    (folder/'run.ckpt').write_bytes(good)
    return refused and finish(folder)


FAULTS = {'kill -9 at random moments': killed, 'Ctrl-C at random moments': interrupted, 'disk full': disk_full, 'read-only folder': read_only,
          'loader worker killed': worker_dies, 'exception in a metric': metric_raises, 'NaN loss': nan_loss,
          'out of memory in the batch-norm pass': out_of_memory, 'two runs on one path': two_runs, 'damaged or truncated file': spoiled_file}


def measure(kills=100, times=10, seed=0, say=print):
    "Rows (fault, tried, survived, lost)."
    torch.set_num_threads(1)
    base, rng, rows = Path(tempfile.mkdtemp()), random.Random(seed), []
    base.chmod(0o755)
    try:
        (base/'whole').mkdir()
        start = time.time()
        assert ended(child(run, base/'whole', 0)) == 0, (base/'whole'/'error').read_text()
        WHOLE.update(digest=(base/'whole'/'done').read_text(), seconds=time.time() - start)
        for name, fault in FAULTS.items():
            counts, tried, survived = {'kills': 0, 'while writing': 0}, 0, 0
            while counts['kills'] < kills if fault is killed else tried < times:
                folder = base/f'{fault.__name__}{tried}'
                folder.mkdir()
                kept = fault(folder, rng, counts=counts) if fault is killed else fault(folder, rng)
                if not kept: say(f'lost: {name} {tried}', (folder/'error').read_text() if (folder/'error').exists() else '')
                tried, survived = tried + 1, survived + kept
                shutil.rmtree(folder)
            if fault is killed: name = f'{name}: {counts["kills"]} kills, {counts["while writing"]} of them while writing'
            rows.append((name, tried, survived, tried - survived))
            say('| {} | {} | {} | {} |'.format(*rows[-1]))
    finally: shutil.rmtree(base, ignore_errors=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--times', type=int, default=10, help='tries of each other fault')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--json', type=Path, help='write the rows there too')
    args = parser.parse_args()
    print('| fault | runs tried | survived | lost |\n|---|---|---|---|', flush=True)
    rows = measure(args.kills, args.times, args.seed, lambda *a: print(*a, flush=True))
    if args.json: args.json.write_text(json.dumps({'rows': rows, 'whole_run_seconds': WHOLE['seconds'], 'torch': torch.__version__}, indent=1))
    sys.exit(any(lost for *_, lost in rows))


if __name__ == '__main__': main()
