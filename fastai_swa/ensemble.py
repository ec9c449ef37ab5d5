"""`Ensemble`: many models, one prediction."""
import json, math, zipfile
from contextlib import contextmanager
from functools import partial, reduce
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from fastai.learner import Learner
from fastcore.foundation import L, noop
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset

from .files import replacing
from .modules import clean_copy, plain_name, unwrap
from .passes import no_fit
from .state import not_copied

__all__ = ['Ensemble', 'Probabilities', 'load_into', 'write_weights', 'write_index', 'read_index']


class Ensemble:
    """Several trained models that predict as one, with a learner's own methods.

    - `members`: a list of learners, modules, state dicts and paths to these (what `learn.save(with_opt=False)` or `torch.save` wrote), of one
      architecture or several; the folder that `fit_snapshots`, `fit_fge` or `save` wrote; or another `Ensemble`.
    - `learn`: the learner whose data, loss and metrics serve; default: the first learner among the members. State dicts are of its
      architecture, unless `archs` gives a module for each member.
    - `combine`: 'mean' of the probabilities, the default; 'vote', each class by the number of members that prefer it, ties by the mean; 'stack',
      see `stack`.
    - `activation`: what makes probabilities of a model's output: 'softmax', 'sigmoid' (multi-label) or 'none' (regression); default: what the
      learner's loss says.

    Huang et al. 2017 (arXiv 1704.00109); Garipov et al. 2018 (arXiv 1802.10026).

    Raises `ValueError` or `TypeError`, naming it, for a member that cannot be used: a missing or damaged file, weights of another
    architecture; for an unknown loss without `activation`; for a vote in regression.
    """
    def __init__(self, members, learn: Learner | None = None, combine: str | None = None, activation: str | None = None, archs=None):
        self.epochs, self.stacking, self._trained_on = [], None, []
        if isinstance(members, Ensemble):
            learn, archs = learn or members.learn, archs or members.archs
            combine, activation = combine or members.combine, activation or members.probabilities.kind
            self.epochs, self.stacking, self._trained_on, members = members.epochs, members.stacking, members._trained_on, members.members
        elif isinstance(members, str | Path) and Path(members).is_dir():
            index = read_index(Path(members))
            combine, activation = combine or index.get('combine'), activation or index.get('activation')
            self.epochs, self.stacking = index.get('epochs', []), index.get('stacking')
            members = [Path(members)/file for file in index['files']]
        elif isinstance(members, str | Path | nn.Module | Learner | dict): members = [members]
        self.members = list(members)
        if not self.members: raise ValueError('members is empty: an ensemble needs one model at least')
        learners = [m for m in self.members if isinstance(m, Learner)]
        if learn is None and not learners: raise ValueError('learn is needed for its data, its loss and its metrics: no member is a Learner')
        self.learn, self.archs = learn or learners[0], list(archs) if archs else [None] * len(self.members)
        if len(self.archs) != len(self.members): raise ValueError(f'archs has {len(self.archs)} modules for {len(self.members)} members')
        for m in self.members:
            if isinstance(m, str | Path): _check_file(Path(m))
            elif not isinstance(m, Learner | nn.Module | dict): raise TypeError(f'members must be learners, modules, state dicts or paths, not {m!r}')
        self.probabilities = Probabilities(self.learn.loss_func, activation)
        self.combine = combine or 'mean'
        self._trained_on = [*self._trained_on, *(member.dls.train_ds for member in learners)]

    @property
    def combine(self) -> str: return self._combine

    @combine.setter
    def combine(self, how):
        if how not in ('mean', 'vote', 'stack'): raise ValueError(f"combine must be 'mean', 'vote' or 'stack', not {how!r}")
        if how == 'vote' and self.probabilities.kind == 'none': raise ValueError("combine='vote' needs classes, and this loss is one of regression")
        if how == 'stack' and self.stacking is None: raise ValueError("combine='stack' needs stack() first, which finds the weights")
        self._combine = how

    def __len__(self): return len(self.members)

    def __getitem__(self, i):
        "An ensemble of some of the members, as a slice of a list."
        def pick(o): return o[i] if isinstance(i, slice) else [o[j] for j in i] if hasattr(i, '__iter__') else [o[i]]
        res = Ensemble(pick(self.members), self.learn, 'mean' if self.combine == 'stack' else self.combine, self.probabilities.kind, pick(self.archs))
        res._trained_on, res.epochs = self._trained_on, pick(self.epochs) if len(self.epochs) == len(self) else []
        return res

    def __repr__(self):
        epochs = f', of the epochs {", ".join(map(str, self.epochs))}' if self.epochs else ''
        return f'Ensemble of {len(self)} model{"s" * (len(self) > 1)}{epochs}, combined by {self.combine}'

    # predicting, as a learner does

    @contextmanager
    def active(self):
        """Within this context the learner is the ensemble: it predicts, validates, shows and interprets with it; gives the learner.

        All members are in memory at once, and on the learner's device while it predicts. Its own model, its mode and those of the members come
        back at the end. To train, save or export inside is refused with `RuntimeError`.
        """
        modules = [self._module(i) for i in range(len(self))]
        with self._in_learner(_Combined(modules, self, self.combine)) as learn: yield learn

    def get_preds(self, ds_idx: int = 1, dl=None, **kwargs):
        "Combined probabilities (regression: values) and targets, as `Learner.get_preds` gives them; `kwargs` as there."
        with self.active() as learn, learn.no_bar(), learn.no_logging(): return learn.get_preds(ds_idx, dl, **kwargs)

    def predict(self, item, **kwargs):
        "Decoded prediction, its tensor, and the probabilities of one `item`, as `Learner.predict`."
        with self.active() as learn: return learn.predict(item, **kwargs)

    def validate(self, ds_idx: int = 1, dl=None) -> L:
        "Loss and metrics of the ensemble; both get the log of the combined probabilities, so that no activation is applied twice."
        with self.active() as learn, learn.no_bar(), learn.no_logging(): return learn.validate(ds_idx, dl)

    def member_preds(self, ds_idx: int = 1, dl=None):
        "Probabilities of each member, shape (members, samples, ...), and the targets; one member at a time is on the device."
        preds = []
        for i in range(len(self)):
            with self._in_learner(_Combined([self._module(i)], self, 'mean')) as learn, learn.no_bar(), learn.no_logging():
                raw, targets = learn.get_preds(ds_idx, dl, act=noop)
            preds.append(self.probabilities.of(raw))
        return torch.stack(preds), targets

    # stacking

    def stack(self, dl=None, ds_idx: int = 1, alphas=tuple(np.logspace(-3, 4, 15))):
        """Find weights for the members' probabilities by ridge regression on one-hot targets, and combine by them from now on.

        `dl`, or data set `ds_idx` of the learner: samples that no member was trained on. The penalty is the one of `alphas` with the
        least error in leave-one-out cross-validation. What the ensemble then scores on the same samples flatters it: judge it on others.

        Raises `ValueError` if there are samples of the learner's training set among them, or of a member's, where all members are right and no
        weight can be learned. (What a file or a module was trained on is not known. Samples are known again by what fastai's data sets are made
        from: files, rows, indexes.) Also if they have no targets, or the targets are not one class, label vector or value for each sample.
        """
        from sklearn.linear_model import RidgeCV    # comes with fastai; slow to import
        dl = self.learn.dls[ds_idx] if dl is None else dl
        if self._is_training_set(dl):
            raise ValueError('stack needs data that no member was trained on, and these are the training set of one: hold samples out')
        preds, targets = self.member_preds(dl=dl)
        kind = self.probabilities.kind
        if not isinstance(targets, torch.Tensor): raise ValueError('stack needs targets, and these data have none: test_dl(items, with_labels=True)')
        if kind == 'softmax' and (preds.ndim != 3 or targets.ndim != 1 or targets.is_floating_point()):
            raise ValueError(f'stack needs one class for each sample, not predictions of shape {tuple(preds.shape[1:])} for targets of shape '
                             f'{tuple(targets.shape)}')
        y = F.one_hot(targets.flatten().long(), preds.shape[-1]) if kind == 'softmax' else targets.reshape(len(targets), -1)
        ridge = RidgeCV(alphas).fit(_features(preds).numpy(), y.double().numpy())
        self.stacking = {'weights': np.atleast_2d(ridge.coef_).tolist(), 'bias': np.atleast_1d(ridge.intercept_).tolist(),
                         'alpha': float(ridge.alpha_)}
        self.combine = 'stack'

    def _is_training_set(self, dl) -> bool:
        data = getattr(dl, 'dataset', None)
        return _overlap(data, self.learn.dls.train_ds, indexes=True) or any(_overlap(data, ds) for ds in self._trained_on)

    # files

    def save(self, folder):
        "Write all members' weights, how they are combined, and one index into `folder`: `Ensemble(folder, learn)` reads it, and its `archs`."
        folder, weights = Path(folder), list(map(_weights, self.members))    # all read before any is written: they may be of that folder
        folder.mkdir(parents=True, exist_ok=True)
        files = [f'member-{i + 1:02}.pth' for i in range(len(weights))]
        for file, w in zip(files, weights): write_weights(folder/file, w)
        write_index(folder, files, epochs=self.epochs, combine=self.combine, stacking=self.stacking, activation=self.probabilities.kind)

    @classmethod
    def load(cls, folder, learn: Learner, archs=None, **kwargs):
        "What `save` wrote. `archs`: a module for each member, where they are not of the learner's architecture."
        return cls(Path(folder), learn, archs=archs, **kwargs)

    # members

    def _module(self, i) -> nn.Module:
        member = self.members[i]
        if isinstance(member, Learner): return unwrap(member.model)
        if isinstance(member, nn.Module): return unwrap(member)
        module = clean_copy(self.learn.model if self.archs[i] is None else self.archs[i], not_copied(self.learn))
        return load_into(module, member, f'member {i}')

    @contextmanager
    def _in_learner(self, model):
        learn, own = self.learn, self.learn.model
        modes = [(m, m.training) for root in (own, model) for m in root.modules()]
        def get_preds(*args, **kwargs):    # of a loss that is not fastai's own the learner does not know the activation
            return type(learn).get_preds(learn, *args, **{'act': self.probabilities.of} | kwargs)
        with no_fit(learn, 'active() is not possible: the learner is an ensemble there', also=('save', 'export', 'load', 'create_opt')):
            kept = vars(learn).get('get_preds')
            try:
                learn.model, learn.get_preds = model, get_preds
                yield learn
            finally:
                learn.model = own
                if kept is None: del vars(learn)['get_preds']
                else: learn.get_preds = kept
                for m, mode in modes: m.training = mode


