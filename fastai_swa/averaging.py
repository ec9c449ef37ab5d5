"""Running averages of weights, and lending an average's tensors to the model that is in use. Plain PyTorch."""
import math
from contextlib import contextmanager
from functools import partial
from numbers import Real
from operator import attrgetter

import torch
from torch import nn

from .modules import clean_copy, named_tensors, plain_name, unwrap

__all__ = ['WeightAverage', 'equal', 'ema', 'lent', 'all_finite', 'check_match']


def equal(n_averaged: int) -> float:
    "Each point weighs the same: `1 / (n_averaged + 1)` (Izmailov et al. 2018, Algorithm 1)."
    return 1 / (n_averaged + 1)


def ema(decay: float):
    """Exponential moving average: the old average keeps `decay` of its weight, the new point gets `1 - decay`.

    The first point is taken whole, so the average never contains weights from before it.
    Raises `TypeError` or `ValueError` if `decay` is not a number in [0, 1).
    """
    if isinstance(decay, bool) or not isinstance(decay, Real): raise TypeError(f'decay must be a number in [0, 1), not {decay!r}')
    if not 0 <= decay < 1: raise ValueError(f'decay must be in [0, 1), not {decay!r}')
    return partial(_ema_weight, decay)


def _ema_weight(decay, n_averaged): return 1. if n_averaged == 0 else 1. - decay


def check_weight(weight):
    "Raise `TypeError` or `ValueError` unless `weight` is a function from a number of points to a number in [0, 1]."
    if not callable(weight): raise TypeError(f'weight must be a function such as equal or ema(0.99), not {weight!r}')
    try: fits = 0 <= weight(1) <= 1
    except Exception: fits = False
    if not fits: raise ValueError(f'weight must give a number in [0, 1] for a number of points, as equal and ema(0.99) do, and {weight!r} does not')


def check_swa_model(swa_model):
    "Raise `TypeError` unless `swa_model` is a module or `None`."
    if not isinstance(swa_model, nn.Module | None): raise TypeError(f'swa_model must be an nn.Module or None, not {type(swa_model).__name__}')


