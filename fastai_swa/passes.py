"""Passes through a learner's own loop, aside from its training: to validate other weights, to
refresh batch norm.

Nothing that a pass changes may be seen by training. What is put back, and why, is one context
manager for each, below.
"""

import copy
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.hook import HookCallback
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, ShortEpochCallback, bn_types
from fastai.learner import AvgLoss, Recorder
from fastai.torch_core import num_distrib, to_detach
from fastcore.foundation import L
from torch.nn.parallel import DistributedDataParallel

from .batches import FirstBatches, KeptBatches, fresh_loader, share, training_loader
from .batchnorm import Moments, batch_moments, tracked_bn
from .columns import plain_values
from .fitting import is_fitting, no_fit  # noqa: F401
from .interrupts import uninterrupted, unwound_whole
from .keeping import holders_kept, unrepeatable
from .modules import has_own_modes, in_train_mode, modes_of, set_modes, unwrap
from .processes import PassFailed, Processes, Together
from .randomness import randomness_kept, seed_all
from .walk import found_in, is_own, owned_modules

__all__ = [
    'PassCancelled',
    'PassFailed',
    'copied_measures',
    'validate_aside',
    'refresh_bn',
    'refreshable',
    'kept_batches',
    'same_output',
    'untouched',
    'autocast_left',
    'buffers_kept',
    'concerns_training',
    'no_fit',
    'is_fitting',
    'check_engine',
]


class PassCancelled(Exception):
    "A callback cancelled a pass; it must not cancel the fit that the pass stands aside from."


# the passes


def validate_aside(learn, dl=None, in_fit: bool = True) -> list:
    """Loss and metrics of `learn.model` on the validation set, or on `dl`, as floats (`nan` where
    there is no value).

    The model's buffers are afterwards what they were, also where a callback validates in train
    mode.

    - `in_fit`: as in `refresh_bn`.

    Raises `PassCancelled` if a callback cancels it, `ValueError` if the validation set can be gone
    through only once, and `PassFailed` if it failed in another process.
    """
    if dl is None:
        _check_repeatable(learn, 1)
    with _aside(learn, buffers_kept(learn.model)), _events_around(learn, in_fit), _together(learn) as processes:
        if dl is None:
            dl = fresh_loader(learn.dls[1], processes=processes)
        collector = _Collector(learn.metrics, processes)
        model = _without_collectives(learn.model, processes)
        with _replaced(learn, 'model', model), learn.added_cbs(collector):
            _run(learn, dl)
        return plain_values(collector.measured)


def refresh_bn(learn, names, n_batches: int | None, in_fit: bool, dl=None) -> Moments:
    """Refresh the batch-norm layers `names` of `learn.model` on the training set, or `n_batches` of
    it, each sample once; or on `dl`. Other buffers are afterwards what they were.

    Outside a fit the events around a validation are sent as well: they set mixed precision and the
    like up and tear them down. Of several processes each takes a share of the samples, or
    `n_batches` of its own. Raises `PassCancelled` if a callback cancels the pass, `ValueError` if
    the training set can be gone through only once, and `PassFailed` if it failed in another
    process; like any error that leaves the statistics as they were.
    """
    if dl is None:
        _check_repeatable(learn, 0)
    model = unwrap(learn.model)
    layers = {name: m for name, m in model.named_modules() if name in set(names)}
    refreshed = [t for m in layers.values() for t in m._buffers.values()]
    with (
        _aside(learn, buffers_kept(model, but=refreshed)),
        _events_around(learn, in_fit),
        _together(learn) as processes,
    ):
        model = unwrap(learn.model)  # data-parallel replicas would each keep statistics of their own
        if dl is None and processes.size > 1:
            dl = share(learn.dls.train, processes, n_batches)
        elif dl is None:
            dl = training_loader(learn, n_batches)
        with (
            batch_moments(model, layers, processes.gather if processes.size > 1 else None) as moments,
            _replaced(learn, 'model', model),
            _gan_put_back(learn),
            learn.added_cbs(_EndBatch(moments)),
        ):
            _run(learn, dl)
    return moments


def same_output(learn, other) -> bool:
    """Does `other`, a copy of `learn.model`, make the same of a validation batch as that does now,
    both in eval mode? Nothing of the learner is changed. `True` also where that cannot be told: the
    model cannot be called like that, or differs by itself from one time to the next."""
    own = unwrap(learn.model)
    try:
        with in_train_mode(own), _aside(learn), torch.no_grad():
            learn._split(learn._set_device(KeptBatches(lambda: FirstBatches(fresh_loader(learn.dls[1]), 1)).batches[0]))
            outputs = []
            for model in (own, other, own):
                with randomness_kept(learn), holders_kept(learn), buffers_kept(own):
                    outputs.append(model.eval()(*learn.xb))
    except Exception:
        return True
    return _are_close(outputs[0], outputs[1]) or not _are_close(outputs[0], outputs[2])


