"""Any learner, and the callbacks that users combine with `SWACallback`."""

import copy
import gc
import math
import random
import subprocess
import sys
import warnings
from functools import partial

import fastai.callback.channelslast  # noqa: F401  (to_channelslast)
import fastai.distributed  # noqa: F401  (to_parallel)
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.rnn import rnn_cbs
from fastai.callback.schedule import Learner
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam, OptimWrapper
from fastai.torch_core import params, set_seed
from torch import nn

from fastai_swa import (
    CheckpointCallback,
    SaveSWAModelCallback,
    SnapshotCallback,
    SWACallback,
    WeightHistory,
    ema,
    update_bn,
)
from fastai_swa.vision import digits, digits_net

from .helpers import Snapshots, assert_close, column, learner, loaders, net, parameters
from .norms import BatchRenorm, GhostBatchNorm, RunningBatchNorm
from .reference import twins
from .test_averaging import Tied
from .test_modules import unet


def both(make, fit=lambda learn, cbs: learn.fit(3, cbs=cbs), **swa_kwargs):
    """Fit without and with the callback: equal weights, bitwise; the average is the mean. Returns
    the second learner and the callback."""
    plain = make()
    fit(plain, [])
    learn, swa, snaps = make(), SWACallback(**{'swa_start': 1, **swa_kwargs}), Snapshots()
    fit(learn, [swa, snaps])
    for (k, a), b in zip(plain.model.state_dict().items(), learn.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), k
    last = snaps.weights[-len(range(learn.n_epoch)) :] if len(snaps.weights) >= learn.n_epoch else snaps.weights
    folded = [w for e, w in zip(snaps.epochs[-len(last) :], last) if e in swa.averaged_epochs]
    assert len(folded) == swa.n_averaged > 0
    assert_close(parameters(swa.swa_model), twins.mean(folded))
    return learn, swa


def assert_column_true(learn, swa, loss_func=nn.functional.cross_entropy):
    expected = twins.evaluate(copy.deepcopy(swa.swa_model), list(learn.dls[1]), loss_func)
    np.testing.assert_allclose(column(learn, 'swa_valid_loss')[-1], expected[0], rtol=1e-4)


# callbacks beside it


@pytest.mark.parametrize(
    'cbs',
    [
        lambda: GradientAccumulation(40),
        lambda: GradientClip(0.1),
        lambda: TerminateOnNaNCallback(),
        lambda: ReduceLROnPlateau(patience=1),
        lambda: BnFreeze(),
        lambda: ShortEpochCallback(0.5, short_valid=False),
        lambda: [GradientClip(), GradientAccumulation(20), MixUp()],
        lambda: MixUp(0.4),
    ],
    ids='accumulate clip terminate_on_nan reduce_lr bn_freeze short_epoch several mixup'.split(),
)
def test_any_learner_with_the_callbacks_that_users_combine(cbs):
    def fit(learn, more):
        extra = cbs()
        learn.fit(3, cbs=[*(extra if isinstance(extra, list) else [extra]), *more])

    learn, swa = both(learner, fit)
    assert_column_true(learn, swa)


def test_short_epochs_shorten_neither_the_batch_norm_pass_nor_the_validation_of_the_average():
    learn, swa = both(learner, lambda learn, cbs: learn.fit(3, cbs=[ShortEpochCallback(0.3), *cbs]))
    assert swa.swa_model[1].num_batches_tracked == len(learn.dls.train)
    assert_column_true(learn, swa)
    assert all(map(math.isnan, column(learn, 'valid_loss')))  # fastai drops the values of a cut validation


def test_the_csv_log_has_the_columns(tmp_path):
    learn, _ = both(lambda: learner(path=tmp_path), lambda learn, cbs: learn.fit(3, cbs=[CSVLogger(), *cbs]))
    log = pd.read_csv(tmp_path / 'history.csv')
    assert list(log.columns) == list(learn.recorder.metric_names)
    np.testing.assert_allclose(log.swa_valid_loss, column(learn, 'swa_valid_loss'))
    assert log.swa_valid_loss.isna().tolist() == [True, False, False]