class WeightAverage:
    """The running average of a model's weights: `swa_model <- swa_model + weight * (model - swa_model)` at each `update`.

    - `model`: the module in training; `torch.compile`d and data-parallel ones are seen through, names are those of the bare module.
    - `weight`: function from `n_averaged`, the number of points so far, to the new point's weight in [0, 1]: `equal`, `ema(decay)`
      or any other. The first point is always taken whole.
    - `swa_model`: module to average into, of the same architecture; by default a clean copy of `model` (`modules.clean_copy`).

    `swa_model` follows the model's dtypes and devices. Where the model is in low precision (under 32 bits) the average is kept in
    float32 beside it, since an average in bfloat16 soon stops moving. Buffers are copied from the latest model: the statistics of
    batch norm belong to those weights, not to the average, until `update_bn` has recomputed them.

    Raises `TypeError` for arguments of the wrong kind and `ValueError`, naming the tensors, for a `swa_model` that does not match.
    """
    def __init__(self, model: nn.Module, weight=equal, swa_model: nn.Module | None = None):
        if not isinstance(model, nn.Module): raise TypeError(f'model must be an nn.Module, not {type(model).__name__}')
        check_weight(weight)
        check_swa_model(swa_model)
        self.weight, self.n_averaged, self.master, self.is_lent, self._linked = weight, 0, {}, False, None
        self.swa_model = clean_copy(model) if swa_model is None else swa_model
        self._link(model)

    def update(self, model: nn.Module):
        """Fold the weights of `model` into the average. Nothing is read back from the device.

        Raises `ValueError` before anything changes if the parameters of `model` no longer match the average's, naming them, or if
        `weight` gives something outside [0, 1]; `RuntimeError` while the average's tensors are lent to a model.
        """
        if self.is_lent: raise RuntimeError('the average cannot be updated while its weights are lent to the model')
        weight = 1. if self.n_averaged == 0 else self.weight(self.n_averaged)
        if not isinstance(weight, Real) or not 0 <= weight <= 1:
            raise ValueError(f'weight({self.n_averaged}) must be a number in [0, 1], not {weight!r}')
        link = self._link(model)
        with torch.no_grad(): link.fold(float(weight))
        self.n_averaged += 1

    def _link(self, model):
        model = unwrap(model)
        if self._linked is None or not self._linked.holds(model): self._linked = _Link(model, unwrap(self.swa_model), self.master)
        return self._linked

    def release(self):
        "Forget the model folded last, so that the average alone does not keep it in memory; the next `update` links again."
        self._linked = None

    @contextmanager
    def lent_to(self, model: nn.Module):
        """Within this context `model` holds the average's own tensors (see `lent`), after `swa_model` took on its dtypes and device.

        Raises `ValueError` if `model` does not match the average, `RuntimeError` if the average is lent already.
        """
        if self.is_lent: raise RuntimeError('the average is lent to a model already; leave that context first')
        self._link(model)
        self.is_lent = True
        try:
            with lent(self.swa_model, model): yield self.swa_model
        finally: self.is_lent = False

    def copy_to(self, model: nn.Module):
        "Write the average into the parameters and buffers of `model`, in place. Raises like `lent_to`."
        if self.is_lent: raise RuntimeError('the average is lent to a model; leave that context first')
        link = self._link(model)
        with torch.no_grad():
            for average, own in (link.params, *link.buffers): torch._foreach_copy_(own, average)

    def state_dict(self) -> dict:
        """`{'swa_model': plain state dict, 'n_averaged': int, 'master': {name: float32 tensor}}`; tensors are live, as in PyTorch.

        `master` is empty unless the model is in low precision.
        """
        state = {plain_name(k): v for k, v in unwrap(self.swa_model).state_dict().items()}
        return {'swa_model': state, 'n_averaged': self.n_averaged, 'master': dict(self.master)}

    def load_state_dict(self, state: dict):
        """Take over a `state_dict`. Raises `ValueError` before anything changes if it is none, or belongs to another model,
        and `RuntimeError` while the average is lent."""
        if self.is_lent: raise RuntimeError('a state cannot be loaded while the average is lent to a model')
        if not isinstance(state, dict) or not {'swa_model', 'n_averaged', 'master'} <= set(state):
            raise ValueError('not the state of a WeightAverage: expected a dict with swa_model, n_averaged and master')
        model = unwrap(self.swa_model)
        own = {plain_name(k): (k, v) for k, v in model.state_dict().items()}
        _refuse_mismatch('the state', state['swa_model'], {name: v for name, (_, v) in own.items()})
        params = named_tensors(model.named_parameters)
        foreign = {k for k, t in state['master'].items() if k not in params or t.shape != params[k].shape}
        if foreign: raise ValueError(f'the state does not match the average: master has {_some(foreign)}')
        model.load_state_dict({own[name][0]: v for name, v in state['swa_model'].items()})
        self.master.clear()
        for name, t in state['master'].items():
            with torch.no_grad(): params[name].copy_(t)
            if _is_low(params[name]): self.master[name] = t.detach().to(params[name].device, torch.float32, copy=True)
        self.n_averaged = state['n_averaged']
        self.release()

    def __repr__(self): return f'{type(self).__name__}({type(unwrap(self.swa_model)).__name__}, n_averaged={self.n_averaged})'


def check_match(model: nn.Module, swa_model: nn.Module):
    "Raise `ValueError`, naming the tensors, unless `swa_model` can hold an average of `model`; change nothing."
    _pair_params(unwrap(model), unwrap(swa_model))


