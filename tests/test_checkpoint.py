"""`CheckpointCallback`: what is killed goes on bitwise; what cannot go on says why and loses
nothing."""

import copy
import gc
import pickle
import random
import weakref
import zipfile
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger, ProgressCallback
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import GradientAccumulation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper, ranger
from fastai.torch_core import set_seed
from torch import nn

from fastai_swa import CheckpointCallback, SaveSWAModelCallback, SnapshotCallback, SWACallback, ema

from .helpers import At, assert_same, fingerprint, learner, loaders, mixed_precision_on_cpu, net, raising


class Killed(BaseException):
    "Stands in for the end of the process: no handler of fastai's or ours sees it coming."


def kill(epoch, batch=1, event='after_batch', training=True):
    def f(cb):
        raise Killed

    return At(event, epoch, f, batch=batch, training=training)


def swa_print(swa):
    if swa is None:
        return {}
    res = {'swa.epochs': swa.averaged_epochs, 'swa.n': swa.n_averaged}
    if swa.swa_model is None:
        return res
    tensors = {
        **swa.swa_model.state_dict(),
        **dict(swa.swa_model.named_buffers()),
    }  # those that a state dict leaves out too
    return (
        res | {f'swa.{k}': v for k, v in tensors.items()} | {'swa.modes': [m.training for m in swa.swa_model.modules()]}
    )


def split(m):
    return [list(m[:4].parameters()), list(m[4:].parameters())]


METHODS = {
    'fit': lambda learn, cbs: learn.fit(4, 0.05, cbs=cbs),
    'fit_one_cycle': lambda learn, cbs: learn.fit_one_cycle(4, 0.05, cbs=cbs),
    'fit_flat_cos': lambda learn, cbs: learn.fit_flat_cos(4, 0.05, cbs=cbs),
    'fit_sgdr': lambda learn, cbs: learn.fit_sgdr(2, 1, 0.05, cbs=cbs),
    'fit_swa': lambda learn, cbs: learn.fit_swa(4, 0.1, swa_start=1, cbs=cbs),
    'fit_swa_cyclic': lambda learn, cbs: learn.fit_swa(4, 0.1, swa_lr=(0.05, 0.01), swa_start=1, cycle_len=2, cbs=cbs),
    'fine_tune': lambda learn, cbs: learn.fine_tune(2, 1e-2, freeze_epochs=2, cbs=cbs),
}


class Run:
    """One way to train, that can be started again and again in fresh learners; `folder` is the disk
    that stays.
    """

    def __init__(self, folder, method='fit', swa=None, others=(), seed=0, num_workers=0, attach=False, **kwargs):
        self.folder, self.method, self.swa, self.others, self.kwargs = folder, method, swa, others, kwargs
        self.num_workers, self.folder_path = num_workers, folder
        folder.mkdir(exist_ok=True, parents=True)

    def start(self, seed=0, killer=None, checkpoint=True, **settings):
        kwargs = dict(self.kwargs)
        opt_func = kwargs.pop('opt_func', partial(Adam, wd=0.01))
        self.learn = learner(
            dls=loaders(num_workers=self.num_workers),
            seed=seed,
            opt_func=opt_func,
            splitter=split,
            path=self.folder,
            **kwargs,
        )
        self.average = self.swa() if self.swa else None
        others = [f() for f in self.others]
        self.checkpoint = CheckpointCallback(self.folder / 'run.ckpt', **settings) if checkpoint else None
        cbs = [cb for cb in (self.average, self.checkpoint, killer) if cb] + others
        result = METHODS[self.method](self.learn, cbs)
        if isinstance(result, SWACallback):
            self.average = result
        return self

    def fingerprint(self):
        res = fingerprint(self.learn) | swa_print(self.average)
        res['values'] = [list(row) for row in self.learn.recorder.values]
        res['metric_names'] = list(self.learn.recorder.metric_names)
        if hasattr(self.learn.recorder, 'hps'):
            res |= {f'hps.{k}': [float(x) for x in v] for k, v in self.learn.recorder.hps.items()}
        return res


def expected(tmp_path, **kwargs):
    return Run(tmp_path / 'whole', **kwargs).start(checkpoint=False).fingerprint()


def killed_and_resumed(tmp_path, killer, **kwargs):
    """Killed, and started again in a learner with other weights, another order of the data, another
    random state.
    """
    run = Run(tmp_path / 'parts', **kwargs)
    with pytest.raises(Killed):
        run.start(killer=killer)
    assert (tmp_path / 'parts' / 'run.ckpt').exists()
    run.start(seed=99)
    assert not list((tmp_path / 'parts').glob('run.ckpt*'))
    return run.fingerprint()


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('epoch', range(4))
def test_resume_is_exact_at_every_epoch_under_each_fit_method(tmp_path, method, epoch):
    if epoch > 2 and method == 'fit_sgdr':
        return  # three epochs
    if method == 'fine_tune':
        epoch %= 2
    swa = None if 'swa' in method else lambda: SWACallback(1)
    assert_same(
        killed_and_resumed(tmp_path, kill(epoch), method=method, swa=swa), expected(tmp_path, method=method, swa=swa)
    )


def kill_in_fit(number, epoch, batch=1):
    class Killer(Callback):
        order, n = 70, 0

        def before_fit(self):
            self.n += 1

        def after_batch(self):
            if self.training and (self.n, self.epoch, self.iter) == (number, epoch, batch):
                raise Killed

    return Killer()


@pytest.mark.parametrize('epoch', range(2))
@pytest.mark.parametrize('others', [(), (lambda: SaveModelCallback('accuracy'),)], ids=['alone', 'save_model'])
def test_the_second_stage_of_fine_tune_is_not_taken_for_its_first(tmp_path, capsys, epoch, others):
    run = dict(method='fine_tune', swa=lambda: SWACallback(0), others=others)
    assert_same(killed_and_resumed(tmp_path, kill_in_fit(2, epoch), **run), expected(tmp_path, **run))
    said = [line for line in capsys.readouterr().out.splitlines() if 'run.ckpt' in line]
    assert said == [
        'run.ckpt: fit 1 was completed before; it is skipped',
        f'run.ckpt: going on with fit 2, epoch {epoch} (from 0) of 2',
    ]


def test_a_skipped_fit_saves_and_loads_nothing(tmp_path):
    run = Run(tmp_path, method='fine_tune', others=(lambda: SaveModelCallback('accuracy', at_end=True, fname='end'),))
    with pytest.raises(Killed):
        run.start(killer=kill_in_fit(2, 1))
    before = (tmp_path / 'models' / 'end.pth').read_bytes()
    with pytest.raises(Killed):
        run.start(seed=9, killer=kill_in_fit(2, 1))
    assert (tmp_path / 'models' / 'end.pth').read_bytes() == before


class Texts(list):
    "Token numbers of texts, for a language model."


def language_learner(seed):
    from fastai.data.core import DataLoaders
    from fastai.text.data import LMDataLoader

    g = torch.Generator().manual_seed(0)
    texts = Texts(torch.randint(20, (n,), generator=g) for n in (30, 50, 40, 60, 20))
    set_seed(seed, reproducible=True)
    dls = DataLoaders(
        LMDataLoader(texts, bs=4, seq_len=6, shuffle=True, num_workers=0),
        LMDataLoader(texts, bs=4, seq_len=6, num_workers=0),
        device='cpu',
    )
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    return Learner(dls, model, CrossEntropyLossFlat(), lr=0.05, metrics=[])


def test_resume_is_exact_where_the_texts_of_a_language_model_are_shuffled_on_and_on(tmp_path):
    def fit(seed, killer=None, cbs=()):
        learn = language_learner(seed)
        learn.fit(4, cbs=[*cbs] + [killer] * bool(killer))
        return fingerprint(learn) | {'texts': list(learn.dls.train.items.idxs)}

    whole = fit(0)
    with pytest.raises(Killed):
        fit(0, kill(2), [CheckpointCallback(tmp_path / 'run.ckpt')])
    assert_same(fit(9, None, [CheckpointCallback(tmp_path / 'run.ckpt')]), whole)


