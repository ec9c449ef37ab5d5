"""`SWACallback`: the running average of a fit, validated beside the model in training.

When to average, and what to do if that fails, is here; the mathematics is in `averaging`, the average and what it is of
in `fit_average`, the passes in `passes`, what is said before the first step in `preflight`. Below it stands
`SaveSWAModelCallback`, which saves the average at its best.
"""

import copy
import keyword
import weakref
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

from fastai.callback.core import Callback
from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner, Recorder
from fastai.torch_core import join_path_file, rank_distrib
from torch import nn

from .aside import LOOP
from .averaging import all_finite, check_swa_model, check_weight, equal
from .batches import Taken
from .batchnorm import StatisticsWatch, tracked_bn, union
from .checks import check_count, check_known
from .columns import complete_row, insert_columns, recorder_of, write_below
from .files import save_weights
from .fit_average import FitAverage, refuse_another_model, state_in_file, weights_with_points
from .fit_history import FitHistory
from .fitting import FitCallback, SideWork, no_fit, passed_callbacks
from .interrupts import uninterrupted
from .journal import START
from .modules import unwrap
from .outcome import Outcome, lines
from .packing import pack, unpack
from .passes import check_engine, refresh_bn, validate_aside
from .plot import plot_history
from .preflight import (
    check_model,
    most_steps,
    remarks_on_cycles,
    remarks_on_data,
    remarks_on_loss,
    remarks_on_model,
    remarks_on_trackers,
    validated_epochs,
)
from .processes import Processes
from .schedules import cycle_ends, due_epochs, start_epoch
from .unaveraged import SampleWatch, buffers_sentence, loss_parameters, loss_sentence, weightlike_buffers
from .views import lending
from .warn import warn
from .weights import NoSolution

__all__ = ['SWACallback', 'SaveSWAModelCallback', 'is_learners_own']

_SAVED = 'start', 'n_folds', 'n_epochs', 'n_steps', 'n_before'  # fields of `_Fit` that are in checkpoints
_N_COMPARED = 1001  # functions given as `weight` and `cycle_len` are compared by their values at so many points


@dataclass
class _Epoch:
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


@dataclass
class _Fit:
    "A fit under way."

    start: int  # the first epoch that may be averaged
    due: list  # the epochs that are, if they come to their ends
    n_own: int = 0  # the columns of the table before those of the average
    columns: list = field(default_factory=list)  # those of the average; none without a Recorder
    history: FitHistory = None  # the table so far; `None` without a Recorder
    n_folds: int = 0  # points taken into the average
    n_epochs: int = 0  # epochs with such
    n_steps: int = 0  # optimizer steps since `start`
    n_before: int = 0  # batches before the first point, by the Recorder
    taken: Taken = field(default_factory=Taken)  # training batches of its epochs
    has_begun: bool = False  # is its first training epoch under way, or behind it?
    side: SideWork = field(default_factory=SideWork)
    said: set = field(default_factory=set)  # kinds of warnings that were given
    epoch: _Epoch = field(default_factory=lambda: _Epoch(-1))  # the one under way


