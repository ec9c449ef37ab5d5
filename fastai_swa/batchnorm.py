"""Batch-norm statistics for weights that were never trained with. Plain PyTorch."""

import itertools
import sys
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from .checks import check_count, listed
from .interrupts import uninterrupted, unwound_whole
from .modules import Kept, has_own_modes, unwrap
from .warn import warn

__all__ = ['update_bn', 'batch_moments', 'tracked_bn', 'statistics', 'StatisticsWatch', 'union', 'following']


def update_bn(loader, model: nn.Module, device=None, n_batches: int | None = None, inputs=None):
    """Recompute the batch-norm statistics of `model` from the batches of `loader`, exactly.

    Each layer gets the mean and the unbiased variance of all values that reach it, pooled over the
    samples of the pass, while every batch-norm layer normalises by its batch and dropout is off
    (Izmailov et al. 2018, section 3.2). Frozen layers (`tracked_bn`) are left alone; a model
    without others needs no pass and `loader` is not touched. Modes and momenta come back as they
    were and, on any error, so do the statistics.

    Layers that normalise in a way of their own (`statistics`: instance norm, batch renormalisation,
    ghost batch norm and the like) get what they take from a batch themselves, averaged over the
    samples of the pass; where that is mean and variance, or standard deviation, of a channel, these
    are pooled exactly. One whose statistics are no running averages goes through its own update
    batch after batch, beginning with the statistics it has: not exact, and said in a warning, which
    names it.

    - `loader`: batches of any sizes: a tensor is the input; of a tuple or list all but the last
      element are inputs (a single element is the input); a mapping is passed as keyword arguments.
    - `device`: where to move each batch; `None` leaves it where it is.
    - `n_batches`: stop after so many; `None` takes all.
    - `inputs`: function from a batch to a tuple of arguments or a dict of keyword arguments, for
      any other kind of batch.

    A batch that a layer cannot normalise (a single value per channel) is skipped, with one warning
    for all of them; statistics that are not finite are another, and so are layers that no batch
    reached: they keep what they have. Raises `ValueError` if no batch is left, and `TypeError` or
    `ValueError` for an `n_batches` that is not a positive int.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be an nn.Module, not {type(model).__name__} (the loader comes first)')
    n_batches = check_count('n_batches', n_batches, optional=True)
    model = unwrap(model)
    layers = tracked_bn(model)
    if not layers:
        if outside := statistics_outside_buffers(model):
            warn(outside_sentence(outside))
        return
    with batch_moments(model, layers) as moments:
        for batch in itertools.islice(loader, n_batches):
            args = split_inputs(batch) if inputs is None else inputs(batch)
            if device is not None:
                args = _to(args, device)
            if isinstance(args, Mapping):
                model(**args)
            else:
                model(*args)
            moments.end_batch()
    for sentence in moments.remarks.values():
        warn(sentence)


# which layers


_RUNNING = 'running_', 'moving_'  # how the names of running statistics begin


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> buffer: the statistics by which `module` itself normalises in eval mode; empty for
    any other module.

    They are its floating-point buffers, if it is

    - one of torch's batch or instance norms, or of a subclass, that keeps `running_mean` and
      `running_var`,
    - of any class and keeps a mean beside a variance or deviation (names that begin with `running_`
      or `moving_`, one with "mean", one with "var", "std" or "sigma" in it),
    - of a class, or a subclass of one, with "norm" in its name, and has a buffer whose name begins
      like that, or the two buffers `sums` and `sqrs`.

    So not the vectors of `spectral_norm`, observers of quantisation, codebooks, or averages that a
    loss keeps.
    """
    buffers = {k: b for k, b in module._buffers.items() if b is not None}
    running = [k for k in buffers if k.startswith(_RUNNING)]
    if isinstance(module, _NormBase):
        keeps = {'running_mean', 'running_var'} <= buffers.keys()
    elif any('mean' in k for k in running) and any(spread in k for k in running for spread in ('var', 'std', 'sigma')):
        keeps = True
    else:
        keeps = (running or {'sums', 'sqrs'} <= buffers.keys()) and _is_called_norm(type(module))
    if not keeps:
        return {}
    return {k: b for k, b in buffers.items() if b.is_floating_point()}


def _is_called_norm(cls) -> bool:
    return any('norm' in c.__name__.lower() for c in cls.__mro__ if not c.__module__.startswith('torch.nn.utils'))


