"""Models kept along one fit: `SnapshotCallback` validates them together as they come, `average_checkpoints` makes one of them."""
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.learner import Learner, Recorder
from fastai.torch_core import rank_distrib
from torch import nn

from .averaging import WeightAverage
from .batchnorm import check_count, tracked_bn, update_bn
from .columns import complete_row, insert_columns, plain_values, recorder_of
from .ensemble import Ensemble
from .probabilities import Probabilities
from .weights import load_into, write_index, write_weights
from .modules import clean_copy, unwrap
from .passes import copied_measures, is_fitting, refresh_bn
from .state import not_copied

__all__ = ['SnapshotCallback', 'average_checkpoints']


class SnapshotCallback(Callback):
    """Keep the weights at the end of epoch `first` and of every `cycle_len`-th after it, and validate their growing ensemble.

    The columns `ens_valid_loss` and `ens_<metric>` are added to the learner's table, `nan` in epochs without a snapshot. A snapshot is the model
    in training, so its predictions in the fit's own validation serve, and no pass is added; loss and metrics get the log of the mean
    probability. Training is left exactly as it is. With `folder` each snapshot is written there as it comes, and the index that
    `Ensemble(folder, learn)` reads; else they stay in the host's memory. A later fit starts anew, in a folder of its own. Where a validation is
    skipped or cut at a snapshot, or is of other samples, that is said, and the columns are `nan` from there on.

    Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used; `OSError` if a file cannot be written.
    """
    order = Recorder.order + 6    # after the columns of a SWACallback
    remove_on_fetch = True
    _stateattrs = '_fit', 'epochs', 'snapshots', '_sums'    # an export carries the settings, not the snapshots

    def __init__(self,
        first:int,    # epoch of the first snapshot, from 0
        cycle_len:int=1,    # epochs from one snapshot to the next
        folder=None,    # for the files; None: in memory
        activation:str=None,    # 'softmax', 'sigmoid' or 'none' (regression); default: what the loss says
    ):
        self.first = check_count('first', first, least=0, optional=False)
        self.cycle_len = check_count('cycle_len', cycle_len, optional=False)
        self.folder, self.activation = None if folder is None else Path(folder).resolve(), activation
        self._init_state()

    def _init_state(self):
        super()._init_state()
        self.epochs, self.snapshots = [], []    # the epochs kept; their state dicts, or paths
        self._sums = []    # of each validation batch: running sum over the snapshots, their number, and a fingerprint of its targets
        self._fit = None

    def ensemble(self, learn) -> Ensemble:
        "The snapshots as an `Ensemble` on the data of `learn`. Raises `ValueError` if there are none."
        if not self.snapshots:
            raise ValueError(f'no snapshot was taken: the first one is due at the end of epoch {self.first} (from 0), and the fit ended before')
        res = Ensemble(self.snapshots, learn, activation=self.activation)
        res.epochs = list(self.epochs)
        return res

    # the events of a fit

    def before_fit(self):
        if not is_fitting(self.learn): self._fit = None    # what Ctrl-C has left
        if self.learn.lock.locked() or is_fitting(self.learn, '_do_fit'): return
        self._fit = None
        if not is_fitting(self.learn) or any(isinstance(cb, LRFinder) for cb in self.learn.cbs): return    # tta; not a fit
        if self.folder is not None:
            try: self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as e: raise ValueError(f'folder {self.folder} cannot be made: {e}') from None
        self._fit = SimpleNamespace(own=0, columns=[], begun=False, epoch=-1, is_due=False, batch=0, measures=[], said=False,
                                    probabilities=Probabilities(self.learn.loss_func, self.activation))
        recorder = recorder_of(self.learn)
        if recorder is not None: self._fit.own, self._fit.columns = insert_columns(recorder, 'ens')

    def before_epoch(self):
        if self._fit: self._fit.is_due, self._fit.epoch, self._fit.batch, self._fit.measures = False, self.epoch, 0, []

    def before_train(self):
        if not self._fit or self._fit.begun: return
        self._fit.begun = True
        self.epochs, self.snapshots, self._sums = [], [], []
        if self.folder is not None and (self.folder/'index.json').exists():
            raise ValueError(f'folder {self.folder} holds the models of another fit: give another one, or remove it')

    def after_train(self):
        fit = self._fit
        if not fit: return
        since = fit.epoch - self.first
        fit.is_due = since >= 0 and since % self.cycle_len == 0
        if fit.is_due: self._keep()

    def before_validate(self):
        fit = self._fit
        if fit and fit.is_due and fit.columns: fit.measures = copied_measures(self.learn.metrics)

    def after_batch(self):
        fit = self._fit
        if not fit or self.training or not fit.is_due or not fit.columns or not len(self.yb): return
        self._add(fit.batch)
        fit.batch += 1

    def after_validate(self):
        fit = self._fit
        if not fit or not fit.columns: return
        n = len(self.epochs)
        whole = fit.is_due and fit.batch and fit.batch == self.n_iter == len(self._sums) and all(sums[1] == n for sums in self._sums)
        self._log(plain_values(fit.measures) if whole else [])
        if fit.is_due and not whole: self._say('the validation was cut or skipped at a snapshot')

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
                write_weights(file, weights)
                write_index(self.folder, [*(Path(s).name for s in self.snapshots), file.name], epochs=[*self.epochs, self._fit.epoch],
                            activation=self._fit.probabilities.kind)
        self.snapshots.append(weights if self.folder is None else str(file))
        self.epochs.append(self._fit.epoch)

    def _add(self, i):
        "Add the predictions of validation batch `i` to the ensemble's, and measure those."
        learn, probabilities, n = self.learn, self._fit.probabilities, len(self.epochs)
        if not isinstance(learn.pred, torch.Tensor):
            raise TypeError(f'a model must give one tensor, and this one gives a {type(learn.pred).__name__}')
        terms, targets = tuple(t.cpu() for t in probabilities.terms(learn.pred.detach().float())), _fingerprint(learn.yb)
        if n == 1:
            del self._sums[i:]
            self._sums.append((terms, 1, targets))
        elif i < len(self._sums) and self._sums[i][1] == n - 1 and np.allclose(self._sums[i][2], targets, rtol=1e-9, atol=1e-9, equal_nan=True):
            self._sums[i] = probabilities.merged(self._sums[i][0], terms), n, targets
        else: return self._say('the validation set gives other samples than at the first snapshot, as one that is shuffled does')
        kept = learn.pred, learn.loss, learn.loss_grad
        try:
            learn.pred = probabilities.output(self._sums[i][0], n).to(learn.pred.device)
            learn.loss = learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
            for m in self._fit.measures: m.accumulate(learn)
        finally: learn.pred, learn.loss, learn.loss_grad = kept

    def _say(self, why):
        if not self._fit.said: warnings.warn(f'{why}: from there on the growing ensemble is not validated, and its columns are nan')
        self._fit.said = True

    def _log(self, values): complete_row(recorder_of(self.learn), self._fit.own, self._fit.columns, values)

    # for checkpoints

    def fit_settings(self) -> dict:
        return {'first': self.first, 'cycle_len': self.cycle_len, 'folder': None if self.folder is None else str(self.folder)}

    def state_dict(self) -> dict: return {'epochs': list(self.epochs), 'snapshots': list(self.snapshots), 'sums': list(self._sums)}

    def load_state_dict(self, state: dict):
        "Take over a `state_dict`. Raises `ValueError` if one of its files is missing."
        self.epochs, self.snapshots, self._sums = (list(state[k]) for k in ('epochs', 'snapshots', 'sums'))
        missing = [s for s in self.snapshots if isinstance(s, str) and not Path(s).is_file()]
        if missing: raise ValueError(f'{missing[0]} is missing: this fit wrote it before it was interrupted')
        if self._fit: self._fit.begun = True


def _fingerprint(targets) -> list[float]:
    "Numbers that other targets, or the same in another order, do not have."
    res = []
    for y in targets:
        if not isinstance(y, torch.Tensor): continue
        y = np.nan_to_num(y.detach().float().cpu().numpy().ravel().astype(float))
        res += [float(y.sum()), float(y @ np.sin(np.arange(1, len(y) + 1)))]
    return res


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
    current = clean_copy(model, () if learn is None else not_copied(learn))
    average = WeightAverage(current)
    for path in paths: average.update(load_into(current, path))
    names = list(tracked_bn(average.swa_model))
    if names and loader is not None: update_bn(loader, average.swa_model, **kwargs)
    elif names and learn is not None:
        with average.lent_to(learn.model): refresh_bn(learn, names, None, in_fit=False)
    elif names: raise ValueError('loader is needed: the model has batch norm, whose statistics belong to other weights than the mean')
    return average.swa_model
