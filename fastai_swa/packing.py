"""Python objects as plain data that `torch.load(weights_only=True)` reads, and back. A file never
names code that would be run or imported.

What torch reads by itself stays as it is, all else becomes a tuple of a tag and its content. So a
tuple is the sign of a tag, and has one itself.

    an object                                       is packed as

    None, bool, int, float, complex, str            itself
    torch.Size, torch.device                        itself
    tensor                                          a copy on the CPU, one for all that are the same
    tensor on a GPU, if devices are kept            ('on', [device, copy])
    list                                            list
    list of tensors that are numbers of one dtype   ('scalars', tensor), as the losses of all steps
    list of NumPy's numbers of one dtype            ('numbers', array, packed)
    dict, defaultdict with keys of the first rows   dict
    dict, defaultdict                               ('dict', pairs)
    OrderedDict, Counter                            ('OrderedDict', pairs), ('Counter', pairs)
    tuple                                           ('tuple', elements)
    set, frozenset                                  ('set', elements), ('frozenset', elements)
    deque                                           ('deque', [elements, maxlen])
    L                                               ('L', list, packed)
    array or number of NumPy's                      ('array', tensor), ('number', tensor)
    bytes                                           ('bytes', tensor): torch reads none that are empty
    Path, range                                     ('path', str), ('range', [start, stop, step])
    Path in the packer's folder                     ('below', its way from there)
    str that is an absolute path in that folder     ('text below', what follows that folder in it)
    torch.dtype                                     ('dtype', name): torch 2.6 does not read all
    a number or array that processes share          ('memory', tensor of its bytes)
    member of an enum                               ('enum', [class, name])
    instance of a dataclass                         ('record', [class, {name: value}])
    named tuple                                     ('named', [class, elements])
    of a subclass of dict                           ('mapping', [class, pairs])
    of a subclass of list, deque or set             ('items', [class, elements])
    anything else                                   ('hole', class), or refused

Containers have tags also where torch would read them: what they hold may be packed as a list, which
can be no key, nor be in a set. In files of earlier versions 'size', 'device' and 'complex' are tags
as well.
"""

import dataclasses
import enum
import os
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from fastcore.foundation import L
from torch import nn

from .contents import elements, is_record, put_elements, record_fields, shared_memory

__all__ = ['pack', 'unpack', 'Packer', 'Unpacker', 'class_name', 'equal', 'path_below', 'way_below']


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


# which tag an object gets

_PLAIN = (type(None), bool, int, float, complex, str, torch.Size, torch.device)

_OF_ONE_VALUE = {type(None), bool, int, float, complex, str}

_TAGS = {  # of this very class: objects of a subclass may hold more
    dict: 'dict',
    defaultdict: 'dict',
    OrderedDict: 'OrderedDict',
    Counter: 'Counter',
    tuple: 'tuple',
    set: 'set',
    frozenset: 'frozenset',
    deque: 'deque',
    bytes: 'bytes',
    range: 'range',
    torch.dtype: 'dtype',
}


def _tag(o) -> str | None:
    "The tag of what torch does not read by itself; `None`: it is no data."
    if type(o) in _TAGS:
        return _TAGS[type(o)]
    if type(o) is L and isinstance(o.items, list):
        return 'L'
    if isinstance(o, np.ndarray) and o.dtype.kind in _NUMBERS:
        return 'array'
    if isinstance(o, np.generic) and o.dtype.kind in _NUMBERS:
        return 'number'
    if isinstance(o, enum.Enum):
        return 'enum'
    if isinstance(o, Path):
        return 'path'
    if shared_memory(o) is not None:
        return 'memory'
    if is_record(o):
        return 'record'
    if isinstance(o, tuple) and hasattr(o, '_fields'):
        return 'named'
    if isinstance(o, dict):
        return 'mapping'
    if isinstance(o, list | deque | set):
        return 'items'
    return None


_NUMBERS = 'biufc'  # the kinds of NumPy's dtypes that torch has


# the two directions


