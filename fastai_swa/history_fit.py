"""A fit that a `WeightHistory` keeps, while it is under way: when a point is taken, where a stretch ends, when what has
ended is written, and what a checkpoint has of all that.
"""

import time
from dataclasses import dataclass, field

import torch
from fastai.learner import Learner
from torch import nn

from .averaging import WeightAverage, equal
from .batches import Taken
from .batchnorm import StatisticsWatch, following
from .files import Lock
from .fitting import SideWork
from .interrupts import uninterrupted
from .modules import clean_copy, in_train_mode, named_tensors, unwrap
from .packing import pack, unpack
from .processes import Processes
from .stretches import FoldersIndex, Stretches, is_count, remains
from .walk import not_copied
from .warn import warn
from .weightings import Segment

__all__ = ['HistoryFit', 'count_of_state', 'writing_seconds']

_BLOCK = 16  # points in a row that are summed in float32: the mean is then right to a few units in the last place
_PENDING = 2**28  # bytes of finished stretches that may wait in memory for the end of an epoch
_LITTLE = 0.01  # of the time that training took since the last writing: so long may writing take at once
_COUNTS = 'n_batches_before', 'n_batches_an_epoch', 'place'  # fields that are in checkpoints


@dataclass
class HistoryFit:
    "A fit under way."

    learn: Learner
    processes: Processes  # that train together
    index: FoldersIndex  # which fit it is, and how far it has come
    stretches: Stretches  # those that have ended
    side: SideWork = field(default_factory=SideWork)
    lock: Lock | None = None  # on the folder, in the first process
    running: WeightAverage | None = None  # the mean of the stretch under way
    open: Segment = field(default_factory=lambda: Segment(0, 0.0))  # that stretch
    has_begun: bool = False  # is its first training epoch under way, or behind it?
    is_resumed: bool = False  # does it go on from a checkpoint?
    epoch: int = -1  # the one under way
    is_in_epoch: bool = False  # is its training part under way?
    was_cut: bool = False  # did a callback end that?
    validation_cut: bool = False  # or its validation?
    step_cancelled: bool = False  # was the optimizer step under way left out?
    train_iter_before: int = 0  # `learn.train_iter` at its beginning
    n_batches_before: int = 0  # in the epochs before
    n_batches_an_epoch: int = 0  # in the one before; 0: there was none
    place: int = 0  # batches of the fit up to the last point
    watch: StatisticsWatch | None = None  # on the statistics of batch norm
    has_said_infinite: bool = False
    named_by_state: list = field(default_factory=list)  # the files that the latest `state_dict` names
    named_by_checkpoint: list = field(default_factory=list)  # those that a checkpoint names which was written
    written_at: float = field(default_factory=time.perf_counter)  # when means were written last, in seconds
    seconds_a_file: float | None = None  # that writing took then; `None`: not known yet
    began_at: float = 0.0  # when the training part, or the validation, of the latest epoch began
    seconds_a_batch: float = 0.0  # of training, in the latest epoch
    seconds_of_validation: float = 0.0  # of the latest epoch

    def begin(self):
        "The first training epoch begins."
        if self.running is None:
            self.running = self._new_mean()
        self.has_begun = True
        self.written_at = time.perf_counter()

    def _new_mean(self) -> WeightAverage:
        model = unwrap(self.learn.model)
        res = WeightAverage(model, equal, clean_copy(model, not_copied(self.learn)))
        res.block_len = _BLOCK
        return res

    def begin_epoch(self):
        "The training part of an epoch begins."
        self.is_in_epoch = True
        self.was_cut = self.validation_cut = False
        self.train_iter_before = self.learn.train_iter
        with self.side.attempt('preparing an epoch of the weight history', 'its batch norm may be of other weights'):
            self.watch = StatisticsWatch(unwrap(self.learn.model))
        self.began_at = time.perf_counter()

    def end_step(self):
        "An optimizer step is over: taken, or left out."
        was_cancelled = self.step_cancelled
        self.step_cancelled = False
        if was_cancelled:
            return
        self.index.n_steps += 1
        if self.index.n_steps % self.index.every == 0:
            with self.side.attempt('taking the weights into the history', 'they are left out of it'):
                self._add_point()

    def _add_point(self):
        self.running.update(unwrap(self.learn.model))
        self.open.wanted += self._wanted()
        if self.open.wanted >= 1 - 1e-9:
            self._cut()
            if self._is_to_be_written():
                self._write()

    def _n_batches(self) -> int:
        "That the epoch under way has trained on; within a batch without that."
        return self.learn.train_iter - self.train_iter_before

    def _wanted(self) -> float:
        "Segments wanted for the batches since the last point."
        per_epoch = self.n_batches_an_epoch or self.learn.n_iter
        n_batches = self._n_batches()
        n_left = per_epoch * (self.index.n_epoch - self.epoch - 1) + max(0, per_epoch - n_batches - 1)
        place = self.n_batches_before + n_batches + 1
        cuts = self.stretches.cuts
        cuts.n_batches = place + n_left
        res = sum(cuts.wanted(n_left + i) for i in range(place - self.place))
        self.place = place
        return res

    def _cut(self):
        "The stretch under way ends."
        with uninterrupted():
            is_finite = self.stretches.add(self._open_segment(), _on_host(self.running))
            self.open = Segment(0, 0.0)
            self.running.n_averaged = 0  # the next point is taken whole
        if not is_finite:
            self._say_infinite()

    def _open_segment(self) -> Segment:
        self.open.n = self.running.n_averaged
        return self.open

    def _say_infinite(self):
        if not self.has_said_infinite and self.processes.rank == 0:
            warn(f'weights in epoch {self.epoch} are not finite: stretches with such are left out of the history')
        self.has_said_infinite = True

    def end_epoch(self, was_cut=True, alone=False):
        """The training part of an epoch is over.

        - `was_cut`: did a callback, or an error, end it?
        - `alone`: other processes, if there are any, are not asked; they may be elsewhere, as after an error.
        """
        if not self.is_in_epoch:
            return
        n_batches = self._n_batches()
        self.index.taken = _with_epoch(self.index.taken, n_batches, was_cut)
        if n_batches:
            self.seconds_a_batch = (time.perf_counter() - self.began_at) / n_batches
        with self.side.attempt('closing an epoch of the weight history', 'its batch norm may be of other weights'):
            self._note_statistics(alone)
        with uninterrupted():  # what was interrupted above is done again at the end of the fit
            self.n_batches_before += n_batches
            self.n_batches_an_epoch = n_batches or self.n_batches_an_epoch
            self.is_in_epoch = False
            with self.side.attempt('closing an epoch of the weight history', 'a stretch may go beyond it'):
                self._end_stretch_of_epoch()
        self._write()

    def _end_stretch_of_epoch(self):
        if self.stretches.cuts.keeps_epochs:
            if self.running.n_averaged:
                self._cut()
            if self.stretches.segments:
                self.stretches.segments[-1].ends_epoch = True
        self.index.epochs.append([self.epoch, self.stretches.n_points + self.running.n_averaged])

    def _note_statistics(self, alone):
        moved = None
        with self.side.attempt('looking at batch norm', 'it may be of other weights'):
            if self.watch is not None and self._n_batches():
                moved = self.watch.moved()
        self.watch = None
        of_all = [moved] if alone else self.processes.gather(moved)
        self.index.bn = following(of_all, self.index.bn, unwrap(self.learn.model))

    def begin_validation(self):
        if not self.is_in_epoch:
            self.began_at = time.perf_counter()

    def end_validation_batch(self):
        if not self.is_in_epoch:
            self.seconds_of_validation = time.perf_counter() - self.began_at

    def end_validation(self):
        if not self.is_in_epoch:  # else of a callback that validates while training goes on
            self.index.validated = _with_epoch(self.index.validated, self.learn.iter + 1, self.validation_cut)

    def close(self) -> bool:
        "The fit is over; is anything kept of it?"
        if not self.has_begun or self.running is None:
            return False
        with self.side.attempt('closing the weight history', 'its end is missing'):
            if self.running.n_averaged:
                self._cut()
        self.running = None
        return bool(self.stretches.segments)

    # files

    @property
    def writes(self) -> bool:
        "Are there files, and does this process write them?"
        return self.stretches.folder is not None and self.stretches.keeps_means

    def _is_to_be_written(self) -> bool:
        "Now, and not at the end of the epoch: would it cost little, or is too much waiting?"
        stretches = self.stretches
        if not self.writes:
            return False
        if stretches.n_bytes_in_memory > _PENDING:
            return True
        cost = writing_seconds(stretches.n_in_memory, stretches.n_bytes_in_memory, self.seconds_a_file)
        return cost < _LITTLE * (time.perf_counter() - self.written_at)

    def _write(self):
        "Write the means that are in memory, and the index; what fails is said, and tried again later."
        if not self.writes:
            return
        with self.side.attempt('writing the weight history', 'it stays in memory'):
            began = time.perf_counter()
            n_files = self.stretches.n_in_memory
            self.stretches.write()
            self.index.write(self.stretches)
            self.stretches.remove_superseded(but=self.named_by_checkpoint)
            self.written_at = time.perf_counter()
            if n_files:
                self.seconds_a_file = (self.written_at - began) / n_files

    def write_last(self, weights: dict) -> bool:
        "Write what is left to write, and the last weights of the fit; are these in a file now?"
        if not self.writes:
            return False
        self._write()
        with self.side.attempt('writing the last weights', 'they stay in memory'):
            self.index.write_last(self.stretches, weights)
            return True
        return False

    def named_files(self) -> list[str]:
        "Those that the history needs, or a checkpoint of it."
        return [s.file for s in self.stretches.segments if s.file is not None] + self.stretches.superseded

    # for checkpoints

    def state_dict(self) -> dict:
        self.named_by_state = self.named_files()
        segment = Segment(0, 0.0) if self.running is None else self._open_segment()
        return {
            'index': self.index.state_dict(),
            'stretches': self.stretches.state_dict(),
            'open': [segment.n, segment.wanted],
            'running': pack(self.running.state_dict()) if segment.n else None,
            **{name: getattr(self, name) for name in _COUNTS},
        }

    def load_state_dict(self, state: dict):
        "Raises `ValueError` if it is none, if one of its files is missing, or if the folder is another fit's by now."
        stretches = self.stretches
        self.index.load_state_dict(state['index'])
        if self.writes and remains(stretches.folder).id not in (None, self.index.id):
            raise ValueError(
                f'folder {stretches.folder} holds another fit by now, not what this one wrote before it was interrupted'
            )
        stretches.load_state_dict(state['stretches'])
        self.named_by_checkpoint = self.named_files()
        n, wanted = state['open']
        self.open = Segment(count_of_state(n), float(wanted))
        self.running = self._new_mean()
        if state['running'] is not None:
            self.running.load_state_dict(unpack(state['running']))
        for name in _COUNTS:
            setattr(self, name, count_of_state(state[name]))
        self.is_resumed = True


