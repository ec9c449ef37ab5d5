"""A model as a point of weight space, the solutions that lie there, and loss and metrics at any
points, by the learner's own loop."""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastprogress.fastprogress import progress_bar
from torch import nn

from .aside import untouched
from .averaging import WeightAverage, lent
from .callback import SWACallback
from .checks import check_count, check_numbers
from .ensemble import Ensemble
from .interrupts import uninterrupted, unwound_whole
from .modules import clean_copy, in_train_mode, modes_of, plain_name, set_modes, to_train_form, unwrap
from .passes import PassCancelled, kept_batches, refresh_bn, refreshable, validate_aside
from .processes import Processes
from .snapshots import SnapshotCallback
from .surfaces import MemoryRows, PointFile
from .walk import loaders, not_copied
from .weights import load_into

__all__ = [
    'Space',
    'named_solutions',
    'measured',
    'weighted_sum',
    'modes_put_back',
    'fingerprints',
    'check_ts',
]


class Space:
    """The weights of a learner's model as one flat vector: all its parameters, in float32 at least,
    end to end.

    - `scratch`: a clean copy of the model, on the device of the data, which takes on the weights of
      one point after the other. Where modes move weights (LoRA that merges its update in `eval()`),
      these are the weights as training has them: all points are sums of such.
    """

    def __init__(self, learn: Learner):
        if not isinstance(learn, Learner):
            raise TypeError(f'learn must be a Learner, which comes first, not {type(learn).__name__}')
        if Processes(learn).size > 1:
            raise RuntimeError('the loss surface is measured in one process: call it outside of distrib_ctx')
        self.learn, self.scratch = learn, clean_copy(learn.model, not_copied(learn))
        device = getattr(learn.dls, 'device', None)
        if device is not None:
            self.scratch.to(device)
        to_train_form(self.scratch)
        self.originals = {k: p for k, p in self.scratch.named_parameters() if p.is_floating_point() or p.is_complex()}
        self.params = [
            torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in self.originals.values()
        ]
        if not self.params:
            raise ValueError('the model has no parameters: there is nothing to move')
        self.device, self.dtype = self.params[0].device, torch.float32
        for p in self.params:
            self.dtype = torch.promote_types(self.dtype, p.dtype)

    @property
    def shows_progress(self) -> bool:
        return any(isinstance(cb, ProgressCallback) for cb in self.learn.cbs)

    def pieces(self, weights: torch.Tensor) -> list[torch.Tensor]:
        "Views of `weights` in the shapes of the parameters, complex ones as pairs of real numbers."
        return [w.view(p.shape) for w, p in zip(weights.split([p.numel() for p in self.params]), self.params)]

    def load(self, solution, name: str):
        """Weights, on the CPU, and buffers of a `solution`. Raises as `weights.load_into` does, and
        `ValueError` for weights that are not finite.
        """
        source = solution.model if isinstance(solution, Learner) else solution
        if isinstance(source, nn.Module):
            with in_train_mode(source):
                load_into(self.scratch, unwrap(source).state_dict(), name)
        else:
            load_into(self.scratch, source, name)
        weights = torch.cat([p.to('cpu', self.dtype).flatten() for p in self.params])
        if not weights.isfinite().all():
            raise ValueError(f'{name} has weights that are not finite')
        return weights, {k: b.clone() for k, b in self.scratch.named_buffers()}

    def one_set_of_buffers(self, loaded: list) -> dict:
        """The buffers of the first of `loaded` solutions, which serve for all points; if others
        have others that are not recomputed, that is said.
        """
        modules, recomputed = dict(unwrap(self.learn.model).named_modules()), set()
        for name in refreshable(self.learn):
            recomputed |= {plain_name(f'{name}.{k}' if name else k) for k in modules[name]._buffers}
        first, *others = (buffers for _, buffers in loaded)
        differ = [
            k
            for k, b in first.items()
            if b.is_floating_point() and k not in recomputed and not all(torch.equal(b, o[k]) for o in others)
        ]
        if differ:
            warnings.warn(
                f'{differ[0]} is not recomputed and differs between the solutions: all points have that of the first'
            )
        return first

    def put(self, weights: torch.Tensor, buffers: dict):
        "Give `scratch` these `weights` and `buffers`."
        with torch.no_grad():
            torch._foreach_copy_(self.params, self.pieces(weights.to(self.device)))
        for k, b in self.scratch.named_buffers():
            b.data = buffers[k].clone()

    def state_dict(self, weights: torch.Tensor, buffers: dict) -> dict:
        "`weights` as a state dict of copies on the CPU."
        self.put(weights, buffers)
        return {
            k: v.detach().to('cpu', copy=True) if isinstance(v, torch.Tensor) else v
            for k, v in self.scratch.state_dict().items()
        }


