"""Python objects as plain data that `torch.load(weights_only=True)` reads, and back. A file never
names code that would be run or imported.

What is no number, string, tensor, list or dict is a tuple of a tag and its content: tuples as well,
since a tuple is a tag's sign, and sets, counters and the like, which not every supported version of
torch reads by itself.
"""

import dataclasses
import enum
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import torch
from fastcore.foundation import L
from torch import nn

from .contents import elements, is_record, put_elements, record_fields, shared_memory

__all__ = [
    'pack',
    'unpack',
    'Packer',
    'Unpacker',
    'equal',
]


def pack(o):
    "A copy of `o` as plain data; raises `TypeError` where it holds something else."
    return Packer()(o)


def unpack(o):
    """What `pack` made plain; tensors are copies, so that nothing that is done to the result
    reaches `o`.
    """
    unpacker = Unpacker()
    res = unpacker(o)
    if unpacker.missing:
        raise ValueError(f'the data hold what cannot be made anew: {unpacker.missing[0]}')
    return res


def class_name(cls) -> str:
    return f'{cls.__module__}:{cls.__qualname__}'


_PLAIN = (type(None), bool, int, float, str)
_SEQUENCES = {'list': list, 'deque': deque, 'set': set}  # whose subclasses are packed, under these names


class Packer:
    """Turns objects into numbers, strings, tensors, lists and dicts as they are, all else into a
    tuple of a tag and its content. Tensors become copies on the CPU, one for all that are the same.

    - `refused`: data pointers of tensors that are kept elsewhere.
    - `keep_devices`: tensors go back to the devices that they are on.
    - `lenient`: strings for what is not plain data.
    - `holes`: a list; what is not plain data leaves a hole, which `Unpacker` fills with what it
      finds at that place, and (path, object) is appended to it.
    """

    def __init__(self, refused=(), keep_devices=False, lenient=False, holes=None):
        self.copies = {}  # id -> tensor and its copy; the tensor is kept, so that its id stays taken
        self.open = set()  # ids of the containers that are being packed
        self.root = 'it'  # the name of what is packed
        self.refused = refused
        self.keep_devices = keep_devices
        self.lenient = lenient
        self.holes = holes

    def __call__(self, o, what='it'):
        "`o` as plain data; `what` is its name for a user. Raises `TypeError`."
        if type(o) in _PLAIN:
            return o
        if id(o) in self.open:
            return self._hole(o, what)  # a container that holds itself
        if not self.open:
            self.root = what
        self.open.add(id(o))
        try:
            return self._packed(o, what)
        except TypeError:  # something in it that has no place of its own, such as a key
            if self.holes is None:
                raise
            return self._hole(o, what)
        finally:
            self.open.discard(id(o))

    def _packed(self, o, what):
        if isinstance(o, torch.Tensor):
            return self._tensor(o, what)
        if type(o) is bytes:
            return 'bytes', torch.from_numpy(np.frombuffer(o, np.uint8).copy())
        if type(o) is dict or type(o) is defaultdict:
            return self._dict(o, what)
        if type(o) is list:
            return self._list(o, what)
        if type(o) is L and isinstance(o.items, list):
            return 'L', self._list(o.items, what)
        if type(o) is tuple:
            return 'tuple', self._values(o, what)
        if isinstance(o, np.ndarray | np.generic) and o.dtype.kind in 'biufc':
            return 'array' if isinstance(o, np.ndarray) else 'number', torch.from_numpy(np.array(o))
        if isinstance(o, enum.Enum):
            return 'enum', [class_name(type(o)), o.name]
        if isinstance(o, Path):
            return 'path', str(o)
        if isinstance(o, torch.Size):
            return 'size', list(o)
        if type(o) is torch.dtype:
            return 'dtype', str(o).removeprefix('torch.')
        if type(o) is torch.device:
            return 'device', str(o)
        if type(o) is complex:
            return 'complex', [o.real, o.imag]
        if type(o) is range:
            return 'range', [o.start, o.stop, o.step]
        if type(o) is deque:
            return 'deque', [self._values(o, what), o.maxlen]
        if type(o) in (set, frozenset):
            return type(o).__name__, self._whole(o, what)
        if type(o) in (OrderedDict, Counter):
            return type(o).__name__, self._items(o, what)
        if (memory := shared_memory(o)) is not None:
            return 'memory', torch.frombuffer(bytearray(memory), dtype=torch.uint8)
        return self._of_own_class(o, what)

    def _of_own_class(self, o, what):
        "What is data, and of a class of the user's: it goes back into an object of that class."
        name = class_name(type(o))
        if is_record(o):
            return 'record', [name, {k: self(v, f'{what}.{k}') for k, v in record_fields(o).items()}]
        if isinstance(o, tuple) and hasattr(o, '_fields'):
            return 'named', [name, self._values(o, what)]
        if isinstance(o, dict):
            return 'mapping', [name, self._items(o, what)]
        for kind, cls in _SEQUENCES.items():
            if isinstance(o, cls):
                return 'items', [name, self._values(cls.__iter__(o), what)]
        return self._hole(o, what)

    def _hole(self, o, what):
        if self.lenient:
            return str(o)
        if self.holes is not None:
            self.holes.append((what, o))
            return 'hole', class_name(type(o))
        place = what.removeprefix(self.root)
        raise TypeError(
            f'{self.root} keeps a {type(o).__module__}.{type(o).__qualname__}{place and f" at {place}"}, which a '
            'checkpoint cannot hold'
        )

    def _values(self, values, what):
        return [self(v, f'{what}[{i}]') for i, v in enumerate(values)]

    def _whole(self, values, what):
        "Values that have no place of their own, so that a hole among them could not be filled."
        holes = self.holes
        self.holes = None
        try:
            return self._values(values, what)
        finally:
            self.holes = holes

    def _dict(self, o, what):
        if all(type(k) in _PLAIN for k in o):
            return {k: self(v, f'{what}[{k!r}]') for k, v in o.items()}
        return 'dict', self._items(o, what)

    def _items(self, o, what):
        keys = self._whole(dict.keys(o), what)
        return [[k, self(v, f'{what}[{name!r}]')] for k, (name, v) in zip(keys, dict.items(o))]

    def _list(self, o, what):
        if len(o) > 1 and _are_scalars(o):
            # the losses of all steps
            return 'scalars', torch.stack([v.detach().as_subclass(torch.Tensor) for v in o]).cpu()
        if len(o) > 1 and _are_numbers(o):
            return 'numbers', self(np.array(o), what)
        return self._values(o, what)

    def _tensor(self, t, what):
        if id(t) not in self.copies:
            if t.data_ptr() in self.refused:
                return self._kept_elsewhere(t, what, 'a tensor of the model cannot be in a checkpoint on its own')
            if t.is_sparse or t.is_quantized or t.is_meta or isinstance(t, nn.parameter.UninitializedTensorMixin):
                return self._kept_elsewhere(t, what, f'a {t.layout} tensor cannot be in a checkpoint')
            plain = t.detach().as_subclass(torch.Tensor)
            self.copies[id(t)] = t, plain.cpu() if plain.device.type != 'cpu' else plain.clone()
        copy = self.copies[id(t)][1]
        return ('on', [str(t.device), copy]) if self.keep_devices and t.device.type != 'cpu' else copy

    def _kept_elsewhere(self, t, what, reason):
        if self.holes is None:
            raise TypeError(reason)
        return self._hole(t, what)