class _Combined(nn.Module):
    "Members as one module, whose output is such that the activation makes the combined probabilities of it."
    def __init__(self, members, ensemble, combine):
        super().__init__()
        self.members, self.probabilities, self.combine = nn.ModuleList(members), ensemble.probabilities, combine
        self.takes_first = any(type(cb).__name__ == 'RNNCallback' for cb in ensemble.learn.cbs)    # as that does in training
        if self.combine == 'stack':
            for name in 'weights', 'bias': self.register_buffer(name, torch.tensor(ensemble.stacking[name], dtype=torch.float32))

    def reset(self):
        for m in self.members:
            if hasattr(m, 'reset'): m.reset()

    def forward(self, *args):
        outputs = [self._output(m, args) for m in self.members]
        for i, o in enumerate(outputs):
            if o.shape != outputs[0].shape:
                raise ValueError(f'member {i} predicts {tuple(o.shape)}, member 0 {tuple(outputs[0].shape)}: they cannot be combined')
        if len(outputs) == 1 and self.combine != 'stack': return self._as_trained(outputs[0])
        mean = self.probabilities.mean(outputs)
        if self.combine == 'mean': return self._as_trained(mean)
        ps = torch.stack([self.probabilities.of(o) for o in outputs])
        if self.combine == 'vote': return self._as_trained(self.probabilities.log(_vote(ps, self.probabilities.of(mean), self.probabilities)))
        scores = (_features(ps).float() @ self.weights.T + self.bias).view_as(mean)
        if self.probabilities.kind != 'none': scores = self.probabilities.log(_as_probabilities(scores, self.probabilities))
        return self._as_trained(scores)

    def _output(self, member, args):
        "In the precision of the member's own weights; the output in float32 at least."
        dtype = next((p.dtype for p in member.parameters() if p.is_floating_point()), torch.float32)
        res = member(*(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args))
        if self.takes_first and isinstance(res, tuple | list): res = res[0]
        if not isinstance(res, torch.Tensor):
            raise TypeError(f'members must give one tensor, and {type(member).__name__} gives a {type(res).__name__}')
        return res.to(torch.promote_types(res.dtype, torch.float32))

    def _as_trained(self, output): return (output, output, output) if self.takes_first else output    # RNNCallback takes it apart


