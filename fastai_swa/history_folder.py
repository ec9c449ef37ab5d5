"Room and right to write the history of a fit: how much it may take, and whose folder it is."

import shutil
from pathlib import Path

import torch

from .kept_fit import folder_of_fit
from .stretches import FoldersIndex, Stretches, remains

__all__ = ['n_bytes_of', 'readable_size', 'check_room', 'make_folder', 'later_folders', 'claim']


def n_bytes_of(model, dtype: torch.dtype | None, n_segments: int) -> int:
    "Of so many means, as they are stored, and of the last weights."
    means = 0
    last = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    for p in model.parameters():
        stored = torch.promote_types(p.dtype, torch.float32) if dtype is None else dtype
        means += p.numel() * (stored.itemsize if p.is_floating_point() else p.element_size())
    return n_segments * means + last


def readable_size(n_bytes: float) -> str:
    for unit in ('bytes', 'KB', 'MB', 'GB'):
        if n_bytes < 1000:
            break
        n_bytes /= 1000
    else:
        unit = 'TB'
    return f'{n_bytes:.3g} {unit}'


def check_room(folder: Path, size: int):
    "Raise `OSError` if the disk has less than `size` bytes."
    free = shutil.disk_usage(_nearest(folder)).free
    if free < size:
        raise OSError(
            f'{folder} has room for {readable_size(free)}, and the history may take {readable_size(size)}: give '
            'another folder, a smaller n_segments, or dtype=torch.float16'
        )


def _nearest(folder: Path) -> Path:
    "The folder, or the nearest one above it that is there."
    while not folder.exists():
        folder = folder.parent
    return folder


def make_folder(folder: Path):
    "Raises `ValueError` if it cannot be made."
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f'folder {folder} cannot be made: {e}') from None


def claim(index: FoldersIndex, stretches: Stretches, later: list[Path], overwrite: bool, named: list[str]):
    """Make the folder of `stretches` that of the fit of `index`, and remove what is left there of others.

    - `later`: folders of the fits that would come after it, which go as well.
    - `overwrite`: may they hold other fits?
    - `named`: files of this fit that stay.

    Raises `ValueError` where they hold others and may not, before anything is removed.
    """
    there = {folder: remains(folder) for folder in [stretches.folder, *later]}
    for folder, left in there.items():
        is_others = left.files and left.id != index.id and not left.is_history_of_nothing
        if is_others and not overwrite:
            raise ValueError(
                f'folder {folder} holds another fit ({", ".join(left.files[:3])} ...): give another one, or pass '
                'overwrite=True'
            )
    for folder, left in there.items():
        left.remove(folder, but=named if folder == stretches.folder and left.id == index.id else ())
    index.write(stretches)  # from now on what is written there is known to be of this fit


def later_folders(root: Path, number: int) -> list[Path]:
    "Those in `root` of the fits after the one of that number, from 1."
    res = []
    while folder_of_fit(root, number + 1 + len(res)).is_dir():
        res.append(folder_of_fit(root, number + 1 + len(res)))
    return res
