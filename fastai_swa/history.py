"""`WeightHistory`: the weights of a fit as means of consecutive stretches, so that any average of them
can be had when the fit is over.

When a point is taken and where a stretch ends is here; how much a point weighs in an average is in
`weightings`, the means and their files are in `stretches`, choosing between averages in `choosing`.
"""

import secrets
import shutil
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fastai.learner import Learner, Recorder

from .averaging import WeightAverage, all_finite, equal
from .batchnorm import StatisticsWatch, tracked_bn
from .checks import check_count
from .choosing import candidates, choose, plot_choice
from .files import InUse, Lock
from .fit_average import FitAverage
from .fitting import FitCallback, SideWork, locked_for, no_fit
from .modules import clean_copy, in_train_mode, named_tensors, unwrap
from .packing import pack, unpack
from .passes import check_engine, refresh_bn
from .processes import Processes
from .stretches import FoldersIndex, Stretches, read_history, read_last, remains
from .views import lending
from .walk import not_copied
from .warn import warn
from .weightings import Cuts, Segment, called, check_which, coefficients, missed, weighting
from .weights import NoSolution, weights_of

__all__ = ['WeightHistory']

_BLOCK = 16  # points in a row that are summed in float32: the mean is then right to a few units in the last place
_PENDING = 2**28  # bytes of finished stretches that may wait in memory for the end of an epoch
_FAR = 0.05  # share of an average's way from the last weights, from which on missing it is said
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
    n_batches: int = 0  # trained in this epoch so far
    n_batches_before: int = 0  # in the epochs before
    n_batches_an_epoch: int = 0  # in the one before; 0: there was none
    place: int = 0  # batches of the fit up to the last point
    step_cancelled: bool = False  # was the optimizer step under way left out?
    watch: StatisticsWatch | None = None  # on the statistics of batch norm
    has_said_infinite: bool = False
    named_by_state: list = field(default_factory=list)  # the files that the latest `state_dict` names
    named_by_checkpoint: list = field(default_factory=list)  # those that a checkpoint names which was written


