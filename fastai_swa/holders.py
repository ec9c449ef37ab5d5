"""What a learner holds beside its weights: loaders, samplers, data sets, transforms, modules,
losses, callbacks and the objects in them. Found without running any of it, noted, and put back.

No data set is iterated, since that runs its transforms; no property is read, and no method of a
user's class is called.
"""

import io
import itertools
import random
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from types import CellType, FunctionType, GeneratorType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from fastai.optimizer import _BaseOptimizer
from fastcore.foundation import L
from torch import nn
from torch.utils import data

from .modules import unwrap
from .packing import elements, is_record, put_elements, shared_memory

__all__ = [
    'LEARNED',
    'OF_PASS',
    'below',
    'walk',
    'attributes',
    'namespace',
    'nested',
    'found_in',
    'holders_kept',
    'holder_kept',
    'unrepeatable',
    'loaders',
    'named_callbacks',
    'keeps_state',
    'owned_modules',
    'is_own',
    'can_hold',
    'set_attribute',
    'put_tensor',
    'is_used_up',
    'name_once',
    'readable',
]

MAX_LEAVES = 10_000  # of the containers, arrays and tensors that one object holds, for them to be kept
MAX_BYTES = 1_000_000
# a longer container holds samples, not transforms and the like: it is not searched for objects that hold something
_MAX_OBJECTS = 100

CONTAINERS = (list, tuple, dict, set, deque, bytearray)
_ATOMS = {type(None), bool, int, float, complex, str, bytes, range, torch.Size, torch.dtype, torch.device}


# what stands where in a learner


def loaders(learn) -> list:
    """The loaders of `learn`, also where its `dls` is no `DataLoaders` but an object with `train`
    and `valid`.
    """
    own = getattr(learn.dls, 'loaders', None)
    return own or [dl for name in ('train', 'valid') if (dl := getattr(learn.dls, name, None)) is not None]


def named_callbacks(learn):
    "(name, callback) pairs; callbacks of one class are counted."
    seen = {}
    for cb in learn.cbs:
        cls = f'{type(cb).__module__}.{type(cb).__qualname__}'
        seen[cls] = seen.get(cls, -1) + 1
        yield f'{cls}.{getattr(cb, "key", seen[cls])}', cb  # an average is known by its name


def keeps_state(cb) -> bool:
    "Does the callback say itself what is to be kept of it?"
    return hasattr(type(cb), 'state_dict') and hasattr(type(cb), 'load_state_dict')


def is_own(cb) -> bool:
    "Is it a callback of this package? These take no part in passes, and look after themselves."
    return any(cls.__module__.split('.')[0] == __name__.split('.')[0] for cls in type(cb).__mro__)


def owned_modules(owner) -> list:
    "`owner` if it is a module, else those that it holds as attributes, as fastai's losses do."
    held = [unwrap(owner)] if isinstance(owner, nn.Module) else getattr(owner, '__dict__', {}).values()
    return [m for m in held if isinstance(m, nn.Module)]


def roots(learn, callbacks) -> list:
    """(path, object): where what `learn` holds begins; `callbacks`: the named ones that belong to
    it.

    Callbacks come late: one may refer to the model or to a loader, which then have their own paths
    already.
    """
    own = [(f'loaders.{i}', dl) for i, dl in enumerate(loaders(learn))]
    return [*own, ('model', unwrap(learn.model)), ('loss', learn.loss_func), *callbacks, ('dls', learn.dls)]


def below(learn, is_left) -> tuple[list, list]:
    """What `walk` takes for all that `learn` holds, but the callbacks for which `is_left` holds,
    and what only they hold.
    """
    callbacks = [(name, cb) for name, cb in named_callbacks(learn) if not is_left(cb)]
    return roots(learn, callbacks), [learn, *filter(is_left, learn.cbs)]


def walk(roots, but=(), stop=lambda path, o: False):
    """(path, object) for each object below `roots` that can hold others, or a random state. Those
    in `but`, and those where `stop(path, object)`, are passed by, with what only they hold."""
    seen = {id(o) for o in but}
    for root in roots:
        stack = [root]
        while stack:
            path, o = stack.pop()
            if id(o) in seen:
                continue
            seen.add(id(o))
            if isinstance(o, CONTAINERS):
                inner = [*_entries(o)] if len(o) <= _MAX_OBJECTS else []
                # a class of one's own may count in attributes
                if type(o) not in CONTAINERS and not _is_foreign(type(o)):
                    yield path, o
                    inner += attributes(o)
            elif isinstance(o, Replay):
                continue
            elif (can_hold(o) or o is root[1] and type(o) not in _ATOMS) and not stop(path, o):
                yield path, o
                inner = attributes(o)
            else:
                continue
            if isinstance(o, CellType):  # its contents are the function's
                stack.extend((path, v) for _, v in inner if _leads_on(type(v)))
            else:
                stack.extend((f'{path}.{k}', v) for k, v in inner if _leads_on(type(v)))


