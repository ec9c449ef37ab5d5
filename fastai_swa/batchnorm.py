"""Batch-norm statistics for weights that were never trained with. Plain PyTorch."""
import itertools, sys, warnings
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from numbers import Integral
from types import MethodType

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .modules import unwrap

__all__ = ['update_bn', 'batch_moments', 'tracked_bn']


def update_bn(loader, model: nn.Module, device=None, n_batches: int | None = None, inputs=None):
    """Recompute the batch-norm statistics of `model` from the batches of `loader`, exactly.

    Each layer gets the mean and the unbiased variance of all values that reach it, pooled over the samples of the pass, while every
    batch-norm layer normalises by its batch and dropout is off (Izmailov et al. 2018, section 3.2). Frozen layers (`tracked_bn`) are
    left alone; a model without others needs no pass and `loader` is not touched. Modes and momenta come back as they were and, on
    any error, so do the statistics.

    - `loader`: batches of any sizes: a tensor is the input; of a tuple or list all but the last element are inputs (a single element
      is the input); a mapping is passed as keyword arguments.
    - `device`: where to move each batch; `None` leaves it where it is.
    - `n_batches`: stop after so many; `None` takes all.
    - `inputs`: function from a batch to a tuple of arguments or a dict of keyword arguments, for any other kind of batch.

    A batch that a layer cannot normalise (a single value per channel) is skipped, with one warning for all of them; statistics that
    are not finite are another.
    Raises `ValueError` if no batch is left, and `TypeError` or `ValueError` for an `n_batches` that is not a positive int.
    """
    if not isinstance(model, nn.Module): raise TypeError(f'model must be an nn.Module, not {type(model).__name__} (the loader comes first)')
    n_batches = check_count('n_batches', n_batches)
    layers = tracked_bn(unwrap(model))
    if not layers: return
    with batch_moments(unwrap(model), layers) as moments:
        for batch in itertools.islice(loader, n_batches):
            args = split_inputs(batch) if inputs is None else inputs(batch)
            if device is not None: args = _to(args, device)
            unwrap(model)(**args) if isinstance(args, Mapping) else unwrap(model)(*args)
            moments.end_batch()
    for sentence in moments.remarks.values(): warnings.warn(sentence)


def tracked_bn(model: nn.Module) -> dict[str, _BatchNorm]:
    """Name -> layer for the batch-norm layers of `model` whose statistics follow the weights: those that keep any and are not frozen.

    Frozen is a layer in eval mode while its model trains, or one whose `weight` has `requires_grad=False`; where the whole model is
    in eval mode only the second counts.
    """
    training = any(m.training for m in model.modules())
    def frozen(m): return (training and not m.training) or (m.weight is not None and not m.weight.requires_grad)
    return {name: m for name, m in model.named_modules()
            if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None and not frozen(m)}


@contextmanager
def batch_moments(model: nn.Module, layers: dict[str, _BatchNorm], gather=None):
    """Within this context run batches through `model`, each followed by `end_batch()` of the `Moments` given; at its end the
    statistics of `layers` become the moments of what reached them.

    Inside, `layers` normalise by their batch and everything else is in eval mode, without gradients, and without compiled code,
    which would not see the hooks. The layers write to scratch tensors meanwhile: their own statistics stay as they are until the
    end, and for good if the block raises. A layer that is not called as a module keeps its statistics, and normalises by them.

    - `gather`: where several processes each run a share of the batches, the function that gives an object of each, as a list; the
      statistics become the moments over all shares. Each process normalises by its own batches, `SyncBatchNorm` layers as well.
    """
    moments = Moments(layers)
    modes = [(m, m.training) for m in model.modules()]
    kept = [(m, m.momentum, {k: m._buffers[k] for k in _STATISTICS if k in m._buffers}) for m in layers.values()]
    handles = []
    try:
        for m, _ in modes: m.training = False
        for m, *_ in kept:
            # momentum 1 leaves the moments of one batch in the running ones, so they cost nothing beside the forward pass
            m.momentum = 1.
            handles.append(m.register_forward_pre_hook(moments.before_layer, with_kwargs=True))
            if isinstance(m, nn.SyncBatchNorm): m.forward = MethodType(_BatchNorm.forward, m)    # waits for no other process
        with torch.no_grad(), _eager(): yield moments
    finally:
        for handle in handles: handle.remove()
        for m, momentum, statistics in kept:
            m.momentum = momentum
            m._buffers.update(statistics)
            if isinstance(m, nn.SyncBatchNorm): vars(m).pop('forward', None)
        for m, mode in modes: m.training = mode
    moments.write(gather)