def statistics_outside_buffers(model: nn.Module) -> list[str]:
    """Names of the layers of `model` whose running statistics are no buffers, so that nothing
    refreshes them.

    By their names: "norm" in that of the class, and `running_` or `moving_` at the beginning of
    that of a plain tensor, or of a parameter without gradients.
    """
    res = []
    for name, m in model.named_modules():
        fixed = [k for k, p in m._parameters.items() if p is not None and not p.requires_grad]
        plain = [k for k, v in vars(m).items() if isinstance(v, torch.Tensor)]
        if _is_called_norm(type(m)) and any(k.startswith(_RUNNING) for k in fixed + plain):
            res.append(name)
    return res


def outside_sentence(names: list[str]) -> str:
    return (
        f'running statistics of {_layers(names)} are not buffers, so they cannot be refreshed for other weights: keep '
        'them with register_buffer'
    )


def tracked_bn(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer for the normalising layers of `model` (`statistics`) that are not frozen: those
    whose statistics move in training.

    For where no training is seen; where one is, `StatisticsWatch` tells. A model in train mode is
    taken as it stands: its layers in eval mode are frozen, and those that do not move by themselves
    (`momentum=0`, a "Frozen" in the name of their class). A model wholly in eval mode is asked
    after `model.train()`, which an overridden `train()` may answer as it likes; then each module's
    mode is put back. Whether weights have `requires_grad` does not matter.
    """
    if any(m.training for m in model.modules()):
        return _moving_layers(model)
    with _asked_in_train_mode(model):
        return _moving_layers(model)


def _moving_layers(model) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if statistics(m) and _moves_when_called(m)}


def _moves_when_called(layer) -> bool:
    if not layer.training or 'frozen' in type(layer).__name__.lower():
        return False
    if not isinstance(layer, _NormBase):
        return True
    never = (0, None) if isinstance(layer, _InstanceNorm) else (0,)  # torch's instance norm takes None for 0
    return layer.track_running_stats and layer.momentum not in never


@contextmanager
def _asked_in_train_mode(model):
    """Within this context the modes are those that `model.train()` sets; at its end all is bitwise
    as before, the modes one by one.

    A `train()` of one's own may do more than set modes, and a second call would not always take it
    back.
    """
    modes = [(m, m.training) for m in model.modules()]

    def put_back():
        kept.put_back()
        for m, mode in modes:
            m.training = mode

    with unwound_whole():
        kept = Kept([m for m, _ in modes if has_own_modes(m)])
        with _ended_by(put_back):
            model.train()
            yield


@contextmanager
def _ended_by(put_back):
    """`put_back` is called at the end of this context, whole, however that comes; perhaps twice. In
    `unwound_whole`.
    """
    try:
        try:
            yield
        finally:
            with uninterrupted():
                put_back()
    finally:  # for an interruption that arrived just before the lines above
        with uninterrupted():
            put_back()


class StatisticsWatch:
    """Which normalising layers of a model (`statistics`) training moves: made before an epoch's
    first batch, asked later.

    Only the bits of running statistics count: neither modes, `requires_grad`, counters nor the
    tensors' versions. Making it costs one copy of all statistics; asking costs one comparison, and
    one read from the device.
    """

    def __init__(self, model: nn.Module):
        self._model = unwrap(model)
        self._before = _bits(self._model)

    def moved(self) -> list[str]:
        """Names of the layers whose statistics differ bitwise from those at the start, in the
        model's order.

        A layer that was not there then, or had statistics of other shapes or on another device,
        counts as moved.
        """
        now = _bits(self._model)
        if _layouts(now) != _layouts(self._before):
            before = _by_layer(self._before)
            moved = {name for name, parts in _by_layer(now).items() if not _are_equal(parts, before.get(name, []))}
        else:
            moved = set()
            for kind, (layout, bits) in now.items():
                differs = (bits != self._before[kind][1]).cpu()
                parts = differs.split([n for _, n in layout])
                moved.update(name for (name, _), part in zip(layout, parts) if part.any())
        return [name for name, _ in self._model.named_modules() if name in moved]


def union(lists: list[list[str]]) -> list[str]:
    """The names in any of `lists`, one a process: in the first one's order, then what the next ones
    add.
    """
    return list(dict.fromkeys(itertools.chain.from_iterable(lists)))


def following(moved: list, before: list[str], model: nn.Module) -> list[str]:
    """The names of the layers whose statistics follow the weights of an epoch.

    - `moved`: for each process the layers whose statistics the epoch has moved, `None` where it does not know.
    - `before`: the answer of the epoch before, which holds where no process knows; without one `tracked_bn` tells.
    """
    known = [names for names in moved if names is not None]
    if known:
        return union(known)
    return before or list(tracked_bn(model))


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: what bits are compared as


def _bits(model) -> dict:
    """(device, dtype) -> layout, which is (layer's name, number of elements) in a row, and a copy
    of all bits in a row.
    """
    groups = {}
    for name, layer in model.named_modules():
        for t in _without_counters(statistics(layer)):
            groups.setdefault((t.device, t.dtype), []).append((name, t.detach().flatten()))
    res = {}
    for (device, dtype), group in groups.items():
        layout = [(name, t.numel()) for name, t in group]
        res[device, dtype] = layout, torch.cat([t for _, t in group]).view(INTEGERS[dtype.itemsize])
    return res


def _layouts(bits: dict) -> list:
    return [(kind, layout) for kind, (layout, _) in bits.items()]


def _without_counters(tensors: dict) -> list[torch.Tensor]:
    """Initialised ones of `tensors`; none that holds a single number, unless all do: layers of one
    channel.
    """
    tensors = [t for t in tensors.values() if not isinstance(t, nn.parameter.UninitializedTensorMixin)]
    several = [t for t in tensors if t.numel() > 1]
    return several or tensors


def _by_layer(groups: dict) -> dict[str, list[torch.Tensor]]:
    "Layer's name -> the bits of each of its statistics, from what `_bits` gives."
    res = {}
    for layout, bits in groups.values():
        for (name, n), part in zip(layout, bits.split([n for _, n in layout])):
            res.setdefault(name, []).append(part)
    return res


def _are_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    if [(t.dtype, t.device) for t in a] != [(t.dtype, t.device) for t in b]:
        return False
    return all(torch.equal(s, t) for s, t in zip(a, b))


# the pass


@contextmanager
def batch_moments(model: nn.Module, layers: dict[str, nn.Module], gather=None):
    """Within this context run batches through `model`, each followed by `end_batch()` of the
    `Moments` given; at its end the statistics of `layers` become the moments of what reached them.

    Inside, `layers` normalise by their batch and everything else is in eval mode, without
    gradients, and without compiled code, which would not see the hooks. Each call of `model` puts
    this right again: whoever sets it to train mode (a detector has another signature there) does so
    for modules with submodules alone; dropout stays off, and normalising layers other than `layers`
    go on normalising by the statistics they have. (Dropout that a module with submodules does by
    itself, as a function, is in such a mode.) The layers write to scratch tensors meanwhile: their
    own statistics stay as they are until the end, and for good if the block raises, also for a
    Ctrl-C. A layer that is not called as a module keeps its statistics, and normalises by them.

    - `gather`: where several processes each run a share of the batches, the function that gives an
      object of each, as a list; the statistics become the moments over all shares. Each process
      normalises by its own batches, `SyncBatchNorm` as well.
    """
    moments = Moments(model, layers)
    with unwound_whole():
        with _ended_by(moments.stop):
            moments.start()
            with torch.no_grad(), _eager():
                yield moments
        moments.write(gather)


def _eager():
    """No compiled code within this context. Where there can be none yet, the compiler, a second's
    work, is not imported.
    """
    return torch.compiler.set_stance('force_eager') if 'torch._dynamo' in sys.modules else nullcontext()


_STATISTICS = 'running_mean', 'running_var', 'num_batches_tracked'


class Moments:
    """The moments of what reached some normalising layers, pooled batch by batch: what
    `batch_moments` gives.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]):
        self.names = {m: name for name, m in layers.items()}
        self.n_batches = 0
        self.n_skipped = 0
        self.remarks = {}  # kind -> sentence to warn with, once all is written
        self.pools = {}  # layers of torch's own that see batches together -> _Pool
        self._model = model
        self._plain = [m for m in self.names if _normalises_as_torch(m)]
        self._others = {m: _OwnWay(m, self.names) for m in self.names if m not in set(self._plain)}
        self._modes = [(m, m.training) for m in model.modules()]
        self._ruled = [m for m in model.modules() if m not in self.names and _is_ruled(m)]  # the layers set their own
        self._kept = [(m, m.momentum, {k: m._buffers[k] for k in _STATISTICS if k in m._buffers}) for m in self._plain]
        self._forwards = [(vars(m), vars(m).get('forward')) for m in self.names]
        self._handles = []
        self._too_small = None  # name of a layer that a batch gave one value a channel
        self._scratched = set()
        self._reset()

    def _reset(self):
        "What the batch under way has brought so far."
        self._called = {}  # layer of torch's own -> values a channel in its last call
        self._calls = []  # (layer, values a channel, mean, variance) of the calls before that
        self._cannot = False  # some layer got a single value per channel

    # the passes' side

    def start(self):
        "Set modes and hooks."
        for m, _ in self._modes:
            m.training = False
        self._handles.append(self._model.register_forward_pre_hook(self._before_model))
        for m in self._plain:
            m.momentum = 1.0  # leaves the moments of one batch in the running ones, at no cost beside the forward pass
            self._handles.append(m.register_forward_pre_hook(self._before_layer, with_kwargs=True))
            if isinstance(m, nn.SyncBatchNorm):
                m.forward = MethodType(_BatchNorm.forward, m)  # waits for no other process
        for m, layer in self._others.items():
            m.forward = layer

    def stop(self):
        "Put modes, momenta, buffers and hooks back."
        for handle in self._handles:
            handle.remove()
        for m, momentum, buffers in self._kept:
            m.momentum = momentum
            m._buffers.update(buffers)
        for layer in self._others.values():
            layer.put_back()
        for attributes, forward in self._forwards:
            attributes.pop('forward', None)
            if forward is not None:
                attributes['forward'] = forward
        for m, mode in self._modes:
            m.training = mode

    def end_batch(self):
        """Pool the moments of the batch that went through; one that some layer could not normalise
        is left out.
        """
        cannot = [m for m, layer in self._others.items() if layer.cannot]
        if cannot:
            self._cannot = True
            self._too_small = self.names[cannot[0]]
        reached = bool(self._called) or any(layer.was_called for layer in self._others.values())
        for layer in self._others.values():
            layer.end_batch(keep=not self._cannot)
        if self._cannot:
            self.n_skipped += 1
            for m in self._called:  # 0 * inf is nan: no trace of this batch may stay in the scratch
                m.running_mean.zero_()
                m.running_var.fill_(1)
        elif reached:
            self._pool_batch()
            self.n_batches += 1
        self._reset()

    def unreached(self) -> list[str]:
        "Names of the layers that nothing has reached so far, in this process."
        reached = {m for pool in self.pools.values() for m in pool.layers} | set(self._called)
        reached |= {m for m, layer in self._others.items() if layer.was_called or layer.share.was_called}
        return [name for m, name in self.names.items() if m not in reached]

    # the layers' side

    def _before_model(self, *_):
        """Forward pre-hook of the model: a callback may have called `model.train()` since the last
        batch.
        """
        for m in self._ruled:
            if m.training:
                m.training = False

    def _before_layer(self, layer, args, kwargs):
        """Forward pre-hook of torch's own layers: choose the mode, note how many values a channel
        it is about to see.
        """
        if layer not in self._scratched:
            self._give_scratch(layer)
        n = (args[0] if args else kwargs['input']).numel() // layer.running_mean.numel()
        layer.training = n > 1
        if n < 2:  # the forward pass runs on, its moments are dropped
            self._cannot = True
            self._too_small = self.names[layer]
            return
        if layer in self._called:  # a layer used twice: its second call overwrites the first
            self._calls.append((layer, self._called[layer], layer.running_mean.clone(), layer.running_var.clone()))
        self._called[layer] = n

    def _give_scratch(self, layer):
        self._scratched.add(layer)
        own = {k: layer._buffers[k] for k in _STATISTICS if layer._buffers.get(k) is not None}
        layer._buffers.update({k: torch.zeros_like(b) for k, b in own.items()})
        layer.running_var.fill_(1)

    def _pool_batch(self):
        for layer, n, mean, var in self._calls:
            self._pool([layer], [n], [mean], [var])
        by_device = {}
        for m in self._called:
            by_device.setdefault(m.running_mean.device, []).append(m)
        for layers in by_device.values():
            ns = [self._called[m] for m in layers]
            self._pool(layers, ns, [m.running_mean for m in layers], [m.running_var for m in layers])

    def _pool(self, layers, ns, means, variances):
        self.pools.setdefault(tuple(layers), _Pool(layers)).add(ns, means, variances)

    # the end

    @property
    def skipped(self) -> str:
        "One sentence about the batches left out."
        n = self.n_skipped + self.n_batches
        return (
            f'{self.n_skipped} of {n} batches were left out of the batch-norm statistics: layer {self._too_small!r} '
            'got a single value per channel, which it cannot normalise'
        )

    def write(self, gather):
        """Put the moments in the layers; one that nothing reached keeps its own.

        Raises `ValueError` if there was no batch.
        """
        everyone = self._of_all_processes(gather)
        if not self.n_batches:
            why = 'the loader gave no batch, or no batch reached a batch-norm layer'
            if self.n_skipped:
                why = f'{self.skipped}; use larger batches'
            raise ValueError(f'the batch-norm statistics cannot be recomputed: {why}')
        new = []  # (buffer, its new value)
        for m, share in everyone.items():
            new += [(m._buffers[k], value) for k, value in share.values(m).items()]
        self._remark(everyone, all(bool(value.isfinite().all()) for _, value in new))
        counts = [m.num_batches_tracked for m in self._plain if everyone[m].n and m.num_batches_tracked is not None]
        with uninterrupted(), torch.no_grad():
            for buffer, value in new:
                buffer.copy_(value.view(buffer.shape))
            for count in counts:
                count.fill_(self.n_batches)

    def _of_all_processes(self, gather) -> dict:
        "Layer -> what reached it in all processes; the numbers of batches are added up."
        shares = {m: _Share('moments', was_called=False) for m in self._plain}
        for pool in self.pools.values():
            for m, n, mean, var in pool.split():
                shares[m].add(_Share('moments', _TORCHS, n, [mean, var]))
        shares |= {m: layer.share for m, layer in self._others.items()}
        if gather is None:
            return shares
        mine = [vars(shares[m].on_cpu()) for m in self.names]
        of_all = gather((self.n_batches, self.n_skipped, self._too_small, mine))
        n_batches, n_skipped, too_small, everyones = zip(*of_all)
        self.n_batches = sum(n_batches)
        self.n_skipped = sum(n_skipped)
        self._too_small = next(filter(None, too_small), None)
        for m, parts in zip(self.names, zip(*everyones)):
            first, *others = (_Share(**part) for part in parts)
            for other in others:
                first.add(other)
            shares[m] = first
        return shares

    def _remark(self, shares: dict, finite: bool):
        "Note what is to be said of the pass, each kind once."
        if self.n_skipped:
            self.remarks['skipped'] = self.skipped
        if not finite:
            self.remarks['infinite'] = (
                'the batch-norm statistics are not finite: a batch, or what the model makes of it, holds a NaN or an '
                'infinity'
            )
        unreached = [self.names[m] for m, share in shares.items() if not share.was_called]
        if unreached:
            self.remarks['unreached'] = (
                f'no batch of the batch-norm pass reached {_layers(unreached)}: the statistics there are those of the '
                'latest model'
            )
        refused = [m for m, share in shares.items() if share.error]
        if refused:
            first = shares[refused[0]]
            what = 'those of the other batches' if first.n else 'those of the latest model'
            names = _layers([self.names[m] for m in refused])
            self.remarks['refused'] = (
                f'{names} cannot take every batch of the batch-norm pass in train mode ({first.error}): the statistics '
                f'there are {what}'
            )
        updated = [self.names[m] for m, share in shares.items() if share.kind == 'update' and share.n]
        if updated:
            self.remarks['update'] = (
                f'the statistics of {_layers(updated)} are no running averages: they were '
                "refreshed by the layer's own updates over the batches of the pass, not exactly"
            )
        if outside := statistics_outside_buffers(self._model):
            self.remarks['outside'] = outside_sentence(outside)