def _entries(o):
    return elements(o) if isinstance(o, dict) else enumerate(_values(o))


def _values(o):
    return tuple.__iter__(o) if isinstance(o, tuple) else elements(o)


_STOPS = (
    type,
    ModuleType,
    GeneratorType,
    torch.Tensor,
    np.ndarray,
    Learner,
    Callback,
    _BaseOptimizer,
    torch.optim.Optimizer,
)
_OF_TORCH = (nn.Module, data.DataLoader, data.Dataset, data.Sampler, torch.Generator)
# their objects belong to the process: threads, files, figures, bars; or they are data that know how to keep themselves
_OTHERS = '''torch numpy pandas polars pyarrow PIL cv2 h5py zarr lmdb matplotlib IPython ipywidgets tqdm fastprogress
            wandb tensorboard tensorboardX mlflow neptune comet_ml clearml aim accelerate'''.split()
_FOREIGN = sys.stdlib_module_names - {'collections', 'types', 'argparse'} | set(_OTHERS)


def can_hold(o) -> bool:
    "Is it of a kind that may hold something that training or a pass changes?"
    return _can_hold(type(o))


@lru_cache(5000)
def _can_hold(cls) -> bool:
    if issubclass(cls, (FunctionType, MethodType, partial, CellType, SimpleNamespace)):
        return True
    if issubclass(cls, (*_STOPS, *CONTAINERS, Replay)):
        return False
    return issubclass(cls, _OF_TORCH) or not _is_foreign(cls) or issubclass(cls, _WITH_RANDOM_STATE)


@lru_cache(5000)
def _leads_on(cls) -> bool:
    "Can objects of that class be on the way to one that can hold something?"
    return cls not in _ATOMS and (issubclass(cls, CONTAINERS) or _can_hold(cls))


@lru_cache(1000)
def _is_foreign(cls) -> bool:
    return cls.__module__.split('.')[0] in _FOREIGN or issubclass(cls, data.dataloader._BaseDataLoaderIter)


_WITH_RANDOM_STATE = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


def namespace(o) -> dict:
    "The attributes of an object that are in its `__dict__`."
    try:
        attrs = object.__getattribute__(o, '__dict__')
    except AttributeError:
        return {}
    return attrs if type(attrs) is dict else {}


@lru_cache(1000)
def _slots(cls) -> tuple:
    "The descriptors of the attributes that are not in a `__dict__`."
    if _is_foreign(cls):
        return ()
    members = (d for c in cls.__mro__ for d in vars(c).values() if type(d) is MemberDescriptorType)
    return tuple(d for d in members if d.__name__ not in ('__dict__', '__weakref__'))


_UNSET = object()


def _slot_values(o):
    for d in _slots(type(o)):
        try:
            yield d, d.__get__(o)
        except AttributeError:
            yield d, _UNSET


_MODULES_OWN = set(vars(nn.Module()))  # parameters, buffers, submodules, hooks, flags
_MODULES_DICTS = [k for k, v in vars(nn.Module()).items() if isinstance(v, dict)]


def attributes(o) -> list:
    """(name, value) for what an object holds: attributes, the variables that a function closes
    over, and its defaults.
    """
    own = namespace(o)
    if isinstance(o, nn.Module):
        return [*((k, v) for k, v in own.items() if k not in _MODULES_OWN), *o._modules.items()]
    if isinstance(o, MethodType):
        return [('self', o.__self__), ('func', o.__func__)]
    if isinstance(o, partial):
        return [('func', o.func), ('args', o.args), ('keywords', o.keywords), *own.items()]
    if isinstance(o, CellType):
        return [] if o == CellType() else [('contents', o.cell_contents)]
    if isinstance(o, FunctionType):
        if '_torchdynamo_orig_callable' in own:  # compiled: what is inside is the compiler's
            return [('compiled', own['_torchdynamo_orig_callable'])]
        cells = [(i, c) for i, c in enumerate(o.__closure__ or ())]
        return [*cells, ('defaults', o.__defaults__), ('keywords', o.__kwdefaults__), *own.items()]
    slots = [(d.__name__, v) for d, v in _slot_values(o) if v is not _UNSET]
    return [*own.items(), *slots]