def count_of_state(n) -> int:
    "Raises `ValueError` unless `n` is a count."
    if not is_count(n):
        raise ValueError(f'the state of a WeightHistory has a count that is none: {n!r}')
    return n


def _with_epoch(taken: list, n_batches: int, was_cut: bool) -> list:
    "What the epochs of a fit took of a loader, with one more."
    res = Taken(*taken)
    res.add(n_batches, was_cut)
    return [res.n, res.reached_end]


def _on_host(running: WeightAverage) -> dict[str, torch.Tensor]:
    "Name -> mean of each parameter, in the host's memory; tied ones share theirs."
    model: nn.Module = unwrap(running.swa_model)
    copies = {}
    with in_train_mode(model):
        params = named_tensors(model.named_parameters)
        for name, p in params.items():
            if id(p) not in copies:
                copies[id(p)] = running.master.get(name, p).detach().to('cpu', copy=True)
        return {name: copies[id(p)] for name, p in params.items()}


_SLOW_FILE = 1.0  # seconds
_SLOW_DISK = 1e8  # bytes a second


def writing_seconds(n_files: int, n_bytes: int, seconds_a_file: float | None) -> float:
    "About how long it takes to write so many files, of so many bytes together: as the last ones took, if known."
    if seconds_a_file is not None:
        return n_files * seconds_a_file
    return n_files * _SLOW_FILE + n_bytes / _SLOW_DISK