def _layers(names: list[str]) -> str:
    return f'layer{"s" if len(names) > 1 else ""} {listed(names)}'


def _normalises_as_torch(layer) -> bool:
    """Is the forward pass of `layer` that of torch's own batch norm, which with momentum 1 keeps a
    batch's moments?
    """
    forward = vars(layer).get('forward')
    forward = getattr(forward, '_torchdynamo_orig_callable', forward)  # compiled
    forward = type(layer).forward if forward is None else getattr(forward, '__func__', forward)
    if forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return False
    return layer.running_mean.numel() == layer.running_var.numel()


def _is_ruled(module) -> bool:
    """Has the pass the last word on the mode of `module`?

    Others are in train mode where they are told so: a detector needs that for its signature.
    """
    is_leaf = next(module.children(), None) is None
    drops = 'drop' in type(module).__name__.lower() or isinstance(module, nn.MultiheadAttention)
    return is_leaf or drops or bool(statistics(module))


# what reached a layer


def _merge(n, mean, var, n_new, mean_new, var_new):
    """Count, mean and biased variance of two samples taken together, from theirs (Chan, Golub and
    LeVeque 1983).

    In place in `mean` and `var`. Counts are numbers, or tensors of one count a channel.
    """
    total = n + n_new
    share, delta = n_new / total, mean_new - mean
    mean += share * delta
    var += share * (var_new - var) + share * (1 - share) * delta.square_()
    return total, mean, var


