"""`WeightHistory`: the weights of a fit as means of consecutive stretches, so that any average of them
can be had when the fit is over.

When a point is taken and where a stretch ends is here; how much a point weighs in an average is in
`weightings`, the means and their files are in `stretches`, choosing between averages in `choosing`.
"""

import secrets
import shutil
import time
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fastai.learner import Learner, Recorder

from .averaging import WeightAverage, equal, refuse_mismatch
from .batches import Taken
from .batchnorm import StatisticsWatch, following
from .checks import check_count
from .choosing import candidates, choose, plot_choice, remark_on_choice, seconds_to_choose
from .columns import write_below
from .files import InUse, Lock
from .fit_average import FitAverage
from .fitting import FitCallback, SideWork, locked_for, no_fit, passed_callbacks
from .interrupts import uninterrupted
from .kept_fit import KeptFit, folder_of_fit
from .modules import clean_copy, in_train_mode, named_tensors, plain_name, unwrap
from .packing import pack, unpack
from .passes import check_engine, refresh_bn
from .processes import Processes
from .stretches import FoldersIndex, Stretches, is_count, read_history, remains
from .views import lending
from .walk import not_copied
from .warn import warn
from .weightings import Cuts, Segment, called, check_which
from .weights import NoSolution, weights_of

__all__ = ['WeightHistory']

_BLOCK = 16  # points in a row that are summed in float32: the mean is then right to a few units in the last place
_BN_BATCHES = 20  # that `choose` refreshes batch norm on
_PENDING = 2**28  # bytes of finished stretches that may wait in memory for the end of an epoch
_LITTLE = 0.01  # of the time that training took since the last writing: so long may writing take at once
_COUNTS = 'n_batches_before', 'n_batches_an_epoch', 'place'  # fields of `_Fit` that are in checkpoints


@dataclass
class _Fit:
    "A fit under way."

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
    train_iter_before: int = 0  # `learn.train_iter` at its beginning
    n_batches_before: int = 0  # in the epochs before
    n_batches_an_epoch: int = 0  # in the one before; 0: there was none
    place: int = 0  # batches of the fit up to the last point
    step_cancelled: bool = False  # was the optimizer step under way left out?
    watch: StatisticsWatch | None = None  # on the statistics of batch norm
    has_said_infinite: bool = False
    named_by_state: list = field(default_factory=list)  # the files that the latest `state_dict` names
    named_by_checkpoint: list = field(default_factory=list)  # those that a checkpoint names which was written
    written_at: float = field(default_factory=time.perf_counter)  # when means were written last, in seconds
    seconds_a_file: float | None = None  # that writing took then; `None`: not known yet
    began_at: float = 0.0  # when the training part, or the validation, of the latest epoch began
    seconds_a_batch: float = 0.0  # of training, in the latest epoch
    seconds_of_validation: float = 0.0  # of the latest epoch