def _eager():
    "No compiled code within this context. Where there can be none yet, the compiler is not imported for it, which takes a second."
    return torch.compiler.set_stance('force_eager') if 'torch._dynamo' in sys.modules else nullcontext()


_STATISTICS = 'running_mean', 'running_var', 'num_batches_tracked'


class Moments:
    "The moments of what reached some batch-norm layers, pooled batch by batch."
    def __init__(self, layers: dict[str, _BatchNorm]):
        self.names = {m: name for name, m in layers.items()}
        self.pools, self.n_batches, self.n_skipped, self._too_small, self._scratched = {}, 0, 0, None, set()
        self.remarks = {}    # kind -> sentence to warn with, once all is written
        self._reset()

    def _reset(self): self._called, self._calls, self._cannot = {}, [], False

    def before_layer(self, layer, args, kwargs):
        "Forward pre-hook: choose the mode of `layer`, note how many values a channel it is about to see."
        if layer not in self._scratched: self._give_scratch(layer)
        n = (args[0] if args else kwargs['input']).numel() // layer.num_features
        layer.training = n > 1
        if n < 2: self._cannot, self._too_small = True, self.names[layer]    # the forward pass runs on, its moments are dropped
        else:
            if layer in self._called: self._keep_call(layer)                 # a layer used twice: its second call overwrites the first
            self._called[layer] = n

    def _give_scratch(self, layer):
        self._scratched.add(layer)
        layer._buffers.update({k: torch.zeros_like(layer._buffers[k]) for k in _STATISTICS if layer._buffers.get(k) is not None})
        layer.running_var.fill_(1)

    def _keep_call(self, layer): self._calls.append((layer, self._called[layer], layer.running_mean.clone(), layer.running_var.clone()))

    def end_batch(self):
        "Pool the moments of the batch that went through the model; a batch that some layer could not normalise is left out."
        if self._cannot:
            self.n_skipped += 1
            for m in self._called: m.reset_running_stats()    # 0 * inf is nan: no trace of this batch may stay in the scratch
        elif self._called:
            for layer, n, mean, var in self._calls: self._pool([layer], [n], [mean], [var])
            by_device = {}
            for m in self._called: by_device.setdefault(m.running_mean.device, []).append(m)
            for layers in by_device.values():
                self._pool(layers, [self._called[m] for m in layers], [m.running_mean for m in layers], [m.running_var for m in layers])
            self.n_batches += 1
        self._reset()

    def _pool(self, layers, ns, means, variances):
        self.pools.setdefault(tuple(layers), _Pool(layers)).add(ns, means, variances)

    @property
    def skipped(self) -> str:
        "One sentence about the batches left out."
        return (f'{self.n_skipped} of {self.n_skipped + self.n_batches} batches were left out of the batch-norm statistics: '
                f'layer {self._too_small!r} got a single value per channel, which it cannot normalise')

    def write(self, gather):
        "Put the moments in the layers; a layer that nothing reached keeps its own. Raises `ValueError` if there was no batch."
        pooled = self._over_processes(gather)
        if not self.n_batches:
            raise ValueError('the batch-norm statistics cannot be recomputed: ' + (self.skipped + '; use larger batches' if self.n_skipped
                             else 'the loader gave no batch, or no batch reached a batch-norm layer'))
        if self.n_skipped: self.remarks['skipped'] = self.skipped
        if not all(t.isfinite().all() for _, *moments in pooled.values() for t in moments):
            self.remarks['infinite'] = ('the batch-norm statistics are not finite: a batch, or what the model makes of it, holds a NaN '
                                        'or an infinity')
        with torch.no_grad():
            for m, (n, mean, var) in pooled.items():
                m.running_mean.copy_(mean)
                m.running_var.copy_(var * (n / (n - 1)))
                if m.num_batches_tracked is not None: m.num_batches_tracked.fill_(self.n_batches)


    def _over_processes(self, gather) -> dict:
        "Layer -> count, mean and biased variance of what reached it in all processes; the numbers of batches are added up."
        pooled = {}
        def pool(m, n, mean, var): pooled[m] = _merge(*pooled[m], n, mean, var) if m in pooled else (n, mean, var)
        for own in self.pools.values():
            for moments in own.split(): pool(*moments)
        if gather is None: return pooled
        mine = [(i, n, mean.cpu(), var.cpu()) for i, m in enumerate(self.names) if m in pooled for n, mean, var in [pooled[m]]]
        n_batches, n_skipped, too_small, everyones = zip(*gather((self.n_batches, self.n_skipped, self._too_small, mine)))
        self.n_batches, self.n_skipped, self._too_small = sum(n_batches), sum(n_skipped), next(filter(None, too_small), None)
        layers, pooled = list(self.names), {}
        for i, *moments in itertools.chain(*everyones): pool(layers[i], *moments)
        return pooled


