"""Learners and probes that the tests share."""

import random

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn


def mixed_precision_on_cpu(monkeypatch, **scaler):
    "fastai's `MixedPrecision` runs on the CPU, in bfloat16, with a `GradScaler` of these settings."
    monkeypatch.setattr(
        'fastai.callback.fp16.autocast', lambda device=None, dtype=None: torch.autocast('cpu', dtype=torch.bfloat16)
    )
    monkeypatch.setattr(
        'fastai.callback.fp16.GradScaler', lambda device=None, **kwargs: torch.amp.GradScaler('cpu', **kwargs | scaler)
    )


class Overflow(Callback):
    "Gradients are infinite in the training batches of these numbers, counted from the fit's first: the scaler skips."

    order = MixedPrecision.order - 1

    def __init__(self, batches):
        self.batches = batches

    def before_step(self):
        if self.train_iter in self.batches:
            next(self.learn.model.parameters()).grad.fill_(float('inf'))


def loaders(n=90, n_valid=40, n_in=6, n_out=3, bs=16, num_workers=0, seed=0, **kwargs):
    "A learnable classification problem; sizes leave a short last batch."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n + n_valid, n_in, generator=g) * 2 + 1
    y = (x @ torch.randn(n_in, n_out, generator=g)).argmax(1)
    pairs = list(zip(x, y))
    return DataLoaders(
        DataLoader(pairs[:n], bs=bs, shuffle=True, num_workers=num_workers, **kwargs),
        DataLoader(pairs[n:], bs=2 * bs, num_workers=num_workers),
        device='cpu',
    )


def net(n_in=6, n_out=3, width=8, dropout=0.2):
    return nn.Sequential(
        nn.Linear(n_in, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, n_out),
    )


def learner(model=None, dls=None, seed=0, opt_func=SGD, lr=0.1, metrics=accuracy, **kwargs):
    "A learner whose weights, data order and dropout depend on `seed` alone."
    set_seed(seed, reproducible=True)
    model = net() if model is None else model() if not isinstance(model, nn.Module) else model
    dls = loaders() if dls is None else dls
    for dl in dls.loaders:
        if isinstance(dl, DataLoader):
            dl.rng = random.Random(seed)
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func=opt_func, lr=lr, metrics=metrics, **kwargs)


def training_set(learn):
    "As one batch of inputs."
    return [(torch.stack([x for x, _ in learn.dls.train.dataset]),)]


class Snapshots(Callback):
    "Clones of the parameters at the end of each epoch's training part, with the epoch."

    order = 1000

    def __init__(self):
        self.weights, self.epochs = [], []

    def after_train(self):
        self.weights.append([p.detach().clone() for p in self.model.parameters()])
        self.epochs.append(self.epoch)


class At(Callback):
    """Call `f(self)` at `event` of the epoch `epoch`, in batch `batch` where the event is one of a
    batch.
    """

    order = 70

    def __init__(self, event, epoch, f, batch=None, training=None):
        self.on, self.at, self.f, self.batch, self.only = event, epoch, f, batch, training

    def __call__(self, event_name):
        if (
            event_name == self.on
            and self.learn.epoch == self.at
            and (self.batch is None or self.batch == self.learn.iter)
            and self.only in (None, self.learn.training)
        ):
            self.f(self)


def raising(e):
    def f(cb):
        raise e

    return f


def parameters(model):
    return [p.detach() for p in model.parameters()]


def assert_close(got, expected, tol=2e-6):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol)


def column(learn, name):
    "The values of column `name` over the epochs of the last fit."
    i = list(learn.recorder.metric_names).index(name) - 1
    return [row[i] for row in learn.recorder.values]


def fingerprint(learn):
    "All that a fit leaves behind, as a flat dict of tensors and comparable values."
    res = {f'model.{k}': v.clone() for k, v in learn.model.state_dict().items()}
    for i, p in enumerate(p for g in learn.opt.param_lists for p in g):
        res |= {f'opt.{i}.{k}': v for k, v in learn.opt.state[p].items()}
    own = [n for n in learn.recorder.metric_names[1:] if not n.startswith('swa_') and n != 'time']
    res |= {f'column.{n}': column(learn, n) for n in own}
    res |= {
        'losses': [float(x) for x in learn.recorder.losses],
        'lrs': list(map(float, learn.recorder.lrs)),
        'iters': list(learn.recorder.iters),
        'hypers': [dict(h) for h in learn.opt.hypers],
        'train_iter': learn.train_iter,
        'pct_train': learn.pct_train,
        'epoch': learn.epoch,
        'modes': [m.training for m in learn.model.modules()],
        'python': random.getstate(),
        'torch': torch.get_rng_state(),
        'loaders': [dl.rng.getstate() for dl in learn.dls.loaders],
        'cbs': [type(cb).__name__ for cb in learn.cbs],
    }
    kind, keys, *rest = np.random.get_state()
    return res | {'numpy': (kind, keys.tolist(), *rest)}


def assert_same(a, b):
    "Two fingerprints are bitwise equal (a nan equals a nan)."
    assert a.keys() == b.keys()
    for k in a:
        same = torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else repr(a[k]) == repr(b[k])
        assert same, f'{k} differs: {a[k]} and {b[k]}'
