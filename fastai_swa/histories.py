"""What only grows in a fit, as the losses of all its steps: written once, piece by piece, to a file beside the
checkpoint, so that a checkpoint does not cost more the longer the fit is.

The file has a line of JSON for each checkpoint: list -> [from where on it has new values, these]. A checkpoint names
how many bytes of the file are its own, and their SHA-256. Lines are only added: a run that is killed anywhere leaves a
checkpoint, and all that it names; what lies behind is cut off before the next line. No code in it is run.
"""

import base64
import hashlib
import io
import json
from dataclasses import dataclass
from operator import is_
from pathlib import Path

import numpy as np
import torch

from .files import append, parsed

__all__ = ['Histories', 'joined', 'TAG']

TAG = 'history'  # of what stands for a list in a checkpoint: (TAG, [its name, its length])
_LONG = 1000  # values: shorter lists that nobody promises to grow only are in the checkpoint itself


@dataclass
class _Written:
    "A list, as far as it is in the file."

    n: int  # values
    list: list = None  # itself; `None` after a resume, until the next checkpoint: it is what was read


@dataclass
class _Seen:
    "A list that may only grow, as it was."

    values: list
    versions: int  # of those that are tensors, all together

    def is_begin_of(self, values: list) -> bool:
        n = len(self.values)
        is_there = len(values) >= n and all(map(is_, self.values, values)) and _versions(self.values) == self.versions
        return is_there and _are_constant(values[:1] + values[n:])


class Histories:
    """The lists of a fit that only grow, and the `file` that they are in.

    - `file`: `None`: what is written elsewhere, by another process; nothing is kept here.
    """

    def __init__(self, file: Path | None):
        self.file = file
        self._n_bytes = 0  # of the file that are valid
        self._hash = hashlib.sha256()  # of these
        self._written = {}  # list's name -> `_Written`
        self._new = {}  # what the next line is made of: list's name -> (from where on, packed values, `_Written`)
        self._seen = {}  # name of a list that may only grow -> `_Seen`

    # writing

    def begin(self):
        "Another checkpoint is made: `cut` is called for each of its lists."
        self._new = {}

    def cut(self, name: str, values: list, pack) -> tuple:
        """What stands for the list `values` in the checkpoint; what is new in it, packed by `pack(list, name)`, is in
        the next line. Another list than the last time is written whole.
        """
        if self.file is None:
            return TAG, [name, len(values)]
        written = self._written.get(name, _Written(0))
        is_another = written.n > len(values) or written.list is not None and written.list is not values
        n = 0 if is_another else written.n
        if n < len(values) or is_another or name not in self._written:
            self._new[name] = n, pack(values[n:], name), _Written(len(values), values)
        return TAG, [name, len(values)]

    def cut_if_grown(self, name: str, values: list, pack) -> tuple | None:
        """The same for a list of which nobody knows whether it only grows, if it has until now; else `None`. Each
        value is compared by identity with what it was.
        """
        if len(values) < _LONG or name not in self._seen and not _are_constant(values):
            return None
        seen = self._seen.get(name)
        if seen is None or not seen.is_begin_of(values):
            self._seen[name] = _Seen(list(values), _versions(values))
            self._written.pop(name, None)
            return None
        if len(values) == len(seen.values) and name not in self._written:
            return None  # perhaps it is a setting
        new = values[len(seen.values) :]
        seen.values += new
        seen.versions += _versions(new)
        if name in self._written:
            self._written[name].list = values
        return self.cut(name, values, pack)

    def write(self) -> dict:
        "Add the line; what the checkpoint names. Raises `OSError`, and then nothing has changed."
        line = {name: [n, _to_json(packed)] for name, (n, packed, _) in self._new.items()}
        if line:
            data = (json.dumps(line, separators=(',', ':')) + '\n').encode()
            append(self.file, data, at=self._n_bytes)
            self._n_bytes += len(data)
            self._hash.update(data)
            self._written |= {name: written for name, (*_, written) in self._new.items()}
            self._new = {}
        return {'bytes': self._n_bytes, 'sha256': self._hash.hexdigest()}

    def write_anew(self):
        "The lists are others now: the next line has them whole."
        self._written = {}

    # reading

    def read(self, named: dict) -> dict:
        """List's name -> packed values, of a checkpoint that has `named` its part of the file; what is written next
        follows that. Raises `ValueError` if that part is not there as it was written.
        """
        n_bytes = named['bytes']
        data = b''
        if n_bytes:
            with open(self.file, 'rb') as f:
                data = f.read(n_bytes)
        self._hash = hashlib.sha256(data)
        if len(data) != n_bytes or self._hash.hexdigest() != named['sha256']:
            raise ValueError(f'{self.file} is damaged, or was exchanged')
        lists = {}
        for line in data.splitlines():
            for name, (n, content) in parsed(line).items():
                parts = lists.setdefault(name, [])
                if type(n) is not int:
                    raise ValueError(f'{n!r} is no number of values')
                if n == 0:
                    parts.clear()
                parts.append((n, _from_json(content)))
        res = {}
        for name, parts in lists.items():
            res[name] = _together(parts)
            self._written[name] = _Written(_length(res[name]))
        self._n_bytes = n_bytes
        return res