def _are_close(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_are_close, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_are_close(v, b[k]) for k, v in a.items())
    return True  # nothing that could be compared


def kept_batches(learn, n_batches: int | None = None, train: bool = True) -> KeptBatches:
    """Of the training set, each sample once, or `n_batches` of it; or of the validation set: for
    several passes over the same.
    """
    _check_repeatable(learn, 0 if train else 1)
    make = partial(training_loader, learn, n_batches) if train else partial(fresh_loader, learn.dls[1])
    with _aside(learn):
        return KeptBatches(make)


def _check_repeatable(learn, i):
    "Raise `ValueError` if a pass through the `i`-th loader would use up what training needs."
    used_up = unrepeatable(learn, i)
    if used_up:
        raise ValueError(
            f'{used_up[0]} can be gone through only once, and a pass aside from training would take from it what '
            'training needs: make it anew in `__iter__`, or hold it in an attribute of its own'
        )


def _events_around(learn, in_fit):
    return nullcontext() if in_fit or is_fitting(learn, '_do_fit') else learn.validation_context()


def _run(learn, dl):
    try:
        learn._do_epoch_validate(dl=dl)
    except (CancelFitException, CancelEpochException, CancelTrainException):
        raise PassCancelled('a callback cancelled it') from None


@contextmanager
def _together(learn):
    """The processes that make a pass together. An error in one of them ends the pass in all: each
    waits for the others at its end.
    """
    together = Together(Processes(learn))
    try:
        yield together
    except Exception as e:
        together.fail(e)
        raise
    together.check()


def _without_collectives(model, processes):
    """Within DistributedDataParallel each forward pass waits for the other processes, which may
    have failed; so the buffers are exchanged once.
    """
    if processes.size == 1:
        return model
    model = unwrap(model)
    processes.broadcast(model.buffers())
    return model


class _Collector(Callback):
    """Loss and metrics of a validation.

    Several processes first exchange their predictions, without the samples that fill up the last
    batches, so that each measures the whole set: what fastai's metrics do there, averaging the
    processes' values, counts these samples twice.
    """

    order = Recorder.order

    def __init__(self, metrics, processes):
        self.measured, self.processes = copied_measures(metrics), processes

    def after_batch(self):
        if not len(self.yb):
            return
        with self._whole_batch() if self.processes.size > 1 else nullcontext():
            for m in self.measured:
                m.accumulate(self.learn)

    @contextmanager
    def _whole_batch(self):
        learn = self.learn
        own = {k: vars(learn)[k] for k in ('pred', 'yb', 'loss')}
        self.processes.check()
        pred, yb = learn.to_detach((learn.pred, learn.yb), cpu=False)
        loss = learn.loss_func(pred, *yb)
        vars(learn).update(pred=pred, yb=yb, loss=loss, to_detach=partial(to_detach, gather=False))
        try:
            yield
        finally:
            vars(learn).update(own)
            del vars(learn)['to_detach']

    def after_cancel_validate(self):
        raise PassCancelled('a callback cancelled it')


def copied_measures(metrics) -> list:
    """Loss and `metrics` as objects of one's own, reset: the Recorder's keep the values of the
    model in training.
    """
    res = [AvgLoss(), *map(_copy_metric, metrics)]
    for m in res:
        m.reset()
    return res


def _copy_metric(metric):
    try:
        return copy.deepcopy(metric)
    except Exception:
        return copy.copy(metric)  # what `reset` sets anew is its own even so


class _EndBatch(Callback):
    "Tells `moments` where batches end."

    def __init__(self, moments):
        self.moments = moments

    def before_validate(self):
        """Of a GAN, fastai validates the generator. While the critic is on, a batch reaches both:
        the critic sees real and generated images, as in training."""
        trainer = getattr(self.learn, 'gan_trainer', None)
        if trainer is not None:
            trainer.switch(gen_mode=False)

    def after_batch(self):
        self.moments.end_batch()

    def after_cancel_validate(self):
        raise PassCancelled('a callback cancelled it')


@contextmanager
def _gan_put_back(learn):
    "At the end of this context the half of a GAN is on that was on before."
    trainer = getattr(learn, 'gan_trainer', None)
    mode = None if trainer is None else vars(trainer).get('gen_mode')
    try:
        yield
    finally:
        if mode is not None:
            trainer.switch(gen_mode=mode)


@contextmanager
def _replaced(o, name, value):
    old = getattr(o, name)
    try:
        yield setattr(o, name, value)
    finally:
        setattr(o, name, old)