def set_attribute(o, name, value):
    "Set what `attributes` has under that name. Raises `TypeError` where it cannot be exchanged."
    if isinstance(o, CellType):
        o.cell_contents = value
        return
    if isinstance(o, FunctionType) and name in ('defaults', 'keywords'):
        setattr(o, {'defaults': '__defaults__', 'keywords': '__kwdefaults__'}[name], value)
        return
    if isinstance(o, partial | MethodType) and name not in namespace(o):
        raise TypeError(f'{name} of a {type(o).__name__} cannot be exchanged')
    slot = next((d for d in _slots(type(o)) if d.__name__ == name), None)
    if slot is None:
        namespace(o)[name] = value
    else:
        slot.__set__(o, value)


# what is small enough to be kept

_NESTED = (*CONTAINERS, torch.Tensor, np.ndarray, L)


def nested(o, max_leaves=MAX_LEAVES, max_bytes=MAX_BYTES):
    """The containers, the arrays and tensors in the container `o`, itself among them, the number of
    leaves and that of bytes; `None` if they are more than that. It is found out level by level, so
    that a large container costs nothing.
    """
    containers, arrays, seen, n_leaves, n_bytes = [], [], set(), 0, 0
    level = [o]
    while level:
        inner = []
        for v in level:
            if isinstance(v, torch.Tensor | np.ndarray):
                arrays.append(v)
                n_leaves += 1
                n_bytes += v.nbytes
            elif id(v) not in seen:
                seen.add(id(v))
                containers.append(v)
                inner.append(v)
        sizes = [len(v) for v in inner if isinstance(v, CONTAINERS)]
        if sum(sizes) > max_leaves or n_bytes > max_bytes:
            return None
        values = list(itertools.chain.from_iterable(map(_inside, inner)))
        if set(map(type, values)) <= _ATOMS:
            level = []
        else:
            level = [v for v in values if isinstance(v, _NESTED) or is_record(v)]
        n_leaves += len(values) - len(level)
        if n_leaves > max_leaves:
            return None
    return containers, arrays, n_leaves, n_bytes


def _inside(o):
    if isinstance(o, dict):
        return dict.values(o)
    return _values(o) if isinstance(o, CONTAINERS) else namespace(o).values()


# noted, and put back


