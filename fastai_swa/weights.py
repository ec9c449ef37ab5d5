"""Files of weights and the index of a folder of them; loading them into a module. Plain PyTorch."""

import json
from pathlib import Path

import torch
from torch import nn

from .files import Lock, save_weights, write_text
from .modules import in_train_mode, plain_name, unwrap, written_in_train_mode
from .weight_formats import Left, check_any, read_any

__all__ = [
    'NoSolution',
    'check_weights_file',
    'folder_lock',
    'load_into',
    'read_index',
    'read_weights',
    'replace_files',
    'state_dict_in',
    'weights_of',
    'write_index',
]

_FORMAT = 'fastai_swa ensemble 1'


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
    if isinstance(found, dict) and (not found or _has_tensors(found)):
        weights = [found]
    elif isinstance(found, dict):
        weights = [found[k] for k in _NAMES if isinstance(found.get(k), dict) and _has_tensors(found[k])]
    else:
        weights = []
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


def _copied(value):
    "A tensor's copy; what else a state dict holds is the module's extra state."
    return value.detach().to('cpu', copy=True) if isinstance(value, torch.Tensor) else value


def load_into(module: nn.Module, weights, name: str = 'the dict') -> nn.Module:
    """`module` with the `weights`, a module, a state dict called `name`, or a path; where modes
    move weights, these are the ones in train mode.

    Names may have a `module.` in front, as `DataParallel` and `AveragedModel` give them. Of tied
    weights one will do. Raises `FileNotFoundError` or `ValueError`, naming it, if they do not serve.
    """
    own = module.state_dict(keep_vars=True)
    state = _with_ties(_without_wrapper(weights_of(weights, name), own), own)
    try:
        with written_in_train_mode(module):
            module.load_state_dict(state)
    except RuntimeError as e:
        name = weights if isinstance(weights, str | Path) else name
        fault = ' '.join(str(e).split())[:200]
        raise ValueError(f'{name} does not hold weights of this architecture: {fault}') from None
    return module


_WRAPPER = 'module.'


def _without_wrapper(state: dict, own: dict) -> dict:
    "`state` under the names in `own`, if a wrapper has put `module.` in front of them, and a counter beside."
    inner = {k.removeprefix(_WRAPPER): v for k, v in state.items() if k.startswith(_WRAPPER)}
    others = [k for k in state if not k.startswith(_WRAPPER) and k != 'n_averaged']
    is_models_own = any(k.startswith(_WRAPPER) for k in own) and inner.keys() != own.keys()
    return inner if inner and not others and not is_models_own else state


def _with_ties(state: dict, own: dict) -> dict:
    "`state` with the names it leaves out of tensors that are tied in `own`: safetensors has each tensor once."
    held = {id(own[name]): value for name, value in state.items() if name in own}
    missing = {k: held[id(t)] for k, t in own.items() if k not in state and id(t) in held}
    return {**state, **missing} if missing else state


def write_index(folder: Path, files: list[str], **content):
    """What `folder` holds, in one step: the names of its `files` of weights in their order, and
    plain `content`. Raises `OSError`."""
    write_text(folder / 'index.json', json.dumps({'format': _FORMAT, 'files': files, **content}, indent=1))


def read_index(folder: Path) -> dict:
    """What `write_index` wrote. Raises `FileNotFoundError` or `ValueError`, naming it, if it is
    missing or damaged.
    """
    file = folder / 'index.json'
    if not file.exists():
        raise FileNotFoundError(f'{folder} has no index.json: it is no folder of an ensemble')
    try:
        index = json.loads(file.read_text())
    except ValueError:
        index = None
    if not isinstance(index, dict) or index.get('format') != _FORMAT:
        raise ValueError(f'{file} is damaged, or it is no index of an ensemble')
    return index


def folder_lock(folder: Path) -> Lock:
    "Beside the folder, in which there are models alone; within it, where only that can be written."
    try:
        return Lock(folder.with_name(f'{folder.name}.snapshots'))
    except OSError:
        return Lock(folder / 'index.json')


def replace_files(folder: Path, weights: list[dict], **content) -> tuple[list[str], list[str]]:
    """Write `weights`, a file each, and their index with `content` into `folder`; what another index
    named there goes. Returns the names of the files that were there, and of those that are.

    The index comes last, in one step, and the files get other names than those it named until then:
    whatever happens, the folder holds what it held, or all that is new. Raises `OSError` if
    something cannot be written, `ValueError` if there is an index of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = read_index(folder)['files'] if (folder / 'index.json').exists() else []
    mark = '-b' if 'member-01.pth' in old else ''  # by turns
    files = [f'member-{i + 1:02}{mark}.pth' for i in range(len(weights))]
    try:
        for file, w in zip(files, weights):
            save_weights(folder / file, w)
        write_index(folder, files, **content)
    finally:
        is_written = (folder / 'index.json').exists() and read_index(folder)['files'] == files
        for file in old if is_written else files:
            if Path(file).name == file:  # of this folder
                (folder / file).unlink(missing_ok=True)
    return old, files
