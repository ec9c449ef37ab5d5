"""What stands around a pass aside from training: nothing that the pass changes may be seen by
training. Each thing that is put back is one context manager, which says why.
"""

from contextlib import ExitStack, contextmanager

import torch
from fastai.callback.core import Callback
from fastai.callback.hook import HookCallback
from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.callback.training import ShortEpochCallback
from fastcore.foundation import L

from .contents import set_items
from .interrupts import uninterrupted, unwound_whole
from .keeping import holder_kept, holders_kept, put_tensor
from .modules import has_own_modes, modes_of, set_modes, unwrap
from .randomness import generators_kept, randomness_kept, seed_all
from .walk import found_in, is_own, owned_modules, walk

__all__ = [
    'aside',
    'whole',
    'untouched',
    'objects_kept',
    'concerns_training',
    'buffers_kept',
    'autocast_left',
    'LOOP',
]


def aside(learn, *more):
    """Within this context the learner's loop runs without what concerns training; all that it
    changes is put back, however it ends. `more`: contexts.
    """
    found = found_in(learn)
    return whole(
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
    with whole(attributes_kept(learn, *filter(is_own, learn.cbs)), autocast_left(), aside(learn)):
        seed_all(learn, seed)
        learn.cbs = L(cb for cb in learn.cbs if not isinstance(cb, ProgressCallback) and not concerns_training(cb))
        yield


@contextmanager
def objects_kept(*objects):
    """What the `objects`, loaders or data sets, and the objects in them count, and all random
    generators, stand at the end of this context where they stood."""
    inner = [o for _, o in walk(enumerate(objects))]
    with generators_kept(inner), ExitStack() as stack:
        for o in objects:
            stack.enter_context(holder_kept(o))
        yield


@contextmanager
def whole(*contexts):
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


# the loop: its callbacks and its place


@contextmanager
def callbacks_kept(learn):
    """The learner has its own callbacks, and its own model: a pass adds callbacks that collect, and
    an interruption may keep fastai from removing them.
    """
    cbs = learn.cbs
    items = list(cbs)
    model = learn.model
    own = {name: cb for name, cb in vars(learn).items() if isinstance(cb, Callback)}
    try:
        yield
    finally:
        learn.cbs = cbs
        learn.model = model
        set_items(cbs, items)
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


_OF_TRAINING = (TerminateOnNaNCallback, ShortEpochCallback, ParamScheduler, HookCallback, CSVLogger, ShowGraphCallback)


# tensors


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
        for t, data, old in kept:
            put_tensor(t, data, old)


# attributes and autocast


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
