"""Which batches a pass aside from training takes, and from what loader: as many as an epoch, from one like the
user's."""

import copy
import itertools
import signal
from contextlib import contextmanager

import pytest
import torch
from fastai.callback.core import Callback, CancelTrainException
from fastai.callback.data import WeightedDL
from fastai.callback.training import ShortEpochCallback
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.load import DataLoader
from fastai.data.transforms import RandomSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import IterableDataset

from fastai_swa import SWACallback
from fastai_swa.batches import Taken, as_an_epoch, fresh_loader, training_loader
from fastai_swa.packing import pack, unpack
from fastai_swa.passes import kept_batches, refresh_bn

from .helpers import At, column, learner, loaders, raising

PAIRS = list(loaders().train.dataset)
VALID = list(loaders().valid.dataset)


class Stream(IterableDataset):
    "Gives `n` items, or goes on for ever, and says that it has `length`."

    def __init__(self, length, n=None):
        self.length, self.n = length, n

    def __iter__(self):
        return itertools.islice(itertools.cycle(PAIRS), self.n)

    def __len__(self):
        return self.length


class OwnLoader:
    "No loader of fastai's or torch's."

    def __init__(self, stream):
        self.dataset, self.bs = stream, 16

    def __iter__(self):
        return iter(TorchDataLoader(self.dataset, 16))

    def __len__(self):
        return len(self.dataset) // 16

    def to(self, device):
        pass


class Forever(DataLoader):
    "fastai's loader, of as many indices as are asked for."

    def __init__(self, dataset, **kwargs):
        super().__init__(dataset, **kwargs)
        self.n = None

    def __len__(self):
        return len(self.dataset) // 16


class EndlessSampler(torch.utils.data.Sampler):
    def __iter__(self):
        return itertools.cycle(range(len(PAIRS)))

    def __len__(self):
        return 10**9


STREAMS = {
    'torch': lambda length: TorchDataLoader(Stream(length), 16),
    'workers': lambda length: TorchDataLoader(Stream(length), 16, num_workers=1),
    'own': lambda length: OwnLoader(Stream(length)),
    'fastai': lambda length: Forever(Stream(length), bs=16),
}
each_stream = pytest.mark.parametrize('kind', STREAMS)


class Cut(Callback):
    "Ends the training part of each epoch after so many batches."

    run_valid = False

    def __init__(self, *n):
        self.n = n

    def after_batch(self):
        if self.iter + 1 == self.n[min(self.epoch, len(self.n) - 1)]:
            raise CancelTrainException


@contextmanager
def ending(seconds=60):
    "What goes on for ever fails."
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail('it does not end'))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def n_tracked(swa):
    return int(swa.swa_model[1].num_batches_tracked)


@each_stream
def test_a_pass_takes_of_an_endless_stream_what_the_longest_epoch_took(kind):
    train = STREAMS[kind](10**9)
    learn, swa = learner(dls=DataLoaders(train, DataLoader(VALID, bs=32))), SWACallback(0, swa_eval_freq=0)
    with ending():
        learn.fit(3, cbs=[swa, Cut(2, 4, 3)])
        assert n_tracked(swa) == 4
        assert column(learn, 'swa_valid_loss')[-1] > 0
        swa._average.stale = True
        swa.refresh()  # after the fit, too
    assert n_tracked(swa) == 4


def test_a_sampler_of_ones_own_may_be_endless_too():
    train = TorchDataLoader(PAIRS, 16, sampler=EndlessSampler())
    learn, swa = learner(dls=DataLoaders(train, DataLoader(VALID, bs=32))), SWACallback(0)
    with ending():
        learn.fit(1, cbs=[swa, Cut(3)])
    assert n_tracked(swa) == 3


