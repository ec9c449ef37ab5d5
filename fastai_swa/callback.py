"""`SWACallback`: the running average of a fit, validated beside the model in training.

It only wires: the mathematics is in `averaging`, the passes in `passes`, what is said before the first step in
`preflight`.
"""

import keyword
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

from fastai.callback.tracker import SaveModelCallback
from fastai.learner import Learner, Recorder
from fastai.torch_core import join_path_file, rank_distrib
from torch import nn

from .aside import LOOP
from .averaging import all_finite, check_swa_model, check_weight, equal
from .batchnorm import StatisticsWatch, tracked_bn, union
from .checks import check_count, check_known
from .columns import complete_row, insert_columns, recorder_of
from .files import save_weights
from .fit_average import FitAverage, refuse_another_model, state_in_file, weights_with_points
from .fitting import FitCallback, SideWork, no_fit, passed_callbacks
from .interrupts import uninterrupted
from .journal import START
from .modules import unwrap
from .packing import pack, unpack
from .passes import check_engine, refresh_bn, validate_aside
from .preflight import check_model, remarks_on_data, remarks_on_model, remarks_on_trackers, validated_epochs
from .processes import Processes
from .schedules import start_epoch
from .views import lending
from .weights import NoSolution

__all__ = ['SWACallback', 'SaveSWAModelCallback', 'check_name', 'is_learners_own']

_COUNTS = 'start', 'n_folds', 'n_epochs', 'n_steps'  # of a fit, and of its state
_N_WEIGHTS = 1001  # by the weights of so many points the function that gives them is known again


