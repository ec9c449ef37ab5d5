"""`SWACallback`: the running average of a fit, validated beside the model in training. Callbacks only wire; the mathematics is below."""
import warnings, weakref
from contextlib import contextmanager
from numbers import Integral, Real
from types import SimpleNamespace

from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.learner import Learner, Recorder, save_model
from fastai.torch_core import join_path_file, rank_distrib
from torch import nn

from .averaging import WeightAverage, all_finite, check_match, check_swa_model, check_weight, equal
from .batchnorm import check_count, tracked_bn
from .columns import complete_row, insert_columns, recorder_of
from .modules import check_copyable, clean_copy, named_tensors, unwrap
from .passes import PassCancelled, check_engine, is_fitting, no_fit, refresh_bn, validate_aside
from .schedules import start_epoch
from .state import not_copied, pack, unpack
from .views import lending

__all__ = ['SWACallback', 'SaveSWAModelCallback']


class SWACallback(Callback):
    """Average the weights at the ends of epochs into `swa_model` and validate it beside the model in training.

    Training itself is left exactly as it is. The columns `swa_valid_loss` and `swa_<metric>` are added to the learner's table, `nan`
    in epochs that did not validate the average. A later fit starts a new average at its first fold; until then the old one stays.
    With `every=k` it is the weights after each k-th optimizer step that are folded, and `averaged_epochs` are the epochs with such steps.
    Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", Algorithm 1.

    Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used.
    """
    order = Recorder.order + 5    # after the Recorder has logged the epoch, before trackers and the progress table read it
    remove_on_fetch = True    # as the Recorder has it: not for passes aside from training
    _name = 'swa'
    _stateattrs = '_average', '_given', '_epochs', '_bn', '_stale', '_learner', '_fit', '_backup'

    def __init__(self,
        swa_start=0.75,    # int: index from 0 of the first epoch folded. float in [0, 1): that share of the fit
        swa_model:nn.Module=None,    # module to average into; default: a clean copy of the learner's model
        cycle_len:int=1,    # fold at the end of epoch `swa_start` and of every `cycle_len`-th after it
        swa_eval_freq:int=1,    # validate the average at its 1st, (1+f)th, (1+2f)th ... fold and in the last epoch; 0: last only
        bn_batches:int=None,    # training batches used to refresh batch norm; None: the whole training set
        weight=equal,    # function from `n_averaged` to the weight of the new point: `equal`, `ema(decay)` or another
        every:int=None,    # fold every so many optimizer steps, from the start of epoch `swa_start` on, instead of at the ends of epochs
    ):
        self.swa_start = _check_swa_start(swa_start)
        check_swa_model(swa_model)
        self.cycle_len = check_count('cycle_len', cycle_len, optional=False)
        self.swa_eval_freq = check_count('swa_eval_freq', swa_eval_freq, least=0, optional=False)
        self.bn_batches = check_count('bn_batches', bn_batches)
        check_weight(weight)
        self.every = check_count('every', every)
        if self.every and self.cycle_len != 1:
            raise ValueError(f'cycle_len={cycle_len} and every={every} exclude each other: one counts epochs, the other optimizer steps')
        self.weight, self.enabled = weight, True
        self._init_state()
        self._given = swa_model

    def _init_state(self):    # also what an unpickled callback starts with: an export carries the settings, not the average
        super()._init_state()
        self._average = self._given = self._fit = None    # the WeightAverage; the user's own swa_model; the state of a fit under way
        self._backup = None    # while steps are folded unseen: the state before this epoch's
        self._epochs, self._bn, self._stale = [], [], False    # folded; names of the layers to refresh; whether they need it
        self._learner = lambda: None    # weak reference to the learner whose weights were averaged

    # what a user reads and calls

    @property
    def name(self) -> str:
        "The learner's attribute for this callback: `swa`. One passed to a fit of a learner that has a `swa` must not take that away."
        if self.learn is not None: self._name = 'swa' if vars(self.learn).get('swa', self) is self else 'other_swa'
        return self._name

    @property
    def swa_model(self) -> nn.Module | None:
        "The module that holds the average, with plain state-dict keys; `None` (or the one passed) before the first fold."
        return self._given if self._average is None else self._average.swa_model

    @property
    def n_averaged(self) -> int:
        "Number of points in the average."
        return 0 if self._average is None else self._average.n_averaged

    @property
    def averaged_epochs(self) -> list[int]:
        "The epochs folded, counted from 0."
        return list(self._epochs)

    @contextmanager
    def averaged(self):
        """Within this context the learner predicts, validates, shows, saves and exports with the average; gives the learner.

        Nothing is copied: the learner's own model holds the average's tensors, and gets its own back at the end. Batch norm is
        refreshed first if it needs it. Raises `RuntimeError` if there is no average or the context is entered twice; a `fit` inside
        is refused with one, too. (`learn.load` inside would load into the average.)
        """
        learn = self._existing('averaged')
        with lending(learn, 'averaged()', self.averaged, self._version), self._average.lent_to(learn.model), no_fit(learn):
            self._refresh(learn)
            yield learn

    def _version(self):
        "What changes when `averaged()` would give another average."
        return weakref.ref(self._average), self.n_averaged

    def apply(self):
        """Put the average into `learn.model` for good, in place: the optimizer goes on with the same parameters.

        Raises `RuntimeError` if there is no average yet, or inside `averaged()`.
        """
        learn = self._existing('apply')
        self.refresh()
        self._average.copy_to(learn.model)

    def refresh(self):
        "Refresh the batch-norm statistics of `swa_model` now, if the weights folded last have not had that yet."
        learn = self._existing('refresh')
        if self._stale:
            with self._average.lent_to(learn.model): self._refresh(learn)

    def __repr__(self):
        if self._average is None:
            start = f'epoch {self.swa_start}' if isinstance(self.swa_start, int) else f'{self.swa_start:g} of the fit'
            return f'SWACallback: nothing averaged yet; folds from {start} on'
        points = f'{self.n_averaged} {"step" if self.every else "epoch"}{"s" * (self.n_averaged != 1)}'
        return (f'SWACallback: average of {points} ({"epochs " * bool(self.every)}{_ranges(self._epochs)}); '
                'use it within `averaged()`, or put it into the learner with `apply()`')

    # the events of a fit

    def before_fit(self):
        if self.learn.lock.locked() or is_fitting(self.learn, '_do_fit'): return    # validate and the like, perhaps from within a fit
        self._fit = self._backup = None
        if not self.enabled or self._grab(LRFinder): return    # tta comes this far as well, so nothing is made or reset here
        # counted in this fit: points folded, epochs with such, optimizer steps since `start`
        self._fit = SimpleNamespace(start=start_epoch(self.swa_start, self.n_epoch), n_folds=0, n_epochs=0, n_steps=0,
                                    begun=False, cancelled=False, said=set(), columns=[])
        recorder = recorder_of(self.learn)
        if recorder is None: return
        self._fit.own, self._fit.columns = insert_columns(recorder, 'swa')
        recorder.swa_epochs = []

    def before_epoch(self):
        if not self._fit or self.learn.lock.locked(): return
        self._fit.epoch, self._fit.trained, self._fit.folded = self.epoch, False, False    # `learn.epoch` is 0 after a validate within the fit

    def before_train(self):
        if not self._fit: return
        if not self._fit.begun:
            self._fit.begun = True
            self._check_ahead()
        if self.every and self.enabled and self._fit.epoch >= self._fit.start: self._backup = pack(self.state_dict())    # in the host's memory

    def after_cancel_step(self):
        if self._fit: self._fit.cancelled = True    # the scaler of mixed precision skipped it

    def after_step(self):
        fit = self._fit
        if not fit: return
        cancelled, fit.cancelled = fit.cancelled, False
        if not self.every or cancelled or not self.enabled or fit.epoch < fit.start: return
        fit.n_steps += 1
        if fit.n_steps % self.every == 0: self._fold()

    def after_train(self):
        fit = self._fit
        if not fit: return
        fit.trained = True
        since = fit.epoch - fit.start
        if self.every: self._end_steps()
        elif self.enabled and since >= 0 and since % self.cycle_len == 0:
            if all_finite(unwrap(self.learn.model).parameters()): self._fold()
            else: self._say_infinite()
        if fit.folded: self._bn = list(tracked_bn(unwrap(self.learn.model)))    # frozen or not, as it ends
        if (recorder := recorder_of(self.learn)) is not None: recorder.swa_epochs = self.averaged_epochs

    def after_validate(self):
        if not self._fit or not self._fit.trained or self.learn.lock.locked() or recorder_of(self.learn) is None: return
        fit = self._fit
        due = fit.folded and self.swa_eval_freq and (fit.n_epochs - 1) % self.swa_eval_freq == 0
        due = fit.n_folds and (due or fit.epoch == self.n_epoch - 1)
        self._log(self._evaluate() if due else [])

    def after_cancel_epoch(self):
        if not self._fit: return
        self._end_steps()
        if recorder_of(self.learn) is not None: self._log([])

    def after_cancel_fit(self):
        if not self._fit: return
        self._end_steps()
        if not self._fit.n_folds or not self._stale: return
        try:
            with self._average.lent_to(self.learn.model): self._refresh(self.learn, in_fit=True)
        except PassCancelled: self._say_cancelled()

    def after_fit(self):
        if not self._fit or self.learn.lock.locked() or is_fitting(self.learn, '_do_fit'): return
        fit, self._fit = self._fit, None
        if self._average is not None: self._average.release()
        if fit.begun and not fit.n_folds and 'finite' not in fit.said: self._say('nothing', self._nothing_folded(fit), fit)

    # folding

    def _fold(self):
        "Fold the model in training."
        model, fit = unwrap(self.learn.model), self._fit
        if fit.n_folds == 0: self._new_average(model)    # complete before the old one goes
        self._average.update(model)
        fit.n_folds += 1
        if not fit.folded:    # the first one in this epoch
            fit.folded = True
            fit.n_epochs += 1
            self._epochs.append(fit.epoch)
            self._bn = list(tracked_bn(model))
        self._stale = bool(self._bn)

    def _new_average(self, model):
        swa_model = clean_copy(model, self._shared()) if self._given is None else self._given
        self._average, self._epochs, self._learner = WeightAverage(model, self.weight, swa_model), [], weakref.ref(self.learn)

    def _settle(self):
        "The steps of this epoch were folded unseen: if the average is not finite, take them all back."
        backup = self._backup
        if backup is None or self._average is None or all_finite(self._average.swa_model.parameters()): return
        self.load_state_dict(unpack(backup))
        if self._fit: self._fit.folded = False
        self._say_infinite()

    def _end_steps(self):
        self._settle()
        self._backup = None

    # its state, for checkpoints

    def fit_settings(self) -> dict:
        "What must not change between the parts of one fit."
        return {k: getattr(self, k) for k in ('swa_start', 'cycle_len', 'every', 'enabled')}

    def state_dict(self) -> dict:
        "Average, counters and where it stands in a fit, as plain data; tensors are live."
        fit, average = self._fit, None
        if self._average is not None:
            swa_model = unwrap(self._average.swa_model)
            buffers = {k: v for k, v in named_tensors(swa_model.named_buffers).items() if k not in swa_model.state_dict()}
            average = self._average.state_dict() | {'buffers': buffers, 'training': [m.training for m in swa_model.modules()]}
        return {'average': average, 'epochs': list(self._epochs), 'bn': list(self._bn), 'stale': self._stale,
                'fit': {k: getattr(fit, k) for k in _COUNTS} if fit else {}}

    def load_state_dict(self, state: dict):
        "Take over a `state_dict`. Raises `ValueError` if its average is not one of the learner's model."
        average = state['average']
        if average is None: self._average = None
        else:
            if self._average is None: self._new_average(unwrap(self.learn.model))
            self._average.load_state_dict(average)
            swa_model = unwrap(self._average.swa_model)
            own = named_tensors(swa_model.named_buffers)
            for name, value in average['buffers'].items():
                if name in own: own[name].data = value.to(own[name].device, copy=True)
            for m, mode in zip(swa_model.modules(), average['training']): m.training = mode
        self._epochs, self._bn, self._stale = list(state['epochs']), list(state['bn']), state['stale']
        if self._fit: vars(self._fit).update(state['fit'])

    def _shared(self): return not_copied(self.learn)

    # validating the average

    def _evaluate(self) -> list:
        "The values of the `swa_*` columns now; none if a callback cancels a pass."
        try:
            with self._average.lent_to(self.learn.model):
                self._refresh(self.learn, in_fit=True)
                return validate_aside(self.learn)
        except PassCancelled:
            self._say_cancelled()
            return []

    def _refresh(self, learn, in_fit=False):
        "Refresh the batch norm of `learn.model`, which holds the average, if it needs it."
        if not self._stale: return
        moments = refresh_bn(learn, self._bn, self.bn_batches, in_fit)
        for kind, sentence in moments.remarks.items(): self._say(kind, sentence)
        self._stale = False

    def _log(self, values): complete_row(recorder_of(self.learn), self._fit.own, self._fit.columns, values)

    # small helpers

    def _grab(self, cls): return [cb for cb in self.learn.cbs if isinstance(cb, cls)]

    def _existing(self, call) -> Learner:
        self._settle()    # an interrupted epoch did not
        if self._average is None:
            raise RuntimeError(f'{call}() needs an average and there is none yet: run a fit that reaches swa_start={self.swa_start}')
        learn = self._learner()
        if learn is None: raise RuntimeError(f'{call}() needs the learner that was averaged, and it is gone; swa_model still holds the average')
        return learn

    def _say(self, what, sentence, fit=None):
        "Warn, once in a fit."
        fit = fit or self._fit
        if fit is not None and what in fit.said: return
        if fit is not None: fit.said.add(what)
        if not rank_distrib(): warnings.warn(sentence, stacklevel=2)    # once for all processes

    def _say_infinite(self):
        where = 'in' if self.every else 'at the end of'
        self._say('finite', f'the weights {where} epoch {self._fit.epoch if self._fit else self._epochs[-1:]} are not finite; '
                            'such epochs are left out of the average')

    def _say_cancelled(self): self._say('cancelled', 'a callback cancelled a pass over the average, which is not validated in that epoch')

    def _nothing_folded(self, fit):
        if self.every and fit.start < self.n_epoch:
            return f'every={self.every} was not reached: this fit took {fit.n_steps} optimizer steps from epoch {fit.start} on and averages nothing'
        return (f'swa_start={self.swa_start} was not reached: epoch {fit.start} (from 0) would be the first one folded, so this fit '
                f'of {self.n_epoch} epochs averages nothing')

    def _check_ahead(self):
        "Say before a long fit what would only show later in it. (Not in `before_fit`, which `tta` sends as well.)"
        fit = self._fit
        check_engine(self.learn)
        if len([cb for cb in self._grab(SWACallback) if cb.enabled]) > 1:
            raise ValueError('this fit has two SWACallbacks, whose columns would collide; pass one, or first call learn.remove_swa()')
        if self._given is None: check_copyable(self.learn.model, self._shared())
        else:                   check_match(self.learn.model, self._given)
        if fit.start >= self.n_epoch: return self._say('nothing', self._nothing_folded(fit))
        folds = range(fit.start, self.n_epoch, self.cycle_len)
        validated = sorted({*(folds[::self.swa_eval_freq] if self.swa_eval_freq else ()), self.n_epoch - 1})
        first, pause = validated[0], max(b - a - 1 for a, b in zip([-1, *validated], validated))
        for tracker, acts in ((EarlyStoppingCallback, 'stops this fit'), (ReduceLROnPlateau, 'cuts the learning rate')):
            for cb in self._grab(tracker):
                if cb.monitor.startswith('swa_') and cb.patience <= pause:
                    self._say(acts, f'{type(cb).__name__}(monitor={cb.monitor!r}, patience={cb.patience}) {acts} for want of values: the '
                                    f'average is validated first in epoch {first} (swa_start={self.swa_start}), and there can be {pause} '
                                    f'epochs without; use a patience above {pause}')
        for cb in self._grab(SaveModelCallback):
            if cb.monitor.startswith('swa_') and not isinstance(cb, SaveSWAModelCallback):
                self._say('saves', f'SaveModelCallback(monitor={cb.monitor!r}) saves the weights in training, not the average; '
                                   'use SaveSWAModelCallback')