def named_solutions(solutions, n: int | None = None, what: str = '') -> dict:
    """Name -> state dict, module, learner or path of `solutions`: one, a list, a dict that names
    them, an `Ensemble` or a `SnapshotCallback`.

    Raises `ValueError` unless there are `n` of them, for `what`, and `TypeError` for what is none.
    """
    if isinstance(solutions, Ensemble | SnapshotCallback):
        members = solutions.members if isinstance(solutions, Ensemble) else solutions.snapshots
        if not members:
            raise ValueError('the SnapshotCallback has kept nothing yet')
        solutions = (
            {f'epoch {e}': m for e, m in zip(solutions.epochs, members)}
            if len(solutions.epochs) == len(members)
            else members
        )
    is_state_dict = isinstance(solutions, Mapping) and any(isinstance(v, torch.Tensor) for v in solutions.values())
    if isinstance(solutions, Mapping) and not is_state_dict:
        named = {str(name): o for name, o in solutions.items()}
    else:
        several = (
            list(solutions)
            if isinstance(solutions, Iterable) and not isinstance(solutions, Mapping | nn.Module | str)
            else [solutions]
        )
        named = {_name(o, i + 1): o for i, o in enumerate(several)}
        if len(named) < len(several):
            named = {f'solution {i + 1}': o for i, o in enumerate(several)}  # files of one name
    if not named:
        raise ValueError('solutions is empty: one is needed at least')
    if n is not None and len(named) != n:
        raise ValueError(f'solutions must be {n} for {what}, not {len(named)}')
    return {name: _weights_of(o, name) for name, o in named.items()}


def _name(solution, number):
    if isinstance(solution, str | Path):
        return Path(solution).stem
    return 'average' if isinstance(solution, SWACallback | WeightAverage) else f'solution {number}'


def _weights_of(o, name):
    if isinstance(o, SWACallback | WeightAverage):
        if not o.n_averaged:
            raise ValueError(f'{name} has averaged nothing yet')
        return o.swa_model
    if isinstance(o, Learner | nn.Module | Mapping | str | Path):
        return o
    raise TypeError(f'{name} must be a state dict, a module, a learner, a path or a SWACallback, not {repr(o)[:60]}')


def weighted_sum(vectors, shares) -> torch.Tensor:
    "One that has a share of 1 beside zeros comes out bitwise."
    res = vectors[0] * float(shares[0])
    for v, share in zip(vectors[1:], shares[1:]):
        res.add_(v, alpha=float(share))
    return res


def measured(
    space,
    kind,
    about,
    points,
    at,
    sets=('train', 'valid'),  # on which data: 'train', 'valid' or both
    bn_batches: int = None,  # training batches used to refresh batch norm at each point; None: the whole training set
    train_batches: int = None,  # training batches that the 'train' columns are of; None: the whole training set
    # of all that is drawn: directions, and order and augmentation of training samples, which are
    # the same at each point
    seed: int = 0,
    file=None,  # gets a line for each point as it is measured; the same call goes on with a file that is not complete
    progress=None,  # called with the numbers of points done and of all before each, instead of a progress bar
):
    """A surface of class `kind`, with loss and metrics at each of the `points`. `at(i)` gives
    weights and buffers of point i.

    At each point batch norm is refreshed as a `SWACallback` does it, and the learner's own loop
    validates, with all its callbacks that do not record, show or steer training. Batches are drawn
    once and kept, if they are not more than a GiB. The learner is afterwards as it was, also after
    an error or Ctrl-C: weights, statistics, modes, optimizer, callbacks and all random generators.
    """
    learn, sets = space.learn, _check_sets(sets)
    if 'valid' in sets and len(loaders(learn)) < 2:
        raise ValueError("sets='valid' needs a validation set, and the learner has none: sets='train'")
    bn_batches = check_count('bn_batches', bn_batches, optional=True)
    train_batches = check_count('train_batches', train_batches, optional=True)
    columns = [f'{ds}_{name}' for ds in sets for name in _measures(learn)] + ['norm']
    spec = {
        'kind': about['kind'],
        **about['spec'],
        'columns': columns,
        'bn_batches': bn_batches,
        'train_batches': train_batches,
        'seed': check_count('seed', seed, least=0),
        'data': [_size(dl) for dl in loaders(learn)[: 1 + ('valid' in sets)]],
    }
    surface = kind(about | {'columns': columns, 'spec': spec}, points)
    rows = MemoryRows(surface) if file is None else PointFile(file, surface)
    try:
        todo, remarks = np.flatnonzero(~rows.surface.is_measured).tolist(), {}
        bar = progress_bar(todo) if space.shows_progress and progress is None else todo
        names = refreshable(learn)  # asked while the learner is as it stands
        # each pass puts the generators back, so that all begin the same
        with unwound_whole(), untouched(learn, seed), in_train_mode(learn.model):
            batches = _Batches(learn, names, sets, bn_batches, train_batches) if todo else None
            for done, i in enumerate(bar, len(points) - len(todo)):
                if progress is not None:
                    progress(done, len(points))
                weights, buffers = at(i)
                space.put(weights, buffers)
                with lent(space.scratch, learn.model), modes_put_back(learn.model):
                    # here, so that what it merges is merged once: passes put attributes back, not weights
                    learn.model.eval()
                    row = _measure(learn, names, batches, remarks)
                rows.add(i, row | {'norm': _norm(weights)})
    except PassCancelled:
        raise RuntimeError(
            'a callback of the learner cancels validations or batch-norm passes: remove it first'
        ) from None
    finally:
        rows.close()
    for what, sentence in remarks.items():
        if what != 'infinite':  # far from the solutions that is no surprise, and the loss shows it
            warnings.warn(sentence)
    return rows.surface