def _vote(ps, mean, probabilities):
    "Shares of the votes of `ps`, shape (members, ...), with as little of the mean as decides between equal ones."
    if probabilities.kind == 'sigmoid': votes = (ps > .5).float().mean(0)
    else:
        axis = probabilities.axis % mean.ndim + 1
        votes = torch.zeros_like(ps).scatter_(axis, ps.argmax(axis, keepdim=True), 1).mean(0)
    p = (votes + _LITTLE * mean) / (1 + _LITTLE)
    return p.clamp(1e-6, 1 - 1e-6) if probabilities.kind == 'sigmoid' else p.clamp_min(1e-6)    # none is impossible: its log is finite

_LITTLE = 1e-3    # below one vote of a hundred members, far above float32's resolution


def _as_probabilities(scores, probabilities):
    "The nearest that a linear model's scores come to probabilities, in their order."
    if probabilities.kind == 'sigmoid': return scores.clamp(1e-6, 1 - 1e-6)
    scores = scores.clamp_min(0) + 1e-6 * (1 + scores.clamp(-1, 1))
    return scores / scores.sum(probabilities.axis, keepdim=True)


def _features(ps):
    "(members, n, ...) to (n, members * ...)."
    return ps.flatten(2).transpose(0, 1).flatten(1) if ps.ndim > 2 else ps.T