def test_a_csv_log_attached_for_good_survives_a_refresh_after_the_fit(tmp_path):
    learn, swa = learner(path=tmp_path, cbs=CSVLogger()), SWACallback(swa_start=0, swa_eval_freq=0)

    class Stop(Callback):
        def before_train(self):
            if self.epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, cbs=[swa, Stop()])
    with swa.averaged():
        pass
    assert len(pd.read_csv(tmp_path / 'history.csv')) == 2


def test_show_graph_draws_the_losses_of_the_model_in_training(monkeypatch):
    from fastprogress.fastprogress import ConsoleMasterBar

    graphs = []
    monkeypatch.setattr(
        ConsoleMasterBar,
        'update_graph',
        lambda self, graphs_, *a: graphs.append([list(map(float, g[1])) for g in graphs_]),
    )
    learn, _ = both(learner, lambda learn, cbs: learn.fit(3, cbs=[ShowGraphCallback(), *cbs]))
    assert graphs[-1][1] == column(learn, 'valid_loss')


def test_save_model_and_early_stopping_on_the_model_in_training(tmp_path):
    def fit(learn, cbs):
        learn.fit(4, cbs=[SaveModelCallback('accuracy'), EarlyStoppingCallback('valid_loss', patience=4), *cbs])

    both(lambda: learner(path=tmp_path), fit)


def test_activation_stats_are_those_of_training_and_nothing_of_the_learner_is_copied():
    def fit(learn, cbs):
        learn.fit(2, cbs=cbs)

    plain = learner(cbs=ActivationStats(with_hist=True))
    plain.fit(2)
    learn, swa = both(lambda: learner(cbs=ActivationStats(with_hist=True)), fit)
    for a, b in zip(plain.activation_stats.stats, learn.activation_stats.stats, strict=True):
        assert repr(a) == repr(b)
    assert not any(m._forward_hooks for m in swa.swa_model.modules())
    gc.collect()
    before = sum(type(o) is Learner for o in gc.get_objects())
    learn.fit(2, cbs=swa)
    gc.collect()
    assert sum(type(o) is Learner for o in gc.get_objects()) == before


# mixed precision, on a CPU through a substituted autocast


@pytest.fixture
def cpu_autocast(monkeypatch):
    monkeypatch.setattr(
        'fastai.callback.fp16.autocast', lambda device=None, dtype=None: torch.autocast('cpu', torch.bfloat16)
    )


class Watched(nn.Module):
    """Notes whether autocast was on in each forward pass, and in which mode; on the class, since
    what a module has for itself is put back after passes.
    """

    seen = []

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        res = self.net(x)
        self.seen.append(
            (torch.is_autocast_enabled('cpu'), self.net[1].training, self.net[3].training)
        )  # as the layers had it
        return res


@pytest.mark.filterwarnings('ignore:.*GradScaler.*')
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_any_learner_in_mixed_precision_runs_the_pass_and_the_validation_of_the_average_in_it_too(cpu_autocast, mode):
    Watched.seen.clear()
    learn, swa = both(lambda: learner(Watched, cbs=MixedPrecision(mode)), swa_eval_freq=0)
    compared = (False, False, False)  # the model, a copy and the model again, by themselves, before the first step
    assert learn.model.seen.count(compared) == 3 and {
        auto for auto, *_ in learn.model.seen if auto or (auto, *_) != compared
    } == {True}
    assert {modes for _, *modes in map(tuple, learn.model.seen) for modes in [tuple(modes)]} == {
        (True, True),
        (False, False),
        (True, False),
    }
    assert not torch.is_autocast_enabled('cpu')
    assert {p.dtype for p in swa.swa_model.parameters()} == {torch.float32}
    learn.model.seen.clear()
    swa._average.stale = True
    with swa.averaged():
        learn.validate()
    assert {auto for auto, *_ in learn.model.seen} == {True}