def _are_numbers(values) -> bool:
    "Are they all NumPy's, of one dtype?"
    kinds = {v.dtype if isinstance(v, np.generic) else None for v in values}
    return len(kinds) == 1 and None not in kinds and values[0].dtype.kind in 'biufc'


def _are_scalars(values) -> bool:
    are = all(isinstance(v, torch.Tensor) and v.dim() == 0 and not v.is_meta for v in values)
    return are and len({(v.dtype, v.device) for v in values}) == 1


_MISSING = object()  # nothing stands at that place


class Unpacker:
    """Turns plain data back into objects, where it can into those that are there: containers get
    their old contents, so that two that share one go on sharing it.

    Objects of a user's class are never made by its constructor. Their values go into the object
    that is there, if that is of the same class; dataclasses, named tuples and enums are made from a
    class that the program itself has loaded. What is neither is noted in `missing`.

    - `protected`: storage pointers of tensors that must not be written to.
    - `classes`: name -> class, beside those that are loaded.
    """

    def __init__(self, protected=(), classes=None):
        self.protected = protected
        self.classes = dict(classes or {})
        self.missing = []  # where something could not be made anew
        self.written = {}  # id of an object that was there -> itself and the plain data that it got

    def __call__(self, o, now=_MISSING, what='it'):
        "What `o` was; `now` is what stands in its place, `what` the name of that for a user."
        if isinstance(o, torch.Tensor):
            return self._into_tensor(o, now)
        if type(o) is dict:
            return self._mapping(dict, list(o.items()), o, now, what)
        if type(o) is list:
            return self._sequence(list, o, o, now, what)
        if type(o) is not tuple:
            return o
        tag, v = o
        method = getattr(self, f'_read_{tag}', None)
        if method is None:
            raise ValueError(f'unknown kind of data: {tag!r}')
        return method(v, o, now, what)

    # what is there and can be written to

    def _usable(self, now, packed) -> bool:
        """Can `now` take on `packed`? Not if it has got something else before: two that were one
        are two.
        """
        if id(now) in self.written:
            return equal(self.written[id(now)][1], packed)
        self.written[id(now)] = now, packed
        return True

    def _into_tensor(self, t, now):
        fits = type(now) is torch.Tensor and (now.shape, now.dtype, now.device) == (t.shape, t.dtype, t.device)
        if not fits or now.is_inference() or now.layout is not torch.strided or not self._usable(now, t):
            return t.clone()
        is_expanded = now.numel() > 1 and 0 in now.stride()
        if is_expanded or not now.is_leaf or now.untyped_storage().data_ptr() in self.protected:
            return t.clone()
        with torch.no_grad():
            return now.copy_(t)

    def _sequence(self, cls, values, packed, now, what):
        base = list(cls.__iter__(now)) if isinstance(now, list | deque) and isinstance(now, cls) else []
        made = [self(v, base[i] if i < len(base) else _MISSING, f'{what}[{i}]') for i, v in enumerate(values)]
        if type(now) is not cls or not self._usable(now, packed):
            return cls(made)
        return put_elements(now, made)

    def _mapping(self, cls, items, packed, now, what):
        is_same = isinstance(now, dict) and (type(now) is cls or type(now) is defaultdict and cls is dict)
        base = dict(dict.items(now)) if is_same else {}
        made = []
        for k, v in items:
            key = self(k)
            made.append((key, self(v, base.get(key, _MISSING), f'{what}[{key!r}]')))
        if not is_same or not self._usable(now, packed):
            return cls(dict(made) if cls is Counter else made)
        return put_elements(now, made)

    # tags

    def _read_dict(self, v, packed, now, what):
        return self._mapping(dict, v, packed, now, what)

    def _read_OrderedDict(self, v, packed, now, what):
        return self._mapping(OrderedDict, v, packed, now, what)

    def _read_Counter(self, v, packed, now, what):
        return self._mapping(Counter, v, packed, now, what)

    def _read_scalars(self, v, packed, now, what):
        return self._sequence(list, list(v.clone().unbind()), packed, now, what)

    def _read_numbers(self, v, packed, now, what):
        numbers = list(self(v))
        return put_elements(now, numbers) if type(now) is list and self._usable(now, packed) else numbers

    def _read_L(self, v, packed, now, what):
        if type(now) is L and isinstance(now.items, list) and self._usable(now, packed):
            now.items = self(v, now.items, what)
            return now
        return L(self(v, what=what))

    def _read_tuple(self, v, packed, now, what):
        base = now if type(now) is tuple and len(now) == len(v) else [_MISSING] * len(v)
        values = tuple(self(x, b, f'{what}[{i}]') for i, (x, b) in enumerate(zip(v, base)))
        return now if base is now and all(x is b for x, b in zip(values, now)) else values

    def _read_array(self, v, packed, now, what):
        value = v.clone().numpy()
        fits = type(now) is np.ndarray and (now.shape, now.dtype) == (value.shape, value.dtype) and now.flags.writeable
        if not fits or not self._usable(now, packed):
            return value
        now[...] = value
        return now

    def _read_number(self, v, packed, now, what):
        return v.numpy()[()]

    def _read_bytes(self, v, packed, now, what):
        return v.numpy().tobytes()

    def _read_path(self, v, packed, now, what):
        return Path(v)

    def _read_size(self, v, packed, now, what):
        return torch.Size(v)

    def _read_dtype(self, v, packed, now, what):
        dtype = getattr(torch, v, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f'unknown dtype: {v!r}')
        return dtype

    def _read_device(self, v, packed, now, what):
        return torch.device(v)

    def _read_complex(self, v, packed, now, what):
        return complex(*v)

    def _read_on(self, v, packed, now, what):
        device, t = v
        return t.to(device) if torch.device(device).type != 'cuda' or torch.cuda.is_available() else t.clone()

    def _read_deque(self, v, packed, now, what):
        values, maxlen = v
        if type(now) is deque and now.maxlen == maxlen:
            return self._sequence(deque, values, packed, now, what)
        return deque(self(values, what=what), maxlen)

    def _read_set(self, v, packed, now, what):
        values = [self(x) for x in v]
        return put_elements(now, values) if type(now) is set and self._usable(now, packed) else set(values)

    def _read_frozenset(self, v, packed, now, what):
        return frozenset(self(x) for x in v)

    def _read_range(self, v, packed, now, what):
        return range(*v)

    def _read_memory(self, v, packed, now, what):
        memory = shared_memory(now)
        if memory is None or len(memory) != len(v):
            return self._read_hole('', packed, now, what)
        memory[:] = v.numpy().tobytes()
        return now

    # objects of a user's class

    def _read_hole(self, v, packed, now, what):
        if now is _MISSING or class_name(type(now)) != v:
            self.missing.append(what)
        return None if now is _MISSING else now

    def _read_enum(self, v, packed, now, what):
        name, member = v
        cls = self._class(name, now, lambda c: issubclass(c, enum.Enum))
        if cls is None or member not in cls.__members__:
            return self._read_hole(name, packed, now, what)
        return cls.__members__[member]

    def _read_named(self, v, packed, now, what):
        name, values = v
        cls = self._class(name, now, lambda c: issubclass(c, tuple) and hasattr(c, '_fields'))
        if cls is None:
            return self._read_hole('', packed, now, what)
        base = now if type(now) is cls else [_MISSING] * len(values)
        return tuple.__new__(cls, [self(x, b, what) for x, b in zip(values, base)])

    def _read_record(self, v, packed, now, what):
        name, values = v
        cls = self._class(name, now, dataclasses.is_dataclass)
        if cls is None:
            return self._read_hole('', packed, now, what)
        is_there = type(now) is cls and not cls.__dataclass_params__.frozen and self._usable(now, packed)
        base = record_fields(now) if type(now) is cls else {}
        res = now if is_there else object.__new__(cls)
        for k, x in values.items():
            object.__setattr__(res, k, self(x, base.get(k, _MISSING), f'{what}.{k}'))
        return res

    def _read_mapping(self, v, packed, now, what):
        name, items = v
        if now is _MISSING or class_name(type(now)) != name or not isinstance(now, dict):
            return self._read_hole('', packed, now, what)
        base = dict(dict.items(now))
        made = []
        for k, x in items:
            key = self(k)
            made.append((key, self(x, base.get(key, _MISSING), f'{what}[{key!r}]')))
        return put_elements(now, made)

    def _read_items(self, v, packed, now, what):
        name, values = v
        if now is _MISSING or class_name(type(now)) != name or not isinstance(now, list | deque | set):
            return self._read_hole('', packed, now, what)
        base = [] if isinstance(now, set) else elements(now)
        made = [self(x, base[i] if i < len(base) else _MISSING, f'{what}[{i}]') for i, x in enumerate(values)]
        return put_elements(now, made)

    def _class(self, name, now, is_wanted):
        "The loaded class of that name, if it is of the wanted kind."
        known = [type(now), self.classes.get(name), _loaded_class(name)]
        return next((c for c in known if c is not None and class_name(c) == name and is_wanted(c)), None)


def _loaded_class(name):
    "The class of that name in a module that is loaded already; nothing is imported for it."
    module, _, qualname = name.partition(':')
    o = sys.modules.get(module)
    for part in qualname.split('.'):
        o = vars(o).get(part) if isinstance(o, type) or o is not None and hasattr(o, '__dict__') else None
    return o if isinstance(o, type) else None


def equal(a, b) -> bool:
    "Are two packed values the same?"
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