@dataclass
class _Fit:
    "A fit under way."

    start: int  # the first epoch that is averaged
    before: int = 0  # how many columns of the table stand before those of the average
    columns: list = field(default_factory=list)
    n_folds: int = 0  # points folded
    n_epochs: int = 0  # epochs with such
    n_steps: int = 0  # optimizer steps since `start`
    begun: bool = False  # whether training has begun
    side: SideWork = field(default_factory=SideWork)
    said: set = field(default_factory=set)  # what was warned about
    # the epoch under way; what follows is of it (`learn.epoch` is 0 after a validation within the fit)
    epoch: int = -1
    trained: bool = False  # whether its training part has ended
    folded: bool = False  # whether points of it are in the average
    failed: bool = False  # whether its value of the average could not be had
    step_cancelled: bool = False  # whether the optimizer step under way was left out
    n_batches: int = 0  # `learn.train_iter` at its beginning
    # the statistics of batch norm at its beginning; `None` once it was asked what moved
    watch: StatisticsWatch = None
    backup: dict = None  # the callback's state at its beginning, while steps are folded unseen


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

    What the averaging does beside the training and cannot do (to average, a pass, a validation) is a
    warning and leaves `nan`; training goes on. Raises `TypeError` or `ValueError`, naming the
    argument, for one that cannot be used, at the latest before the first step.
    """

    # after the Recorder has logged the epoch, before trackers and the progress table read it
    order = Recorder.order + 5
    remove_on_fetch = True  # as the Recorder has it: not for passes aside from training
    _stateattrs = '_average', '_given', '_continued', '_fit', '_stands_aside'

    def __init__(
        self,
        swa_start=0.75,  # int: index from 0 of the first epoch averaged. float in [0, 1): that share of the fit
        swa_model: nn.Module = None,  # module to average into; default: a clean copy of the learner's model
        cycle_len: int = 1,  # average the weights of epoch `swa_start` and of every `cycle_len`-th after it
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
        self.cycle_len = check_count('cycle_len', cycle_len)
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
        self.enabled = True
        self._name = self._attribute = check_name(name)
        self._init_state()
        self._given = swa_model
        self._continued = _check_average(average)
        self._goes_on = average is not None  # whether the next fit does, or the one under way did
        if swa_model is not None and isinstance(average, SWACallback) and average.swa_model is swa_model:
            raise ValueError(
                'swa_model is the module of the average that is gone on with, which stays as it is: pass another one'
            )

    # also what an unpickled callback starts with: an export carries the settings, not the average
    def _init_state(self):
        super()._init_state()
        self._average = None  # the `FitAverage`
        self._given = None  # the user's own swa_model
        self._continued = None  # the average to go on with, until the first fold
        self._fit = None
        self._stands_aside = False  # whether it was said that this callback stands aside for another

    # what a user reads and calls

    @property
    def name(self) -> str:
        """The learner's attribute for this callback: what was passed as `name`, unless that is
        something else there.
        """
        if self.learn is not None:
            is_free = vars(self.learn).get(self._name, self) is self and not is_learners_own(self.learn, self._name)
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
        learn = self._existing('averaged')
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
        learn = self._existing('apply')
        self.refresh()
        self._average.running.copy_to(learn.model)

    def refresh(self):
        """Refresh the batch-norm statistics of `swa_model` now, if the weights averaged last have not
        had that yet.
        """
        learn = self._existing('refresh')
        if self._average.stale:
            with self._average.running.lent_to(learn.model):
                self._refresh(learn)

    def __repr__(self):
        if self._average is None:
            start = f'epoch {self.swa_start}' if isinstance(self.swa_start, int) else f'{self.swa_start:g} of the fit'
            return f'SWACallback: nothing averaged yet; averages from {start} on'
        epochs = _ranges(self._average.epochs)
        unit, of = ('step', f'epochs {epochs}') if self.every else ('epoch', epochs)
        plural = '' if self.n_averaged == 1 else 's'
        return (
            f'SWACallback: average of {self.n_averaged} {unit}{plural} ({of}); use it within `averaged()`, or put it '
            'into the learner with `apply()`'
        )

    # the events of a fit

    def before_fit(self):
        if not self.enabled or self._must_stand_aside():
            return
        if is_learners_own(self.learn, self._name):
            raise ValueError(
                f'name={self._name!r} is an attribute of the learner already: give the SWACallback another name'
            )
        fit = _Fit(start_epoch(self.swa_start, self.n_epoch))
        recorder = recorder_of(self.learn)
        if recorder is not None:
            fit.before, fit.columns = insert_columns(recorder, self._name)
            setattr(recorder, f'{self._name}_epochs', [])
        self._fit = fit

    def before_epoch(self):
        fit = self._fit
        self.unmute_trackers()
        fit.epoch = self.epoch_under_way
        fit.trained = fit.folded = fit.failed = False

    def before_train(self):
        fit = self._fit
        if not fit.begun:
            fit.begun = True
            self._look_ahead()
        fit.n_batches = self.learn.train_iter
        if fit.epoch < fit.start:
            return
        with fit.side.attempt(f'preparing an epoch of {self._what}', 'its batch norm may be of other weights'):
            fit.watch = StatisticsWatch(unwrap(self.learn.model))
        if self.enabled and (self.every or Processes(self.learn).size > 1):
            with fit.side.attempt(f'a copy of {self._what}', 'steps that are not finite cannot be taken back'):
                fit.backup = pack(self.state_dict())  # in the host's memory

    def after_cancel_step(self):
        self._fit.step_cancelled = True  # the scaler of mixed precision skipped it

    def after_step(self):
        fit = self._fit
        if fit.step_cancelled or not self.every or not self.enabled or fit.epoch < fit.start:
            fit.step_cancelled = False
            return
        fit.n_steps += 1
        if fit.n_steps % self.every == 0:
            self._fold()

    def after_train(self):
        fit = self._fit
        fit.trained = True
        since = fit.epoch - fit.start
        if not self.every and self.enabled and since >= 0 and since % self.cycle_len == 0:
            self._fold(if_finite=True)
        self._end_epoch()
        recorder = recorder_of(self.learn)
        if recorder is not None:
            setattr(recorder, f'{self._name}_epochs', self.averaged_epochs)

    def after_validate(self):
        fit = self._fit
        if not fit.trained or recorder_of(self.learn) is None:
            return
        is_last = fit.epoch == self.n_epoch - 1
        is_turn = fit.folded and self.swa_eval_freq and (fit.n_epochs - 1) % self.swa_eval_freq == 0
        is_due = fit.n_folds and (is_turn or is_last)
        self._log(self._evaluate() if is_due else [])

    def after_cancel_epoch(self):
        self._end_epoch()
        if recorder_of(self.learn) is not None:
            self._log([])

    def after_epoch(self):
        if self._fit.failed:
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
        if fit.begun and not fit.n_folds and not fit.side.failures and 'finite' not in fit.said:
            self._say('nothing', self._nothing_folded())

    def over(self):
        self._end_epoch(alone=True)
        if self._average is not None:
            self._average.running.release()
        self._fit.side.conclude()

    # folding

    def _fold(self, if_finite=False):
        "Fold the model in training; if that fails, the average is as it was."
        fit, model = self._fit, unwrap(self.learn.model)
        with fit.side.attempt(f'taking the weights into {self._what}', 'they are left out of it'):
            if if_finite and not all_finite(model.parameters()):
                self._say_infinite()
                return
            self._fold_or_raise(model)
            fit.failed = False
            return
        fit.failed = not fit.folded

    def _fold_or_raise(self, model):
        fit = self._fit
        if fit.folded:  # a further step of this epoch
            self._average.running.update(model)
            self._average.stale = True
            fit.n_folds += 1
            return
        average = self._average if fit.n_folds else self._new_average()  # complete before the old one goes
        with uninterrupted():
            average.running.update(model)
            average.epochs.append(fit.epoch)
            average.stale = True
            self._average = average
            self._continued = None
            fit.folded = True
            fit.n_folds += 1
            fit.n_epochs += 1

    def _new_average(self) -> FitAverage:
        "An average without a point yet, or with those of the one that is gone on with."
        continued = self._continued if isinstance(self._continued, dict) else None
        return FitAverage.begin(self.learn, self.weight, self._given, continued)

    def _end_epoch(self, alone=False):
        "The training part of an epoch is over."
        fit = self._fit
        if fit.watch is None:  # it was over before
            return
        with fit.side.attempt(f'closing an epoch of {self._what}', 'its batch norm may be of other weights'):
            self._close_epoch(alone)
        fit.watch = fit.backup = None  # last: what was interrupted above is done again at the end of the fit

    def _close_epoch(self, alone):
        """Was what the epoch folded unseen finite, and which statistics follow the weights?

        - `alone`: other processes, if there are any, are not asked; they may be elsewhere, as after
          an error.
        """
        fit, average = self._fit, self._average
        gather = _of_one if alone else Processes(self.learn).gather
        folded = gather(fit.folded)
        can_go_back = fit.folded and fit.backup is not None
        if can_go_back and not all(folded):
            self._take_back()
        elif can_go_back and self.every and not all_finite(average.running.swa_model.parameters()):
            self._take_back()
            self._say_infinite()
        elif fit.folded:
            if self.learn.train_iter > fit.n_batches:
                average.bn = union(gather(fit.watch.moved()))
            elif not average.bn:  # no batch ran, and no epoch before tells
                average.bn = list(tracked_bn(unwrap(self.learn.model)))
            self._follow(average)
            average.stale = bool(average.bn)

    def _follow(self, average):
        "Let `swa_model` be of the model's present make."
        model = unwrap(self.learn.model)
        average.running.settle(model)
        if self._given is not None or average.has_structure_of(model):
            return
        with self._fit.side.attempt(f'following a change of the model in {self._what}', 'it is still made as before'):
            average.copy_anew(self.learn, self.weight)

    def _take_back(self):
        "The average, and what is counted, is again what it was before the epoch under way."
        fit = self._fit
        with uninterrupted():
            self.load_state_dict(unpack(fit.backup))
            fit.folded = False
        fit.failed = True

    # its state, for checkpoints

    @property
    def key(self) -> str:
        "What a checkpoint tells it by from other averages of the fit."
        return '0' if self._name == 'swa' else self._name

    def fit_settings(self) -> dict:
        "What must not change between the parts of one fit."
        res = {
            name: getattr(self, name)
            for name in ('swa_start', 'cycle_len', 'every', 'enabled', 'bn_batches', 'swa_eval_freq')
        }
        res['going on with an average'] = self._goes_on
        res[START] = start_epoch(self.swa_start, self.n_epoch)
        res['weight'] = [_weight_of(self.weight, n) for n in range(_N_WEIGHTS)]
        return res

    def state_dict(self) -> dict:
        "Average, counters and where it stands in a fit, as plain data; tensors are live."
        fit, average = self._fit, self._average
        res = {'average': None, 'epochs': self.averaged_epochs, 'bn': [], 'stale': False, 'fit': {}}
        res['continued'] = self._continued if isinstance(self._continued, dict) else None
        if fit is not None:
            res['fit'] = {k: getattr(fit, k) for k in _COUNTS}
        if average is None:
            return res
        return res | {'average': average.state_dict(), 'bn': list(average.bn), 'stale': average.stale}

    def load_state_dict(self, state: dict):
        """Take over a `state_dict`. Raises `ValueError` if its average is not one of the learner's
        model.
        """
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
                self._average = average
        if self._fit:
            vars(self._fit).update(state['fit'])
            if self._fit.n_folds:
                self._continued = None
        if state.get('continued'):
            self._continued = state['continued']

    # validating the average

    def _evaluate(self) -> list:
        "The values of the average's columns now; none if they cannot be had."
        fit = self._fit
        with fit.side.attempt(f'validating {self._what}', 'its columns are nan in that epoch'):
            with self._average.running.lent_to(self.learn.model):
                self._refresh(self.learn, in_fit=True)
                values = validate_aside(self.learn)
            fit.failed = False
            return values
        fit.failed = True
        return []

    def _refresh(self, learn, in_fit=False):
        "Refresh the batch norm of `learn.model`, which holds the average, if it needs it."
        average = self._average
        if not average.stale or not average.bn:
            return
        moments = refresh_bn(learn, average.bn, self.bn_batches, in_fit)
        for kind, sentence in moments.remarks.items():
            self._say(kind, sentence)
        average.stale = False

    def _log(self, values):
        complete_row(recorder_of(self.learn), self._fit.before, self._fit.columns, values)

    # small helpers

    @property
    def _what(self) -> str:
        "In sentences to users."
        return 'the average' if self._name == 'swa' else f'the average {self._name!r}'

    def _existing(self, call) -> Learner:
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

    def _say(self, what, sentence):
        "Warn, once in a fit."
        fit = self._fit
        if fit is not None:
            if what in fit.said:
                return
            fit.said.add(what)
        if not rank_distrib():  # once for all processes
            warnings.warn(sentence, stacklevel=2)

    def _say_infinite(self):
        where = 'in' if self.every else 'at the end of'
        self._say(
            'finite',
            f'the weights {where} epoch {self._fit.epoch} are not finite; such epochs are left out of the average',
        )

    def _nothing_folded(self):
        fit = self._fit
        if self.every and fit.start < self.n_epoch:
            return (
                f'every={self.every} was not reached: this fit took {fit.n_steps} optimizer steps from epoch '
                f'{fit.start} on and averages nothing'
            )
        return (
            f'swa_start={self.swa_start} was not reached: epoch {fit.start} (from 0) would be the first one averaged, '
            f'so this fit of {self.n_epoch} epochs averages nothing'
        )

    # before the first step

    def _is_namesake(self, cb) -> bool:
        return isinstance(cb, SWACallback) and cb is not self and cb.enabled and cb._name == self._name

    def _must_stand_aside(self) -> bool:
        """Is another callback of this name passed to the fit, while this one is attached for good?
        Raises `ValueError` if both are the one or the other.
        """
        namesakes = [cb for cb in self.learn.cbs if self._is_namesake(cb)]
        if not namesakes:
            return False
        passed = passed_callbacks(self.learn)
        if any(cb is self for cb in passed) == any(cb is other for cb in passed for other in namesakes):
            raise ValueError(
                f'this fit has two SWACallbacks of the name {self._name!r}, whose columns would collide: pass one, or '
                'give them different names'
            )
        if any(cb is self for cb in passed):
            return False
        if not self._stands_aside:
            self._stands_aside = True
            warnings.warn(
                f'learn.{self._name} stands aside in fits that another SWACallback of its name is passed to',
                stacklevel=2,
            )
        return True

    def _look_ahead(self):
        "Say before a long fit what would only show later in it."
        fit, learn = self._fit, self.learn
        check_engine(learn)
        check_model(learn, self._given)
        self._open_continued()
        remarks = remarks_on_model(learn) | remarks_on_data(learn, self._what)
        if fit.start < self.n_epoch:
            validated = validated_epochs(fit.start, self.n_epoch, self.cycle_len, self.swa_eval_freq)
            remarks |= remarks_on_trackers(learn, fit.columns, validated, self.swa_start)
        else:
            remarks['nothing'] = self._nothing_folded()
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
        self._fit = self._swa._fit

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


def _of_one(o) -> list:
    "What a single process gathers."
    return [o]


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
        return not isinstance(vars(learn)[name], SWACallback)
    return hasattr(type(learn), name) or name in (*LOOP, 'scaler', 'lock', 'lr_finder') or hasattr(learn.model, name)


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
