"""What files of weights hold, as `torch.save` and safetensors write them; no code in them is run. Plain PyTorch."""

import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch

from .files import check_zip, parsed

__all__ = ['Left', 'read_any', 'check_any', 'is_safetensors']


def read_any(file: Path):
    """What `file` holds, its tensors on the CPU. What is neither a tensor nor plain data, such as an
    optimizer's own objects, is `Left` out of it. Raises an exception of any kind if it cannot be read.
    """
    if is_safetensors(file):
        return read_safetensors(file)
    try:
        return torch.load(file, map_location='cpu', weights_only=True)
    except Exception:
        if not zipfile.is_zipfile(file):
            raise
    return read_zip(file)


def check_any(file: Path):
    "Raise an exception of any kind if `file` is damaged, as far as its format tells; tensors of a zip are not made."
    if is_safetensors(file):
        with open(file, 'rb') as f:
            _entries(f, file.stat().st_size)
    elif not zipfile.is_zipfile(file):  # torch's format before 1.6, perhaps, which has no checksums
        torch.load(file, map_location='cpu', weights_only=True)
    else:
        check_zip(file)


# torch.save


class Left:
    """In the place of an object, or of its class, that is neither a tensor nor plain data: takes what the
    file says of it, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return Left()

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def add(self, value):
        pass


# classes, not functions: a file can set attributes of what it names, unless that has `__setstate__`


class _Tensor(Left):
    "As `torch._utils._rebuild_tensor_v2`, with bounds checked by `as_strided`."

    def __new__(cls, storage, offset, size, stride, *more):
        return torch.as_strided(storage, size, stride, offset)


class _Parameter(Left):
    "As `torch._utils._rebuild_parameter`: its tensor."

    def __new__(cls, data, *more):
        return data


_KNOWN = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('torch._utils', '_rebuild_tensor'): _Tensor,
    ('torch._utils', '_rebuild_tensor_v2'): _Tensor,
    ('torch._utils', '_rebuild_parameter'): _Parameter,
    ('torch._utils', '_rebuild_parameter_with_state'): _Parameter,
}

_STORAGES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
    'ComplexFloatStorage': torch.complex64,
    'ComplexDoubleStorage': torch.complex128,
}


def read_zip(file: Path):
    "What `torch.save` wrote, of any objects: tensors and plain data are read, all else is `Left`."
    with zipfile.ZipFile(file) as z:
        return _Reader(z).load()


class _Reader(pickle.Unpickler):
    "Gives for what a file names what `_KNOWN` has, for storages their types, and for all else `Left`: never the thing."

    def __init__(self, z: zipfile.ZipFile):
        name = next(name for name in z.namelist() if name.count('/') == 1 and name.endswith('/data.pkl'))
        self.folder = name.removesuffix('data.pkl')
        self.zip = z
        self.storages = {}  # key -> tensor of one dimension
        order = f'{self.folder}byteorder'
        if order in z.namelist() and z.read(order).decode() != sys.byteorder:
            raise ValueError('it was written on a machine with another order of bytes')
        super().__init__(BytesIO(z.read(name)))

    def find_class(self, module, name):
        if module == 'torch' and name in _STORAGES:
            return _STORAGES[name]
        return _KNOWN.get((module, name), Left)

    def persistent_load(self, reference):
        _, dtype, key, _, n = reference
        if key not in self.storages:
            data = bytearray(self.zip.read(f'{self.folder}data/{key}'))
            self.storages[key] = _tensor(data, dtype, [n])
        return self.storages[key]


def _tensor(data: bytearray, dtype: torch.dtype, shape: list) -> torch.Tensor:
    "A tensor over `data`, which it keeps."
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=math.prod(shape)).view(shape)


# safetensors: eight bytes with the length of a header; the header, in JSON; the tensors, one after the other

_DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'F8_E4M3': torch.float8_e4m3fn,
    'F8_E5M2': torch.float8_e5m2,
    'C64': torch.complex64,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U64': torch.uint64,
    'U32': torch.uint32,
    'U16': torch.uint16,
    'U8': torch.uint8,
    'BOOL': torch.bool,
}
_LONGEST_HEADER = 100_000_000  # bytes, as the format has it


@dataclass
class _Entry:
    "A tensor in a file of safetensors."

    name: str
    dtype: torch.dtype
    shape: list
    begin: int  # of its bytes, after the header
    end: int


def is_safetensors(file: Path) -> bool:
    "Does `file` begin as one of safetensors does, or is it called so?"
    with open(file, 'rb') as f:
        start = f.read(9)
    n = int.from_bytes(start[:8], 'little')
    return file.suffix == '.safetensors' or start[8:] == b'{' and n < _LONGEST_HEADER


def read_safetensors(file: Path) -> dict:
    "Name -> tensor. Raises `ValueError` for a file whose header is not one, or does not fit its size."
    with open(file, 'rb') as f:
        entries = _entries(f, file.stat().st_size)
        start = f.tell()
        weights = {}
        for entry in entries:
            f.seek(start + entry.begin)
            weights[entry.name] = _tensor(bytearray(f.read(entry.end - entry.begin)), entry.dtype, entry.shape)
    return weights


def _entries(f, size: int) -> list[_Entry]:
    "What the header of the open file `f` of `size` bytes says; `f` stands behind it then."
    n = int.from_bytes(f.read(8), 'little')
    if n > min(size - 8, _LONGEST_HEADER):
        raise ValueError('its header is cut off')
    try:
        header = parsed(f.read(n))
        header.pop('__metadata__', None)
        entries = [_entry(name, said) for name, said in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError('its header is damaged') from None
    at = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != at or entry.end - at != math.prod(entry.shape) * entry.dtype.itemsize:
            raise ValueError(f'{entry.name!r} does not lie where its shape says')
        at = entry.end
    if at != size - 8 - n:
        raise ValueError('its tensors are cut off, or something follows them')
    return entries


def _entry(name: str, said: dict) -> _Entry:
    begin, end = said['data_offsets']
    numbers = [begin, end, *said['shape']]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError
    return _Entry(name, _DTYPES[said['dtype']], said['shape'], begin, end)
