"""Within a fit a part of a large training set gives the statistics of batch norm; afterwards all of it does."""

import copy
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.torch_core import set_seed
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader

from fastai_swa import CheckpointCallback, SaveSWAModelCallback, SWACallback, update_bn
from fastai_swa import passes as passes_module
from fastai_swa.batches import Taken, batches_for
from fastai_swa.experiments import RECIPES
from fastai_swa.experiments.plan import parts, runs
from fastai_swa.experiments.train import _average_callbacks

from .helpers import learner, loaders, net

BS = 64


def data(n, shuffle=True):
    "`n` samples for training; the first number of each says which one it is."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n + 100, 6, generator=g)
    x[:, 0] = torch.arange(n + 100) / n
    y = (x.sum(1) > 0).long()
    pairs = list(zip(x, y))
    return DataLoaders(DataLoader(pairs[:n], bs=BS, shuffle=shuffle), DataLoader(pairs[n:], bs=100), device='cpu')


def recorder_of_passes():
    """A callback, and a list that gets the samples of each pass through the training set aside from training. (What a
    callback holds is put back after a pass.)
    """
    passes = []
    samples = []

    class Passes(Callback):
        def before_validate(self):
            samples.clear()

        def after_batch(self):
            if not self.training:
                samples.extend((self.xb[0][:, 0] * len(self.dls.train_ds)).round().int().tolist())

        def after_validate(self):
            if min(samples) < len(self.dls.train_ds):
                passes.append(samples[:])

    return Passes(), passes


def big_learner(**kwargs):
    return learner(partial(net, n_out=2), data(8000), **kwargs)


def fitted(n, epochs=3, **kwargs):
    learn = learner(partial(net, n_out=2), data(n))
    record, passes = recorder_of_passes()
    learn.add_cb(record)
    swa = SWACallback(1, **kwargs)
    learn.fit(epochs, cbs=swa)
    return learn, swa, passes


def test_the_batches_are_the_first_of_one_order_in_every_epoch():
    _, _, passes = fitted(8000, epochs=4)
    assert len(passes) == 3 and passes[0] == passes[1] == passes[2]
    assert len(set(passes[0])) == len(passes[0]) == 2048  # the first batches that hold 2,000 samples
    assert passes[0] != sorted(passes[0])  # drawn from all of the set, which need not be mixed
    assert max(passes[0]) > 7900


def test_a_small_set_is_taken_whole():
    _, swa, passes = fitted(7999)
    assert [sorted(samples) for samples in passes] == [list(range(7999))] * 2
    assert not swa._average.provisional


def test_training_is_untouched():
    with_average = fitted(8000)[0]
    alone = big_learner()
    alone.fit(3)
    for a, b in zip(with_average.model.state_dict().values(), alone.model.state_dict().values()):
        assert torch.equal(a, b)


def test_a_column_is_that_of_the_statistics_used_and_a_file_equals_its_column(tmp_path):
    save = SaveSWAModelCallback(every_epoch=True)
    learn = big_learner(path=tmp_path)
    swa = SWACallback(0, swa_eval_freq=2)
    learn.fit(4, cbs=[swa, save])
    column = learn.recorder.metric_names.index('swa_valid_loss') - 1
    for epoch, row in enumerate(learn.recorder.values):
        other = big_learner()
        other.model.load_state_dict(torch.load(tmp_path / 'models' / f'swa_model_{epoch}.pth', weights_only=True))
        assert other.model[1].num_batches_tracked == 32
        if epoch in (0, 2, 3):  # the others have no column; their files have the same batches
            assert other.validate()[0] == pytest.approx(row[column], rel=1e-6)


@pytest.mark.parametrize('at_end', [False, True])
def test_the_last_file_of_a_fit_is_what_its_column_says(tmp_path, at_end):
    learn = big_learner(path=tmp_path)
    learn.fit(2, cbs=[SWACallback(1), SaveSWAModelCallback(at_end=at_end)])
    column = learn.recorder.values[-1][learn.recorder.metric_names.index('swa_valid_loss') - 1]
    other = big_learner()
    other.model.load_state_dict(torch.load(tmp_path / 'models' / 'swa_model.pth', weights_only=True))
    assert other.validate()[0] == pytest.approx(column, rel=1e-6)


def use_within(learn, swa):
    with swa.averaged():
        learn.validate()


@pytest.mark.parametrize('use', [use_within, lambda learn, swa: swa.apply(), lambda learn, swa: swa.refresh()])
def test_after_the_fit_the_whole_set_is_taken_once(use):
    learn, swa, passes = fitted(8000)
    expected = copy.deepcopy(swa.swa_model)
    update_bn(DataLoader(list(learn.dls.train_ds), bs=BS), expected)
    assert swa._average.provisional
    del passes[:]
    use(learn, swa)
    assert [sorted(samples) for samples in passes] == [list(range(8000))]
    for _ in range(2):
        use_within(learn, swa)
    swa.refresh()
    assert len(passes) == 1
    # what reaches the second layer depends on the order of the samples
    for a, b in zip(swa.swa_model[1].buffers(), expected[1].buffers()):
        torch.testing.assert_close(a, b)