def test_a_model_cast_to_bfloat16_is_averaged_in_float32():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net().bfloat16()

        def forward(self, x):
            return self.net(x.bfloat16()).float()

    plain = learner(Cast)
    plain.fit(4)
    learn, swa, snaps = learner(Cast), SWACallback(swa_start=1), Snapshots()
    learn.fit(4, cbs=[swa, snaps])
    for a, b in zip(parameters(plain.model), parameters(learn.model)):
        assert torch.equal(a, b)
    assert_close(swa._average.running.master.values(), twins.mean(snaps.weights[1:]), 1e-6)
    assert {p.dtype for p in swa.swa_model.parameters()} == {torch.bfloat16}


# ways to fit


def test_any_way_to_fit_one_cycle_flat_cos_and_start_epoch():
    both(learner, lambda learn, cbs: learn.fit_one_cycle(3, cbs=cbs))
    both(learner, lambda learn, cbs: learn.fit_flat_cos(3, cbs=cbs))
    learn, swa = both(learner, lambda learn, cbs: learn.fit(5, cbs=cbs, start_epoch=2), swa_start=1, cycle_len=2)
    assert swa.averaged_epochs == [3]
    assert [len(row) for row in learn.recorder.values] == [5] * 5
    learn, swa = both(learner, lambda learn, cbs: learn.fit_one_cycle(5, cbs=cbs, start_epoch=3), swa_start=0)
    assert swa.averaged_epochs == [3, 4]


def two_groups(model):
    return [params(model[:4]), params(model[4:])]


@pytest.mark.parametrize('train_bn', [True, False])
def test_any_learner_fine_tuned_frozen_and_unfrozen(train_bn):
    learn, swa = both(
        lambda: learner(splitter=two_groups, train_bn=train_bn),
        lambda learn, cbs: learn.fine_tune(3, freeze_epochs=2, cbs=cbs),
    )
    assert swa.averaged_epochs == [1, 2]
    learn = learner(splitter=two_groups, train_bn=train_bn).to_swa(swa_start=0)
    learn.freeze()
    learn.fit(2)
    assert not torch.equal(
        learn.swa.swa_model[1].running_mean, learn.model[1].running_mean
    )  # train_bn=False fixes gamma and beta, no more
    for a, b in zip(parameters(learn.swa.swa_model[0]), parameters(learn.model[0])):
        assert torch.equal(a, b)
    learn.unfreeze()
    learn.fit(2)
    assert learn.swa.averaged_epochs == [0, 1]


def test_any_learner_with_torch_optimizers_and_groups():
    from functools import partial

    both(lambda: learner(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), splitter=two_groups, lr=1e-2))


# kinds of learners


def images(n=24, size=16, segment=False):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, size, size, generator=g)
    y = (x.mean(1) > 0).long() if segment else (x.mean((1, 2, 3)) > 0).long()
    pairs = list(zip(x, y))
    dls = DataLoaders(DataLoader(pairs[:16], bs=6, shuffle=True), DataLoader(pairs[16:], bs=8), device='cpu')
    return dls


def image_learner(model, **kwargs):
    def make():
        set_seed(0, reproducible=True)
        return Learner(images(**kwargs), model(), CrossEntropyLossFlat(axis=1 if kwargs else -1), opt_func=SGD, lr=0.01)

    return make


def test_any_learner_u_net():
    learn, swa = both(image_learner(unet, segment=True), lambda learn, cbs: (learn.fit(1), learn.fit(2, cbs=cbs)))
    x = torch.randn(2, 3, 16, 16)
    with swa.averaged():
        torch.testing.assert_close(learn.model.eval()(x), swa.swa_model.eval()(x))
    learn, swa = both(
        image_learner(unet, segment=True),
        lambda learn, cbs: (learn.lr_find(num_it=6, suggest_funcs=None, show_plot=False), learn.fit(2, cbs=cbs)),
    )


