"""The table of a fit with an average: its columns while the fit is under way, and what it has shown, kept after the
Recorder has forgotten it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

from fastai.learner import Recorder

from .columns import complete_row, insert_columns

__all__ = ['FitHistory', 'FitTable']

_NAN = float('nan')


@dataclass
class FitHistory:
    "What the table of a fit shows, in numbers, epoch by epoch; all fields are plain data."

    prefix: str  # what the average's columns begin with
    columns: list[str]  # those of the average, the loss first
    names: list[str]  # all columns
    epochs: list[int] = field(default_factory=list)  # from 0, a row each
    rows: list[list[float]] = field(default_factory=list)  # `nan` where there is no number
    averaged: list[int] = field(default_factory=list)  # the epochs in the average

    def add(self, epoch: int, values: Mapping):
        "The row of `epoch`: column -> value."
        self.epochs.append(epoch)
        self.rows.append([_number(values.get(name)) for name in self.names])

    def column(self, name: str | None) -> list[float]:
        "The values of a column over the epochs; `nan` for one that there is not."
        if name not in self.names:
            return [_NAN] * len(self.rows)
        i = self.names.index(name)
        return [row[i] for row in self.rows]

    def is_of_the_fit_of(self, other: 'FitHistory') -> bool:
        "Were both kept in one fit? Then the model in training has the same numbers in both."
        loss = self.measure(self.columns[0])
        ours, theirs = self.column(loss), other.column(loss)
        return self.epochs == other.epochs and all(a == b or a != a and b != b for a, b in zip(ours, theirs))

    def measure(self, column: str) -> str:
        "What a column of the average shows: 'swa_valid_loss' -> 'valid_loss'."
        return column.removeprefix(f'{self.prefix}_')

    def beside(self, column: str) -> str | None:
        "The column of the model in training beside one of the average's, if the Recorder has it."
        measure = self.measure(column)
        return next((name for name in (measure, f'valid_{measure}') if name in self.names), None)


def _number(value) -> float:
    "Metrics may be anything; nothing is read from a device."
    return float(value) if isinstance(value, Real) else _NAN


class FitTable:
    """The columns of an average in the table of a fit under way, and their history.

    Raises `ValueError` if the table has a column of such a name already.
    """

    def __init__(self, recorder: Recorder, prefix: str):
        self.recorder = recorder
        self._n_before, self.columns = insert_columns(recorder, prefix)
        names = [name for name in recorder.metric_names if name not in ('epoch', 'time')]
        self.go_on(FitHistory(prefix, self.columns, names))

    def go_on(self, history: FitHistory):
        "The rows to come are added to `history`."
        self.history = history
        # for `plot_swa`, which can be called after the callback is gone, and in a learner that was pickled
        setattr(self.recorder, f'{history.prefix}_history', vars(history))

    def complete_row(self, values: list):
        "Put the average's `values` into the row that the Recorder is about to show: `nan` for none."
        complete_row(self.recorder, self._n_before, self.columns, values)

    def keep_row(self, epoch: int, averaged: list[int]):
        "Take the row of `epoch`, as the Recorder has just logged it; `averaged`: the epochs in the average by now."
        names = list(self.recorder.metric_names)[1:]
        self.history.add(epoch, dict(zip(names, self.recorder.learn.final_record)))
        self.history.averaged = averaged