# what is put back


@contextmanager
def _whole(*contexts):
    """Within this context the `contexts` are entered, in this order. They are entered and left
    whole, whenever an interruption comes; if one fails while it is left, the others are left all
    the same."""
    with unwound_whole():
        stack = ExitStack()
        try:
            try:
                with uninterrupted():
                    for context in contexts:
                        stack.enter_context(context)
                yield
            finally:
                with uninterrupted():
                    stack.close()
        finally:
            with uninterrupted():
                stack.close()  # for an interruption that arrived just before the line above


def _aside(learn, *more):
    """Within this context the learner's loop runs without what concerns training; all that it
    changes is put back, however it ends. `more`: contexts.
    """
    found = found_in(learn)
    return _whole(
        callbacks_kept(learn),
        loop_state_kept(learn),
        progress_bars_kept(learn),
        randomness_kept(learn, found),
        holders_kept(learn, found),
        losses_kept(learn),
        forms_kept(learn.model),
        muted(learn),
        *more,
    )


@contextmanager
def untouched(learn, seed: int):
    """Within this context passes can be made with other weights and without a progress bar for
    each, and all random generators begin with `seed`; at its end, however that comes, learner and
    callbacks hold what they held, and the generators stand where they stood."""
    with _whole(attributes_kept(learn, *filter(is_own, learn.cbs)), autocast_left(), _aside(learn)):
        seed_all(learn, seed)
        learn.cbs = L(cb for cb in learn.cbs if not isinstance(cb, ProgressCallback) and not concerns_training(cb))
        yield


_OF_TRAINING = (TerminateOnNaNCallback, ShortEpochCallback, ParamScheduler, HookCallback, CSVLogger, ShowGraphCallback)


def concerns_training(cb) -> bool:
    """Does `cb` record, watch, steer or end training, so that a pass aside from it must not reach
    it?
    """
    return (
        getattr(cb, 'remove_on_fetch', False)
        or isinstance(cb, _OF_TRAINING)
        # lacks the flag; may not be installed
        or any(c.__name__ == 'TensorBoardBaseCallback' for c in type(cb).__mro__)
    )


@contextmanager
def muted(learn):
    """Callbacks that concern training get no event: the Recorder would add a row, a scheduler would
    move the rate.
    """
    runs = [(vars(cb), vars(cb).get('run', _UNSET)) for cb in learn.cbs if concerns_training(cb)]
    try:
        for attrs, _ in runs:
            attrs['run'] = False
        yield
    finally:
        for attrs, run in runs:
            if run is _UNSET:
                attrs.pop('run', None)
            else:
                attrs['run'] = run


_UNSET = object()


@contextmanager
def callbacks_kept(learn):
    """The learner has its own callbacks, and its own model: a pass adds callbacks that collect, and
    an interruption may keep fastai from removing them.
    """
    cbs, items, model = learn.cbs, list(learn.cbs), learn.model
    own = {name: cb for name, cb in vars(learn).items() if isinstance(cb, Callback)}
    try:
        yield
    finally:
        learn.cbs, learn.model = cbs, model
        cbs[:] = items
        added = [k for k, v in vars(learn).items() if isinstance(v, Callback) and k not in own]
        for name in added:
            del vars(learn)[name]
        vars(learn).update(own)


@contextmanager
def loop_state_kept(learn):
    """The loop's place (batch, loss, epoch ...), and whether gradients are on, is training's again:
    a pass within an epoch writes over it.
    """
    loop = {name: vars(learn)[name] for name in LOOP if name in vars(learn)}
    with_grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(with_grad)
        vars(learn).update(loop)


LOOP = 'dl xb yb pred loss loss_grad iter n_iter training epoch n_epoch train_iter pct_train'.split()


@contextmanager
def progress_bars_kept(learn):
    """The bar of the epoch stays the callback's: a validation puts one of its own in its place, and
    closes it.
    """
    bars = [(vars(cb), vars(cb)['pbar']) for cb in learn.cbs if 'pbar' in vars(cb)]
    try:
        yield
    finally:
        for attrs, bar in bars:
            attrs['pbar'] = bar


@contextmanager
def attributes_kept(*objects):
    "The attributes of `objects` are bound to what they were bound to."
    kept = [(vars(o), dict(vars(o))) for o in objects]
    try:
        yield
    finally:
        for attrs, old in kept:
            attrs.clear()
            attrs.update(old)


