"""What callbacks, loaders, samplers, data sets, transforms, losses and modules keep in their
attributes, as plain data; and that put back into the objects that have the same places."""

import inspect
import weakref
from collections import defaultdict
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from types import FunctionType, MethodType

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Recorder
from fastcore.foundation import L

from .contents import CONTAINERS, MAX_BYTES, MAX_LEAVES, attributes, is_record, nested, set_attribute
from .histories import Histories
from .modules import unwrap
from .packing import Packer, Unpacker, class_name, equal, pack, path_below, unpack, way_below
from .replay import is_used_up
from .walk import LEARNED, OF_PASS, below, can_hold, keeps_state, name_once, readable, walk

__all__ = ['plain_attributes', 'without_unchanged', 'put_attributes']


def plain_attributes(learn, histories: Histories | None = None) -> dict:
    """Name -> attribute -> packed value of what is plain data in callbacks without a `state_dict`,
    under the names of `named_callbacks`, and in loaders, samplers, data sets, transforms, losses,
    modules and the objects of callbacks, under their paths.

    What cannot be packed is left out, or leaves a hole in the container that it is in.

    - `histories`: gets the lists of callbacks that only grow, where its tags stand then.
    """
    folder = getattr(learn, 'path', None)
    params = [p for group in learn.opt.param_lists for p in group]
    grads = [p.grad for p in params if p.grad is not None]
    own = {t.data_ptr() for t in (*_tensors(learn), *params, *grads)} - {0}
    found = list(_holders(learn))
    held = {id(o) for _, o in found}
    res = {}
    holes = []
    for path, o in found:
        attrs = _packed_attributes(path, o, own, holes, histories, folder)
        if attrs or isinstance(o, Callback):
            res[path] = attrs
    _name_unkept(learn, [(path, owner, v) for path, owner, v in holes if id(v) not in held])
    return res


def _packed_attributes(path, o, own, holes, histories, folder) -> dict:
    """Attribute -> packed value for the object `o`; (path, owner, value) of what cannot be packed
    is added to `holes`.
    """
    res = {}
    missed = []
    packer = Packer(refused=own, keep_devices=True, holes=missed, folder=folder)
    n_leaves = MAX_LEAVES
    n_bytes = MAX_BYTES
    for k, v in attributes(o):
        k = str(k)
        if k in _OF_LOADERS or isinstance(o, Callback) and k in _OF_CALLBACKS:
            continue
        if isinstance(v, Path):
            way = way_below(folder, v)
            if way is not None:
                res[k] = _BELOW, way
            continue
        if is_setting(o, k, v):
            holes.append((f'{path}.{k}', o, v))
            continue
        if _has_a_path(v):
            holes.append((f'{path}.{k}', o, v))
            continue
        if not isinstance(o, Callback) and isinstance(v, _SIZED):
            size = nested(v, n_leaves, n_bytes)
            if size is None:
                continue
            n_leaves -= size.n_leaves
            n_bytes -= size.n_bytes
        packer.lenient = isinstance(o, Recorder) and k in ('values', 'log')  # a metric may give anything
        packed = None if histories is None else _history(histories, o, k, v, path, packer)
        if packed is None:
            packed = packer(v, f'{path}.{k}')
        if not _is_hole(packed):
            res[k] = packed
    if isinstance(o, Recorder):
        smooth = vars(o.smooth_loss)  # empty before its first reset, before fastai 2.8.8
        res[_SMOOTH] = pack((smooth.get('count', 0), smooth.get('val', torch.tensor(0.0))))
    holes.extend((where, o, v) for where, v in missed)
    return res


# settings: a file never changes what a user has passed, nor where files are


def is_setting(o, name: str, value) -> bool:
    """Is attribute `name` of `o` a setting, which the call makes again, rather than state?

    It is if the constructor has an argument of that name, and `o` is a callback of a library's class (those change
    other attributes alone), or the `value` a string, such as a file's name.
    """
    if isinstance(o, Callback) and name in _arguments(type(o), True):
        return True
    return isinstance(value, str) and name in _arguments(type(o), False)