SWAS = {
    'none': None,
    'swa': lambda: SWACallback(1),
    'cycles': lambda: SWACallback(0, cycle_len=2, swa_eval_freq=0, bn_batches=2),
    'ema': lambda: SWACallback(1, weight=ema(0.7)),
    'steps': lambda: SWACallback(1, every=4),
    'ema of steps': lambda: SWACallback(0, every=1, weight=ema(0.9)),
}
OTHERS = {
    'alone': (),
    'save': (lambda: SaveModelCallback('accuracy'),),
    'stop': (lambda: EarlyStoppingCallback('valid_loss', patience=2, min_delta=0.1),),
    'all': (
        lambda: SaveModelCallback('accuracy'),
        lambda: EarlyStoppingCallback('valid_loss', patience=3),
        lambda: ReduceLROnPlateau('valid_loss', min_delta=0.5, patience=1),
    ),
}


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('others', OTHERS)
@pytest.mark.parametrize('swa', SWAS)
def test_resume_is_exact_with_and_without_averages_trackers_and_workers(tmp_path, swa, others, num_workers):
    run = dict(swa=SWAS[swa], others=OTHERS[others], num_workers=num_workers)
    if swa == 'swa' and others == 'save':
        run['others'] += (lambda: SaveSWAModelCallback('swa_accuracy', fname='avg'),)
    epoch = random.Random(f'{swa}{others}').choice([1, 2, 3]) if others != 'stop' else 1
    assert_same(killed_and_resumed(tmp_path, kill(epoch), **run), expected(tmp_path, **run))
    for name in ('model.pth', 'avg.pth'):
        a, b = (tmp_path / part / 'models' / name for part in ('whole', 'parts'))
        assert a.exists() == b.exists()
        if a.exists():
            assert_same(torch.load(a), torch.load(b))


@pytest.mark.parametrize(
    'event, epoch, training',
    [
        ('before_epoch', 0, None),
        ('before_epoch', 2, None),
        ('before_train', 1, None),
        ('after_step', 1, True),
        ('after_train', 2, None),
        ('before_validate', 2, None),
        ('after_pred', 2, False),
        ('after_validate', 3, None),
        ('after_epoch', 1, None),
        ('after_epoch', 3, None),
        ('after_fit', 3, None),
    ],
)
def test_resume_is_exact_wherever_in_an_epoch_it_was_killed(tmp_path, event, epoch, training):
    killer = kill(epoch, batch=None if 'batch' not in event else 1, event=event, training=training)
    run = dict(swa=lambda: SWACallback(1), others=(lambda: SaveModelCallback('accuracy'),))
    if event == 'after_fit':
        killer.order = 59  # after the average's own, before SaveModel has loaded the best weights
    assert_same(killed_and_resumed(tmp_path, killer, **run), expected(tmp_path, **run))


def test_a_run_killed_again_and_again_ends_as_the_one_that_was_not(tmp_path):
    run = Run(
        tmp_path / 'parts', swa=lambda: SWACallback(1, every=3), others=(lambda: EarlyStoppingCallback(patience=3),)
    )
    for seed, (epoch, batch) in enumerate([(0, 0), (0, 5), (1, 3), (1, 0), (3, 1), (2, 5), (3, 5)]):
        try:
            run.start(seed=seed, killer=kill(epoch, batch))  # those that lie behind are not reached
        except Killed:
            continue
        break
    assert_same(run.fingerprint(), expected(tmp_path, swa=run.swa, others=run.others))


@pytest.mark.parametrize('every', [2, 3, 100])
def test_a_checkpoint_of_every_kth_epoch_goes_on_from_there(tmp_path, capsys, every):
    run = Run(tmp_path / 'parts', swa=lambda: SWACallback(1))
    with pytest.raises(Killed):
        run.start(killer=kill(3), every=every)
    run.start(seed=9, every=every)
    assert f'going on with epoch {3 // every * every} ' in capsys.readouterr().out
    assert_same(run.fingerprint(), expected(tmp_path, swa=run.swa))


# what else a fit depends on


class Counter(Callback):
    "A user's callback that steers training by what it has seen."

    def __init__(self):
        self.n, self.seen, self.total, self.scale = 0, [], None, np.float32(0.1)

    def after_batch(self):
        if not self.training:
            return
        self.n += 1
        self.seen.append(self.n % 3)
        self.total = self.learn.loss.detach() if self.total is None else self.total + self.learn.loss.detach()
        self.scale *= np.float32(1.01)

    def after_loss(self):
        if self.training and self.n > 3:
            self.learn.loss_grad = (
                self.learn.loss_grad * (1 + self.seen[-1] * float(self.scale)) * float(self.total / self.n)
            )


class Noise(Callback):
    "Draws from every generator there is."

    def before_batch(self):
        if self.training:
            self.learn.xb = (self.xb[0] + random.random() + np.random.randn() + torch.rand(1),)


class OwnGenerators:
    "A transform of batches with generators of its own."

    def __init__(self):
        self.torch, self.numpy, self.python = (
            torch.Generator().manual_seed(3),
            np.random.default_rng(3),
            random.Random(3),
        )

    def __call__(self, b):
        return b[0] + torch.randn(1, generator=self.torch) + float(self.numpy.random()) + self.python.random(), b[1]


class RunningLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.ones(1))

    def forward(self, p, y):
        loss = nn.functional.cross_entropy(p, y)
        if p.requires_grad:
            self.mean.mul_(0.9).add_(loss.detach(), alpha=0.1)
        return loss / self.mean


class Hidden(nn.Module):
    "A buffer that is not in the state dict, and one that appears."

    def __init__(self):
        super().__init__()
        self.net = net()
        self.register_buffer('steps', torch.zeros(()), persistent=False)
        self.register_buffer('late', None)

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.late = x.mean(0) if self.late is None else 0.9 * self.late + 0.1 * x.mean(0)
        return self.net(x) * (1 + 0.01 * self.steps) + (0 if self.late is None else self.late.sum())


@pytest.mark.parametrize(
    'what',
    [
        'callback',
        'noise',
        'loss',
        'buffers',
        'accumulation',
        'unfreezing',
        'torch_optimizer',
        'lookahead',
        'momentum_schedule',
        'metrics',
    ],
)
def test_resume_is_exact_for_all_that_a_fit_depends_on(tmp_path, monkeypatch, what):
    frozen = []

    class Thaw(Callback):
        def before_epoch(self):
            if self.epoch == 0:
                self.learn.freeze()
            if self.epoch == 2:
                self.learn.unfreeze()

        def after_epoch(self):
            frozen.append((self.learn.opt.frozen_idx, [p.requires_grad for p in self.learn.model.parameters()]))

    run = (
        dict(swa=lambda: SWACallback(1))
        | {
            'callback': dict(others=(Counter,)),
            'noise': dict(others=(Noise,)),
            'loss': {},
            'buffers': dict(model=Hidden),
            'accumulation': dict(others=(lambda: GradientAccumulation(64),)),
            'unfreezing': dict(others=(Thaw,)),
            'torch_optimizer': dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, amsgrad=True))),
            'lookahead': dict(opt_func=ranger),
            'momentum_schedule': dict(others=(lambda: ParamScheduler({'mom': SchedCos(0.8, 0.95)}),)),
            'metrics': dict(metrics=[]),
        }[what]
    )
    if what == 'loss':
        monkeypatch.setattr('tests.helpers.CrossEntropyLossFlat', RunningLoss)
    if what == 'buffers':
        run['model'] = Hidden
    if what == 'buffers':
        monkeypatch.setattr(
            'tests.test_checkpoint.split', lambda m: [list(m.net[:4].parameters()), list(m.net[4:].parameters())]
        )
    assert_same(killed_and_resumed(tmp_path, kill(1 if what == 'unfreezing' else 3), **run), expected(tmp_path, **run))
    if what == 'unfreezing':
        assert frozen[:4] == frozen[4:] and [i for i, _ in frozen[:4]] == [1, 1, 0, 0]