# how layers keep a mean, or a biased variance of n values: n, mean, variance, eps -> statistic
_FORMS = {
    'mean': lambda n, mean, var, eps: mean,
    'unbiased variance': lambda n, mean, var, eps: var * (n / (n - 1)),
    'variance': lambda n, mean, var, eps: var,
    'unbiased deviation': lambda n, mean, var, eps: (var * (n / (n - 1))).sqrt(),
    'deviation': lambda n, mean, var, eps: var.sqrt(),
    'deviation with eps': lambda n, mean, var, eps: (var + eps).sqrt(),
    'deviation plus eps': lambda n, mean, var, eps: var.sqrt() + eps,
}
_TORCHS = {'running_mean': 'mean', 'running_var': 'unbiased variance'}


@dataclass
class _Share:
    "What has reached one layer so far, in one process or in several."

    # moments: mean and biased variance; average: the layer's own statistics, averaged; update: these as they are now
    kind: str | None = None
    forms: dict = field(default_factory=dict)  # statistic -> its form (`_FORMS`), for moments; else the names as keys
    n: int = 0  # values a channel, for moments; else samples
    tensors: list = field(default_factory=list)  # mean and variance; else one a statistic
    was_called: bool = True  # did anything reach the layer?
    error: str | None = None  # what a batch was refused with

    def add(self, other):
        """Take in `other`; one of another kind, which another process may come to from other
        batches, is left out.
        """
        self.was_called |= other.was_called
        self.error = self.error or other.error
        if not other.n:
            return
        if not self.n:
            self.kind = other.kind
            self.forms = other.forms
            self.n = other.n
            self.tensors = other.tensors
        elif self.kind == other.kind == 'moments':
            self.n, *self.tensors = _merge(self.n, *self.tensors, other.n, *other.tensors)
        elif self.kind == other.kind:
            self.n += other.n
            for mine, new in zip(self.tensors, other.tensors):
                mine += (other.n / self.n) * (new - mine)

    def on_cpu(self):
        return _Share(self.kind, self.forms, self.n, [t.cpu() for t in self.tensors], self.was_called, self.error)

    def values(self, layer) -> dict[str, torch.Tensor]:
        "Statistic -> its value."
        if not self.n:
            return {}
        if self.kind == 'moments':
            return _in_forms(self.forms, self.n, *self.tensors, layer)
        return dict(zip(self.forms, self.tensors))