@lru_cache(5000)
def _arguments(cls, of_libraries: bool) -> set:
    "The names of the arguments of the constructors of a class and its bases, of all or of those in libraries alone."
    res = set()
    for base in cls.__mro__:
        is_meant = not of_libraries or base.__module__.split('.')[0] in _LIBRARIES
        init = vars(base).get('__init__')
        if is_meant and init is not None:
            with suppress(TypeError, ValueError):
                res |= {p.name for p in inspect.signature(init).parameters.values() if p.kind not in _VARIADIC}
    return res


_VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD

_BELOW = 'below'  # the tag of a path, with its way from the learner's own
_PLACES = 'path', 'model_dir'  # of the learner, which callbacks have as attributes of their own

_GROWING = {Recorder: ('lrs', 'iters', 'losses', 'values', 'hps'), ParamScheduler: ('hps',)}


def _history(histories, o, k, v, path, packer):
    "What `histories` give for attribute `k` of the callback `o`; `None` if its value `v` is no list that only grows."
    name = f'{path}.{k}'
    if any(isinstance(o, cls) and k in names for cls, names in _GROWING.items()):
        if type(v) is list:
            return histories.cut(name, v, packer)
        if _is_of_lists(v):
            return {key: histories.cut(f'{name}[{key!r}]', values, packer) for key, values in v.items()}
    if not isinstance(o, Callback):
        return None
    if type(v) is list:
        return histories.cut_if_grown(name, v, packer)
    return _history_of_dict(histories, v, name, packer) if _is_of_lists(v) else None


def _is_of_lists(v) -> bool:
    "Is it a dict of lists under names, as of losses and rates?"
    return type(v) in (dict, defaultdict) and set(map(type, v.values())) == {list} and set(map(type, v)) == {str}


def _history_of_dict(histories, v, name, packer):
    "The same for the dict `v` of lists, if some of these only grow."
    cut = {key: histories.cut_if_grown(f'{name}[{key!r}]', values, packer) for key, values in v.items()}
    if all(part is None for part in cut.values()):
        return None
    return {key: packer(v[key], f'{name}[{key!r}]') if part is None else part for key, part in cut.items()}


# the learner, and when the Recorder's clock started
_OF_CALLBACKS = 'learn', 'start_epoch'

# what a loader makes anew for each pass, and its random generator, whose state is kept with the others
_OF_LOADERS = 'rng', *OF_PASS, *LEARNED

_SMOOTH = 'smooth_loss.'  # the state of an object that the Recorder holds

_SIZED = (*CONTAINERS, torch.Tensor, np.ndarray, L)


def _has_a_path(v) -> bool:
    "Is the value of an attribute walked by itself?"
    return can_hold(v) and type(v) is not L and not is_record(v)


def _is_hole(packed) -> bool:
    return type(packed) is tuple and packed[0] == 'hole'


def _is_plain(v) -> bool:
    "Can the value of an attribute be kept with it?"
    return not _has_a_path(v) and not _is_hole(Packer(keep_devices=True, holes=[])(v))


def _tensors(learn) -> list:
    "Parameters and buffers of the model."
    model = unwrap(learn.model)
    return [*model.parameters(), *model.buffers()]


def _holders(learn):
    """(path, object) for all whose attributes are kept; no callback with a state of its own, nor
    what it holds.
    """
    for path, o in walk(*below(learn, keeps_state), _is_the_programs):
        if path != 'dls' and type(o) is not L and not is_record(o):
            yield path, o


def _is_the_programs(path, o) -> bool:
    """Functions of callbacks, as the logger of a table, and what the Recorder measures with are
    made anew.
    """
    if path.startswith('fastai.learner.Recorder.0.'):
        return True
    return isinstance(o, FunctionType | MethodType | partial) and path.split('.')[0] not in ('loaders', 'model', 'loss')


def without_unchanged(packed, unchanged, names) -> tuple[dict, dict]:
    "What of `packed` is not in `unchanged`: that of callbacks, and the rest."
    callbacks, held = {}, {}
    for key, attrs in packed.items():
        same = unchanged.get(key, {})
        changed = {k: v for k, v in attrs.items() if not (k in same and equal(v, same[k]))}
        if key in names:
            callbacks[key] = changed
        elif changed:
            held[key] = changed
    return callbacks, held


