"""The runner of the experiments: what it trains, what it keeps, what it survives."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from PIL import Image
from torch import nn

import fastai_swa.experiments.progress as progress_module
import fastai_swa.experiments.train as train_module
from fastai_swa import __main__
from fastai_swa.experiments import RECIPES, Recipe, Settings, reproduce
from fastai_swa.experiments.machine import TimeIsUp
from fastai_swa.experiments.plan import sgd_lr, swa_lr
from fastai_swa.experiments.recipe_learner import EpochRecorder
from fastai_swa.experiments.record import Record, _Clock
from fastai_swa.experiments.train import run_seed
from fastai_swa.vision import IMAGENET_STATS, ShakeShake, cifar

from .helpers import learner, loaders, net
from .reference import twins

ROOT = Path(__file__).resolve().parents[1]
IMAGES = Settings(images=200)  # 160 would divide evenly: the last batch is short


def small_net(n):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6 * 64, n)
    )


def plain_net(n):
    return nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6 * 64, n))


TINY = Recipe('tiny', small_net, 10, budget=6, lr=0.1, swa_lr=0.05, swa_start=4, wd=5e-4, bs=64)


@pytest.fixture(autouse=True)
def restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def complete(folder, seed=0):
    "The record of a complete seed: a line of the file of the row."
    lines = (
        [json.loads(line) for line in (folder / 'runs.jsonl').read_text().splitlines()]
        if (folder / 'runs.jsonl').exists()
        else []
    )
    return next((data for data in lines if data['kind'] == 'training' and data['seed'] == seed), None)


def begun(folder, seed=0):
    "The record of a seed, complete or not."
    file = folder / f'seed-{seed}.json'
    return complete(folder, seed) or (json.loads(file.read_text()) if file.exists() else None)


def seed_0(folder, recipe=TINY, settings=IMAGES, **kwargs):
    return run_seed(recipe, 0, folder, settings, 'digits', 1, **kwargs)


def without_times(data):
    data = json.loads(json.dumps(data))
    del data['sessions']
    for k in ('started', 'finished'):
        data[k] = data[k] is not None
    for part in data['parts']:
        for row in part['epochs']:
            del row['seconds']
    return data


def assert_same_seed(a, b, seed=0):
    "Two folders hold bitwise the same of a seed, and nothing else than that."

    def all_files(folder):
        return sorted(
            str(f.relative_to(folder))
            for f in folder.rglob('*')
            if str(f.relative_to(folder)).startswith(f'seed-{seed}')
        )

    files = [f for f in all_files(a) if f.endswith('.pth')]
    assert all_files(a) == all_files(b)
    assert [f for f in files if '/' not in f] == [
        f'seed-{seed}-{n}.pth' for n in ('sgd-1.5b', 'sgd-1b', 'swa-average', 'swa')
    ]
    assert {f for f in all_files(a)} - set(files) == {f'seed-{seed}-swa', f'seed-{seed}-swa/index.json'}
    assert without_times(complete(a, seed)) == without_times(complete(b, seed))
    for name in files:
        x, y = torch.load(a / name), torch.load(b / name)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    torch.set_num_threads(1)
    seed_0(folder)
    return folder


def by_hand(recipe, lr, n_epoch, settings=IMAGES, seed=0):
    """A run from its first epoch to its last, without forks: (learner, weights at the end of each
    epoch, table).
    """
    torch.set_num_threads(1)
    set_seed(seed)
    model = recipe.network(10).to(memory_format=torch.channels_last)
    dls = cifar(
        10, 'digits', recipe.stats, recipe.padding, bs=recipe.bs, seed=seed, n_images=settings.images, device='cpu'
    )
    dls.train.rng = Random(seed)
    weights = []

    class Schedule(Callback):
        def before_train(self):
            self.opt.set_hyper('lr', lr(self.epoch))

        def after_train(self):
            weights.append([p.detach().clone().double() for p in self.model.parameters()])

    learn = Learner(
        dls,
        model,
        CrossEntropyLossFlat(),
        opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, weight_decay=recipe.wd)),
        wd=recipe.wd,
        wd_bn_bias=True,
        metrics=accuracy,
    )
    with learn.no_bar(), learn.no_logging():
        learn.fit(n_epoch, lr(0), cbs=Schedule())
    return learn, weights, learn.recorder.values


# what is trained


@pytest.mark.parametrize(
    'recipe',
    [TINY, Recipe('plain', plain_net, 10, 6, 0.05, 0.02, 4, 5e-4, stats=IMAGENET_STATS, padding='reflect', bs=64)],
    ids=lambda r: r.name,
)
def test_runs_that_share_their_first_epochs_end_as_each_would_by_itself(tmp_path, recipe):
    data = seed_0(tmp_path, recipe)
    for name, lr, n in (
        ('SGD 1B', lambda e: sgd_lr(recipe, e, 6), 6),
        ('SGD 1.5B', lambda e: sgd_lr(recipe, e, 9), 9),
        ('SWA', lambda e: swa_lr(recipe, e), 9),
    ):
        learn, weights, table = by_hand(recipe, lr, n)
        saved = torch.load(tmp_path / f'seed-0-{name.lower().replace(" ", "-")}.pth')
        assert all(torch.equal(v, saved[k]) for k, v in learn.model.state_dict().items())
        rows = [row for p in data['parts'] if name in p['runs'] for row in p['epochs']]
        assert [row['lr'] for row in rows] == pytest.approx([lr(e) for e in range(n)], rel=1e-12)
        assert [(np.float32(row['valid_loss']), np.float32(row['accuracy'])) for row in rows] == [
            tuple(map(np.float32, r[1:])) for r in table
        ]
        folded = range(4, 9) if name == 'SWA' else [n - 1]
        assert [i for i, row in enumerate(rows) if row.get('swa_accuracy') is not None] == list(folded)
    folder = tmp_path / 'seed-0-swa'
    assert json.loads((folder / 'index.json').read_text())['epochs'] == list(
        range(4 - 3, 9 - 3)
    )  # of the part, which begins with epoch 3
    for i, ws in enumerate(weights[4:]):
        snapshot = torch.load(folder / f'snapshot-{i + 1:02}.pth')
        assert all(torch.equal(snapshot[k].double(), w) for (k, _), w in zip(learn.model.named_parameters(), ws))
    average = torch.load(tmp_path / 'seed-0-swa-average.pth')
    for (k, p), *ws in zip(learn.model.named_parameters(), *weights[4:]):
        torch.testing.assert_close(average[k], sum(ws).div(5).float(), rtol=1e-6, atol=1e-7)


def test_a_seed_is_of_the_weights_the_order_and_the_augmentation(tmp_path):
    run_seed(TINY, 3, tmp_path, IMAGES, 'digits', 1)
    learn, _, _ = by_hand(TINY, lambda e: sgd_lr(TINY, e, 6), 6, seed=3)
    saved = torch.load(tmp_path / 'seed-3-sgd-1b.pth')
    assert all(torch.equal(v, saved[k]) for k, v in learn.model.state_dict().items())


CYCLED = replace(TINY, name='cycled', padding=None, one_cycle_lr=0.2)


def test_a_one_cycle_run_ends_as_fastais_own_fit_one_cycle(tmp_path):
    data = seed_0(tmp_path, CYCLED)  # without augmentation
    for name, n in ('one-cycle-1b', 6), ('one-cycle-1.5b', 9):
        set_seed(0)
        model = small_net(10).to(memory_format=torch.channels_last)
        dls = cifar(10, 'digits', padding=None, bs=64, n_images=200, device='cpu')
        dls.train.rng = Random(0)
        opt_func = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4))
        learn = Learner(
            dls, model, CrossEntropyLossFlat(), opt_func=opt_func, wd=5e-4, wd_bn_bias=True, metrics=accuracy
        )
        ends = []

        class End(Callback):
            def after_train(self):
                ends.append({k: v.clone() for k, v in self.model.named_parameters()})

        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(n, 0.2, cbs=End())
        saved = torch.load(tmp_path / f'seed-0-{name}.pth')
        for k, v in learn.model.state_dict().items():
            torch.testing.assert_close(saved[k], v, rtol=1e-4, atol=1e-5)
        part = next(p for p in data['parts'] if p['runs'] == [name.replace('-1', ' 1').replace('b', 'B')])
        for column, n_last in (
            ('third', round(n / 3)),
            ('fifth', round(n / 5)),
        ):  # the mean of its last epochs, with its own batch norm
            for k, p in model.named_parameters():
                p.data = torch.stack([end[k] for end in ends[-n_last:]]).double().mean(0).float()
            batches = [(x.as_subclass(torch.Tensor),) for x, _ in learn.dls.train]
            for layer, (mean, var) in twins.bn_statistics(model, batches).items():
                model.get_submodule(layer).running_mean.copy_(mean)
                model.get_submodule(layer).running_var.copy_(var)
            assert all(row[f'{column}_accuracy'] is None for row in part['epochs'][:-1])
            last = part['epochs'][-1]
            assert [last[f'{column}_valid_loss'], last[f'{column}_accuracy']] == pytest.approx(
                list(map(float, learn.validate())), abs=3e-3
            )


def test_averages_beside_a_run_change_nothing_of_it_and_an_ema_takes_every_step(tmp_path, whole, monkeypatch):
    steps, beside = [], train_module._average_beside

    def seen(average, begin):
        swa = beside(average, begin)
        if average.decay is not None:
            steps.append(swa)
        return swa

    monkeypatch.setattr(train_module, '_average_beside', seen)
    data, plain = seed_0(tmp_path, replace(TINY, ema=0.9)), complete(whole)
    assert [swa.n_averaged for swa in steps] == [
        4 * (p['end'] - p['begin']) for p in data['parts'] if len(p['runs']) == 1
    ]  # 200 images, by 64
    for p, q in zip(data['parts'], plain['parts'], strict=True):
        for a, b in zip(p['epochs'], q['epochs'], strict=True):
            assert {k: a[k] for k in b if k != 'seconds'} == {k: v for k, v in b.items() if k != 'seconds'}
    for file in whole.glob('*.pth'):
        a, b = torch.load(file), torch.load(tmp_path / file.name)
        assert all(torch.equal(a[k], b[k]) for k in a), file.name


def test_a_seed_in_bf16_that_is_interrupted_ends_as_the_whole_one(tmp_path):
    settings = replace(IMAGES, precision='bf16')
    seed_0(tmp_path / 'whole', settings=settings)
    # in a first part, and in parts that go on from a fork
    for at in 'epoch 2 of', 'SGD 1.5B  epoch 7', 'SWA  epoch 7':
        with pytest.raises(Stop):
            seed_0(
                tmp_path / 'parts',
                settings=settings,
                show=lambda seed, line, at=at: stop(seed, line) if at in line else None,
            )
    seed_0(tmp_path / 'parts', settings=settings)
    assert_same_seed(tmp_path / 'parts', tmp_path / 'whole')


def test_bf16_is_autocast_with_the_weights_in_float32(tmp_path):
    kinds, forward = set(), nn.Conv2d.forward

    def seen(self, x):
        y = forward(self, x)
        if y.requires_grad:
            kinds.add((self.weight.dtype, y.dtype))  # in a step
        return y

    with pytest.MonkeyPatch.context() as m:
        m.setattr(nn.Conv2d, 'forward', seen)
        data = seed_0(tmp_path, settings=replace(IMAGES, precision='bf16'))
    assert kinds == {(torch.float32, torch.bfloat16)} and data['settings']['precision'] == 'bf16'


def test_the_average_of_an_sgd_run_is_its_end_alone_with_batch_norm_refreshed(tmp_path, whole):
    plain = seed_0(tmp_path, Recipe('plain', plain_net, 10, 6, 0.05, 0.02, 4, 5e-4, bs=64))
    with_bn = complete(whole)
    for data, is_same in (plain, True), (with_bn, False):  # without batch norm there is nothing to refresh
        for part in data['parts']:
            if part['runs'] in (['SGD 1B'], ['SGD 1.5B']):
                *others, last = part['epochs']
                assert (last['swa_valid_loss'] == last['valid_loss']) is is_same and all(
                    row['swa_valid_loss'] is None for row in others
                )


def test_train_loss_is_the_mean_over_the_samples_of_the_epoch_and_nothing_else_changes():
    plain, seen = learner(), []
    plain.fit(2)
    learn = learner()
    learn.remove_cb(learn.recorder)
    learn.add_cb(EpochRecorder())

    class Keep(Callback):
        def after_batch(self):
            if self.training and self.epoch == 1:
                seen.append((float(self.loss), len(self.yb[0])))

    learn.fit(2, cbs=Keep())
    assert [list(row)[1:] for row in learn.recorder.values] == [
        list(row)[1:] for row in plain.recorder.values
    ]  # of the validation
    assert learn.recorder.values[1][0] == pytest.approx(
        sum(loss * n for loss, n in seen) / sum(n for _, n in seen), rel=1e-6
    )
    assert all(torch.equal(a, b) for a, b in zip(learn.model.parameters(), plain.model.parameters()))


def meta_step(recorder):
    "A step whose tensors have no values: whatever reads one fails."
    dls = loaders()
    learn = Learner(
        dls,
        net(dropout=0).to('meta'),
        CrossEntropyLossFlat(),
        opt_func=partial(OptimWrapper, opt=torch.optim.SGD),
        lr=0.1,
    )
    learn.remove_cb(learn.recorder)
    learn.add_cb(recorder)
    learn.create_opt()
    learn.epoch = learn.n_iter = learn.n_epoch = learn.train_iter = 1
    learn.pct_train, learn.dl = 0.0, dls.train
    learn('before_epoch')
    learn('before_train')
    learn.model.to('meta')
    learn._set_device = lambda b: [t.to('meta') for t in b]
    learn.one_batch(0, dls.train.one_batch())


def test_a_step_reads_nothing_from_the_device():
    from fastai.learner import Recorder

    class Losses(Recorder):
        name = 'recorder'

    fails = Losses()
    fails.lrs, fails.losses = [], []
    fails.smooth_loss.reset()
    with pytest.raises((NotImplementedError, RuntimeError), match='[Mm]eta'):
        meta_step(fails)  # the probe sees fastai's own read
    meta_step(EpochRecorder())


def test_a_network_can_be_compiled(tmp_path, monkeypatch, whole):
    modes, compile_ = [], torch.compile
    monkeypatch.setattr(
        torch, 'compile', lambda model, mode, dynamic: modes.append((mode, dynamic)) or compile_(model, backend='eager')
    )
    settings = Settings(images=200, compile='reduce-overhead')
    data, plain = seed_0(tmp_path, settings=settings), complete(whole)
    assert set(modes) == {('reduce-overhead', False)} and data['settings']['compile'] == 'reduce-overhead'
    for p, q in zip(data['parts'], plain['parts']):
        for a, b in zip(p['epochs'], q['epochs']):
            assert a['valid_loss'] == pytest.approx(b['valid_loss'], rel=1e-4)
    assert not any(k.startswith('_orig_mod') for k in torch.load(tmp_path / 'seed-0-swa-average.pth'))


# never lose a run


def epochs_of_all_parts(folder):
    data = begun(folder)
    return 0 if data is None else sum(len(p['epochs']) for p in data['parts'])


class Stop(BaseException):
    "As a kill: nothing catches it."


@pytest.mark.parametrize('seconds', [0, 30])  # between checkpoints: each epoch has one; or only the first of each part
def test_a_seed_interrupted_again_and_again_ends_bitwise_as_the_whole_one(tmp_path, whole, monkeypatch, seconds):
    monkeypatch.setattr(train_module, '_SECONDS', seconds)
    starts = []
    for n_before in (1, 2, 1, 3, 5, 2, 4, 6, 99):  # epochs until the next interruption
        shown = []

        def show(seed, line, n_before=n_before, shown=shown):
            shown.append(line)
            if len(shown) == n_before:
                raise Stop

        starts.append(epochs_of_all_parts(tmp_path))
        try:
            seed_0(tmp_path, show=show)
        except Stop:
            continue
        break
    assert len(set(starts)) > 3
    assert_same_seed(tmp_path, whole)
    # each is on record, whatever the checkpoint was taken in
    assert len(complete(tmp_path)['sessions']) == len(starts)


@pytest.mark.parametrize('call', range(1, 6))
@pytest.mark.parametrize('method', ['_save', 'clean_up', '_save_weights'])
def test_a_seed_killed_while_it_writes_what_it_keeps_ends_bitwise_as_the_whole_one(
    tmp_path, whole, monkeypatch, method, call
):
    calls, write = [], getattr(Record, method)

    def killed(self, *args):
        if method != '_save' or self.data['parts'][self.number]['done']:
            calls.append(1)
        if len(calls) == call:
            calls.append(1)
            raise Stop
        return write(self, *args)

    monkeypatch.setattr(Record, method, killed)
    try:
        seed_0(tmp_path)
    except Stop:
        seed_0(tmp_path)
    assert len(calls) >= call or method == '_save_weights'  # of which there are four
    assert_same_seed(tmp_path, whole)


SCRIPT = '''
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job has it ignored
from pathlib import Path
from tests.test_run import TINY, IMAGES, RECIPES, reproduce
RECIPES['tiny'] = TINY
if __name__ == '__main__':
    print(reproduce('tiny', int(sys.argv[2]), sys.argv[1], 'digits', IMAGES, jobs=int(sys.argv[3]), threads=1))
'''


def script(folder, *args):
    (folder / 'go.py').write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', str(folder / 'go.py'), str(folder / 'out'), *args],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def test_a_killed_process_goes_on_and_two_seeds_side_by_side_are_the_same_as_one_after_the_other(tmp_path, whole):
    (tmp_path / 'killed').mkdir()
    first = script(tmp_path / 'killed', '2', '2')
    while first.poll() is None and epochs_of_all_parts(tmp_path / 'killed' / 'out') <= 4:
        time.sleep(0.02)
    children = subprocess.run(
        ['ps', '-o', 'pid=', '--ppid', str(first.pid)], capture_output=True, text=True
    ).stdout.split()
    for pid in (first.pid, *map(int, children)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    first.communicate()
    output = script(tmp_path / 'killed', '2', '2').communicate()[0]
    assert output.endswith('{}\n') and 'seed 0  complete' in output and 'seed 1  complete' in output
    assert_same_seed(tmp_path / 'killed' / 'out', whole)
    run_seed(TINY, 1, tmp_path / 'one', IMAGES, 'digits', 1)
    assert_same_seed(tmp_path / 'killed' / 'out', tmp_path / 'one', seed=1)
    a, b = (torch.load(tmp_path / 'killed' / 'out' / f'seed-{i}-swa.pth') for i in (0, 1))
    assert not torch.equal(a['0.weight'], b['0.weight'])


def test_time_that_does_not_suffice_stops_it_between_epochs_and_it_goes_on(tmp_path, whole, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(train_module, 'time', lambda: now[0])

    def show(seed, line):
        now[0] += 10

    monkeypatch.setattr(_Clock, 'next_epoch', lambda self: 10.0)
    with pytest.raises(TimeIsUp):
        seed_0(tmp_path, show=show, until=1035.0)
    assert epochs_of_all_parts(tmp_path) == 3 and now[0] == 1030  # a fourth would have ended at 1040
    with pytest.raises(TimeIsUp):
        seed_0(tmp_path, show=show, until=1035.0)
    assert epochs_of_all_parts(tmp_path) == 3
    seed_0(tmp_path)
    assert_same_seed(tmp_path, whole)


def stop(seed, line):
    raise Stop


def test_a_seed_goes_on_with_its_own_number_of_threads(tmp_path, whole):
    with pytest.raises(Stop):
        seed_0(tmp_path, show=stop)
    run_seed(TINY, 0, tmp_path, IMAGES, 'digits', threads=2)
    assert_same_seed(tmp_path, whole)


def test_more_seeds_join_those_that_are_there(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, 'tiny', TINY)

    def run(n):
        return reproduce('tiny', n, tmp_path, 'digits', IMAGES, threads=1, stream=io.StringIO())

    assert run(1) == {}
    before = complete(tmp_path)
    assert run(2) == {} and complete(tmp_path) == before and complete(tmp_path, 1)['finished']


# the file


def test_the_record_says_what_was_run_on_what_and_is_standard_json(whole):
    def refuse(name):
        raise AssertionError(name)

    (line,) = (whole / 'runs.jsonl').read_text().splitlines()  # a line a seed
    data = json.loads(line, parse_constant=refuse)
    assert (
        data['recipe'] == 'tiny'
        and data['seed'] == 0
        and data['threads'] == 1
        and data['finished'] >= data['started'] > '2026'
    )
    assert (
        data['images'] == {'kind': 'digits', 'train': 200, 'valid': 397, 'sha256': data['images']['sha256']}
        and len(data['images']['sha256']) == 16
    )
    (session,) = data['sessions']
    assert (
        session['versions']['torch'] == torch.__version__.partition('+')[0]
        and session['hardware']['cores'] == os.cpu_count()
        and session['jobs'] == 1
    )
    assert data['settings'] == {
        'scale': 1.0,
        'images': 200,
        'test_images': None,
        'device': 'cpu',
        'precision': 'fp32',
        'compile': None,
        'deterministic': False,
    }
    assert list(data['parts'][-1]['epochs'][0]) == [
        'lr',
        'train_loss',
        'valid_loss',
        'accuracy',
        'swa_valid_loss',
        'swa_accuracy',
        'ens_valid_loss',
        'ens_accuracy',
        'seconds',
    ]
    assert not (whole / 'seed-0.json').exists() and complete(whole) == data


def test_the_fingerprint_is_of_the_images_and_labels():
    from fastai_swa.experiments.recipe_learner import _digest_of_images as fingerprint

    def loaded():
        return cifar(10, 'digits', n_images=100, device='cpu')

    prints = [
        fingerprint(loaded()),
        fingerprint(loaded()),
        fingerprint(cifar(10, 'digits', n_images=200, device='cpu')),
    ]
    for part in 'train_ds', 'valid_ds':
        for what in 'images', 'labels':
            dls = loaded()
            getattr(getattr(dls, part), what).view(-1)[7] += 1
            prints.append(fingerprint(dls))
    assert prints[0] == prints[1] and len(set(prints)) == 6


def fake_record(seconds, **kwargs):
    """A record of TINY at the start, with epochs of so many seconds timed: those without and those
    with a validation of the average.
    """
    record = Record.__new__(Record)
    record.recipe, record.seed, record.number = TINY, 3, 0
    from fastai_swa.experiments.plan import parts, runs

    record.parts = parts(runs(TINY))
    record.data = {'parts': [{'epochs': []} for _ in record.parts], 'finished': None}
    record.clock = _Clock(record)
    record.clock.seconds = {False: list(seconds[0]), True: list(seconds[1])}
    return record


def test_the_time_left_counts_the_epochs_that_validate_the_average_as_dearer():
    n_all, n_folds = sum(p.end - p.begin for p in fake_record([[], []]).parts), 1 + 1 + 5
    assert fake_record([[], []]).clock.left() == 0  # nothing is known yet
    assert fake_record([[10.0], []]).clock.left() == pytest.approx(
        10 * (n_all - n_folds) + 15 * n_folds
    )  # guessed: a half more
    assert fake_record([[10.0], [30.0, 30.0]]).clock.left() == pytest.approx(10 * (n_all - n_folds) + 30 * n_folds)
    slow_start = fake_record([[100.0, 1.0, 1.0, 1.0], []])
    assert slow_start.clock.left() == pytest.approx(
        n_all - n_folds + 1.5 * n_folds
    )  # an outlier, as the first epoch on a GPU is, counts for nothing
    slow_start.data['parts'][0]['epochs'] = [{}] * 2
    assert slow_start.clock.left() == pytest.approx(n_all - n_folds - 2 + 1.5 * n_folds)
    assert slow_start.clock.next_epoch() == pytest.approx(1.2)


@pytest.mark.parametrize('is_terminal', [True, False])
def test_each_seed_has_one_line_of_progress(is_terminal, monkeypatch):
    stream, now = io.StringIO(), [0.0]
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(progress_module, 'monotonic', lambda: now[0])
    lines = progress_module.ProgressLines(stream)
    for key, text, now[0] in (0, 'a1', 0), (1, 'b1', 1), (0, 'a2', 30), (0, 'a3', 61):
        lines.show(key, text)
    lines.end()
    if is_terminal:
        assert stream.getvalue().endswith('\033[2A\033[2Ka3\n\033[2Kb1\n')  # up two lines, both written over
    else:
        assert stream.getvalue() == 'a1\nb1\na3\na3\nb1\n'  # at most one a minute, and the last ones


def test_a_line_says_where_a_run_stands(tmp_path):
    lines = []
    seed_0(tmp_path, show=lambda seed, line: lines.append(line))
    import re

    assert re.fullmatch(
        r'seed 0  SGD 1B, SGD 1.5B, SWA  epoch 1 of 3  accuracy [\d.]+ %  [\d.e-]+ s an epoch  \d+ s left', lines[0]
    )
    assert re.fullmatch(
        r'seed 0  SWA  epoch 9 of 9  accuracy [\d.]+ % \(average [\d.]+ %\)  [\d.e-]+ s an epoch  0 s left', lines[-1]
    )


# what goes wrong


def command(monkeypatch, capsys, *args):
    "(exit status, what it says)"
    monkeypatch.setitem(RECIPES, 'tiny', TINY)
    with pytest.raises(SystemExit) as e:
        __main__.main(['reproduce', *map(str, args)])
    return e.value.code, capsys.readouterr()


@pytest.fixture
def tiny_command(monkeypatch, capsys, tmp_path):
    def run(*args):
        return command(
            monkeypatch, capsys, 'tiny', '--data', 'digits', '--images', 200, '--threads', 1, '--out', tmp_path, *args
        )

    return run


def test_a_command_runs_and_says_when_it_is_complete(tiny_command, tmp_path, whole):
    code, said = tiny_command()
    assert code == 0 and said.out.endswith('seed 0  complete\n') and not said.err
    assert_same_seed(tmp_path, whole)


def test_a_time_given_stops_the_command_cleanly(tiny_command, tmp_path, whole):
    code, said = tiny_command('--until', '0s')
    assert code == 0 and said.err == 'seed 0: stopped in time; the same command goes on from there\n'
    assert tiny_command()[0] == 0
    assert_same_seed(tmp_path, whole)


@pytest.mark.parametrize('text', ['8', 'm', '8 m', 'soon', '8d'])
def test_a_time_that_cannot_be_read_is_one_sentence(tiny_command, text):
    code, said = tiny_command('--until', text)
    assert code == 2 and f'expected a time such as 90s, 8m or 1.5h, not {text!r}' in said.err


def test_other_settings_for_a_seed_are_refused_and_it_stays_as_it_is(tiny_command, tmp_path, monkeypatch, capsys):
    with pytest.raises(Stop):
        seed_0(tmp_path, show=stop)
    before = (tmp_path / 'seed-0.json').read_bytes()
    for args, what in (
        (['--scale', 2], 'budget=6, not 12'),
        (['--images', 300], 'images=200, not 300'),
        (['--compile', 'default'], "compile=None, not 'default'"),
    ):
        code, said = tiny_command(*args)
        assert code == 2 and what in said.err and 'give the same, or another folder' in said.err and one_sentence(said)
        code, said = tiny_command('--seeds', 2, *args)  # nor is another seed begun beside it
        assert code == 2 and begun(tmp_path, 1) is None
    assert (tmp_path / 'seed-0.json').read_bytes() == before
    for damaged in '{', '[]', '{"recipe": "tiny"}':
        (tmp_path / 'seed-0.json').write_text(damaged)
        code, said = tiny_command()
        assert (
            code == 2
            and 'seed-0.json is damaged, or no record of a seed: move it away' in said.err
            and (tmp_path / 'seed-0.json').read_text() == damaged
        )


def one_sentence(said):
    "After the usage."
    return len(said.err.partition('error: ')[2].splitlines()) == 1


def test_a_recipe_that_has_changed_since_is_refused_for_seeds_begun_and_complete(tmp_path, whole):
    with pytest.raises(Stop):
        seed_0(tmp_path, show=stop)
    for folder in tmp_path, whole:
        before = begun(folder)
        for changed, said in (
            (replace(TINY, lr=0.2), 'lr=0.1, not 0.2'),
            (replace(TINY, bs=32), 'bs=64, not 32'),
            (replace(TINY, network=plain_net), "network='small_net', not 'plain_net'"),
            (replace(TINY, one_cycle_lr=0.2), 'one_cycle_lr=None, not 0.2'),
        ):
            with pytest.raises(ValueError, match=f'seed 0 was run with {said}: give the same, or another folder'):
                seed_0(folder, changed)
        assert begun(folder) == before


def test_a_seed_that_another_process_stores_meanwhile_stops_no_other(tmp_path, monkeypatch):
    from fastai_swa.experiments.record import find_record, read_records

    (tmp_path / 'seed-1.json').write_text('{')  # being written, or damaged
    assert find_record(tmp_path, 0) is None
    (tmp_path / 'seed-1.json').unlink()
    (tmp_path / 'seed-1.json').symlink_to(tmp_path / 'gone')  # listed, and no more there when it is read
    assert read_records(tmp_path) == {} and find_record(tmp_path, 1) is None


def test_a_complete_record_that_is_not_stored_yet_is_not_lost(tmp_path, whole):
    data = complete(whole)
    (tmp_path / 'seed-0.json').write_text(json.dumps(data))
    for file in whole.glob('*.pth'):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    seed_0(tmp_path)
    assert complete(tmp_path) == data and not (tmp_path / 'seed-0.json').exists()


def test_a_second_process_at_a_seed_is_refused(tiny_command, tmp_path):
    from fastai_swa.files import Lock

    lock = Lock(tmp_path / 'seed-0.json')
    code, said = tiny_command()
    lock.release()
    assert code == 1 and 'another run is using' in said.err and len(said.err.splitlines()) == 1


def images(folder, n_classes=10, size=32):
    for part, n in (('train', 4), ('test', 2)):
        for c in range(n_classes):
            (folder / part / f'c{c}').mkdir(parents=True)
            for i in range(n):
                Image.new('RGB', (size, size), (c * 20, i, 0)).save(folder / part / f'c{c}' / f'{i}.jpg')


def test_data_that_cannot_be_used_is_one_sentence(monkeypatch, capsys, tmp_path):
    def run(folder):
        return command(monkeypatch, capsys, 'tiny', '--data', folder, '--out', tmp_path / 'out')

    code, said = run(tmp_path / 'nowhere')
    assert code == 2 and 'nowhere is no folder' in said.err and one_sentence(said)
    images(tmp_path / 'nine', 9)
    code, said = run(tmp_path / 'nine')
    assert code == 2 and '9 class folders, CIFAR-10 has 10' in said.err and one_sentence(said)
    images(tmp_path / 'big', size=33)
    code, said = run(tmp_path / 'big')
    assert code == 2 and 'has 33 x 33 pixels, expected 32 x 32' in said.err and one_sentence(said)

    def fail(*args, **kwargs):
        raise RuntimeError('File not found or corrupted.')

    monkeypatch.setattr('torchvision.datasets.CIFAR10.download', fail)
    (tmp_path / 'truncated').mkdir()
    (tmp_path / 'truncated' / 'cifar-10-python.tar.gz').write_bytes(b'half')
    code, said = run(tmp_path / 'truncated')
    assert code == 2 and 'CIFAR-10 is not complete in' in said.err and 'corrupted' in said.err and one_sentence(said)
    assert not (tmp_path / 'out').exists()


def test_a_folder_of_jpeg_files_is_said_to_be_one(monkeypatch, capsys, tmp_path):
    images(tmp_path / 'data')
    assert command(monkeypatch, capsys, 'tiny', '--data', tmp_path / 'data', '--out', tmp_path / 'out')[0] == 0
    assert complete(tmp_path / 'out')['images']['kind'] == 'CIFAR-10, JPEG'


def test_an_unknown_recipe_names_those_that_are_near(monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, 'vgg17')
    assert code == 2 and "no recipe of the name 'vgg17'; did you mean vgg16-cifar10 or " in said.err


def test_a_gpu_out_of_memory_is_one_sentence_and_the_same_command_goes_on(tiny_command, tmp_path, whole, monkeypatch):
    n, forward = [0], nn.Conv2d.forward

    def hungry(self, x):
        n[0] += n[0] < 21 or self.training  # in training: beside it an average is left out, and the run goes on
        if n[0] == 22:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...')
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, 'forward', hungry)
    code, said = tiny_command()
    assert code == 1 and len(said.err.splitlines()) == 1
    assert (
        'the GPU is out of memory (CUDA out of memory); the same command goes on from there: with fewer --jobs, perhaps'
        in said.err
    )
    assert 0 < epochs_of_all_parts(tmp_path) < 22
    assert tiny_command()[0] == 0
    assert_same_seed(tmp_path, whole)


@pytest.mark.parametrize('name', ['fork0', 'seed-0-sgd-1b.pth', 'seed-0.json', 'runs.jsonl', 'part1.ckpt'])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tiny_command, tmp_path, whole, monkeypatch, name):
    replace, full = os.replace, [True]

    def no_room(a, b):
        if full[0] and name in str(b) and (name != 'seed-0.json' or epochs_of_all_parts(tmp_path) > 8):
            raise OSError(28, 'No space left on device')
        return replace(a, b)

    monkeypatch.setattr(os, 'replace', no_room)
    code, said = tiny_command()
    assert (
        code == 1
        and 'cannot be written: [Errno 28] No space left on device' in said.err
        and len(said.err.splitlines()) == 1
    )
    assert not list(tmp_path.glob('*.tmp'))
    full[0] = False
    assert tiny_command()[0] == 0
    assert_same_seed(tmp_path, whole)


def test_a_seed_after_one_that_ran_out_of_memory_within_autocast_is_trained_as_any_other(tmp_path, monkeypatch):
    "fastai leaves autocast on after an error in a forward pass, and with it a cache of weights."
    settings = replace(IMAGES, precision='bf16')
    run_seed(TINY, 1, tmp_path / 'alone', settings, 'digits', 1)
    n, forward = [0], nn.Conv2d.forward

    def hungry(self, x):
        n[0] += 1
        if n[0] == 5:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried')
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, 'forward', hungry)
    monkeypatch.setitem(RECIPES, 'tiny', TINY)
    missing = reproduce('tiny', 2, tmp_path / 'both', 'digits', settings, threads=1, stream=io.StringIO())
    assert list(missing) == [0] and 'out of memory' in missing[0] and not torch.is_autocast_enabled('cpu')
    assert_same_seed(tmp_path / 'both', tmp_path / 'alone', seed=1)


def processes(folder):
    return subprocess.run(['pgrep', '-f', str(folder)], capture_output=True, text=True).stdout.split()


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_command_and_no_further_seed_is_begun(tmp_path, how):
    command = script(tmp_path, '9', '2')
    out = tmp_path / 'out'
    wait_for(lambda: command.poll() is not None or all(begun(out, i) for i in (0, 1)))
    os.kill(command.pid, how)
    command.wait(30)
    wait_for(
        lambda: (
            not subprocess.run(
                ['ps', '-o', 'pid=', '--ppid', str(command.pid)], capture_output=True, text=True
            ).stdout.split()
        )
    )
    time.sleep(1)

    def there():
        return {f.name: f.stat().st_mtime_ns for f in out.iterdir()}

    before = there()
    time.sleep(2)
    assert there() == before and begun(out, 4) is None
    command.communicate()


def test_a_killed_seed_is_named_and_the_others_are_trained(tmp_path):
    (tmp_path / 'go.py').write_text(
        SCRIPT.replace(
            "if __name__",
            '''
import os, fastai_swa.experiments.train as run
train = run._train_part
def dies(record, *args):
    if record.seed == 0: os._exit(7)
    train(record, *args)
run._train_part = dies
if __name__''',
        ).replace('SCRIPT', '')
    )
    output = subprocess.run(
        [sys.executable, '-W', 'ignore', str(tmp_path / 'go.py'), str(tmp_path / 'out'), '2', '2'],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    ).stdout
    assert (
        output.endswith("{0: 'its process ended with 7; the same command goes on from there'}\n")
        and (tmp_path / 'out' / 'seed-1-swa.pth').exists()
    )


def test_a_run_without_a_finite_weight_is_recorded_and_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, 'tiny', replace(TINY, lr=1e12, swa_lr=1e12))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert reproduce('tiny', 2, tmp_path, 'digits', IMAGES, threads=1, stream=io.StringIO()) == {}
    assert complete(tmp_path, 1)['finished'] and not (tmp_path / 'seed-0-swa-average.pth').exists()
    assert 'seed 0: the SWA run diverged, nothing of it is finite' in run_report(tmp_path)


def run_report(folder):
    from fastai_swa.experiments import report

    return report(folder)


@pytest.mark.parametrize(
    'args, sentence',
    [
        (['--device', 'cuda'], "device 'cuda' cannot be used: "),
        (['--device', 'foo'], "device 'foo' cannot be used: "),
        (['--scale', 'inf'], 'scale must be positive, not inf'),
        (['--scale', '-1'], 'scale must be positive, not -1.0'),
        (['--until', '1.2.3s'], 'expected a time such as'),
    ],
)
def test_settings_that_cannot_be_used_are_one_sentence_and_begin_nothing(tiny_command, tmp_path, args, sentence):
    if args == ['--device', 'cuda'] and torch.cuda.is_available():
        pytest.skip('there is a GPU, which can be used')
    code, said = tiny_command(*args)
    assert code == 2 and sentence in said.err and one_sentence(said) and not list(tmp_path.iterdir())


def test_an_error_of_torchs_own_is_one_sentence_with_its_traceback_and_other_seeds_go_on(
    tiny_command, tmp_path, monkeypatch, whole
):
    train = train_module._train_part

    def fails(record, *args):
        if record.seed == 1:
            raise RuntimeError('cuDNN error: CUDNN_STATUS_EXECUTION_FAILED')
        if record.seed == 2:
            raise RuntimeError('CUDA error: out of memory')  # as of a process whose context does not fit
        train(record, *args)

    monkeypatch.setattr(train_module, '_train_part', fails)
    code, said = tiny_command('--seeds', 3)
    assert (
        code == 1
        and 'Traceback' in said.err
        and 'seed 1: failed (RuntimeError: cuDNN error' in said.err
        and 'seed 2: the GPU is out of memory (CUDA error: out of memory)' in said.err
    )
    assert_same_seed(tmp_path, whole)


def test_what_is_left_of_a_seed_whose_record_is_gone_is_neither_gone_on_with_nor_removed(tmp_path, whole):
    with pytest.raises(Stop):
        seed_0(
            tmp_path,
            TINY,
            Settings(images=100),
            show=lambda seed, line: stop(seed, line) if 'epoch 4' in line else None,
        )
    assert list(tmp_path.glob('*.ckpt')) and list(tmp_path.glob('*.fork*'))
    (tmp_path / 'seed-0.json').rename(tmp_path / 'aside')
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(ValueError, match='seed-0.part.*ckpt, seed-0.fork0 in .* whose record, seed-0.json, is gone'):
        seed_0(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    for file in tmp_path.glob('seed-0.*'):
        file.unlink()
    seed_0(tmp_path)
    assert_same_seed(tmp_path, whole)


def test_a_row_goes_on_after_its_folder_was_moved_and_names_no_place(tmp_path, whole, monkeypatch):
    monkeypatch.setattr('fastai_swa.experiments.train._SECONDS', 0)  # a checkpoint of each epoch

    def stop_late(seed, line):
        if 'SWA  epoch 7' in line:
            stop(seed, line)

    with pytest.raises(Stop):
        seed_0(tmp_path / 'here', show=stop_late)
    for file in (tmp_path / 'here').rglob('*'):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file
    (tmp_path / 'here').rename(tmp_path / 'there')
    seed_0(tmp_path / 'there')
    assert_same_seed(tmp_path / 'there', whole)
    assert not (tmp_path / 'here').exists()


def without_a_model(file):
    saved = torch.load(file, weights_only=True)
    del saved['state']['model']
    torch.save(saved, file)


@pytest.mark.parametrize(
    'damage',
    [lambda f: f.unlink(), lambda f: f.write_bytes(b'half'), without_a_model],
    ids=['missing', 'damaged', 'broken'],
)
def test_a_part_whose_end_is_lost_is_trained_again(tmp_path, whole, damage):
    with pytest.raises(Stop):
        seed_0(tmp_path, show=lambda seed, line: stop(seed, line) if 'SGD 1.5B  epoch 7' in line else None)
    for file in tmp_path.glob('*.fork*'):
        damage(file)
    with pytest.raises(TimeIsUp), pytest.MonkeyPatch.context() as m:  # in time or not
        m.setattr(_Clock, 'next_epoch', lambda self: 1000.0)
        seed_0(tmp_path, until=time.time() + 100)
    seed_0(tmp_path)
    assert_same_seed(tmp_path, whole)


def test_a_checkpoint_that_a_kill_left_behind_a_part_that_was_over_goes_away(tmp_path, whole, monkeypatch):
    over = Record.part_is_over

    def killed(self, *args):
        over(self, *args)
        raise Stop

    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(Record, 'part_is_over', killed)
        seed_0(tmp_path)
    assert list(tmp_path.glob('*.ckpt'))
    seed_0(tmp_path)
    assert_same_seed(tmp_path, whole)


def test_checkpoints_know_the_runners_callbacks_by_the_places_that_they_had_at_first(tmp_path):
    "So that a seed begun by an earlier version goes on."
    with pytest.raises(Stop):
        seed_0(tmp_path, settings=replace(IMAGES, precision='bf16'), show=stop)
    state = torch.load(tmp_path / 'seed-0.part0.ckpt', weights_only=True)['state']
    assert {'fastai_swa.experiments.run._Log.0', 'fastai_swa.experiments.run._Checkpoint.0'} <= state['states'].keys()
    assert {
        'fastai_swa.experiments.learners.EpochRecorder.0',
        'fastai_swa.experiments.learners.BF16.0',
    } <= state['callbacks'].keys()


def test_the_time_an_epoch_takes_is_known_from_earlier_sessions(tmp_path):
    with pytest.raises(Stop):
        seed_0(tmp_path, show=stop)
    file = tmp_path / 'seed-0.json'
    data = json.loads(file.read_text())
    data['parts'][0]['epochs'][0]['seconds'] = 1000.0
    file.write_text(json.dumps(data))
    with pytest.raises(TimeIsUp):
        seed_0(tmp_path, until=time.time() + 600)  # no epoch is begun that would take until later
    assert epochs_of_all_parts(tmp_path) == 1
    with pytest.raises(TimeIsUp):
        run_seed(TINY, 1, tmp_path, IMAGES, 'digits', 1, until=time.time() - 1)
    assert begun(tmp_path, 1) is None


def test_a_disk_that_stays_full_ends_the_run_before_work_is_lost(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(train_module, '_SECONDS', 0)
    replace_, full = os.replace, [True]

    def no_room(a, b):
        if full[0] and 'part0.ckpt' in str(b) and epochs_of_all_parts(tmp_path) > 0:
            raise OSError(28, 'No space left on device')
        return replace_(a, b)

    monkeypatch.setattr(os, 'replace', no_room)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(OSError, match='No space left on device'):
        seed_0(tmp_path)
    assert (
        epochs_of_all_parts(tmp_path) == 2 and sum('training goes on' in str(w.message) for w in caught) == 1
    )  # at the second in a row
    full[0] = False
    seed_0(tmp_path)
    assert_same_seed(tmp_path, whole)


def test_a_line_too_long_for_the_terminal_is_cut(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setenv('COLUMNS', '20')
    lines = progress_module.ProgressLines(stream)
    lines.show(0, 'x' * 50)
    assert stream.getvalue() == '\033[2K' + 'x' * 19 + '\n'


def test_a_seed_leaves_the_settings_of_the_process_as_they_were(tmp_path):
    torch.backends.cudnn.benchmark, threads = False, torch.get_num_threads()
    seed_0(tmp_path, settings=Settings(images=200, deterministic=True))
    assert (
        not torch.are_deterministic_algorithms_enabled()
        and not torch.backends.cudnn.benchmark
        and torch.get_num_threads() == threads
    )


def test_shake_shake_and_its_tail_interrupted_again_and_again_end_bitwise_as_the_whole_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, '_SECONDS', 0)
    recipe = replace(RECIPES['shakeshake-cifar10'], network=partial(ShakeShake, width=2), budget=5, swa_start=4, bs=32)
    settings = Settings(images=72, test_images=20)
    seed_0(tmp_path / 'whole', recipe, settings)
    for _ in range(99):
        n_shown = []

        def show(seed, line, n_shown=n_shown):
            n_shown.append(line)
            if len(n_shown) == 2:
                raise Stop

        try:
            seed_0(tmp_path / 'stopped', recipe, settings, show=show)
        except Stop:
            continue
        break
    whole, stopped = [complete(tmp_path / name) for name in ('whole', 'stopped')]
    assert len(stopped['sessions']) > 3 and without_times(whole) == without_times(stopped)
    assert [(p['runs'], p['begin'], p['end']) for p in whole['parts']] == [
        (['SGD 1B', 'SWA'], 0, 4),
        (['SGD 1B'], 4, 5),
        (['SWA'], 4, 7),
    ]
    files = sorted(f.name for f in (tmp_path / 'whole').glob('*.pth'))
    assert files == ['seed-0-sgd-1b.pth', 'seed-0-swa-average.pth', 'seed-0-swa.pth']
    for name in files:
        x, y = [torch.load(tmp_path / folder / name) for folder in ('whole', 'stopped')]
        assert all(torch.equal(x[k], y[k]) for k in x), name