class SaveSWAModelCallback(SaveModelCallback):
    """fastai's `SaveModelCallback` for the average: saves `swa_model` whenever a `swa_*` column improves. Loads nothing at the end.

    The file is what `learn.save(fname, with_opt=False)` writes within `averaged()`, so `learn.load(fname, with_opt=False)` reads it into
    any learner with that architecture. Needs a `SWACallback` in the same fit, and stands aside where that one does.
    Raises `ValueError` if there is none, or for a `monitor` that is not one of its columns.
    """
    def __init__(self,
        monitor='swa_valid_loss',    # column to watch
        comp=None,    # comparison: np.less or np.greater; default: less for a loss or an error, else greater
        min_delta=0.,    # least change that counts as an improvement
        fname='swa_model',    # file name under `learn.path/learn.model_dir`
        every_epoch=False,    # True or an int k: save after each (k-th) epoch that has an average, as `fname_<epoch>`
        at_end=False,    # save once, when the fit ends, instead of at improvements
        reset_on_fit=True,    # forget the best value at the start of a fit
    ):
        if every_epoch and at_end: raise ValueError('every_epoch and at_end cannot both be set: choose one')
        super().__init__(monitor, comp, min_delta, fname, every_epoch, at_end, False, reset_on_fit)

    def before_fit(self):
        swa = next((cb for cb in self.learn.cbs if isinstance(cb, SWACallback)), None)
        if swa is None: raise ValueError('SaveSWAModelCallback needs a SWACallback in the same fit: pass one, or call learn.to_swa() first')
        self.run = bool(swa._fit) and not self.learn.lock.locked()
        if not self.run: return
        if self.monitor not in swa._fit.columns:
            raise ValueError(f'monitor must be one of {", ".join(swa._fit.columns)}, not {self.monitor!r}')
        super().before_fit()
        self._swa, self._fit = swa, swa._fit

    def _save(self, name):
        if not self._fit.n_folds: return
        self._swa.refresh()
        self.last_saved_path = join_path_file(name, self.learn.path/self.learn.model_dir, ext='.pth')
        save_model(self.last_saved_path, unwrap(self._swa.swa_model), None)

    def after_fit(self):
        if self.at_end: self._save(self.fname)


_COUNTS = 'n_folds', 'n_epochs', 'n_steps'    # of a fit, and of its state


def _check_swa_start(swa_start):
    if isinstance(swa_start, bool) or not isinstance(swa_start, Real):
        raise TypeError(f'swa_start must be an int (an epoch, from 0) or a float in [0, 1) (a share of the fit), not {swa_start!r}')
    if isinstance(swa_start, Integral):
        if swa_start < 0: raise ValueError(f'swa_start must be an epoch counted from 0, not {swa_start}')
        return int(swa_start)
    if not 0 <= swa_start < 1:
        raise ValueError(f'swa_start must be in [0, 1) where it is a share of the fit, not {swa_start}; pass an int for an epoch')
    return float(swa_start)


def _ranges(epochs):
    "[3, 4, 5, 9] -> '3-5, 9'"
    runs = []
    for e in epochs:
        if runs and runs[-1][1] == e - 1: runs[-1][1] = e
        else: runs.append([e, e])
    return ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)