def _in_forms(forms, n, mean, var, layer):
    return {k: _FORMS[form](n, mean, var, getattr(layer, 'eps', 0.0)) for k, form in forms.items()}


class _Pool:
    """The moments of torch's own layers that see batches together, end to end in one tensor.

    So it takes a few operations a batch, however many layers there are.
    """

    def __init__(self, layers):
        self.layers = layers
        self.counts = None
        self.moments = None
        self.bias = None, None  # counts of the latest batch, and what makes its variances biased

    def add(self, ns, means, variances):
        "Pool one batch: `ns` values a channel, their means and unbiased variances, for each layer."
        dtype = _wide(means[0])  # one rounding a batch adds up in float32
        mean = torch.cat(means).to(dtype)
        var = torch.cat(variances).to(dtype)
        if self.bias[0] != ns:  # but for the last batch, the same
            self.bias = ns, self._per_channel([(n - 1) / n for n in ns], mean)
        var *= self.bias[1]
        if self.counts is None:
            self.counts = list(ns)
            self.moments = mean, var
            return
        share = self._per_channel([n / (n + N) for n, N in zip(ns, self.counts)], mean)
        _merge(1 - share, *self.moments, share, mean, var)
        self.counts = [n + N for n, N in zip(ns, self.counts)]

    def _per_channel(self, values, like):
        """`values`, one a layer, as a number if they agree (as shares do, for images of one size),
        else as a tensor.
        """
        if len(set(values)) == 1:
            return values[0]
        return torch.cat([like.new_full((m.running_mean.numel(),), v) for v, m in zip(values, self.layers)])

    def split(self):
        "(layer, count, mean, biased variance) for each layer."
        sizes = [m.running_mean.numel() for m in self.layers]
        return zip(self.layers, self.counts, *(t.split(sizes) for t in self.moments))


