"""Columns of one's own in the table of a fit: in the Recorder's names and rows, before the time."""

import torch
from fastai.learner import Recorder
from fastcore.foundation import L

__all__ = ['recorder_of', 'insert_columns', 'complete_row', 'plain_values']


def recorder_of(learn) -> Recorder | None:
    "The Recorder of `learn`, if it has one."
    return next((cb for cb in learn.cbs if isinstance(cb, Recorder)), None)


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