def conv():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


def test_any_learner_channels_last():
    learn, swa = both(lambda: image_learner(conv)().to_channelslast(use_amp=False))
    assert swa.swa_model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_column_true(learn, swa)
    with swa.averaged():
        assert learn.model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_any_learner_language_model():
    from fastai.text.data import LMDataLoader
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model

    def make():
        set_seed(0, reproducible=True)
        texts = [torch.randint(0, 30, (40,)) for _ in range(12)]
        dls = DataLoaders(
            LMDataLoader(texts[:8], bs=4, seq_len=9, shuffle=True, num_workers=0),
            LMDataLoader(texts[8:], bs=4, seq_len=9, num_workers=0),
            device='cpu',
        )
        model = get_language_model(AWD_LSTM, 30, config={**awd_lstm_lm_config, 'emb_sz': 6, 'n_hid': 8, 'n_layers': 2})
        return Learner(dls, model, CrossEntropyLossFlat(), opt_func=Adam, lr=0.01, cbs=rnn_cbs(2, 1), metrics=accuracy)

    learn, swa = both(make)
    assert not any(map(math.isnan, column(learn, 'swa_accuracy')[1:]))
    assert swa.swa_model[1].decoder.weight is swa.swa_model[0].encoder.weight
    expected = column(learn, 'swa_valid_loss')[-1]
    with swa.averaged():
        np.testing.assert_allclose(learn.validate()[0], expected, rtol=1e-5)


def test_any_learner_tabular(tmp_path):
    from fastai.data.block import RegressionBlock
    from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner

    def make():
        set_seed(0, reproducible=True)
        rng = np.random.RandomState(0)
        df = pd.DataFrame({'a': rng.randn(80), 'b': rng.randn(80), 'c': rng.choice(list('xyz'), 80)})
        df['y'] = (df.a + (df.c == 'x')).astype('float32')
        dls = TabularDataLoaders.from_df(
            df,
            procs=[Categorify, Normalize],
            cat_names=['c'],
            cont_names=['a', 'b'],
            y_names='y',
            y_block=RegressionBlock(),
            valid_idx=list(range(60, 80)),
            bs=16,
            device='cpu',
        )
        return tabular_learner(dls, layers=[8], n_out=1, path=tmp_path)

    learn, swa = both(make)
    rows = learn.dls.train_ds.conts  # the loader draws with replacement; the pass must take each row once
    torch.testing.assert_close(
        swa.swa_model.bn_cont.running_mean, torch.tensor(rows.mean().to_numpy()).float(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        swa.swa_model.bn_cont.running_var, torch.tensor(rows.var().to_numpy()).float(), rtol=1e-4, atol=1e-5
    )
    assert_column_true(learn, swa, nn.functional.mse_loss)
    with swa.averaged():
        learn.predict(learn.dls.valid_ds.items.iloc[0])


def test_any_learner_several_inputs_and_targets():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn, self.out = nn.Linear(3, 4), nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, a, b):
            return self.out(self.bn(self.a(a) + self.b(b)))

    def make():
        set_seed(0, reproducible=True)
        g = torch.Generator().manual_seed(0)
        items = [
            (torch.randn(3, generator=g), torch.randn(2, generator=g), torch.randn(2, generator=g), torch.ones(1))
            for _ in range(50)
        ]
        dls = DataLoaders(DataLoader(items[:40], bs=12, shuffle=True), DataLoader(items[40:], bs=10), device='cpu')
        dls.n_inp = 2
        return Learner(dls, Two(), lambda pred, y, w: ((pred - y) ** 2 * w).mean(), opt_func=SGD, lr=0.05)

    learn, swa = both(make)
    (batch,) = learn.dls.valid
    expected = ((swa.swa_model.eval()(*batch[:2]) - batch[2]) ** 2).mean().item()
    assert column(learn, 'swa_valid_loss')[-1] == pytest.approx(expected, rel=1e-5)


