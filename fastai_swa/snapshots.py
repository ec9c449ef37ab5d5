"""Models kept along one fit: `SnapshotCallback` validates them together as they come,
`average_checkpoints` makes one of them.
"""

import secrets
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from fastai.callback.tracker import TrackerCallback
from fastai.learner import Learner, Recorder
from torch import nn

from .averaging import WeightAverage
from .batchnorm import tracked_bn, update_bn
from .checks import check_count, check_not_negative
from .columns import complete_row, insert_columns, plain_values, recorder_of
from .ensemble import Ensemble
from .files import InUse, Lock, save_weights
from .fitting import FitCallback, SideWork, locked_for
from .journal import FOLDER
from .members import one_tensor
from .modules import clean_copy, set_modes
from .passes import copied_measures, refresh_bn, refreshable
from .probabilities import Probabilities
from .processes import Processes
from .solutions import by_epoch, check_solution, gathered, source_of
from .walk import not_copied
from .warn import warn
from .weights import NoSolution, folder_lock, load_into, read_index, refuse_nan, weights_of, write_index

__all__ = ['SnapshotCallback', 'average_checkpoints']

_VALIDATING = 'validating the growing ensemble'


@dataclass
class _Fit:
    "A fit under way."

    probabilities: Probabilities  # of the learner's loss
    processes: Processes  # that train together
    id: str  # which fit the files in the folder are of
    lock: Lock | None  # on the folder, in the first process
    side: SideWork = field(default_factory=SideWork)
    n_own: int = 0  # the learner's columns, before ours
    columns: list = field(default_factory=list)  # ours; none without a Recorder
    has_begun: bool = False  # is its first training epoch under way, or behind it?
    is_resumed: bool = False  # does it go on from a checkpoint?
    epoch: int = -1  # the epoch under way
    is_due: bool = False  # was a snapshot taken in this epoch?
    measures: list = field(default_factory=list)  # loss and metrics of this epoch's validation
    n_batches: int = 0  # of this epoch's validation, seen so far
    n_expected: int = -1  # and how many it has
    n_bytes: int = 0  # of the sums for these
    has_sums: bool = True  # did the predictions of all these go into the sums?
    has_values: bool = False  # did the measures take all of them?
    is_given_up: bool = False  # validations that do not match, or are too large: said, and no more columns


