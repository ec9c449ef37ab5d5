"""`SWACallback`: the running average of a fit, validated beside the model in training. Callbacks only wire; the mathematics is below."""
import warnings, weakref
from contextlib import contextmanager
from numbers import Integral, Real
from types import SimpleNamespace

from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder, ParamScheduler
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.learner import Learner, Recorder, save_model
from fastai.torch_core import join_path_file, num_distrib
from fastcore.foundation import L
from torch import nn

from .averaging import WeightAverage, all_finite, check_match, check_swa_model, check_weight, equal
from .batchnorm import check_count, tracked_bn
from .modules import check_copyable, clean_copy, unwrap
from .passes import PassCancelled, no_fit, refresh_bn, validate_aside
from .schedules import start_epoch

__all__ = ['SWACallback', 'SaveSWAModelCallback']


class SWACallback(Callback):
    """Average the weights at the ends of epochs into `swa_model` and validate it beside the model in training.

    Training itself is left exactly as it is. The columns `swa_valid_loss` and `swa_<metric>` are added to the learner's table, `nan`
    in epochs that did not validate the average. A later fit starts a new average at its first fold; until then the old one stays.
    Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", Algorithm 1.

    Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used.
    """
    order = Recorder.order + 5    # after the Recorder has logged the epoch, before trackers and the progress table read it
    remove_on_fetch = True    # as the Recorder has it: not for passes aside from training
    _name = 'swa'
    _stateattrs = '_average', '_given', '_epochs', '_bn', '_stale', '_learner', '_fit'

    def __init__(self,
        swa_start=0.75,    # int: index from 0 of the first epoch folded. float in [0, 1): that share of the fit
        swa_model:nn.Module=None,    # module to average into; default: a clean copy of the learner's model
        cycle_len:int=1,    # fold at the end of epoch `swa_start` and of every `cycle_len`-th after it
        swa_eval_freq:int=1,    # validate the average at its 1st, (1+f)th, (1+2f)th ... fold and in the last epoch; 0: last only
        bn_batches:int=None,    # training batches used to refresh batch norm; None: the whole training set
        weight=equal,    # function from `n_averaged` to the weight of the new point: `equal`, `ema(decay)` or another
        every:int=None,    # reserved for folding every so many optimizer steps; only None for now
    ):
        self.swa_start = _check_swa_start(swa_start)
        check_swa_model(swa_model)
        self.cycle_len = check_count('cycle_len', cycle_len, optional=False)
        self.swa_eval_freq = check_count('swa_eval_freq', swa_eval_freq, least=0, optional=False)
        self.bn_batches = check_count('bn_batches', bn_batches)
        check_weight(weight)
        if every is not None: raise NotImplementedError(f'every={every!r}: folding by optimizer steps is not available yet; leave it None')
        self.weight, self.every, self.enabled = weight, every, True
        self._init_state()
        self._given = swa_model

    def _init_state(self):    # also what an unpickled callback starts with: an export carries the settings, not the average
        super()._init_state()
        self._average = self._given = self._fit = None    # the WeightAverage; the user's own swa_model; the state of a fit under way
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
        with self._average.lent_to(learn.model), no_fit(learn):
            self._refresh(learn)
            yield learn

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
        return (f'SWACallback: average of {self.n_averaged} epoch{"s" * (self.n_averaged != 1)} ({_ranges(self._epochs)}); '
                'use it within `averaged()`, or put it into the learner with `apply()`')

    # the events of a fit

    def before_fit(self):
        if self.learn.lock.locked(): return    # validate or get_preds; they may come from within a fit
        self._fit = None
        if not self.enabled or self._grab(LRFinder): return    # tta comes this far as well, so nothing is made or reset here
        if num_distrib() > 1: raise NotImplementedError('SWACallback does not support training in several processes yet; use one, or DataParallel')
        self._fit = SimpleNamespace(start=start_epoch(self.swa_start, self.n_epoch), n_folds=0, begun=False, said=set(), columns=[])
        recorder = self._recorder()
        if recorder is None: return
        names, at = list(recorder.metric_names), len(recorder.metric_names) - bool(recorder.add_time)
        self._fit.own, self._fit.columns = at, ['swa_valid_loss', *(f'swa_{m.name}' for m in self.learn.metrics)]
        recorder.metric_names = L(names[:at] + self._fit.columns + names[at:])
        recorder.swa_epochs = []

    def before_epoch(self):
        if not self._fit or self.learn.lock.locked(): return
        self._fit.epoch, self._fit.trained, self._fit.folded = self.epoch, False, False    # `learn.epoch` is 0 after a validate within the fit

    def before_train(self):
        if not self._fit or self._fit.begun: return
        self._fit.begun = True
        self._check_ahead()

    def after_train(self):
        if not self._fit: return
        self._fit.trained = True
        since = self._fit.epoch - self._fit.start
        self._fit.folded = self.enabled and since >= 0 and since % self.cycle_len == 0 and self._fold()

    def after_validate(self):
        if not self._fit or not self._fit.trained or self.learn.lock.locked() or self._recorder() is None: return
        fit = self._fit
        due = fit.folded and self.swa_eval_freq and (fit.n_folds - 1) % self.swa_eval_freq == 0
        due = fit.n_folds and (due or fit.epoch == self.n_epoch - 1)
        self._log(self._evaluate() if due else [])

    def after_cancel_epoch(self):
        if self._fit and self._recorder() is not None: self._log([])

    def after_cancel_fit(self):
        if not self._fit or not self._fit.n_folds or not self._stale: return
        try:
            with self._average.lent_to(self.learn.model): self._refresh(self.learn, in_fit=True)
        except PassCancelled: self._say_cancelled()

    def after_fit(self):
        if not self._fit or self.learn.lock.locked(): return
        fit, self._fit = self._fit, None
        if self._average is not None: self._average.release()
        if fit.begun and not fit.n_folds and 'finite' not in fit.said: self._say('nothing', self._nothing_folded(fit), fit)

    # folding

    def _fold(self) -> bool:
        "Fold the model in training; whether it was."
        learn, model, fit = self.learn, unwrap(self.learn.model), self._fit
        if not all_finite(model.parameters()):
            self._say('finite', f'the weights at the end of epoch {fit.epoch} are not finite; such epochs are left out of the average')
            return False
        if fit.n_folds == 0:    # the new average is complete before the old one goes
            swa_model = clean_copy(model, self._shared()) if self._given is None else self._given
            self._average, self._epochs, self._learner = WeightAverage(model, self.weight, swa_model), [], weakref.ref(learn)
        self._average.update(model)
        self._epochs.append(fit.epoch)
        fit.n_folds += 1
        self._bn = list(tracked_bn(model))
        self._stale = bool(self._bn)
        if (recorder := self._recorder()) is not None: recorder.swa_epochs = self.averaged_epochs
        return True

    def _shared(self): return self.learn, self.learn.dls, *self.learn.cbs    # never copied, should the model refer to them

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

    def _log(self, values):
        "Complete the Recorder's row: what a cancelled part left out is `nan`, and so is an average that was not validated."
        log, fit, nan = self.learn.recorder.log, self._fit, float('nan')
        if len(log) < fit.own + len(fit.columns):    # else it is complete: the epoch was cancelled after it
            self.learn.recorder.log = log + [nan] * (fit.own - len(log)) + (values or [nan] * len(fit.columns))

    # small helpers

    def _grab(self, cls): return [cb for cb in self.learn.cbs if isinstance(cb, cls)]

    def _recorder(self): return next(iter(self._grab(Recorder)), None)

    def _existing(self, call) -> Learner:
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
        warnings.warn(sentence, stacklevel=2)

    def _say_cancelled(self): self._say('cancelled', 'a callback cancelled a pass over the average, which is not validated in that epoch')

    def _nothing_folded(self, fit):
        return (f'swa_start={self.swa_start} was not reached: epoch {fit.start} (from 0) would be the first one folded, so this fit '
                f'of {self.n_epoch} epochs averages nothing')

    def _check_ahead(self):
        "Say before a long fit what would only show later in it. (Not in `before_fit`, which `tta` sends as well.)"
        fit = self._fit
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


class EpochScheduler(ParamScheduler):
    "A `ParamScheduler` whose functions get `(epoch, step, n_steps)`, counted from 0, instead of the share of training done."
    def before_batch(self):
        for name, f in self.scheds.items(): self.opt.set_hyper(name, f(self.epoch, self.iter, self.n_iter))


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