def test_resume_is_exact_for_generators_deep_in_the_data(tmp_path, monkeypatch):
    plain = loaders

    def with_generators(**kwargs):
        dls = plain(**kwargs)
        dls.train.after_batch = OwnGenerators()
        return dls

    monkeypatch.setattr('tests.test_checkpoint.loaders', with_generators)
    assert_same(
        killed_and_resumed(tmp_path, kill(2), swa=lambda: SWACallback(1)),
        expected(tmp_path, swa=lambda: SWACallback(1)),
    )


@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_resume_is_exact_in_mixed_precision_with_its_scaler(tmp_path, monkeypatch, mode):
    mixed_precision_on_cpu(monkeypatch, growth_interval=4)
    scales = {}

    class Scales(Callback):
        def after_epoch(self):
            scales.setdefault(str(self.learn.path), []).append(self.learn.scaler.get_scale())

    run = dict(swa=lambda: SWACallback(1, every=2), others=(Scales, lambda: MixedPrecision(mode)))
    assert_same(killed_and_resumed(tmp_path, kill(2), **run), expected(tmp_path, **run))
    assert scales[str(tmp_path / 'parts')] == scales[str(tmp_path / 'whole')] and (
        mode == 'bf16' or len(set(scales[str(tmp_path / 'whole')])) > 1
    )


class MadeInFit(Callback):
    "As fastai's MixedPrecision: an object within a fit, `None` before and after it."

    order, tool = 10, None

    def before_fit(self):
        self.tool = torch.autocast('cpu', torch.bfloat16, enabled=False)

    def before_batch(self):
        with self.tool:
            pass

    def after_fit(self):
        self.tool = None


def test_a_second_fit_goes_on_with_the_objects_that_its_callbacks_have_made_for_it(tmp_path):
    def twice(folder, *cbs):
        learn = learner(cbs=MadeInFit())
        learn.made_in_fit.tool = None  # of an earlier fit
        learn.fit(4, cbs=[CheckpointCallback(folder / 'run.ckpt'), *cbs])
        return learn

    for name in 'parts', 'whole':
        (tmp_path / name).mkdir()
    with pytest.raises(Killed):
        twice(tmp_path / 'parts', At('after_epoch', 1, raising(Killed())))
    a, b = twice(tmp_path / 'parts'), twice(tmp_path / 'whole')
    assert_same(fingerprint(a), fingerprint(b))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_resume_is_exact_for_models_cast_to_another_precision(tmp_path, dtype):
    class Cast(Callback):
        def before_batch(self):
            self.learn.xb = (self.xb[0].to(dtype),)

        def after_pred(self):
            self.learn.pred = self.pred.float()

    run = dict(model=lambda: net(dropout=0).to(dtype), swa=lambda: SWACallback(1, every=2), others=(Cast,))
    assert_same(killed_and_resumed(tmp_path, kill(3), **run), expected(tmp_path, **run))


def test_best_values_kept_over_fits_survive_where_the_first_fit_is_skipped(tmp_path):
    run = dict(method='fine_tune', others=(lambda: SaveModelCallback('accuracy', reset_on_fit=False),))
    resumed, whole = killed_and_resumed(tmp_path, kill_in_fit(2, 1), **run), expected(tmp_path, **run)
    assert_same(resumed, whole)


def test_changed_settings_of_a_tracker_hold_after_the_resume(tmp_path):
    run = Run(tmp_path, others=(lambda: EarlyStoppingCallback(min_delta=9.0, patience=3),))
    with pytest.raises(Killed):
        run.start(killer=kill(2))
    run.others = (lambda: EarlyStoppingCallback(min_delta=9.0, patience=50),)
    run.start(seed=9)
    assert len(run.learn.recorder.values) == 4


# the table


def test_the_table_and_the_csv_file_are_whole_after_a_resume(tmp_path):
    def rows_of(folder, killer=None, seed=0):
        folder.mkdir(exist_ok=True)
        learn, rows = learner(seed=seed, path=folder), []
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda row: rows.append([x for x in row][:-1])
        try:
            learn.fit(
                4, cbs=[SWACallback(1), CheckpointCallback(folder / 'run.ckpt'), CSVLogger()] + [killer] * bool(killer)
            )
        except Killed:
            pass
        return rows, [line.split(',')[:-1] for line in (folder / 'history.csv').read_text().splitlines()]

    rows_of(tmp_path / 'parts', kill(3))
    (rows, csv), (whole_rows, whole_csv) = rows_of(tmp_path / 'parts', seed=5), rows_of(tmp_path / 'whole')
    assert repr(rows) == repr(whole_rows) and csv == whole_csv and len(rows) == 4 and len(csv) == 5


def test_the_progress_table_shows_the_earlier_epochs(tmp_path, monkeypatch):
    from fastprogress import fastprogress

    run, lines = Run(tmp_path, swa=lambda: SWACallback(1)), []
    with pytest.raises(Killed):
        run.start(killer=kill(2))
    monkeypatch.setattr(fastprogress, 'WRITER_FN', lambda *args, **kwargs: lines.append(' '.join(map(str, args))))
    run.start(seed=5)
    assert [line.split()[0] for line in lines if line.split()] == ['epoch', '0', '1', '2', '3']


# the file


def test_the_file_is_removed_when_the_fit_completes_even_early(tmp_path):
    run = Run(tmp_path, others=(lambda: EarlyStoppingCallback(min_delta=9.0, patience=1),)).start()
    assert len(run.learn.recorder.values) < 4 and not list(tmp_path.glob('run*'))


def test_a_fit_that_ends_within_an_epoch_keeps_the_last_whole_one(tmp_path, capsys):
    run = Run(tmp_path)
    run.start(
        killer=At('after_batch', 2, lambda cb: (_ for _ in ()).throw(CancelFitException()), batch=1, training=True)
    )
    assert (tmp_path / 'run.ckpt').exists() and 'stopped within epoch 2; the file is kept' in capsys.readouterr().out
    run.start(seed=9)
    assert_same(run.fingerprint(), expected(tmp_path / 'whole'))


def test_a_nan_loss_leaves_the_last_good_epoch_in_the_file(tmp_path):
    def spoil(cb):
        next(cb.learn.model.parameters()).data.fill_(float('nan'))

    run = Run(tmp_path, others=(TerminateOnNaNCallback,)).start(
        killer=At('before_batch', 2, spoil, batch=3, training=True)
    )
    state = torch.load(tmp_path / 'run.ckpt', weights_only=True)['state']
    assert state['epoch'] == 2 and all(t.isfinite().all() for t in state['model'].values())
    run.start(seed=9)
    assert_same(run.fingerprint(), expected(tmp_path / 'whole', others=(TerminateOnNaNCallback,)))


def test_the_file_loads_with_weights_only_and_holds_the_averages_too(tmp_path):
    run = Run(tmp_path, swa=lambda: SWACallback(0))
    with pytest.raises(Killed):
        run.start(killer=kill(2))
    saved = torch.load(tmp_path / 'run.ckpt', weights_only=True)
    average = next(v for k, v in saved['state']['states'].items() if 'SWACallback' in k)['average']
    assert average['n_averaged'] == 2 and set(average['swa_model']) == set(run.learn.model.state_dict())


def test_ctrl_c_and_the_same_cell_again_goes_on_in_the_same_learner(tmp_path):
    learn = learner(path=tmp_path)

    def cell(killer=None):
        learn.fit(4, cbs=[SWACallback(1), CheckpointCallback(tmp_path / 'run.ckpt')] + [killer] * bool(killer))

    for e, b in ((1, 2), (3, 0)):
        with pytest.raises(KeyboardInterrupt):
            cell(At('after_batch', e, lambda cb: (_ for _ in ()).throw(KeyboardInterrupt()), batch=b, training=True))
    cell()
    whole = learner(path=tmp_path / 'whole')
    whole.fit(4, cbs=SWACallback(1))
    assert_same(fingerprint(learn), fingerprint(whole))


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='needs /proc')
def test_a_file_is_read_where_it_lies_and_nothing_of_that_is_left_when_its_fit_goes_on(tmp_path):
    "So nobody can take from the fit, by what they do to the file, what was read from it."
    how = dict(method='fine_tune', swa=lambda: SWACallback(0))
    run = Run(tmp_path / 'parts', **how)
    with pytest.raises(Killed):
        run.start(killer=kill_in_fit(2, 1))
    mapped = []

    class Look(Callback):
        order = 70

        def look(self):
            mapped.append('run.ckpt' in Path('/proc/self/maps').read_text())

        before_fit = before_train = look

    run.start(seed=99, killer=Look())
    assert mapped == [True, True, False]  # the first stage is skipped, the second goes on
    assert_same(run.fingerprint(), expected(tmp_path, **how))