class _Notes:
    "What some objects hold now."

    def __init__(self, protected=()):
        self.protected = protected  # data pointers of tensors that are not to be put back
        self.spaces = []  # a dict that is a namespace, its contents
        self.slots = []  # object, descriptor, value
        self.containers = []  # container, its contents
        self.tensors = []  # tensor, an alias that keeps its storage and shape, a copy
        self.grads = []  # tensor, its gradient
        self.arrays = []  # array, a copy
        self.files = []  # file, position
        self.shared = []  # memory that processes share, its bytes
        # object, name of an attribute of it, the iterator there, the `Replay` that stands there meanwhile
        self.streams = []
        self.large = []  # path, object, its length: too large to be kept
        self.seen = set()

    def add_streams(self, o):
        """Let iterators that `o` holds go through a `Replay`, so that what a pass takes from them
        comes again.
        """
        for name, v in attributes(o):
            if _is_of_pass(o, name) or not is_replayable(v):
                continue
            replay = v if isinstance(v, Replay) else Replay(v)
            # nothing that could be exchanged: `unrepeatable` names it
            with suppress(AttributeError, TypeError, KeyError):
                set_attribute(o, name, replay)
                replay.begin()
                self.streams.append((o, name, replay))

    def add(self, path, o):
        "Note what the object `o` holds."
        own = namespace(o)
        self.spaces.append((own, dict(own)))
        if isinstance(o, nn.Module):
            self._add_module(path, o)
            values = [(k, v) for k, v in own.items() if k not in _MODULES_OWN]
        elif isinstance(o, Recorder):
            self._add_flat(own)  # one loss a step, none of which changes
            return
        else:
            slots = list(_slot_values(o))
            self.slots += [(o, d, v) for d, v in slots]
            values = attributes(o) if not slots else [*own.items(), *((d.__name__, v) for d, v in slots)]
        self._add_contents(path, values)

    def _add_module(self, path, m):
        own = vars(m)
        left = ('_parameters', '_buffers') if m in self.protected else ()  # whose tensors are the pass's matter
        for k in _MODULES_DICTS:
            if k not in left and isinstance(d := own.get(k), dict):
                self.spaces.append((d, dict(d) if d else _EMPTY))
        if not left:
            self._add_contents(path, [*m._parameters.items(), *m._buffers.items()], each=True)

    def _add_flat(self, own):
        for v in own.values():
            held = v if isinstance(v, CONTAINERS) else namespace(v).get('items')  # an L
            if isinstance(held, list | dict):
                self.containers.append((held, elements(held)))

    def _add_contents(self, path, values, each=False):
        """Note the containers, arrays and tensors among `values`, those of one object, or where the
        limits are for `each`, of several.
        """
        n_leaves, n_bytes = MAX_LEAVES, MAX_BYTES
        for name, v in values:
            if not _can_be_noted(type(v)) or type(v) is tuple and set(map(type, v)) <= _ATOMS:
                continue
            if each:
                n_leaves, n_bytes = MAX_LEAVES, MAX_BYTES
            if isinstance(v, io.IOBase):
                self._add_file(v)
            if (memory := shared_memory(v)) is not None:
                self.shared.append((memory, bytes(memory)))
            if not isinstance(v, (*CONTAINERS, torch.Tensor, np.ndarray)) or id(v) in self.seen:
                continue
            if isinstance(v, torch.Tensor) and v.data_ptr() in self.protected:
                continue
            self.seen.add(id(v))
            found = nested(v, n_leaves, n_bytes)
            if found is None:
                self.large.append((f'{path}.{name}', v, _length(v)))
                continue
            containers, arrays, leaves, size = found
            n_leaves -= leaves
            n_bytes -= size
            for o in containers:
                self._add_container(o)
            for o in arrays:
                self._add_array(o)

    def _add_container(self, o):
        if isinstance(o, tuple):
            return
        if isinstance(o, CONTAINERS):
            self.containers.append((o, elements(o)))
        else:
            self.spaces.append((namespace(o), dict(namespace(o))))

    def _add_array(self, o):
        if isinstance(o, np.ndarray):
            if o.flags.writeable:
                self.arrays.append((o, o.copy()))
            return
        if o.layout is not torch.strided or o.is_meta or o.is_inference():
            return
        if isinstance(o, nn.parameter.UninitializedTensorMixin) or o.data_ptr() in self.protected:
            return
        self.tensors.append((o, o.data, o.detach().clone()))
        if o.is_leaf and o.requires_grad:
            self.grads.append((o, o.grad, None if o.grad is None else o.grad.clone()))

    def _add_file(self, f):
        with suppress(OSError, ValueError):  # a pipe, or closed
            self.files.append((f, f.tell()))

    def put_back(self):
        "Let all hold again what they held. Gives the paths of large ones that have another length."
        faults = []
        files = [] if self.streams else self.files  # an iterator may read from one, and gives again what it has read
        noted = [
            (_put_space, self.spaces),
            (_put_slot, self.slots),
            (_put_container, self.containers),
            (_put_array, self.arrays),
            (put_tensor, self.tensors),
            (_put_grad, self.grads),
            (_put_file, files),
            (_put_memory, self.shared),
            (_put_stream, self.streams),
        ]
        for put, notes in noted:
            for note in notes:
                try:
                    put(*note)
                except Exception as e:  # the others are put back all the same
                    faults.append(f'a {type(note[0]).__name__} ({e})')
        return faults + [path for path, o, length in self.large if _length(o) != length]


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
    if old is not _UNSET:
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


@contextmanager
def holder_kept(o):
    """What the object `o`, a loader for instance, and the objects in it hold is put back at the end
    of this context.
    """
    notes = _Notes()
    for path, holder in list(walk([('it', o)])):
        notes.add_streams(holder)
        _note(notes, path, holder)
    try:
        yield
    finally:
        notes.put_back()


def found_in(learn) -> list:
    """(path, object) for what a pass aside from training must leave as it is: all that `learn`
    holds but this package's callbacks.
    """
    return list(walk(*below(learn, is_own)))


@contextmanager
def holders_kept(learn, found=None):
    """What sampler, data set, transforms, loss, modules and callbacks hold, and the objects in
    them, is put back at the end of this context, as far as it is small: attributes, and containers,
    arrays and tensors of together `MAX_LEAVES` leaves and `MAX_BYTES` an object, in place. What is
    larger is named in one warning if its length changed. The weights and buffers of the model are
    left alone.

    - `found`: what `found_in(learn)` gives.
    """
    notes = _note_all(learn, found)
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


