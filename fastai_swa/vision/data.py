"""Data of the experiments, as fastai `DataLoaders`."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize, get_image_files
from fastai.torch_core import default_device
from fastai.vision.augment import Resize, aug_transforms
from fastai.vision.core import TensorImageBW
from fastai.vision.data import ImageDataLoaders
from fastai.vision.utils import verify_images
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from ..checks import check_choice, check_share
from .tensors import tensor_loaders

__all__ = ['cifar', 'digits', 'image_folder', 'IMAGENET_STATS', 'CIFAR_STATS']


class _Pick:
    "Item `i` of `items`."

    def __init__(self, items):
        self.items = items

    def __call__(self, i):
        return self.items[i]


def digits(
    n_train: int = 900, bs: int = 32, seed: int = 0, num_workers: int = 0, device=None, label_noise: float = 0.0
) -> DataLoaders:
    """scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 in 10 classes, as (1, 8, 8)
    float tensors scaled to [0, 1].

    `n_train` images drawn with `seed` are for training, all others for validation. The last short
    training batch is kept. `label_noise`: that share of the training labels, rounded down, is drawn
    anew from all ten classes, with `seed`. Raises `ValueError` unless 1 <= `n_train` <= 1796 and 0
    <= `label_noise` <= 1.
    """
    from sklearn.datasets import load_digits  # comes with fastai; slow to import

    bunch = load_digits()
    if not 1 <= n_train < len(bunch.target):
        raise ValueError(f'n_train must be between 1 and {len(bunch.target) - 1}, not {n_train}')
    check_share('label_noise', label_noise)
    images = TensorImageBW(torch.from_numpy(bunch.images[:, None] / 16).float())
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(images)).tolist()
    labels = bunch.target.copy()
    drawn = order[: int(label_noise * n_train)]  # in a random order
    labels[drawn] = rng.randint(0, 10, len(drawn))
    dsets = Datasets(
        range(len(images)),
        [[_Pick(images)], [_Pick([str(t) for t in labels]), Categorize(vocab=list('0123456789'))]],
        splits=[order[:n_train], order[n_train:]],
    )
    return dsets.dataloaders(bs=bs, val_bs=256, num_workers=num_workers, drop_last=False, device=device)


def image_folder(
    path, size: int | None = None, bs: int = 64, num_workers: int | None = None, device=None
) -> DataLoaders:
    """The user's own images: `path/train/<class>/*` for training, `path/valid/<class>/*` or
    `path/test/<class>/*` for validation.

    Images are resized to `size` pixels a side (`None`: the shorter side of the first one, at most
    224), and flipped and cropped at random in training. The last short training batch is kept.
    Raises `FileNotFoundError` for a missing folder and `ValueError` for one without images, with
    fewer than two classes, with other classes in validation than in training, or with files that
    cannot be read as images; the sentence names them.
    """
    path = Path(path)
    valid = next((name for name in ('valid', 'test') if (path / name).is_dir()), None)
    if not (path / 'train').is_dir() or valid is None:
        raise FileNotFoundError(
            f'{path} must contain the folders train and valid (or test), each with a folder for each class'
        )
    files = {name: get_image_files(path / name) for name in ('train', valid)}
    classes = {
        name: {f.relative_to(path / name).parts[0] for f in fs if f.parent != path / name} for name, fs in files.items()
    }
    for name, fs in files.items():
        if not fs:
            raise ValueError(f'{path / name} contains no images')
        loose = [f for f in fs if f.parent == path / name]
        if loose:
            raise ValueError(f'{loose[0]} lies outside a class folder; expected {path / name}/<class>/{loose[0].name}')
    if len(classes['train']) < 2:
        raise ValueError(
            f'{path / "train"} has only the class {min(classes["train"])!r}; a classifier needs at least two class '
            'folders'
        )
    unknown = classes[valid] - classes['train']
    if unknown:
        raise ValueError(f'{path / valid} has the class {min(unknown)!r}, which {path / "train"} lacks')
    broken = sorted(f for fs in files.values() for f in verify_images(fs))
    if broken:
        raise ValueError(
            f'{len(broken)} of {sum(map(len, files.values()))} files cannot be read as images, the first is {broken[0]}'
        )
    if size is None:
        with Image.open(min(files['train'])) as image:
            size = min(224, *image.size)
    return ImageDataLoaders.from_folder(
        path,
        train='train',
        valid=valid,
        item_tfms=Resize(size),
        bs=bs,
        drop_last=False,
        batch_tfms=aug_transforms(size=size, max_rotate=0, max_warp=0, max_zoom=1.15, max_lighting=0),
        num_workers=num_workers,
        device=device,
    )


IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # which the SWA paper's VGG16 is fed with on CIFAR
CIFAR_STATS = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # its other networks


def cifar(
    n_classes: int = 10,
    source=None,
    stats=CIFAR_STATS,
    padding: str | None = 'constant',
    bs: int = 128,
    seed: int = 0,
    n_images: int | None = None,
    n_valid: int | None = None,
    device=None,
) -> DataLoaders:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) in memory: 3x32x32 images as uint8 on `device`
    (default: fastai's), augmented and normalised there, a batch at once.

    - `source`: a folder with `train/<class>/*` and `test/<class>/*` (images in any format), or one
      with torchvision's files, downloaded there and checked if they are missing; 'digits' for
      scikit-learn's digits in the same shape, to try things; `None`: the folder that the
      environment names as `CIFAR10_DIR` or `CIFAR100_DIR`, else `~/.fastai/data`.
    - `stats`: mean and standard deviation of each channel to normalise by; `padding`: 'constant'
      (the papers' zeros), 'reflect', or `None` for no augmentation; `seed`: of the augmentation.
    - `n_images`, `n_valid`: take only so many training and test images, the same number of each
      class, the first by file name; `None`: all.

    The `kind` of what it returns is 'digits', 'CIFAR-10' (or 100) for torchvision's files, or, for
    a folder, that with the formats of the images in it, as in 'CIFAR-10, JPEG'.

    Raises `FileNotFoundError` for a missing folder, `ValueError` for a wrong number of classes,
    files that are no images of 32x32 pixels, or too few of them, and `OSError` for a download that
    fails or is damaged; the sentence names what it is about.
    """
    check_choice('n_classes', n_classes, (10, 100))
    if source is None:
        source = os.environ.get(f'CIFAR{n_classes}_DIR') or _default_folder()
    kind = f'CIFAR-{n_classes}'
    if source == 'digits':
        train, valid, vocab, kind = *_digits_as_cifar(), 'digits'
    elif (Path(source) / 'train').is_dir() and not (Path(source) / 'meta').exists():
        train, valid, vocab, formats = _from_folder(Path(source), n_classes, n_images, n_valid)
        kind = f'{kind}, {formats}'
    else:
        train, valid, vocab = _from_torchvision(Path(source), n_classes)
    if n_images is not None:
        train = _first(train, n_images, len(vocab), 'n_images')
    if n_valid is not None:
        valid = _first(valid, n_valid, len(vocab), 'n_valid')
    dls = tensor_loaders(
        train,
        valid,
        vocab,
        stats,
        bs=bs,
        padding=padding,
        seed=seed,
        device=default_device() if device is None else device,
    )
    dls.kind = kind
    return dls