class Packer:
    """Turns objects into plain data.

    - `refused`: data pointers of tensors that are kept elsewhere.
    - `keep_devices`: tensors go back to the devices that they are on.
    - `lenient`: strings for what is not plain data.
    - `holes`: a list; what is not plain data leaves a hole, which `Unpacker` fills with what it
      finds at that place, and (path, object) is appended to it. So does an absolute path: what lies
      there may have been moved when the data are read.
    - `folder`: paths in it are packed as the way from there, which leads to wherever it is then.
    """

    def __init__(self, refused=(), keep_devices=False, lenient=False, holes=None, folder=None):
        self.copies = {}  # id -> tensor and its copy; the tensor is kept, so that its id stays taken
        self.open = set()  # ids of the containers that are being packed
        self.root = 'it'  # the name of what is packed
        self.refused = refused
        self.keep_devices = keep_devices
        self.lenient = lenient
        self.holes = holes
        self.refuses_places = holes is not None
        self.folder = folder
        self.start = None if folder is None else str(Path(folder).absolute())  # of what is a path in it

    def __call__(self, o, what='it'):
        "`o` as plain data; `what` is its name for a user. Raises `TypeError`."
        if type(o) in _PLAIN:
            return self.plain(o)
        if id(o) in self.open:
            return self.hole(o, what)  # a container that holds itself
        if not self.open:
            self.root = what
        self.open.add(id(o))
        try:
            return self._packed(o, what)
        except TypeError:  # something in it that has no place of its own, such as a key
            if self.holes is None:
                raise
            return self.hole(o, what)
        finally:
            self.open.discard(id(o))

    def _packed(self, o, what):
        if isinstance(o, torch.Tensor):
            return _pack_tensor(self, o, what)
        if type(o) is list:
            return _pack_list(self, o, what)
        tag = _tag(o)
        if tag == 'path':
            return self.path(o, what)
        if tag is None:
            return self.hole(o, what)
        if tag == 'dict' and all(type(k) in _PLAIN and self.plain(k) is k for k in o):
            return {k: self(v, f'{what}[{k!r}]') for k, v in o.items()}
        if tag in _LEAVES:
            to_plain, _ = _LEAVES[tag]
            return tag, to_plain(o)
        to_plain, _ = _KINDS[tag]
        return tag, to_plain(self, o, what)

    def plain(self, o):
        "`o` itself, or the way to the file of the folder whose absolute path it is."
        if type(o) is not str or self.start is None or not o.startswith(self.start):
            return o
        rest = o.removeprefix(self.start).replace(os.sep, '/')
        return ('text below', rest) if rest[:1] in ('', '/') else o

    def path(self, o, what):
        way = way_below(self.folder, o)
        if way is not None:
            return 'below', way
        return self.hole(o, what) if self.refuses_places and o.is_absolute() else ('path', str(o))

    def hole(self, o, what):
        "What stands for an object that is no plain data. Raises `TypeError` if nothing may."
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

    def values(self, values, what) -> list:
        "Each of `values`, whose place is its number."
        return [self(v, f'{what}[{i}]') for i, v in enumerate(values)]

    def whole(self, values, what) -> list:
        "Values that have no place of their own, so that a hole among them could not be filled."
        holes = self.holes
        self.holes = None
        try:
            return self.values(values, what)
        finally:
            self.holes = holes

    def pairs(self, o, what) -> list:
        "The [key, value] of a dict."
        keys = self.whole(dict.keys(o), what)
        return [[k, self(v, f'{what}[{name!r}]')] for k, (name, v) in zip(keys, dict.items(o))]


_MISSING = object()  # nothing stands at that place