class SnapshotCallback(FitCallback):
    """Keep the weights at the end of epoch `first` and of every `cycle_len`-th after it, and
    validate their growing ensemble.

    The columns `ens_valid_loss` and `ens_<metric>` are added to the learner's table, `nan` in
    epochs without a snapshot. A snapshot is the model in training, so its predictions in the fit's
    own validation serve, and no pass is added; loss and metrics get the log of the mean
    probability. For that all predictions of the validation set are kept until the fit is over, in
    the host's memory and in each checkpoint: 4 bytes for each number that the model puts out
    ('sigmoid': 8). Where these are more than `max_preds_mb`, as of masks or of language models,
    that is said once, nothing is kept, and the columns stay `nan`; `Ensemble.validate` measures
    afterwards. Training is left exactly as it is. A later fit starts anew, in a folder of its own.

    With `folder` each snapshot is written there as it comes, and the index that `Ensemble(folder,
    learn)` reads; else they stay in the host's memory. The folder is locked from before the first
    step to the end of the fit, and nothing in it is overwritten but what the same fit wrote before
    it was interrupted.

    What cannot be done does not end the training. A snapshot that cannot be kept, or an ensemble
    that cannot be validated (outputs that are not one tensor, a metric that fails), is a warning,
    the columns are `nan`, and the end of the fit says how often; `ensemble` raises for snapshots
    that were lost. Where a validation is skipped or cut at a snapshot, or is of other samples, that
    is said, and the columns are `nan` from there on.

    Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used; before the
    first step `ValueError` for a folder with the models of another fit, or a file that would be
    overwritten, `files.InUse`, a `RuntimeError`, if another run is writing there, and `OSError` if
    it cannot be written.
    """

    order = Recorder.order + 6  # after the columns of a SWACallback
    remove_on_fetch = True
    # an export carries the settings, not the snapshots
    _stateattrs = '_fit', 'epochs', 'snapshots', '_sums', '_lost', '_id'

    def __init__(
        self,
        first: int,  # epoch of the first snapshot, from 0
        cycle_len: int = 1,  # epochs from one snapshot to the next
        folder=None,  # for the files; None: in memory
        activation: str = None,  # 'softmax', 'sigmoid' or 'none' (regression); default: what the loss says
        max_preds_mb: float = 256,  # the most to keep of validation predictions, in MB; 0: none, and no columns
    ):
        self.first = check_count('first', first, least=0)
        self.cycle_len = check_count('cycle_len', cycle_len)
        self.folder = None if folder is None else Path(folder).resolve()
        self.activation = activation
        self.max_preds_mb = check_not_negative('max_preds_mb', max_preds_mb)
        self._init_state()

    def _init_state(self):
        super()._init_state()
        self._forget()
        self._fit = None

    def _forget(self):
        self.epochs = []  # after which a snapshot was kept
        self.snapshots = []  # their state dicts, or paths
        self._sums = []  # of each validation batch: sum over the snapshots, their number, fingerprint of its targets
        self._lost = {}  # epoch whose snapshot could not be kept -> why
        self._id = None  # of the fit that all this is of, which stands in its folder as well

    def ensemble(self, learn) -> Ensemble:
        """The snapshots as an `Ensemble` on the data of `learn`.

        Raises `ValueError` if there are none, and `RuntimeError` if some could not be kept;
        `Ensemble(callback.snapshots, learn)` is of the others.
        """
        if self._lost:
            epochs = ', '.join(map(str, self._lost))
            kept = ', '.join(map(str, self.epochs)) or 'none'
            where = 'in the `snapshots` of the callback' if self.folder is None else f'in {self.folder}'
            why = next(iter(self._lost.values()))
            raise RuntimeError(
                f'the snapshots of the epochs {epochs} could not be kept ({why}); those of the epochs {kept} are '
                f'{where}'
            )
        if not self.snapshots:
            raise ValueError(
                f'no snapshot was taken: the first one is due at the end of epoch {self.first} (from 0), and the fit '
                'ended before'
            )
        res = Ensemble(self.snapshots, learn, activation=self.activation)
        res.epochs = list(self.epochs)
        return res

    def solutions(self) -> dict:
        """'epoch 3' -> state dict or path, of each snapshot that could be kept: so `rays`, `Curve`,
        `Ensemble` and `average_checkpoints` take the callback itself. Raises `ValueError` if there is
        none yet.
        """
        if not self.snapshots:
            raise NoSolution('the SnapshotCallback', 'has kept nothing yet')
        return by_epoch(self.snapshots, self.epochs)

    # the events of a fit

    def before_fit(self):
        processes = Processes(self.learn)
        probabilities = Probabilities(self.learn.loss_func, self.activation)
        self._fit = _Fit(probabilities, processes, processes.first(secrets.token_hex, 8), lock=None)
        if self.folder is not None:
            processes.first(self._lock)
        recorder = recorder_of(self.learn)
        if not self.max_preds_mb:
            self._refuse_trackers([] if recorder is None else list(recorder.metric_names))
        elif recorder is not None:
            self._fit.n_own, self._fit.columns = insert_columns(recorder, 'ens')

    def _refuse_trackers(self, columns: list):
        "Raise `ValueError` for a tracker of a column that is left out, which would end the fit without a word on why."
        for cb in self.learn.cbs:
            if not isinstance(cb, TrackerCallback) or cb.monitor in columns:
                continue
            if str(cb.monitor).startswith('ens_'):
                raise ValueError(
                    f'max_preds_mb=0 leaves out the columns of the growing ensemble, and the {type(cb).__name__} '
                    f'monitors {cb.monitor!r}: give it another column, or max_preds_mb more'
                )

    def before_epoch(self):
        fit = self._fit
        self.unmute_trackers()
        fit.epoch = self.epoch_under_way
        fit.is_due = False
        fit.measures = []
        fit.n_batches = 0
        fit.n_expected = -1
        fit.n_bytes = 0
        fit.has_sums = True
        fit.has_values = False

    def before_train(self):
        fit = self._fit
        if fit.has_begun:
            return
        fit.has_begun = True
        if not fit.is_resumed:
            self._forget()
            self._id = fit.id
        if self.folder is not None:
            fit.processes.first(self._claim)

    def after_train(self):
        fit = self._fit
        since = fit.epoch - self.first
        if since < 0 or since % self.cycle_len:
            return
        try:
            self._keep()
            fit.is_due = True
        except Exception as e:
            fit.side.note('keeping a snapshot', e, 'the ensemble lacks it')
            self._lost[fit.epoch] = ' '.join(str(e).split())

    def before_validate(self):
        if self._is_validated():
            with self._attempt('has_values'):
                self._fit.measures = copied_measures(self.learn.metrics)

    def after_batch(self):
        fit = self._fit
        if self.training or not self._is_validated() or not len(self.yb):
            return
        fit.n_expected = self.learn.n_iter  # another callback's validation would change it
        if fit.has_sums:
            with self._attempt('has_sums'):
                self._add(fit.n_batches)
        if fit.has_sums and fit.has_values:
            with self._attempt('has_values'):
                self._measure(fit.n_batches)
        fit.n_batches += 1

    def after_validate(self):
        fit = self._fit
        if not fit.columns:
            return
        values = []
        if self._is_validated() and fit.has_sums:
            if not fit.n_batches == fit.n_expected == len(self._sums):
                self._give_up('the validation was cut or skipped at a snapshot')
            elif fit.has_values:
                with self._attempt('has_values'):
                    values = plain_values(fit.measures)
        elif self._is_validated():
            self._sums = []  # some of them lack this snapshot
        self._log(values)

    def after_cancel_epoch(self):
        if self._fit.columns:
            self._log([])

    def after_epoch(self):
        fit = self._fit
        is_lost = fit.epoch in self._lost
        if fit.is_given_up or is_lost or self._is_validated() and not (fit.has_sums and fit.has_values):
            self.mute_trackers(fit.columns)

    def over(self):
        fit = self._fit
        if fit.lock is not None:
            fit.lock.release()
        self._sums = []
        fit.side.conclude()

    # the growing ensemble

    def _is_validated(self) -> bool:
        "Is the ensemble validated in this epoch?"
        fit = self._fit
        return fit.is_due and bool(fit.columns) and not fit.is_given_up

    @contextmanager
    def _attempt(self, flag: str):
        "A part of validating the ensemble, without which `flag` is false for this epoch."
        fit = self._fit
        setattr(fit, flag, False)
        with fit.side.attempt(_VALIDATING, 'its columns are nan'):
            yield
            setattr(fit, flag, True)

    def _add(self, i: int):
        "Add the predictions of validation batch `i` to the ensemble's."
        fit, learn, n = self._fit, self.learn, len(self.epochs)
        output = one_tensor(learn.pred, learn.model)
        terms = tuple(t.cpu() for t in fit.probabilities.terms(output.detach().float()))
        if self._is_too_much(terms):
            return
        targets = _fingerprint(learn.yb)
        if n == 1:
            self._sums[i:] = [(terms, 1, targets)]
            return
        if not self._sums:
            raise RuntimeError('the predictions of an earlier snapshot are missing')
        total, n_before, targets_before = self._sums[i] if i < len(self._sums) else (None, None, None)
        if n_before != n - 1 or not np.allclose(targets_before, targets, rtol=1e-9, atol=1e-9, equal_nan=True):
            self._give_up(
                'the validation set gives other samples than at the first snapshot, as one that is shuffled does'
            )
            return
        self._sums[i] = fit.probabilities.merged(total, terms), n, targets

    def _is_too_much(self, terms: tuple) -> bool:
        "Would the sums, with `terms` for one more validation batch, take more than they may? If so, give up."
        fit = self._fit
        batch = sum(t.numel() * t.element_size() for t in terms)
        fit.n_bytes += batch
        all_whole = batch * (fit.n_expected - 1)  # at the first batch it is seen already; the last may be a small one
        needed = max(fit.n_bytes, all_whole) / 1e6
        if needed <= self.max_preds_mb:
            return False
        self._give_up(
            f'the predictions of the validation set take about {needed:.3g} MB, which would be kept in memory and in '
            f'each checkpoint, and max_preds_mb={self.max_preds_mb:g} (Ensemble.validate measures after the fit '
            'without keeping them; max_preds_mb=0 leaves the columns out)'
        )
        return True

    def _measure(self, i: int):
        "Let the measures have the ensemble's predictions of validation batch `i`."
        fit, learn = self._fit, self.learn
        if fit.is_given_up:
            return
        total, n, _ = self._sums[i]
        kept = learn.pred, learn.loss, learn.loss_grad
        try:
            learn.pred = fit.probabilities.output(total, n).to(learn.pred.device)
            learn.loss = learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
            for m in fit.measures:
                m.accumulate(learn)
        finally:
            learn.pred, learn.loss, learn.loss_grad = kept

    def _give_up(self, why: str):
        self._sums = []
        warn(f'{why}: from there on the growing ensemble is not validated, and its columns are nan')
        self._fit.is_given_up = True

    def _log(self, values):
        complete_row(recorder_of(self.learn), self._fit.n_own, self._fit.columns, values)

    # the snapshots and their folder

    def _lock(self):
        "Make and lock the folder."
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f'folder {self.folder} cannot be made: {e}') from None
        try:
            self._fit.lock = locked_for(self, self.folder, folder_lock)
        except InUse:
            raise InUse(
                f'another run is writing its snapshots to {self.folder}: wait for it, or give each run a folder of its '
                'own'
            ) from None

    def _claim(self):
        """Make sure that the folder is this fit's, and that no file of another one will be
        overwritten.
        """
        fit = self._fit
        index = _index_of(self.folder)
        if fit.is_resumed and index.get('fit') == fit.id:
            return
        if index.get('files') != [] if index else (self.folder / 'index.json').exists():
            raise ValueError(f'folder {self.folder} holds the models of another fit: give another one, or remove it')
        n_due = len(range(self.first, self.learn.n_epoch, self.cycle_len))
        for i in range(len(self.snapshots), n_due):
            if self._file(i).exists():
                raise ValueError(
                    f'{self._file(i)} is there already, and this fit would overwrite it: give another folder, or move '
                    'it away'
                )
        self._write_index()  # from now on what is written there is known to be of this fit

    def _keep(self):
        if self.folder is None:
            snapshot = weights_of(self.learn.model)
        else:
            snapshot = self._fit.processes.first(self._write)
        self.snapshots.append(snapshot)
        self.epochs.append(self._fit.epoch)

    def _write(self) -> str:
        file = self._file(len(self.snapshots))
        save_weights(file, weights_of(self.learn.model))
        self._write_index(file)
        return str(file)

    def _write_index(self, new: Path | None = None):
        unchanged = [Path(s).name for s in self.snapshots]
        files = list(unchanged)
        epochs = list(self.epochs)
        if new is not None:
            files.append(new.name)
            epochs.append(self._fit.epoch)
        content = {'epochs': epochs, 'activation': self._fit.probabilities.kind, 'fit': self._fit.id}
        write_index(self.folder, files, unchanged=unchanged, **content)

    def _file(self, i: int) -> Path:
        return self.folder / f'snapshot-{i + 1:02}.pth'

    # for checkpoints

    def fit_settings(self) -> dict:
        folder = None if self.folder is None else self.folder.name  # it may have been moved since
        res = {'first': self.first, 'cycle_len': self.cycle_len, FOLDER: folder, 'activation': self.activation}
        if not self.max_preds_mb:
            res['max_preds_mb'] = 0  # there are no columns; how large the limit is matters to no fit
        return res

    def state_dict(self) -> dict:
        fit = self._fit
        if fit is not None and not fit.has_begun and not fit.is_resumed:  # what is here is of an earlier fit
            return {'epochs': [], 'snapshots': [], 'sums': [], 'lost': [], 'fit': fit.id, 'is_given_up': False}
        return {
            'epochs': list(self.epochs),
            'snapshots': [Path(s).name if isinstance(s, str) else s for s in self.snapshots],
            'sums': list(self._sums),
            'lost': [list(pair) for pair in self._lost.items()],
            'fit': self._id,
            'is_given_up': fit is not None and fit.is_given_up,
        }

    def load_state_dict(self, state: dict):
        """Take over a `state_dict`. Raises `ValueError` if one of its files is missing, or the
        folder is another fit's by now."""
        snapshots = list(state['snapshots'])
        if self.folder is not None:
            snapshots = [str(self.folder / Path(s).name) for s in snapshots]
        missing = [s for s in snapshots if isinstance(s, str) and not Path(s).is_file()]
        if missing:
            raise ValueError(f'{missing[0]} is missing: this fit wrote it before it was interrupted')
        index = {} if self.folder is None else _index_of(self.folder)
        if index.get('fit', state['fit']) != state['fit']:
            raise ValueError(
                f'folder {self.folder} holds the models of another fit by now, not those that this one wrote before it '
                'was interrupted'
            )
        self.epochs = list(state['epochs'])
        self.snapshots = snapshots
        self._sums = list(state['sums'])
        self._lost = dict(map(tuple, state['lost']))
        self._id = state['fit']
        if self._fit is not None:
            self._fit.is_resumed = True
            self._fit.id = state['fit']
            self._fit.is_given_up = state.get('is_given_up', False)


