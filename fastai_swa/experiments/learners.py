"""A recipe's data, its learner, and what a seed sets for the whole process."""
import hashlib, os
from contextlib import contextmanager
from functools import cache
from random import Random

import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, Metric, Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed

from ..vision import cifar
from ..vision.tensors import tensor_loaders
from .recipes import optimizer

__all__ = ['TimeIsUp', 'recipe_learner', 'recipe_images', 'settings_restored', 'EpochRecorder']


class TimeIsUp(Exception):
    "There is no time for another epoch, or point; the same call goes on."


@contextmanager
def settings_restored():
    "What a seed sets for the whole process."
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    kept = cudnn.benchmark, cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    try: yield
    finally:
        cudnn.benchmark, cudnn.deterministic = kept[:2]
        torch.use_deterministic_algorithms(kept[2])
        torch.set_num_threads(threads)


def recipe_learner(recipe, seed, settings, dls) -> Learner:
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


def recipe_images(recipe, source, settings): return _loaded(recipe.n_classes, source or recipe.source, settings.images or recipe.images)

@cache    # the seeds of a process share the images
def _loaded(n_classes, source, n_images):
    dls = cifar(n_classes, source, n_images=n_images, device=torch.device('cpu'))
    return dls, {'kind': dls.kind, 'train': len(dls.train_ds), 'valid': len(dls.valid_ds), 'sha256': _fingerprint(dls)}

def _fingerprint(dls) -> str:
    digest = hashlib.sha256()
    for ds in (dls.train_ds, dls.valid_ds):
        for t in (ds.images, ds.labels): digest.update(t.contiguous().numpy())
    return digest.hexdigest()[:16]


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
