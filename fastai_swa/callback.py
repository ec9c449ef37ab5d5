"""`SWACallback`: the running average of a fit, validated beside the model in training.

What a user calls, and what is done at each event of a fit, is here; the mathematics is in `averaging`, the average and
what it is of in `fit_average`, how far the fit has come in `fit_progress`, its table in `fit_history`, the passes in
`passes`, the arguments in `arguments`, and what is said in `preflight`, `unaveraged` and `outcome`.
"""

import copy
import weakref
from contextlib import contextmanager

from fastai.learner import Learner, Recorder
from fastai.torch_core import rank_distrib
from torch import nn

from .arguments import check_average, check_cycle_len, check_name, check_swa_start, plain_cycle_len, plain_weight
from .averaging import all_finite, check_swa_model, check_weight, equal
from .batches import Taken
from .batchnorm import StatisticsWatch
from .checks import check_count
from .columns import recorder_of, write_below
from .fit_average import FitAverage, packed_points
from .fit_history import FitTable
from .fit_progress import Epoch, Fit
from .fitting import FitCallback, no_fit, passed_callbacks
from .interrupts import uninterrupted
from .journal import START
from .modules import unwrap
from .names import is_free, is_learners_own, must_stand_aside
from .outcome import Outcome, described, lines
from .packing import pack, unpack
from .passes import check_engine, provisional_batches, refresh_bn, validate_aside
from .plot import plot_history
from .preflight import (
    check_model,
    nothing_sentence,
    remarks_on_cycles,
    remarks_on_learner,
    remarks_on_points,
    remarks_on_trackers,
    validated_epochs,
)
from .processes import Processes
from .schedules import due_epochs, start_epoch
from .unaveraged import SampleWatch, beside_weights, infinite_sentence, sentences_on_moved
from .views import lending, refuse_lent
from .warn import warn
from .weights import NoSolution

__all__ = ['SWACallback']