def _note_all(learn, found=None):
    model = unwrap(learn.model)
    protected = {*model.modules(), *(t.data_ptr() for t in itertools.chain(model.parameters(), model.buffers()))} - {0}
    notes = _Notes(protected)
    metrics = 'fastai.learner.Recorder.0.'  # a pass measures with copies
    for path, o in found_in(learn) if found is None else found:
        if path.startswith(metrics):
            continue
        if path.startswith('loaders.'):
            notes.add_streams(o)
        _note(notes, path, o)
    return notes


def _note(notes, path, o):
    if isinstance(o, CellType):
        notes.slots.append((o, CellType.cell_contents, o.cell_contents if o != CellType() else _UNSET))
        notes._add_contents(path, attributes(o))
    elif not isinstance(o, torch.Generator):
        notes.add(path, o)


_named = weakref.WeakKeyDictionary()  # learner -> paths that a warning has named


def name_once(learn, path, sentence):
    "Warn, once for a path of a learner."
    said = _named.setdefault(learn, set())
    if path not in said:
        said.add(path)
        warnings.warn(sentence, stacklevel=2)


def readable(path: str) -> str:
    "`path` as a user would write it."
    for i, name in enumerate(('train', 'valid')):
        if path == f'loaders.{i}' or path.startswith(f'loaders.{i}.'):
            return f'dls.{name}{path.removeprefix(f"loaders.{i}")}'
    return path


# what is used up


class Replay:
    """Stands for an iterator `inner`: what is taken from it between `begin` and `rewind` is given
    once more after that.
    """

    def __init__(self, inner):
        self.inner = inner
        self.pending = deque()  # taken from `inner`, to be given again
        self.taken = []  # what was taken since each `begin`; they may be nested
        self.draws = False  # whether it has drawn from a library's generator for something that is given twice

    def begin(self):
        self.taken.append([])

    def rewind(self) -> bool:
        "Does it differ from `inner` now?"
        self.pending.extendleft(reversed(self.taken.pop()))
        return bool(self.pending or self.taken)

    def __iter__(self):
        return self

    def __next__(self):
        if self.pending:
            value = self.pending.popleft()
        elif not self.taken:
            return next(self.inner)
        else:
            before = _drawn()
            value = next(self.inner)
            self.draws |= _drawn() != before
        if self.taken:
            self.taken[-1].append(value)
        return value

    def __getattr__(self, name):
        if name == 'inner':  # not there yet, as while it is unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)


def _drawn() -> tuple:
    "What differs once a library's generator was drawn from."
    _, keys, *place = np.random.get_state()  # noqa: NPY002
    return random.getstate(), torch.get_rng_state().numpy().tobytes(), keys.tobytes(), place


def is_replayable(v) -> bool:
    return isinstance(v, Replay) or is_used_up(v) and not isinstance(v, io.IOBase | data.dataloader._BaseDataLoaderIter)


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


OF_PASS = 'it', '_DataLoader__idxs', '_iterator'  # what a loader holds while it is gone through, and makes anew
LEARNED = '_n_inp', '_types'  # what fastai's finds out once about its batches, from a sample


def _is_of_pass(o, name) -> bool:
    return name in OF_PASS and isinstance(o, DataLoader | data.DataLoader)


def _used_up(o):
    "(name, value) for what is used up in the attributes of `o`, and cannot be exchanged there."
    for name, v in attributes(o):
        if _is_of_pass(o, name):
            continue
        in_place = isinstance(v, io.IOBase | data.dataloader._BaseDataLoaderIter) or isinstance(o, partial | MethodType)
        if is_used_up(v) and in_place:
            yield name, v
        if isinstance(v, CONTAINERS) and len(v) <= _MAX_OBJECTS:
            yield from ((f'{name}.{k}', x) for k, x in _entries(v) if is_used_up(x))


@lru_cache(5000)
def _may_be_used_up(cls) -> bool:
    return issubclass(cls, (Iterator, io.IOBase, data.dataloader._BaseDataLoaderIter))


def is_used_up(v) -> bool:
    "Is it gone when it was gone through, and can it not be put back?"
    if not _may_be_used_up(type(v)):
        return False
    if isinstance(v, io.IOBase):
        return not _has_position(v)
    if isinstance(v, GeneratorType):
        return True
    # an iterator of a user's class counts in attributes, which are put back
    is_built_in = isinstance(v, Iterator) and not namespace(v) and type(v).__module__.split('.')[0] in _FOREIGN
    return is_built_in and not isinstance(v, itertools.repeat) or isinstance(v, data.dataloader._BaseDataLoaderIter)


def _has_position(f) -> bool:
    try:
        f.tell()
        return True
    except (OSError, ValueError):
        return f.closed or f.seekable()  # the latter: while it is read line by line