def put_attributes(learn, state, unchanged):
    """Put packed attributes back into the objects that have the same paths. Objects and values that
    are not there any more are named in warnings.
    """
    found = dict(_holders(learn))
    storages = {t.untyped_storage().data_ptr() for t in _tensors(learn)}
    folder = getattr(learn, 'path', None)
    unpacker = Unpacker(storages, {class_name(type(o)): type(o) for o in found.values()}, folder)
    for path in {**unchanged, **state}:
        saved = state.get(path, {})
        attrs = {**unchanged.get(path, {}), **saved}
        if path in found:
            _put_into(found[path], path, attrs, saved, unpacker, folder)
        elif path in state and attrs:
            name_once(
                learn,
                path,
                f'{readable(path)} is not there any more, or not yet: its state in the checkpoint is left out',
            )
    for where in unpacker.missing:
        name_once(
            learn,
            where,
            f'{readable(where)} cannot be put back from the checkpoint: there is nothing of its class in its place, '
            'and it is no dataclass, named tuple or enum of a module',
        )


def _put_into(o, path, attrs, saved, unpacker, folder):
    "Put `attrs` into the object `o`; those not in `saved` are what they were when the fit began."
    now = {str(k): v for k, v in attributes(o)}
    for k, packed in attrs.items():
        # None before the fit, an object within it: as the autocast of a MixedPrecision
        if k not in saved and k in now and not _is_plain(now[k]):
            continue
        if _is_the_calls(o, k, packed, now):
            continue  # of a file that another version wrote, or that was changed
        if type(packed) is tuple and packed[0] == _BELOW:
            value = path_below(folder, packed[1])
            if value is not None and (k not in now or isinstance(now[k], Path | None)):
                set_attribute(o, k, value)
        elif k == _SMOOTH:
            o.smooth_loss.count, o.smooth_loss.val = unpack(packed)
        elif not k.startswith(_SMOOTH):
            _put_value(o, k, packed, now, path, unpacker)


def _is_the_calls(o, k, packed, now) -> bool:
    "Is the `packed` value of attribute `k` of `o` nothing that a file may change?"
    tag = packed[0] if type(packed) is tuple else None
    if tag == 'path' or is_setting(o, k, packed[1] if tag == 'text below' else packed):
        return True
    return isinstance(o, Callback) and (k in _OF_CALLBACKS or k in _PLACES and k not in now)


def _put_value(o, k, packed, now, path, unpacker):
    where = f'{path}.{k}'
    if k not in now:
        value = unpacker(packed, what=where)
    else:
        value = unpacker(packed, now[k], where)
        if value is now[k]:
            return
    try:
        set_attribute(o, k, value)
    except TypeError:
        unpacker.missing.append(where)


def _name_unkept(learn, holes):
    """Warn of what cannot be kept and has changed. (What stays the same belongs to the call: the
    next run makes it anew.)
    """
    known = _holes.setdefault(learn, {})
    for path, owner, v in holes:
        sign = id(v), len(v) if isinstance(v, CONTAINERS) else None
        changed = known.setdefault(path, sign) != sign
        if type(owner).__module__.split('.')[0] in _LIBRARIES or not (changed or is_used_up(v)):
            continue
        what = f'a {type(v).__qualname__}, which a checkpoint cannot hold'
        if is_setting(owner, path.rpartition('.')[2], v):
            what = 'an argument of the constructor, which no checkpoint changes, and the fit has changed it'
        name_once(
            learn,
            f'kept {path}',
            f'{readable(path)} is {what}: a fit that is killed and goes on has the one that the new run makes',
        )


# learner -> path -> what identifies the object there that no checkpoint can hold
_holes = weakref.WeakKeyDictionary()

# their callbacks and objects know what they hold
_LIBRARIES = 'fastai', 'fastcore', 'torch', 'torchvision', __name__.split('.')[0]
