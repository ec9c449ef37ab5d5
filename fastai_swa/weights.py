"""Files of weights and the index of a folder of them; loading them into a module. Plain PyTorch."""

import hashlib
import json
import math
import secrets
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from torch import nn

from .files import InUse, Lock, parsed, save_weights, write_text
from .modules import in_train_mode, plain_name, unwrap, written_in_train_mode
from .weight_formats import Left, check_any, read_any

__all__ = [
    'ANCHOR',
    'NoSolution',
    'SOUP_INDEX',
    'check_weights_file',
    'folder_lock',
    'indexed_files',
    'is_plain_name',
    'load_into',
    'named_as_in',
    'read_index',
    'read_weights',
    'refuse_nan',
    'replace_files',
    'sha256',
    'state_dict_in',
    'weights_of',
    'write_index',
]

_FORMAT = 'fastai_swa ensemble 1'
_INDEX = 'index.json'
SOUP_INDEX = 'soup.json'  # of a folder of `fine_tune_soup`
ANCHOR = 'anchor.pth'  # in the folder of an ensemble: the weights that its members come from


class NoSolution(ValueError):
    "There are no weights yet: who lacks them, and what is lacking, as in 'average', 'has averaged nothing yet'."

    def __init__(self, who, lack: str):
        super().__init__(who, lack)
        self.lack = lack

    def __str__(self):
        return ' '.join(map(str, self.args))


def read_weights(file: Path) -> dict:
    """The state dict in `file`, on the CPU; no code in it is run. It may stand alone, or beside what
    else a training keeps, as `learn.save` writes an optimizer: see `state_dict_in`. Raises
    `FileNotFoundError` or `ValueError`, naming it.
    """
    check_weights_file(file)
    try:
        found = read_any(file)
    except Exception:
        found = None
    return state_dict_in(found, file)


def check_weights_file(file: Path):
    "Raise `FileNotFoundError` or `ValueError`, naming it, if `file` is missing or damaged."
    if not file.is_file():
        raise FileNotFoundError(f'{file} is missing')
    try:
        check_any(file)
    except Exception:
        raise ValueError(f'{file} is damaged, or it holds no weights') from None


_NAMES = 'model', 'state_dict', 'model_state_dict'  # of weights in checkpoints: fastai's, Lightning's, PyTorch's


def state_dict_in(found, name) -> dict:
    """The state dict that `found` is, or holds under one of the names that checkpoints have for it.
    Raises `ValueError`, by `name`, for something else, or several.
    """
    weights = []
    if isinstance(found, dict):
        weights = [found[k] for k in _NAMES if isinstance(found.get(k), dict) and _has_tensors(found[k])]
        # looked at last: beside weights under a name there may be a tensor, as the best accuracy so far
        if not weights and (not found or _has_tensors(found)):
            weights = [found]
    if len(weights) > 1:
        raise ValueError(f'{name} holds several state dicts: give the one that is meant, by itself')
    if not weights or not all(isinstance(k, str) and not isinstance(v, Left) for k, v in weights[0].items()):
        raise ValueError(
            f'{name} holds no state dict: save one with learn.save(name), or torch.save(model.state_dict(), file)'
        )
    return weights[0]


def _has_tensors(o: dict) -> bool:
    return any(isinstance(v, torch.Tensor) for v in o.values())


def weights_of(source, name: str = 'the dict') -> dict:
    """The state dict in a file, of a module, or one called `name`, under plain names; on the CPU.

    Of a module it is a copy, of the weights as training has them, where its `eval()` moves them.
    """
    if isinstance(source, str | Path):
        return _plain(read_weights(Path(source)))
    if isinstance(source, dict):
        return _plain(state_dict_in(source, name))
    with in_train_mode(source):
        return {k: _copied(v) for k, v in unwrap(source).state_dict().items()}


def _plain(weights: dict) -> dict:
    "`weights` under plain names; the same dict, with what torch keeps beside it, where they are plain."
    if all(plain_name(k) == k for k in weights):
        return weights
    return {plain_name(k): v for k, v in weights.items()}


def refuse_nan(weights: dict, name):
    "Raise `ValueError`, by `name`, if there is a NaN in the `weights`: all that they predict would be one."
    for k, v in weights.items():
        if isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()):
            if (v.float() if v.element_size() == 1 else v).isnan().any():
                raise ValueError(f'{name} has a NaN in {k!r}: it cannot predict')


