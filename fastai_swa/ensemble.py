"""`Ensemble`: many models, one prediction. They are combined in a learner's place, stacked, saved."""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from fastai.learner import Learner
from fastcore.foundation import L, noop
from torch import nn
from torch.nn import functional as F

from .aside import autocast_left, whole
from .checks import check_choice
from .files import replacing, save_weights
from .fitting import no_fit
from .interrupts import uninterrupted
from .members import Combination, EachMember, Members, as_graph
from .modules import Kept, clean_copy, has_own_modes, unwrap
from .probabilities import Probabilities, features
from .randomness import randomness_kept
from .samples import Overlaps, length
from .solutions import by_epoch, gathered, one_solution, source_of
from .soups import Soup, make_soup
from .views import lending
from .walk import not_copied
from .warn import warn
from .weights import (
    ANCHOR,
    SOUP_INDEX,
    check_weights_file,
    is_plain_name,
    load_into,
    read_index,
    refuse_nan,
    replace_files,
    sha256,
    weights_of,
)

__all__ = ['Ensemble']


_PICKLE = signature(Learner.export).parameters['pickle_module'].default  # as this version of fastai exports


@dataclass
class _Described:
    "What the argument `members` of an ensemble says; `None`, or empty, where it says nothing."

    members: list
    learn: Learner | None = None
    archs: list | None = None  # a module for each member, or `None` where it is of the learner's architecture
    combine: str | None = None
    activation: str | None = None
    epochs: list = field(default_factory=list)  # after which the members were kept, where that is known
    stacking: dict | None = None  # the weights that `stack` found
    stacked_on: object = None  # the data set that it was fitted on
    trained_on: list | None = None  # the training set of each member, `None` where it is not known
    anchor: object = None  # the weights that all members come from