@contextmanager
def losses_kept(learn):
    """The buffers and gradients of losses that are modules, however large: a validation counts in
    them, and their parameters are in no optimizer of a pass.
    """
    model = set(unwrap(learn.model).modules())
    # GANLoss holds the model
    losses = [m for root in owned_modules(learn.loss_func) for m in root.modules() if m not in model]
    params = [p for m in losses for p in m._parameters.values() if p is not None]
    grads = [(p, None if p.grad is None else p.grad.clone()) for p in params]
    with ExitStack() as stack:
        for m in losses:
            stack.enter_context(buffers_kept(m, recurse=False))
        try:
            yield
        finally:
            for p, grad in grads:
                p.grad = grad


@contextmanager
def forms_kept(model):
    """Where `train()` and `eval()` move weights, these are bitwise what they were, in the modes
    that they were in: a validation merges them, and a module that is told otherwise by its
    attributes alone would merge them once more."""
    model = unwrap(model)
    inner = dict.fromkeys(m for outer in filter(has_own_modes, model.modules()) for m in outer.modules())
    modes = modes_of(model)
    names = [(m._parameters, dict(m._parameters)) for m in inner]
    bits = [(p, p.data, p.detach().clone()) for m in inner for p in m._parameters.values() if p is not None]
    try:
        yield
    finally:
        with uninterrupted(), torch.no_grad():
            if inner:
                set_modes(model, modes)
            for now, old in names:
                now.update(old)
            for p, data, old in bits:
                p.data = data
                data.copy_(old)


@contextmanager
def buffers_kept(module, but=(), recurse=True):
    """The buffers of `module`, all but the tensors `but`, are bitwise what they were, under the
    names that they had: batch norm in train mode and observers of quantization move theirs in a
    validation, too."""
    skipped = {id(t) for t in but}
    modules = unwrap(module).modules() if recurse else [module]
    names = [(m._buffers, dict(m._buffers)) for m in modules]
    tensors = {id(t): t for _, old in names for t in old.values() if t is not None and id(t) not in skipped}
    # the second keeps storage and shape, should the tensor get others
    kept = [(t, t.data, t.detach().clone()) for t in tensors.values()]
    try:
        yield
    finally:
        for now, old in names:
            if now.keys() != old.keys() or any(now[k] is not t for k, t in old.items()):
                now.clear()
                now.update(old)
        with torch.no_grad():
            for t, data, old in kept:
                if t.data_ptr() != data.data_ptr() or t.shape != data.shape or t.dtype != data.dtype:
                    t.data = data
                if t.device.type != 'cpu' or not torch.equal(t, old):
                    t.copy_(old)


@contextmanager
def autocast_left():
    """fastai's MixedPrecision stays within autocast when a forward pass raises, and what is trained
    after that gets stale weights from its cache.
    """
    depth = _autocast_depth()
    kept = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ('cuda', 'cpu')]
    try:
        yield
    finally:
        for _ in range(_autocast_depth() - depth):
            torch.autocast_decrement_nesting()
        for kind, enabled, dtype in kept:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.clear_autocast_cache()


def _autocast_depth():
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def check_engine(learn):
    """Raise `NotImplementedError` if the model is trained in a way in which it cannot be averaged
    and validated as a whole.
    """
    processes, model = Processes(learn), unwrap(learn.model)
    kinds = {type(o).__name__ for o in (*learn.model.modules(), *model.parameters())}
    sharded = sorted(kinds & {'FullyShardedDataParallel', 'FSDPModule', 'DTensor', 'DeepSpeedEngine'})
    if sharded:
        raise NotImplementedError(
            f'SWACallback cannot average weights that are spread over processes ({sharded[0]}); use plain DDP'
        )
    if processes.size == 1 and num_distrib() > 1:
        raise NotImplementedError(
            f'this is one of {num_distrib()} processes (WORLD_SIZE), and the learner trains alone in it: call the fit '
            'within `with learn.distrib_ctx():`'
        )
    if processes.size > 1 and not isinstance(learn.model, DistributedDataParallel):
        raise NotImplementedError(
            f'SWACallback knows several processes with DistributedDataParallel only, not {type(learn.model).__name__}'
        )


def refreshable(learn) -> list[str]:
    """Names of the batch-norm layers of `learn.model` whose statistics follow the weights, where no
    training tells.

    They are `tracked_bn`'s, but for those that a `BnFreeze` of the learner keeps from moving.
    """
    layers = tracked_bn(unwrap(learn.model))
    if any(isinstance(cb, BnFreeze) for cb in learn.cbs):
        layers = {name: m for name, m in layers.items() if not _is_frozen_by_callback(m)}
    return list(layers)


def _is_frozen_by_callback(layer) -> bool:
    "As fastai's `set_bn_eval` decides; a layer without parameters, at which that fails, is none."
    first = next(layer.parameters(), None)
    return isinstance(layer, bn_types) and first is not None and not first.requires_grad
