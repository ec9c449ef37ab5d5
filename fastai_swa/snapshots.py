"""Models kept along one fit: `SnapshotCallback` validates them together as they come, `average_checkpoints` makes one of them."""
from pathlib import Path
from types import SimpleNamespace

import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.learner import Learner, Recorder
from fastai.torch_core import rank_distrib
from fastcore.foundation import L
from torch import nn

from .averaging import WeightAverage
from .batchnorm import check_count, tracked_bn, update_bn
from .ensemble import Ensemble, Probabilities, load_into, write_index, write_weights
from .modules import clean_copy, unwrap
from .passes import copied_measures, is_fitting, refresh_bn

__all__ = ['SnapshotCallback', 'average_checkpoints']


class SnapshotCallback(Callback):
    """Keep the weights at the end of epoch `first` and of every `cycle_len`-th after it, and validate their growing ensemble.

    The columns `ens_valid_loss` and `ens_<metric>` are added to the learner's table, `nan` in epochs without a snapshot. A snapshot is the model
    in training, so its predictions in the fit's own validation serve, and no pass is added; loss and metrics get the log of the mean
    probability. Training is left exactly as it is. With `folder` each snapshot is written there as it comes, and the index that
    `Ensemble(folder, learn)` reads; else they stay in the host's memory. A later fit starts anew.

    Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used; `OSError` if a file cannot be written.
    """
    order = Recorder.order + 6    # after the columns of a SWACallback
    remove_on_fetch = True
    _stateattrs = '_fit', '_learner'

    def __init__(self,
        first:int,    # epoch of the first snapshot, from 0
        cycle_len:int=1,    # epochs from one snapshot to the next
        folder=None,    # for the files; None: in memory
        activation:str=None,    # 'softmax', 'sigmoid' or 'none' (regression); default: what the loss says
    ):
        self.first = check_count('first', first, least=0, optional=False)
        self.cycle_len = check_count('cycle_len', cycle_len, optional=False)
        self.folder, self.activation = None if folder is None else Path(folder), activation
        self._init_state()

    def _init_state(self):
        super()._init_state()
        self.epochs, self.snapshots = [], []    # the epochs kept; their state dicts, or paths
        self._sums, self._targets = [], []    # of each validation batch: running sum over the snapshots, and a fingerprint of its targets
        self._fit = None

    def ensemble(self, learn) -> Ensemble:
        "The snapshots as an `Ensemble` on the data of `learn`. Raises `ValueError` if there are none."
        if not self.snapshots: raise ValueError(f'no snapshot was taken: the first one is due at the end of epoch {self.first} (from 0)')
        res = Ensemble(self.snapshots, learn, activation=self.activation)
        res.epochs = list(self.epochs)
        return res

    # the events of a fit

    def before_fit(self):
        if self.learn.lock.locked() or is_fitting(self.learn, '_do_fit'): return
        self._fit = None
        if any(isinstance(cb, LRFinder) for cb in self.learn.cbs): return
        recorder = self._recorder()
        names = list(recorder.metric_names) if recorder else []
        at = len(names) - bool(recorder and recorder.add_time)
        self._fit = SimpleNamespace(own=at, begun=False, is_due=False, probabilities=Probabilities(self.learn.loss_func, self.activation),
                                    columns=['ens_valid_loss', *(f'ens_{m.name}' for m in self.learn.metrics)] if recorder else [])
        if recorder: recorder.metric_names = L(names[:at] + self._fit.columns + names[at:])

    def before_epoch(self):
        if self._fit: self._fit.is_due, self._fit.epoch = False, self.epoch

    def before_train(self):
        if not self._fit or self._fit.begun: return
        self._fit.begun = True
        self.epochs, self.snapshots, self._sums, self._targets = [], [], [], []

    def after_train(self):
        fit = self._fit
        if not fit: return
        since = fit.epoch - self.first
        fit.is_due = since >= 0 and since % self.cycle_len == 0
        if fit.is_due: self._keep()

    def before_validate(self):
        fit = self._fit
        if fit: fit.measures, fit.batch = copied_measures(self.learn.metrics) if fit.is_due and fit.columns else [], 0

    def after_batch(self):
        fit = self._fit
        if not fit or self.training or not fit.is_due or not fit.columns or not len(self.yb): return
        self._add(fit.batch)
        fit.batch += 1

    def after_validate(self):
        if not self._fit or not self._fit.columns: return
        values = [m.value for m in self._fit.measures] if self._fit.is_due and self._fit.batch else []
        self._log([v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in values])

    def after_cancel_epoch(self):
        if self._fit and self._fit.columns: self._log([])

    def after_fit(self):
        if not self.learn.lock.locked() and not is_fitting(self.learn, '_do_fit'): self._fit = None

    # what they do

    def _keep(self):
        weights = {k: v.detach().to('cpu', copy=True) if isinstance(v, torch.Tensor) else v for k, v in unwrap(self.learn.model).state_dict().items()}
        if self.folder is not None:
            file = self.folder/f'snapshot-{len(self.snapshots) + 1:02}.pth'
            if not rank_distrib():    # one of several processes
                self.folder.mkdir(parents=True, exist_ok=True)
                write_weights(file, weights)
                write_index(self.folder, [*(Path(s).name for s in self.snapshots), file.name], epochs=[*self.epochs, self._fit.epoch])
        self.snapshots.append(weights if self.folder is None else str(file))
        self.epochs.append(self._fit.epoch)

    def _add(self, i):
        "Add the predictions of validation batch `i` to the ensemble's, and measure those."
        learn, probabilities = self.learn, self._fit.probabilities
        terms = tuple(t.cpu() for t in probabilities.terms(learn.pred.detach().float()))
        targets = [float(y.double().sum()) if isinstance(y, torch.Tensor) else None for y in learn.yb]
        if len(self.epochs) == 1: self._sums.append(terms), self._targets.append(targets)
        elif i < len(self._sums) and self._targets[i] == targets: self._sums[i] = probabilities.merged(self._sums[i], terms)
        else:
            raise ValueError('the validation set gives other samples than at the first snapshot, so that no ensemble can be validated on it: '
                             'use one that is neither shuffled nor drawn at random')
        kept = learn.pred, learn.loss, learn.loss_grad
        try:
            learn.pred = probabilities.output(self._sums[i], len(self.epochs)).to(learn.pred.device)
            learn.loss = learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
            for m in self._fit.measures: m.accumulate(learn)
        finally: learn.pred, learn.loss, learn.loss_grad = kept

    def _log(self, values):
        recorder, fit, nan = self._recorder(), self._fit, float('nan')
        log = recorder.log
        if len(log) < fit.own + len(fit.columns): recorder.log = log + [nan] * (fit.own - len(log)) + (values or [nan] * len(fit.columns))

    def _recorder(self): return next((cb for cb in self.learn.cbs if isinstance(cb, Recorder)), None)

    # for checkpoints

    def fit_settings(self) -> dict: return {'first': self.first, 'cycle_len': self.cycle_len, 'in a folder': self.folder is not None}

    def state_dict(self) -> dict:
        return {'epochs': list(self.epochs), 'snapshots': list(self.snapshots), 'sums': list(self._sums), 'targets': list(self._targets)}

    def load_state_dict(self, state: dict):
        self.epochs, self.snapshots, self._sums, self._targets = (list(state[k]) for k in ('epochs', 'snapshots', 'sums', 'targets'))
        if self._fit: self._fit.begun = True