def test_any_learner_tied_weights():
    def make():
        set_seed(0, reproducible=True)
        items = [(torch.tensor(i % 7), torch.tensor((i + 1) % 7)) for i in range(70)]
        return Learner(
            DataLoaders(DataLoader(items, bs=16, shuffle=True), DataLoader(items, bs=64), device='cpu'),
            Tied(),
            CrossEntropyLossFlat(),
            opt_func=SGD,
            lr=0.1,
        )

    learn, swa = both(make)
    assert swa.swa_model.out.weight is swa.swa_model.emb.weight
    with swa.averaged():
        assert learn.model.out.weight is learn.model.emb.weight
    swa.apply()
    assert learn.model.out.weight is learn.model.emb.weight


@pytest.mark.parametrize('wrap', ['learner', 'inner', 'in_place'])
def test_any_learner_compiled(wrap):
    def model():
        m = net()
        if wrap == 'learner':
            return torch.compile(m, backend='eager')
        if wrap == 'inner':
            return nn.Sequential(m[:4], torch.compile(m[4:], backend='eager'))
        m.compile(backend='eager')
        return m

    learn, swa = both(lambda: learner(model))
    fresh = nn.Sequential(net()[:4], net()[4:]) if wrap == 'inner' else net()
    fresh.load_state_dict(swa.swa_model.state_dict(), strict=True)
    np.testing.assert_allclose(
        twins.evaluate(fresh, list(learn.dls[1]), nn.functional.cross_entropy)[0],
        column(learn, 'swa_valid_loss')[-1],
        rtol=1e-4,
    )
    with swa.averaged():
        preds = learn.get_preds()[0]
    torch.testing.assert_close(preds, torch.cat([fresh(x) for x, _ in learn.dls.valid]).softmax(1).detach())
    learn.fit(2, cbs=swa)


def test_any_learner_data_parallel():
    learn, swa = both(lambda: learner().to_parallel())
    assert list(swa.swa_model.state_dict()) == list(net().state_dict())
    assert_column_true(learn, swa)

    class Stop(Callback):
        def before_train(self):
            if self.epoch == 2:
                raise KeyboardInterrupt

    learn, swa = learner().to_parallel(), SWACallback(swa_start=0, swa_eval_freq=0)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, cbs=[swa, Stop()])
    with swa.averaged():
        learn.get_preds()
    mean, _ = twins.bn_statistics(swa.swa_model, [(torch.stack([x for x, _ in learn.dls.train.dataset]),)])['1']
    torch.testing.assert_close(swa.swa_model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)


def gan_learner(switch_eval, **kwargs):
    "A generator and a critic, both with batch norm, that train by turns."
    from fastai.vision.gan import GANLearner, basic_critic, basic_generator

    set_seed(0, reproducible=True)
    pairs = [(torch.randn(8), torch.rand(1, 16, 16)) for _ in range(40)]
    dls = DataLoaders(DataLoader(pairs[:32], bs=8, shuffle=True), DataLoader(pairs[32:], bs=8), device='cpu')
    dls.train.rng = random.Random(0)
    generator, critic = basic_generator(16, 1, in_sz=8, n_features=4), basic_critic(16, 1, n_features=4)
    return GANLearner.wgan(dls, generator, critic, switch_eval=switch_eval, opt_func=SGD, **kwargs)


