"""Learning-rate schedules as pure functions of the position in training. Plain Python."""

import math
from itertools import accumulate

__all__ = [
    'start_epoch',
    'due_epochs',
    'cycle_ends',
    'swa_lr_factor',
    'snapshot_lr_factor',
    'fge_lr_factor',
    'fge_epochs',
]


def start_epoch(swa_start, n_epoch: int) -> int:
    """Index from 0 of the first epoch that is averaged: `swa_start` itself, or, for a float, that
    share of `n_epoch` epochs.

    A share is rounded up to whole epochs (up to float error: 0.1 of 30 is 3) and always leaves the
    last epoch.
    """
    return swa_start if isinstance(swa_start, int) else min(math.ceil(swa_start * n_epoch - 1e-9), n_epoch - 1)


def due_epochs(start: int, n_epoch: int, cycle_len) -> list[int]:
    """The epochs at whose ends a fit of `n_epoch` epochs averages, all counted from 0: of those from `start`
    on, `start` itself and each `cycle_len`-th after it; for a list of epochs those in it; for a function those
    of which it says that they are averaged. Raises `ValueError` if that raises.
    """
    if isinstance(cycle_len, int):
        return list(range(start, n_epoch, cycle_len))
    if not callable(cycle_len):
        return [epoch for epoch in cycle_len if start <= epoch < n_epoch]
    try:
        return [epoch for epoch in range(start, n_epoch) if cycle_len(epoch)]
    except Exception as e:
        raise ValueError(f'cycle_len could not be asked for the epochs {start} to {n_epoch - 1}: {e!r}') from e


def cycle_ends(lengths) -> list[int]:
    "The last epochs, from 0, of cycles of these `lengths`: [1, 2, 4] -> [0, 2, 6]."
    return [end - 1 for end in accumulate(lengths)]


def swa_lr_factor(epoch: int, step: int, n_steps: int, swa_start: int, swa_lr, cycle_len: int = 1) -> float:
    """The SWA papers' learning rate as a multiple of the initial one, at `step` of the `n_steps` of
    `epoch`, all counted from 0.

    `swa_lr` is in the same unit: a number `r` for the schedule of the paper's code, constant within
    an epoch, with `t = epoch / (swa_start + 1)`:

    1. `t <= 0.5`: 1;
    2. up to `t = 0.9`, or to epoch `swa_start` where that comes first: from 1 to `r` in a straight
       line;
    3. after that: `r`.

    So all epochs from `swa_start` on have `r`. The paper's code alone would reach it only later
    where `swa_start < 9`. With `swa_start` 1 the line would end where it begins: there is none, and
    epoch 0 has 1.

    A pair `(hi, lo)` goes to `hi` in the same way. From the cycle that ends with epoch `swa_start`
    on, each `cycle_len` epochs fall from `hi` to `lo` in a straight line, a step at a time,
    reaching `lo` in the last step before each averaged point: step i of the c steps of a cycle, from 1, has
    `(1 - i/c) hi + (i/c) lo` (Izmailov et al. 2018, equation 2; the paper counts epochs from 1).
    """
    hi, lo = swa_lr if isinstance(swa_lr, tuple | list) else (swa_lr, None)
    if lo is not None and epoch > swa_start - cycle_len:
        epoch_of_cycle = (epoch - swa_start - 1) % cycle_len
        t = (epoch_of_cycle * n_steps + step + 1) / (cycle_len * n_steps)
        return (1 - t) * hi + t * lo
    if epoch >= swa_start:
        return hi
    t = epoch / (swa_start + 1)
    end = min(0.9, swa_start / (swa_start + 1))
    if t <= 0.5:
        return 1.0
    if t <= end:
        return 1 - (1 - hi) * (t - 0.5) / (end - 0.5)
    return hi


def snapshot_lr_factor(step: int, n_steps: int, n_cycles: int) -> float:
    """The learning rate of Snapshot Ensembles as a multiple of the initial one, at `step` of all
    `n_steps`, counted from 0.

    Each cycle of ceil(`n_steps` / `n_cycles`) steps starts at 1 and falls along half a cosine; with
    a remainder the last one is cut short. Huang et al. 2017 (arXiv 1704.00109), which counts steps
    from 1.
    """
    length = math.ceil(n_steps / n_cycles)
    return (math.cos(math.pi * (step % length) / length) + 1) / 2


def fge_lr_factor(epoch: int, step: int, n_steps: int, cycle_len: int, lr_min: float) -> float:
    """The learning rate of fast geometric ensembling as a multiple of the greatest one, at `step`
    of the `n_steps` of `epoch`, counted from 0.

    Within each `cycle_len` epochs it falls from 1 to `lr_min` in a straight line and rises to 1
    again; it is lowest in the middle of a cycle, where the snapshot is taken. Garipov et al. 2018
    (arXiv 1802.10026), section 4.
    """
    t = (epoch % cycle_len + step / n_steps) / cycle_len
    return (1 - 2 * t) + lr_min * 2 * t if t < 0.5 else lr_min * (2 - 2 * t) + (2 * t - 1)


def fge_epochs(n_cycles: int, cycle_len: int) -> int:
    "Epochs of a fit that ends at the low point of its last cycle: half of that one is not run."
    return n_cycles * cycle_len - cycle_len // 2
