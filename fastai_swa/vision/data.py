"""Data of the experiments, as fastai `DataLoaders`."""
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize, get_image_files
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import TensorImageBW
from fastai.vision.data import ImageDataLoaders
from fastai.vision.utils import verify_images
from PIL import Image

__all__ = ['digits', 'image_folder']


class _Pick:
    "Item `i` of `items`."
    def __init__(self, items): self.items = items
    def __call__(self, i): return self.items[i]


def digits(n_train: int = 900, bs: int = 32, seed: int = 0, num_workers: int = 0, device=None) -> DataLoaders:
    """scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 in 10 classes, as (1, 8, 8) float tensors scaled to [0, 1].

    `n_train` images drawn with `seed` are for training, all others for validation. The last short training batch is kept.
    Raises `ValueError` unless 1 <= `n_train` <= 1796.
    """
    from sklearn.datasets import load_digits    # comes with fastai; slow to import
    bunch = load_digits()
    if not 1 <= n_train < len(bunch.target): raise ValueError(f'n_train must be between 1 and {len(bunch.target) - 1}, not {n_train}')
    images = TensorImageBW(torch.from_numpy(bunch.images[:, None] / 16).float())
    order = np.random.RandomState(seed).permutation(len(images)).tolist()
    dsets = Datasets(range(len(images)), [[_Pick(images)], [_Pick([str(t) for t in bunch.target]), Categorize(vocab=list('0123456789'))]],
                     splits=[order[:n_train], order[n_train:]])
    return dsets.dataloaders(bs=bs, val_bs=256, num_workers=num_workers, drop_last=False, device=device)


def image_folder(path, size: int | None = None, bs: int = 64, num_workers: int | None = None, device=None) -> DataLoaders:
    """The user's own images: `path/train/<class>/*` for training, `path/valid/<class>/*` or `path/test/<class>/*` for validation.

    Images are resized to `size` pixels a side (`None`: the shorter side of the first one, at most 224), and flipped and cropped at
    random in training. The last short training batch is kept.
    Raises `FileNotFoundError` for a missing folder and `ValueError` for one without images, with fewer than two classes, with other
    classes in validation than in training, or with files that cannot be read as images; the sentence names them.
    """
    path = Path(path)
    valid = next((name for name in ('valid', 'test') if (path/name).is_dir()), None)
    if not (path/'train').is_dir() or valid is None:
        raise FileNotFoundError(f'{path} must contain the folders train and valid (or test), each with a folder for each class')
    files = {name: get_image_files(path/name) for name in ('train', valid)}
    classes = {name: {f.relative_to(path/name).parts[0] for f in fs if f.parent != path/name} for name, fs in files.items()}
    for name, fs in files.items():
        if not fs: raise ValueError(f'{path/name} contains no images')
        loose = [f for f in fs if f.parent == path/name]
        if loose: raise ValueError(f'{loose[0]} lies outside a class folder; expected {path/name}/<class>/{loose[0].name}')
    if len(classes['train']) < 2:
        raise ValueError(f'{path/"train"} has only the class {min(classes["train"])!r}; a classifier needs at least two class folders')
    unknown = classes[valid] - classes['train']
    if unknown: raise ValueError(f'{path/valid} has the class {min(unknown)!r}, which {path/"train"} lacks')
    broken = sorted(f for fs in files.values() for f in verify_images(fs))
    if broken: raise ValueError(f'{len(broken)} of {sum(map(len, files.values()))} files cannot be read as images, the first is {broken[0]}')
    if size is None:
        with Image.open(min(files['train'])) as image: size = min(224, *image.size)
    return ImageDataLoaders.from_folder(path, train='train', valid=valid, item_tfms=Resize(size), bs=bs, drop_last=False,
        batch_tfms=aug_transforms(size=size, max_rotate=0, max_warp=0, max_zoom=1.15, max_lighting=0), num_workers=num_workers, device=device)