class _Link:
    """The tensors of a model beside those of its average, in lists for the multi-tensor kernels.

    Making one checks all names and shapes first, then gives the average the model's dtypes and devices.
    """
    def __init__(self, model, swa_model, master):
        pairs = _pair_params(model, swa_model)
        for name, (d, p) in pairs.items(): _convert(name, d, p, master)
        for name in master.keys() - {n for n, (d, _) in pairs.items() if _is_low(d)}: del master[name]
        self.params = [d for d, _ in pairs.values()], [p for _, p in pairs.values()]
        self.buffers = _group(_pair_buffers(model, swa_model))
        inexact = [(d, p) for d, p in pairs.values() if _is_inexact(p) and not _is_low(p)]
        self.lerped = _group(inexact)
        self.copied = _group([(d, p) for d, p in pairs.values() if not _is_inexact(p)])
        self.low = _low_groups([(d, p, master[name]) for name, (d, p) in pairs.items() if _is_low(p)])
        self.model, self.slots = model, _slots(model) + _slots(swa_model)
        self.snapshot = [dict(d) for d in self.slots]
        self.single = [(d, k, t) for d in self.slots for k, t in d.items() if isinstance(t, torch.Tensor) and t.numel() <= 1]
        self.low_ptrs = self._low_ptrs()

    def _low_ptrs(self): return [t.data_ptr() for t in (*self.params[0], *self.params[1])] if self.low else None

    def holds(self, model):
        "Is `model` still made of the linked tensors, and are the two sides of one dtype and device?"
        try: same = self.slots == self.snapshot      # dicts compare by identity first: no tensor is read while all is as it was
        except RuntimeError: same = False            # "truth value of a tensor is ambiguous": there is another tensor in its place
        dst, src = self.params
        return (model is self.model and same and all(d[k] is t for d, k, t in self.single)
                and list(map(_dtype, dst)) == list(map(_dtype, src)) and list(map(_device, dst)) == list(map(_device, src))
                and list(map(_numel, dst)) == list(map(_numel, src)) and self._low_ptrs() == self.low_ptrs)

    def fold(self, weight):
        for dst, src in self.lerped:
            if weight == 1: torch._foreach_copy_(dst, src)
            else:           torch._foreach_lerp_(dst, src, weight)
        for dst, src in self.copied + self.buffers: torch._foreach_copy_(dst, src)
        for dst, src, master, scratch in self.low:
            torch._foreach_copy_(scratch, src)
            if weight == 1: torch._foreach_copy_(master, scratch)
            else:           torch._foreach_lerp_(master, scratch, weight)
            torch._foreach_copy_(dst, master)


_dtype, _device, _numel = attrgetter('dtype'), torch.Tensor.get_device, torch.Tensor.numel

def _shape(o): return getattr(o, 'shape', None)    # a state dict may hold a module's extra state, which need not be a tensor

def _slots(model): return [d for m in model.modules() for d in (m._parameters, m._buffers, m._modules)]

def _is_inexact(t): return t.is_floating_point() or t.is_complex()

def _is_low(t): return t.is_floating_point() and torch.finfo(t.dtype).bits < 32


def _some(names, limit=3):
    names = sorted(names)
    return ', '.join(map(repr, names[:limit])) + (f' and {len(names) - limit} more' if len(names) > limit else '')


def _refuse_mismatch(what, src, dst):
    "Raise a `ValueError` that names how `src` and `dst`, both name -> tensor, differ in names or shapes."
    faults = [f'{_some(names)} {fault}' for names, fault in (
        (dst.keys() - src.keys(), 'missing'), (src.keys() - dst.keys(), 'not in the average'),
        ({k for k in src.keys() & dst.keys() if _shape(src[k]) != _shape(dst[k])}, 'of another shape')) if names]
    if faults: raise ValueError(f'{what} does not match the average: ' + '; '.join(faults))


def _pair_params(model, swa_model):
    "Name -> (average's, model's) parameter, each once; raises `ValueError` if the two do not match."
    src, dst = named_tensors(model.named_parameters), named_tensors(swa_model.named_parameters)
    _refuse_mismatch('the model', src, dst)
    first = {}
    for name, p in src.items():
        if first.setdefault(id(dst[name]), (name, p))[1] is not p:
            raise ValueError(f'the model does not match the average: {name!r} is tied to {first[id(dst[name])][0]!r} in the average only')
        if p.numel() and p.data_ptr() == dst[name].data_ptr():
            raise ValueError(f'swa_model shares {name!r} with the model in training; pass a separate module')
    for name, _ in model.named_buffers():
        try: swa_model.get_submodule(plain_name(name).rpartition('.')[0])
        except AttributeError: raise ValueError(f'the model does not match the average: its buffer {name!r} has no place there') from None
    return {name: (dst[name], p) for name, p in first.values()}


def _convert(name, d, p, master):
    "Give `d`, the average of `p`, the dtype and device of `p`; a float32 master appears and disappears with low precision."
    if _is_low(p):
        master[name] = master.get(name, d.data).to(p.device, torch.float32, copy=name not in master)
        source = master[name]
    else: source = master.pop(name, d.data)
    if d.dtype != p.dtype or d.device != p.device: d.data = source.to(p.device, p.dtype, copy=_is_low(p))