class Ensemble:
    """Several trained models that predict as one, with a learner's own methods.

    - `members`: a list of learners, modules, state dicts and paths to these (what `learn.save`,
      `torch.save` or safetensors wrote; see `solutions.py`), of one architecture or several; the
      folder that `fit_snapshots`, `fit_fge` or `save` wrote; or another `Ensemble`. What has
      `solutions()` stands for these, alone or in the list: a `SnapshotCallback`, or a `SWACallback`
      for its `swa_model` as it is. Instead of the list there may be a dict.
    - `learn`: the learner whose data, loss and metrics serve; default: the first learner among the
      members. State dicts are of its architecture, unless `archs` gives a module for each member.
      Its callbacks see the output of each member as they see its own model's: where one takes an
      output apart (`self.learn.pred = self.pred.logits` in `after_pred`), what it leaves is
      combined.
    - `combine`: 'mean' of the probabilities, the default; 'vote', each class by the number of
      members that prefer it, ties by the mean; 'stack', see `stack`.
    - `activation`: what makes probabilities of a model's output: 'softmax', 'sigmoid' (multi-label)
      or 'none' (regression); default: what the learner's loss says.

    To predict samples that a member was trained on, or that `stack` was fitted on, warns: what is
    scored there flatters. A member that is a learner was trained on its own training set, others on
    that of `learn`, as far as it is known. (See `samples.Samples` for how samples are known again;
    what `stack` was fitted on is not in files.)

    Huang et al. 2017 (arXiv 1704.00109); Garipov et al. 2018 (arXiv 1802.10026).

    Raises `ValueError` or `TypeError`, naming it, for a member that cannot be used: a missing or
    damaged file, weights of another architecture; for an unknown loss without `activation`; for a
    vote in regression.
    """

    def __init__(
        self,
        members,
        learn: Learner | None = None,
        combine: str | None = None,
        activation: str | None = None,
        archs=None,
    ):
        given = _described(members)
        self.members = _checked(given.members)
        self.learn = learn or given.learn or _first_learner(self.members)
        self.archs = list(archs or given.archs or [None] * len(self.members))
        if len(self.archs) != len(self.members):
            raise ValueError(f'archs has {len(self.archs)} modules for {len(self.members)} members')
        self.epochs = given.epochs
        self.stacking = given.stacking
        self.probabilities = Probabilities(self.learn.loss_func, activation or given.activation)
        self.combine = combine or given.combine or 'mean'
        self._stacked_on = given.stacked_on
        self._trained_on = given.trained_on or [_training_set(m) for m in self.members]
        self._overlaps = Overlaps()
        self.anchor = given.anchor  # the weights that all members come from, where they are known
        self.runs = None  # of `fine_tune_soup`: a table of its runs

    @property
    def combine(self) -> str:
        return self._combine

    @combine.setter
    def combine(self, how):
        check_choice('combine', how, ('mean', 'vote', 'stack'))
        if how == 'vote' and self.probabilities.kind == 'none':
            raise ValueError("combine='vote' needs classes, and this loss is one of regression")
        if how == 'stack' and self.stacking is None:
            raise ValueError("combine='stack' needs stack() first, which finds the weights")
        self._combine = how

    def __len__(self):
        return len(self.members)

    def __getitem__(self, i):
        """The ensemble of some of the members: `i` is an index, several, or a slice. The weights that
        `stack` found are of all members, so that 'stack' becomes 'mean'.
        """

        def pick(o):
            if isinstance(i, slice):
                return o[i]
            return [o[j] for j in i] if hasattr(i, '__iter__') else [o[i]]

        how = 'mean' if self.combine == 'stack' else self.combine
        res = Ensemble(pick(self.members), self.learn, how, self.probabilities.kind, pick(self.archs))
        res._trained_on = pick(self._trained_on)
        res.anchor = self.anchor
        res.epochs = pick(self.epochs) if len(self.epochs) == len(self) else []
        return res

    def solutions(self) -> dict:
        """Name -> member, called by the epoch after which it was kept, where that is known, else by
        its file or number: so `rays`, `Curve`, `average_checkpoints` and other ensembles take this
        one.
        """
        return by_epoch(self.members, self.epochs)

    def __repr__(self):
        epochs = f', of the epochs {", ".join(map(str, self.epochs))}' if self.epochs else ''
        models = 'model' if len(self) == 1 else 'models'
        return f'Ensemble of {len(self)} {models}{epochs}, combined by {self.combine}'

    # predicting, as a learner does

    @contextmanager
    def active(self):
        """Within this context the learner is the ensemble: it predicts, validates, shows and
        interprets with it; gives the learner.

        All members are in memory at once, and on the learner's device while it predicts. Its own
        model, its mode and those of the members come back at the end. To train, save or export
        inside is refused with `RuntimeError`.

        fastai's interpretations that are made inside go on with the ensemble when they are used
        after it; if its members have changed since, `RuntimeError`. (Not so a method of the learner
        that is taken along, or an object of another kind that keeps the learner: outside of this
        context the learner is what it was. `views.as_lent(learn)` is what such an object can keep
        instead.)
        """
        with lending(self.learn, 'active()', self.active, self._version), self._in_learner() as learn:
            yield learn

    def get_preds(self, ds_idx: int = 1, dl=None, **kwargs):
        """Combined probabilities (regression: values) and targets, as `Learner.get_preds` gives
        them; `kwargs` as there.
        """
        with self._in_learner() as learn, learn.no_bar(), learn.no_logging():
            return learn.get_preds(ds_idx, dl, **kwargs)

    def predict(self, item, **kwargs):
        "Decoded prediction, its tensor, and the probabilities of one `item`, as `Learner.predict`."
        with self._in_learner() as learn:
            return learn.predict(item, **kwargs)

    def validate(self, ds_idx: int = 1, dl=None, cbs=None) -> L:
        """Loss and metrics of the ensemble; both get the log of the combined probabilities, so that
        no activation is applied twice."""
        with self._in_learner() as learn, learn.no_bar(), learn.no_logging():
            return learn.validate(ds_idx, dl, cbs)

    def tta(self, ds_idx: int = 1, dl=None, **kwargs):
        """Combined probabilities, averaged over augmented versions of the samples, and targets, as
        `Learner.tta` gives them; `kwargs` as there."""
        with self._in_learner() as learn, learn.no_bar(), learn.no_logging():
            return learn.tta(ds_idx, dl, **kwargs)

    def show_results(self, ds_idx: int = 1, dl=None, **kwargs):
        "Show samples, their targets and what the ensemble predicts, as `Learner.show_results`; `kwargs` as there."
        with self._in_learner() as learn, learn.no_bar(), learn.no_logging():
            learn.show_results(ds_idx, dl, **kwargs)

    def member_preds(self, ds_idx: int = 1, dl=None, cbs=None):
        """Probabilities of each member, shape (members, samples, ...), and the targets; one member
        at a time is on the device."""
        preds = []
        for i in range(len(self)):
            with self._in_learner([i], 'mean', warns=False) as learn, learn.no_bar(), learn.no_logging():
                raw, targets = learn.get_preds(ds_idx, dl, act=noop, cbs=cbs)
            preds.append(self.probabilities.of(raw))
        return torch.stack(preds), targets

    # one model of all

    def soup(self, how: str = 'uniform', by: str = 'valid_loss', anchor=None, comp=None) -> Soup:
        """One model with the members' weights summed; it predicts for the price of one. Members must be of the
        learner's architecture, and come from the same weights: fine-tuned from one pretrained network, with the same
        head (`fine_tune_soup`), or kept in one fit.

        - `how`: 'uniform', the mean of all; 'greedy': the best member, then, the better first, each that does not make
          the mean worse by the column `by` on the validation set; 'stock': for each tensor a mean of all that is drawn
          to `anchor` the more, the less the members' updates agree (no validation set is needed).
        - `anchor`: the weights that all members come from, as a state dict, module, learner or path; default: those
          that `fine_tune_soup` has branched from.
        - `comp`: `np.less` or `np.greater`, for a column `by` of which it is not to be told by its name, as of 'mae';
          by default less is better for what has 'loss' or 'error' in it, as fastai's trackers have it.

        Each trial costs a validation and a batch-norm pass over 2,000 training samples (all, of a set of fewer than
        8,000); n members are validated and, if greedy, up to n - 1 soups. What was validated is in `table`. By which
        samples a soup was chosen, on those it is flattered.

        Wortsman et al. 2022 (arXiv 2203.05482); Jang et al. 2024 (arXiv 2403.19522). Raises `ValueError` for a uniform
        or stock soup that is worse by loss than its worst member, or, where there is an anchor, of members whose
        updates have a mean cosine below .05, before any pass; for members of another architecture, or with a NaN; for
        an unknown column, and greedy without a validation set. `RuntimeError` in several processes.
        """
        anchor = self.anchor if anchor is None else anchor
        return make_soup(self.learn, {f'member {i}': m for i, m in enumerate(self.members)}, how, by, anchor, comp)

    # stacking

    def stack(self, ds_idx: int = 1, dl=None, alphas=tuple(np.logspace(-3, 4, 15)), cbs=None):
        """Find weights for the members' probabilities by ridge regression on one-hot targets, and
        combine by them from now on.

        `dl`, or data set `ds_idx` of the learner, 1 being its validation set: samples that no member
        was trained on (a loader may also come first: `stack(dl)`). The penalty is the one of `alphas`
        with the least error in leave-one-out cross-validation. What the ensemble then scores on the
        same samples flatters it: judge it on others.

        Raises `ValueError` if there are samples of the learner's training set among them, or of a
        member's, where all members are right and no weight can be learned. (What a file or a module
        was trained on is not known. See `samples.Samples` for how samples are known again.) Also if
        they have no targets, or the targets are not one class, label vector or value for each
        sample, and for a `ds_idx` that the learner does not have; `TypeError` for what is no loader.
        """
        from sklearn.linear_model import RidgeCV  # comes with fastai; slow to import

        dl = _loader_of(self.learn, ds_idx, dl)
        if self._in_training_sets(dl, [*self._trained_on, None])[0]:
            raise ValueError(
                'stack needs data that no member was trained on, and these are the training set of one: hold samples '
                'out'
            )
        preds, targets = self.member_preds(dl=dl, cbs=cbs)
        y = _stacking_targets(preds, targets, self.probabilities.kind)
        ridge = RidgeCV(alphas).fit(features(preds).numpy(), y.double().numpy())
        self.stacking = {
            'weights': np.atleast_2d(ridge.coef_).tolist(),
            'bias': np.atleast_1d(ridge.intercept_).tolist(),
            'alpha': float(ridge.alpha_),
        }
        self._stacked_on = getattr(dl, 'dataset', None)
        self.combine = 'stack'

    # which samples are whose

    def _in_training_sets(self, dl, training_sets) -> tuple[int, int]:
        """How many samples of `dl` are in some of the `training_sets`, `None` being the learner's,
        and in how many of these sets some are."""
        own = _training_set(self.learn)
        sets = [own if data is None else data for data in training_sets]
        return self._overlaps.count(getattr(dl, 'dataset', None), sets)

    def _warn_if_flattered(self, dl):
        "Warn if a score on the samples of `dl` flatters."
        scored = getattr(dl, 'dataset', None)
        n = length(scored)
        if n == 1:  # a prediction
            return
        n_found, n_members = self._in_training_sets(dl, self._trained_on)
        if n_found:
            warn(
                f'{n_found} of the {n} samples are training data of {n_members} of the {len(self)} members: what the '
                'ensemble scores there flatters it'
            )
        n_found, _ = self._overlaps.count(scored, [self._stacked_on] if self.combine == 'stack' else [])
        if n_found:
            warn(f'stack() was fitted on {n_found} of the {n} samples: what the ensemble scores there flatters it')

    # files

    def save(self, folder):
        """Write all members' weights, how they are combined, and one index into `folder`:
        `Ensemble(folder, learn)` reads it, and its `archs`.

        The index comes last, in one step. Over a folder that holds an ensemble the members get
        other names, and the old ones go when the index no longer names them: whatever happens,
        there is the old ensemble or the new. The index has the SHA-256 of each file: what is read has
        to be what was written. Raises `OSError` if something cannot be written, `ValueError` for a
        member with a NaN, or if the folder has an index of something else, `files.InUse`, a
        `RuntimeError`, if another run is writing there.
        """
        folder = Path(folder)
        if (folder / SOUP_INDEX).exists():
            raise ValueError(f'folder {folder} holds the runs of a fine_tune_soup: save to another one')
        # all are read before any is written: they may be of that folder
        weights = []
        for i, member in enumerate(self.members):
            weights.append(weights_of(source_of(member), f'member {i}'))
            refuse_nan(weights[i], f'member {i}')
        old, files = replace_files(
            folder,
            weights,
            epochs=self.epochs,
            combine=self.combine,
            stacking=self.stacking,
            activation=self.probabilities.kind,
            **self._saved_anchor(folder),
        )
        gone = {(folder / file).resolve() for file in old}
        for i, member in enumerate(self.members):  # one that was read from there is now where its copy is
            if isinstance(member, str | Path) and Path(member).resolve() in gone:
                self.members[i] = folder / files[i]

    def _saved_anchor(self, folder: Path) -> dict:
        """Write the weights that the members come from into `folder`, where they are known; gives what its index says
        of them.
        """
        if self.anchor is None:
            return {}
        weights = weights_of(source_of(one_solution('anchor', self.anchor)), 'anchor')
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder / ANCHOR, weights)
        return {'anchor': ANCHOR, 'anchor_sha256': sha256(folder / ANCHOR)}

    def export(self, fname='export.pkl') -> Path:
        """Write a learner that is the ensemble, as `Learner.export` writes one, to `learn.path /
        fname`: `load_learner` reads it. Gives the path.

        Its model is a plain module of PyTorch's own classes (`torch.fx`), which calls each member, so
        that the file needs no more than one of `learn.export()` would: not this package, but the
        classes of the members, of the loss and the like. What the model gives is one output whose
        softmax (sigmoid, or itself) is the combined prediction.

        Raises `ValueError` for a member with a NaN, and where that model does not predict what the
        ensemble does on the first validation batch, as with callbacks that change the members' outputs
        or take them apart; `RuntimeError` inside `active()`; `OSError` if it cannot be written.
        """
        learn = self.learn
        if isinstance(unwrap(learn.model), Members):
            raise RuntimeError('export inside active() is not possible: call it outside')
        with randomness_kept(learn):
            batch = learn.dls[1].one_batch()
            expected = self.get_preds(dl=[batch])[0]
            modules = [self._module(i) for i in range(len(self))]
            for i, m in enumerate(modules):
                refuse_nan(m.state_dict(), f'member {i}')
            with _modes_kept(modules):
                graph = self._graph(modules, batch, expected)
                for m in (*modules, graph):
                    m.eval()
                return self._write_learner(graph, learn.path / fname)

    def _graph(self, modules: list, batch, expected) -> nn.Module:
        "One module in the place of `modules`. Raises `ValueError` if it does not predict `expected` of `batch`."
        learn = self.learn
        why = ''
        try:
            inputs = batch[: getattr(learn.dls, 'n_inp', len(batch) - 1)]
            graph = as_graph(modules, Combination(self.probabilities, self.combine, self.stacking), inputs)
            with _attributes(learn, model=graph), learn.no_bar(), learn.no_logging():
                found = learn.get_preds(dl=[batch], act=self.probabilities.of)[0]
            is_same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
        except Exception as e:
            is_same = False
            why = f' ({type(e).__name__}: {" ".join(str(e).split())[:200]})'
        if not is_same:
            raise ValueError(
                'export is not possible: one model in the place of the members does not predict what they do; do '
                f'callbacks of the learner change their outputs, or take them apart?{why} Let the members give one '
                'tensor by themselves'
            )
        return graph

    def _write_learner(self, model: nn.Module, file: Path) -> Path:
        "As `Learner.export`, with `model`; the learner keeps its own, its data and its optimizer."
        learn = self.learn
        learn._end_cleanup()
        with (
            _attributes(learn, model=model, opt=None, dls=learn.dls.new_empty()),
            warnings.catch_warnings(),
            replacing(file) as f,
        ):
            warnings.simplefilter('ignore')  # PyTorch's, that it cannot look at the code of the model
            torch.save(learn, f, pickle_module=_PICKLE, pickle_protocol=2)
        return file

    @classmethod
    def load(cls, folder, learn: Learner, archs=None, **kwargs):
        """What `save` wrote. `archs`: a module for each member, where they are not of the learner's
        architecture.
        """
        return cls(Path(folder), learn, archs=archs, **kwargs)

    # members

    def _module(self, i) -> nn.Module:
        "Member `i` as a module: its own, or for weights a copy of its architecture with them."
        source = source_of(self.members[i])
        if isinstance(source, nn.Module):
            return unwrap(source)
        module = clean_copy(self.learn.model if self.archs[i] is None else self.archs[i], not_copied(self.learn))
        name = source if isinstance(source, str | Path) else f'member {i}'
        weights = weights_of(source, name)
        refuse_nan(weights, name)
        return load_into(module, weights, str(name))

    def _version(self):
        "What changes when the ensemble would predict with something else. (Not what is in files.)"
        return [_marks(source_of(m)) for m in self.members], self.combine, repr(self.stacking)

    @contextmanager
    def _in_learner(self, which=None, combine: str | None = None, warns: bool = True):
        """Within this context the learner predicts with the members `which`, by default all,
        combined by `combine`.
        """
        learn = self.learn
        modules = [self._module(i) for i in (range(len(self)) if which is None else which)]
        members = Members(modules, Combination(self.probabilities, combine or self.combine, self.stacking))

        def check(dl, ds_idx):
            if warns:
                self._warn_if_flattered(learn.dls[ds_idx] if dl is None else dl)

        def get_preds(ds_idx=1, dl=None, *args, **kwargs):
            check(dl, ds_idx)
            # of a loss that is not fastai's own the learner does not know the activation
            return type(learn).get_preds(learn, ds_idx, dl, *args, **{'act': self.probabilities.of} | kwargs)

        def validate(ds_idx=1, dl=None, *args, **kwargs):
            check(dl, ds_idx)
            return type(learn).validate(learn, ds_idx, dl, *args, **kwargs)

        reason = 'active() is not possible: the learner is an ensemble there'
        contexts = (
            _modes_kept(modules),
            autocast_left(),
            learn.added_cbs(EachMember(members)),
            no_fit(learn, reason, also=('save', 'export', 'load', 'create_opt')),
            _attributes(learn, model=members, get_preds=get_preds, validate=validate),
        )
        with whole(*contexts):
            yield learn