class SWACallback(FitCallback):
    """Average the weights at the ends of epochs into `swa_model` and validate it beside the model
    in training.

    Training itself is left exactly as it is. The columns `swa_valid_loss` and `swa_<metric>` are
    added to the learner's table, `nan` in epochs that did not validate the average. A later fit
    starts a new average at its first averaged epoch; until then the old one stays. With `every=k` it is the
    weights after each k-th optimizer step that are averaged, and `averaged_epochs` are the epochs
    with such steps. Several averages are kept in one fit by callbacks of different `name`s, which
    is then also what their columns begin with. Izmailov et al. 2018, "Averaging Weights Leads to
    Wider Optima and Better Generalization", Algorithm 1.

    All parameters of the model are averaged, and so copied, frozen ones too (`WeightAverage` says
    why). Parameters of the loss are not, nor are buffers that act as weights, such as a codebook:
    where training moves such, a warning names them.

    If averaging the weights, a pass or a validation of them fails, that is a warning, and the
    columns are `nan`; training goes on. Raises `TypeError` or `ValueError`, naming the
    argument, for one that cannot be used, at the latest before the first step.
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
        bn_batches: int = None,  # training batches used to refresh batch norm; None: the whole training set
        weight=equal,  # function from `n_averaged` to the weight of the new point: `equal`, `ema(decay)` or another
        # average after every so many optimizer steps, from epoch `swa_start` on, instead of at the ends of epochs
        every: int = None,
        # `learn.<name>`, and what the columns begin with; several averages in one fit have different ones
        name: str = 'swa',
        # go on with this average, points and all: an earlier `SWACallback`, or a file of `SaveSWAModelCallback`
        average=None,
    ):
        self.swa_start = _check_swa_start(swa_start)
        check_swa_model(swa_model)
        self.cycle_len = _check_cycle_len(cycle_len)
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
        self._name = self._attribute = check_name(name)
        self._init_state()
        self._given = swa_model
        self._continued = _check_average(average)
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
        if self._average is not None:
            res._average = self._average.copied(res._given, memo)
        return res

    # what a user reads and calls

    @property
    def name(self) -> str:
        """The learner's attribute for this callback: what was passed as `name`, unless that is
        something else there.
        """
        if self.learn is not None:
            there = vars(self.learn).get(self._name, self)
            is_free = (there is self or _is_from_an_export(there)) and not is_learners_own(self.learn, self._name)
            self._attribute = self._name if is_free else f'other_{self._name}'
        return self._attribute

    @property
    def swa_model(self) -> nn.Module | None:
        """The module that holds the average, with plain state-dict keys; `None` (or the one passed)
        before the first averaged epoch.
        """
        return self._given if self._average is None else self._average.running.swa_model

    @property
    def n_averaged(self) -> int:
        "Number of points in the average."
        return 0 if self._average is None else self._average.running.n_averaged

    @property
    def averaged_epochs(self) -> list[int]:
        """The epochs averaged, counted from 0; where an earlier average was gone on with, those of
        its fit come first.
        """
        return [] if self._average is None else list(self._average.epochs)

    def solutions(self) -> dict[str, nn.Module]:
        """The average, called 'average': so `rays`, `Curve`, `Ensemble` and `average_checkpoints` take
        the callback itself.

        No pass is made. Where the fit ended without a validation of the average, its batch norm is
        of other weights: `refresh` first, for an `Ensemble`; the others refresh it by themselves.
        Raises `ValueError` if nothing is averaged yet.
        """
        if self._average is None:
            raise NoSolution('average', 'has averaged nothing yet')
        return self._average.running.solutions()

    @contextmanager
    def averaged(self):
        """Within this context the learner predicts, validates, shows, saves and exports with the
        average; gives the learner.

        Nothing is copied: the learner's own model holds the average's tensors, and gets its own
        back at the end. Batch norm is refreshed first if it needs it. Raises `RuntimeError` if
        there is no average or the context is entered twice; a `fit` inside is refused with one,
        too. (`learn.load` inside would load into the average.) Interpretations made inside go on
        with the average outside; for other objects that keep the learner for later there is
        `views.as_lent`.
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
        """Put the average into `learn.model` for good, in place: the optimizer goes on with the
        same parameters.

        Raises `RuntimeError` if there is no average yet, or inside `averaged()`.
        """
        learn = self._averaged_learner('apply')
        self.refresh()
        self._average.running.copy_to(learn.model)

    def refresh(self):
        """Refresh the batch-norm statistics of `swa_model` now, if the weights averaged last have not
        had that yet.
        """
        learn = self._averaged_learner('refresh')
        if self._average.stale:
            with self._average.running.lent_to(learn.model):
                self._refresh(learn)

    def plot(self, axs=None):
        """Draw loss and each metric over the epochs of the last fit, for the model in training and for the
        average; averaged epochs marked.

        `axs`: one axes for the loss and one for each metric; made if `None`. Returns the array of
        axes. The callback's own history is drawn, whatever was done with the learner since. Raises
        `RuntimeError` if no fit with this callback, and with a Recorder, has come to the end of an epoch.
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
        return (
            f'SWACallback: {self._described()}; use it within `averaged()`, or put it into the learner with `apply()`'
        )

    # the events of a fit

    def before_fit(self):
        if not self.enabled or self._must_stand_aside():
            return
        if is_learners_own(self.learn, self._name):
            raise ValueError(
                f'name={self._name!r} is an attribute of the learner already: give the SWACallback another name'
            )
        start = start_epoch(self.swa_start, self.n_epoch)
        fit = _Fit(start, self._due_from(start))
        recorder = recorder_of(self.learn)
        if recorder is not None:
            fit.n_own, fit.columns = insert_columns(recorder, self._name)
            names = [name for name in recorder.metric_names if name not in ('epoch', 'time')]
            fit.history = FitHistory(self._name, fit.columns, names)
            self._show_history(recorder, fit.history)
        self._fit = fit

    def _due_from(self, start: int) -> list[int]:
        "The epochs of this fit that are averaged."
        try:
            return due_epochs(start, self.n_epoch, self.cycle_len)
        except Exception as e:  # of the user's function
            raise ValueError(f'cycle_len could not be asked for the epochs {start} to {self.n_epoch - 1}: {e!r}') from e

    def before_epoch(self):
        self.unmute_trackers()
        self._fit.epoch = _Epoch(self.epoch_under_way)

    def before_train(self):
        fit, epoch = self._fit, self._fit.epoch
        if not fit.has_begun:
            fit.has_begun = True
            self._look_ahead()
        epoch.train_iter_before = self.learn.train_iter
        if epoch.number < fit.start:
            return
        epoch.is_open = True
        with fit.side.attempt(f'preparing an epoch of {self._what}', 'its batch norm may be of other weights'):
            epoch.watch = StatisticsWatch(unwrap(self.learn.model))
            if not fit.n_folds:
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
        fit.taken.add(self._n_batches(), epoch.was_cut)
        if not self.every and self.enabled and epoch.number in fit.due:
            self._fold(if_finite=True)
        self._end_epoch()

    def after_cancel_validate(self):
        self._fit.epoch.validation_cut = True

    def after_validate(self):
        fit, epoch = self._fit, self._fit.epoch
        is_of_another = not epoch.trained  # of a callback that validates while training goes on
        if is_of_another or recorder_of(self.learn) is None:
            return
        is_last = epoch.number == self.n_epoch - 1
        is_turn = epoch.folded and self.swa_eval_freq and (fit.n_epochs - 1) % self.swa_eval_freq == 0
        is_due = fit.n_folds and (is_turn or is_last)
        epoch.validated.add(self.learn.iter + 1, epoch.validation_cut)
        self._log(self._evaluate() if is_due else [])

    def after_cancel_epoch(self):
        self._end_epoch()
        if recorder_of(self.learn) is not None:
            self._log([])

    def after_epoch(self):
        self._keep_row()
        if self._fit.epoch.has_failed:
            self.mute_trackers(self._fit.columns)

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
            self._say('nothing', self._why_nothing_is_averaged())
        if fit.n_folds and fit.history is not None:
            with fit.side.attempt(f'saying what came of {self._what}'):
                write_below(self.learn, lines(self._outcome()))

    def over(self):
        self._end_epoch(alone=True)
        if self._average is not None:
            self._average.running.release()
        self._fit.side.conclude()

    # before the first step

    def _is_namesake(self, cb) -> bool:
        return isinstance(cb, SWACallback) and cb is not self and cb.enabled and cb._name == self._name

    def _must_stand_aside(self) -> bool:
        """Is another callback of this name passed to the fit, while this one is attached for good?
        Raises `ValueError` if both are passed, or both attached.
        """
        namesakes = [cb for cb in self.learn.cbs if self._is_namesake(cb)]
        if not namesakes:
            return False
        passed = passed_callbacks(self.learn)
        is_passed = any(cb is self for cb in passed)
        other_is_passed = any(cb is other for cb in passed for other in namesakes)
        if is_passed == other_is_passed:
            raise ValueError(
                f'this fit has two SWACallbacks of the name {self._name!r}, whose columns would collide: pass one, or '
                'give them different names'
            )
        if is_passed:
            return False
        if not self._stands_aside:
            self._stands_aside = True
            warn(
                f'learn.{self._name} stands aside in fits that another SWACallback of its name is passed to',
            )
        return True

    def _look_ahead(self):
        "Say before a long fit what would only show later in it."
        fit, learn = self._fit, self.learn
        check_engine(learn)
        check_model(learn, self._given)
        self._open_continued()
        remarks = remarks_on_model(learn) | remarks_on_data(learn, self._what)
        remarks |= remarks_on_loss(learn, self._loss_func, self._what)
        remarks |= remarks_on_cycles(self.cycle_len, fit.due, self.n_epoch)
        n_steps = most_steps(learn, fit.start)
        if not fit.due:
            remarks['nothing'] = self._why_nothing_is_averaged()
        elif self.every and n_steps < self.every:
            remarks['nothing'] = self._why_nothing_is_averaged(f'has at most {n_steps}')
        else:
            validated = validated_epochs(fit.due, self.n_epoch, self.swa_eval_freq)
            remarks |= remarks_on_trackers(learn, fit.columns, validated, self.swa_start)
        for kind, sentence in remarks.items():
            self._say(kind, sentence)

    def _open_continued(self):
        """Read the average to go on with now: its callback may begin another one in this fit, its
        file be written again.
        """
        continued = self._continued
        if continued is None or isinstance(continued, dict):
            return
        if isinstance(continued, SWACallback):
            continued.clean_up()
            if not continued.n_averaged:
                raise ValueError('average is a SWACallback that has averaged nothing: there is nothing to go on with')
            state = continued._average.running.state_dict()
            epochs = continued.averaged_epochs
        else:
            state, epochs = state_in_file(continued)
        refuse_another_model(state, self.learn.model)
        self._continued = {'state': pack(state), 'epochs': epochs}

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
            self._average.running.update(model)
            self._average.stale = True
            fit.n_folds += 1
            return
        average = self._average if fit.n_folds else self._new_average()  # complete before the old one goes
        if not fit.n_folds:
            fit.n_before = self._n_recorded()
        with uninterrupted():
            average.running.update(model)
            average.epochs.append(epoch.number)
            average.stale = True
            self._average = average
            self._continued = None
            epoch.folded = True
            fit.n_folds += 1
            fit.n_epochs += 1

    def _new_average(self) -> FitAverage:
        "An average without a point yet, or with those of the one that is gone on with."
        continued = self._continued if isinstance(self._continued, dict) else None
        return FitAverage.begin(self.learn, self.weight, self._given, continued)

    def _end_epoch(self, alone=False):
        """The training part of an epoch is over.

        - `alone`: other processes, if there are any, are not asked; they may be elsewhere, as after
          an error.
        """
        fit, epoch = self._fit, self._fit.epoch
        if not epoch.is_open:
            return
        if not epoch.trained:
            fit.taken.add(self._n_batches(), was_cut=True)
        gather = (lambda o: [o]) if alone else Processes(self.learn).gather
        with fit.side.attempt(f'closing an epoch of {self._what}', 'its batch norm may be of other weights'):
            self._close_epoch(gather)
        # last: what was interrupted above is done again at the end of the fit
        epoch.watch = epoch.beside = epoch.backup = None
        epoch.is_open = False

    def _n_batches(self) -> int:
        "That the epoch under way has trained on."
        return self.learn.train_iter - self._fit.epoch.train_iter_before

    def _close_epoch(self, gather):
        """Take back an epoch that not all processes averaged, or of whose steps some are not finite;
        of others note which statistics follow the weights.

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
            self._note_statistics(gather)

    def _note_statistics(self, gather):
        epoch, average = self._fit.epoch, self._average
        model = unwrap(self.learn.model)
        average.taken = self._fit.taken
        has_run = self._n_batches() > 0
        moved = gather(epoch.watch.moved() if has_run and epoch.watch is not None else None)
        known = [names for names in moved if names is not None]
        if known:
            average.bn = union(known)
        elif not average.bn:  # no batch ran, and no epoch before tells
            average.bn = list(tracked_bn(model))
        self._follow(average)
        average.stale = bool(average.bn)
        self._say_what_is_left_out()

    def _beside_weights(self) -> dict:
        "(kind of remark, name) -> tensor: what training may move beside the weights, where only training tells."
        model = unwrap(self.learn.model)
        res = {('buffers', name): b for name, b in weightlike_buffers(model).items()}
        if 'loss' not in self._fit.said:
            res |= {('loss', name): p for name, p in loss_parameters(self._loss_func, model).items()}
        return res

    def _say_what_is_left_out(self):
        "Name, once, what training has moved beside the weights in the first averaged epoch."
        epoch = self._fit.epoch
        if epoch.beside is None:
            return
        moved = epoch.beside.moved(self._beside_weights())
        for kind, sentence in {'buffers': buffers_sentence, 'loss': loss_sentence}.items():
            names = [name for of_kind, name in moved if of_kind == kind]
            if names:
                self._say(kind, sentence(self._what, names))

    def _follow(self, average):
        """Give `swa_model` the attributes, and where they changed the modules and hooks, that the model
        has now.
        """
        model = unwrap(self.learn.model)
        average.running.settle(model)
        if self._given is not None or average.has_structure_of(model):
            return
        with self._fit.side.attempt(f'following a change of the model in {self._what}', 'it is still made as before'):
            average.copy_anew(self.learn, self.weight)

    def _take_back(self):
        "The average, and what is counted, is again what it was before the epoch under way."
        epoch = self._fit.epoch
        with uninterrupted():
            self.load_state_dict(unpack(epoch.backup))
            epoch.folded = False
        epoch.has_failed = True

    # its state, for checkpoints

    @property
    def key(self) -> str:
        """By what a checkpoint tells it from the fit's other averages; of 'swa' it is '0', the number
        that `walk.named_callbacks` gives the only callback of a class.
        """
        return '0' if self._name == 'swa' else self._name

    def fit_settings(self) -> dict:
        "What must not change between the parts of one fit."
        res = {name: getattr(self, name) for name in ('swa_start', 'every', 'enabled', 'bn_batches', 'swa_eval_freq')}
        res['cycle_len'] = _plain_cycle_len(self.cycle_len)
        res['going on with an average'] = self._goes_on
        res[START] = start_epoch(self.swa_start, self.n_epoch)
        res['weight'] = [_weight_of(self.weight, n) for n in range(_N_COMPARED)]
        return res

    def state_dict(self) -> dict:
        "Average, counters and where it stands in a fit, as plain data; tensors are live."
        fit, average = self._fit, self._average
        res = {'average': None, 'epochs': self.averaged_epochs, 'bn': [], 'stale': False, 'fit': {}}
        taken = fit.taken if fit is not None else getattr(average, 'taken', None)
        res['taken'] = None if taken is None else [taken.n, taken.reached_end]
        res['continued'] = self._continued if isinstance(self._continued, dict) else None
        if fit is not None:
            res['fit'] = {k: getattr(fit, k) for k in _SAVED}
            res['history'] = None if fit.history is None else vars(fit.history)
        if average is None:
            return res
        return res | {'average': average.state_dict(), 'bn': list(average.bn), 'stale': average.stale}

    def load_state_dict(self, state: dict):
        """Take over a `state_dict`. Raises `ValueError` if its average is not one of the learner's
        model.
        """
        taken = Taken(*state['taken']) if state.get('taken') else None
        if state['average'] is None:
            self._average = None
        else:
            average = self._average or self._new_average()
            with uninterrupted():
                average.load_state_dict(state['average'])
                average.learner = weakref.ref(self.learn)
                average.epochs = list(state['epochs'])
                average.bn = list(state['bn'])
                average.stale = state['stale']
                average.taken = taken
                self._average = average
        if self._fit:
            counts = {k: state['fit'][k] for k in _SAVED if k in state['fit']}
            if not all(type(n) is int for n in counts.values()):
                raise ValueError(f'the state of {self._what} has counts that are none: {counts}')
            vars(self._fit).update(counts)
            self._fit.due = self._due_from(self._fit.start)
            self._take_history(state.get('history'))
            self._fit.taken = taken or Taken()
            if self._fit.n_folds:
                self._continued = None
        if state.get('continued'):
            self._continued = state['continued']

    def _take_history(self, history: dict | None):
        recorder = recorder_of(self.learn)
        if history is None or recorder is None:  # the former: a file of an earlier version
            return
        self._fit.history = FitHistory(**history)
        self._show_history(recorder, self._fit.history)

    # what came of it

    def _epochs_of_fit(self) -> list[int]:
        "The epochs averaged, without those gone on with."
        n = self._fit.n_epochs
        return self.averaged_epochs[-n:] if n else []

    def _n_recorded(self) -> int:
        "Training batches of this fit, so far, by the Recorder."
        recorder = recorder_of(self.learn)
        return 0 if recorder is None else len(recorder.lrs)

    def _outcome(self) -> Outcome:
        fit, average = self._fit, self._average
        fit.history.averaged = self._epochs_of_fit()
        is_passed = any(cb is self for cb in passed_callbacks(self.learn))
        return Outcome(
            history=fit.history,
            described=self._described(),
            call=self._name if is_passed else f'learn.{self._name}',
            n_averaged=self.n_averaged,
            by_steps=bool(self.every),
            is_new=not self._goes_on,
            has_batch_norm=bool(average.bn),
            weight=self.weight,
            lrs=recorder_of(self.learn).lrs,
            n_before=fit.n_before,
        )

    def _described(self) -> str:
        "As in 'average of 3 epochs (2-4)'."
        epochs = _ranges(self._average.epochs)
        unit, of = ('step', f'epochs {epochs}') if self.every else ('epoch', epochs)
        plural = '' if self.n_averaged == 1 else 's'
        return f'average of {self.n_averaged} {unit}{plural} ({of})'

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

    def _refresh(self, learn, in_fit=False):
        "Refresh the batch norm of `learn.model`, which holds the average, if it needs it."
        average = self._average
        if not average.stale or not average.bn:
            return
        moments = refresh_bn(learn, average.bn, self.bn_batches, in_fit, taken=average.taken)
        for kind, sentence in moments.remarks.items():
            self._say(kind, sentence)
        average.stale = False

    def _keep_row(self):
        "Take the row that the Recorder has just logged into the history."
        recorder, history = recorder_of(self.learn), self._fit.history
        if recorder is None or history is None:
            return
        names = list(recorder.metric_names)[1:]
        history.add(self._fit.epoch.number, dict(zip(names, self.learn.final_record)))
        history.averaged = self._epochs_of_fit()
        self._history = history
        self._show_history(recorder, history)

    def _show_history(self, recorder, history):
        "For `recorder.plot_swa`, which can be called after this callback is gone, and in a learner that was pickled."
        setattr(recorder, f'{self._name}_history', vars(history))

    def _log(self, values):
        complete_row(recorder_of(self.learn), self._fit.n_own, self._fit.columns, values)

    # small helpers

    @property
    def _what(self) -> str:
        "In sentences to users."
        return 'the average' if self._name == 'swa' else f'the average {self._name!r}'

    def _averaged_learner(self, call) -> Learner:
        """The learner whose weights were averaged. Raises `RuntimeError`, naming `call`, if there is no
        average, or that learner is gone.
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
        where = 'in' if self.every else 'at the end of'
        self._say(
            'finite',
            f'the weights {where} epoch {self._fit.epoch.number} are not finite; such epochs are left out of the '
            'average',
        )

    def _why_nothing_is_averaged(self, n_steps=None) -> str:
        "`n_steps`: of those taken, as in 'took 3'."
        fit = self._fit
        if self.every and fit.due:
            n_steps = n_steps or f'took {fit.n_steps}'
            return (
                f'every={self.every} was not reached: this fit {n_steps} optimizer steps from epoch {fit.start} on and '
                'averages nothing'
            )
        if not fit.due and fit.start < self.n_epoch:
            return (
                f'cycle_len has no epoch from {fit.start} (swa_start={self.swa_start}) to {self.n_epoch - 1}, the last '
                'one, counted from 0: this fit averages nothing'
            )
        first = fit.due[0] if fit.due else fit.start
        return (
            f'swa_start={self.swa_start} was not reached: epoch {first} (from 0) would be the first one averaged, '
            f'so this fit of {self.n_epoch} epochs averages nothing'
        )


class SaveSWAModelCallback(FitCallback, SaveModelCallback):
    """fastai's `SaveModelCallback` for the average: saves `swa_model` whenever a column of it
    improves. Loads nothing at the end.

    The file is what `learn.save(fname, with_opt=False)` writes within `averaged()`, so
    `learn.load(fname, with_opt=False)` reads it into any learner with that architecture;
    `SWACallback(average=file)` goes on with it. It is replaced in one step: whatever happens, there
    is the old one or the new. Needs a `SWACallback` in the same fit, and stands aside where that
    one does; of several, the one that has the column `monitor` is saved. A file that cannot be
    written is a warning, and training goes on. Raises `ValueError` if there is none, or for a
    `monitor` that is not one of its columns.
    """

    def __init__(
        self,
        monitor='swa_valid_loss',  # column to watch
        comp=None,  # comparison: np.less or np.greater; default: less for a loss or an error, else greater
        min_delta=0.0,  # least change that counts as an improvement
        # file name under `learn.path/learn.model_dir`; default: `<name>_model` for the average of that name, so
        # `swa_model`
        fname=None,
        every_epoch=False,  # True or an int k: save after each (k-th) epoch that has an average, as `fname_<epoch>`
        at_end=False,  # save once, when the fit ends, instead of at improvements
        reset_on_fit=True,  # forget the best value at the start of a fit
    ):
        if every_epoch and at_end:
            raise ValueError('every_epoch and at_end cannot both be set: choose one')
        super().__init__(monitor, comp, min_delta, fname, every_epoch, at_end, False, reset_on_fit)

    def before_fit(self):
        averages = [cb for cb in self.learn.cbs if isinstance(cb, SWACallback)]
        if not averages:
            raise ValueError(
                'SaveSWAModelCallback needs a SWACallback in the same fit: pass one, or call learn.to_swa() first'
            )
        columns = [name for swa in averages if swa._fit for name in swa._fit.columns]
        if not columns:  # all stand aside, or there is no Recorder
            return
        check_known('monitor', self.monitor, columns)
        super().before_fit()
        self._swa = next(swa for swa in averages if swa._fit and self.monitor in swa._fit.columns)
        if self.fname is None:
            self.fname = f'{self._swa._name}_model'
        self._fit = self._swa._fit  # shared: it counts and warns with the average's, which comes first by its `order`

    def after_epoch(self):
        best = self.best
        self._failed = False
        super().after_epoch()
        if self._failed:
            self.best = best  # the next value that is better than the file's is saved

    def _save(self, name):
        if not self._fit.n_folds:
            return
        with self._fit.side.attempt(f'saving {self._swa._what}', 'the file stays as it was'):
            file = join_path_file(name, self.learn.path / self.learn.model_dir, ext='.pth')
            self._swa.refresh()
            if not rank_distrib():
                swa = self._swa
                save_weights(file, weights_with_points(swa.swa_model, swa.n_averaged, swa.averaged_epochs))
            self.last_saved_path = file
            return
        self._failed = True

    def after_fit(self):
        if self.at_end:
            self._save(self.fname)


# arguments, and what is known of others' averages


def check_name(name: str) -> str:
    "`name`; raises `TypeError` or `ValueError` unless it can be an attribute."
    if not isinstance(name, str):
        raise TypeError(f'name must be a str, not {name!r}')
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(
            f'name must be an identifier such as swa or ema, for learn.<name> and the columns, not {name!r}'
        )
    return name


def is_learners_own(learn: Learner, name: str) -> bool:
    "Is `name` something of the learner's, other than a `SWACallback`? Some come and go with a fit."
    if name in vars(learn):
        return not isinstance(vars(learn)[name], SWACallback) and not _is_from_an_export(vars(learn)[name])
    return hasattr(type(learn), name) or name in (*LOOP, 'scaler', 'lock', 'lr_finder') or hasattr(learn.model, name)


def _is_from_an_export(value) -> bool:
    "Is it what a `SWACallback` of an exported learner has become?"
    return type(value) is Callback


def _check_average(average):
    if average is None or isinstance(average, SWACallback):
        return average
    if not isinstance(average, str | Path):
        raise TypeError(f'average must be a SWACallback or a file of SaveSWAModelCallback, not {average!r}')
    if not Path(average).is_file():
        raise FileNotFoundError(f'average={str(average)!r} is no file')
    return Path(average)


def _weight_of(weight, n_averaged: int):
    "The weight of point number `n_averaged`, from 0; `None` where the function has none."
    if n_averaged == 0:
        return 1.0
    try:
        return float(weight(n_averaged))
    except Exception:
        return None


def _check_cycle_len(cycle_len):
    "An int, a list of ints or a function."
    if callable(cycle_len):
        return cycle_len
    if isinstance(cycle_len, Integral) and not isinstance(cycle_len, bool):
        return check_count('cycle_len', cycle_len)
    if isinstance(cycle_len, str) or not isinstance(cycle_len, Iterable):
        raise TypeError(
            'cycle_len must be an int (epochs), a list of the epochs averaged, or a function that is true of them, not '
            f'{cycle_len!r}'
        )
    epochs = [check_count('cycle_len', epoch, least=0) for epoch in cycle_len]
    if not epochs:
        raise ValueError('cycle_len must have one epoch at least, and is empty')
    if epochs != sorted(set(epochs)):
        ends = f': of cycles of these lengths they are {cycle_ends(epochs)}' if min(epochs) else ''
        raise ValueError(f'cycle_len must be epochs, counted from 0, in rising order, not {epochs}{ends}')
    return epochs


def _plain_cycle_len(cycle_len):
    "What tells it from another one."
    if not callable(cycle_len):
        return cycle_len
    epochs = []
    for epoch in range(_N_COMPARED):
        with suppress(Exception):  # the function of a shorter fit
            if cycle_len(epoch):
                epochs.append(epoch)
    return epochs


def _check_swa_start(swa_start):
    if isinstance(swa_start, bool) or not isinstance(swa_start, Real):
        raise TypeError(
            f'swa_start must be an int (an epoch, from 0) or a float in [0, 1) (a share of the fit), not {swa_start!r}'
        )
    if isinstance(swa_start, Integral):
        if swa_start < 0:
            raise ValueError(f'swa_start must be an epoch counted from 0, not {swa_start}')
        return int(swa_start)
    if not 0 <= swa_start < 1:
        raise ValueError(
            f'swa_start must be in [0, 1) where it is a share of the fit, not {swa_start}; pass an int for an epoch'
        )
    return float(swa_start)


def _ranges(epochs) -> str:
    "[3, 4, 5, 9] -> '3-5, 9'"
    runs = []
    for e in epochs:
        if runs and runs[-1][1] == e - 1:
            runs[-1][1] = e
        else:
            runs.append([e, e])
    return ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)