@pytest.mark.parametrize('switch_eval', [False, True])
@pytest.mark.parametrize('how', [{'every': 1, 'weight': ema(0.9)}, {}])
def test_any_learner_gan(switch_eval, how):
    plain = gan_learner(switch_eval)
    plain.fit(3, 1e-2)
    learn, swa, snaps = gan_learner(switch_eval), SWACallback(swa_start=0, **how), Snapshots()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        warnings.filterwarnings('ignore', 'You are shadowing an attribute')  # fastai's own, of its GANTrainer
        learn.fit(3, 1e-2, cbs=[swa, snaps])
    for (k, a), b in zip(plain.model.state_dict().items(), learn.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), k
    if not how:
        assert_close(parameters(swa.swa_model), twins.mean(snaps.weights))
    generator = swa.swa_model.generator
    noise, real = map(torch.stack, zip(*learn.dls.train.dataset))
    mean, var = twins.bn_statistics(generator, [(noise,)])[
        '1.1'
    ]  # that of later layers depends on how samples are batched
    assert_close([generator[1][1].running_mean, generator[1][1].running_var], [mean, var], 1e-5)
    generated = copy.deepcopy(generator).train()(noise).detach()
    mean, var = twins.bn_statistics(swa.swa_model.critic, [(real,), (generated,)])[
        '1.1'
    ]  # in one batch, not in four: nearly the same
    critic = swa.swa_model.critic[1][1]
    assert (critic.running_mean - mean).abs().max() < 0.01 * var.max().sqrt()
    torch.testing.assert_close(critic.running_var.double(), var, rtol=0.01, atol=0)
    with swa.averaged():
        assert not math.isnan(learn.validate()[0])


