"""How far a fit with an average has come: the fit and its epoch under way."""

from dataclasses import dataclass, field

from fastai.learner import Learner

from .batches import Taken
from .batchnorm import StatisticsWatch
from .fit_history import FitHistory, FitTable
from .fitting import SideWork
from .unaveraged import SampleWatch

__all__ = ['Fit', 'Epoch']

_COUNTS = 'start', 'n_folds', 'n_epochs', 'n_steps', 'n_before'  # fields of `Fit` that are in checkpoints


@dataclass
class Epoch:
    "An epoch of a fit."

    number: int  # from 0; `learn.epoch` is 0 after a validation within the fit
    is_open: bool = False  # is its training part under way, where that is averaged?
    trained: bool = False  # has its training part ended?
    folded: bool = False  # are points of it in the average?
    has_failed: bool = False  # does an error, and not the schedule, leave its columns nan?
    step_cancelled: bool = False  # was the optimizer step under way left out?
    was_cut: bool = False  # did a callback end its training part?
    validation_cut: bool = False  # or its validation?
    validated: Taken = field(default_factory=Taken)  # batches, by the learner's own validation
    train_iter_before: int = 0  # `learn.train_iter` at its beginning
    watch: StatisticsWatch = None  # on the statistics of batch norm; `None` where it could not be made
    beside: SampleWatch = None  # on what training may move beside the weights; in the first averaged epoch alone
    backup: dict = None  # the callback's state at its beginning, where points are taken before it is known to be whole

    def n_batches(self, learn: Learner) -> int:
        "That it has trained on."
        return learn.train_iter - self.train_iter_before

    def statistics_moved(self, learn: Learner) -> list[str] | None:
        "The layers whose statistics of batch norm follow the weights; `None` where that is not known."
        if self.watch is None or self.n_batches(learn) <= 0:
            return None
        return self.watch.moved()

    def close(self):
        "Its training part is over, and what was kept for its end is not needed any more."
        self.watch = self.beside = self.backup = None
        self.is_open = False


@dataclass
class Fit:
    "A fit under way."

    start: int  # the first epoch that may be averaged
    due: list  # the epochs that are, if they come to their ends
    table: FitTable = None  # `None` without a Recorder
    n_folds: int = 0  # points taken into the average
    n_epochs: int = 0  # epochs with such
    n_steps: int = 0  # optimizer steps since `start`
    n_before: int = 0  # batches before the first point, by the Recorder
    taken: Taken = field(default_factory=Taken)  # training batches of its epochs
    has_begun: bool = False  # is its first training epoch under way, or behind it?
    side: SideWork = field(default_factory=SideWork)
    said: set = field(default_factory=set)  # kinds of warnings that were given
    epoch: Epoch = field(default_factory=lambda: Epoch(-1))  # the one under way

    @property
    def columns(self) -> list[str]:
        "Those of the average; none without a Recorder."
        return [] if self.table is None else self.table.columns

    def is_validated(self, freq: int, is_last: bool) -> bool:
        """Is the average validated in the epoch under way? `freq`: with the 1st, (1+freq)th ... epoch that has
        points, 0 for none; `is_last`: this is the last epoch, in which it is in any case.
        """
        is_turn = self.epoch.folded and freq and (self.n_epochs - 1) % freq == 0
        return bool(self.n_folds and (is_turn or is_last))

    # for checkpoints

    def state_dict(self) -> dict:
        "Its counts and the table so far, as plain data."
        history = None if self.table is None else vars(self.table.history)
        return {'fit': {name: getattr(self, name) for name in _COUNTS}, 'history': history}

    def load_state_dict(self, state: dict, what: str):
        """Take over a `state_dict`; those of earlier versions may lack some of it. Raises `ValueError`, which names
        the average by `what`, if a count is no int.
        """
        counts = {name: state['fit'][name] for name in _COUNTS if name in state['fit']}
        if not all(type(n) is int for n in counts.values()):
            raise ValueError(f'the state of {what} has counts that are none: {counts}')
        vars(self).update(counts)
        if self.table is not None and state.get('history') is not None:
            self.table.go_on(FitHistory(**state['history']))
