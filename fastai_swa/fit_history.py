"""The table of a fit with an average, kept after the Recorder has forgotten it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

__all__ = ['FitHistory']

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