class Unpacker:
    """Turns plain data back into objects, where it can into those that are there: containers get
    their old contents, so that two that share one go on sharing it.

    Objects of a user's class are never made by its constructor. Their values go into the object
    that is there, if that is of the same class; dataclasses, named tuples and enums are made from a
    class that the program itself has loaded. What is neither is noted in `missing`.

    - `protected`: storage pointers of tensors that must not be written to.
    - `classes`: name -> class, beside those that are loaded.
    - `folder`: where what was packed as a way from a folder is now.
    """

    def __init__(self, protected=(), classes=None, folder=None):
        self.protected = protected
        self.folder = folder
        self.classes = dict(classes or {})
        self.missing = []  # where something could not be made anew
        self.written = {}  # id of an object that was there -> itself and the plain data that it got

    def __call__(self, o, now=_MISSING, what='it'):
        "What `o` was; `now` is what stands in its place, `what` the name of that for a user."
        if isinstance(o, torch.Tensor):
            return _read_tensor(self, o, now)
        if type(o) is dict:
            return self.mapping(list(o.items()), now, what, dict)
        if type(o) is list:
            return self.sequence(o, now, what, list)
        if type(o) is not tuple:
            return o
        tag, content = o
        if tag in _LEAVES:
            _, from_plain = _LEAVES[tag]
            return from_plain(content)
        if tag in _FORMER:
            return _FORMER[tag](content)
        if tag not in _KINDS:
            raise ValueError(f'unknown kind of data: {tag!r}')
        _, from_plain = _KINDS[tag]
        return from_plain(self, content, now, what)

    def may_write(self, now, content) -> bool:
        """Can `now` take on the packed `content`? Not if it has got something else before: two that
        were one are two.
        """
        if id(now) in self.written:
            return equal(self.written[id(now)][1], content)
        self.written[id(now)] = now, content
        return True

    def sequence(self, values, now, what, cls):
        "A list or deque of `values`, in `now` if that is one."
        base = elements(now) if isinstance(now, cls) else []
        made = self.values(values, base, what)
        return put_elements(now, made) if type(now) is cls and self.may_write(now, values) else cls(made)

    def values(self, values, base, what) -> list:
        "What `values` were; `base` is what stands in their places."
        return [self(v, base[i] if i < len(base) else _MISSING, f'{what}[{i}]') for i, v in enumerate(values)]

    def mapping(self, pairs, now, what, cls):
        "A dict of `pairs`, in `now` if that is one of its class."
        is_same = type(now) is cls or type(now) is defaultdict and cls is dict
        made = self.pairs(pairs, now if is_same else {}, what)
        if is_same and self.may_write(now, pairs):
            return put_elements(now, made)
        return cls(dict(made) if cls is Counter else made)

    def pairs(self, pairs, base, what) -> list:
        "What `pairs` were; the values of the dict `base` are what stands in their places."
        base = dict(dict.items(base))
        made = []
        for k, v in pairs:
            key = self(k)
            made.append((key, self(v, base.get(key, _MISSING), f'{what}[{key!r}]')))
        return made

    def lost(self, now, what):
        "What could not be made anew: what stands there stays."
        self.missing.append(what)
        return None if now is _MISSING else now

    def loaded(self, name, now, is_wanted):
        "The loaded class of that name, if it is of the wanted kind."
        known = [type(now), self.classes.get(name), _loaded_class(name)]
        return next((c for c in known if c is not None and class_name(c) == name and is_wanted(c)), None)


# tensors


def _pack_tensor(packer, t, what):
    if id(t) not in packer.copies:
        if t.data_ptr() in packer.refused:
            return _kept_elsewhere(packer, t, what, 'a tensor of the model cannot be in a checkpoint on its own')
        if t.is_sparse or t.is_quantized or t.is_meta or isinstance(t, nn.parameter.UninitializedTensorMixin):
            return _kept_elsewhere(packer, t, what, f'a {t.layout} tensor cannot be in a checkpoint')
        plain = t.detach().as_subclass(torch.Tensor)
        packer.copies[id(t)] = t, plain.cpu() if plain.device.type != 'cpu' else plain.clone()
    copy = packer.copies[id(t)][1]
    return ('on', [str(t.device), copy]) if packer.keep_devices and t.device.type != 'cpu' else copy


def _kept_elsewhere(packer, t, what, reason):
    if packer.holes is None:
        raise TypeError(reason)
    return packer.hole(t, what)


def _read_tensor(unpacker, t, now):
    fits = type(now) is torch.Tensor and (now.shape, now.dtype, now.device) == (t.shape, t.dtype, t.device)
    if not fits or now.is_inference() or now.layout is not torch.strided or not unpacker.may_write(now, t):
        return t.clone()
    is_expanded = now.numel() > 1 and 0 in now.stride()
    if is_expanded or not now.is_leaf or now.untyped_storage().data_ptr() in unpacker.protected:
        return t.clone()
    with torch.no_grad():
        return now.copy_(t)


def _read_on(unpacker, content, now, what):
    device, t = content
    return t.to(device) if torch.device(device).type != 'cuda' or torch.cuda.is_available() else t.clone()


# lists


def _pack_list(packer, o, what):
    if set(map(type, o)) <= _OF_ONE_VALUE:  # often, and long
        return list(o) if packer.start is None else list(map(packer.plain, o))
    if len(o) > 1 and _are_scalars(o):
        return 'scalars', torch.stack([v.detach().as_subclass(torch.Tensor) for v in o]).cpu()
    if len(o) > 1 and _are_numbers(o):
        return 'numbers', packer(np.array(o), what)
    return packer.values(o, what)


def _are_numbers(values) -> bool:
    "Are they all NumPy's, of one dtype?"
    kinds = {v.dtype if isinstance(v, np.generic) else None for v in values}
    return len(kinds) == 1 and None not in kinds and values[0].dtype.kind in _NUMBERS