@contextmanager
def _attributes(o, **values):
    "Within this context `o` has these attributes of its own."
    kept = {k: vars(o)[k] for k in values if k in vars(o)}
    vars(o).update(values)
    try:
        yield
    finally:
        for k in values:
            vars(o).pop(k, None)
        vars(o).update(kept)


@contextmanager
def _modes_kept(members: list):
    """The modes of `members` come back at the end of this context, and bitwise the weights that
    `eval()` moves, which to move back would round."""
    modules = dict.fromkeys(m for member in members for m in member.modules())  # each once
    modes = [(m, m.training) for m in modules]
    kept = Kept([m for m in modules if has_own_modes(m)])
    try:
        yield
    finally:
        with uninterrupted():
            for m, mode in modes:
                m.training = mode
            kept.put_back()


def _described(given) -> _Described:
    "What `given` says: an ensemble, the folder of one, or what has or is solutions."
    if isinstance(given, Ensemble):
        return _Described(
            given.members,
            learn=given.learn,
            archs=given.archs,
            combine=given.combine,
            activation=given.probabilities.kind,
            epochs=list(given.epochs),
            stacking=given.stacking,
            stacked_on=given._stacked_on,
            trained_on=list(given._trained_on),
            anchor=given.anchor,
        )
    members = list(gathered(given).values())
    if isinstance(given, str | Path) and Path(given).is_dir():
        index = read_index(Path(given))
        if index.get('combine') == 'stack' and 'sha256' not in index:
            warn(
                f'{given} is of an earlier version, which kept no SHA-256 of its files: whether they are those that '
                'stack() weighed, in their order, cannot be checked'
            )
        return _Described(
            members,
            combine=index.get('combine'),
            activation=index.get('activation'),
            epochs=index.get('epochs', []),
            stacking=index.get('stacking'),
            anchor=_anchor_in(Path(given), index),
        )
    return _Described(members)


