"""Warnings that name the line of the user's which they are about."""

import sys
import warnings

__all__ = ['warn', 'user_stacklevel']

# what stands on the stack between a user's line and ours, by the names of top-level modules
_BETWEEN = frozenset({'fastai_swa', 'fastai', 'fastcore', 'fastprogress', 'torch', 'contextlib', 'functools'})


def warn(sentence: str):
    "A `UserWarning` that names the innermost line which is not of this package, fastai or torch."
    warnings.warn(sentence, stacklevel=user_stacklevel())


def user_stacklevel() -> int:
    """The `stacklevel` by which the caller would name that line; where there is none, as in a thread of
    torch's, the outermost one. (Python 3.12 has `skip_file_prefixes` for it.)
    """
    level = 1
    frame = sys._getframe(1)
    while _is_between(frame) and frame.f_back is not None:
        frame = frame.f_back
        level += 1
    return level


def _is_between(frame) -> bool:
    return frame.f_globals.get('__name__', '').partition('.')[0] in _BETWEEN