@pytest.mark.parametrize(
    'make',
    [
        partial(nn.InstanceNorm2d, track_running_stats=True),
        BatchRenorm,
        partial(GhostBatchNorm, num_splits=2),
        RunningBatchNorm,
    ],
)
def test_any_learner_with_layers_that_normalise_in_a_way_of_their_own(make):
    def model():
        features = nn.Sequential(nn.Linear(6, 96), nn.Unflatten(1, (6, 4, 4)), nn.Conv2d(6, 4, 3))
        return nn.Sequential(features, make(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

    learn, swa = both(lambda: learner(model, dls=loaders(n=64, n_valid=32)))
    twin, x = copy.deepcopy(swa.swa_model), torch.stack([x for x, _ in learn.dls.train.dataset])
    for m in twin.modules():
        for b in m._buffers.values():
            if b.is_floating_point():
                b.add_(0.5)
    update_bn(list(x.split(16)), twin)  # as in the pass, but for the order
    with torch.no_grad():
        average, expected = swa.swa_model.eval()(x), twin.eval()(x)
    assert (average - expected).abs().mean() < 0.05 * expected.std()


# a learner of fastai's own data blocks: export, tta, show_results, interpretation


def digits_learner(path, **kwargs):
    set_seed(0, reproducible=True)
    return Learner(
        digits(n_train=80),
        digits_net(width=4),
        CrossEntropyLossFlat(),
        opt_func=SGD,
        lr=0.1,
        metrics=accuracy,
        path=path,
        **kwargs,
    )


def test_an_export_holds_what_the_user_asked_for_and_no_more(tmp_path):
    plain = digits_learner(tmp_path)
    plain.fit(2)
    plain.export('plain.pkl')
    learn = digits_learner(tmp_path).to_swa(swa_start=0)
    learn.fit(2)
    raw = learn.get_preds()[0]
    opt, dls, fit = learn.opt.state_dict(), learn.dls, type(learn).fit
    learn.export('raw.pkl')
    with learn.swa.averaged():
        average = learn.get_preds()[0]
        learn.export('average.pkl')
    assert not torch.allclose(raw, average)
    sizes = {name: (tmp_path / f'{name}.pkl').stat().st_size for name in ('plain', 'raw', 'average')}
    weights = sum(p.numel() * 4 for p in learn.model.parameters())
    assert sizes['raw'] - sizes['plain'] < 1500 < weights and abs(sizes['average'] - sizes['raw']) < 1500, sizes
    for name, expected in (('raw', raw), ('average', average)):
        loaded = load_learner(tmp_path / f'{name}.pkl')
        assert type(loaded.swa) is Callback and loaded.swa in loaded.cbs
        loaded.dls = dls
        assert torch.equal(loaded.get_preds()[0], expected), name
        loaded.fit(1)
        loaded.fit(1, cbs=SWACallback(swa_start=0))
        loaded.to_swa(swa_start=0).fit(1)
        assert loaded.swa.averaged_epochs == [0]
    assert learn.dls is dls and 'fit' not in vars(learn) and type(learn).fit is fit
    for a, b in zip(opt['state'], learn.opt.state_dict()['state'], strict=True):
        assert repr(a) == repr(b)
    assert torch.equal(learn.get_preds()[0], raw)
    learn.fit(1)


def learner_of_a_table(path):
    from fastai.tabular.all import TabularDataLoaders, tabular_learner

    df = pd.DataFrame({'a': np.arange(40.0), 'y': np.arange(40.0)})
    dls = TabularDataLoaders.from_df(df, cont_names=['a'], y_names='y', bs=16, device='cpu')
    return tabular_learner(dls, layers=[4], n_out=1, path=path)


def predictions_elsewhere(learn, file, then, before=''):
    "Of the validation set, by the exported `file` in another process, which runs `before`, loads it, and `then` that."
    code = before + (
        f'import sys, torch; from fastai.tabular.all import *; learn = load_learner("{file}"); {then}; '
        'df = pd.DataFrame({"a": np.arange(40.), "y": np.arange(40.)}); '
        'torch.save(learn.get_preds(dl=learn.dls.test_dl(df))[0], "preds.pth")'
    )
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=learn.path, check=True, capture_output=True)
    return torch.load(learn.path / 'preds.pth')[learn.dls.valid_ds.items.index.tolist()]


def test_an_export_made_inside_averaged_needs_no_fastai_swa_where_it_is_loaded(tmp_path):
    learn = learner_of_a_table(tmp_path)
    swa = SWACallback(swa_start=0)
    learn.fit(1, cbs=swa)
    with swa.averaged():
        expected = learn.get_preds()[0]
        learn.export('average.pkl')
        twin = copy.deepcopy(learn)
    assert 'fit' not in vars(twin) and 'fit' not in vars(learn) and '__getstate__' not in {**vars(learn), **vars(twin)}
    preds = predictions_elsewhere(learn, 'average.pkl', 'assert "fastai_swa" not in sys.modules')
    torch.testing.assert_close(preds, expected)


NOT_IMPORTABLE = """
import sys
class Nothing:
    def find_spec(self, name, *args):
        if name.split('.')[0] == 'fastai_swa': raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
"""


def test_an_export_loads_where_the_package_is_not_importable_whatever_of_it_is_attached(tmp_path):
    learn = learner_of_a_table(tmp_path)
    learn.to_swa(swa_start=0, weight=ema(0.5)).to_swa(swa_start=0, name='other')
    learn.add_cbs([CheckpointCallback(tmp_path / 'run.ckpt'), SnapshotCallback(0), SaveSWAModelCallback()])
    learn.add_cb(WeightHistory(tmp_path / 'history'))
    learn.fit(1)
    expected = learn.get_preds()[0]
    learn.export('raw.pkl')
    then = 'assert learn.cbs.map(type).count(Callback) == 6 and learn.swa.learn is learn'
    preds = predictions_elsewhere(learn, 'raw.pkl', then, before=NOT_IMPORTABLE)
    torch.testing.assert_close(preds, expected)


def test_tta_show_results_predict_and_interpretation_inside_averaged(tmp_path):
    from fastai.interpret import ClassificationInterpretation

    learn, swa = digits_learner(tmp_path), SWACallback(swa_start=0)
    learn.fit(2, cbs=swa)
    raw = learn.get_preds()[0]
    with swa.averaged():
        preds, _ = learn.tta(n=2)
        learn.show_results(max_n=2)
        _, _, probabilities = learn.predict(0)
        interpretation = ClassificationInterpretation.from_learner(learn)
        assert interpretation.confusion_matrix().sum() == len(learn.dls.valid_ds)
        expected = learn.get_preds()[0]
    torch.testing.assert_close(preds, expected)
    with torch.no_grad():
        torch.testing.assert_close(
            probabilities,
            swa.swa_model.eval()(learn.dls.train_ds.items and next(iter(learn.dls.test_dl([0])))[0]).softmax(1)[0],
        )
    assert torch.equal(learn.get_preds()[0], raw) and not torch.allclose(raw, expected)


def test_the_columns_reach_trackers_csv_and_saver_together(tmp_path):
    learn = digits_learner(tmp_path).to_swa(swa_start=1)
    learn.fit(
        4,
        cbs=[
            CSVLogger(),
            SaveSWAModelCallback('swa_accuracy'),
            EarlyStoppingCallback('swa_valid_loss', patience=3),
            ReduceLROnPlateau('swa_valid_loss', patience=5),
        ],
    )
    assert (tmp_path / 'models' / 'swa_model.pth').exists()
    fresh = digits_learner(tmp_path).load('swa_model', with_opt=False)
    assert len(fresh.validate()) == 2


def test_memory_holds_two_sets_of_weights():
    learn, swa = learner(lambda: net(width=64)), SWACallback(swa_start=0)
    for _ in range(3):
        learn.fit(2, cbs=swa)
    for p in learn.model.parameters():
        p.grad = None
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor) and t.numel() == 64 * 64
    }
    momentum = sum(
        isinstance(v, torch.Tensor) and v.numel() == 64 * 64 for s in learn.opt.state.values() for v in s.values()
    )
    assert len(storages) == 2 + momentum


