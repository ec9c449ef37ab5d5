"""Snapshots along a fit: when they are taken, how they are validated, that training does not feel
them."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import (
    Callback,
    CancelFitException,
    CancelTrainException,
    CancelValidException,
    FetchPredsCallback,
)
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import BnFreeze
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import RocAucBinary, accuracy, accuracy_multi, mse
from torch import nn

from fastai_swa import CheckpointCallback, Ensemble, SnapshotCallback, SWACallback, average_checkpoints, update_bn
from fastai_swa import snapshots as snapshots_file
from fastai_swa.files import InUse
from fastai_swa.learner import EpochScheduler
from fastai_swa.packing import pack
from fastai_swa.schedules import fge_lr_factor, snapshot_lr_factor
from fastai_swa.vision import digits

from . import lora
from .helpers import At, assert_close, assert_same, column, fingerprint, learner, loaders, net, raising

N_STEPS = 6


# the schedules, in a fit


@pytest.mark.parametrize('n_cycles, cycle_len', [(3, 2), (2, 3), (1, 5), (4, 1)])
def test_fit_snapshots_has_the_papers_learning_rate_at_every_step_and_a_snapshot_at_the_end_of_each_cycle(
    n_cycles, cycle_len
):
    learn = learner()
    ens = learn.fit_snapshots(n_cycles, cycle_len, 0.2)
    n = n_cycles * cycle_len * N_STEPS
    np.testing.assert_allclose(
        learn.recorder.lrs, [0.2 * snapshot_lr_factor(i, n, n_cycles) for i in range(n)], rtol=1e-12
    )
    assert ens.epochs == [cycle_len * (i + 1) - 1 for i in range(n_cycles)] and len(ens) == n_cycles


@pytest.mark.parametrize('n_cycles, cycle_len', [(3, 2), (2, 4), (1, 2), (2, 6)])
def test_fit_fge_has_the_papers_learning_rate_at_every_step_and_ends_at_the_low_point_of_its_last_cycle(
    n_cycles, cycle_len
):
    learn = learner()
    ens = learn.fit_fge(n_cycles, cycle_len, 0.05, 0.0005)
    n_epoch = (n_cycles - 1) * cycle_len + cycle_len // 2
    expected = [0.05 * fge_lr_factor(e, i, N_STEPS, cycle_len, 0.01) for e in range(n_epoch) for i in range(N_STEPS)]
    np.testing.assert_allclose(learn.recorder.lrs, expected, rtol=1e-9)
    assert ens.epochs == [c * cycle_len + cycle_len // 2 - 1 for c in range(n_cycles)] and ens.epochs[-1] == n_epoch - 1
    assert learn.recorder.lrs[-1] == min(learn.recorder.lrs[-cycle_len // 2 * N_STEPS :])


def test_defaults_are_the_learners_learning_rate_and_a_hundredth_of_it():
    learn = learner(lr=0.3)
    learn.fit_snapshots(1, 1)
    assert learn.recorder.lrs[0] == 0.3
    learn.fit_fge(1, 2)
    assert learn.recorder.lrs[0] == 0.3 and learn.recorder.lrs[-1] == pytest.approx(
        0.3 * fge_lr_factor(0, N_STEPS - 1, N_STEPS, 2, 0.01)
    )


def test_groups_of_parameters_follow_the_same_curve():
    def splitter(m):
        return [list(m[:4].parameters()), list(m[4:].parameters())]

    learn, seen = learner(splitter=splitter), []

    class Keep(ParamScheduler):
        order = 70

        def __init__(self):
            pass

        def before_fit(self):
            pass

        def before_batch(self):
            seen.append([h['lr'] for h in self.opt.hypers])

        def after_batch(self):
            pass

        def after_fit(self):
            pass

    learn.fit_snapshots(2, 1, slice(0.01, 0.1), cbs=Keep())
    assert all(b == pytest.approx(10 * a) for a, b in seen) and seen[0] == pytest.approx([0.01, 0.1])


# training is untouched


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('where', ['memory', 'folder'])
def test_training_is_bitwise_as_without_snapshots(num_workers, where, tmp_path):
    def fit(cbs):
        learn = learner(dls=loaders(num_workers=num_workers))
        learn.fit(
            5, 0.1, cbs=[EpochScheduler({'lr': lambda e, i, n: 0.1 * snapshot_lr_factor(e * n + i, 5 * n, 2)}), *cbs]
        )
        res = fingerprint(learn)
        res['columns'] = [n for n in learn.recorder.metric_names if not n.startswith('ens_')]
        res['cbs'] = []
        return {k: v for k, v in res.items() if not k.startswith('column.ens_')}

    assert_same(fit([SnapshotCallback(1, 2, tmp_path / 'snaps' if where == 'folder' else None)]), fit([]))


# the columns are true


def test_each_ensemble_column_is_an_independent_evaluation_of_the_snapshots_so_far():
    learn = learner(metrics=[accuracy])
    ens = learn.fit_snapshots(3, 2, 0.1)
    assert list(learn.recorder.metric_names) == [
        'epoch',
        'train_loss',
        'valid_loss',
        'accuracy',
        'ens_valid_loss',
        'ens_accuracy',
        'time',
    ]
    loss, acc, own_loss = column(learn, 'ens_valid_loss'), column(learn, 'ens_accuracy'), column(learn, 'valid_loss')
    assert [e for e in range(6) if loss[e] == loss[e]] == [1, 3, 5]
    assert loss[1] == pytest.approx(own_loss[1], rel=1e-6)  # one snapshot: the model itself
    for i, e in enumerate((1, 3, 5)):
        models, p = [], 0
        for weights in ens.members[: i + 1]:
            models.append(net())
            models[-1].load_state_dict(weights)
            with torch.no_grad():
                p = p + torch.cat([models[-1].eval()(x) for x, _ in learn.dls.valid]).double().softmax(1) / (i + 1)
        y = torch.cat([y for _, y in learn.dls.valid])
        assert loss[e] == pytest.approx(float(-p[torch.arange(40), y].log().mean()), rel=1e-5)
        assert acc[e] == pytest.approx(float((p.argmax(1) == y).float().mean()))
    assert list(ens.validate()) == pytest.approx([loss[5], acc[5]], rel=1e-5)


@pytest.mark.parametrize('kind', ['multi-label', 'regression'])
def test_columns_of_labels_and_values(kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=g)
    y = (x[:, :3] > 0).float() if kind == 'multi-label' else x[:, :3] * 2
    dls = DataLoaders(
        DataLoader(list(zip(x[:40], y[:40])), bs=16, shuffle=True),
        DataLoader(list(zip(x[40:], y[40:])), bs=16),
        device='cpu',
    )
    loss, metric = (BCEWithLogitsLossFlat(), accuracy_multi) if kind == 'multi-label' else (MSELossFlat(), mse)
    learn = Learner(dls, net(), loss, metrics=metric)
    with learn.no_bar():
        ens = learn.fit_snapshots(3, 1, 0.01)
    *_, own, _, ens_loss, ens_metric = learn.recorder.values[-1]
    assert [ens_loss, ens_metric] == pytest.approx(list(ens.validate()), rel=1e-5) and ens_loss != own


def test_metrics_that_collect_predictions_keep_the_models_own_values():
    dls = loaders(n_out=2)
    learn = learner(model=lambda: net(n_out=2), dls=dls, metrics=[RocAucBinary(), accuracy])
    ens = learn.fit_snapshots(3, 1, 0.1)
    twin = learner(model=lambda: net(n_out=2), dls=loaders(n_out=2), metrics=[RocAucBinary(), accuracy])
    twin.fit(3, 0.1, cbs=EpochScheduler({'lr': lambda e, i, n: 0.1 * snapshot_lr_factor(e * n + i, 3 * n, 3)}))
    assert column(learn, 'roc_auc_score') == column(twin, 'roc_auc_score')
    last = column(learn, 'ens_roc_auc_score')[-1]
    assert last == pytest.approx(ens.validate()[1])


@pytest.mark.parametrize('bs', [8, 64])  # several batches, or one, whose sum is the same in any order
def test_a_validation_set_in_another_order_each_time_is_said_and_gives_no_column(bs):
    dls = loaders()
    learn = learner(dls=DataLoaders(dls.train, DataLoader(dls.valid.dataset, bs=bs, shuffle=True), device='cpu'))
    with pytest.warns(
        UserWarning,
        match='gives other samples than at the first snapshot, .*: from there on the growing ensemble is not validated',
    ):
        ens = learn.fit_snapshots(3, 1, 0.1)
    loss = column(learn, 'ens_valid_loss')
    assert loss[0] == loss[0] and all(v != v for v in loss[1:]) and len(ens) == 3


# what the columns take of memory


N_OUTPUTS = 3
PREDS_MB = 40 * N_OUTPUTS * 4 / 1e6  # of the 40 samples that `loaders` validates on


def test_no_more_predictions_are_kept_than_allowed_neither_in_memory_nor_in_checkpoints(tmp_path):
    "Said once, with the size; and what steers training by the columns neither counts nor acts."
    learn = learner()
    assert len(learn.dls.valid_ds) == 40
    held = []

    class Look(Callback):
        order = SnapshotCallback.order + 1

        def after_validate(self):
            held.append(sum(t.numel() for terms, *_ in snapshots._sums for t in terms))
            state = pack(snapshots.state_dict())
            assert not state['sums'] and state['is_given_up']

    snapshots = SnapshotCallback(0, max_preds_mb=0.9 * PREDS_MB)
    stop = EarlyStoppingCallback('ens_valid_loss', patience=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        learn.fit(4, 0.1, cbs=[snapshots, Look(), stop, CheckpointCallback(tmp_path / 'fit.ckpt')])
    said = [str(w.message) for w in caught if 'max_preds_mb' in str(w.message)]
    assert len(said) == 1 and 'from there on the growing ensemble is not validated, and its columns are nan' in said[0]
    assert held == [0] * 4 and snapshots.epochs == [0, 1, 2, 3]
    assert all(v != v for v in column(learn, 'ens_valid_loss')) and len(snapshots.ensemble(learn)) == 4


@pytest.mark.parametrize('bs', [7, 8, 40, 64])
def test_what_is_just_allowed_is_kept_until_the_fit_is_over(bs):
    dls = loaders()
    dls = DataLoaders(dls.train, DataLoader(dls.valid.dataset, bs=bs), device='cpu')
    learn, snapshots = learner(dls=dls), SnapshotCallback(0, max_preds_mb=PREDS_MB)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(2, 0.1, cbs=snapshots)
    assert all(v == v for v in column(learn, 'ens_valid_loss'))
    assert not snapshots._sums


def test_too_many_predictions_are_seen_at_the_first_batch():
    learn, n_seen = learner(), []

    class Look(Callback):
        order = SnapshotCallback.order + 1

        def after_batch(self):
            if not self.training:
                n_seen.append(len(snapshots._sums))

    snapshots = SnapshotCallback(0, max_preds_mb=PREDS_MB / 2)
    with pytest.warns(UserWarning, match='max_preds_mb'):
        learn.fit(1, 0.1, cbs=[snapshots, Look()])
    assert len(n_seen) > 1 and not any(n_seen)


def test_switched_off_there_are_no_columns_and_nothing_is_kept():
    for fitted in (
        lambda learn: learn.fit_snapshots(2, 1, 0.1, max_preds_mb=0),
        lambda learn: learn.fit_fge(2, 2, 0.1, max_preds_mb=0),
        lambda learn: learn.fit(2, 0.1, cbs=SnapshotCallback(0, max_preds_mb=0)),
    ):
        learn = learner()
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            fitted(learn)
        assert not any(name.startswith('ens_') for name in learn.recorder.metric_names)


def test_a_fit_whose_predictions_were_too_many_goes_on_silently_and_without_columns(tmp_path):
    path = tmp_path / 'fit.ckpt'

    def fit(*cbs):
        snapshots, learn = SnapshotCallback(0, max_preds_mb=PREDS_MB / 2), learner()
        learn.fit(4, 0.1, cbs=[snapshots, CheckpointCallback(path), *cbs])
        return snapshots, learn

    with pytest.warns(UserWarning, match='max_preds_mb'), pytest.raises(KeyboardInterrupt):
        fit(At('before_train', 2, raising(KeyboardInterrupt())))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        snapshots, learn = fit()
    assert snapshots.epochs == [0, 1, 2, 3] and all(v != v for v in column(learn, 'ens_valid_loss'))


def test_a_tracker_of_a_column_that_is_left_out_is_refused_before_the_first_step():
    learn = learner()
    stop = EarlyStoppingCallback('ens_accuracy', patience=3)
    with pytest.raises(ValueError, match="max_preds_mb=0 .*the EarlyStoppingCallback monitors 'ens_accuracy'"):
        learn.fit_snapshots(2, 1, lr=0.1, max_preds_mb=0, cbs=stop)
    learn.fit_snapshots(2, 1, lr=0.1, max_preds_mb=0, cbs=EarlyStoppingCallback('accuracy', patience=3))


def test_targets_that_are_nan_are_the_same_targets():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 6, generator=g), torch.randn(60, 3, generator=g)
    y[45, 1] = float('nan')
    dls = DataLoaders(
        DataLoader(list(zip(x[:40], y[:40])), bs=16, shuffle=True),
        DataLoader(list(zip(x[40:], y[40:])), bs=16),
        device='cpu',
    )

    def masked(p, t):
        return (p - t).square().nanmean()

    learn = Learner(dls, net(), masked)
    with learn.no_bar():
        learn.fit_snapshots(3, 1, 0.01, activation='none')
    assert all(v == v for v in column(learn, 'ens_valid_loss'))


@pytest.mark.parametrize('event, batch', [('before_validate', None), ('before_batch', 1)])
@pytest.mark.parametrize('epoch', [0, 1])
def test_a_validation_that_is_skipped_or_cut_at_a_snapshot_is_said_and_nothing_false_is_shown(event, batch, epoch):
    learn, snapshots = learner(), SnapshotCallback(0)
    with pytest.warns(UserWarning, match='growing ensemble is not validated'):
        learn.fit(
            4,
            0.1,
            cbs=[
                snapshots,
                At(event, epoch, raising(CancelValidException('skip')), batch=batch, training=False if batch else None),
            ],
        )
    loss = column(learn, 'ens_valid_loss')
    assert [v == v for v in loss] == [e < epoch for e in range(4)] and len(snapshots.ensemble(learn)) == 4


# beside other callbacks


def test_average_checkpoints_refuses_weights_with_a_nan_by_name(tmp_path):
    diverged = net()
    with torch.no_grad():
        diverged[0].weight[0, 0] = float('nan')
    torch.save(diverged.state_dict(), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match="a.pth has a NaN in '0.weight'"):
        average_checkpoints([net().state_dict(), tmp_path / 'a.pth'], learner())


def test_average_checkpoints_leaves_the_batch_norm_alone_that_a_bnfreeze_of_the_learner_keeps_from_moving(tmp_path):
    learn = learner(cbs=BnFreeze())
    for p in learn.model[1].parameters():
        p.requires_grad_(False)
    own = {k: v.clone() for k, v in learn.model[1].state_dict().items()}
    learn.model[1].running_mean.add_(1)  # so that it matters
    paths = learn.fit_snapshots(2, 1, 0.1, folder=tmp_path / 'snapshots').members
    for mode in (True, False):
        learn.model.train(mode)
        average = average_checkpoints(paths, learn)
        assert torch.equal(average[1].running_mean, own['running_mean'] + 1)
        assert torch.equal(average[1].running_var, own['running_var'])
        assert not torch.equal(average[5].running_mean, torch.load(paths[-1])['5.running_mean'])


def test_a_swa_callback_beside_averages_the_same_points_and_average_checkpoints_finds_it_again(tmp_path):
    dls = loaders(n=64, bs=64)  # one batch: whatever the order, its statistics are the same
    learn, swa = learner(dls=dls), SWACallback(1, cycle_len=2)
    ens = learn.fit_snapshots(3, 2, 0.1, tmp_path, cbs=swa)
    assert swa.averaged_epochs == ens.epochs == [1, 3, 5]
    names = list(learn.recorder.metric_names)
    assert names == [
        'epoch',
        'train_loss',
        'valid_loss',
        'accuracy',
        'swa_valid_loss',
        'swa_accuracy',
        'ens_valid_loss',
        'ens_accuracy',
        'time',
    ]
    weights = [torch.load(f, weights_only=True) for f in ens.members]
    for k, p in swa.swa_model.named_parameters():
        torch.testing.assert_close(p.double(), sum(w[k].double() for w in weights) / 3, rtol=1e-6, atol=1e-7)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    average = average_checkpoints(ens.members, learn)
    assert_close(average.state_dict().values(), swa.swa_model.state_dict().values(), 1e-5)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    fge = SWACallback(1, cycle_len=4)
    assert learn.fit_fge(2, 4, 0.05, cbs=fge).epochs == fge.averaged_epochs == [1, 5]


def test_checkpoints_average_to_the_mean_of_their_weights_for_any_module(tmp_path):
    torch.manual_seed(0)
    models, paths = [net() for _ in range(3)], [tmp_path / f'{i}.pth' for i in range(3)]
    for m, path in zip(models, paths):
        torch.save(m.state_dict(), path)
    data = [(torch.randn(16, 6), 0) for _ in range(3)]
    average, twin = average_checkpoints(paths, models[0], data), net()
    for p, *ps in zip(average.parameters(), *(m.parameters() for m in models)):
        torch.testing.assert_close(p.double(), sum(q.detach().double() for q in ps) / 3, rtol=1e-6, atol=1e-7)
    twin.load_state_dict(average.state_dict())
    update_bn(data, twin)
    assert_close(average.state_dict().values(), twin.state_dict().values(), 1e-6)
    update_bn(data[:1], twin)
    assert_close(
        average_checkpoints(paths, net(), data, n_batches=1).state_dict().values(), twin.state_dict().values(), 1e-6
    )
    with pytest.raises(ValueError, match='loader is needed'):
        average_checkpoints(paths, net())
    with pytest.raises(ValueError, match='paths is empty'):
        average_checkpoints([], net())
    with pytest.raises(ValueError, match='0.pth does not hold weights of this architecture'):
        average_checkpoints(paths, net(width=9))
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'plain.pth')
    assert torch.equal(
        average_checkpoints(tmp_path / 'plain.pth', nn.Linear(2, 2)).weight,
        torch.load(tmp_path / 'plain.pth')['weight'],
    )  # no batch norm: no loader


class NormEval(nn.Sequential):
    "Keeps its batch norm in eval mode, as mmdetection's `norm_eval` does."

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def frozen_net():
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)]
    return NormEval(*layers)


@pytest.mark.parametrize('of', ['learner', 'module'])
@pytest.mark.parametrize('is_training', [True, False])
def test_batch_norm_that_the_models_train_keeps_frozen_stays_so_when_checkpoints_are_averaged(
    tmp_path, of, is_training
):
    learn = learner(model=frozen_net)
    ens = learn.fit_snapshots(3, 1, 0.1, tmp_path)
    learn.model.train(is_training)
    arguments = (learn,) if of == 'learner' else (learn.model, learn.dls.train.new(shuffle=False, drop_last=False))
    average = average_checkpoints(ens.members, *arguments)
    last = torch.load(ens.members[-1], weights_only=True)
    for name in 'running_mean', 'running_var':
        assert torch.equal(average.state_dict()[f'1.{name}'], last[f'1.{name}'])
        assert not torch.equal(average.state_dict()[f'4.{name}'], last[f'4.{name}'])


def test_a_learners_bn_freeze_counts_when_checkpoints_are_averaged(tmp_path):
    learn = learner(cbs=BnFreeze())
    for p in learn.model[1].parameters():
        p.requires_grad_(False)
    ens = learn.fit_snapshots(2, 1, 0.1, tmp_path)
    average, last = average_checkpoints(ens.members, learn), torch.load(ens.members[-1], weights_only=True)
    assert torch.equal(average[1].running_mean, last['1.running_mean'])
    assert not torch.equal(average[5].running_mean, last['5.running_mean'])


@pytest.mark.parametrize('is_training', [True, False])
@pytest.mark.parametrize('kind', lora.models)
def test_checkpoints_of_models_whose_modes_move_weights_average_as_training_has_them(tmp_path, kind, is_training):
    torch.manual_seed(0)
    models, paths = [lora.models[kind]() for _ in range(3)], [tmp_path / f'{i}.pth' for i in range(3)]
    for m, path in zip(models, paths):
        torch.save(m.state_dict(), path)  # in train mode
    expected = {k: sum(m.state_dict()[k].double() for m in models) / 3 for k, _ in models[0].named_parameters()}
    model = lora.models[kind]()
    before = {k: v.clone() for k, v in model.train(is_training).state_dict().items()}
    average = average_checkpoints(paths, model, [(torch.randn(16, 6), 0) for _ in range(3)])
    assert average.training == is_training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    average.train()
    for k, v in average.named_parameters():
        torch.testing.assert_close(v.double(), expected[k], rtol=1e-5, atol=1e-6)


# files


def test_snapshots_go_to_a_folder_as_they_come_with_an_index(tmp_path):
    learn, seen = learner(), []

    def look(cb):
        seen.append(sorted(f.name for f in tmp_path.iterdir()))

    ens = learn.fit_snapshots(2, 2, 0.1, tmp_path, cbs=[At('after_epoch', 1, look), At('after_epoch', 2, look)])
    assert seen == [['index.json', 'snapshot-01.pth']] * 2
    index = json.loads((tmp_path / 'index.json').read_text())
    assert index['files'] == ['snapshot-01.pth', 'snapshot-02.pth'] and index['epochs'] == [1, 3]
    again = Ensemble(tmp_path, learn)
    assert (
        torch.equal(again.get_preds()[0], ens.get_preds()[0])
        and again.epochs == [1, 3]
        and 'of the epochs 1, 3' in repr(again)
    )
    assert torch.load(tmp_path / 'snapshot-02.pth', weights_only=True).keys() == learn.model.state_dict().keys()
    assert all(torch.equal(v, torch.load(tmp_path / 'snapshot-02.pth')[k]) for k, v in learn.model.state_dict().items())


def test_snapshots_in_memory_are_copies_that_training_does_not_touch():
    learn = learner()
    ens = learn.fit_snapshots(2, 1, 0.1)
    assert not torch.equal(ens.members[0]['0.weight'], ens.members[1]['0.weight'])
    assert ens.members[1]['0.weight'].data_ptr() != learn.model[0].weight.data_ptr() and torch.equal(
        ens.members[1]['0.weight'], learn.model[0].weight
    )


# the fit is ended, goes on, is none


@pytest.mark.parametrize('where', ['memory', 'folder'])
@pytest.mark.parametrize('epoch', [0, 1, 2, 4])
def test_an_interrupted_run_goes_on_and_ends_bitwise_as_the_whole_one(tmp_path, where, epoch):
    def fit(learn, name, cbs=()):
        folder = tmp_path / name if where == 'folder' else None
        return learn.fit_snapshots(
            3, 2, 0.1, folder, cbs=[CheckpointCallback(tmp_path / f'{name}.ckpt'), SWACallback(1, cycle_len=2), *cbs]
        )

    whole = learner()
    ref = fit(whole, 'whole')
    with pytest.raises(KeyboardInterrupt):
        fit(learner(), 'part', [At('before_batch', epoch, raising(KeyboardInterrupt()), batch=2, training=True)])
    learn = learner(seed=7)
    ens = fit(learn, 'part')
    assert_same(fingerprint(learn), fingerprint(whole))
    for name in 'ens_valid_loss', 'ens_accuracy', 'swa_valid_loss':
        assert repr(column(learn, name)) == repr(column(whole, name))
    assert ens.epochs == ref.epochs and torch.equal(ens.get_preds()[0], ref.get_preds()[0])


def test_a_fit_that_ends_early_keeps_its_snapshots_and_fills_its_rows():
    learn, snapshots = learner(), SnapshotCallback(0)
    learn.fit(4, cbs=[snapshots, At('after_batch', 2, raising(CancelFitException('stop')), batch=1, training=True)])
    assert snapshots.epochs == [0, 1] and len(snapshots.ensemble(learn)) == 2
    learn.fit(3, cbs=[snapshots, At('after_batch', 1, raising(CancelTrainException('stop')), batch=1, training=True)])
    assert snapshots.epochs == [0, 1, 2]  # training that is cut short within an epoch ends it
    assert all(len(row) == len(learn.recorder.metric_names) - 2 for row in learn.recorder.values)


def test_a_fit_without_a_snapshot_says_so():
    with pytest.raises(
        ValueError, match=r'no snapshot was taken: the first one is due at the end of epoch 1 \(from 0\)'
    ):
        learner().fit_snapshots(
            2, 2, 0.1, cbs=At('after_batch', 0, raising(CancelFitException('stop')), batch=1, training=True)
        )


def test_validate_and_predictions_take_no_snapshot():
    learn, snapshots = learner(), SnapshotCallback(0)
    learn.fit(1, cbs=snapshots)
    with learn.added_cbs(snapshots):
        learn.validate(), learn.get_preds()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.lr_find(num_it=3, show_plot=False)
    assert snapshots.epochs == [0]


@pytest.mark.parametrize(
    'call, error, sentence',
    [
        (lambda learn: learn.fit_fge(2, 3, 0.1), ValueError, 'cycle_len must be an even number of epochs, .*, not 3'),
        (lambda learn: learn.fit_fge(2, 0, 0.1), ValueError, 'cycle_len must be'),
        (lambda learn: learn.fit_fge(2, 2, 0.1, 0.2), ValueError, 'lr_min must be at most lr_max=0.1, not 0.2'),
        (lambda learn: learn.fit_fge(2, 2, 0.0), ValueError, 'lr_max must be positive'),
        (lambda learn: learn.fit_fge(2, 2, 0.1, '1'), TypeError, 'lr_min must be a number'),
        (lambda learn: learn.fit_fge(2, 1, 0.1), ValueError, 'cycle_len must be an even number'),
        (lambda learn: learn.fit_snapshots(0, 2), ValueError, 'n_cycles must be'),
        (lambda learn: learn.fit_snapshots(2, 1.5), TypeError, 'cycle_len must be'),
        (lambda learn: learn.fit_snapshots(2, 2, -1.0), ValueError, 'lr must be positive'),
        (lambda learn: SnapshotCallback(-1), ValueError, 'first must be'),
        (lambda learn: SnapshotCallback(0, max_preds_mb=-1), ValueError, 'max_preds_mb must not be negative, not -1'),
        (lambda learn: SnapshotCallback(0, max_preds_mb='1'), TypeError, "max_preds_mb must be a number, not '1'"),
        (lambda learn: learn.fit_snapshots(2, 1, max_preds_mb=-1), ValueError, 'max_preds_mb must not be negative'),
        (lambda learn: learn.fit_fge(2, 2, max_preds_mb=None), TypeError, 'max_preds_mb must be a number'),
    ],
)
def test_arguments_that_cannot_be_used_are_one_sentence(call, error, sentence):
    learn = learner()
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(error, match=sentence):
        call(learn)
    assert all(torch.equal(p, q) for p, q in zip(learn.model.parameters(), before))


def test_callbacks_behind_see_the_models_own_predictions_and_loss():
    def fit(cbs):
        seen = []

        class Look(Callback):
            order = 90

            def after_batch(self):
                if not self.training:
                    seen.append((self.pred.clone(), self.loss.clone(), self.loss_grad.clone()))

        learner().fit(3, 0.1, cbs=[Look(), *cbs])
        return seen

    for a, b in zip(fit([SnapshotCallback(0)]), fit([]), strict=True):
        assert all(map(torch.equal, a, b))


@pytest.mark.parametrize('where', ['memory', 'folder'])
def test_a_script_of_several_fits_that_is_run_again_has_the_snapshots_of_each(tmp_path, where):
    def fits(learn, name, stop=None):
        def folder(i):
            return tmp_path / f'{name}{i}' if where == 'folder' else None

        def checkpoint():
            return CheckpointCallback(tmp_path / f'{name}.ckpt')

        a = learn.fit_snapshots(2, 1, 0.1, folder(0), cbs=checkpoint())
        b = learn.fit_snapshots(3, 1, 0.05, folder(1), cbs=checkpoint())
        swa = SWACallback(0)
        c = learn.fit_fge(2, 2, 0.05, folder=folder(2), cbs=[checkpoint(), swa, *([stop] if stop else [])])
        return a, b, c, Ensemble([swa.swa_model], learn)

    ref = fits(learner(), 'whole')
    with pytest.raises(KeyboardInterrupt):
        fits(learner(), 'part', At('before_batch', 1, raising(KeyboardInterrupt()), batch=2, training=True))
    again = fits(learner(seed=5), 'part')
    assert [ens.epochs for ens in again[:3]] == [[0, 1], [0, 1, 2], [0, 2]]
    for x, y in zip(again, ref):
        assert torch.equal(x.get_preds()[0], y.get_preds()[0])


def test_a_folder_with_other_models_is_not_written_to(tmp_path):
    learn = learner()
    first = learn.fit_snapshots(2, 1, 0.1, tmp_path / 'a')
    ref = first.get_preds()[0]
    with pytest.raises(ValueError, match='folder .*/a holds the models of another fit: give another one, or remove it'):
        learn.fit_snapshots(2, 1, 0.1, tmp_path / 'a')
    assert torch.equal(first.get_preds()[0], ref)
    (tmp_path / 'file').write_text('')
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match='folder .*/file cannot be made'):
        learn.fit_snapshots(2, 1, 0.1, tmp_path / 'file')
    assert all(torch.equal(p, q) for p, q in zip(learn.model.parameters(), before))


def test_a_run_goes_on_in_its_own_folder_with_its_own_files_only(tmp_path):
    def fit(folder):
        return learner().fit_snapshots(3, 1, 0.1, folder, cbs=CheckpointCallback(tmp_path / 'run.ckpt'))

    stop = At('before_batch', 2, raising(KeyboardInterrupt()), batch=2, training=True)
    with pytest.raises(KeyboardInterrupt):
        learner().fit_snapshots(3, 1, 0.1, tmp_path / 'a', cbs=[CheckpointCallback(tmp_path / 'run.ckpt'), stop])
    with pytest.raises(ValueError, match='is of another fit: SnapshotCallback: folder'):
        fit(tmp_path / 'b')
    kept = (tmp_path / 'a' / 'snapshot-01.pth').rename(tmp_path / 'away.pth')
    with pytest.raises(ValueError, match='snapshot-01.pth is missing: this fit wrote it'):
        fit(tmp_path / 'a')
    kept.rename(tmp_path / 'a' / 'snapshot-01.pth')
    assert fit(tmp_path / 'a').epochs == [0, 1, 2]


def test_an_export_leaves_the_snapshots_out(tmp_path):
    from fastai.learner import load_learner

    learn, snapshots = (
        Learner(digits(n_train=32), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), CrossEntropyLossFlat()),
        SnapshotCallback(0),
    )
    learn.add_cb(snapshots)
    learn.path = tmp_path
    sizes = []
    for n in (1, 30):
        with learn.no_bar():
            learn.fit(n)
        learn.export('x.pkl')
        sizes.append((tmp_path / 'x.pkl').stat().st_size)
    assert sizes[1] - sizes[0] < 6000 and len(snapshots.snapshots) == 30  # the recorder's few rows
    assert type(load_learner(tmp_path / 'x.pkl').snapshot) is Callback


def test_a_validate_after_ctrl_c_has_no_columns_of_an_ensemble():
    learn = learner()
    learn.add_cb(SnapshotCallback(0))
    with pytest.raises(KeyboardInterrupt):
        learn.fit(3, cbs=At('before_batch', 1, raising(KeyboardInterrupt()), batch=2, training=True))
    assert len(learn.validate()) == 2


# beside validations and predictions within the fit


class Predicting(Callback):
    """Predicts in the middle of a fit, which sends the events of one and sets the learner's epoch
    to 0.
    """

    def __init__(self, event, order):
        self.on, self.order, self.is_at_it = event, order, False

    def __call__(self, event_name):
        if event_name == self.on and not self.is_at_it:
            self.is_at_it = True
            self.learn.get_preds()
            self.is_at_it = False


@pytest.mark.parametrize(
    'event, order',
    [('after_train', -5), ('after_train', 90), ('before_train', -20), ('after_epoch', 90), ('before_epoch', 90)],
)
def test_predictions_in_the_middle_of_a_fit_do_not_move_the_snapshots(event, order):
    learn, snapshots = learner(), SnapshotCallback(0, 2)
    learn.fit(4, 0.1, cbs=[snapshots, Predicting(event, order)])
    assert snapshots.epochs == [0, 2]


@pytest.mark.parametrize('order', [-20, 53, 90])
def test_the_columns_are_those_of_the_fits_own_validation(order):
    fetch = FetchPredsCallback(ds_idx=0)
    fetch.order = order
    learn, snapshots = learner(), SnapshotCallback(0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(4, 0.1, cbs=[snapshots, fetch])
    loss = column(learn, 'ens_valid_loss')
    assert [v == v for v in loss] == [True, False, True, False]
    assert loss[2] == pytest.approx(snapshots.ensemble(learn).validate()[0], rel=1e-5)


# failures beside the training


class TwoOutputs(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def of_first(pred, y):
    return nn.functional.cross_entropy(pred[0], y)


def test_outputs_that_cannot_be_combined_are_said_once_and_the_fit_goes_on():
    learn = Learner(loaders(), TwoOutputs(6, 3), of_first, metrics=[])
    with learn.no_bar(), pytest.warns(UserWarning) as said:
        ens = learn.fit_snapshots(3, 1, 0.1, activation='softmax')
    texts = [str(w.message) for w in said if 'growing ensemble' in str(w.message)]
    assert len(texts) == 2
    assert (
        'training goes on; its columns are nan: TypeError: members must give one tensor, and TwoOutputs gives a tuple'
        in texts[0]
    )
    assert 'failed 3 times in this fit' in texts[1]
    assert ens.epochs == [0, 1, 2] and all(v != v for v in column(learn, 'ens_valid_loss'))
    assert all(v == v for v in column(learn, 'valid_loss'))


def test_outputs_that_a_callback_takes_apart_are_validated_together():
    class Taken(Callback):
        def after_pred(self):
            self.learn.pred = self.pred[0]

    learn = learner(model=lambda: TwoOutputs(6, 3), cbs=Taken())
    ens = learn.fit_snapshots(3, 1, 0.1)
    last = [column(learn, name)[-1] for name in ('ens_valid_loss', 'ens_accuracy')]
    assert list(ens.validate()) == pytest.approx(last, rel=1e-5)


def test_a_metric_that_fails_in_one_epoch_costs_the_columns_of_that_epoch_alone():
    failing = []

    def fragile(pred, y):
        if failing and failing[0].armed:
            raise ArithmeticError('no such value')
        return pred.sum() * 0

    class Arm(Callback):
        "Lets the metric fail on the ensemble's predictions, not on the model's own, in one epoch."

        order = Recorder.order + 1

        def before_epoch(self):
            self.armed = False

        def after_batch(self):
            self.armed = not self.training and self.learn.epoch == 1 and self.learn.iter == 0

    arm = Arm()
    failing.append(arm)

    class Disarm(Callback):
        order = Recorder.order + 7

        def after_batch(self):
            arm.armed = False

    learn, snapshots = learner(metrics=[fragile]), SnapshotCallback(0)
    with pytest.warns(UserWarning, match='validating the growing ensemble failed, .*ArithmeticError: no such value'):
        learn.fit(3, 0.1, cbs=[snapshots, arm, Disarm()])
    loss = column(learn, 'ens_valid_loss')
    assert [v == v for v in loss] == [True, False, True]
    assert loss[2] == pytest.approx(snapshots.ensemble(learn).validate()[0], rel=1e-5)  # the sums have all three


def test_ctrl_c_in_a_metric_is_no_failure_to_be_swallowed():
    calls = []

    def interrupted(pred, y):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pred.sum()

    with pytest.raises(KeyboardInterrupt):
        learner(metrics=[interrupted]).fit(2, 0.1, cbs=SnapshotCallback(0))


def test_a_snapshot_that_cannot_be_written_is_raised_at_the_end_and_the_others_are_kept(tmp_path, monkeypatch):
    def full(file, weights):
        if learn.epoch == 1:
            raise OSError(28, 'No space left on device')
        return save_weights(file, weights)

    save_weights = snapshots_file.save_weights
    monkeypatch.setattr(snapshots_file, 'save_weights', full)
    learn = learner()
    with (
        pytest.warns(
            UserWarning,
            match='keeping a snapshot failed, and training goes on; the ensemble lacks it: OSError: .*No space left',
        ),
        pytest.raises(
            RuntimeError,
            match=r'the snapshots of the epochs 1 could not be kept \(.*No space left on device\); those of the epochs '
            r'0, 2 are in',
        ),
    ):
        learn.fit_snapshots(3, 1, 0.1, tmp_path / 'a')
    loss = column(learn, 'ens_valid_loss')
    assert learn.epoch == 2 and [v == v for v in loss] == [True, False, True]
    ens = Ensemble(tmp_path / 'a', learn)
    assert ens.epochs == [0, 2] and ens.validate()[0] == pytest.approx(loss[2], rel=1e-5)
    assert sorted(f.name for f in (tmp_path / 'a').iterdir()) == ['index.json', 'snapshot-01.pth', 'snapshot-02.pth']


def test_what_was_lost_before_an_interruption_is_known_after_it(tmp_path, monkeypatch):
    save_weights = snapshots_file.save_weights

    def full(file, weights):
        raise OSError('full')

    def fit(stop=()):
        return learner().fit_snapshots(3, 1, 0.1, tmp_path / 'a', cbs=[CheckpointCallback(tmp_path / 'x.ckpt'), *stop])

    monkeypatch.setattr(snapshots_file, 'save_weights', full)
    with pytest.warns(UserWarning, match='keeping a snapshot failed'), pytest.raises(KeyboardInterrupt):
        fit([At('before_batch', 1, raising(KeyboardInterrupt()), batch=2, training=True)])
    monkeypatch.setattr(snapshots_file, 'save_weights', save_weights)
    with pytest.raises(
        RuntimeError, match='the snapshots of the epochs 0 could not be kept .* those of the epochs 1, 2'
    ):
        fit()


# one folder, one fit


def test_a_second_run_on_the_same_folder_is_refused_before_its_first_step(tmp_path):
    refused = []

    def other(cb):
        second = learner(seed=1)
        before = [p.detach().clone() for p in second.model.parameters()]
        with pytest.raises(
            InUse,
            match='another run is writing its snapshots to .*/a: wait for it, or give each run a folder of its own',
        ):
            second.fit_snapshots(2, 1, 0.1, tmp_path / 'a')
        assert all(torch.equal(p, q) for p, q in zip(second.model.parameters(), before))
        refused.append(cb.learn.epoch)

    learn = learner()
    ens = learn.fit_snapshots(
        2,
        1,
        0.1,
        tmp_path / 'a',
        cbs=[At('before_batch', 0, other, batch=0, training=True), At('after_epoch', 1, other)],
    )
    assert refused == [0, 1] and torch.equal(ens[1].get_preds()[0], learn.get_preds()[0])
    assert [f.name for f in tmp_path.iterdir()] == ['a']  # the lock is gone


@pytest.mark.parametrize('attached', [False, True])
def test_the_lock_is_released_however_the_fit_ends(tmp_path, attached):
    for error in KeyboardInterrupt(), ZeroDivisionError('stop'), CancelFitException('stop'):
        learn, snapshots = learner(), SnapshotCallback(3, folder=tmp_path / 'a')
        if attached:
            learn.add_cb(snapshots)
        try:
            learn.fit(
                4,
                0.1,
                cbs=[At('before_batch', 1, raising(error), batch=1, training=True), *([] if attached else [snapshots])],
            )
        except BaseException as e:
            assert e is error or type(e) is type(error)
    assert learner().fit_snapshots(2, 1, 0.1, tmp_path / 'a').epochs == [0, 1]


@pytest.mark.parametrize('name', ['snapshot-02.pth', 'index.json'])
def test_files_of_others_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text('something else')
    learn = learner()
    before = [p.detach().clone() for p in learn.model.parameters()]
    with pytest.raises(
        ValueError,
        match='snapshot-02.pth is there already, and this fit would overwrite it'
        if 'pth' in name
        else 'of another fit',
    ):
        learn.fit_snapshots(2, 1, 0.1, tmp_path)
    assert (tmp_path / name).read_text() == 'something else' and [f.name for f in tmp_path.iterdir()] == [name]
    assert all(torch.equal(p, q) for p, q in zip(learn.model.parameters(), before))
    if 'pth' in name:  # which fewer snapshots do not touch
        learn.fit_snapshots(1, 1, 0.1, tmp_path)
        assert (tmp_path / name).read_text() == 'something else'


def test_a_run_that_was_killed_between_a_snapshot_and_its_index_goes_on(tmp_path, monkeypatch):
    def fit(learn, name, cbs=()):
        return learn.fit_snapshots(
            3, 1, 0.1, tmp_path / name, cbs=[CheckpointCallback(tmp_path / f'{name}.ckpt'), *cbs]
        )

    ref = fit(learner(), 'whole')
    write_index = snapshots_file.write_index

    def killed(folder, files, **content):
        if len(files) == 2:
            raise KeyboardInterrupt
        write_index(folder, files, **content)

    monkeypatch.setattr(snapshots_file, 'write_index', killed)
    with pytest.raises(KeyboardInterrupt):
        fit(learner(), 'part')
    assert sorted(f.name for f in (tmp_path / 'part').iterdir()) == ['index.json', 'snapshot-01.pth', 'snapshot-02.pth']
    monkeypatch.setattr(snapshots_file, 'write_index', write_index)
    ens = fit(learner(seed=3), 'part')
    assert ens.epochs == [0, 1, 2] and torch.equal(ens.get_preds()[0], ref.get_preds()[0])


def test_a_run_whose_folder_another_one_has_taken_meanwhile_does_not_go_on(tmp_path):
    def fit(cbs):
        return learner().fit_snapshots(2, 1, 0.1, tmp_path / 'a', cbs=cbs)

    stop = At('before_batch', 1, raising(KeyboardInterrupt()), batch=2, training=True)
    with pytest.raises(KeyboardInterrupt):
        fit([CheckpointCallback(tmp_path / 'x.ckpt'), stop])
    for f in (tmp_path / 'a').iterdir():
        f.unlink()
    fit([])
    held = {f.name: f.read_bytes() for f in (tmp_path / 'a').iterdir()}
    with pytest.raises(ValueError, match='holds the models of another fit by now'):
        fit([CheckpointCallback(tmp_path / 'x.ckpt')])
    assert {f.name: f.read_bytes() for f in (tmp_path / 'a').iterdir()} == held


def test_two_processes_on_one_folder_end_with_one_set_of_models_and_one_refusal(tmp_path):
    code = (
        'import sys, warnings; from tests.helpers import learner\n'
        'from fastai_swa.files import InUse\n'
        'try: print("epochs", learner(seed=int(sys.argv[1])).fit_snapshots(10, 1, .1, sys.argv[2]).epochs)\n'
        'except (InUse, ValueError) as e: print("refused", e)'
    )
    runs = [
        subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', code, str(i), str(tmp_path / 'a')],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        for i in range(2)
    ]
    out = [run.communicate(timeout=120)[0] for run in runs]
    assert sum('refused' in o for o in out) == sum('epochs' in o for o in out) == 1
    winner = next(i for i, o in enumerate(out) if 'epochs' in o)
    learn = learner(seed=winner)
    with learn.no_bar(), learn.no_logging():
        ref = learn.fit_snapshots(10, 1, 0.1)
    torch.testing.assert_close(Ensemble(tmp_path / 'a', learn).get_preds()[0], ref.get_preds()[0])  # with other threads


def test_a_second_fit_of_one_callback_that_is_interrupted_at_once_does_not_inherit_the_first_ones_snapshots(tmp_path):
    def fits(learn, stop):
        learn.add_cb(snapshots := SnapshotCallback(0))
        learn.fit(2, 0.1)
        learn.fit(2, 0.1, cbs=[CheckpointCallback(tmp_path / 'x.ckpt'), *stop])
        return snapshots

    with pytest.raises(KeyboardInterrupt):
        fits(learner(), [At('before_batch', 0, raising(KeyboardInterrupt()), batch=2, training=True)])
    snapshots = fits(learner(), [])
    assert snapshots.epochs == [0, 1] and len(snapshots.snapshots) == 2