def joined(o, lists: dict):
    "The packed `o` of a checkpoint, in which `lists` stand again in their places. Raises `ValueError`."
    if type(o) is dict:
        return {k: joined(v, lists) for k, v in o.items()}
    if type(o) is not tuple or o[:1] != (TAG,):
        return o
    name, n = o[1]
    if name not in lists or _length(lists[name]) != n:
        raise ValueError(f'{name} does not have the {n} values that the checkpoint names')
    return lists[name]


_CONSTANT = {int, float, bool, str, type(None)}


def _are_constant(values) -> bool:
    "Are they numbers, strings, and tuples of these, or tensors that are single numbers?"
    kinds = set(map(type, values))
    if kinds and all(issubclass(kind, torch.Tensor) for kind in kinds):
        return all(t.dim() == 0 for t in values)
    parts = [part for value in values if type(value) is tuple for part in value]
    kinds = kinds - {tuple} | set(map(type, parts))
    return all(kind in _CONSTANT or issubclass(kind, np.generic) for kind in kinds)


def _versions(values) -> int:
    "Greater once one of the tensors among `values` was written to."
    return sum(v._version for v in values) if values and isinstance(values[0], torch.Tensor) else 0


# parts of packed lists


def _together(parts: list):
    "One packed list of (from where on, packed part)."
    tensors = [part[1] for _, part in parts if type(part) is tuple and part[0] == 'scalars']
    n = 0
    for begin, part in parts:
        if begin != n:
            raise ValueError(f'values from {begin} on follow on {n}')
        n += _length(part)
    if len(tensors) == len(parts) and len({t.dtype for t in tensors}) == 1:
        return 'scalars', torch.cat(tensors)
    res = []
    for _, part in parts:
        res += _elements(part)
    return res


def _elements(part) -> list:
    if type(part) is list:
        return part
    tag, content = part
    if tag == 'scalars':
        return list(content.unbind())
    if tag == 'numbers' and content[0] == 'array':
        return [('number', t) for t in content[1].unbind()]
    raise ValueError(f'no list: {tag!r}')


def _length(part) -> int:
    if type(part) is list:
        return len(part)
    tag, content = part
    return len(content) if tag == 'scalars' else len(content[1])


# packed data as JSON: a list of floats is their bytes, and what JSON does not have is a dict of one entry


def _to_json(o):
    if o is None or type(o) in (bool, int, float, str):
        return o
    if type(o) is list:
        if len(o) > 1 and set(map(type, o)) == {float}:
            return {'floats': _text(np.array(o, '<f8').tobytes())}
        return [_to_json(v) for v in o]
    if type(o) is tuple:
        return {'tuple': [_to_json(v) for v in o]}
    if type(o) is dict:
        return {'dict': [[_to_json(k), _to_json(v)] for k, v in o.items()]}
    if isinstance(o, torch.Tensor) and o.is_contiguous() and o.dtype in _DTYPES.values():
        data = o.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {'tensor': [str(o.dtype).removeprefix('torch.'), list(o.shape), _text(data)]}
    torch.save(o, f := io.BytesIO())
    return {'saved': _text(f.getvalue())}


def _from_json(o):
    if type(o) is list:
        return [_from_json(v) for v in o]
    if type(o) is not dict:
        return o
    [(kind, content)] = o.items()
    if kind == 'floats':
        return np.frombuffer(_bytes(content), '<f8').tolist()
    if kind == 'tuple':
        return tuple(_from_json(v) for v in content)
    if kind == 'dict':
        return {_from_json(k): _from_json(v) for k, v in content}
    if kind == 'tensor':
        dtype, shape, data = content
        data = bytearray(_bytes(data))
        return (torch.frombuffer(data, dtype=_DTYPES[dtype]) if data else torch.empty(0, dtype=_DTYPES[dtype])).reshape(
            shape
        )
    if kind == 'saved':
        return torch.load(io.BytesIO(_bytes(content)), map_location='cpu', weights_only=True)
    raise ValueError(f'unknown kind of data: {kind!r}')


_DTYPES = {name: getattr(torch, name) for name in 'float64 float32 float16 bfloat16 int64 int32 int16 int8'.split()}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