@pytest.mark.parametrize('stage', [1, 2])
def test_ctrl_c_in_fine_tune_and_the_same_cell_again_goes_on_in_its_stage(tmp_path, stage):
    learn = learner(path=tmp_path, splitter=split)

    def cell(killer=None):
        learn.fine_tune(
            2, 1e-2, freeze_epochs=2, cbs=[CheckpointCallback(tmp_path / 'run.ckpt')] + [killer] * bool(killer)
        )

    with pytest.raises(Killed):
        cell(kill_in_fit(stage, 1))
    cell()
    whole = learner(path=tmp_path / 'whole', splitter=split)
    whole.fine_tune(2, 1e-2, freeze_epochs=2)
    assert_same(fingerprint(learn), fingerprint(whole))


def test_an_attached_checkpoint_serves_fit_after_fit_and_stands_aside_from_all_else(tmp_path):
    learn = learner(path=tmp_path, cbs=CheckpointCallback(tmp_path / 'run.ckpt')).to_swa(swa_start=0)
    with pytest.raises(Killed):
        learn.fit(3, cbs=kill(2))
    before = (tmp_path / 'run.ckpt').read_bytes()
    (
        learn.validate(),
        learn.get_preds(),
        learn.lr_find(show_plot=False),
        learn.tta(n=1) if hasattr(learn.dls[1], 'after_item') and False else None,
    )
    assert (tmp_path / 'run.ckpt').read_bytes() == before
    learn.fit(3)
    assert not (tmp_path / 'run.ckpt').exists()
    learn.fit(2)
    whole = learner(path=tmp_path / 'whole').to_swa(swa_start=0)
    whole.fit(3), whole.fit(2)
    a, b = fingerprint(learn), fingerprint(whole)
    assert_same(
        {k: v for k, v in a.items() if k.startswith('model')}, {k: v for k, v in b.items() if k.startswith('model')}
    )


def test_two_fits_on_one_path_are_numbered_and_a_later_one_may_be_called_alone(tmp_path):
    def script(learn, killer=None, first=True):
        if first:
            learn.fit(2, 0.1, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))
        learn.fit(3, 0.05, cbs=[CheckpointCallback(tmp_path / 'run.ckpt')] + [killer] * bool(killer))
        return fingerprint(learn)

    whole = script(learner(path=tmp_path))
    for first in (True, False):
        with pytest.raises(Killed):
            script(learner(path=tmp_path), kill(2))
        assert_same(script(learner(path=tmp_path, seed=4), first=first), whole)


def test_resume_false_starts_anew(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(Killed):
        run.start(killer=kill(3))
    run.start(resume=False)
    assert_same(run.fingerprint(), expected(tmp_path / 'whole'))


# what cannot go on says why, and nothing is lost


def damaged(path):
    "A bit in the middle of its largest part; between the parts there is padding."
    with zipfile.ZipFile(path) as z:
        part = z.read(max(z.infolist(), key=lambda info: info.file_size))
    data = bytearray(path.read_bytes())
    data[data.index(part) + len(part) // 2] ^= 1
    path.write_bytes(data)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def newer(path):
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {'version': 99}, path)


FILES = {
    'damaged': damaged,
    'truncated': truncated,
    'empty': lambda path: path.write_bytes(b''),
    'text': lambda path: path.write_text('my thesis'),
    'weights': lambda path: torch.save(net().state_dict(), path),
    'pickle': lambda path: torch.save({'code': Counter}, path),
    'newer': newer,
}


@pytest.mark.parametrize('resume', [True, False])
@pytest.mark.parametrize('kind', FILES)
def test_a_file_that_is_no_readable_checkpoint_is_one_sentence_and_never_overwritten(tmp_path, kind, resume):
    run = Run(tmp_path, others=(CSVLogger,))
    with pytest.raises(Killed):
        run.start(killer=kill(2))
    FILES[kind](tmp_path / 'run.ckpt')
    before, history = (tmp_path / 'run.ckpt').read_bytes(), (tmp_path / 'history.csv').read_text()
    with pytest.raises(
        ValueError, match='newer fastai_swa' if kind == 'newer' else 'damaged, or it is no checkpoint'
    ) as e:
        run.start(resume=resume)
    assert str(tmp_path / 'run.ckpt') in str(e.value) and 'left as it is' in str(e.value)
    assert (tmp_path / 'run.ckpt').read_bytes() == before and (tmp_path / 'history.csv').read_text() == history
    assert not (tmp_path / 'run.ckpt.fastai_swa.lock').exists() and not list(tmp_path.glob('*.fastai_swa.tmp'))


@pytest.mark.parametrize(
    'change, match',
    [
        (
            dict(model=lambda: net(width=9)),
            r"the model: 0.weight is \[9, 6, 'float32'\] and was \[8, 6, 'float32'\]; the model: 0.bias is \[9, "
            r"'float32'\] and was \[8, 'float32'\]; .*\.\.\.",
        ),
        (dict(model=lambda: nn.Sequential(*net(), nn.Linear(3, 3))), 'the model: 8.(weight|bias) is new'),
        (dict(lr=0.2), r'lr is \[0.2\] and was \[0.05\]'),
        (dict(n_epoch=3), 'the number of epochs is 3 and was 4'),
        (dict(wd=0.3), r'wd is \[0.3\] and was \[0.01\]'),
        (dict(n=100), r'the data \(samples, batch size, batches\)'),
        (dict(bs=8), 'batch size'),
        (dict(metrics=[]), 'the metrics'),
        (dict(method='fit_one_cycle'), 'the schedule'),
        (dict(swa=2), 'SWACallback: swa_start is 2 and was 1'),
        (dict(swa=None), 'SWACallback is gone'),
    ],
)
def test_what_changed_is_named_and_the_file_left_alone(tmp_path, change, match):
    def start(
        killer=None,
        n_epoch=4,
        lr=0.05,
        wd=0.01,
        n=90,
        bs=16,
        swa=1,
        method='fit',
        model=None,
        metrics=None,
        resume=True,
    ):
        learn = learner(
            model, dls=loaders(n=n, bs=bs), path=tmp_path, **({} if metrics is None else dict(metrics=metrics))
        )
        cbs = (
            [CheckpointCallback(tmp_path / 'run.ckpt', resume=resume)]
            + ([SWACallback(swa)] if swa is not None else [])
            + [killer] * bool(killer)
        )
        getattr(learn, method)(n_epoch, lr, wd=wd, cbs=cbs)
        return learn

    with pytest.raises(Killed):
        start(kill(2))
    before = (tmp_path / 'run.ckpt').read_bytes()
    with pytest.raises(ValueError, match=match) as e:
        start(**change)
    assert (
        'resume=False' in str(e.value)
        and (tmp_path / 'run.ckpt').read_bytes() == before
        and not (tmp_path / 'run.ckpt.fastai_swa.lock').exists()
    )
    start(**change, resume=False)
    assert not (tmp_path / 'run.ckpt').exists()


def test_a_second_run_on_the_path_of_a_live_one_is_refused_and_harms_nothing(tmp_path):
    other = learner(seed=1, path=tmp_path)

    def second(cb):
        with pytest.raises(RuntimeError, match='another run is using .*run.ckpt'):
            other.fit(4, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))

    run = Run(tmp_path).start(killer=At('after_batch', 2, second, batch=1, training=True))
    whole = Run(tmp_path / 'whole').start(checkpoint=False)
    assert_same(
        {k: v for k, v in run.fingerprint().items() if k not in ('python',)},
        {k: v for k, v in whole.fingerprint().items() if k not in ('python',)},
    )
    other.fit(4, 0.05, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))  # the path is free again