class Probabilities:
    """What a loss takes a model's output for, and means of that: probabilities of classes ('softmax'), of labels ('sigmoid'), or values ('none').

    Means are computed in log space, so that the log of a mean probability is exact however small it is.
    Raises `ValueError` if `loss_func` does not tell and `kind` is not given.
    """
    def __init__(self, loss_func, kind: str | None = None):
        if kind not in (None, 'softmax', 'sigmoid', 'none'): raise ValueError(f"activation must be 'softmax', 'sigmoid' or 'none', not {kind!r}")
        self.kind = kind or _kind(loss_func)
        self.axis = getattr(loss_func, 'axis', 1)    # fastai's losses say it, torch's have the classes there

    def of(self, output):
        if self.kind == 'none': return output
        return output.softmax(self.axis) if self.kind == 'softmax' else output.sigmoid()

    def mean(self, outputs: list):
        "The output that stands for the mean of the probabilities of `outputs`."
        return self.output(reduce(self.merged, map(self.terms, outputs)), len(outputs))

    def merged(self, total, terms):
        "A running sum with the `terms` of another output."
        return tuple(map(torch.add if self.kind == 'none' else torch.logaddexp, total, terms))

    def output(self, total, n: int):
        "The output that stands for a running sum of `n` divided by `n`."
        if self.kind == 'none': return total[0] / n
        if self.kind == 'softmax': return total[0] - math.log(n)
        return total[0] - total[1]

    def terms(self, output) -> tuple:
        "What a running sum starts with."
        if self.kind == 'none': return output,
        return (output.log_softmax(self.axis),) if self.kind == 'softmax' else (F.logsigmoid(output), F.logsigmoid(-output))

    def log(self, p):
        "The output that stands for the probabilities `p`."
        return p.log() if self.kind == 'softmax' else p.logit()


def _kind(loss_func) -> str:
    f = loss_func.func if isinstance(loss_func, partial) else loss_func
    names = [c.__name__ for c in type(f).__mro__] + [type(getattr(f, 'func', None)).__name__, getattr(f, '__name__', '')]    # fastai's hold torch's
    for kind, known in _LOSSES.items():
        if known & set(names): return kind
    raise ValueError(f"the loss {names[-1] or names[0]} does not say what the model's output is: pass activation='softmax', 'sigmoid' or 'none'")

