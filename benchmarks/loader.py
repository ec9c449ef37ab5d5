"""What a training epoch's batches cost: `fastai_swa.vision.cifar`, whose images live in memory,
beside fastai's own loader of image files.

Both pad by 4, crop at random, flip and normalise, in batches of 128, and give float batches on the
device; nothing is trained.

    python benchmarks/loader.py --data FOLDER [--images N] [--repeats N] [--device cpu|cuda]
    [--workers N]

FOLDER has train/<class>/* and test/<class>/*, as `cifar` takes it.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from fastai.data.transforms import Normalize, get_image_files
from fastai.vision.augment import FlipItem, PadMode, RandomCrop
from fastai.vision.core import PILImage
from fastai.vision.data import ImageDataLoaders

from fastai_swa.vision import CIFAR_STATS, cifar


class PaddedCrop(RandomCrop):
    "fastai's own random crop, of the image padded by 4."

    def encodes(self, x: PILImage):
        return x.crop_pad(self.size, (self.tl[0] - 4, self.tl[1] - 4), pad_mode=PadMode.Zeros)

    def before_call(self, b, split_idx):
        self.orig_sz = (40, 40)
        self.tl = torch.randint(9, (2,)).tolist() if not split_idx else (4, 4)


def fastai_loader(folder, n_images, workers, device):
    files = [f for c in sorted((folder / 'train').iterdir()) for f in sorted(get_image_files(c))[: n_images // 10]]
    return ImageDataLoaders.from_path_func(
        folder,
        files,
        lambda f: Path(f).parent.name,
        valid_pct=0.0,
        bs=128,
        num_workers=workers,
        drop_last=False,
        item_tfms=[PaddedCrop(32), FlipItem()],
        batch_tfms=Normalize.from_stats(*CIFAR_STATS),
        device=device,
    ).train


def epoch(loader, sync):
    start, n = time.perf_counter(), 0
    for x, _ in loader:
        n += len(x)
    sync()
    return time.perf_counter() - start, n


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--images', type=int, default=10_000)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--workers', type=int, default=2, help="of fastai's loader")
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    args = parser.parse_args()
    device = torch.device(args.device)
    sync = torch.cuda.synchronize if args.device == 'cuda' else lambda: None
    loaders = {
        'fastai_swa.vision.cifar': cifar(10, args.data, n_images=args.images, device=device).train,
        f'fastai, {args.workers} workers': fastai_loader(args.data, args.images, args.workers, device),
    }
    seconds = {name: [] for name in loaders}
    for i in range(args.repeats + 1):  # the first round warms up
        for name, loader in loaders.items():
            t, n = epoch(loader, sync)
            assert n == args.images, (name, n)
            if i:
                seconds[name].append(t)
    base = statistics.median(seconds['fastai_swa.vision.cifar'])
    print(f'{args.images} images, {args.repeats} repeats, {args.device}, torch {torch.__version__}\n')
    print('| loader | ms for 1,000 images | multiple (least to most) |\n|---|--:|--:|')
    for name, ts in seconds.items():
        median = statistics.median(ts)
        print(
            f'| {name} | {1e6 * median / args.images:.1f} | {median / base:.2f} '
            f'({min(ts) / base:.2f}-{max(ts) / base:.2f}) |'
        )


if __name__ == '__main__':
    main()
