"""Images in memory, on any device: a fastai loader that makes its batches there, and augmentation
of a batch at once."""

import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Category, IntToFloatTensor, Normalize
from fastai.torch_basics import Transform
from fastai.torch_core import TensorCategory, TensorImage
from fastcore.foundation import L
from torch.nn import functional as F

from ..checks import check_choice

__all__ = ['TensorImages', 'TensorDL', 'PadCropFlip', 'tensor_loaders']


class TensorImages:
    """`images` (n, c, h, w) uint8 and `labels` (n) int64 as a data set; `split_idx` 0 for training,
    1 for validation.
    """

    n_inp = 1

    def __init__(self, images, labels, vocab, split_idx=None):
        self.images, self.labels, self.vocab, self.split_idx = images, labels, L(vocab), split_idx

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return TensorImage(self.images[i]), TensorCategory(self.labels[i])

    def decode(self, o, full=True):
        return o[0], Category(self.vocab[int(o[1])])

    def to(self, device):
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def new_empty(self):
        return type(self)(self.images[:0], self.labels[:0], self.vocab, self.split_idx)


class TensorDL(TfmdDL):
    """A fastai loader of `TensorImages`: a batch is one indexing on their device, where the batch
    transforms run as well.

    Moving the loader moves its images, once. As all fastai loaders it shuffles by its own `rng`; it
    has no worker processes. `chunk`: so many batches go through the batch transforms at once, as
    transforms that treat each image by itself allow; on a GPU, and with small networks, most of the
    time that a loader takes is in calling them.
    """

    def __init__(self, dataset, bs=128, num_workers=0, chunk=1, **kwargs):
        self.chunk = chunk
        super().__init__(dataset, bs=bs, num_workers=0, **kwargs)

    def create_batches(self, samps):
        idxs = torch.tensor(list(samps), dtype=torch.long, device=self.dataset.images.device)  # one transfer an epoch
        n = len(idxs) // self.bs * self.bs if self.drop_last else len(idxs)
        for i in idxs[:n].split(self.bs * self.chunk):
            yield TensorImage(self.dataset.images[i]), TensorCategory(self.dataset.labels[i])

    def __iter__(self):
        for batches in super().__iter__():
            yield from zip(*(t.split(self.bs) for t in batches))

    def new(self, dataset=None, cls=None, **kwargs):
        return super().new(dataset, cls, **{'chunk': self.chunk} | kwargs)

    def to(self, device):
        super().to(device)
        self.dataset.to(device)
        return self


class PadCropFlip(Transform):
    """In training, pad each image by `pad` pixels a side, crop it at random to its old size and
    flip every other one left to right.

    Takes and gives `TensorImage`, shape (n, c, h, w), of uint8, before they are normalised. `mode`:
    'constant' (zeros, as the papers) or 'reflect'. Each image has draws of its own, from a
    generator that starts with `seed` and lives on the CPU, so that they are the same on any device.
    """

    order, split_idx = 0, 0

    def __init__(self, pad: int = 4, mode: str = 'constant', seed: int = 0):
        check_choice('mode', mode, ('constant', 'reflect'))
        super().__init__()
        self.pad, self.mode, self.generator = pad, mode, torch.Generator().manual_seed(seed)

    def draws(self, n: int, device='cpu'):
        """For `n` images: top and left corner of the crop, each from 0 to 2 `pad`, and whether to
        flip; (n) each. One draw for each image, so that images get the same ones however they are
        put into batches."""
        side = 2 * self.pad + 1
        places = torch.randint(2 * side * side, (n,), generator=self.generator).to(device, non_blocking=True)
        return places // 2 // side, places // 2 % side, places % 2 == 1

    def encodes(self, x: TensorImage):
        return TensorImage(
            pad_crop_flip(x.as_subclass(torch.Tensor), self.pad, self.mode, *self.draws(len(x), x.device))
        )


def pad_crop_flip(x, pad: int, mode: str, top, left, flip):
    """`x` (n, c, h, w), each image padded, cropped to (h, w) from (`top`, `left`) on, and flipped
    left to right where `flip`.
    """
    n, c, h, w = x.shape
    x = F.pad(x, [pad] * 4) if mode == 'constant' else F.pad(x.float(), [pad] * 4, mode='reflect').to(x.dtype)
    rows = top[:, None] + torch.arange(h, device=x.device)
    columns = torch.arange(w, device=x.device).expand(n, w)
    columns = left[:, None] + torch.where(flip[:, None], w - 1 - columns, columns)
    image = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(c, device=x.device)[:, None, None]
    return x[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def tensor_loaders(
    train, valid, vocab, stats, bs=128, val_bs=512, padding='constant', pad=4, seed=0, chunk=1, device=None
) -> DataLoaders:
    """`DataLoaders` of images in memory.

    - `train`, `valid`: pairs of images (n, c, h, w) uint8 and labels (n) int64; `vocab`: the names
      of the classes.
    - `stats`: mean and standard deviation of each channel, of values in [0, 1], to normalise by.
    - `padding`: 'constant' or 'reflect', as in `PadCropFlip`; `None` for no augmentation. `chunk`:
      as in `TensorDL`, for training.

    The last short training batch is kept.
    """
    sets = [TensorImages(*pair, vocab, i) for i, pair in enumerate((train, valid))]
    tfms = [IntToFloatTensor(), Normalize.from_stats(*stats, cuda=False)]
    augment = [] if padding is None else [PadCropFlip(pad, padding, seed)]
    train = TensorDL(sets[0], bs=bs, shuffle=True, chunk=chunk, after_batch=[*augment, *tfms])
    dls = DataLoaders(train, TensorDL(sets[1], bs=val_bs, after_batch=tfms))
    dls.vocab, dls.c = L(vocab), len(vocab)
    return dls if device is None else dls.to(device)