def _copied(value):
    "A tensor's copy; what else a state dict holds is the module's extra state."
    return value.detach().to('cpu', copy=True) if isinstance(value, torch.Tensor) else value


def load_into(module: nn.Module, weights, name: str = 'the dict') -> nn.Module:
    """`module` with the `weights`, a module, a state dict called `name`, or a path; where modes
    move weights, these are the ones in train mode.

    Names may have a `module.` in front, as `DataParallel` and `AveragedModel` give them, or what
    else a training has the model as, such as `model.`. Of tied weights one will do.

    Raises `FileNotFoundError` or `ValueError`, naming it, if they do not serve.
    """
    own = module.state_dict(keep_vars=True)
    state = named_as_in(own, weights_of(weights, name))
    try:
        with written_in_train_mode(module):
            module.load_state_dict(state)
    except RuntimeError as e:
        name = weights if isinstance(weights, str | Path) else name
        fault = ' '.join(str(e).split())[:200]
        raise ValueError(f'{name} does not hold weights of this architecture: {fault}') from None
    return module


_COUNTER = 'n_averaged'  # of `AveragedModel`, beside the weights


def named_as_in(own: dict, state: dict) -> dict:
    """`state` under the names in `own`, a module's `state_dict(keep_vars=True)`: without what a wrapper may have put in
    front of all of them, and perhaps a counter beside; of tied weights one will do.
    """
    return _with_ties(_without_wrapper(state, own), own)


def _without_wrapper(state: dict, own: dict) -> dict:
    "`state` without the first part of its names, if that is one and the same, and none is known with it."
    inner = {k: v for k, v in state.items() if k != _COUNTER}
    wrapper = next(iter(inner), '').partition('.')[0] + '.'
    if not all(k.startswith(wrapper) for k in inner):
        return state
    is_known = bool(inner.keys() & own.keys())
    inner = {k.removeprefix(wrapper): v for k, v in inner.items()}
    return inner if inner.keys() == own.keys() or not is_known else state


def _with_ties(state: dict, own: dict) -> dict:
    "`state` with the names it leaves out of tensors that are tied in `own`: safetensors has each tensor once."
    held = {id(own[name]): value for name, value in state.items() if name in own}
    missing = {k: held[id(t)] for k, t in own.items() if k not in state and id(t) in held}
    return {**state, **missing} if missing else state


# a folder of files of weights, and its index


def write_index(folder: Path, files: list[str], unchanged=(), **content):
    """What `folder` holds, in one step: the names of its `files` of weights in their order, the SHA-256
    of each, and plain `content`.

    - `unchanged`: the names of files that have not been written since the index that lies there, which
      has theirs; all others are read.

    Raises `OSError` if it cannot be done, `ValueError` for a number in `content` that is not finite.
    """
    known = _known_hashes(folder) if unchanged else {}
    hashes = [known[file] if file in unchanged and file in known else sha256(folder / file) for file in files]
    index = {'format': _FORMAT, 'files': files, 'sha256': hashes, **content}
    try:
        text = json.dumps(index, indent=1, allow_nan=False)
    except ValueError:
        raise ValueError(f'{folder} is not written: its index would hold numbers that are not finite') from None
    write_text(folder / _INDEX, text)


def _known_hashes(folder: Path) -> dict:
    try:
        index = read_index(folder)
    except (FileNotFoundError, ValueError):
        return {}
    return dict(zip(index['files'], index.get('sha256', [])))


def sha256(file: Path) -> str:
    "Of what is in `file`, in hexadecimal digits."
    res = hashlib.sha256()
    with open(file, 'rb') as f:
        while chunk := f.read(1 << 20):
            res.update(chunk)
    return res.hexdigest()


def read_index(folder: Path) -> dict:
    """What `write_index` wrote. Raises `FileNotFoundError` or `ValueError`, naming it, if it is
    missing or damaged, or names what is no file of the folder.
    """
    file = folder / _INDEX
    if not file.exists():
        raise FileNotFoundError(f'{folder} has no {_INDEX}: it is no folder of an ensemble')
    try:
        index = parsed(file.read_text(), only_finite=True)
        is_right = _is_index(index)
    except (ValueError, IsADirectoryError):
        is_right = False
    if not is_right:
        raise ValueError(f'{file} is damaged, or it is no index of an ensemble')
    seen = set()
    for name in index['files']:
        if not is_plain_name(name):
            raise ValueError(f'{file} names {name!r}, which is no file of its own folder')
        if name in seen:
            raise ValueError(f'{file} names {name!r} twice')
        seen.add(name)
    return index