def _anchor_in(folder: Path, index: dict) -> Path | None:
    "The file that `fine_tune_soup` or `save` has left, if it is still that."
    name = index.get('anchor')
    if not isinstance(name, str) or not is_plain_name(name):
        return None
    file = folder / name
    if file.is_file() and sha256(file) == index.get('anchor_sha256'):
        return file
    warn(f'{file} is missing or damaged: pass the weights that the members come from as anchor=, where they are needed')
    return None


def _checked(members) -> list:
    "The `members`. Raises `TypeError` or `ValueError`, naming it, for one that cannot be used."
    if not members:
        raise ValueError('members is empty: an ensemble needs one model at least')
    for m in members:
        if isinstance(m, str | Path):
            check_weights_file(Path(m))
        elif not isinstance(m, Learner | nn.Module | dict):
            raise TypeError(f'members must be learners, modules, state dicts or paths, not {m!r}')
    return list(members)


def _first_learner(members) -> Learner:
    for m in members:
        if isinstance(m, Learner):
            return m
    raise ValueError('learn is needed for its data, its loss and its metrics: no member is a Learner')


def _loader_of(learn, ds_idx, dl):
    "`dl`, or the learner's loader `ds_idx`; the two may come in the other order."
    if ds_idx is None:
        ds_idx = 1
    elif not isinstance(ds_idx, Integral):
        ds_idx, dl = 1 if dl is None else dl, ds_idx
    if dl is None:
        n = len(learn.dls.loaders)
        if isinstance(ds_idx, bool) or ds_idx not in range(-n, n):
            raise ValueError(f'ds_idx must be one of the {n} data sets of the learner, from 0, not {ds_idx!r}')
        return learn.dls[ds_idx]
    if isinstance(dl, str) or not hasattr(dl, '__iter__') or not hasattr(dl, '__len__'):
        raise TypeError(
            'stack needs a loader, such as learn.dls.test_dl(items, with_labels=True), or the number of a data set of '
            f'the learner, not {repr(dl)[:60]}'
        )
    return dl