_LOSSES = {
    'softmax': {'CrossEntropyLoss', 'CrossEntropyLossFlat', 'FocalLoss', 'FocalLossFlat', 'LabelSmoothingCrossEntropy', 'cross_entropy'},
    'sigmoid': {'BCEWithLogitsLoss', 'BCEWithLogitsLossFlat', 'MultiLabelSoftMarginLoss', 'binary_cross_entropy_with_logits'},
    'none': {'MSELoss', 'L1Loss', 'SmoothL1Loss', 'HuberLoss', 'mse_loss', 'l1_loss', 'smooth_l1_loss', 'huber_loss'},
}


def _overlap(a, b, indexes=False) -> bool:
    "Have two data sets samples in common? `indexes`: items that are numbers count, because both are of one source."
    if a is None or b is None: return False
    if a is b: return True
    keys = [_keys(o, indexes) for o in (a, b)]
    return bool(keys[0] & keys[1])


def _keys(data, indexes) -> set:
    if isinstance(data, Subset):
        inner = data.dataset
        return _keys([inner[i] for i in data.indices], indexes) if isinstance(inner, list) else _keys(inner, indexes)
    items = data if isinstance(data, list | tuple) else getattr(data, 'items', None)
    if items is None or callable(items): return set()
    if hasattr(items, 'columns'): return set(map(str, items.index))    # a data frame
    def key(item):
        if isinstance(item, Integral): return int(item) if indexes else None
        return item if isinstance(item, str | Path) else id(item)
    return {key(item) for item in items} - {None}


# files

def write_weights(file: Path, weights: dict):
    "A state dict, in one step. Raises `OSError`."
    with replacing(file) as f: torch.save(weights, f)


def _read_weights(file: Path) -> dict:
    "The state dict in `file`, on the CPU; no code in it is run."
    _check_file(file)
    try: weights = torch.load(file, map_location='cpu', weights_only=True)
    except Exception: raise ValueError(f'{file} holds more than weights, such as an optimizer: save them with learn.save(name, with_opt=False), or '
                                       'torch.save(model.state_dict(), file)') from None
    weights = weights.get('model', weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict): raise ValueError(f'{file} holds no state dict')
    return weights


def _check_file(file):
    if not file.is_file(): raise FileNotFoundError(f'{file} is missing')
    try:
        with zipfile.ZipFile(file) as z: damaged = z.testzip()    # torch.load does not look at the checksums
    except zipfile.BadZipFile:    # torch's format before 1.6, perhaps, which has none
        try: damaged = not isinstance(torch.load(file, map_location='cpu', weights_only=True), dict)
        except Exception: damaged = True
    if damaged: raise ValueError(f'{file} is damaged, or it holds no weights')


def load_into(module: nn.Module, weights, name: str = '') -> nn.Module:
    "`module` with the `weights`, a state dict called `name` or a path. Raises `FileNotFoundError` or `ValueError`, naming it, if they do not serve."
    try: module.load_state_dict(_weights(weights))
    except RuntimeError as e:
        name = weights if isinstance(weights, str | Path) else name
        raise ValueError(f'{name} does not hold weights of this architecture: {" ".join(str(e).split())[:200]}') from None
    return module


def _weights(member) -> dict:
    if isinstance(member, str | Path): return _read_weights(Path(member))
    if isinstance(member, dict): return {plain_name(k): v for k, v in member.items()}
    return {k: v.detach().cpu() for k, v in unwrap(member.model if isinstance(member, Learner) else member).state_dict().items()}


def write_index(folder: Path, files: list[str], **content):
    with replacing(folder/'index.json') as f: f.write(json.dumps({'format': _FORMAT, 'files': files, **content}, indent=1).encode())


def read_index(folder: Path) -> dict:
    file = folder/'index.json'
    if not file.exists(): raise FileNotFoundError(f'{folder} has no index.json: it is no folder of an ensemble')
    try: index = json.loads(file.read_text())
    except ValueError: index = None
    if not isinstance(index, dict) or index.get('format') != _FORMAT: raise ValueError(f'{file} is damaged, or it is no index of an ensemble')
    return index

_FORMAT = 'fastai_swa ensemble 1'