class SWACallback(FitCallback):
    """Average the weights at the ends of epochs into `swa_model` and validate it beside the model in training.

    Training itself is left exactly as it is. The columns `swa_valid_loss` and `swa_<metric>` are added to the learner's
    table, `nan` in epochs that did not validate the average. A later fit starts a new average at its first averaged
    epoch; until then the old one stays. With `every=k` it is the weights after each k-th optimizer step that are
    averaged, and `averaged_epochs` are the epochs with such steps. Several averages are kept in one fit by callbacks of
    different names, which is then also what their columns begin with. Izmailov et al. 2018, "Averaging Weights Leads
    to Wider Optima and Better Generalization", Algorithm 1.

    All parameters of the model are averaged, and so copied, frozen ones too (`WeightAverage` says why). Parameters of
    the loss are not, nor are buffers that act as weights, such as a codebook: where training moves such, a warning
    names them.

    If averaging the weights, a pass or a validation of them fails, that is a warning, and the columns are `nan`;
    training goes on. Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used, at the
    latest before the first step.
    """

    # after the Recorder has logged the epoch, before trackers and the progress table read it
    order = Recorder.order + 5
    remove_on_fetch = True  # as the Recorder has it: not for passes aside from training
    _stateattrs = '_average', '_given', '_continued', '_fit', '_history', '_stands_aside'

    def __init__(
        self,
        swa_start=0.75,  # int: index from 0 of the first epoch averaged. float in [0, 1): that share of the fit
        swa_model: nn.Module = None,  # module to average into; default: a clean copy of the learner's model
        # int: average the weights of epoch `swa_start` and of every `cycle_len`-th after it. For cycles that grow, a
        # list of epochs, from 0, or a function that is true of them: of these, those from `swa_start` on
        cycle_len=1,
        # validate the average with its 1st, (1+f)th, (1+2f)th ... point and in the last epoch; 0: last only
        swa_eval_freq: int = 1,
        # training batches used to refresh batch norm. None: the whole training set, but within a fit, for the columns
        # and the files of SaveSWAModelCallback, its first 2,000 samples in an order of their own if it has 8,000
        bn_batches: int = None,
        weight=equal,  # function from `n_averaged` to the weight of the new point: `equal`, `ema(decay)` or another
        # average after every so many optimizer steps, from epoch `swa_start` on, instead of at the ends of epochs
        every: int = None,
        # `learn.<name>`, and what the columns begin with; several averages in one fit have different ones
        name: str = 'swa',
        # go on with this average, points and all: an earlier `SWACallback`, or a file of `SaveSWAModelCallback`
        average=None,
    ):
        self.swa_start = check_swa_start(swa_start)
        check_swa_model(swa_model)
        self.cycle_len = check_cycle_len(cycle_len)
        self.swa_eval_freq = check_count('swa_eval_freq', swa_eval_freq, least=0)
        self.bn_batches = check_count('bn_batches', bn_batches, optional=True)
        check_weight(weight)
        self.every = check_count('every', every, optional=True)
        if self.every and self.cycle_len != 1:
            raise ValueError(
                f'cycle_len={cycle_len} and every={every} exclude each other: one counts epochs, the other optimizer '
                'steps'
            )
        self.weight = weight
        self.enabled = True  # may be set to False within a fit, too: no more points then
        # `fit_swa(include_start=True)` sets it: the weights that the fit starts from are the first point
        self.include_start = False
        self._name = self._attribute = check_name(name)
        self._init_state()
        self._given = swa_model
        self._continued = average if isinstance(average, SWACallback) else check_average(average)
        self._goes_on = average is not None  # stays true when `_continued` is used up
        if swa_model is not None and isinstance(average, SWACallback) and average.swa_model is swa_model:
            raise ValueError(
                'swa_model is the module of the average that is gone on with, which stays as it is: pass another one'
            )

    def _init_state(self):
        super()._init_state()
        self._average = None  # the `FitAverage`
        self._given = None  # the user's own swa_model
        self._continued = None  # what to go on with: as given; at the first step its packed points; then `None`
        self._fit = None
        self._history = None  # `FitHistory` of the last fit of which an epoch has ended
        self._stands_aside = False  # whether it was said that this callback stands aside for another

    def __deepcopy__(self, memo):
        "With the settings and an average of its own, which is of the learner's copy where that is copied with it."
        res = super().__deepcopy__(memo)
        res._given = copy.deepcopy(self._given, memo)
        res._continued = self._continued  # is only read
        res._history = copy.deepcopy(self._history)
        if self._average is not None:
            res._average = self._average.copied(res._given, memo)
        return res

    # what a user reads and calls

    @property
    def name(self) -> str:
        "The learner's attribute for this callback: what was passed as `name`, unless that is something else there."
        if self.learn is not None:
            is_own = is_free(self.learn, self._name, self)
            self._attribute = self._name if is_own else f'other_{self._name}'
        return self._attribute

    @property
    def swa_model(self) -> nn.Module | None:
        """The module that holds the average, with plain state-dict keys; `None` (or the one passed) before the first
        averaged epoch.
        """
        return self._given if self._average is None else self._average.running.swa_model

    @property
    def n_averaged(self) -> int:
        "Number of points in the average."
        return 0 if self._average is None else self._average.running.n_averaged

    @property
    def averaged_epochs(self) -> list[int]:
        "The epochs averaged, counted from 0; where an earlier average was gone on with, those of its fit come first."
        return [] if self._average is None else list(self._average.epochs)

    def solutions(self) -> dict[str, nn.Module]:
        """The average, called 'average': so `rays`, `Curve`, `Ensemble` and `average_checkpoints` take the callback
        itself.

        No pass is made. After a fit batch norm is that of its last column, of a part of a large training set, and
        where the average was not validated, of other weights: `refresh` first, for an `Ensemble`; the others refresh
        it by themselves.
        Raises `ValueError` if nothing is averaged yet.
        """
        if self._average is None:
            raise NoSolution('average', 'has averaged nothing yet')
        return self._average.running.solutions()

    @contextmanager
    def averaged(self):
        """Within this context the learner predicts, validates, shows, saves and exports with the average; gives the
        learner.

        Nothing is copied: the learner's own model holds the average's tensors, and gets its own back at the end. Batch
        norm is refreshed first if it needs it. Raises `RuntimeError` if there is no average or the context is entered
        twice; a `fit` inside is refused with one, too. (`learn.load` inside would load into the average.)
        Interpretations made inside go on with the average outside; for other objects that keep the learner for later
        there is `views.as_lent`.
        """
        learn = self._averaged_learner('averaged')
        running = self._average.running
        with lending(learn, 'averaged()', self.averaged, self._version), running.lent_to(learn.model), no_fit(learn):
            self._refresh(learn)
            yield learn

    def _version(self):
        "What changes when `averaged()` would give another average."
        return weakref.ref(self._average.running), self.n_averaged

    def apply(self):
        """Put the average into `learn.model` for good, in place: the optimizer goes on with the same parameters.

        Raises `RuntimeError` if there is no average yet, or inside `averaged()`.
        """
        learn = self._averaged_learner('apply')
        refuse_lent(learn, 'apply()')
        self.refresh()
        self._average.running.copy_to(learn.model)

    def refresh(self):
        """Refresh the batch-norm statistics of `swa_model` now, if the weights averaged last have not had that yet, or
        within a fit alone, where a part of the training set does.
        """
        self._refresh_aside()

    def _refresh_aside(self, within: bool | None = None):
        "As `refresh`, while nothing is lent; `within`: as for `_must_refresh`."
        learn = self._averaged_learner('refresh')
        if self._must_refresh(within):
            with self._average.running.lent_to(learn.model):
                self._refresh(learn, within=within)

    def plot(self, axs=None):
        """Draw loss and each metric over the epochs of the last fit, for the model in training and for the average;
        averaged epochs marked.

        `axs`: one axes for the loss and one for each metric; made if `None`. Returns the array of axes. The callback's
        own history is drawn, whatever was done with the learner since. Raises `RuntimeError` if no fit with this
        callback, and with a Recorder, has come to the end of an epoch.
        """
        self.clean_up()
        if self._history is None:
            raise RuntimeError(
                'plot() needs a fit with this callback and with a Recorder, and there is none yet that has come to the '
                'end of an epoch'
            )
        return plot_history(self._history, axs)

    def __repr__(self):
        if self._average is None:
            start = f'epoch {self.swa_start}' if isinstance(self.swa_start, int) else f'{self.swa_start:g} of the fit'
            return f'SWACallback: nothing averaged yet; averages from {start} on'
        what = described(self.n_averaged, self.averaged_epochs, bool(self.every), self.include_start)
        return f'SWACallback: {what}; use it within `averaged()`, or put it into the learner with `apply()`'

    # the events of a fit

    def before_fit(self):
        if not self.enabled or self._must_stand_aside():
            return
        if is_learners_own(self.learn, self._name, SWACallback):
            raise ValueError(
                f'name={self._name!r} is an attribute of the learner already: give the SWACallback another name'
            )
        start = start_epoch(self.swa_start, self.n_epoch)
        fit = Fit(start, due_epochs(start, self.n_epoch, self.cycle_len))
        recorder = recorder_of(self.learn)
        if recorder is not None:
            fit.table = FitTable(recorder, self._name)
        self._fit = fit

    def before_epoch(self):
        self.unmute_trackers()
        self._fit.epoch = Epoch(self.epoch_under_way)

    def before_train(self):
        fit, epoch = self._fit, self._fit.epoch
        if not fit.has_begun:
            fit.has_begun = True
            self._look_ahead()
            if self.include_start and self.enabled and epoch.number == 0:
                self._fold_start()
        epoch.train_iter_before = self.learn.train_iter
        if epoch.number < fit.start:
            return
        epoch.is_open = True
        with fit.side.attempt(f'preparing an epoch of {self._what}', 'its batch norm may be of other weights'):
            epoch.watch = StatisticsWatch(unwrap(self.learn.model))
            if not fit.n_epochs:
                epoch.beside = SampleWatch(self._beside_weights())
        if self.enabled and (self.every or Processes(self.learn).size > 1):
            with fit.side.attempt(f'a copy of {self._what}', 'steps that are not finite cannot be taken back'):
                epoch.backup = pack(self.state_dict())  # in the host's memory

    def after_cancel_step(self):
        self._fit.epoch.step_cancelled = True  # the scaler of mixed precision skipped it

    def after_step(self):
        fit, epoch = self._fit, self._fit.epoch
        was_cancelled = epoch.step_cancelled
        epoch.step_cancelled = False
        if was_cancelled or not self.every or not self.enabled or epoch.number < fit.start:
            return
        fit.n_steps += 1
        if fit.n_steps % self.every == 0:
            self._fold()

    def after_cancel_train(self):
        self._fit.epoch.was_cut = True

    def after_train(self):
        fit, epoch = self._fit, self._fit.epoch
        epoch.trained = True
        fit.taken.add(epoch.n_batches(self.learn), epoch.was_cut)
        if not self.every and self.enabled and epoch.number in fit.due:
            self._fold(if_finite=True)
        self._end_epoch()

    def after_cancel_validate(self):
        self._fit.epoch.validation_cut = True

    def after_validate(self):
        fit, epoch = self._fit, self._fit.epoch
        is_of_another = not epoch.trained  # of a callback that validates while training goes on
        if is_of_another or fit.table is None:
            return
        epoch.validated.add(self.learn.iter + 1, epoch.validation_cut)
        is_due = fit.is_validated(self.swa_eval_freq, is_last=epoch.number == self.n_epoch - 1)
        fit.table.complete_row(self._evaluate() if is_due else [])

    def after_cancel_epoch(self):
        self._end_epoch()
        if self._fit.table is not None:
            self._fit.table.complete_row([])

    def after_epoch(self):
        fit = self._fit
        if fit.table is None:
            return
        fit.table.keep_row(fit.epoch.number, self._epochs_of_fit())
        self._history = fit.table.history
        if fit.epoch.has_failed:
            self.mute_trackers(fit.table.columns)

    def after_cancel_fit(self):
        self._end_epoch()
        if not self._fit.n_folds or not self._average.stale:
            return
        with self._fit.side.attempt(f'refreshing the batch norm of {self._what}', 'it is refreshed when it is used'):
            with self._average.running.lent_to(self.learn.model):
                self._refresh(self.learn, in_fit=True)

    def after_fit(self):
        fit = self._fit
        if fit.has_begun and not fit.n_folds and not fit.side.failures and 'finite' not in fit.said:
            taken = f'took {fit.n_steps}'
            self._say('nothing', nothing_sentence(self.swa_start, self.every, fit.start, fit.due, self.n_epoch, taken))
        if fit.n_epochs and fit.table is not None:
            with fit.side.attempt(f'saying what came of {self._what}'):
                write_below(self.learn, lines(self._outcome()))

    def over(self):
        self._end_epoch(alone=True)
        if self._average is not None:
            self._average.running.release()
        self._fit.side.conclude()

    # before the first step

    def _must_stand_aside(self) -> bool:
        "Is another callback of this name passed to the fit, while this one is attached for good?"
        others = [cb for cb in self.learn.cbs if isinstance(cb, SWACallback) and cb is not self]
        namesakes = [cb for cb in others if cb.enabled and cb._name == self._name]
        if not namesakes or not must_stand_aside(self, namesakes, self._name):
            return False
        if not self._stands_aside:
            self._stands_aside = True
            warn(f'learn.{self._name} stands aside in fits that another SWACallback of its name is passed to')
        return True

    def _look_ahead(self):
        "Say before a long fit what would only show later in it."
        fit, learn = self._fit, self.learn
        check_engine(learn)
        check_model(learn, self._given)
        self._open_continued()
        remarks = remarks_on_learner(learn, self._loss_func, self._what)
        remarks |= remarks_on_cycles(self.cycle_len, fit.due, self.n_epoch)
        remarks |= remarks_on_points(learn, self.swa_start, self.every, fit.start, fit.due)
        if 'nothing' not in remarks:
            validated = validated_epochs(fit.due, self.n_epoch, self.swa_eval_freq)
            remarks |= remarks_on_trackers(learn, fit.columns, validated, self.swa_start)
        for kind, sentence in remarks.items():
            self._say(kind, sentence)

    def _open_continued(self):
        """Read the average to go on with now: its callback may begin another one in this fit, its file be written
        again.
        """
        continued = self._continued
        if continued is None or isinstance(continued, dict):
            return
        if isinstance(continued, SWACallback):
            continued.clean_up()
            if not continued.n_averaged:
                raise ValueError('average is a SWACallback that has averaged nothing: there is nothing to go on with')
            continued = continued._average
        self._continued = packed_points(continued, self.learn.model)

    # taking points

    def _fold(self, if_finite=False):
        "Take the model in training into the average; if that fails, the average is as it was."
        fit, epoch, model = self._fit, self._fit.epoch, unwrap(self.learn.model)
        with fit.side.attempt(f'taking the weights into {self._what}', 'they are left out of it'):
            if if_finite and not all_finite(model.parameters()):
                self._say_infinite()
                return
            self._add_point(model)
            epoch.has_failed = False
            return
        # an exception has ended the attempt
        epoch.has_failed = not epoch.folded

    def _add_point(self, model):
        fit, epoch = self._fit, self._fit.epoch
        if epoch.folded:  # a further step of this epoch: the plain way, since it comes often
            self._average.running.update(model, step=(id(self.learn), self.learn.train_iter))
            self._average.stale = True
            fit.n_folds += 1
            return
        average = self._average if fit.n_folds else self._new_average()  # complete before the old one goes
        if not fit.n_folds:
            fit.n_before = 0 if fit.table is None else len(fit.table.recorder.lrs)
        with uninterrupted():
            average.running.update(model)
            average.epochs.append(epoch.number)
            average.stale = True
            self._average = average
            self._continued = None
            epoch.folded = True
            fit.n_folds += 1
            fit.n_epochs += 1

    def _fold_start(self):
        "Take the weights that the fit starts from into a new average."
        fit, model = self._fit, unwrap(self.learn.model)
        with fit.side.attempt(f'taking the weights into {self._what}', 'they are left out of it'):
            if not all_finite(model.parameters()):
                self._say_infinite()
                return
            average = self._new_average()
            with uninterrupted():
                average.running.update(model)
                self._average = average
                self._continued = None
                fit.n_folds += 1

    def _new_average(self) -> FitAverage:
        "An average without a point yet, or with those of the one that is gone on with."
        continued = self._continued if isinstance(self._continued, dict) else None
        return FitAverage.begin(self.learn, self.weight, self._given, continued)

    def _end_epoch(self, alone=False):
        """The training part of an epoch is over.

        - `alone`: other processes, if there are any, are not asked; they may be elsewhere, as after an error.
        """
        fit, epoch = self._fit, self._fit.epoch
        if not epoch.is_open:
            return
        if not epoch.trained:
            fit.taken.add(epoch.n_batches(self.learn), was_cut=True)
        gather = (lambda o: [o]) if alone else Processes(self.learn).gather
        with fit.side.attempt(f'closing an epoch of {self._what}', 'its batch norm may be of other weights'):
            self._close_epoch(gather)
        # last: what was interrupted above is done again at the end of the fit
        epoch.close()

    def _close_epoch(self, gather):
        """Take back an epoch that not all processes averaged, or of whose steps some are not finite; those of others
        stay.

        What is done follows from what all processes know, so that they gather equally often.
        """
        epoch, average = self._fit.epoch, self._average
        states = gather([epoch.folded, epoch.backup is not None])
        folded = [has_folded for has_folded, _ in states]
        can_go_back = all(has_backup for _, has_backup in states)
        if not any(folded):
            return
        if not all(folded):
            if epoch.folded and epoch.backup is not None:
                self._take_back()
        elif self.every and can_go_back and not all_finite(average.running.swa_model.parameters()):
            self._take_back()
            self._say_infinite()
        else:
            self._keep_points(gather)

    def _keep_points(self, gather):
        "The points of the epoch under way stay: what else of the model is theirs?"
        fit, epoch, average = self._fit, self._fit.epoch, self._average
        model = unwrap(self.learn.model)
        average.taken = fit.taken
        average.follow(model, gather(epoch.statistics_moved(self.learn)))
        if self._given is None and not average.has_structure_of(model):
            with fit.side.attempt(f'following a change of the model in {self._what}', 'it is still made as before'):
                average.copy_anew(self.learn, self.weight)
        if epoch.beside is not None:
            moved = epoch.beside.moved(self._beside_weights())
            for kind, sentence in sentences_on_moved(self._what, moved).items():
                self._say(kind, sentence)

    def _beside_weights(self) -> dict:
        return beside_weights(unwrap(self.learn.model), None if 'loss' in self._fit.said else self._loss_func)

    def _take_back(self):
        "The average, and what is counted, is again what it was before the epoch under way."
        epoch = self._fit.epoch
        with uninterrupted():
            self.load_state_dict(unpack(epoch.backup))
            epoch.folded = False
        epoch.has_failed = True

    # validating the average

    def _evaluate(self) -> list:
        "The values of the average's columns now; none if they cannot be had."
        fit = self._fit
        with fit.side.attempt(f'validating {self._what}', 'its columns are nan in that epoch'):
            with self._average.running.lent_to(self.learn.model):
                self._refresh(self.learn, in_fit=True)
                values = validate_aside(self.learn, taken=fit.epoch.validated)
            fit.epoch.has_failed = False
            return values
        # an exception has ended the attempt
        fit.epoch.has_failed = True
        return []

    def _must_refresh(self, within: bool | None) -> bool:
        """Does the average's batch norm need it?

        - `within`: do statistics that are provisional suffice? `None`: as long as the fit is under way.
        """
        average = self._average
        suffices = self._is_under_way if within is None else within
        return bool(average.bn) and (average.stale or average.provisional and not suffices)

    @property
    def _is_under_way(self) -> bool:
        return self._fit is not None

    def _refresh(self, learn, in_fit=False, within: bool | None = None):
        """Refresh the batch norm of `learn.model`, which holds the average, if it needs it.

        - `in_fit`: as for `refresh_bn`; `within`: as for `_must_refresh`.
        """
        average = self._average
        if not self._must_refresh(within):
            return
        n_batches = self.bn_batches
        if n_batches is None and (self._is_under_way if within is None else within):
            n_batches = provisional_batches(learn, average.taken)
        is_provisional = n_batches != self.bn_batches
        moments = refresh_bn(learn, average.bn, n_batches, in_fit, taken=average.taken, is_provisional=is_provisional)
        for kind, sentence in moments.remarks.items():
            self._say(kind, sentence)
        average.stale = False
        average.provisional = is_provisional

    # what came of it

    def _epochs_of_fit(self) -> list[int]:
        "The epochs averaged, without those gone on with."
        n = self._fit.n_epochs
        return self.averaged_epochs[-n:] if n else []

    def _outcome(self) -> Outcome:
        fit, average = self._fit, self._average
        history = fit.table.history
        history.averaged = self._epochs_of_fit()
        is_passed = any(cb is self for cb in passed_callbacks(self.learn))
        return Outcome(
            history=history,
            described=described(self.n_averaged, self.averaged_epochs, bool(self.every), self.include_start),
            call=self._name if is_passed else f'learn.{self._name}',
            n_averaged=self.n_averaged,
            by_steps=bool(self.every),
            is_new=not self._goes_on,
            has_batch_norm=bool(average.bn),
            weight=self.weight,
            lrs=fit.table.recorder.lrs,
            n_before=fit.n_before,
        )

    # its state, for checkpoints

    @property
    def key(self) -> str:
        """By what a checkpoint tells it from the fit's other averages; of 'swa' it is '0', the number that
        `walk.named_callbacks` gives the only callback of a class.
        """
        return '0' if self._name == 'swa' else self._name

    def fit_settings(self) -> dict:
        "What must not change between the parts of one fit."
        res = {name: getattr(self, name) for name in ('swa_start', 'every', 'enabled', 'bn_batches', 'swa_eval_freq')}
        res['cycle_len'] = plain_cycle_len(self.cycle_len)
        res['going on with an average'] = self._goes_on
        if self.include_start:
            res['include_start'] = True
        res[START] = start_epoch(self.swa_start, self.n_epoch)
        res['weight'] = plain_weight(self.weight)
        return res

    def state_dict(self) -> dict:
        "Average, counters and where it stands in a fit, as plain data; tensors are live."
        fit, average = self._fit, self._average
        res = {'average': None, 'epochs': [], 'bn': [], 'stale': False} if average is None else average.state_dict()
        taken = getattr(average, 'taken', None) if fit is None else fit.taken
        res |= {'fit': {}} if fit is None else fit.state_dict()
        res['taken'] = None if taken is None else [taken.n, taken.reached_end]
        res['continued'] = self._continued if isinstance(self._continued, dict) else None
        return res

    def load_state_dict(self, state: dict):
        "Take over a `state_dict`. Raises `ValueError` if its average is not one of the learner's model."
        fit = self._fit
        taken = Taken(*state['taken']) if state.get('taken') else None
        average = None
        if state['average'] is not None:
            average = self._average or self._new_average()
        with uninterrupted():
            if average is not None:
                average.load_state_dict(state, self.learn, taken)
            self._average = average
        if fit is not None:
            fit.load_state_dict(state, self._what)
            fit.due = due_epochs(fit.start, self.n_epoch, self.cycle_len)
            fit.taken = taken or Taken()
            if fit.n_folds:
                self._continued = None
        if state.get('continued'):
            self._continued = state['continued']

    # small helpers

    @property
    def _what(self) -> str:
        "In sentences to users."
        return 'the average' if self._name == 'swa' else f'the average {self._name!r}'

    def _averaged_learner(self, call) -> Learner:
        """The learner whose weights were averaged. Raises `RuntimeError`, naming `call`, if there is no average, or
        that learner is gone.
        """
        self.clean_up()
        if self._average is None:
            raise RuntimeError(
                f'{call}() needs an average and there is none yet: run a fit that reaches swa_start={self.swa_start}'
            )
        learn = self._average.learner()
        if learn is None:
            raise RuntimeError(
                f'{call}() needs the learner that was averaged, and it is gone; swa_model still holds the average'
            )
        return learn

    def _say(self, kind, sentence):
        "Warn, once in a fit."
        fit = self._fit
        if fit is not None:
            if kind in fit.said:
                return
            fit.said.add(kind)
        if not rank_distrib():  # once for all processes
            warn(sentence)

    def _say_infinite(self):
        self._say('finite', infinite_sentence(self._fit.epoch.number, bool(self.every)))