def _wide(like):
    return torch.float32 if like.device.type == 'mps' else torch.float64


# layers with a forward pass of their own


class _OwnWay:
    """Stands for the forward pass of a layer that normalises in a way of its own, and finds what it
    takes from a batch.

    What the layer does with its statistics is seen, not guessed. A running average, `kept * old +
    (1 - kept) * new`, shows in two passes over one batch that begin with different statistics: they
    differ by `kept` of what they differed by before, whatever the statistics are, and each tells
    `new`. That is averaged over the samples of the pass, or, where it is the mean and the variance
    or deviation of channels, pooled as moments. While a batch passes, the layer has its statistics
    of this batch: so batch renormalisation, too, normalises by its batch. All other statistics go
    through the layer's own updates from batch to batch.
    """

    def __init__(self, layer: nn.Module, refreshed):
        self.layer = layer
        self.share = _Share(was_called=False)
        self.was_called = False  # in this batch
        self.cannot = False  # got a single value per channel in this batch
        self._forward = layer.forward
        self._attributes = None  # of the layer as it was at its first call, when a lazy one has its shapes
        self._start = None  # name -> buffer, then
        self._kind = None  # as in `_Share`, or still: nothing moves
        self._moved = []  # names of the statistics that the layer moves
        self._kept = {}  # samples in a batch -> name of a running average -> share of its old value that it keeps
        self._depends = False  # does the output depend on the statistics before the batch?
        self._axis = None  # of the channels in the input, for moments
        self._forms = {}  # statistic -> its form, for moments
        self._state = {}  # for updates: the buffers at the end of the latest batch,
        self._now = {}  # and of the latest call
        self._calls = []  # what the calls of this batch have brought
        if any(m in refreshed for m in layer.modules() if m is not layer):  # these must see each batch once
            self._kind = 'update'
            self._moved = list(statistics(layer))

    def __call__(self, *args, **kwargs):
        self.was_called = True
        if self._start is None:
            self._attributes = dict(vars(self.layer))
            self._start = {k: b for k, b in self.layer._buffers.items() if b is not None}
            self._state = self._now = self._start
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
        if x is None or self._kind == 'still':
            return self._run(self._start, args, kwargs, training=False)[0]
        if x.numel() < 2 * (x.shape[1] if x.dim() > 1 else 1):
            self.cannot = True
            return self._run(self._start, args, kwargs, training=False)[0]
        try:
            return self._normalise_by_batch(x, args, kwargs)
        except Exception as e:  # as of a batch that does not divide into a layer's ghost batches
            self.share.error = self.share.error or f'{type(e).__name__}: {e}'
            return self._run(self._start | self._typed(self.share.values(self.layer)), args, kwargs, training=False)[0]

    def end_batch(self, keep: bool):
        "Pool what this batch brought, or drop it."
        self.share.was_called |= self.was_called
        for call in self._calls if keep else []:
            self.share.add(call)
            if call.kind == 'update':
                self.share.tensors = call.tensors
        self._state = self._now if keep else self._state
        self._now = self._state
        self._calls = []
        self.was_called = False
        self.cannot = False

    def put_back(self):
        "Give the layer back what it had, should a call have been interrupted."
        if self._start is not None:
            self._restore(self._attributes, self._start)

    # one call

    def _normalise_by_batch(self, x, args, kwargs):
        n = x.shape[0]
        if self._kind is None or self._kind == 'average' and n not in self._kept:
            self._look(x, args, kwargs)
        if self._kind == 'still':
            return self._run(self._start, args, kwargs, training=False)[0]
        if self._kind == 'update':
            out, self._now = self._run(self._now, args, kwargs)
            tensors = [self._now[k].to(_wide(x)) for k in self._moved]
            self._calls.append(_Share('update', dict.fromkeys(self._moved), n, tensors))
            return out
        if self._kind == 'moments':
            n, *moments = _channel_moments(x, self._axis)
            own = _in_forms(self._forms, n, *moments, self.layer)
            self._calls.append(_Share('moments', self._forms, n, moments))
            return self._run(self._start | self._typed(own), args, kwargs)[0]
        out, after = self._run(self._start, *(_cloned(args, kwargs) if self._depends else (args, kwargs)))
        own = self._taken(after, self._kept[n])
        self._calls.append(_Share('average', dict.fromkeys(own), n, list(own.values())))
        return self._run(self._start | self._typed(own), args, kwargs)[0] if self._depends else out

    def _look(self, x, args, kwargs):
        "Find from this batch what the layer does with its statistics."
        start = self._start
        out, after = self._run(start, *_cloned(args, kwargs))
        moved = [k for k, b in start.items() if b.is_floating_point() and not torch.equal(after[k], b)]
        if not moved:
            self._kind = 'still'
            return
        shifted = {k: start[k] + torch.maximum(start[k].abs(), after[k].abs()).clamp(min=1) for k in moved}
        other_out, other_after = self._run(start | shifted, *_cloned(args, kwargs))
        kept = {k: _share_kept(shifted[k], start[k], other_after[k], after[k]) for k in moved}
        if self._kind is None:
            self._moved = moved
            self._kind = 'update' if None in kept.values() else 'average'
        elif None in kept.values():
            raise ValueError(f'its statistics are no running averages for a batch of {x.shape[0]}')
        if self._kind == 'update':
            return
        kept = {k: share for k, share in kept.items() if share < 1 - 1e-6}  # others count something
        if not kept:
            self._kind = 'still'
            return
        is_first = not self._kept
        self._kept[x.shape[0]] = kept
        self._depends |= not _are_same(out, other_out)
        if is_first and x.shape[0] > 1:  # of one sample, moments over the batch are those of an instance norm
            self._axis, self._forms = _as_moments(x, self._taken(after, kept), self.layer)
            self._kind = 'moments' if self._forms else 'average'

    def _taken(self, after, kept) -> dict:
        "Statistic -> what the layer took from the batch that left the statistics `after`."
        wide = {k: (after[k].to(_wide(after[k])), self._start[k].to(_wide(after[k]))) for k in kept}
        return {k: (new - kept[k] * old) / (1 - kept[k]) for k, (new, old) in wide.items()}

    def _typed(self, values: dict) -> dict:
        return {k: v.to(self._start[k]).view(self._start[k].shape) for k, v in values.items()}

    def _run(self, state, args, kwargs, training=True):
        """The output of the layer with the buffers `state`, and the buffers after it; the layer is
        left as it is.
        """
        attributes = dict(vars(self.layer))
        buffers = dict(self.layer._buffers)
        try:
            self.layer._buffers.update({k: b.clone() for k, b in state.items()})
            self.layer.training = training
            out = self._forward(*args, **kwargs)
            return out, {k: self.layer._buffers[k] for k in state}
        finally:
            self._restore(attributes, buffers)

    def _restore(self, attributes, buffers):
        self.layer._buffers.update(buffers)
        vars(self.layer).update(attributes)
        for name in vars(self.layer).keys() - attributes.keys():
            del vars(self.layer)[name]