@dataclass
class _Done:
    "A fit that is over."

    index: FoldersIndex
    stretches: Stretches
    learner: weakref.ref
    last: dict | None = None  # the last weights and buffers, in the host's memory; `None`: in the folder

    def last_weights(self) -> dict:
        """Name -> tensor. Of a fit that was killed there are none, and the learner's stand for them."""
        if self.last is not None:
            return self.last
        if self.index.last is not None:
            return read_last(self.stretches.folder, self.index.last)
        return weights_of(self.learner().model)

    def weighting(self, which: dict):
        return weighting(which, self.stretches.n_points, self.index.epochs, self.index.every)

    def missed(self, which: dict) -> float:
        return missed(self.weighting(which), self.stretches.ends) if which else 0.0

    # for checkpoints: a fit before the one that goes on

    def state_dict(self) -> dict:
        return {'index': dict(vars(self.index)), 'stretches': self.stretches.state_dict(), 'last': self.last}

    @classmethod
    def from_state(cls, state: dict, folder: Path | None, learn: Learner) -> '_Done':
        index = FoldersIndex(**state['index'])
        stretches = Stretches(Cuts(index.n_segments, index.n_epoch, None), folder)
        stretches.load_state_dict(state['stretches'])
        return cls(index, stretches, weakref.ref(learn), state['last'])


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
      stretch; else files: `n_segments + 1` times the size of the weights, which is said before the first
      step.
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
    _stateattrs = '_fit', '_done', '_cached', 'chosen', 'table', '_n_fits'

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
        self.dtype = dtype
        self._init_state()

    def _init_state(self):
        super()._init_state()
        self._fit = None
        self._done = None  # the `_Done` of the latest fit
        self._cached = None  # which average was made last, and the `FitAverage`
        self._n_fits = 0  # so far
        self.chosen = None  # the keywords of the average that `choose` found; {}: the last weights
        self.table = None  # what `choose` compared

    @classmethod
    def load(cls, folder, learn: Learner) -> 'WeightHistory':
        """The history in `folder`, or the latest one where several fits wrote there, for the model and data of
        `learn`.

        Raises `FileNotFoundError` or `ValueError`, naming it, if there is none that can be read; files of means are
        looked at when they are used.
        """
        folder = Path(folder).resolve()
        number = 1
        while _folder_of(folder, number + 1).is_dir():
            number += 1
        index, stretches = read_history(_folder_of(folder, number))
        res = cls(folder, index.n_segments, index.every)
        res._n_fits = number
        res._done = _Done(index, stretches, weakref.ref(learn))
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
        done = self._known()
        which = self._which(which)
        if not which:
            return dict(done.last_weights())
        far = done.missed(which)
        if far > _FAR:
            warn(
                f'{called(which)} is missed by about {100 * far:.0f} % of its way from the last weights: a larger '
                'n_segments keeps more of the fit',
            )
        return self._average(done, which)

    def error(self, **which) -> float:
        """How far the kept means miss an average, as a share of its way from the last weights, if the weights walked at
        random: 0 for a mean of whole stretches. Arguments and errors as for `average`.
        """
        done = self._known()
        return done.missed(self._which(which))

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
        if self._done is None or self.chosen is None:
            raise NoSolution('average', 'is not chosen yet: call choose(), or pass history.average(last=.25)')
        return {'average': self.average()}

    def __repr__(self):
        if self._done is None:
            where = 'the host\'s memory' if self.folder is None else str(self.folder)
            return f'WeightHistory: nothing kept yet; up to {self.n_segments} means in {where}'
        done = self._done
        chosen = '' if self.chosen is None else f'; chosen: {called(self.chosen)}'
        return (
            f'WeightHistory: {done.stretches.n_points} points in {len(done.stretches.segments)} means, '
            f'{len(done.index.epochs)} epochs{chosen}; use it within `averaged(last=.25)`, or let `choose()` find one'
        )

    def choose(
        self,
        by: str = 'valid_loss',  # column to choose by: the loss, or a metric of the learner
        dl=None,  # loader of the samples to choose on; default: the validation set
        bn_batches: int = 20,  # training batches that batch norm is refreshed on, the same for all averages
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

        Sets `chosen`, which `averaged()`, `apply()` and `average()` take from then on, and says it. The learner, random
        generators and recorder stay as they were. Raises `ValueError` for a column that is not there or without a
        validation set, `RuntimeError` before any fit, or in several processes.
        """
        done, learn = self._known(), self._learner()
        check_count('bn_batches', bn_batches, optional=True)
        if Processes(learn).size > 1:
            raise RuntimeError('choose() validates in one process: call it outside of distrib_ctx')
        found = candidates(done.stretches.ends, done.index.epochs, self.every, ends)
        found = [c for c in found if done.missed(c.which) <= _FAR]
        with done.stretches.cached():
            self.table, best, sentence = choose(learn, found, self._lent, by, dl, bn_batches, comp)
        self.chosen = best
        print(sentence)
        return self.table

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
        processes = Processes(self.learn)
        index = FoldersIndex(
            processes.first(secrets.token_hex, 8), self.every, n_segments=self.n_segments, n_epoch=self.learn.n_epoch
        )
        stretches = Stretches(Cuts(self.n_segments, self.learn.n_epoch, None), self._folder_of_fit(), self.dtype)
        self._fit = _Fit(processes, index, stretches)

    def before_epoch(self):
        self._fit.epoch = self.epoch_under_way

    def before_train(self):
        fit, learn = self._fit, self.learn
        if not fit.has_begun:
            self._begin_first_epoch()
        fit.is_in_epoch = True
        fit.n_batches = 0
        with fit.side.attempt('preparing an epoch of the weight history', 'its batch norm may be of other weights'):
            fit.watch = StatisticsWatch(unwrap(learn.model))

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
        if self.training:
            self._fit.n_batches += 1

    def after_train(self):
        self._end_epoch()

    def after_cancel_epoch(self):
        self._end_epoch()

    def over(self):
        fit = self._fit
        self._end_epoch()
        try:
            if fit.has_begun and fit.running is not None:
                with fit.side.attempt('closing the weight history', 'its end is missing'):
                    self._close()
        finally:
            if fit.lock is not None:
                fit.lock.release()
            fit.side.conclude()

    # before the first step

    def _begin_first_epoch(self):
        fit, learn = self._fit, self.learn
        fit.has_begun = True
        check_engine(learn)
        if fit.running is None:
            fit.running = self._new_mean()
        if fit.processes.rank == 0:
            self._say_size()
        if self.folder is not None:
            fit.processes.first(self._claim)
        self._forget()

    def _forget(self):
        "Of an earlier fit."
        self._done = None
        self._cached = None
        self.chosen = None
        self.table = None

    def _new_mean(self) -> WeightAverage:
        model = unwrap(self.learn.model)
        res = WeightAverage(model, equal, clean_copy(model, not_copied(self.learn)))
        res.block_len = _BLOCK
        return res

    def _folder_of_fit(self) -> Path | None:
        return None if self.folder is None else _folder_of(self.folder, self._n_fits + 1)

    def _say_size(self):
        "How much the history may take. Raises `OSError` if the disk has less."
        fit = self._fit
        if fit.is_resumed:
            return
        size = (self.n_segments + 1) * _n_bytes(unwrap(self.learn.model), self.dtype)
        folder = fit.stretches.folder
        where = 'in the host\'s memory' if folder is None else f'in {folder}'
        print(f'WeightHistory: up to {self.n_segments + 1} sets of weights, {_readable(size)}, {where}')
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
            fit.lock = locked_for(self, folder)
        except InUse:
            raise InUse(f'another run is writing its history to {folder}: wait for it, or give each a folder') from None
        there = remains(folder)
        if there.files and there.id != fit.index.id:
            if not self.overwrite:
                raise ValueError(
                    f'folder {folder} holds another fit ({", ".join(there.files[:3])} ...): give another one, or pass '
                    'overwrite=True'
                )
            there.remove(folder)
        if fit.is_resumed:
            there.remove(folder, but=[s.file for s in fit.stretches.segments] + fit.stretches.superseded)
        fit.index.write(fit.stretches)  # from now on what is written there is known to be of this fit

    # points and stretches

    def _add_point(self):
        fit = self._fit
        fit.running.update(unwrap(self.learn.model))
        fit.open.n += 1
        fit.open.wanted += self._wanted()
        if fit.open.wanted >= 1 - 1e-9:
            self._cut()

    def _wanted(self) -> float:
        "Segments wanted for the batches since the last point."
        fit, learn = self._fit, self.learn
        per_epoch = fit.n_batches_an_epoch or learn.n_iter
        n_left = per_epoch * (fit.index.n_epoch - fit.epoch - 1) + max(0, per_epoch - fit.n_batches - 1)
        place = fit.n_batches_before + fit.n_batches + 1
        cuts = fit.stretches.cuts
        cuts.n_batches = place + n_left
        res = sum(cuts.wanted(n_left + i) for i in range(place - fit.place))
        fit.place = place
        return res

    def _cut(self):
        "The stretch under way ends."
        fit = self._fit
        mean = _on_host(fit.running)
        if not all_finite(mean.values()):
            mean = None
            self._say_infinite()
        fit.stretches.add(fit.open, mean)
        fit.open = Segment(0, 0.0)
        fit.running.n_averaged = 0  # the next point is taken whole
        if self.folder is not None and fit.stretches.n_bytes_in_memory > _PENDING:
            self._write()

    def _end_epoch(self):
        fit = self._fit
        if not fit.is_in_epoch:
            return
        fit.is_in_epoch = False
        fit.n_batches_before += fit.n_batches
        fit.n_batches_an_epoch = fit.n_batches or fit.n_batches_an_epoch
        with fit.side.attempt('closing an epoch of the weight history', 'its batch norm may be of other weights'):
            self._note_statistics()
        with fit.side.attempt('closing an epoch of the weight history', 'a stretch may go beyond it'):
            if fit.stretches.cuts.keeps_epochs:
                if fit.open.n:
                    self._cut()
                if fit.stretches.segments:
                    fit.stretches.segments[-1].ends_epoch = True
            fit.index.epochs.append([fit.epoch, fit.stretches.n_points + fit.open.n])
            if self.folder is not None:
                self._write()

    def _note_statistics(self):
        fit = self._fit
        model = unwrap(self.learn.model)
        moved = fit.watch.moved() if fit.watch is not None and fit.n_batches else None
        fit.watch = None
        if moved is not None:
            fit.index.bn = moved
        elif not fit.index.bn:
            fit.index.bn = list(tracked_bn(model))

    def _write(self):
        "Write the means that are in memory, and the index; what fails is said, and tried again later."
        fit = self._fit
        with fit.side.attempt('writing the weight history', 'it stays in memory'):
            if fit.processes.rank:
                fit.stretches.leave_to_first()
                return
            fit.stretches.write()
            fit.index.write(fit.stretches)
            fit.stretches.remove_superseded(but=fit.named_by_checkpoint)

    def _close(self):
        "The fit is over."
        fit = self._fit
        if fit.open.n:
            self._cut()
        fit.running = None
        if not fit.stretches.segments:
            return
        last = weights_of(self.learn.model)
        fit.named_by_checkpoint = []
        if self.folder is not None:
            self._write()
            with fit.side.attempt('writing the last weights', 'they stay in memory'):
                if fit.processes.rank == 0:
                    fit.index.write_last(fit.stretches, last)
                last = None
        self._done = _Done(fit.index, fit.stretches, weakref.ref(self.learn), last)
        self._n_fits += 1

    def _say_infinite(self):
        fit = self._fit
        if not fit.has_said_infinite and fit.processes.rank == 0:
            warn(
                f'weights in epoch {fit.epoch} are not finite: stretches with such are left out of the history',
            )
        fit.has_said_infinite = True

    # for checkpoints

    def fit_settings(self) -> dict:
        return {'n_segments': self.n_segments, 'every': self.every, 'dtype': str(self.dtype)}

    def after_checkpoint(self):
        "The checkpoint with the latest `state_dict` is written: files that only an older one names may go."
        fit = self._fit
        if fit is not None:
            fit.named_by_checkpoint = fit.named_by_state
            if self.folder is not None and fit.processes.rank == 0:
                fit.stretches.remove_superseded(but=fit.named_by_checkpoint)

    def state_dict(self) -> dict:
        res = {'n_fits': self._n_fits, 'chosen': pack(self.chosen), 'fit': None, 'done': None}
        if self._done is not None:
            res['done'] = self._done.state_dict()
        fit = self._fit
        if fit is None:
            return res
        fit.named_by_state = [s.file for s in fit.stretches.segments if s.file]
        fit.named_by_state += fit.stretches.superseded
        res['fit'] = {
            'index': dict(vars(fit.index)),
            'stretches': fit.stretches.state_dict(),
            'open': [fit.open.n, fit.open.wanted],
            'running': pack(fit.running.state_dict()) if fit.open.n else None,
            **{name: getattr(fit, name) for name in _COUNTS},
        }
        return res

    def load_state_dict(self, state: dict):
        """Take over a `state_dict`. Raises `ValueError` if one of its files is missing, or the folder is another fit's
        by now.
        """
        self._n_fits = state['n_fits']
        self.chosen = unpack(state['chosen'])
        self._done = None
        if state['done'] is not None:
            folder = None if self.folder is None else _folder_of(self.folder, self._n_fits)
            self._done = _Done.from_state(state['done'], folder, self.learn)
        fit, saved = self._fit, state['fit']
        if fit is None or saved is None:
            return
        fit.stretches.folder = self._folder_of_fit()
        n_epoch = fit.index.n_epoch
        vars(fit.index).update(saved['index'])
        fit.index.n_epoch = n_epoch  # it may be a longer fit by now
        self._refuse_foreign(fit.stretches.folder, fit.index.id)
        fit.stretches.load_state_dict(saved['stretches'])
        fit.open = Segment(*saved['open'])
        fit.running = self._new_mean()
        if saved['running'] is not None:
            fit.running.load_state_dict(unpack(saved['running']))
        for name in _COUNTS:
            setattr(fit, name, saved[name])
        fit.is_resumed = True

    def _refuse_foreign(self, folder, fit_id):
        if folder is not None and remains(folder).id not in (None, fit_id):
            raise ValueError(
                f'folder {folder} holds another fit by now, not what this one wrote before it was interrupted'
            )

    # averages

    def _known(self) -> '_Done':
        self.clean_up()
        if self._done is None:
            raise RuntimeError('there is no history yet: pass it to a fit, as in learn.fit(10, cbs=history)')
        return self._done

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

    def _average(self, done, which) -> dict:
        res = dict(done.last_weights())
        shares = coefficients(done.weighting(which), done.stretches.ends)
        dtypes = {name: t.dtype for name, t in res.items() if isinstance(t, torch.Tensor)}
        mean, lost = done.stretches.average(shares, dtypes)
        if lost > 1e-9:
            warn(
                f'{100 * lost:.0f} % of {called(which)} is of weights that were not finite, and left out',
            )
        return res | mean

    def _made(self, which: dict) -> FitAverage:
        "The average, in a module that can be lent; the latest one is kept."
        key = called(which)
        if self._cached is None or self._cached[0] != key:
            done, learn = self._known(), self._learner()
            average = FitAverage.begin(learn, equal, None, None)
            state = self._average(done, which) if which else dict(done.last_weights())
            average.running.load_state_dict({'swa_model': state, 'n_averaged': 1, 'master': {}})
            average.bn = list(done.index.bn)
            average.stale = bool(average.bn) and bool(which)  # of the last weights they are the last step's
            self._cached = key, average
        return self._cached[1]

    @contextmanager
    def _lent(self, which: dict, dl):
        "Within this context the learner's model has that average, with batch norm refreshed on `dl`."
        learn = self._learner()
        average = self._made(which)
        with average.running.lent_to(learn.model):
            if average.stale:
                refresh_bn(learn, average.bn, None, in_fit=False, dl=dl)
            yield

    def _refresh(self, learn, average):
        if not average.stale:
            return
        moments = refresh_bn(learn, average.bn, None, in_fit=False)
        for sentence in moments.remarks.values():
            warn(sentence)
        average.stale = False


def _folder_of(folder: Path, number: int) -> Path:
    "Where the fit of that number, from 1, keeps its files."
    return folder if number == 1 else folder / f'fit-{number}'


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


def _n_bytes(model, dtype) -> int:
    "Of a set of weights."
    sizes = [
        p.element_size() if dtype is None or not p.is_floating_point() else dtype.itemsize for p in model.parameters()
    ]
    return sum(p.numel() * size for p, size in zip(model.parameters(), sizes))


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