def _are_scalars(values) -> bool:
    are = all(isinstance(v, torch.Tensor) and v.dim() == 0 and not v.is_meta for v in values)
    return are and len({(v.dtype, v.device) for v in values}) == 1


def _read_scalars(unpacker, t, now, what):
    return unpacker.sequence(list(t.clone().unbind()), now, what, list)


def _read_numbers(unpacker, content, now, what):
    numbers = list(unpacker(content))
    return put_elements(now, numbers) if type(now) is list and unpacker.may_write(now, content) else numbers


def _pack_L(packer, o, what):
    return _pack_list(packer, o.items, what)


def _read_L(unpacker, content, now, what):
    if type(now) is L and isinstance(now.items, list) and unpacker.may_write(now, content):
        now.items = unpacker(content, now.items, what)
        return now
    return L(unpacker(content, what=what))


# tuples, deques and sets; dicts: see `mapping` and `pairs`


def _read_tuple(unpacker, values, now, what):
    fits = type(now) is tuple and len(now) == len(values)
    made = tuple(unpacker.values(values, now if fits else (), what))
    return now if fits and all(x is b for x, b in zip(made, now)) else made


def _pack_deque(packer, o, what):
    return [packer.values(o, what), o.maxlen]


def _read_deque(unpacker, content, now, what):
    values, maxlen = content
    if type(now) is deque and now.maxlen == maxlen:
        return unpacker.sequence(values, now, what, deque)
    return deque(unpacker(values, what=what), maxlen)


def _read_set(unpacker, values, now, what):
    made = [unpacker(v) for v in values]
    return put_elements(now, made) if type(now) is set and unpacker.may_write(now, values) else set(made)


def _read_frozenset(unpacker, values, now, what):
    return frozenset(unpacker(v) for v in values)


# paths in a folder, which may lie elsewhere when they are read


def way_below(folder, path: Path) -> str | None:
    "The way from `folder` to `path`; `None` if that is elsewhere."
    if folder is None:
        return None
    base = Path(folder).absolute() if path.is_absolute() else Path(folder)
    try:
        return path.relative_to(base).as_posix()
    except ValueError:
        return None


def path_below(folder, way) -> Path | None:
    "The path of `way_below` again; `None` for one that leads out of the `folder`."
    parts = PurePosixPath(way).parts if isinstance(way, str) else ('..',)
    if folder is None or PurePosixPath(way).is_absolute() or '..' in parts or '\\' in way:
        return None
    return Path(folder).joinpath(*parts)


def _read_below(unpacker, way, now, what):
    path = path_below(unpacker.folder, way)
    return unpacker.lost(now, what) if path is None else path


def _read_text_below(unpacker, rest, now, what):
    is_rest = isinstance(rest, str) and rest[:1] in ('', '/')
    if not is_rest or path_below(unpacker.folder, rest[1:]) is None:
        return unpacker.lost(now, what)
    return str(Path(unpacker.folder).absolute()) + rest.replace('/', os.sep)


# arrays and shared memory


def _pack_array(packer, o, what):
    return torch.from_numpy(np.array(o))


def _read_array(unpacker, t, now, what):
    value = t.clone().numpy()
    fits = type(now) is np.ndarray and (now.shape, now.dtype) == (value.shape, value.dtype) and now.flags.writeable
    if not fits or not unpacker.may_write(now, t):
        return value
    now[...] = value
    return now


def _pack_memory(packer, o, what):
    return torch.frombuffer(bytearray(shared_memory(o)), dtype=torch.uint8)


def _read_memory(unpacker, t, now, what):
    memory = shared_memory(now)
    if memory is None or len(memory) != len(t):
        return unpacker.lost(now, what)
    memory[:] = t.numpy().tobytes()
    return now


# objects of a user's class


def _read_hole(unpacker, name, now, what):
    is_filled = now is not _MISSING and class_name(type(now)) == name
    return now if is_filled else unpacker.lost(now, what)


def _pack_enum(packer, o, what):
    return [class_name(type(o)), o.name]


def _read_enum(unpacker, content, now, what):
    name, member = content
    cls = unpacker.loaded(name, now, lambda c: issubclass(c, enum.Enum))
    if cls is None or member not in cls.__members__:
        return _read_hole(unpacker, name, now, what)
    return cls.__members__[member]


def _pack_record(packer, o, what):
    return [class_name(type(o)), {k: packer(v, f'{what}.{k}') for k, v in record_fields(o).items()}]


