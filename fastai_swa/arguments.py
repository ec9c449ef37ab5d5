"""The arguments of `SWACallback`: what they may be, and, as plain data, what tells them from others.

Each check returns its value, or raises `TypeError` or `ValueError`, as those in `checks` do.
"""

import keyword
from collections.abc import Iterable
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path

from .checks import check_count
from .schedules import cycle_ends

__all__ = ['check_swa_start', 'check_cycle_len', 'check_name', 'check_average', 'plain_cycle_len', 'plain_weight']


def check_swa_start(swa_start) -> int | float:
    "An epoch, as an int, or a share of the fit."
    if isinstance(swa_start, bool) or not isinstance(swa_start, Real):
        raise TypeError(
            f'swa_start must be an int (an epoch, from 0) or a float in [0, 1) (a share of the fit), not {swa_start!r}'
        )
    if isinstance(swa_start, Integral):
        if swa_start < 0:
            raise ValueError(f'swa_start must be an epoch counted from 0, not {swa_start}')
        return int(swa_start)
    if not 0 <= swa_start < 1:
        raise ValueError(
            f'swa_start must be in [0, 1) where it is a share of the fit, not {swa_start}; pass an int for an epoch'
        )
    return float(swa_start)


def check_cycle_len(cycle_len):
    "A number of epochs, a list of the epochs averaged, in rising order, or a function that is true of them."
    if callable(cycle_len):
        return cycle_len
    if isinstance(cycle_len, Integral) and not isinstance(cycle_len, bool):
        return check_count('cycle_len', cycle_len)
    if isinstance(cycle_len, str) or not isinstance(cycle_len, Iterable):
        raise TypeError(
            'cycle_len must be an int (epochs), a list of the epochs averaged, or a function that is true of them, not '
            f'{cycle_len!r}'
        )
    epochs = [check_count('cycle_len', epoch, least=0) for epoch in cycle_len]
    if not epochs:
        raise ValueError('cycle_len must have one epoch at least, and is empty')
    if epochs != sorted(set(epochs)):
        ends = f': of cycles of these lengths they are {cycle_ends(epochs)}' if min(epochs) else ''
        raise ValueError(f'cycle_len must be epochs, counted from 0, in rising order, not {epochs}{ends}')
    return epochs


def check_name(name: str) -> str:
    "What can be an attribute."
    if not isinstance(name, str):
        raise TypeError(f'name must be a str, not {name!r}')
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(
            f'name must be an identifier such as swa or ema, for learn.<name> and the columns, not {name!r}'
        )
    return name


def check_average(average) -> Path | None:
    "`None`, or a file of an average to go on with."
    if average is None:
        return None
    if not isinstance(average, str | Path):
        raise TypeError(f'average must be a SWACallback or a file of SaveSWAModelCallback, not {average!r}')
    if not Path(average).is_file():
        raise FileNotFoundError(f'average={str(average)!r} is no file')
    return Path(average)


# what a checkpoint compares: functions by their values at so many points
_N_COMPARED = 1001


def plain_cycle_len(cycle_len) -> int | list:
    "What tells it from another one: of a function, the epochs of which it is true."
    if not callable(cycle_len):
        return cycle_len
    epochs = []
    for epoch in range(_N_COMPARED):
        with suppress(Exception):  # the function of a shorter fit
            if cycle_len(epoch):
                epochs.append(epoch)
    return epochs


def plain_weight(weight) -> list:
    "What tells it from another one: the weight of each point, from 0; `None` where it has none."
    return [_weight_of(weight, n) for n in range(_N_COMPARED)]


def _weight_of(weight, n_averaged: int) -> float | None:
    if n_averaged == 0:
        return 1.0
    try:
        return float(weight(n_averaged))
    except Exception:
        return None