def _stacking_targets(preds, targets, kind):
    "Targets of shape (n, outputs) for predictions of shape (members, n, ...)."
    if not isinstance(targets, torch.Tensor):
        raise ValueError('stack needs targets, and these data have none: test_dl(items, with_labels=True)')
    if kind != 'softmax':
        return targets.reshape(len(targets), -1)
    is_column = targets.ndim == 2 and targets.shape[1] == 1  # as fastai's tabular data have them
    classes = targets.squeeze(1) if is_column else targets
    if preds.ndim != 3 or classes.ndim != 1 or classes.is_floating_point():
        raise ValueError(
            f'stack needs one class for each sample, not predictions of shape {tuple(preds.shape[1:])} for targets of '
            f'shape {tuple(targets.shape)}'
        )
    return F.one_hot(classes.long(), preds.shape[-1])


def _training_set(member):
    return getattr(getattr(member, 'dls', None), 'train_ds', None) if isinstance(member, Learner) else None


def _marks(source):
    "A path, or a few values of each tensor of a module or state dict, which training would change."
    if isinstance(source, str | Path):
        return str(source)
    if isinstance(source, nn.Module):
        tensors = [*source.parameters(), *source.buffers()]
    else:
        tensors = [t for t in source.values() if isinstance(t, torch.Tensor)]
    return [t.detach().flatten()[:4].tolist() for t in tensors]