def average_checkpoints(paths, model, loader=None, **kwargs) -> nn.Module:
    """The mean of the weights in the files `paths`, in a clean copy of `model`, with batch norm refreshed.

    - `model`: a learner with a model of their architecture, on whose training set batch norm is refreshed as a `SWACallback` does it; or a
      module, with a `loader` of training batches and `kwargs` for `update_bn`, if it has batch norm. Neither is changed.

    Izmailov et al. 2018, Algorithm 1. Raises `ValueError` if `paths` is empty, if weights do not fit or a file is damaged, or without the loader
    that is needed; `FileNotFoundError` for a missing file. They name it.
    """
    paths, learn = [paths] if isinstance(paths, str | Path) else list(paths), model if isinstance(model, Learner) else None
    if not paths: raise ValueError('paths is empty: there is nothing to average')
    if learn is not None: model = learn.model
    current = clean_copy(model, () if learn is None else (learn, learn.dls, *learn.cbs))
    average = WeightAverage(current)
    for path in paths: average.update(load_into(current, path))
    names = list(tracked_bn(average.swa_model))
    if names and loader is not None: update_bn(loader, average.swa_model, **kwargs)
    elif names and learn is not None:
        with average.lent_to(learn.model): refresh_bn(learn, names, None, in_fit=False)
    elif names: raise ValueError('loader is needed: the model has batch norm, whose statistics belong to other weights than the mean')
    return average.swa_model