def _is_index(o) -> bool:
    "Is `o` as `write_index` has it? One of an earlier version has no SHA-256."
    if not isinstance(o, dict) or o.get('format') != _FORMAT or not _is_list(o.get('files'), str):
        return False
    if o.get('combine') not in (None, 'mean', 'vote', 'stack'):
        return False
    if o.get('activation') not in (None, 'softmax', 'sigmoid', 'none'):
        return False
    hashes = o.get('sha256', [''] * len(o['files']))
    if not _is_list(hashes, str) or len(hashes) != len(o['files']) or not _is_list(o.get('epochs', []), int):
        return False
    if o.get('stacking') is None:
        return o.get('combine') != 'stack'
    return _is_stacking(o['stacking'], len(o['files']))


def _is_list(o, cls) -> bool:
    return isinstance(o, list) and all(type(x) is cls for x in o)


def _is_stacking(o, n_members: int) -> bool:
    "Are these weights for `n_members`, a row and a bias for each output?"
    if not isinstance(o, dict) or not isinstance(o.get('weights'), list) or not isinstance(o.get('bias'), list):
        return False
    rows = [*o['weights'], o['bias']]
    if not all(isinstance(row, list) and all(_is_finite(x) for x in row) for row in rows):
        return False
    n_outputs = len(o['bias'])
    return n_outputs == len(o['weights']) > 0 and all(len(row) == n_members * n_outputs for row in o['weights'])


def _is_finite(x) -> bool:
    return type(x) in (int, float) and math.isfinite(x)


def is_plain_name(name: str) -> bool:
    "Is `name` one of a file, of the folder that it is looked up in, on any system?"
    is_alone = PurePosixPath(name).name == name == PureWindowsPath(name).name
    return is_alone and name not in ('', '.', '..', _INDEX) and '\0' not in name


def indexed_files(folder: Path, index: dict) -> list[Path]:
    """The files that the `index` of `folder` names, in their order. Raises `FileNotFoundError` or
    `ValueError`, naming it, for one that is missing, or whose SHA-256 is not that in the index.

    An index of an earlier version has no SHA-256. There it cannot be told whether files were swapped.
    """
    files = [folder / name for name in index['files']]
    for file, expected in zip(files, index.get('sha256', [])):
        if not file.is_file():
            raise FileNotFoundError(f'{file} is missing')
        if sha256(file) != expected:
            raise ValueError(f'{file} is damaged, or it is another file than {_INDEX} names (its SHA-256 differs)')
    return files


def folder_lock(folder: Path) -> Lock:
    "Beside the folder, in which there are models alone; within it, where only that can be written."
    try:
        return Lock(folder.with_name(f'{folder.name}.snapshots'))
    except OSError:
        return Lock(folder / _INDEX)


def replace_files(folder: Path, weights: list[dict], **content) -> tuple[list[str], list[str]]:
    """Write `weights`, a file each, and their index with `content` into `folder`; what another index
    named there goes. Returns the names of the files that were there, and of those that are.

    The index comes last, in one step, and no file that is there is written to: whatever happens, the
    folder holds what it held, or all that is new. (Killed, it may hold files besides that no index
    names.) Raises `OSError` if something cannot be written, `ValueError` if there is an index of
    something else, `InUse`, a `RuntimeError`, if another run is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = folder_lock(folder)
    except InUse:
        raise InUse(f'another run is writing to {folder}: wait for it, or save to another folder') from None
    try:
        return _replace_files(folder, weights, content)
    finally:
        lock.release()


def _replace_files(folder, weights, content):
    old = read_index(folder)['files'] if (folder / _INDEX).exists() else []
    files = _new_names(folder, len(weights))
    try:
        for file, w in zip(files, weights):
            save_weights(folder / file, w)
        write_index(folder, files, **content)
    finally:
        is_written = (folder / _INDEX).exists() and read_index(folder)['files'] == files
        for file in old if is_written else files:
            (folder / file).unlink(missing_ok=True)
    return old, files


def _new_names(folder: Path, n: int) -> list[str]:
    "Names for `n` files, in a folder that has an index such as no file has had there: a reader may be late."
    names = [f'member-{i + 1:02}' for i in range(n)]
    if (folder / _INDEX).exists() or any((folder / f'{name}.pth').exists() for name in names):
        mark = secrets.token_hex(4)
        names = [f'{name}-{mark}' for name in names]
    return [f'{name}.pth' for name in names]
