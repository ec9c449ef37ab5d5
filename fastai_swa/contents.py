"""What objects hold: attributes, the elements of containers, the fields of records. Read and set
without running code of the user's: no property is read, and no method of a user's class is called.
"""

import ctypes
import dataclasses
import itertools
import sys
from collections import OrderedDict, deque
from functools import lru_cache, partial
from types import (
    CellType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    UnionType,
)
from typing import NamedTuple

import numpy as np
import torch
from fastcore.foundation import L
from torch import nn
from torch.utils import data

__all__ = [
    'CONTAINERS',
    'elements',
    'values_of',
    'put_elements',
    'set_items',
    'shared_memory',
    'is_record',
    'record_fields',
    'namespace',
    'attributes',
    'slot_values',
    'set_attribute',
    'is_foreign',
    'nested',
    'MAX_LEAVES',
    'MAX_BYTES',
    'ATOMS',
    'UNSET',
    'MODULES_OWN',
    'MODULES_DICTS',
]


# containers; the methods of Python's own classes are called, since those of a subclass may do anything

CONTAINERS = (list, tuple, dict, set, deque, bytearray)

_BASES = OrderedDict, dict, list, deque, set, bytearray


def _base(o):
    return next(cls for cls in _BASES if isinstance(o, cls))


def elements(o) -> list:
    "What a container holds; the pairs of a dict."
    base = _base(o)
    return list(base.items(o) if issubclass(base, dict) else base.__iter__(o))


def values_of(o):
    "The same of a tuple, too."
    return tuple.__iter__(o) if isinstance(o, tuple) else elements(o)


def put_elements(o, values: list):
    "Let a container hold `values`, and nothing else; gives the container."
    base = _base(o)
    base.clear(o)
    if issubclass(base, dict):
        for k, v in values:
            base.__setitem__(o, k, v)
    elif base is set:
        set.update(o, values)
    else:
        base.extend(o, values)
    return o


def set_items(sequence, values: list):
    "Let a list or fastcore's `L` hold `values`, in one step. (An `L` of fastcore 1.8 or older takes no slice.)"
    items = sequence.items if isinstance(sequence, L) else sequence
    items[:] = values


def shared_memory(o) -> memoryview | None:
    """The memory of a number or array that processes share, as `multiprocessing.Value` makes one:
    how workers are told the epoch.
    """
    if type(o).__module__ == 'multiprocessing.sharedctypes' and hasattr(o, 'get_obj'):
        o = o.get_obj()
    return memoryview(o).cast('B') if isinstance(o, ctypes._SimpleCData | ctypes.Array) else None


# records: instances of dataclasses


def is_record(o) -> bool:
    "Is `o` an instance of a dataclass that is data, and nothing of PyTorch's?"
    return _is_record_class(type(o))


@lru_cache(5000)
def _is_record_class(cls) -> bool:
    return dataclasses.is_dataclass(cls) and not issubclass(cls, nn.Module | torch.utils.data.Dataset)


def record_fields(o) -> dict:
    """Name -> value of what an instance of a dataclass holds: its fields, and what was set beside
    them.
    """
    fields = {f.name: getattr(o, f.name) for f in dataclasses.fields(o) if hasattr(o, f.name)}
    return {**fields, **getattr(o, '__dict__', {})}


# attributes


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
    if is_foreign(cls):
        return ()
    members = [d for c in cls.__mro__ for d in _members(c)]
    return tuple(d for d in members if d.__name__ not in ('__dict__', '__weakref__'))


def _members(cls) -> list:
    own = vars(cls)
    slots = [d for d in own.values() if type(d) is MemberDescriptorType]
    # classes that mypyc compiles, such as the functions in fastai's transforms (plum-dispatch >= 2.10)
    compiled = [own[name] for name in own.get('__mypyc_attrs__', ()) if name in own]
    return slots + [d for d in compiled if type(d) is GetSetDescriptorType]


UNSET = object()  # the value of a slot that has none


def slot_values(o):
    "(descriptor, value) for each slot."
    for d in _slots(type(o)):
        try:
            yield d, d.__get__(o)
        except AttributeError:
            yield d, UNSET


# their objects belong to the process: threads, files, figures, bars; or they are data that know how to keep themselves
_OTHERS = '''torch numpy pandas polars pyarrow PIL cv2 h5py zarr lmdb matplotlib IPython ipywidgets tqdm fastprogress
            wandb tensorboard tensorboardX mlflow neptune comet_ml clearml aim accelerate'''.split()

_FOREIGN = sys.stdlib_module_names - {'collections', 'types', 'argparse'} | set(_OTHERS)


@lru_cache(1000)
def is_foreign(cls) -> bool:
    "Is it a class of a library whose objects are left alone?"
    return cls.__module__.split('.')[0] in _FOREIGN or issubclass(cls, data.dataloader._BaseDataLoaderIter)


MODULES_OWN = set(vars(nn.Module()))  # parameters, buffers, submodules, hooks, flags

MODULES_DICTS = [k for k, v in vars(nn.Module()).items() if isinstance(v, dict)]


def attributes(o) -> list:
    """(name, value) for what an object holds: attributes, the variables that a function closes
    over, and its defaults.
    """
    own = namespace(o)
    if isinstance(o, nn.Module):
        return [*((k, v) for k, v in own.items() if k not in MODULES_OWN), *o._modules.items()]
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
    slots = [(d.__name__, v) for d, v in slot_values(o) if v is not UNSET]
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

# of the containers, arrays and tensors that one object holds, for them to be kept
MAX_LEAVES = 10_000
MAX_BYTES = 1_000_000

# what holds nothing that changes
ATOMS = {type(None), bool, int, float, complex, str, bytes, range, torch.Size, torch.dtype, torch.device}
ATOMS |= {UnionType, GenericAlias}  # annotations, as the functions in fastai's transforms have them

_NESTED = (*CONTAINERS, torch.Tensor, np.ndarray, L)


class Nested(NamedTuple):
    containers: list  # with records and fastcore's L, whose contents are in their attributes
    arrays: list  # and tensors
    n_leaves: int  # arrays, tensors, and values that hold nothing
    n_bytes: int  # of the arrays and tensors


def nested(o, max_leaves=MAX_LEAVES, max_bytes=MAX_BYTES) -> Nested | None:
    """What is in the container, array or tensor `o`, itself among it; `None` if it is more than that.
    It is found out level by level, so that a large container costs nothing.
    """
    containers = []
    arrays = []
    n_leaves = 0
    n_bytes = 0
    seen = set()
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
        if set(map(type, values)) <= ATOMS:
            level = []
        else:
            level = [v for v in values if isinstance(v, _NESTED) or is_record(v)]
        n_leaves += len(values) - len(level)
        if n_leaves > max_leaves:
            return None
    return Nested(containers, arrays, n_leaves, n_bytes)


def _inside(o):
    "What a container holds; the values of a dict."
    if isinstance(o, dict):
        return dict.values(o)
    return values_of(o) if isinstance(o, CONTAINERS) else namespace(o).values()