def _index_of(folder: Path) -> dict:
    "The index in `folder`; empty if there is none that can be read."
    try:
        return read_index(folder)
    except (FileNotFoundError, ValueError):
        return {}


def _fingerprint(targets) -> list[float]:
    "Numbers that other targets, or the same in another order, do not have."
    res = []
    for y in targets:
        if not isinstance(y, torch.Tensor):
            continue
        y = np.nan_to_num(y.detach().float().cpu().numpy().ravel().astype(float))
        res += [float(y.sum()), float(y @ np.sin(np.arange(1, len(y) + 1)))]
    return res


def average_checkpoints(paths, model, loader=None, **kwargs) -> nn.Module:
    """The mean of the weights in the files `paths`, in a clean copy of `model`, with batch norm
    refreshed.

    - `paths`: the files, as `solutions.py` says; or what else `rays` takes as solutions, such as
      state dicts, learners, a `SnapshotCallback`, an `Ensemble` or its folder.
    - `model`: a learner with a model of their architecture, on whose training set batch norm is
      refreshed as a `SWACallback` does it; or a module, with a `loader` of training batches and
      `kwargs` for `update_bn`, if it has batch norm. Neither is changed.

    Izmailov et al. 2018, Algorithm 1. Raises `ValueError` if `paths` is empty, if weights do not
    fit or have a NaN, if a file is damaged, or without the loader that is needed; `FileNotFoundError` for a
    missing file; `TypeError` for what has no weights, and for arguments in the other order. They
    name it.
    """
    if not isinstance(model, Learner | nn.Module):
        raise TypeError(
            f'model must be a learner or a module, not {repr(model)[:60]}; the files come first: '
            'average_checkpoints(paths, model)'
        )
    found = gathered(paths)
    if not found:
        raise ValueError('paths is empty: there is nothing to average')
    for name, solution in found.items():
        check_solution(name, solution)
    learn = model if isinstance(model, Learner) else None
    if learn is not None:
        model = learn.model
    current = clean_copy(model, () if learn is None else not_copied(learn))
    modes = [m.training for m in current.modules()]
    average = WeightAverage(current)
    for name, solution in found.items():
        source = source_of(solution)
        load_into(current, source, name)
        refuse_nan(current.state_dict(), source if isinstance(source, str | Path) else name)
        average.update(current)
    swa_model = average.swa_model
    if learn is not None and loader is None:
        names = refreshable(learn)
        if names:
            with average.lent_to(learn.model):
                refresh_bn(learn, names, None, in_fit=False)
    # where modes move weights, it was averaged in train mode
    set_modes(swa_model, dict(zip(swa_model.modules(), modes)))
    if learn is None and loader is None and tracked_bn(swa_model):
        raise ValueError(
            'loader is needed: the model has batch norm, whose statistics belong to other weights than the mean'
        )
    if loader is not None:
        update_bn(loader, swa_model, **kwargs)
    return swa_model
