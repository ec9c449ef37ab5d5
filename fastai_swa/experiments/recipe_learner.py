"""A recipe's data and its learner."""

import hashlib
from functools import cache
from random import Random

import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, Metric, Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.torch_core import set_seed

from ..vision import cifar
from ..vision.tensors import TensorImages, tensor_loaders
from .recipes import optimizer

__all__ = ['recipe_learner', 'recipe_data', 'loader_to_test_on', 'with_wrong_labels', 'EpochRecorder']


# the data


def recipe_data(recipe, source, settings):
    """(data for `recipe_learner`, what it is of: its kind, the numbers of training and test
    samples, and of those to choose on, a fingerprint).
    """
    n_train = settings.images or recipe.images
    n_choose = _n_choose(recipe, settings)
    if recipe.task is not None:
        return _loaded_task(recipe.task, source, n_train, settings.test_images, n_choose)
    return _loaded_images(recipe.n_classes, source or recipe.source, n_train, settings.test_images, n_choose)


def _n_choose(recipe, settings) -> int:
    "How many samples averages are chosen on: in proportion, where fewer or more images are trained on."
    if recipe.averages is None:
        return 0
    if settings.images is None or recipe.images is None:
        return recipe.averages.n_choose
    return round(recipe.averages.n_choose * settings.images / recipe.images)


# the seeds of a process share what is loaded


@cache
def _loaded_task(task, source, n_train, n_test, n_choose):
    return task.load(source, n_train, n_test, **_if_any(n_choose))


def _if_any(n_choose) -> dict:
    "The argument for tasks that take it."
    return {'n_choose': n_choose} if n_choose else {}


@cache
def _loaded_images(n_classes, source, n_train, n_test, n_choose):
    "The training images with those to choose on, and the test images."
    n_images = None if n_train is None else n_train + n_choose
    dls = cifar(n_classes, source, n_images=n_images, n_valid=n_test, device=torch.device('cpu'))
    about = {
        'kind': dls.kind,
        'train': len(dls.train_ds) - n_choose,
        'valid': len(dls.valid_ds),
        'sha256': _digest_of_images(dls),
    }
    if n_choose:
        about['choose'] = n_choose
    return dls, about


def _digest_of_images(dls) -> str:
    digest = hashlib.sha256()
    for ds in (dls.train_ds, dls.valid_ds):
        for t in (ds.images, ds.labels):
            digest.update(t.contiguous().numpy())
    return digest.hexdigest()[:16]


# the learner


def recipe_learner(recipe, seed: int, settings, data) -> Learner:
    """With the weights, the order and the augmentation of `seed`; `data`: of `recipe_data`.

    What `settings` say of the whole process holds where it is trained, or predicts, within
    `process_settings`.
    """
    set_seed(seed)
    make = _image_learner if recipe.task is None else _task_learner
    learn = make(recipe, seed, settings, data)
    learn.remove_cbs([Recorder, ProgressCallback])
    learn.add_cb(EpochRecorder())
    if settings.precision == 'bf16':
        learn.add_cb(BF16())
    learn.create_opt()
    return learn


def _image_learner(recipe, seed, settings, dls) -> Learner:
    device = torch.device(settings.device)
    model = recipe.network(recipe.n_classes).to(device, memory_format=torch.channels_last)
    if settings.compile:
        model = torch.compile(model, mode=settings.compile, dynamic=False)  # a graph for each size of batch
    train, valid = [(ds.images, ds.labels) for ds in (dls.train_ds, dls.valid_ds)]
    sizes = {}
    if recipe.averages is not None:
        n_classes = len(dls.vocab)
        train, valid = _without_last(train, _n_choose(recipe, settings), n_classes)
        train = train[0], with_wrong_labels(train[1], recipe.averages.label_noise, n_classes, seed)
        sizes['val_bs'] = recipe.bs  # of enough batches for a standard error, as fastai's own
    dls = tensor_loaders(
        train,
        valid,
        dls.vocab,
        recipe.stats,
        bs=recipe.bs,
        **sizes,
        padding=recipe.padding,
        seed=seed,
        chunk=16,
        device=device,
    )
    dls.train.rng = Random(seed)
    return Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, **_optimization(recipe, device))