@contextmanager
def modes_put_back(model):
    """At the end of this context `model` is put in the modes it had at its start, by its modules'
    own `train` and `eval`.
    """
    model = unwrap(model)
    modes = modes_of(model)
    try:
        yield
    finally:
        with uninterrupted():
            set_modes(model, modes)


class _Batches:
    "What is run through the model at each point: for batch norm, and for each of the `sets`."

    def __init__(self, learn, names, sets, bn_batches, train_batches):
        wanted = [bn_batches] * bool(names) + [train_batches] * ('train' in sets)
        training = {n: kept_batches(learn, n) for n in dict.fromkeys(wanted)}  # for both the same, if as many
        self.bn = training.get(bn_batches)
        self.sets = {ds: training[train_batches] if ds == 'train' else kept_batches(learn, train=False) for ds in sets}


def _measure(learn, names, batches, remarks) -> dict:
    if names:
        remarks |= refresh_bn(learn, names, None, in_fit=False, dl=batches.bn).remarks
    row = {}
    for ds, dl in batches.sets.items():
        values = validate_aside(learn, dl, in_fit=False)
        row |= {f'{ds}_{name}': _number(v) for name, v in zip(_measures(learn), values)}
    return row


def _measures(learn) -> list[str]:
    "'loss' and the names of the metrics, numbered where two have the same."
    names = ['loss', *(m.name for m in learn.metrics)]
    return [name if names.index(name) == i else f'{name}_{names[: i + 1].count(name)}' for i, name in enumerate(names)]


def _norm(weights):
    return float(torch.linalg.vector_norm(weights, dtype=None if weights.device.type == 'mps' else torch.float64))


def _number(v):
    try:
        return float(v)
    except (TypeError, ValueError):
        return float('nan')  # a metric may give anything


def _size(dl):
    "Samples, if that is known, and batch size."
    n = getattr(dl, 'n', None) or (len(dl.dataset) if hasattr(getattr(dl, 'dataset', None), '__len__') else None)
    return [n, getattr(dl, 'bs', None) or getattr(dl, 'batch_size', None)]


def fingerprints(vectors: dict) -> list:
    "Pairs of a name and a fingerprint, in their order."
    return [[name, hashlib.sha256(w.numpy().data).hexdigest()[:16]] for name, w in vectors.items()]


def _check_sets(sets):
    sets = (sets,) if isinstance(sets, str) else tuple(sets)
    if sets not in (('train',), ('valid',), ('train', 'valid'), ('valid', 'train')):
        raise ValueError(f"sets must be 'train', 'valid' or both, not {sets!r}")
    return sets


def check_ts(ts, low=-float('inf'), high=float('inf')) -> list[float]:
    "Points of a line or curve, ascending; a number of them goes from `low` to `high`."
    if isinstance(ts, Integral) and not isinstance(ts, bool):
        return np.linspace(low, high, check_count('ts', ts, least=2)).round(12).tolist()
    found = np.unique(check_numbers('ts', ts))
    if not len(found):
        raise ValueError('ts is empty: give points, of which 0 and 1 are the solutions')
    if found[0] < low or found[-1] > high:
        raise ValueError(f'ts must be from {low} to {high}, not {ts!r}')
    return found.tolist()
