"""The table of a fit: columns of one's own in the Recorder's names and rows, before the time; lines below it."""

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.imports import noop
from fastai.learner import Recorder
from fastai.torch_core import rank_distrib
from fastcore.foundation import L

__all__ = [
    'recorder_of',
    'validated_columns',
    'less_is_better',
    'insert_columns',
    'complete_row',
    'plain_values',
    'write_below',
]


def recorder_of(learn) -> Recorder | None:
    "The Recorder of `learn`, if it has one."
    return next((cb for cb in learn.cbs if isinstance(cb, Recorder)), None)


def validated_columns(learn) -> list[str]:
    "Names of what a validation gives: the loss, and each metric."
    return ['valid_loss', *(m.name for m in learn.metrics)]


def less_is_better(column: str, comp=None) -> bool:
    "As fastai's trackers decide; `comp`: `np.less` or `np.greater`, if it is not to be told by the name."
    if comp is not None:
        return bool(comp(0, 1))
    return 'loss' in column or 'error' in column


def insert_columns(recorder: Recorder, prefix: str) -> tuple[int, list[str]]:
    """Add `prefix`_valid_loss and `prefix`_<metric> to the names; returns the number of columns
    before them, and the new ones.

    Raises `ValueError` if there is a column of one of these names already.
    """
    names = list(recorder.metric_names)
    at = len(names) - bool(recorder.add_time)
    columns = [f'{prefix}_valid_loss', *(f'{prefix}_{m.name}' for m in recorder.learn.metrics)]
    taken = set(columns) & set(names)
    if taken:
        raise ValueError(
            f'the table of this fit has a column {min(taken)!r} already: what begins with {prefix!r} needs another name'
        )
    recorder.metric_names = L(names[:at] + columns + names[at:])
    return at, columns


def complete_row(recorder: Recorder, before: int, columns: list[str], values: list):
    """Put `values` into the row, after `before` others; `nan` where a part was cancelled and there
    are fewer, and where there are no values.
    """
    row = list(recorder.log)
    end = before + len(columns)
    row += [float('nan')] * (end - len(row))
    if values:
        row[before:end] = values
    recorder.log = L(row)


def plain_values(measures) -> list:
    "The values of metrics as numbers, `nan` for none."
    values = [m.value for m in measures]
    values = [v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in values]
    return [float('nan') if v is None else v for v in values]


def write_below(learn, lines: list[str]):
    """Write `lines` below the table of the fit that ends, by the learner's logger; nothing where no table is
    shown, as under `no_logging`.

    A logger of the user's own is a function of a row, and gets no lines: they are printed if the
    table is fastai's.
    """
    logger = _own_logger(learn)
    progress = [cb for cb in learn.cbs if isinstance(cb, ProgressCallback)]
    is_shown = any(getattr(cb, 'mbar', None) for cb in progress) if progress else logger is print
    if logger is noop or not is_shown or recorder_of(learn) is None or rank_distrib():
        return
    for line in lines:
        print(line)


def _own_logger(learn):
    """The learner's, below those that callbacks have put in its place until the fit is over.

    An interrupted fit leaves a callback's there; the next one then takes it for the learner's own, and what that was
    is forgotten: it counts as `print`.
    """
    logger = learn.logger
    owner = getattr(logger, '__self__', None)
    seen = set()
    while isinstance(owner, Callback) and hasattr(owner, 'old_logger'):
        if id(owner) in seen:
            return print
        seen.add(id(owner))
        logger = owner.old_logger
        owner = getattr(logger, '__self__', None)
    return logger