class WeightHistory(FitCallback):
    """Keep the weights of a fit as the means of consecutive stretches: at the end of each a mean is written,
    and a new one begins.

    After the fit any average of its weights can be had, without another training: see `average`,
    `averaged`, `apply`, and `choose`, which finds one. Training is left exactly as it is.

    - A point is the weights after every `every`-th optimizer step that was really taken. Ends of epochs are
      borders of stretches, if the fit has at most 3/4 `n_segments` of them; the rest of the stretches is
      spent on its end, where averages differ most (`weightings.Cuts`). Averages over whole stretches are
      exact; how far others are missed is known beforehand (`error`).
    - Memory: two sets of weights beside the model's, and with `folder=None` one in the host's memory for each
      stretch (and in each checkpoint); else files: `n_segments + 1` times the size of the weights, which is said
      before the first step.
    - `dtype=torch.float16` halves that, and each stored weight is off by up to .05 % of itself (`torch.bfloat16`:
      .4 %). Of the way from the last weights to the mean of the last quarter that is .6 % (5 %) at a constant
      learning rate, and 12 % (89 %) at the end of one-cycle, where that way is short (digits, 12 epochs, 3 seeds).
    - Of several processes the first one writes. What cannot be written, or would cost noticeably beside a step,
      waits in memory for the end of the epoch.
    - A second fit of the same object is a history of its own, in `fit-2` within the folder, and so on.
      Methods mean the latest fit; `WeightHistory.load(folder, learn)` reads a folder.

    Segments that are not finite are left out, which is said once. What cannot be done does not end the
    training: means that cannot be written stay in memory. Raises `TypeError` or `ValueError`, naming the
    argument, for one that cannot be used; before the first step `ValueError` for a folder that holds
    another fit or files of something else, `OSError` where the disk has not the room.

    A mean of segments costs less than all checkpoints, and is exact where these are not: Izmailov et al.
    2018; Karras et al. 2023 (arXiv 2312.02696), section 3.
    """

    order = Recorder.order + 7  # after the columns of averages and of snapshots
    remove_on_fetch = True
    # an export carries the settings, not the weights
    _stateattrs = '_fit', '_kept', '_elsewhere', '_cached', 'chosen', 'table', '_n_fits'

    def __init__(
        self,
        folder=None,  # for the files; None: in the host's memory
        n_segments: int = 32,  # means kept at most
        every: int = 1,  # optimizer steps from one point to the next
        overwrite: bool = False,  # may a history of another fit in the folder be replaced?
        dtype: torch.dtype | None = None,  # of the stored means; default: float32, or what the weights are in
    ):
        self.folder = None if folder is None else Path(folder).resolve()
        self.n_segments = check_count('n_segments', n_segments, least=4)
        self.every = check_count('every', every)
        if not isinstance(overwrite, bool):
            raise TypeError(f'overwrite must be True or False, not {overwrite!r}')
        self.overwrite = overwrite
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f'dtype must be a floating-point torch.dtype or None, not {dtype!r}')
        if dtype is not None and dtype.itemsize < 2:
            raise ValueError(f'dtype must have 16 bits at least, such as torch.bfloat16, not {dtype!r}')
        self.dtype = dtype
        self._init_state()

    def _init_state(self):
        super()._init_state()
        self._fit = None
        self._kept = None  # the `KeptFit` of the latest fit
        self._elsewhere = None  # its folder and learner, where another process has written it
        self._cached = None  # which average was made last, and the `FitAverage`
        self._n_fits = 0  # so far
        self.chosen = None  # the keywords of the average that `choose` found; {}: the last weights
        self.table = None  # what `choose` compared

    def __deepcopy__(self, memo):
        "With the settings and what was kept, which is of the learner's copy where that is copied with it."
        res = super().__deepcopy__(memo)
        res._n_fits = self._n_fits
        res.chosen = self.chosen
        res.table = self.table
        if self._kept is not None:
            res._kept = self._kept.copied(memo)
        return res

    @classmethod
    def load(cls, folder, learn: Learner) -> 'WeightHistory':
        """The history in `folder`, or the latest one where several fits wrote there, for the model and data of
        `learn`, which the caller keeps.

        Raises `FileNotFoundError` or `ValueError`, naming it, if there is none that can be read; files of means are
        looked at when they are used.
        """
        folder = Path(folder).resolve()
        kept, number = KeptFit.read(folder, weakref.ref(learn))
        res = cls(folder, kept.index.n_segments, kept.index.every)
        res._n_fits = number
        res._kept = kept
        return res

    # any average of it

    def average(self, **which) -> dict:
        """The state dict of an average, as plain names and tensors in the host's memory; buffers are those of the last
        step. No pass is made. For what is not a mean of whole stretches, and missed by more than a twentieth of its
        way from the last weights, a warning says how far (`error`).

        `which` is one of these; without any it is what `choose` found:

        - `last=.25`: the plain mean of the last share of the points, in (0, 1].
        - `epochs=(a, b)`: of the points in the epochs a to b - 1, from 0.
        - `ema=.999`: a step weighs that to the power of the steps after it, renormalised.
        - `power=.1`: the power-function EMA of that relative width, as `power_ema`.
        - `decay='linear'`, `'cosine'` or `'sqrt'` with `last=`: what a learning rate that decays over these points
          would have given (`weightings.decayed`).

        Raises `TypeError` or `ValueError`, naming it, for an unknown or empty average; `RuntimeError` before any fit.
        """
        return self._known().average(self._which(which))

    def error(self, **which) -> float:
        """How far the kept means miss an average, as a share of its way from the last weights, if the weights walked at
        random: 0 for a mean of whole stretches. Arguments and errors as for `average`.
        """
        return self._known().missed(self._which(which))

    @contextmanager
    def averaged(self, **which):
        """Within this context the learner predicts, validates, shows, saves and exports with an average, named as for
        `average`; gives the learner. Batch norm is refreshed first. As `SWACallback.averaged`.
        """
        learn = self._learner()
        which = self._which(which)
        average = self._made(which)

        def enter():
            return self.averaged(**which)

        def version():
            return weakref.ref(average.running)

        with (
            lending(learn, 'averaged()', enter, version),
            average.running.lent_to(learn.model),
            no_fit(learn),
        ):
            self._refresh(learn, average)
            yield learn

    def apply(self, **which):
        "Put an average, named as for `average`, into `learn.model` for good, in place, batch norm refreshed."
        learn = self._learner()
        average = self._made(self._which(which))
        with average.running.lent_to(learn.model):
            self._refresh(learn, average)
        average.running.copy_to(learn.model)

    def solutions(self) -> dict:
        "The chosen average, called 'average': so `rays`, `Curve` and `Ensemble` take the history itself."
        if self._kept is None or self.chosen is None:
            raise NoSolution('average', 'is not chosen yet: call choose(), or pass history.average(last=.25)')
        return {'average': self.average()}

    def __repr__(self):
        if self._kept is None:
            where = 'the host\'s memory' if self.folder is None else str(self.folder)
            return f'WeightHistory: nothing kept yet; up to {self.n_segments} means in {where}'
        kept = self._kept
        chosen = '' if self.chosen is None else f'; chosen: {called(self.chosen)}'
        return (
            f'WeightHistory: {kept.stretches.n_points} points in {len(kept.stretches.segments)} means, '
            f'{len(kept.index.epochs)} epochs{chosen}; use it within `averaged(last=.25)`, or let `choose()` find one'
        )

    def choose(
        self,
        by: str = 'valid_loss',  # column to choose by: the loss, or a metric of the learner
        dl=None,  # loader of the samples to choose on; default: the validation set
        bn_batches: int = _BN_BATCHES,  # training batches that batch norm is refreshed on, the same for all averages
        comp=None,  # np.less or np.greater; default: less for a loss or an error, else greater
        ends: bool = True,  # also windows that end before the fit's end?
    ):
        """Validate averages of the fit and pick the best, or the last weights if none helps; returns the table of all,
        a pandas `DataFrame`, the best first.

        Validated are the last weights, single stretches, means over windows of the fit, EMAs and power EMAs, at most 60
        in all, each in a pass over these samples and one over the batches for batch norm. An average helps where its
        gain over the last weights is more than two paired standard errors: over the samples for the loss, over batches
        for metrics that are means over samples. For other metrics, or fewer than ten batches, there is none, and the
        best value wins. The values of what was chosen flatter, since they chose it: report on other samples.

        False alarms: averages that do not help by construction pass by chance in 5 % of the cases by loss, in 9 % by
        error; on clean digits 4 of the 15 averages chosen in 96 cases were no better than the last weights on test
        samples (24 seeds, constant rate and one-cycle, by loss and by error; `benchmarks/choosing.py --seeds 24`).

        Sets `chosen`, which `averaged()`, `apply()` and `average()` take from then on, and says it. The learner, random
        generators and recorder stay as they were. Raises `ValueError` for a column that is not there or without a
        validation set, `RuntimeError` before any fit, or in several processes.
        """
        kept, learn = self._known(), self._learner()
        check_count('bn_batches', bn_batches, optional=True)
        if Processes(learn).size > 1:
            raise RuntimeError('choose() validates in one process: call it outside of distrib_ctx')
        average = FitAverage.begin(learn, equal, None, None)

        def lent(which, training):
            return self._lent(average, which, training)

        validated = Taken(*kept.index.validated)
        taken = Taken(*kept.index.taken)
        with kept.stretches.cached():
            found = self._comparable(kept, ends)
            self.table, self.chosen, sentence = choose(learn, found, lent, by, dl, bn_batches, comp, taken, validated)
        print(sentence)
        return self.table

    def _comparable(self, kept: KeptFit, ends: bool) -> list:
        "The averages that `choose` compares; those with a segment that cannot be read are left out, which is said."
        faults = kept.stretches.faults()
        if faults:
            warn(f'{"; ".join(faults.values())}: averages with that are left out')
        lost = [i for i, s in enumerate(kept.stretches.segments) if s.is_lost]
        found = candidates(kept.stretches.ends, kept.epochs, kept.index.every, ends)
        found = [c for c in found if kept.is_near(c.which)]
        found = [c for c in found if kept.share_of(c.which, lost) < 1e-9]
        return [c for c in found if kept.share_of(c.which, faults) == 0]

    def plot(self, axs=None):
        """What `choose` found: the column chosen by, over start and end of the window; and along the windows that end
        with the fit, with the last weights and the best single stretch as lines. Returns the two axes. Raises
        `RuntimeError` before `choose`.
        """
        if self.table is None:
            raise RuntimeError('plot() draws what choose() has found: call that first')
        return plot_choice(self.table, axs)

    # the events of a fit

    def before_fit(self):
        learn = self.learn
        processes = Processes(learn)
        index = FoldersIndex(processes.first(secrets.token_hex, 8), self.every, self.n_segments, learn.n_epoch)
        keeps_means = processes.rank == 0 or self.folder is None
        cuts = Cuts(self.n_segments, learn.n_epoch, None)
        stretches = Stretches(cuts, self._folder_of_fit(), self.dtype, keeps_means)
        self._fit = _Fit(processes, index, stretches)

    def before_epoch(self):
        self._fit.epoch = self.epoch_under_way

    def before_train(self):
        fit, learn = self._fit, self.learn
        if not fit.has_begun:
            self._begin_first_epoch()
        fit.is_in_epoch = True
        fit.was_cut = fit.validation_cut = False
        fit.train_iter_before = learn.train_iter
        with fit.side.attempt('preparing an epoch of the weight history', 'its batch norm may be of other weights'):
            fit.watch = StatisticsWatch(unwrap(learn.model))
        fit.began_at = time.perf_counter()

    def after_cancel_step(self):
        self._fit.step_cancelled = True  # the scaler of mixed precision skipped it

    def after_step(self):
        fit = self._fit
        was_cancelled = fit.step_cancelled
        fit.step_cancelled = False
        if was_cancelled:
            return
        fit.index.n_steps += 1
        if fit.index.n_steps % self.every == 0:
            with fit.side.attempt('taking the weights into the history', 'they are left out of it'):
                self._add_point()

    def after_batch(self):
        fit = self._fit
        if not self.training and not fit.is_in_epoch:
            fit.seconds_of_validation = time.perf_counter() - fit.began_at

    def after_cancel_train(self):
        self._fit.was_cut = True

    def after_train(self):
        self._end_epoch(was_cut=self._fit.was_cut)

    def before_validate(self):
        if not self._fit.is_in_epoch:
            self._fit.began_at = time.perf_counter()

    def after_cancel_validate(self):
        self._fit.validation_cut = True

    def after_validate(self):
        fit = self._fit
        if not fit.is_in_epoch:  # else of a callback that validates while training goes on
            fit.index.validated = _with_epoch(fit.index.validated, self.learn.iter + 1, fit.validation_cut)

    def after_cancel_epoch(self):
        self._end_epoch()

    def after_fit(self):
        fit = self._fit
        self._end_epoch()
        self._close()
        fit.processes.gather(None)  # what the first one has written can be read by the others now
        with fit.side.attempt('saying what the weight history can do'):
            self._say_what_can_be_compared()

    def over(self):
        fit = self._fit
        self._end_epoch(alone=True)
        try:
            self._close()
        finally:
            if fit.lock is not None:
                fit.lock.release()
            fit.side.conclude()

    # before the first step

    def _begin_first_epoch(self):
        fit, learn = self._fit, self.learn
        check_engine(learn)
        if fit.running is None:
            fit.running = self._new_mean()
        fit.processes.first(self._prepare)
        fit.has_begun = True
        self._forget()
        fit.written_at = time.perf_counter()

    def _forget(self):
        "Of an earlier fit."
        self._kept = None
        self._elsewhere = None
        self._cached = None
        self.chosen = None
        self.table = None

    def _new_mean(self) -> WeightAverage:
        model = unwrap(self.learn.model)
        res = WeightAverage(model, equal, clean_copy(model, not_copied(self.learn)))
        res.block_len = _BLOCK
        return res

    def _folder_of_fit(self) -> Path | None:
        return None if self.folder is None else folder_of_fit(self.folder, self._n_fits + 1)

    def _prepare(self):
        self._say_size()
        if self.folder is not None:
            self._claim()

    def _say_size(self):
        "How much the history may take. Raises `OSError` if the disk has less."
        fit = self._fit
        if fit.is_resumed:
            return
        size = _n_bytes(unwrap(self.learn.model), self.dtype, self.n_segments)
        folder = fit.stretches.folder
        where = 'in the host\'s memory' if folder is None else f'in {folder}'
        said = f'WeightHistory: up to {self.n_segments + 1} sets of weights, {_readable(size)}, {where}'
        write_below(self.learn, [said])
        if folder is not None:
            free = shutil.disk_usage(_nearest(folder)).free
            if free < size:
                raise OSError(
                    f'{folder} has room for {_readable(free)}, and the history may take {_readable(size)}: give '
                    'another folder, a smaller n_segments, or dtype=torch.float16'
                )

    def _claim(self):
        "Lock the folder, and make sure that what is in it is this fit's."
        fit, folder = self._fit, self._fit.stretches.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f'folder {folder} cannot be made: {e}') from None
        try:
            fit.lock = locked_for(self, self.folder)
        except InUse:
            raise InUse(
                f'another run is writing its history to {self.folder}: wait for it, or give each a folder'
            ) from None
        there = {f: remains(f) for f in [folder, *self._later_folders()]}
        for f, left in there.items():
            is_others = left.files and left.id != fit.index.id and not left.is_history_of_nothing
            if is_others and not self.overwrite:
                raise ValueError(
                    f'folder {f} holds another fit ({", ".join(left.files[:3])} ...): give another one, or pass '
                    'overwrite=True'
                )
        named = [s.file for s in fit.stretches.segments] + fit.stretches.superseded
        for f, left in there.items():
            left.remove(f, but=named if f == folder and left.id == fit.index.id else ())
        fit.index.write(fit.stretches)  # from now on what is written there is known to be of this fit

    def _later_folders(self) -> list[Path]:
        "Those of the fits that would come after this one."
        res = []
        number = self._n_fits + 2
        while folder_of_fit(self.folder, number).is_dir():
            res.append(folder_of_fit(self.folder, number))
            number += 1
        return res

    # points and stretches

    def _add_point(self):
        fit = self._fit
        fit.running.update(unwrap(self.learn.model))
        fit.open.wanted += self._wanted()
        if fit.open.wanted >= 1 - 1e-9:
            self._cut()
            if self._is_to_be_written():
                self._write()

    def _n_batches(self) -> int:
        "That the epoch under way has trained on; within a batch without that."
        return self.learn.train_iter - self._fit.train_iter_before

    def _wanted(self) -> float:
        "Segments wanted for the batches since the last point."
        fit, learn = self._fit, self.learn
        per_epoch = fit.n_batches_an_epoch or learn.n_iter
        n_batches = self._n_batches()
        n_left = per_epoch * (fit.index.n_epoch - fit.epoch - 1) + max(0, per_epoch - n_batches - 1)
        place = fit.n_batches_before + n_batches + 1
        cuts = fit.stretches.cuts
        cuts.n_batches = place + n_left
        res = sum(cuts.wanted(n_left + i) for i in range(place - fit.place))
        fit.place = place
        return res

    def _cut(self):
        "The stretch under way ends."
        fit = self._fit
        with uninterrupted():
            is_finite = fit.stretches.add(self._open_segment(), _on_host(fit.running))
            fit.open = Segment(0, 0.0)
            fit.running.n_averaged = 0  # the next point is taken whole
        if not is_finite:
            self._say_infinite()

    def _open_segment(self) -> Segment:
        fit = self._fit
        fit.open.n = fit.running.n_averaged
        return fit.open

    def _is_to_be_written(self) -> bool:
        "Now, and not at the end of the epoch: would it cost little, or is too much waiting?"
        fit = self._fit
        stretches = fit.stretches
        if self.folder is None or not stretches.keeps_means:
            return False
        if stretches.n_bytes_in_memory > _PENDING:
            return True
        cost = writing_seconds(stretches.n_in_memory, stretches.n_bytes_in_memory, fit.seconds_a_file)
        return cost < _LITTLE * (time.perf_counter() - fit.written_at)

    def _end_epoch(self, was_cut=True, alone=False):
        """The training part of an epoch is over.

        - `alone`: other processes, if there are any, are not asked; they may be elsewhere, as after an error.
        """
        fit = self._fit
        if not fit.is_in_epoch:
            return
        n_batches = self._n_batches()
        fit.index.taken = _with_epoch(fit.index.taken, n_batches, was_cut)
        if n_batches:
            fit.seconds_a_batch = (time.perf_counter() - fit.began_at) / n_batches
        with fit.side.attempt('closing an epoch of the weight history', 'its batch norm may be of other weights'):
            self._note_statistics(alone)
        with uninterrupted():  # what was interrupted above is done again at the end of the fit
            fit.n_batches_before += n_batches
            fit.n_batches_an_epoch = n_batches or fit.n_batches_an_epoch
            fit.is_in_epoch = False
            with fit.side.attempt('closing an epoch of the weight history', 'a stretch may go beyond it'):
                self._end_stretch_of_epoch()
        self._write()

    def _end_stretch_of_epoch(self):
        fit = self._fit
        if fit.stretches.cuts.keeps_epochs:
            if fit.running.n_averaged:
                self._cut()
            if fit.stretches.segments:
                fit.stretches.segments[-1].ends_epoch = True
        fit.index.epochs.append([fit.epoch, fit.stretches.n_points + fit.running.n_averaged])

    def _note_statistics(self, alone):
        fit = self._fit
        moved = None
        with fit.side.attempt('looking at batch norm', 'it may be of other weights'):
            if fit.watch is not None and self._n_batches():
                moved = fit.watch.moved()
        fit.watch = None
        of_all = [moved] if alone else fit.processes.gather(moved)
        fit.index.bn = following(of_all, fit.index.bn, unwrap(self.learn.model))

    def _write(self):
        "Write the means that are in memory, and the index; what fails is said, and tried again later."
        fit = self._fit
        if self.folder is None or not fit.stretches.keeps_means:
            return
        with fit.side.attempt('writing the weight history', 'it stays in memory'):
            began = time.perf_counter()
            n_files = fit.stretches.n_in_memory
            fit.stretches.write()
            fit.index.write(fit.stretches)
            fit.stretches.remove_superseded(but=fit.named_by_checkpoint)
            fit.written_at = time.perf_counter()
            if n_files:
                fit.seconds_a_file = (fit.written_at - began) / n_files

    def _close(self):
        "The fit is over."
        fit = self._fit
        if not fit.has_begun or fit.running is None:
            return
        with fit.side.attempt('closing the weight history', 'its end is missing'):
            if fit.running.n_averaged:
                self._cut()
        fit.running = None
        if not fit.stretches.segments:
            return
        of = weakref.ref(self.learn)
        if fit.stretches.keeps_means:
            self._kept = KeptFit(fit.index, fit.stretches, of, weights_of(self.learn.model))
            self._write_last()
        else:
            self._elsewhere = fit.stretches.folder, of
        self._n_fits += 1

    def _write_last(self):
        fit = self._fit
        if self.folder is None:
            return
        self._write()
        with fit.side.attempt('writing the last weights', 'they stay in memory'):
            fit.index.write_last(fit.stretches, self._kept.last)
            self._kept.last = None

    def _say_infinite(self):
        fit = self._fit
        if not fit.has_said_infinite and fit.processes.rank == 0:
            warn(f'weights in epoch {fit.epoch} are not finite: stretches with such are left out of the history')
        fit.has_said_infinite = True

    def _say_what_can_be_compared(self):
        fit, kept = self._fit, self._kept
        if kept is None:
            return
        found = candidates(kept.stretches.ends, kept.epochs, self.every)
        n = sum(kept.is_near(c.which) for c in found)
        n_bn = min(_BN_BATCHES, fit.n_batches_an_epoch) if kept.index.bn else 0
        seconds = seconds_to_choose(n, fit.seconds_of_validation, fit.seconds_a_batch, n_bn)
        is_passed = any(cb is self for cb in passed_callbacks(self.learn))
        call = 'history' if is_passed else f'learn.{self.name}'
        write_below(self.learn, [remark_on_choice(n, seconds, call)])

    # for checkpoints

    def fit_settings(self) -> dict:
        return {'n_segments': self.n_segments, 'every': self.every, 'dtype': str(self.dtype)}

    def after_checkpoint(self):
        """The checkpoint with the latest `state_dict` is written, or the fit is over and its checkpoint gone: files
        that only an older one names may go.
        """
        fit = self._fit
        if fit is not None:
            fit.named_by_checkpoint = fit.named_by_state
            stretches = fit.stretches
        elif self._kept is not None:
            stretches = self._kept.stretches
        else:
            return
        if self.folder is not None and stretches.keeps_means:
            stretches.remove_superseded(but=[] if fit is None else fit.named_by_checkpoint)

    def state_dict(self) -> dict:
        res = {'n_fits': self._n_fits, 'chosen': pack(self.chosen), 'fit': None, 'kept': None}
        if self._kept is not None:
            res['kept'] = self._kept.state_dict()
        fit = self._fit
        if fit is None:
            return res
        fit.named_by_state = _names_of_files(fit.stretches)
        segment = Segment(0, 0.0) if fit.running is None else self._open_segment()
        res['fit'] = {
            'index': fit.index.state_dict(),
            'stretches': fit.stretches.state_dict(),
            'open': [segment.n, segment.wanted],
            'running': pack(fit.running.state_dict()) if segment.n else None,
            **{name: getattr(fit, name) for name in _COUNTS},
        }
        return res

    def load_state_dict(self, state: dict):
        """Take over a `state_dict`. Raises `ValueError` if it is none, if one of its files is missing, or if the folder
        is another fit's by now.
        """
        self._n_fits = _count(state['n_fits'])
        chosen = unpack(state['chosen'])
        self.chosen = check_which(chosen) if chosen else chosen
        self._kept = None
        self._elsewhere = None
        if state['kept'] is not None:
            self._take_kept(state['kept'])
        if self._fit is not None and state['fit'] is not None:
            self._take_fit(state['fit'])

    def _take_kept(self, saved):
        "Of an earlier fit."
        folder = None if self.folder is None else folder_of_fit(self.folder, self._n_fits)
        if folder is not None and Processes(self.learn).rank:
            self._elsewhere = folder, weakref.ref(self.learn)
        else:
            self._kept = KeptFit.from_state(saved, self.every, self.n_segments, folder, self.learn)

    def _take_fit(self, saved):
        "Of the one that goes on."
        fit = self._fit
        stretches = fit.stretches
        stretches.folder = self._folder_of_fit()
        fit.index.load_state_dict(saved['index'])
        if stretches.keeps_means and stretches.folder is not None:
            if remains(stretches.folder).id not in (None, fit.index.id):
                raise ValueError(
                    f'folder {stretches.folder} holds another fit by now, not what this one wrote before it was '
                    'interrupted'
                )
        stretches.load_state_dict(saved['stretches'])
        fit.named_by_checkpoint = _names_of_files(stretches)
        n, wanted = saved['open']
        fit.open = Segment(_count(n), float(wanted))
        fit.running = self._new_mean()
        if saved['running'] is not None:
            fit.running.load_state_dict(unpack(saved['running']))
        for name in _COUNTS:
            setattr(fit, name, _count(saved[name]))
        fit.is_resumed = True

    # averages

    def _known(self) -> KeptFit:
        self.clean_up()
        if self._kept is None and self._elsewhere is not None:
            folder, of = self._elsewhere
            index, stretches = read_history(folder)
            self._kept = KeptFit(index, stretches, of)
        if self._kept is None:
            raise RuntimeError('there is no history yet: pass it to a fit, as in learn.fit(10, cbs=history)')
        return self._kept

    def _learner(self) -> Learner:
        learn = self._known().learner()
        if learn is None:
            raise RuntimeError('the learner of this history is gone: WeightHistory.load(folder, learn) gives it one')
        return learn

    def _which(self, which: dict) -> dict:
        "`which`, checked; what was chosen, if it is empty."
        if which:
            return check_which(which)
        if self.chosen is None:
            raise ValueError('say which average, such as last=.25, or call choose() first, which finds one')
        return self.chosen

    def _made(self, which: dict) -> FitAverage:
        "The average, in a module that can be lent; the latest one is kept."
        if self._cached is None or self._cached[0] != which:
            average = FitAverage.begin(self._learner(), equal, None, None)
            self._fill(average, which)
            self._cached = which, average
        return self._cached[1]

    def _fill(self, average: FitAverage, which: dict):
        "Put the weights of an average there."
        kept, learn = self._known(), self._learner()
        weights = kept.average(which)
        own = {plain_name(name): value for name, value in unwrap(learn.model).state_dict().items()}
        refuse_mismatch('the model', own, weights)
        average.running.load_state_dict({'swa_model': weights, 'n_averaged': 1, 'master': {}})
        average.bn = list(kept.index.bn)
        average.taken = Taken(*kept.index.taken)
        are_last = not which and kept.came_to_its_end  # their statistics are the last step's
        average.stale = bool(average.bn) and not are_last

    @contextmanager
    def _lent(self, average: FitAverage, which: dict, dl):
        """Within this context the learner's model has that average, which is put into `average`, with batch norm
        refreshed on `dl`.
        """
        learn = self._learner()
        self._fill(average, which)
        with average.running.lent_to(learn.model):
            if average.stale:
                refresh_bn(learn, average.bn, None, in_fit=False, dl=dl)
            yield

    def _refresh(self, learn, average):
        if not average.stale:
            return
        moments = refresh_bn(learn, average.bn, None, in_fit=False, taken=average.taken)
        for sentence in moments.remarks.values():
            warn(sentence)
        average.stale = False