def _merge(n, mean, var, n_new, mean_new, var_new):
    """Count, mean and biased variance of two samples taken together, from theirs (Chan, Golub and LeVeque 1983).

    In place in `mean` and `var`. Counts are numbers, or tensors of one count a channel.
    """
    total = n + n_new
    share, delta = n_new / total, mean_new - mean
    mean += share * delta
    var += share * (var_new - var) + share * (1 - share) * delta.square_()
    return total, mean, var


class _Pool:
    "The moments of layers that see batches together, end to end in one tensor: a few operations a batch, however many layers."
    def __init__(self, layers): self.layers, self.counts, self.moments, self.bias = layers, None, None, (None, None)

    def add(self, ns, means, variances):
        "Pool one batch: `ns` values a channel, their means and unbiased variances, for each layer."
        dtype = torch.float32 if means[0].device.type == 'mps' else torch.float64    # one rounding a batch adds up in float32
        mean, var = torch.cat(means).to(dtype), torch.cat(variances).to(dtype)
        if self.bias[0] != ns: self.bias = ns, self._per_channel([(n - 1) / n for n in ns], mean)    # but for the last batch, the same
        var *= self.bias[1]
        if self.counts is None: self.counts, self.moments = list(ns), (mean, var)
        else:
            share = self._per_channel([n / (n + N) for n, N in zip(ns, self.counts)], mean)
            _merge(1 - share, *self.moments, share, mean, var)
            self.counts = [n + N for n, N in zip(ns, self.counts)]

    def _per_channel(self, values, like):
        "`values`, one a layer, as a number if they agree (as shares do, for images of one size), else as a tensor."
        if len(set(values)) == 1: return values[0]
        return torch.cat([like.new_full((m.num_features,), v) for v, m in zip(values, self.layers)])

    def split(self):
        "(layer, count, mean, biased variance) for each layer."
        sizes = [m.num_features for m in self.layers]
        return zip(self.layers, self.counts, *(t.split(sizes) for t in self.moments))


def check_count(name: str, value, least: int = 1, optional: bool = True) -> int | None:
    "`value` as an int; raises `TypeError` or `ValueError`, naming the parameter, unless it is one of at least `least`, or `None`."
    if value is None and optional: return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f'{name} must be an int{" or None" if optional else ""}, not {value!r}')
    if value < least: raise ValueError(f'{name} must be at least {least}, not {value}')
    return int(value)


def split_inputs(batch):
    "The arguments of the model in `batch`: a tuple, or a dict for keywords."
    if isinstance(batch, Mapping): return batch
    if isinstance(batch, tuple | list): return tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
    return (batch,)


def _to(o, device):
    if hasattr(o, 'to'): return o.to(device)    # tensors, packed sequences, batches of other libraries
    if isinstance(o, Mapping): return {k: _to(v, device) for k, v in o.items()}
    if isinstance(o, tuple | list):
        values = [_to(v, device) for v in o]
        return type(o)(*values) if hasattr(o, '_fields') else type(o)(values)
    return o