def test_a_disk_that_fills_up_later_is_a_warning_and_training_goes_on(tmp_path, monkeypatch):
    from fastai_swa import files

    real, n = torch.save, [0]

    def save(obj, f):
        n[0] += 1
        if n[0] > 2:
            f.write(b'half')
            raise OSError(28, 'No space left on device')
        real(obj, f)

    monkeypatch.setattr(files.torch, 'save', save)
    run = Run(tmp_path)
    with pytest.raises(Killed), pytest.warns(UserWarning, match='No space left on device; training goes on'):
        run.start(killer=kill(3))
    assert torch.load(tmp_path / 'run.ckpt', weights_only=True)['state']['epoch'] == 1 and not list(
        tmp_path.glob('*.fastai_swa.tmp')
    )
    monkeypatch.undo()
    run.start(seed=9)
    assert_same(run.fingerprint(), expected(tmp_path / 'whole'))


def test_a_path_that_cannot_be_written_is_one_sentence_before_the_first_epoch(tmp_path):
    (tmp_path / 'file').write_text('')
    learn = learner()
    with pytest.raises(OSError):
        learn.fit(2, cbs=CheckpointCallback(tmp_path / 'file' / 'run.ckpt'))
    assert learn.train_iter == 0 if hasattr(learn, 'train_iter') else True


@pytest.mark.parametrize(
    'kwargs, error, match',
    [
        (dict(path='.'), ValueError, 'path must be a file'),
        (dict(path='a', every=0), ValueError, 'every'),
        (dict(path='a', every=1.0), TypeError, 'every'),
        (dict(path='a', resume='yes'), TypeError, 'resume'),
        (dict(path=None), TypeError, ''),
    ],
)
def test_bad_arguments_are_refused_at_construction(kwargs, error, match):
    with pytest.raises(error, match=match):
        CheckpointCallback(**kwargs)


def test_an_optimizer_that_keeps_what_no_checkpoint_can_hold_is_named(tmp_path):
    class Odd(Callback):
        def before_fit(self):
            self.learn.opt.state[next(self.learn.model.parameters())]['odd'] = Counter

    with pytest.raises(TypeError, match='the optimizer keeps a builtins.type'):
        learner(path=tmp_path).fit(1, cbs=[Odd(), CheckpointCallback(tmp_path / 'run.ckpt')])


# what callbacks keep, and what they only refer to


class Clamp(Callback):
    """Refers to the model's own parameters, as NonNativeMixedPrecision and many a callback for
    clipping do.
    """

    def before_fit(self):
        self.params = list(self.learn.model.parameters())

    def after_step(self):
        for p in self.params:
            p.data.clamp_(-0.2, 0.2)


class Anchor(Callback):
    "Draws and copies at the start of the fit what it never changes."

    def before_fit(self):
        self.anchor, self.scale = [p.detach().clone() for p in self.learn.model.parameters()], random.random()

    def after_loss(self):
        if self.training:
            self.learn.loss_grad = self.learn.loss_grad + self.scale * sum(
                ((p - a) ** 2).sum() for p, a in zip(self.learn.model.parameters(), self.anchor)
            )


class Leaves(Callback):
    def after_epoch(self):
        if self.epoch == 1:
            self.run = False

    def after_step(self):
        for p in self.learn.model.parameters():
            p.data.mul_(0.99)


class Draws(Callback):
    "Generators and containers of its own."

    def __init__(self):
        self.rng, self.last, self.seen = np.random.default_rng(5), deque(maxlen=3), {1}

    def before_batch(self):
        self.last.append(float(self.rng.random()))
        self.seen.add(len(self.last))
        if self.training:
            self.learn.xb = (self.xb[0] + sum(self.last) + len(self.seen),)


class OwnDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        return x * (torch.rand(x.shape, generator=self.generator) > 0.2) if self.training else x


@pytest.mark.parametrize('what', [Clamp, Anchor, Leaves, Draws, OwnDropout])
def test_resume_is_exact_for_what_callbacks_refer_to_draw_and_keep(tmp_path, recwarn, what):
    run = dict(swa=lambda: SWACallback(1)) | (
        dict(model=lambda: nn.Sequential(*net(), OwnDropout())) if what is OwnDropout else dict(others=(what,))
    )
    assert_same(killed_and_resumed(tmp_path, kill(3), **run), expected(tmp_path, **run))
    assert not [w for w in recwarn if 'generators' in str(w.message)]


class Window(Callback):
    "A count that is back at its first value at the end of each epoch, but not within."

    n = 0

    def __init__(self):
        self.n = 0

    def after_step(self):
        self.n += 1
        for p in self.learn.model.parameters():
            p.data.mul_(1 - 0.001 * self.n)

    def after_epoch(self):
        self.n = 0


def test_ctrl_c_and_the_same_callback_again_goes_on_with_what_it_kept_at_the_boundary(tmp_path):
    learn, window = learner(path=tmp_path), Window()
    with pytest.raises(Killed):
        learn.fit(4, cbs=[window, CheckpointCallback(tmp_path / 'run.ckpt'), kill(2, 3)])
    learn.fit(4, cbs=[window, CheckpointCallback(tmp_path / 'run.ckpt')])
    whole = learner(path=tmp_path / 'whole')
    whole.fit(4, cbs=Window())
    assert_same(fingerprint(learn), fingerprint(whole))


# fits skipped, refused, given up


def test_a_script_that_uses_the_learner_between_its_fits_finds_it_as_it_was(tmp_path):
    def script(seed, killer=None):
        learn = learner(seed=seed, path=tmp_path, splitter=split)
        learn.freeze()
        swa = learn.fit_swa(3, 0.1, swa_start=1, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))
        between = [
            list(learn.recorder.values[-1]),
            swa.averaged_epochs,
            [p.clone() for p in swa.swa_model.parameters()],
        ]
        learn.save('before'), swa.apply(), learn.save('stage-1')
        learn.unfreeze()
        learn.fit_one_cycle(3, 0.05, cbs=[CheckpointCallback(tmp_path / 'run.ckpt')] + [killer] * bool(killer))
        return learn, between

    with pytest.raises(Killed):
        script(0, kill(1))
    saved = torch.load(tmp_path / 'models' / 'stage-1.pth', weights_only=False)
    learn, between = script(9)
    again = torch.load(tmp_path / 'models' / 'stage-1.pth', weights_only=False)
    assert_same(again['model'], saved['model'])
    whole, expected_between = script(0)
    assert_same(fingerprint(learn), fingerprint(whole))
    assert repr(between[:2]) == repr(expected_between[:2]) and all(map(torch.equal, between[2], expected_between[2]))


def test_callbacks_that_only_live_in_training_stand_a_skipped_fit(tmp_path):
    from fastai.callback.mixup import MixUp

    run = dict(method='fine_tune', others=(MixUp,))
    assert_same(killed_and_resumed(tmp_path, kill_in_fit(2, 1), **run), expected(tmp_path, **run))


def test_a_fit_cancelled_before_it_begins_leaves_the_file_of_an_interrupted_one(tmp_path):
    class Guard(Callback):
        def before_fit(self):
            raise CancelFitException

    run = Run(tmp_path)
    with pytest.raises(Killed):
        run.start(killer=kill(2))
    run.start(killer=Guard())
    assert (tmp_path / 'run.ckpt').exists()
    run.start(seed=9)
    assert_same(run.fingerprint(), expected(tmp_path / 'whole'))


def test_two_checkpoints_in_one_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match='two CheckpointCallbacks'):
        learner().fit(1, cbs=[CheckpointCallback(tmp_path / 'a'), CheckpointCallback(tmp_path / 'b')])
    assert not list(tmp_path.iterdir())