def _cloned(args, kwargs):
    "Arguments for a trial: some layers work in place."

    def clone(a):
        return a.clone() if isinstance(a, torch.Tensor) else a

    return tuple(map(clone, args)), {k: clone(a) for k, a in kwargs.items()}


def _are_same(a, b) -> bool:
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)


def _share_kept(shifted, start, shifted_after, after) -> float | None:
    """The share of its old value that a running average keeps, from two old values and what became
    of them.

    `None` if it is no such average.
    """
    if not start.shape == after.shape == shifted_after.shape:
        return None
    shifted, start, shifted_after, after = (t.to(_wide(t)) for t in (shifted, start, shifted_after, after))
    shares = (shifted_after - after) / (shifted - start)
    share = shares.mean().item()
    spread = (shares - share).abs().max().item()
    if not (spread < 1e-5 and -1e-5 < share < 1 + 1e-5):  # nan, too
        return None
    return max(share, 0.0)


def _channel_moments(x, axis):
    "Number of values, mean and biased variance of each channel, in float64."
    dims = [d for d in range(x.dim()) if d != axis]
    var, mean = torch.var_mean(x.to(_wide(x)), dims, correction=0)
    return x.numel() // x.shape[axis], mean, var


def _as_moments(x, taken: dict, layer):
    """The axis of channels and the forms (`_FORMS`) in which `taken` are moments of `x`; no forms
    if they are not.
    """
    for axis in (1, x.dim() - 1):
        if not 0 < axis < x.dim():
            continue
        n, mean, var = _channel_moments(x, axis)
        forms = {}
        for k, value in taken.items():
            if value.numel() != mean.numel():
                break
            in_all_forms = _in_forms({form: form for form in _FORMS}, n, mean, var, layer)
            errors = {form: _error(value.flatten(), expected, var) for form, expected in in_all_forms.items()}
            forms[k] = min(errors, key=errors.get)
            if not errors[forms[k]] < 1e-4:
                break
        else:
            return axis, forms
    return None, {}


def _error(value, expected, var) -> float:
    return ((value - expected).abs() / (expected.abs() + var.sqrt()).clamp(min=1e-30)).max().item()


def split_inputs(batch):
    "The arguments of the model in `batch`: a tuple, or a dict for keywords."
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, tuple | list):
        return tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
    return (batch,)


def _to(o, device):
    if hasattr(o, 'to'):
        return o.to(device)  # tensors, packed sequences, batches of other libraries
    if isinstance(o, Mapping):
        return {k: _to(v, device) for k, v in o.items()}
    if isinstance(o, tuple | list):
        values = [_to(v, device) for v in o]
        return type(o)(*values) if hasattr(o, '_fields') else type(o)(values)
    return o
