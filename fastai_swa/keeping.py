"""What the objects of a learner hold is noted, and put back at the end of a context, as far as it is
small."""

import io
import itertools
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from types import CellType, MethodType

import numpy as np
import torch
from fastai.learner import Recorder
from torch import nn
from torch.utils import data

from .contents import (
    ATOMS,
    CONTAINERS,
    MAX_BYTES,
    MAX_LEAVES,
    MODULES_DICTS,
    MODULES_OWN,
    UNSET,
    attributes,
    elements,
    namespace,
    nested,
    put_elements,
    set_attribute,
    shared_memory,
    slot_values,
)
from .modules import unwrap
from .replay import Replay, is_replayable, is_used_up
from .walk import MAX_OBJECTS, entries, found_in, is_of_pass, loaders, name_once, readable, walk

__all__ = ['holders_kept', 'holder_kept', 'put_tensor', 'unrepeatable']


@contextmanager
def holders_kept(learn, found=None):
    """What sampler, data set, transforms, loss, modules and callbacks hold, and the objects in
    them, is put back at the end of this context, as far as it is small: attributes, and containers,
    arrays and tensors of together `MAX_LEAVES` leaves and `MAX_BYTES` an object, in place. What is
    larger is named in one warning if its length changed. The weights and buffers of the model are
    left alone.

    - `found`: what `found_in(learn)` gives.
    """
    model = unwrap(learn.model)
    pointers = {t.data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    notes = _Notes({*model.modules(), *pointers} - {0})
    for path, o in found_in(learn) if found is None else found:
        if path.startswith('fastai.learner.Recorder.0.'):  # metrics: a pass measures with copies
            continue
        if path.startswith('loaders.'):
            notes.add_streams(o)
        notes.add(path, o)
    try:
        yield
    finally:
        changed = notes.put_back()
        for o, name, replay in notes.streams:
            if replay.draws:
                name_once(
                    learn,
                    f'{type(o).__qualname__}.{name}',
                    f'{type(o).__qualname__}.{name} draws random numbers as it is gone through, and a pass aside from '
                    'training has gone through some of it: training differs from what it is without that pass',
                )
        for path in changed:
            name_once(
                learn,
                path,
                f'{readable(path)} was changed by a pass aside from training and is too large to be put back (more '
                f'than {MAX_LEAVES:,} values): training may differ from what it is without that pass',
            )


@contextmanager
def holder_kept(o):
    """What the object `o`, a loader for instance, and the objects in it hold is put back at the end
    of this context.
    """
    notes = _Notes()
    for path, holder in list(walk([('it', o)])):
        notes.add_streams(holder)
        notes.add(path, holder)
    try:
        yield
    finally:
        notes.put_back()


# noted, and put back


class _Notes:
    """What some objects hold now.

    - `protected`: modules whose parameters and buffers, and data pointers of tensors, that are not
      to be put back.
    """

    def __init__(self, protected=()):
        self.protected = protected
        self.notes = []  # a function that puts one thing back, and its arguments
        self.files = []  # the same of positions in files
        self.streams = []  # object, name of an attribute of it, the `Replay` that stands there meanwhile
        self.large = []  # path, object, its length: too large to be kept
        self.seen = set()  # ids of the values that are noted

    def note(self, put, *args):
        self.notes.append((put, args))

    def put_back(self) -> list:
        "Let all hold again what they held. Gives the paths of large ones that have another length."
        # an iterator may read from a file, and gives again what it has read
        files = [] if self.streams else self.files
        streams = [(_put_stream, args) for args in self.streams]  # last: the attributes that they stand in are put back
        faults = []
        for put, args in (*self.notes, *files, *streams):
            try:
                put(*args)
            except Exception as e:  # the others are put back all the same
                faults.append(f'a {type(args[0]).__name__} ({e})')
        return faults + [path for path, o, length in self.large if _length(o) != length]

    def add_streams(self, o):
        """Let iterators that `o` holds go through a `Replay`, so that what a pass takes from them
        comes again.
        """
        for name, v in attributes(o):
            if is_of_pass(o, name) or not is_replayable(v):
                continue
            replay = v if isinstance(v, Replay) else Replay(v)
            # nothing that could be exchanged: `unrepeatable` names it
            with suppress(AttributeError, TypeError, KeyError):
                set_attribute(o, name, replay)
                replay.begin()
                self.streams.append((o, name, replay))

    def add(self, path, o):
        "Note what the object `o` holds."
        if isinstance(o, torch.Generator):
            return  # its state is kept with the other random generators
        if isinstance(o, CellType):
            self.note(_put_slot, o, CellType.cell_contents, o.cell_contents if o != CellType() else UNSET)
            self._add_values(path, attributes(o))
            return
        own = namespace(o)
        self.note(_put_space, own, dict(own))
        if isinstance(o, nn.Module):
            self._add_module(path, o)
        elif isinstance(o, Recorder):
            self._add_recorder(own)
        else:
            for descriptor, v in slot_values(o):
                self.note(_put_slot, o, descriptor, v)
            self._add_values(path, attributes(o))

    def _add_module(self, path, m):
        own = vars(m)
        left = ('_parameters', '_buffers') if m in self.protected else ()  # whose tensors are the pass's matter
        for k in MODULES_DICTS:
            if k not in left and isinstance(d := own.get(k), dict):
                self.note(_put_space, d, dict(d) if d else _EMPTY)
        if not left:
            for item in (*m._parameters.items(), *m._buffers.items()):
                self._add_values(path, [item])  # the limits are for each of them
        self._add_values(path, [(k, v) for k, v in own.items() if k not in MODULES_OWN])

    def _add_recorder(self, own):
        "A Recorder has one loss a step, none of which changes."
        for v in own.values():
            held = v if isinstance(v, CONTAINERS) else namespace(v).get('items')  # an L
            if isinstance(held, list | dict):
                self.note(_put_container, held, elements(held))

    def _add_values(self, path, values):
        "Note the containers, arrays, tensors and files among `values`, (name, value) of one object."
        n_leaves = MAX_LEAVES
        n_bytes = MAX_BYTES
        for name, v in values:
            if not _can_be_noted(type(v)) or type(v) is tuple and set(map(type, v)) <= ATOMS:
                continue
            if isinstance(v, io.IOBase):
                self._add_file(v)
            if (memory := shared_memory(v)) is not None:
                self.note(_put_memory, memory, bytes(memory))
            if not isinstance(v, (*CONTAINERS, torch.Tensor, np.ndarray)) or id(v) in self.seen:
                continue
            if isinstance(v, torch.Tensor) and v.data_ptr() in self.protected:
                continue
            self.seen.add(id(v))
            found = nested(v, n_leaves, n_bytes)
            if found is None:
                self.large.append((f'{path}.{name}', v, _length(v)))
                continue
            n_leaves -= found.n_leaves
            n_bytes -= found.n_bytes
            for o in found.containers:
                self._add_container(o)
            for o in found.arrays:
                self._add_array(o)

    def _add_container(self, o):
        if isinstance(o, tuple):
            return
        if isinstance(o, CONTAINERS):
            self.note(_put_container, o, elements(o))
        else:
            self.note(_put_space, namespace(o), dict(namespace(o)))

    def _add_array(self, o):
        if isinstance(o, np.ndarray):
            if o.flags.writeable:
                self.note(_put_array, o, o.copy())
            return
        if o.layout is not torch.strided or o.is_meta or o.is_inference():
            return
        if isinstance(o, nn.parameter.UninitializedTensorMixin) or o.data_ptr() in self.protected:
            return
        self.note(put_tensor, o, o.data, o.detach().clone())
        if o.is_leaf and o.requires_grad:
            self.note(_put_grad, o, o.grad, None if o.grad is None else o.grad.clone())

    def _add_file(self, f):
        with suppress(OSError, ValueError):  # a pipe, or closed
            self.files.append((_put_file, (f, f.tell())))


_EMPTY = {}


@lru_cache(5000)
def _can_be_noted(cls) -> bool:
    is_shared = cls.__module__.startswith(('multiprocessing', 'ctypes', '_ctypes'))
    return is_shared or issubclass(cls, (*CONTAINERS, torch.Tensor, np.ndarray, io.IOBase))


def _length(o):
    return (o._version, o.shape) if isinstance(o, torch.Tensor) and not o.is_inference() else len(o)


def _put_space(space, old):
    if not space and not old or space.keys() == old.keys() and all(space[k] is v for k, v in old.items()):
        return
    if list(space) == list(old):
        space.update(old)
        return
    space.clear()  # the order counts as well: of hooks, for one
    space.update(old)


def _put_slot(o, descriptor, old):
    if old is not UNSET:
        descriptor.__set__(o, old)
        return
    with suppress(AttributeError, ValueError):  # it is not set now, either
        descriptor.__delete__(o)


def _put_container(o, old):
    now = elements(o)
    if isinstance(o, dict):
        same = len(now) == len(old) and all(k is q and v is w for (k, v), (q, w) in zip(now, old))
    else:
        same = len(now) == len(old) and all(a is b for a, b in zip(now, old))
    if not same:
        put_elements(o, old)


def _put_array(o, old):
    if o.dtype.hasobject or o.tobytes() != old.tobytes():
        o[...] = old


def put_tensor(t, alias, old):
    """Let `t` be what it was: with the storage, shape and dtype of its `alias`, and in it bitwise
    what is in its copy `old`.
    """
    with torch.no_grad():
        if t.data_ptr() != alias.data_ptr() or t.shape != alias.shape or t.dtype != alias.dtype:
            t.data = alias
        if t.device.type != 'cpu' or not torch.equal(t, old):  # on a GPU a comparison waits
            t.copy_(old)


def _put_grad(t, grad, old):
    t.grad = grad
    if grad is not None:
        grad.copy_(old)


def _put_file(f, position):
    if f.tell() != position:
        f.seek(position)


def _put_stream(o, name, replay):
    if not replay.rewind():
        set_attribute(o, name, replay.inner)  # untouched: it can stand there itself


def _put_memory(memory, old):
    memory[:] = old


# what cannot be put back


def unrepeatable(learn, only=None) -> list[str]:
    """Where the data of `learn` hold something that is used up when it is gone through, and that a
    pass aside from training cannot give back: a pipe, or a generator in a container. (One in an
    attribute gives again what a pass took from it.)

    - `only`: of this loader, 0 for the training set.
    """
    found = {}
    for i, dl in enumerate(loaders(learn)):
        if only not in (None, i):
            continue
        for path, o in walk([(f'loaders.{i}', dl)]):
            for name, v in _used_up(o):
                found.setdefault(id(v), f'{readable(path)}.{name} ({type(v).__name__})')
    return list(found.values())


def _used_up(o):
    "(name, value) for what is used up in the attributes of `o`, and cannot be exchanged there."
    for name, v in attributes(o):
        # the latter: what a constructor was given, which older fastcore notes and nobody goes through
        if is_of_pass(o, name) or name == '__stored_args__':
            continue
        in_place = isinstance(v, io.IOBase | data.dataloader._BaseDataLoaderIter) or isinstance(o, partial | MethodType)
        if is_used_up(v) and in_place:
            yield name, v
        if isinstance(v, CONTAINERS) and len(v) <= MAX_OBJECTS:
            yield from ((f'{name}.{k}', x) for k, x in entries(v) if is_used_up(x))