def _pair_buffers(model, swa_model):
    "(average's, model's) buffers; those that came, went, or changed shape since the copy follow the model."
    src, dst = named_tensors(model.named_buffers), named_tensors(swa_model.named_buffers)
    for name in src.keys() | dst.keys():
        p, d = src.get(name), dst.get(name)
        if p is not None and d is not None and (p.shape, p.dtype, p.device) == (d.shape, d.dtype, d.device): continue
        path, _, leaf = name.rpartition('.')
        swa_model.get_submodule(path)._buffers[leaf] = None if p is None else p.detach().clone()
    dst = named_tensors(swa_model.named_buffers)
    return list({id(d): (d, src[name]) for name, d in dst.items()}.values())


def _group(pairs):
    "Lists of `pairs`, one for each dtype and device: the multi-tensor kernels are fast on uniform lists."
    groups = {}
    for d, p in pairs: groups.setdefault((p.dtype, p.device), []).append((d, p))
    return [tuple(map(list, zip(*group))) for group in groups.values()]


_SCRATCH = 2**20    # elements: enough to fill a GPU, few enough to stay in a CPU's cache

def _low_groups(triples):
    "Pieces of (average, model, master), each group with a float32 scratch of at most `_SCRATCH` elements or one row."
    groups, scratch = [], {}
    for d, p, m in triples:
        rows = max(1, _SCRATCH * len(p) // max(1, p.numel())) if p.dim() else 1
        for piece in zip(*(t.detach().split(rows) if t.dim() else (t.detach(),) for t in (d, p, m))):
            key, n = (p.dtype, p.device), piece[0].numel()
            if not groups or groups[-1][0] != key or groups[-1][1] + n > _SCRATCH: groups.append([key, 0, []])
            groups[-1][1] += n
            groups[-1][2].append(piece)
    for (_, device), n, _ in groups: scratch[device] = max(scratch.get(device, 0), n)
    scratch = {device: torch.empty(n, device=device) for device, n in scratch.items()}
    res = []
    for (_, device), n, pieces in groups:
        dst, src, master = map(list, zip(*pieces))
        views = [s.view(d.shape) for s, d in zip(scratch[device][:n].split([d.numel() for d in dst]), dst)]
        res.append((dst, src, master, views))
    return res


@contextmanager
def lent(source: nn.Module, model: nn.Module):
    """Within this context `model` holds the very tensors of `source`, a module of the same shapes and dtypes; afterwards its own again.

    Parameters and buffers keep their identity, only their data is exchanged, so that optimizers, compiled code and wrappers go on
    referring to them; no tensor is copied. What the model does to its buffers inside happens to `source`.

    Raises `ValueError`, naming the parameters and before anything changes, if the two do not match.
    """
    model, source = unwrap(model), unwrap(source)
    own, other = named_tensors(model.named_parameters), named_tensors(source.named_parameters)
    _refuse_mismatch('the model', own, other)
    buffers = named_tensors(source.named_buffers)
    slots = [(m, plain_name(f'{path}.{leaf}' if path else leaf), leaf, t) for path, m in model.named_modules(remove_duplicate=False)
             for leaf, t in m._buffers.items() if t is not None]
    lent_pairs = {id(t): (t, other[name]) for name, t in own.items()}
    lent_pairs |= {id(t): (t, buffers[name]) for _, name, _, t in slots if name in buffers}
    kept = [(t, t.data) for t, _ in lent_pairs.values()]
    try:
        for t, theirs in lent_pairs.values(): t.data = theirs.data
        yield
    finally:
        try:
            for m, name, leaf, t in slots:
                now = getattr(m, leaf, None)
                if now is not t and now is not None:    # rebound inside: the new tensor is the source's
                    if name in buffers: buffers[name].data = now.data
                    m._buffers[leaf] = t
        finally:
            for t, data in kept: t.data = data


def all_finite(tensors) -> bool:
    "Whether no tensor holds a NaN or an infinity; one read from each device."
    groups = {}
    for t in tensors:
        if _is_inexact(t) and t.numel(): groups.setdefault((t.dtype, t.device), []).append(t.detach())
    # the largest magnitude, unlike a sum or a 2-norm, cannot overflow
    return all(math.isfinite(torch.stack(torch._foreach_norm(ts, math.inf)).max().item()) for ts in groups.values())
