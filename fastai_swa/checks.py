"""Checks of arguments, and what sentences count and list, in one wording.

Each check returns its value, or raises `TypeError` for one of another kind and `ValueError` for one that is out of
range. The message names the argument, says what it must be, and what it was.
"""

from numbers import Integral, Real

import numpy as np

__all__ = [
    'check_count',
    'check_number',
    'check_positive',
    'check_not_negative',
    'check_share',
    'check_numbers',
    'check_choice',
    'check_known',
    'counted',
    'listed',
]


def listed(names, most: int = 3) -> str:
    "At most so many of the `names`, for a sentence, as in `'a', 'b', 'c' and 2 more`."
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(map(repr, names[:most])) + more


def counted(n: int, noun: str) -> str:
    "As in '1 epoch', or '3 epochs'."
    return f'{n} {noun}' if n == 1 else f'{n} {noun}s'


def check_count(name: str, value, least: int = 1, optional: bool = False) -> int | None:
    "An integer of at least `least`; `None` where it is `optional`."
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f'{name} must be an int{" or None" if optional else ""}, not {value!r}')
    if value < least:
        raise ValueError(f'{name} must be at least {least}, not {value}')
    return int(value)


def check_number(name: str, value, expected: str = 'a number') -> float:
    "A number. `expected`: what else may stand there, as in 'a number or None'."
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be {expected}, not {value!r}')
    return float(value)


def check_positive(name: str, value, expected: str = 'a number') -> float:
    "A positive number, not infinite."
    if not 0 < check_number(name, value, expected) < float('inf'):
        raise ValueError(f'{name} must be positive, not {value!r}')
    return float(value)


def check_not_negative(name: str, value) -> float:
    "A number of at least 0, not infinite."
    if not 0 <= check_number(name, value) < float('inf'):
        raise ValueError(f'{name} must not be negative, not {value!r}')
    return float(value)


def check_share(name: str, value) -> float:
    "A number from 0 to 1."
    if not 0 <= check_number(name, value) <= 1:
        raise ValueError(f'{name} must be a share from 0 to 1, not {value!r}')
    return float(value)


def check_numbers(name: str, values) -> np.ndarray:
    "Finite numbers, or one, as a float64 vector."
    try:
        found = np.asarray(values, float).ravel()
    except (TypeError, ValueError):
        raise TypeError(f'{name} must be numbers, not {values!r}') from None
    if not np.isfinite(found).all():
        raise ValueError(f'{name} must be finite, not {values!r}')
    return found


def check_choice(name: str, value, choices):
    "One of the few `choices` that there are."
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f'{name} must be {", ".join(others)} or {last}, not {value!r}')
    return value


def check_known(name: str, value, known):
    "One of the names in `known`, which depend on the case."
    if value not in known:
        raise ValueError(f'{name} must be one of {", ".join(known)}, not {value!r}')
    return value