def _read_record(unpacker, content, now, what):
    name, values = content
    cls = unpacker.loaded(name, now, dataclasses.is_dataclass)
    if cls is None:
        return unpacker.lost(now, what)
    is_there = type(now) is cls and not cls.__dataclass_params__.frozen and unpacker.may_write(now, content)
    base = record_fields(now) if type(now) is cls else {}
    res = now if is_there else object.__new__(cls)
    for k, x in values.items():
        object.__setattr__(res, k, unpacker(x, base.get(k, _MISSING), f'{what}.{k}'))
    return res


def _pack_named(packer, o, what):
    return [class_name(type(o)), packer.values(o, what)]


def _read_named(unpacker, content, now, what):
    name, values = content
    cls = unpacker.loaded(name, now, lambda c: issubclass(c, tuple) and hasattr(c, '_fields'))
    if cls is None:
        return unpacker.lost(now, what)
    base = now if type(now) is cls else [_MISSING] * len(values)
    return tuple.__new__(cls, [unpacker(x, b, what) for x, b in zip(values, base)])


def _pack_mapping(packer, o, what):
    return [class_name(type(o)), packer.pairs(o, what)]


def _read_mapping(unpacker, content, now, what):
    name, pairs = content
    if now is _MISSING or class_name(type(now)) != name or not isinstance(now, dict):
        return unpacker.lost(now, what)
    return put_elements(now, unpacker.pairs(pairs, now, what))


def _pack_items(packer, o, what):
    return [class_name(type(o)), packer.values(elements(o), what)]


def _read_items(unpacker, content, now, what):
    name, values = content
    if now is _MISSING or class_name(type(now)) != name or not isinstance(now, list | deque | set):
        return unpacker.lost(now, what)
    base = [] if isinstance(now, set) else elements(now)
    return put_elements(now, unpacker.values(values, base, what))


def class_name(cls) -> str:
    "As a file names a class."
    return f'{cls.__module__}:{cls.__qualname__}'


def _loaded_class(name):
    "The class of that name in a module that is loaded already; nothing is imported for it."
    module, _, qualname = name.partition(':')
    o = sys.modules.get(module)
    for part in qualname.split('.'):
        o = vars(o).get(part) if isinstance(o, type) or o is not None and hasattr(o, '__dict__') else None
    return o if isinstance(o, type) else None


# tag -> how the content is made, and how the object of that again


def _dtype(name):
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f'unknown dtype: {name!r}')
    return dtype


_LEAVES = {
    'bytes': (lambda o: torch.from_numpy(np.frombuffer(o, np.uint8).copy()), lambda v: v.numpy().tobytes()),
    'number': (lambda o: torch.from_numpy(np.array(o)), lambda v: v.numpy()[()]),
    'path': (str, Path),  # `Packer.path`
    'range': (lambda o: [o.start, o.stop, o.step], lambda v: range(*v)),
    'dtype': (lambda o: str(o).removeprefix('torch.'), _dtype),
}

_FORMER = {  # of earlier files; today what torch reads by itself is packed as itself
    'size': torch.Size,
    'device': torch.device,
    'complex': lambda v: complex(*v),
}

# the same for what has parts, or is written to where it is; the first function takes packer, object and its name, the
# second unpacker, content, what stands in the place and its name
_KINDS = {
    'dict': (Packer.pairs, partial(Unpacker.mapping, cls=dict)),
    'OrderedDict': (Packer.pairs, partial(Unpacker.mapping, cls=OrderedDict)),
    'Counter': (Packer.pairs, partial(Unpacker.mapping, cls=Counter)),
    'tuple': (Packer.values, _read_tuple),
    'deque': (_pack_deque, _read_deque),
    'set': (Packer.whole, _read_set),
    'frozenset': (Packer.whole, _read_frozenset),
    'L': (_pack_L, _read_L),
    'scalars': (None, _read_scalars),  # `_pack_list` writes it
    'numbers': (None, _read_numbers),  # `_pack_list`
    'array': (_pack_array, _read_array),
    'memory': (_pack_memory, _read_memory),
    'on': (None, _read_on),  # `_pack_tensor`
    'below': (None, _read_below),  # `Packer.path`
    'text below': (None, _read_text_below),  # `Packer.plain`
    'enum': (_pack_enum, _read_enum),
    'record': (_pack_record, _read_record),
    'named': (_pack_named, _read_named),
    'mapping': (_pack_mapping, _read_mapping),
    'items': (_pack_items, _read_items),
    'hole': (None, _read_hole),  # `Packer.hole`
}


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