def _names_of_files(stretches: Stretches) -> list[str]:
    return [s.file for s in stretches.segments if s.file is not None] + stretches.superseded


def _with_epoch(taken: list, n_batches: int, was_cut: bool) -> list:
    "What the epochs of a fit took of a loader, with one more."
    res = Taken(*taken)
    res.add(n_batches, was_cut)
    return [res.n, res.reached_end]


def _count(n) -> int:
    if not is_count(n):
        raise ValueError(f'the state of a WeightHistory has a count that is none: {n!r}')
    return n


def _on_host(running: WeightAverage) -> dict:
    "Name -> mean of each parameter, in the host's memory; tied ones share theirs."
    model = unwrap(running.swa_model)
    copies = {}
    with in_train_mode(model):
        params = named_tensors(model.named_parameters)
        for name, p in params.items():
            if id(p) not in copies:
                copies[id(p)] = running.master.get(name, p).detach().to('cpu', copy=True)
        return {name: copies[id(p)] for name, p in params.items()}


def writing_seconds(n_files: int, n_bytes: int, seconds_a_file: float | None) -> float:
    "About how long it takes to write so many files, of so many bytes together: as the last ones took, if known."
    if seconds_a_file is not None:
        return n_files * seconds_a_file
    return n_files * _SLOW_FILE + n_bytes / _SLOW_DISK


_SLOW_FILE = 1.0  # seconds
_SLOW_DISK = 1e8  # bytes a second


def _n_bytes(model, dtype, n_segments: int) -> int:
    "Of so many means, as they are stored, and of the last weights."
    means = 0
    last = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    for p in model.parameters():
        stored = torch.promote_types(p.dtype, torch.float32) if dtype is None else dtype
        means += p.numel() * (stored.itemsize if p.is_floating_point() else p.element_size())
    return n_segments * means + last


def _readable(n_bytes: float) -> str:
    for unit in ('bytes', 'KB', 'MB', 'GB'):
        if n_bytes < 1000:
            break
        n_bytes /= 1000
    else:
        unit = 'TB'
    return f'{n_bytes:.3g} {unit}'


def _nearest(folder: Path) -> Path:
    "The folder, or the nearest one above it that is there."
    while not folder.exists():
        folder = folder.parent
    return folder