def test_a_path_is_free_for_another_learner_once_an_attached_one_was_interrupted_or_refused(tmp_path):
    first = learner(path=tmp_path, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))
    with pytest.raises(Killed):
        first.fit(3, 0.1, cbs=kill(1))
    second = learner(seed=4, path=tmp_path, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))
    with pytest.raises(ValueError, match='lr is'):
        second.fit(3, 0.2)
    third = learner(seed=5, path=tmp_path, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))
    third.fit(3, 0.1)
    whole = learner(path=tmp_path)
    whole.fit(3, 0.1)
    assert_same(fingerprint(third) | {'cbs': 0}, fingerprint(whole) | {'cbs': 0})


@pytest.mark.parametrize('what', ['freezing', 'wd'])
def test_ctrl_c_in_a_fit_that_changes_its_own_settings_and_the_same_call_again_goes_on(tmp_path, what):
    class Melt(Callback):
        def before_epoch(self):
            if self.epoch == 0:
                self.learn.freeze()
            if self.epoch == 3:
                self.learn.unfreeze()

    def other():
        return Melt() if what == 'freezing' else ParamScheduler({'wd': SchedCos(0.01, 0.3)})

    learn = learner(path=tmp_path, splitter=split, opt_func=partial(Adam, wd=0.02))
    with pytest.raises(Killed):
        learn.fit(4, cbs=[other(), CheckpointCallback(tmp_path / 'run.ckpt'), kill(2)])
    learn.fit(4, cbs=[other(), CheckpointCallback(tmp_path / 'run.ckpt')])
    whole = learner(path=tmp_path / 'whole', splitter=split, opt_func=partial(Adam, wd=0.02))
    whole.fit(4, cbs=other())
    assert_same(fingerprint(learn), fingerprint(whole))


def test_a_metric_that_gives_anything_and_a_callback_with_settings_of_its_own_are_no_hindrance(tmp_path):
    from fractions import Fraction

    from fastai.learner import Metric

    class Odd(Metric):
        def reset(self):
            pass

        def accumulate(self, learn):
            pass

        @property
        def value(self):
            return Fraction(1, 3)

    class Other(Callback):
        settings = {'a': 1}

    run = Run(tmp_path, metrics=[Odd()], others=(Other,))
    with pytest.raises(Killed):
        run.start(killer=kill(2))
    run.start(seed=9)
    assert [str(row[2]) for row in run.learn.recorder.values] == ['1/3'] * 4


def test_data_exchanged_within_the_fit_are_refused_at_the_resume(tmp_path):
    class Exchange(Callback):
        def before_epoch(self):
            if self.epoch == 1:
                self.learn.dls = loaders(n=60)

    run = Run(tmp_path, others=(Exchange,))
    with pytest.raises(Killed):
        run.start(killer=kill(2))
    with pytest.raises(ValueError, match='exchanged on the way'):
        run.start(seed=9)
    assert (tmp_path / 'run.ckpt').exists()


def test_a_lazy_module_and_another_dtype_are_named(tmp_path):
    lazy = learner(lambda: nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match='lazy module that has not seen a batch yet'):
        lazy.fit(1, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))
    run = Run(tmp_path)
    with pytest.raises(Killed):
        run.start(killer=kill(2))
    run.kwargs = dict(model=lambda: net().double())
    with pytest.raises(ValueError, match="0.weight is .8, 6, 'float64'. and was .8, 6, 'float32'."):
        run.start()


def test_a_link_to_another_disk_stays_a_link_and_leads_to_the_same_lock(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'disk')
    run = Run(tmp_path / 'link')

    def second(cb):
        with pytest.raises(RuntimeError, match='another run'):
            learner(seed=1).fit(4, cbs=CheckpointCallback(tmp_path / 'disk' / 'run.ckpt'))

    run.start(killer=At('after_batch', 2, second, batch=1, training=True))
    assert (tmp_path / 'link').is_symlink()


def test_workers_that_keep_a_random_state_of_their_own_are_warned_about(tmp_path):
    dls = loaders()
    train = torch.utils.data.DataLoader(dls.train.dataset, batch_size=16, num_workers=1, persistent_workers=True)
    learn = learner(dls=type(dls)(train, dls.valid, device='cpu'))
    with pytest.warns(UserWarning, match='persistent_workers'):
        learn.fit(1, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))


# what lives on


@pytest.mark.parametrize('attached', [True, False])
def test_a_loop_over_learners_with_an_attached_average_and_a_checkpoint_keeps_none_of_them(tmp_path, attached):
    gone = []
    for i in range(3):
        learn = learner(seed=i, path=tmp_path).to_swa(swa_start=0)
        checkpoint = CheckpointCallback(tmp_path / f'{i}.ckpt')
        if attached:
            learn.add_cb(checkpoint)
        learn.fit(1, cbs=[] if attached else checkpoint)
        gone.append(weakref.ref(learn))
        del learn, checkpoint
        gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_a_copy_and_an_export_of_a_learner_know_nothing_of_its_fits_on_a_path(tmp_path):
    learn = learner(path=tmp_path, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))
    learn.fit(1)
    twin = copy.deepcopy(learn)
    again = pickle.loads(pickle.dumps(learn))
    for other in (twin, again):
        assert not vars(other)['_fastai_swa_journals']
    assert len(vars(learn)['_fastai_swa_journals']) == 1
    twin.fit(1)
    assert type(vars(twin)['_fastai_swa_journals']) is type(vars(learn)['_fastai_swa_journals'])


# what it costs