def _default_folder():
    folder = Path.home() / '.fastai' / 'data'
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _from_folder(path, n_classes, n_images, n_valid):
    if not (path / 'test').is_dir():
        raise FileNotFoundError(f'{path} must contain the folders train and test, each with a folder for each class')
    vocab, parts, formats = sorted(f.name for f in (path / 'train').iterdir() if f.is_dir()), [], set()
    if len(vocab) != n_classes:
        raise ValueError(f'{path / "train"} has {len(vocab)} class folders, CIFAR-{n_classes} has {n_classes}')
    for name, n in (('train', n_images), ('test', n_valid)):
        files = [
            sorted((path / name / c).iterdir())[: n and -(-n // n_classes)] if (path / name / c).is_dir() else []
            for c in vocab
        ]
        empty = [c for c, fs in zip(vocab, files) if not fs]
        if empty:
            raise ValueError(f'{path / name} has no images of the class {empty[0]!r}')
        with ThreadPoolExecutor() as pool:
            images, kinds = zip(*pool.map(_read, [f for fs in files for f in fs]))
        formats.update(kinds)
        parts.append(
            (
                torch.from_numpy(np.ascontiguousarray(np.stack(images))),
                torch.tensor([i for i, fs in enumerate(files) for _ in fs]),
            )
        )
    return *parts, vocab, ' and '.join(sorted(formats))


def _read(file):
    try:
        with Image.open(file) as image:
            pixels, kind = np.asarray(image.convert('RGB')).transpose(2, 0, 1), image.format
    except OSError as e:
        raise ValueError(f'{file} cannot be read as an image ({e})') from None
    if pixels.shape != (3, 32, 32):
        raise ValueError(f'{file} has {pixels.shape[2]} x {pixels.shape[1]} pixels, expected 32 x 32')
    return pixels, kind


def _from_torchvision(path, n_classes):
    if not path.is_dir():
        raise FileNotFoundError(f'{path} is no folder; CIFAR-{n_classes} should be there, or room to download it to')
    kind = {10: CIFAR10, 100: CIFAR100}[n_classes]
    try:
        sets = [kind(path, train=is_train, download=True) for is_train in (True, False)]
    except Exception as e:
        raise OSError(f'CIFAR-{n_classes} is not complete in {path} and could not be downloaded there: {e}') from e
    return *(
        (torch.from_numpy(np.ascontiguousarray(s.data.transpose(0, 3, 1, 2))), torch.tensor(s.targets)) for s in sets
    ), sets[0].classes


def _digits_as_cifar():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).to(torch.uint8)[:, None]
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(images)))
    images, labels = images[order].contiguous(), torch.from_numpy(bunch.target)[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:]), list('0123456789')


def _first(part, n, n_classes, argument):
    "The first images of each class, `n` in all, in the order they have."
    images, labels = part
    kept = (
        torch.cat([(labels == c).nonzero()[: n // n_classes + (c < n % n_classes), 0] for c in range(n_classes)])
        .sort()
        .values
    )
    if len(kept) < n:
        raise ValueError(f'{argument} asks for {n} images in equal parts, and there are {len(images)}')
    return images[kept], labels[kept]