def test_the_average_is_validated_on_as_much_of_an_endless_stream_as_the_model_in_training():
    dls = DataLoaders(TorchDataLoader(Stream(10**9), 16), TorchDataLoader(Stream(10**9), 16))
    learn, swa = learner(dls=dls), SWACallback(0)
    with ending():
        learn.fit(1, cbs=[swa, ShortEpochCallback(4 / (10**9 // 16))])
    assert n_tracked(swa) == 5  # fastai stops after the first batch beyond the share
    batches = list(itertools.islice(dls.valid, 5))
    x, y = (torch.cat(parts) for parts in zip(*batches))
    loss = torch.nn.functional.cross_entropy(swa.swa_model.eval()(x), y)
    assert column(learn, 'swa_valid_loss')[0] == pytest.approx(loss.item(), rel=1e-4)


@each_stream
def test_where_no_training_was_seen_a_stream_gives_what_its_length_says(kind):
    learn = learner(dls=DataLoaders(STREAMS[kind](80), DataLoader(VALID, bs=32)))
    with ending():
        assert refresh_bn(learn, ['1'], None, in_fit=False).n_batches == 5
        assert len(list(kept_batches(learn))) == 5


def test_a_stream_that_ends_by_itself_is_taken_whole_whatever_its_length_says():
    dls = DataLoaders(TorchDataLoader(Stream(32, n=90), 16, drop_last=True), DataLoader(VALID, bs=32))
    learn, swa = learner(dls=dls), SWACallback(0)
    learn.fit(2, cbs=[swa, Cut(99, 2)])
    assert n_tracked(swa) == 5  # a full epoch was seen before the short one


def test_an_interrupted_first_epoch_tells_what_to_take_of_a_stream():
    dls = DataLoaders(TorchDataLoader(Stream(10**9), 16), DataLoader(VALID, bs=32))
    learn, swa = learner(dls=dls), SWACallback(0, every=1)
    with ending():
        with pytest.raises(KeyboardInterrupt):
            learn.fit(1, cbs=[swa, At('after_batch', 0, raising(KeyboardInterrupt()), batch=3, training=True)])
        with swa.averaged():
            assert n_tracked(swa) == 4


def test_a_state_in_a_file_says_what_epochs_took():
    dls = DataLoaders(TorchDataLoader(Stream(10**9), 16), DataLoader(VALID, bs=32))
    learn, swa = learner(dls=dls), SWACallback(0)
    with ending():
        learn.fit(1, cbs=[swa, Cut(3)])
        other = SWACallback(0)
        learn.add_cb(other)
        other.load_state_dict(unpack(pack(swa.state_dict())))
        other._average.stale = True
        other.refresh()
    assert other._average.taken == Taken(3, False) and n_tracked(other) == 3


def test_a_copy_of_a_learner_knows_what_epochs_took():
    learn = learner(dls=DataLoaders(TorchDataLoader(Stream(10**9), 16), DataLoader(VALID, bs=32)))
    learn.to_swa(swa_start=0)
    with ending():
        learn.fit(1, cbs=Cut(3))
        twin = copy.deepcopy(learn)
        twin.swa._average.stale = True
        twin.swa.refresh()
    assert n_tracked(twin.swa) == 3
    assert twin.swa._average.taken == learn.swa._average.taken
    assert twin.swa._average.taken is not learn.swa._average.taken


def test_finite_data_are_taken_whole_although_epochs_are_cut():
    for train in (DataLoader(PAIRS, bs=16, shuffle=True), TorchDataLoader(PAIRS, 16, shuffle=True)):
        assert as_an_epoch(train, Taken(2, False)) is train
        learn, swa = learner(dls=DataLoaders(train, DataLoader(VALID, bs=32))), SWACallback(0)
        learn.fit(1, cbs=[swa, Cut(2)])
        assert n_tracked(swa) == 6


# loaders like the user's


def test_a_pass_takes_as_many_batches_as_an_epoch_of_partial_dataloaders():
    n = 1900
    data = Datasets(
        range(n), [[lambda i: torch.full((6,), i / n)], [lambda i: i % 3]], splits=RandomSplitter(seed=0)(range(n))
    )
    dls = data.partial_dataloaders(152, bs=16, device='cpu')
    assert len(dls.train) == 9  # drops the last one
    learn, swa = Learner(dls, learner().model, CrossEntropyLossFlat()), SWACallback(0)
    learn.fit(1, cbs=swa)
    assert n_tracked(swa) == 10
    assert len(training_loader(learn, None)) == len(list(training_loader(learn, None))) == 10


class Halves(TfmdDL):
    "Takes an argument that fastai's `new` knows nothing of."

    def __init__(self, dataset=None, half=None, **kwargs):
        super().__init__(dataset, **kwargs)
        self.half = half

    def get_idxs(self):
        return [i for i in super().get_idxs() if self.half is None or i % 2 == self.half]


def test_what_a_loaders_own_constructor_took_is_not_lost():
    dl = Halves(PAIRS, half=0, bs=16, device='cpu')  # a value that is false
    assert fresh_loader(dl, drop_last=False).half == 0
    assert fresh_loader(Halves(PAIRS, bs=16)).half is None
    weighted = WeightedDL(PAIRS, bs=16, wgts=[1.0] * len(PAIRS))
    assert len(list(fresh_loader(weighted))) == 6


def test_an_epoch_that_stops_early_by_n_stops_the_pass():
    learn, swa = learner(dls=DataLoaders(DataLoader(PAIRS, bs=16, n=40), DataLoader(VALID, bs=32))), SWACallback(0)
    learn.fit(1, cbs=swa)
    assert n_tracked(swa) == 3


def first_worker(i):
    torch.manual_seed(i)


def pairs_in_a_batch(pairs):
    return torch.utils.data.default_collate(pairs)


def test_the_loader_of_a_pass_has_the_settings_of_torchs():
    settings = dict(
        num_workers=2,
        multiprocessing_context='spawn',
        prefetch_factor=5,
        timeout=33,
        worker_init_fn=first_worker,
        collate_fn=pairs_in_a_batch,
        generator=torch.Generator(),
        pin_memory=False,
        in_order=False,
    )
    dl = TorchDataLoader(PAIRS, 16, shuffle=True, drop_last=True, persistent_workers=True, **settings)
    new = fresh_loader(dl, drop_last=False)
    for name in (*settings, 'pin_memory_device', 'dataset', 'sampler', 'batch_size'):
        assert getattr(new, name) is getattr(dl, name), name
    assert not new.drop_last and len(new) == 6 and len(dl) == 5
    assert not new.persistent_workers  # those that persist are training's


def test_the_loader_of_a_pass_has_the_settings_of_fastais():
    settings = dict(num_workers=2, pin_memory=True, pin_memory_device='cuda:0', timeout=33)
    dl = DataLoader(PAIRS, bs=16, shuffle=True, drop_last=True, persistent_workers=True, wif=noop, **settings)
    dl.fake_l.prefetch_factor = 5
    dl.fake_l.worker_init_fn = first_worker
    dl.fake_l.__class__ = type('Spawns', (type(dl.fake_l),), {'multiprocessing_context': 'spawn'})
    new = fresh_loader(dl, drop_last=False)
    for name in (*settings, 'prefetch_factor', 'worker_init_fn', 'multiprocessing_context'):
        assert getattr(new.fake_l, name) is getattr(dl.fake_l, name), name
    assert new.wif is noop and new.fake_l.d is new.fake_l.dataset.d is new
    assert not new.fake_l.persistent_workers and not new.drop_last


def noop(*args):
    pass