class Fill(Callback):
    "Before epoch 1: as if so many steps, of 10 an epoch, had been done."

    order = -2000

    def __init__(self, n):
        self.n = n
        self.own = []

    def before_epoch(self):
        if self.epoch == 1:
            recorder = self.learn.recorder
            recorder.lrs += [0.1] * self.n
            recorder.losses += list(torch.rand(self.n).unbind())
            recorder.values += [[0.1, 0.2, 0.3] for _ in range(self.n // 10)]
            for values in next(cb for cb in self.learn.cbs if isinstance(cb, ParamScheduler)).hps.values():
                values += [0.1] * self.n
            self.own += [0.5] * self.n

    def after_batch(self):
        if self.training:
            self.own.append(float(self.learn.loss))


class Sizes(Callback):
    "Bytes of the checkpoint and of what lies beside it, after each was written."

    order = -900

    def __init__(self, file):
        self.file, self.sizes = file, []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def before_epoch(self):
        beside = [f.stat().st_size for f in self.file.parent.glob(f'{self.file.name}.*.steps')]
        self.sizes.append((self.file.stat().st_size, sum(beside)))


def filled(folder, n, seed=0, *cbs):
    folder.mkdir(exist_ok=True)
    learn, sizes, fill = learner(seed=seed, path=folder), Sizes(folder / 'run.ckpt'), Fill(n)
    scheduler = ParamScheduler({'lr': SchedCos(0.1, 0.01)})
    learn.fit(5, 0.1, cbs=[scheduler, fill, sizes, CheckpointCallback(folder / 'run.ckpt'), *cbs])
    return learn, sizes.sizes, fill


def test_what_a_checkpoint_writes_does_not_grow_with_the_steps_done(tmp_path):
    _, few, _ = filled(tmp_path / 'few', 100)
    _, many, _ = filled(tmp_path / 'many', 20_000)
    (file, before), (last, beside) = many[-2:]
    assert last < 1.02 * few[-1][0] and last < 1.02 * file
    n_steps, n_lists = 6, 4  # an epoch; learning rates, losses, a scheduler's own, the callback's own
    assert beside - before < 60 * n_steps * n_lists + 1000
    assert not list((tmp_path / 'many').glob('run.ckpt*'))


def test_resume_is_exact_for_histories_that_a_killed_checkpoint_had_written_further(tmp_path, monkeypatch):
    whole, _, fill = filled(tmp_path / 'whole', 2000)
    from fastai_swa import checkpoint_files

    real = checkpoint_files.write

    def killed_before_the_file_is_replaced(file, kind, version, content):
        if content.get('state', {}).get('epoch') == 4:
            raise Killed
        real(file, kind, version, content)

    monkeypatch.setattr(checkpoint_files, 'write', killed_before_the_file_is_replaced)
    with pytest.raises(Killed):
        filled(tmp_path / 'parts', 2000)
    monkeypatch.undo()
    saved = torch.load(tmp_path / 'parts' / 'run.ckpt', weights_only=True)
    [steps] = (tmp_path / 'parts').glob('run.ckpt.*.steps')
    assert saved['state']['epoch'] == 3 and steps.stat().st_size > saved['steps']['bytes']
    with pytest.raises(Killed):
        filled(tmp_path / 'parts', 2000, 7, kill(3, 2))
    again, _, own = filled(tmp_path / 'parts', 2000, 8)
    assert len(again.recorder.losses) == len(whole.recorder.losses) == 2030
    a, b = fingerprint(again), fingerprint(whole)
    assert a['losses'][2006:] == b['losses'][2006:] and own.own[2006:] == fill.own[2006:] and len(own.own) == 2030
    assert_same({k: v for k, v in a.items() if k != 'losses'}, {k: v for k, v in b.items() if k != 'losses'})


def test_what_earlier_fits_have_left_is_written_once_a_fit(tmp_path):
    learn = learner(path=tmp_path, model=lambda: net(width=60)).to_swa(swa_start=0)
    sizes = []
    for n in range(4):
        each = Sizes(tmp_path / 'run.ckpt')
        written = []

        def note(cb):
            written.append([f.stat().st_mtime_ns for f in tmp_path.glob('run.ckpt.*.past')])

        learn.fit(
            3, 0.1, cbs=[each, CheckpointCallback(tmp_path / 'run.ckpt'), *[At('after_train', e, note) for e in (0, 2)]]
        )
        sizes.append(each.sizes[-1][0])
        assert written[0] == written[1] and len(written[0]) == (n > 0)
    assert max(sizes) < 1.05 * sizes[0] and not list(tmp_path.glob('run.ckpt*'))


# files of the version before


def as_format_2(path):
    "The checkpoint as the version before wrote it: one file, with all in it."
    from fastai_swa.checkpoint_files import CheckpointFiles

    saved = CheckpointFiles(path).read()
    state = saved['state']
    key = next(k for k in state['states'] if k.endswith('CheckpointCallback.0'))
    state['states'][key] = {'rows': state.pop('rows')}
    for fit in saved['fits']:
        if 'SnapshotCallback' in fit:
            fit['SnapshotCallback']['folder'] = str(path.parent / fit['SnapshotCallback']['folder'])
    new = path.with_name('new')  # what was read is still in the file
    torch.save({'format': 'fastai_swa checkpoint', **saved, 'version': 2}, new)
    new.replace(path)
    for file in path.parent.glob(f'{path.name}.*'):
        file.unlink()


@pytest.mark.parametrize('method', ['fit_one_cycle', 'fine_tune'])
def test_a_checkpoint_of_the_version_before_is_gone_on_with(tmp_path, method):
    run = Run(tmp_path / 'parts', method=method, swa=lambda: SWACallback(0))
    with pytest.raises(Killed):
        run.start(killer=kill(2) if method == 'fit_one_cycle' else kill_in_fit(2, 1))
    as_format_2(tmp_path / 'parts' / 'run.ckpt')
    with pytest.raises(Killed):
        run.start(seed=5, killer=kill(3) if method == 'fit_one_cycle' else kill_in_fit(2, 1, 2))
    assert torch.load(tmp_path / 'parts' / 'run.ckpt', weights_only=True)['version'] == (
        3 if method == 'fit_one_cycle' else 2
    )
    run.start(seed=9)
    assert not list((tmp_path / 'parts').glob('run.ckpt*'))
    assert_same(run.fingerprint(), expected(tmp_path, method=method, swa=run.swa))


# moved


@pytest.mark.parametrize('old', [False, True], ids=['now', 'of the version before'])
def test_a_fit_with_snapshots_and_trackers_goes_on_after_its_folder_was_moved(tmp_path, old):
    def start(folder, seed, killer=None):
        learn = learner(seed=seed, path=folder, splitter=split)
        snapshots, tracker = SnapshotCallback(0, folder=folder / 'snapshots'), SaveModelCallback('accuracy')
        cbs = [snapshots, tracker, SWACallback(1), CheckpointCallback(folder / 'run.ckpt')]
        learn.fit(4, 0.05, cbs=[*cbs, *([killer] if killer else [])])
        return fingerprint(learn), snapshots, tracker

    for name in ('here', 'whole'):
        (tmp_path / name).mkdir()
    with pytest.raises(Killed):
        start(tmp_path / 'here', 0, kill(2))
    for file in (tmp_path / 'here').rglob('*'):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file
    if old:
        as_format_2(tmp_path / 'here' / 'run.ckpt')
    (tmp_path / 'here').rename(tmp_path / 'there')
    got, snapshots, tracker = start(tmp_path / 'there', 9)
    whole, _, _ = start(tmp_path / 'whole', 0)
    assert_same(got, whole)
    there = tmp_path / 'there' / 'snapshots'
    assert snapshots.snapshots == [str(there / f'snapshot-{i:02}.pth') for i in (1, 2, 3, 4)]
    assert tracker.last_saved_path == tmp_path / 'there' / 'models' / 'model.pth'
    assert not (tmp_path / 'here').exists()


def test_what_a_callback_collects_in_a_dict_of_lists_is_written_once(tmp_path):
    file, sizes = tmp_path / 'run.ckpt', []

    class Collects(Callback):
        def before_fit(self):
            self.seen = {'loss': [0.5] * 1200, 'rows': [], 'few': []}

        def before_train(self):
            self.seen['few'] = [self.epoch]
            sizes.append(file.stat().st_size)

        def after_batch(self):
            self.seen['loss'] += [float(self.loss.detach())] * 300
            self.seen['rows'] += [(self.epoch, 0.25)] * 300

    def start(*more):
        collects = Collects()
        learner(path=tmp_path).fit(8, 0.05, cbs=[collects, CheckpointCallback(file), *more])
        return collects.seen

    with pytest.raises(Killed):
        start(kill(6))
    assert sizes[6] < 1.05 * sizes[5] < 1.1 * sizes[4]
    got = start()
    assert not file.exists() and got == start()


def test_paths_that_a_callback_collects_go_on_after_their_folder_was_moved(tmp_path):
    class KeepsTwo(Callback):
        def before_fit(self):
            self.kept, self.texts, self.by_path = [], [], {}
            self.folder = str(self.learn.path)

        def after_epoch(self):
            file = self.learn.save(f'epoch-{self.epoch}')
            self.kept.append((self.epoch, file))
            self.texts.append(str(file))
            self.by_path[file] = self.by_path[str(file)] = self.epoch
            for _, old in self.kept[:-2]:
                old.unlink()
            self.kept = self.kept[-2:]

    def start(folder, killer=None):
        learn, keeps = learner(path=folder), KeepsTwo()
        cbs = [keeps, CheckpointCallback(folder / 'run.ckpt')]
        learn.fit(4, 0.05, cbs=[*cbs, *([killer] if killer else [])])
        return keeps

    (tmp_path / 'here').mkdir()
    with pytest.raises(Killed):
        start(tmp_path / 'here', kill(3))
    for file in (tmp_path / 'here').rglob('*'):
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes(), file
    (tmp_path / 'here').rename(tmp_path / 'there')
    keeps = start(tmp_path / 'there')
    models = tmp_path / 'there' / 'models'
    files = [models / f'epoch-{i}.pth' for i in range(4)]
    assert [file for _, file in keeps.kept] == files[2:] == sorted(models.iterdir())
    assert keeps.texts == list(map(str, files)) and keeps.folder == str(tmp_path / 'there')
    assert keeps.by_path == {k: i for i, file in enumerate(files) for k in (file, str(file))}


def test_what_lies_beside_a_checkpoint_and_was_not_moved_with_it_is_named(tmp_path):
    run = Run(tmp_path / 'parts', method='fine_tune')
    with pytest.raises(Killed):
        run.start(killer=kill_in_fit(2, 1))
    for what in ('steps', 'past'):
        [beside] = (tmp_path / 'parts').glob(f'run.ckpt.*.{what}')
        beside.rename(tmp_path / 'aside')
        with pytest.raises(ValueError, match=f'{beside.name} is missing beside .*run.ckpt'):
            run.start(seed=3)
        (tmp_path / 'aside').rename(beside)
    run.start(seed=9)
    assert_same(run.fingerprint(), expected(tmp_path, method='fine_tune'))


# only state is taken from a file


class Named(Callback):
    "A user's callback with settings and a count."

    def __init__(self, file='mine.txt', scale=1.0):
        self.file, self.scale, self.n = file, scale, 0

    def after_epoch(self):
        self.n += 1
        self.scale *= 0.5


def test_a_crafted_checkpoint_changes_state_and_no_setting(tmp_path):
    def start(seed, killer=None):
        learn = learner(seed=seed, path=tmp_path)
        tracker, named = SaveModelCallback('accuracy'), Named()
        cbs = [tracker, named, SWACallback(0), CheckpointCallback(tmp_path / 'run.ckpt')]
        learn.fit(4, 0.05, cbs=[*cbs, *([killer] if killer else [])])
        return learn, tracker, named

    with pytest.raises(Killed):
        start(0, kill(2))
    saved = torch.load(tmp_path / 'run.ckpt', weights_only=True)
    state = saved['state']
    own = state['callbacks']['fastai.callback.tracker.SaveModelCallback.0']
    own |= {'fname': '../../evil', 'monitor': 'valid_loss', 'with_opt': True, 'last_saved_path': ('below', '../x')}
    own |= {'path': '/tmp', 'model_dir': ('text below', '/other'), 'learn': 3}
    key = next(k for k in state['callbacks'] if k.endswith('Named.0'))
    state['callbacks'][key] |= {'file': ('text below', '/other'), 'where': ('path', '/etc/passwd')}
    state['learner'] |= {'path': ('path', '/etc'), 'model_dir': '/tmp', 'lr': 7.0}
    average = next(v for k, v in state['states'].items() if 'SWACallback' in k)
    average['fit'] |= {'columns': ['x'], 'side': 3}
    average['average']['attributes'][0] |= {'forward': 3, '_modules': {}}
    torch.save(saved, tmp_path / 'run.ckpt')
    learn, tracker, named = start(9)
    assert (tracker.fname, tracker.monitor, tracker.with_opt) == ('model', 'accuracy', False)
    assert (learn.path, learn.model_dir, learn.lr) == (tmp_path, 'models', 0.1)
    assert not vars(tracker).keys() & {'path', 'model_dir'}
    assert (named.file, named.n, named.scale) == ('mine.txt', 4, 0.0625) and not hasattr(named, 'where')
    assert sorted(f.name for f in (tmp_path / 'models').iterdir()) == ['model.pth']


def test_a_string_that_the_constructor_was_given_and_the_fit_has_changed_is_named(tmp_path):
    class Phase(Callback):
        def __init__(self, phase='first'):
            self.phase = phase

        def after_epoch(self):
            self.phase = 'second'

    with pytest.warns(UserWarning, match='Phase.0.phase is an argument of the constructor, which no checkpoint chang'):
        learner(path=tmp_path).fit(2, cbs=[Phase(), CheckpointCallback(tmp_path / 'run.ckpt')])


def nested(depth=100_000):
    return '[' * depth + ']' * depth


def without(key, of=lambda saved: saved):
    def f(saved):
        del of(saved)[key]

    return f


def instead(key, value, of=lambda saved: saved):
    def f(saved):
        of(saved)[key] = value

    return f


def state_of(saved):
    return saved['state']


def average_of(saved):
    return next(v for k, v in saved['state']['states'].items() if 'SWACallback' in k)


BROKEN = {
    **{f'no {key}': without(key) for key in ('fit', 'state', 'steps', 'id', 'has_past', 'version')},
    **{
        f'no {key} in the state': without(key, state_of)
        for key in ('epoch', 'model', 'callbacks', 'random', 'data', 'rows')
    },
    'a version in words': instead('version', '3'),
    'a fit in words': instead('fit', 'the first one'),
    'a fit of no length': without('the number of epochs', lambda saved: saved['fit']),
    'an id that leads elsewhere': instead('id', '../../../../etc'),
    'bytes in words': instead('steps', {'bytes': 'all', 'sha256': ''}),
    'epoch true': instead('epoch', True, state_of),
    'an epoch after the last': instead('epoch', 99, state_of),
    'an epoch before the first': instead('epoch', -1, state_of),
    'no table': instead('rows', None, state_of),
    'a model in words': instead('model', 'resnet', state_of),
    'a model of words': instead('0.weight', 'heavy', lambda saved: saved['state']['model']),
    'an unknown tag': instead('optimizer', ('magic', 3), state_of),
    'a tag without content': instead('optimizer', ('dict',), state_of),
    'random states in words': instead('random', ['dice'], state_of),
    'rows of nothing': instead('rows', ('history', ['rows', 99]), state_of),
    'gradients too few': instead('gradients', [], state_of),
    'callbacks of words': instead('callbacks', {'fastai.learner.Recorder.0': 3}, state_of),
    'states of words': instead('states', {'fastai_swa.callback.SWACallback.0': 3}, state_of),
    'an average of words': instead('average', 'mean', average_of),
    'counts of words': instead('fit', {'n_folds': 'many'}, average_of),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_contents_are_one_sentence_that_names_the_file(tmp_path, name):
    run = Run(tmp_path, swa=lambda: SWACallback(0))
    with pytest.raises(Killed):
        run.start(killer=kill(1))
    good = (tmp_path / 'run.ckpt').read_bytes()
    saved = torch.load(tmp_path / 'run.ckpt', weights_only=True)
    BROKEN[name](saved)
    torch.save(saved, tmp_path / 'run.ckpt')
    before = (tmp_path / 'run.ckpt').read_bytes()
    with pytest.raises(ValueError, match='run.ckpt') as e:
        run.start(seed=3)
    assert len(str(e.value)) < 600
    assert (tmp_path / 'run.ckpt').read_bytes() == before and not list(tmp_path.glob('*.lock'))
    (tmp_path / 'run.ckpt').write_bytes(good)
    run.start(seed=9)
    assert_same(run.fingerprint(), expected(tmp_path / 'whole', swa=run.swa))


@pytest.mark.parametrize('what', ['nested', 'row true', 'flipped', 'gone'])
def test_a_broken_file_beside_it_is_one_sentence_too(tmp_path, what):
    import hashlib

    run = Run(tmp_path)
    with pytest.raises(Killed):
        run.start(killer=kill(2))
    [steps] = tmp_path.glob('run.ckpt.*.steps')
    content = steps.read_bytes()
    if what == 'flipped':
        steps.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    elif what == 'gone':
        steps.unlink()
    else:
        broken = nested().encode() if what == 'nested' else b'{"rows": [true, [[1]]]}'
        steps.write_bytes(broken)
        saved = torch.load(tmp_path / 'run.ckpt', weights_only=True)
        saved['steps'] = {'bytes': len(broken), 'sha256': hashlib.sha256(broken).hexdigest()}
        torch.save(saved, tmp_path / 'run.ckpt')
    with pytest.raises(ValueError, match='run.ckpt'):
        run.start(seed=3)


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(Killed):
        run.start(killer=kill(2))
    file = tmp_path / 'run.ckpt'
    with zipfile.ZipFile(file) as z:
        parts = {info.filename: z.read(info) for info in z.infolist()}
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, content in parts.items():
            z.writestr(name, content)
        z.writestr('archive/data/999', b'\0' * 10_000_000)
    with pytest.raises(ValueError, match='run.ckpt is damaged, or it is no checkpoint'):
        run.start(seed=3)