def test_within_the_fit_what_is_there_does():
    class Look(Callback):
        order = 90

        def after_epoch(self):
            with self.learn.swa.averaged():
                pass

    learn = big_learner()
    record, passes = recorder_of_passes()
    learn.add_cb(record)
    learn.to_swa(swa_start=0)
    learn.fit(2, cbs=Look())
    assert list(map(len, passes)) == [2048] * 2


def test_batches_asked_for_are_the_same_within_a_fit_and_after_it():
    learn, swa, passes = fitted(8000, bn_batches=3)
    assert list(map(len, passes)) == [3 * BS] * 2
    with swa.averaged():
        pass
    assert len(passes) == 2
    _, _, passes = fitted(8000, bn_batches=10**9)
    assert [sorted(samples) for samples in passes] == [list(range(8000))] * 2


class Stop(BaseException):
    pass


def test_an_interrupted_fit_ends_with_the_whole_set():
    class Interrupt(Callback):
        order = 90

        def after_epoch(self):
            if self.epoch == 1:
                raise Stop

    learn = big_learner()
    record, passes = recorder_of_passes()
    learn.add_cb(record)
    swa = SWACallback(0)
    with pytest.raises(Stop):
        learn.fit(3, cbs=[swa, Interrupt()])
    with swa.averaged():
        pass
    assert list(map(len, passes)) == [2048, 2048, 8000]


@pytest.mark.parametrize('batch', [1, 5])
def test_a_resumed_fit_is_bitwise_the_one_that_was_not_killed(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(passes_module, '_ENOUGH', 20)

    class Kill(Callback):
        def after_batch(self):
            if self.training and self.epoch == 3 and self.iter == batch:
                raise Stop

    def start(folder, *more):
        learn = learner(dls=loaders(n=90))
        swa = SWACallback(1)
        learn.fit(5, cbs=[swa, CheckpointCallback(folder / 'fit.ckpt'), *more])
        return swa, learn.recorder.values

    whole, rows = start(tmp_path)
    with pytest.raises(Stop):
        start(tmp_path, Kill())
    set_seed(99)
    resumed, resumed_rows = start(tmp_path)
    assert whole._average.provisional and resumed._average.provisional
    assert torch.equal(torch.tensor(rows[-1]), torch.tensor(resumed_rows[-1]))
    for a, b in zip(whole.swa_model.state_dict().values(), resumed.swa_model.state_dict().values()):
        assert torch.equal(a, b)


def test_a_copy_knows_that_its_statistics_are_provisional(monkeypatch):
    monkeypatch.setattr(passes_module, '_ENOUGH', 20)
    learn = learner()
    learn.to_swa(swa_start=0)
    learn.fit(1)
    twin = copy.deepcopy(learn)
    with twin.swa.averaged():
        pass
    assert twin.swa.swa_model[1].num_batches_tracked == 6 and not twin.swa._average.provisional
    assert learn.swa._average.provisional


class Sized(torch.utils.data.IterableDataset):
    def __len__(self):
        return 8000

    def __iter__(self):
        return iter([])


def test_how_many_batches_hold_so_many_samples():
    def learn(train):
        class L:
            dls = DataLoaders(train, train)

        return L

    pairs = torch.utils.data.TensorDataset(torch.zeros(8000, 1))
    for train in (
        DataLoader(list(range(8000)), bs=64),
        DataLoader(list(range(8000)), bs=64, drop_last=True),
        TorchDataLoader(pairs, 64),
        TorchDataLoader(Sized(), 64),
    ):
        assert batches_for(learn(train), 2000, 1) == 32
        assert batches_for(learn(train), 2000, 3) == 11  # each
        assert batches_for(learn(train), 2001 + 63, 1) is None
    assert batches_for(learn(DataLoader(list(range(7999)), bs=64)), 2000, 1) is None
    assert batches_for(learn(DataLoader(list(range(8000)), bs=64, n=1000)), 2000, 1) is None
    assert batches_for(learn(TorchDataLoader(Sized(), 64)), 2000, 1, Taken(10, False)) is None
    sampler = torch.utils.data.BatchSampler(range(8000), 64, False)
    assert batches_for(learn(TorchDataLoader(pairs, batch_sampler=sampler)), 2000, 1) is None  # nothing says how large


def test_recipes_take_the_whole_set_as_their_published_rows_did():
    for recipe in RECIPES.values():
        for part in parts(runs(recipe)) if hasattr(recipe, 'swa_start') else []:
            if part.is_last:
                assert all(swa.bn_batches >= 10**9 for swa in _average_callbacks(part, 40))


def test_without_batch_norm_there_is_no_pass():
    learn = learner(nn.Sequential(nn.Linear(6, 2)), data(8000))
    record, passes = recorder_of_passes()
    learn.add_cb(record)
    swa = SWACallback(0)
    learn.fit(2, cbs=swa)
    with swa.averaged():
        pass
    assert not passes