def _optimization(recipe, device) -> dict:
    "The arguments of a Learner that say how it is trained."
    res = {'lr': recipe.lr, 'wd': recipe.wd}
    if recipe.opt == 'Adam':
        return res | {'opt_func': Adam}
    fused = True if device.type == 'cuda' else None
    return res | {'opt_func': optimizer(recipe, fused), 'wd_bn_bias': True}


def _without_last(part, n: int, n_classes: int) -> tuple:
    "`part`, images and labels, without the last images of each class, `n` in all; and these."
    images, labels = part
    kept, last = [], []
    n_first = len(labels) - n
    for c in range(n_classes):
        of_class = (labels == c).nonzero()[:, 0]
        n_kept = n_first // n_classes + (c < n_first % n_classes)
        kept.append(of_class[:n_kept])
        last.append(of_class[n_kept:])
    places = [torch.cat(found).sort().values for found in (kept, last)]
    return tuple((images[i], labels[i]) for i in places)


def with_wrong_labels(labels: torch.Tensor, share: float, n_classes: int, seed: int) -> torch.Tensor:
    "`labels` (n), of which that share, rounded down and drawn with `seed`, is another class's, each as likely."
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(labels), generator=rng)[: int(share * len(labels))]
    res = labels.clone()
    res[drawn] = (labels[drawn] + torch.randint(1, n_classes, (len(drawn),), generator=rng)) % n_classes
    return res


def _task_learner(recipe, seed, settings, data) -> Learner:
    device = torch.device(settings.device)
    dls = recipe.task.loaders(data, recipe.bs, seed, **_if_any(_n_choose(recipe, settings))).to(device)
    model = recipe.task.network(data, dls).to(device)
    loss, metric = recipe.task.loss_and_metric()
    return Learner(dls, model, loss, metrics=metric, **_optimization(recipe, device))


def loader_to_test_on(recipe, settings, data, learn: Learner):
    "Of the test samples, for the `learn` of a recipe that chooses averages: its own validate on those to choose on."
    if recipe.task is not None:
        res = recipe.task.test_loader(data, _n_choose(recipe, settings))
    else:
        ds = data.valid_ds
        res = learn.dls.valid.new(TensorImages(ds.images, ds.labels, data.vocab, 1), bs=512)
    res.to(settings.device)
    return res


# its callbacks


class BF16(MixedPrecision):
    """fastai's `MixedPrecision('bf16')`, whose autocast is for a GPU alone, on the device of the
    learner.
    """

    __module__ = 'fastai_swa.experiments.learners'  # under which checkpoints know it
    name = 'mixed_precision'

    def __init__(self):
        super().__init__('bf16')

    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast(self.dls.device.type, torch.bfloat16)


class _EpochMean(Metric):
    "The mean of the training loss over an epoch's samples, summed on the device."

    def __init__(self):
        self.reset()

    def reset(self):
        self.val = 0.0
        self.count = 0

    def accumulate(self, learn):
        n = len(learn.yb[0])
        self.val = self.val + learn.loss.detach() * n
        self.count += n

    @property
    def value(self):
        return self.val / max(self.count, 1)


class EpochRecorder(Recorder):
    """A Recorder that reads nothing from the device in a step; fastai's reads the loss of each.

    It keeps no losses of single steps, and `train_loss` is the mean over the samples of the epoch,
    not the smoothed loss at its end.
    """

    __module__ = 'fastai_swa.experiments.learners'  # under which checkpoints know it
    name = 'recorder'

    def __init__(self):
        super().__init__(add_time=False)
        self.smooth_loss = _EpochMean()

    def before_train(self):
        self.smooth_loss.reset()

    def after_batch(self):
        if self.training:
            self.smooth_loss.accumulate(self.learn)
        else:
            super().after_batch()
