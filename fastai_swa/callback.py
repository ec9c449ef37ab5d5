"""`SWACallback`: the running average of a fit, validated beside the model in training. Callbacks only wire; the mathematics is below."""
import copy, sys, warnings, weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from numbers import Integral, Real
from types import SimpleNamespace

import torch
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.hook import HookCallback
from fastai.callback.progress import CSVLogger, ShowGraphCallback
from fastai.callback.schedule import LRFinder, ParamScheduler
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import ShortEpochCallback
from fastai.data.load import DataLoader
from fastai.learner import AvgLoss, Learner, Recorder, save_model
from fastai.torch_core import get_random_states, join_path_file, set_random_states
from fastcore.foundation import L
from torch import nn

from .averaging import WeightAverage, all_finite, check_match, equal
from .batchnorm import batch_moments, check_count, tracked_bn
from .modules import clean_copy, unwrap
from .schedules import start_epoch

__all__ = ['SWACallback', 'SaveSWAModelCallback']


class SWACallback(Callback):
    """Average the weights at the ends of epochs into `swa_model` and validate it beside the model in training.

    Training itself is left exactly as it is. The columns `swa_valid_loss` and `swa_<metric>` are added to the learner's table, `nan`
    in epochs that did not validate the average. A later fit starts a new average at its first fold; until then the old one stays.
    Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", Algorithm 1.

    Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used.
    """
    _name = 'swa'
    order = Recorder.order + 5    # after the Recorder has logged the epoch, before trackers and the progress table read it
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
        if not isinstance(swa_model, nn.Module | None): raise TypeError(f'swa_model must be an nn.Module or None, not {type(swa_model).__name__}')
        for name, value, least in (('cycle_len', cycle_len, 1), ('swa_eval_freq', swa_eval_freq, 0)):
            if value is None: raise TypeError(f'{name} must be an int, not None')
            check_count(name, value, least)
        check_count('bn_batches', bn_batches)
        if not callable(weight): raise TypeError(f'weight must be a function such as equal or ema(0.99), not {weight!r}')
        if every is not None: raise NotImplementedError(f'every={every!r}: folding by optimizer steps is not available yet; leave it None')
        self.cycle_len, self.swa_eval_freq, self.bn_batches, self.weight, self.every = cycle_len, swa_eval_freq, bn_batches, weight, every
        self.enabled = True
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
        is refused with one, too.
        """
        learn = self._existing('averaged')
        with self._average.lent_to(learn.model), _no_fit(learn):
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
        if len([cb for cb in self._grab(SWACallback) if cb.enabled]) > 1:
            raise ValueError('this fit has two SWACallbacks, whose columns would collide; pass one, or first call learn.remove_swa()')
        if self._given is not None: check_match(self.learn.model, self._given)
        self._fit = SimpleNamespace(start=start_epoch(self.swa_start, self.n_epoch), n_folds=0, begun=False, trained=False, said=set())
        recorder = self._recorder()
        if recorder is None: return
        names, at = list(recorder.metric_names), len(recorder.metric_names) - bool(recorder.add_time)
        self._fit.own, self._fit.columns = at, ['swa_valid_loss', *(f'swa_{m.name}' for m in self.learn.metrics)]
        recorder.metric_names = L(names[:at] + self._fit.columns + names[at:])
        recorder.swa_epochs = []

    def before_epoch(self):
        if self._fit: self._fit.trained = self._fit.folded = False

    def before_train(self):
        if not self._fit or self._fit.begun: return
        self._fit.begun = True
        self._warn_ahead()

    def after_train(self):
        if not self._fit or not self.enabled: return
        self._fit.trained = True
        since = self.epoch - self._fit.start
        self._fit.folded = since >= 0 and since % self.cycle_len == 0 and self._fold()

    def after_validate(self):
        if not self._fit or not self._fit.trained or self.learn.lock.locked() or self._recorder() is None: return
        fit = self._fit
        due = fit.folded and self.swa_eval_freq and (fit.n_folds - 1) % self.swa_eval_freq == 0
        due = fit.n_folds and (due or self.epoch == self.n_epoch - 1)
        self._log(self._evaluate() if due else [])

    def after_cancel_epoch(self):
        if self._fit and self._recorder() is not None: self._log([])

    def after_cancel_fit(self):
        if not self._fit or not self._fit.n_folds or not self._stale: return
        try:
            with self._average.lent_to(self.learn.model): self._refresh(self.learn, in_fit=True)
        except _PassCancelled: self._say('cancelled', _PassCancelled.sentence)

    def after_fit(self):
        if not self._fit or self.learn.lock.locked(): return
        fit, self._fit = self._fit, None
        if self._average is not None: self._average.release()
        if fit.begun and not fit.n_folds and not fit.said: self._say('nothing', self._nothing_folded(fit), fit)

    # folding

    def _fold(self) -> bool:
        "Fold the model in training; whether it was."
        learn, model, fit = self.learn, unwrap(self.learn.model), self._fit
        if not all_finite(model.parameters()):
            self._say('finite', f'the weights at the end of epoch {self.epoch} are not finite; such epochs are left out of the average')
            return False
        if fit.n_folds == 0:    # the new average is complete before the old one goes
            swa_model = clean_copy(model, shared=(learn, learn.dls, *learn.cbs)) if self._given is None else self._given
            self._average, self._epochs, self._learner = WeightAverage(model, self.weight, swa_model), [], weakref.ref(learn)
        self._average.update(model)
        self._epochs.append(self.epoch)
        fit.n_folds += 1
        self._bn = list(tracked_bn(model))
        self._stale = bool(self._bn)
        if (recorder := self._recorder()) is not None: recorder.swa_epochs = self.averaged_epochs
        return True

    # validating the average

    def _evaluate(self) -> list | None:
        "The values of the `swa_*` columns now; none if a callback cancels a pass."
        collector = _Collector(self.learn.metrics)
        try:
            with self._average.lent_to(self.learn.model):
                self._refresh(self.learn, in_fit=True)
                with _aside(self.learn, collector): self.learn._do_epoch_validate(dl=_fresh(self.learn.dls[1]))
        except _PassCancelled: return self._say('cancelled', _PassCancelled.sentence)
        except _CANCELS: return []
        return collector.values()

    def _refresh(self, learn, in_fit=None):
        "Refresh the batch norm of `learn.model`, which holds the average, by the learner's own loop over a fresh training loader."
        if not self._stale: return
        model = unwrap(learn.model)    # replicas would each keep statistics of their own
        modules = dict(model.named_modules())
        # outside a fit the events around a validation set mixed precision and the like up and tear them down
        with _aside(learn), (nullcontext() if in_fit or _fit_is_running(learn) else learn.validation_context()):
            dl = _fresh(learn.dls.train, drop_last=False)
            if hasattr(dl, 'wgts'): dl.get_idxs = partial(DataLoader.get_idxs, dl)    # fastai's weighted loaders repeat and omit samples
            if self.bn_batches is not None: dl = _First(dl, self.bn_batches)
            with batch_moments(model, {name: modules[name] for name in self._bn}) as moments, \
                 _attr(learn, 'model', model), learn.added_cbs(_MomentsCallback(moments)):
                try: learn._do_epoch_validate(dl=dl)
                except _CANCELS: raise _PassCancelled from None    # CancelFit would end the training, or escape learn.fit
        if moments.n_skipped: self._say('skipped', moments.skipped)
        self._stale = False

    def _log(self, values):
        "Complete the Recorder's row: what a cancelled part left out is `nan`, and so is an average that was not validated."
        recorder, fit = self.learn.recorder, self._fit
        recorder.log += [float('nan')] * (fit.own - len(recorder.log))
        recorder.log += values or [float('nan')] * len(fit.columns)

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

    def _nothing_folded(self, fit):
        return (f'swa_start={self.swa_start} was not reached: epoch {fit.start} (from 0) would be the first one folded, so this fit '
                f'of {self.n_epoch} epochs averages nothing')

    def _warn_ahead(self):
        "Say before a long fit what would only show at its end."
        fit = self._fit
        if fit.start >= self.n_epoch: return self._say('nothing', self._nothing_folded(fit))
        first = fit.start if self.swa_eval_freq else self.n_epoch - 1
        for cb in self._grab(EarlyStoppingCallback):
            if cb.monitor.startswith('swa_') and cb.patience <= first:
                self._say('stops', f'EarlyStoppingCallback(monitor={cb.monitor!r}, patience={cb.patience}) stops this fit before '
                                   f'epoch {first}, the first that validates the average (swa_start={self.swa_start}); use a patience '
                                   f'above {first}')
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


# a pass through the learner's own loop, aside from training

_CANCELS = CancelFitException, CancelEpochException, CancelTrainException


class _PassCancelled(RuntimeError):
    sentence = 'a callback cancelled the batch-norm pass: the statistics of the average are not refreshed yet'
    def __init__(self, *args): super().__init__(*args or (self.sentence,))


class _Collector(Callback):
    "Loss and metrics of a validation, on objects of its own: the Recorder's keep the values of the model in training."
    order = Recorder.order
    def __init__(self, metrics):
        self.measured, self.cancelled = [AvgLoss(), *map(copy.copy, metrics)], False
    def before_validate(self):
        for m in self.measured: m.reset()
    def after_batch(self):
        if len(self.yb):
            for m in self.measured: m.accumulate(self.learn)
    def after_cancel_validate(self): self.cancelled = True
    def values(self) -> list:
        if self.cancelled: return []
        values = [m.value for m in self.measured]
        values = [v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in values]
        return [float('nan') if v is None else v for v in values]


class _MomentsCallback(Callback):
    "Tells `moments` where batches end."
    def __init__(self, moments): self.moments = moments
    def after_batch(self): self.moments.end_batch()
    def after_cancel_validate(self): raise _PassCancelled


class _First:
    "The first `n` batches of a loader."
    def __init__(self, dl, n): self.dl, self.n = dl, n
    def __len__(self): return min(len(self.dl), self.n)
    def __iter__(self): return islice(iter(self.dl), self.n)
    def __getattr__(self, name): return getattr(self.dl, name)


def _fresh(dl, **kwargs):
    "A loader like `dl` that leaves the random state of `dl` alone; `kwargs` as for fastai's `DataLoader.new`."
    if hasattr(dl, 'new'): return dl.new(**kwargs)
    if type(dl) is torch.utils.data.DataLoader and dl.batch_size is not None and kwargs:
        names = 'dataset', 'batch_size', 'sampler', 'num_workers', 'collate_fn', 'pin_memory', 'timeout', 'worker_init_fn', 'generator'
        return type(dl)(**{name: getattr(dl, name) for name in names}, **kwargs)
    return dl


@contextmanager
def _attr(o, name, value):
    old = getattr(o, name)
    try: yield setattr(o, name, value)
    finally: setattr(o, name, old)


_LOOP = 'dl xb yb pred loss loss_grad iter n_iter training epoch n_epoch train_iter pct_train'.split()

def _concerns_training(cb) -> bool:
    "Does `cb` record, watch, steer or end training, so that a pass aside from it must not reach it?"
    return (getattr(cb, 'remove_on_fetch', False)
            or isinstance(cb, SWACallback | TerminateOnNaNCallback | ShortEpochCallback | ParamScheduler | HookCallback
                              | CSVLogger | ShowGraphCallback)
            or any(c.__name__ == 'TensorBoardBaseCallback' for c in type(cb).__mro__))    # lacks the flag; may not be installed


@contextmanager
def _aside(learn, *cbs):
    "Within this context the learner's loop runs with `cbs` and without what concerns training; all that it changes is put back."
    muted = [cb for cb in learn.cbs if _concerns_training(cb)]
    runs = [(vars(cb), vars(cb).get('run')) for cb in muted]
    loop = {name: vars(learn)[name] for name in _LOOP if name in vars(learn)}
    bars = [(vars(cb), vars(cb)['pbar']) for cb in learn.cbs if 'pbar' in vars(cb)]
    modes = [(m, m.training) for m in unwrap(learn.model).modules()]
    samplers = [o for dl in getattr(learn.dls, 'loaders', []) for o in (dl, getattr(dl, 'sampler', None))]    # of plain PyTorch loaders
    generators = [(o.generator, o.generator.get_state()) for o in samplers if isinstance(getattr(o, 'generator', None), torch.Generator)]
    states = get_random_states()
    try:
        for attrs, _ in runs: attrs['run'] = False
        with learn.added_cbs(cbs): yield
    finally:
        set_random_states(**states)
        for g, state in generators: g.set_state(state)
        for m, mode in modes: m.training = mode
        for attrs, bar in bars: attrs['pbar'] = bar
        vars(learn).update(loop)
        for attrs, run in runs:
            if run is None: attrs.pop('run', None)
            else: attrs['run'] = run


def _fit_is_running(learn) -> bool:
    "Is a fit of `learn` under way in this thread? (Its own state does not tell: Ctrl-C leaves no trace in it.)"
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is Learner._do_fit.__code__ and frame.f_locals.get('self') is learn: return True
        frame = frame.f_back
    return False


class _RefusedFit:
    "Stands in for the learner's training methods within `averaged()`; pickles as the method itself, so that `export` works there."
    def __init__(self, learn, name): self.learn, self.name = learn, name
    def __call__(self, *args, **kwargs):
        raise RuntimeError(f'{self.name} inside averaged() would train the average; leave that context first, or call apply()')
    def __reduce__(self): return getattr, (self.learn, self.name)


@contextmanager
def _no_fit(learn):
    names = [n for n in dir(type(learn)) if n.startswith('fit') or n in ('fine_tune', 'lr_find')]
    kept = {n: vars(learn)[n] for n in names if n in vars(learn)}
    vars(learn).update({n: _RefusedFit(learn, n) for n in names})
    try: yield
    finally:
        for n in names: vars(learn).pop(n, None)
        vars(learn).update(kept)
