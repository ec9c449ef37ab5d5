"""Learning-rate schedules as pure functions of the position in training. Plain Python."""
import math

__all__ = ['start_epoch', 'swa_lr_factor']


def start_epoch(swa_start, n_epoch: int) -> int:
    """Index from 0 of the first epoch that is folded: `swa_start` itself, or, for a float, that share of `n_epoch` epochs.

    A share is rounded up to whole epochs (up to float error: 0.1 of 30 is 3) and always leaves the last epoch.
    """
    return swa_start if isinstance(swa_start, int) else min(math.ceil(swa_start * n_epoch - 1e-9), n_epoch - 1)


def swa_lr_factor(epoch: int, step: int, n_steps: int, swa_start: int, swa_lr, cycle_len: int = 1) -> float:
    """The SWA papers' learning rate as a multiple of the initial one, at `step` of the `n_steps` of `epoch`, all counted from 0.

    `swa_lr` is in the same unit: a number `r` for the schedule of the paper's code, constant within an epoch, with
    `t = epoch / (swa_start + 1)`:

    1. `t <= 0.5`: 1;
    2. `t <= 0.9`: from 1 to `r` in a straight line;
    3. after that: `r`.

    A pair `(hi, lo)` goes to `hi` in the same way. From the cycle that ends with epoch `swa_start` on, each `cycle_len` epochs fall
    from `hi` to `lo` in a straight line, a step at a time, reaching `lo` in the last step before each fold: step i of the c steps
    of a cycle, from 1, has `(1 - i/c) hi + (i/c) lo` (Izmailov et al. 2018, equation 2; the paper counts epochs from 1).
    """
    hi, lo = swa_lr if isinstance(swa_lr, tuple | list) else (swa_lr, None)
    if lo is not None and epoch > swa_start - cycle_len:
        epoch_of_cycle = (epoch - swa_start - 1) % cycle_len
        t = (epoch_of_cycle * n_steps + step + 1) / (cycle_len * n_steps)
        return (1 - t) * hi + t * lo
    t = epoch / (swa_start + 1)
    if t <= .5: return 1.
    if t <= .9: return 1 - (1 - hi) * (t - .5) / .4
    return hi