@pytest.mark.parametrize('change', ['hook', 'no hook', 'module', 'forward'])
def test_any_change_of_the_model_in_the_middle_of_a_fit_is_one_of_swa_model(change):
    def doubled(module, args, output):
        return 2 * output

    class Changes(Callback):
        order = 60

        def before_train(self):
            model = self.learn.model
            if self.epoch == 0 and change == 'no hook':
                self.handle = model[-1].register_forward_hook(doubled)
            if self.epoch != 3:
                return
            if change == 'hook':
                model[-1].register_forward_hook(doubled)
            if change == 'no hook':
                self.handle.remove()
            if change == 'module':
                model[2] = nn.Tanh()
            if change == 'forward':
                model[-1].forward = lambda x, layer=model[-1]: 3 * nn.functional.linear(x, layer.weight, layer.bias)

    learn, swa = learner(lambda: net(dropout=0)), SWACallback(1)
    learn.fit(5, cbs=[swa, Changes()])
    loss = twins.evaluate(swa.swa_model, list(learn.dls.valid), nn.functional.cross_entropy)[0]
    assert column(learn, 'swa_valid_loss')[-1] == pytest.approx(loss, rel=1e-4) and swa.n_averaged == 4


def test_any_model_that_knows_its_parts_by_their_identity_is_refused_before_the_first_step():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.scales = {id(self.net): 3.0}

        def forward(self, x):
            return self.net(x) * self.scales.get(id(self.net), 1.0)

    learn = learner(Ids)
    before = [p.clone() for p in parameters(learn.model)]
    with pytest.raises(ValueError, match='a copy of the model computes something else'):
        learn.fit(2, cbs=SWACallback(0))
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(learn.model)))


def test_any_callback_whose_hook_changes_the_output_is_refused_before_the_first_step():
    class Doubles(Callback):
        def before_fit(self):
            self.handle = self.learn.model[-1].register_forward_hook(self.hook)

        def hook(self, module, args, output):
            return 2 * output

        def after_fit(self):
            self.handle.remove()

    with pytest.raises(ValueError, match="hook of module '7'"):
        learner().fit(2, cbs=[SWACallback(0), Doubles()])
