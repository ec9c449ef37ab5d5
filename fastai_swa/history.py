"""`WeightHistory`: the weights of a fit as means of consecutive stretches, so that any average of them
can be had when the fit is over.

When a point is taken and where a stretch ends is in `history_fit`; how much a point weighs in an average in
`weightings`, the means and their files in `stretches`, choosing between averages in `choosing`.
"""

import secrets
import weakref
from contextlib import contextmanager
from pathlib import Path

import torch
from fastai.learner import Learner, Recorder

from .batches import Taken
from .checks import check_count
from .choosing import candidates, choose, plot_choice, remark_on_choice, seconds_to_choose
from .columns import write_below
from .files import InUse, Lock
from .fitting import FitCallback, locked_for, passed_callbacks
from .history_fit import HistoryFit, count_of_state
from .history_folder import check_room, claim, later_folders, make_folder, n_bytes_of, readable_size
from .kept_fit import KeptFit, folder_of_fit
from .modules import unwrap
from .one_model import OneModel
from .packing import pack, unpack
from .passes import check_engine
from .processes import Processes
from .stretches import FoldersIndex, Stretches, read_history
from .warn import warn
from .weightings import Cuts, called, check_which
from .weights import NoSolution, weights_of

__all__ = ['WeightHistory']

_BN_BATCHES = 20  # that `choose` refreshes batch norm on


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
        self._cached = None  # which average was made last, and the `OneModel`
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
        with self._made(self._which(which)).averaged() as learn:
            yield learn

    def apply(self, **which):
        "Put an average, named as for `average`, into `learn.model` for good, in place, batch norm refreshed."
        self._made(self._which(which)).apply()

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
        model = OneModel(learn)

        def lent(which, training):
            return self._filled(model, which).lent(training)

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
        self._fit = HistoryFit(learn, processes, index, stretches)

    def before_epoch(self):
        self._fit.epoch = self.epoch_under_way

    def before_train(self):
        if not self._fit.has_begun:
            self._begin_first_epoch()
        self._fit.begin_epoch()

    def after_cancel_step(self):
        self._fit.step_cancelled = True  # the scaler of mixed precision skipped it

    def after_step(self):
        self._fit.end_step()

    def after_batch(self):
        if not self.training:
            self._fit.end_validation_batch()

    def after_cancel_train(self):
        self._fit.was_cut = True

    def after_train(self):
        self._fit.end_epoch(self._fit.was_cut)

    def before_validate(self):
        self._fit.begin_validation()

    def after_cancel_validate(self):
        self._fit.validation_cut = True

    def after_validate(self):
        self._fit.end_validation()

    def after_cancel_epoch(self):
        self._fit.end_epoch()

    def after_fit(self):
        fit = self._fit
        fit.end_epoch()
        self._close()
        fit.processes.gather(None)  # what the first one has written can be read by the others now
        with fit.side.attempt('saying what the weight history can do'):
            self._say_what_can_be_compared()

    def over(self):
        fit = self._fit
        fit.end_epoch(alone=True)
        try:
            self._close()
        finally:
            if fit.lock is not None:
                fit.lock.release()
            fit.side.conclude()

    def _begin_first_epoch(self):
        check_engine(self.learn)
        self._fit.processes.first(self._prepare)
        self._fit.begin()
        # those of an earlier fit
        self._kept = None
        self._elsewhere = None
        self._cached = None
        self.chosen = None
        self.table = None

    def _folder_of_fit(self) -> Path | None:
        return None if self.folder is None else folder_of_fit(self.folder, self._n_fits + 1)

    def _prepare(self):
        "Say how much the history may take, and make sure that its folder is its own."
        fit, folder = self._fit, self._fit.stretches.folder
        if not fit.is_resumed:
            size = n_bytes_of(unwrap(self.learn.model), self.dtype, self.n_segments)
            where = 'in the host\'s memory' if folder is None else f'in {folder}'
            said = f'WeightHistory: up to {self.n_segments + 1} sets of weights, {readable_size(size)}, {where}'
            write_below(self.learn, [said])
            if folder is not None:
                check_room(folder, size)
        if folder is None:
            return
        make_folder(folder)
        fit.lock = self._locked()
        later = later_folders(self.folder, self._n_fits + 1)
        claim(fit.index, fit.stretches, later, self.overwrite, fit.named_files())

    def _locked(self) -> Lock:
        try:
            return locked_for(self, self.folder)
        except InUse:
            raise InUse(
                f'another run is writing its history to {self.folder}: wait for it, or give each a folder'
            ) from None

    def _close(self):
        "The fit is over."
        fit = self._fit
        if not fit.close():
            return
        of = weakref.ref(self.learn)
        if fit.stretches.keeps_means:
            self._kept = KeptFit(fit.index, fit.stretches, of, weights_of(self.learn.model))
            if fit.write_last(self._kept.last):
                self._kept.last = None
        else:
            self._elsewhere = fit.stretches.folder, of
        self._n_fits += 1

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
        return {
            'n_fits': self._n_fits,
            'chosen': pack(self.chosen),
            'fit': None if self._fit is None else self._fit.state_dict(),
            'kept': None if self._kept is None else self._kept.state_dict(),
        }

    def load_state_dict(self, state: dict):
        """Take over a `state_dict`. Raises `ValueError` if it is none, if one of its files is missing, or if the folder
        is another fit's by now.
        """
        self._n_fits = count_of_state(state['n_fits'])
        chosen = unpack(state['chosen'])
        self.chosen = check_which(chosen) if chosen else chosen
        self._kept = None
        self._elsewhere = None
        if state['kept'] is not None:
            self._take_kept(state['kept'])
        if self._fit is not None and state['fit'] is not None:
            self._fit.stretches.folder = self._folder_of_fit()
            self._fit.load_state_dict(state['fit'])

    def _take_kept(self, saved):
        "Of an earlier fit."
        folder = None if self.folder is None else folder_of_fit(self.folder, self._n_fits)
        if folder is not None and Processes(self.learn).rank:
            self._elsewhere = folder, weakref.ref(self.learn)
        else:
            self._kept = KeptFit.from_state(saved, self.every, self.n_segments, folder, self.learn)

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

    def _made(self, which: dict) -> OneModel:
        "The average, in a module that can be lent; the latest one is kept."
        if self._cached is None or self._cached[0] != which:
            self._cached = which, self._filled(OneModel(self._learner()), which)
        return self._cached[1]

    def _filled(self, model: OneModel, which: dict) -> OneModel:
        "`model` with the weights of an average."
        kept = self._known()
        are_last = not which and kept.came_to_its_end  # their statistics are the last step's
        return model.fill(kept.average(which), kept.index.bn, Taken(*kept.index.taken), are_fresh=are_last)
