"""ImageNet, or any images in its layout, for a network of torchvision that begins with trained weights."""

import hashlib
import os
from dataclasses import dataclass
from multiprocessing import current_process
from pathlib import Path
from random import Random

from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize, IntToFloatTensor, Normalize, ToTensor, get_image_files, parent_label
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.vision.augment import CropPad, FlipItem, RandomResizedCrop, Resize
from fastai.vision.core import PILImage
from torch import channels_last, nn
from torchvision.models import get_model, get_model_weights

from ..vision import IMAGENET_STATS
from ..weights import load_into, sha256

__all__ = ['ImageNet']

_SIZES = 1_281_167, 50_000  # of the training and the validation images of 2012


@dataclass(frozen=True)
class ImageNet:
    """Images as `train/<class>/*` and `val/<class>/*` in the folder given, for torchvision's network `arch`.

    It begins with the state dict `<arch>.pth` in that folder, or else with torchvision's own `weights`, which
    are downloaded. Training crops at random, to `size` pixels a side, and flips; validation takes the centre
    of the image at 8 / 7 of that size, as torchvision does.
    """

    arch: str
    weights: str = 'IMAGENET1K_V1'
    size: int = 224
    n_workers: int | None = None  # of each loader; None: as many as fastai takes
    metric = 'accuracy'

    def load(self, source, n_train: int | None = None, n_test: int | None = None):
        """(data for `loaders`, what it is of). Raises `ValueError` if the folder `source` does not have the images,
        or other classes than the weights are for.

        - `n_train`, `n_test`: take only so many images, the same number of each class, the first by file name.
        """
        folder = Path(source or os.environ.get('FASTAI_SWA_DATA') or '.')
        vocab = _classes(folder / 'train')
        if _classes(folder / 'val') != vocab:
            raise ValueError(f'{folder / "val"} has other classes than {folder / "train"}')
        file = folder / f'{self.arch}.pth'
        if not file.exists():
            file = None
            n_known = len(get_model_weights(self.arch)[self.weights].meta['categories'])
            if len(vocab) != n_known:
                raise ValueError(
                    f'{folder / "train"} has {len(vocab)} class folders, and the weights of torchvision are for '
                    f'{n_known}: give all, or weights of your own as {self.arch}.pth in {folder}'
                )
        train = _files(folder / 'train', vocab, n_train)
        valid = _files(folder / 'val', vocab, n_test)
        sizes = len(train), len(valid)
        about = {
            'kind': 'ImageNet' if sizes == _SIZES else "images in ImageNet's layout",
            'train': len(train),
            'valid': len(valid),
            'sha256': _digest([*train, *valid], folder),
            'weights': f"torchvision's {self.weights}" if file is None else f'{file.name}, SHA-256 {sha256(file)[:16]}',
        }
        return (train, valid, vocab, file), about

    def loaders(self, data, bs: int, seed: int) -> DataLoaders:
        train, valid, vocab, _ = data
        n = len(train)
        sets = Datasets(
            [*train, *valid],
            [[PILImage.create], [parent_label, Categorize(vocab=vocab)]],
            splits=[list(range(n)), list(range(n, n + len(valid)))],
        )
        crop = [Resize(self.size * 8 // 7), CropPad(self.size, order=2), ToTensor()]
        res = sets.dataloaders(
            bs=bs,
            drop_last=False,
            num_workers=0 if current_process().daemon else self.n_workers,  # a seed side by side may start none
            dl_kwargs=[
                {'after_item': [FlipItem(), RandomResizedCrop(self.size), ToTensor()]},
                {'after_item': crop},
            ],
            after_batch=[IntToFloatTensor(), Normalize.from_stats(*IMAGENET_STATS, cuda=False)],
            device='cpu',
        )
        res.train.rng = Random(seed)
        return res

    def network(self, data, dls) -> nn.Module:
        _, _, vocab, file = data
        if file is None:
            model = get_model(self.arch, weights=self.weights)
        else:
            model = load_into(get_model(self.arch, weights=None, num_classes=len(vocab)), file)
        return model.to(memory_format=channels_last)

    def loss_and_metric(self):
        return CrossEntropyLossFlat(), accuracy


def _classes(folder) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f'{folder} is missing: --data is to name a folder with train/<class>/* and val/<class>/*')
    return sorted(f.name for f in folder.iterdir() if f.is_dir())


def _files(folder, vocab, n_images) -> list[Path]:
    "Of the images of each class, in the order of their names, all, or as many as give `n_images` in all."
    res = []
    for c, name in enumerate(vocab):
        files = sorted(get_image_files(folder / name, recurse=False))
        if not files:
            raise ValueError(f'{folder / name} contains no images')
        n = None
        if n_images is not None:
            n = n_images // len(vocab) + (c < n_images % len(vocab))
        res += files[:n]
    if n_images is not None and len(res) < n_images:
        raise ValueError(f'{folder} has too few images for {n_images}, as many of each of {len(vocab)} classes')
    return res


def _digest(files, folder) -> str:
    "Of names and sizes: to read the images would take an hour."
    digest = hashlib.sha256()
    for file in files:
        digest.update(f'{file.relative_to(folder).as_posix()} {file.stat().st_size}\n'.encode())
    return digest.hexdigest()[:16]
