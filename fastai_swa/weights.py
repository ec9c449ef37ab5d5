"""Files of weights and the index of a folder of them; loading them into a module. Plain PyTorch."""

import json
import zipfile
from pathlib import Path

import torch
from torch import nn

from .files import save_weights, write_text
from .modules import in_train_mode, plain_name, unwrap, written_in_train_mode

__all__ = [
    'NoSolution',
    'check_weights_file',
    'load_into',
    'read_index',
    'read_weights',
    'replace_files',
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
    """The state dict in `file`, on the CPU; no code in it is run. Raises `FileNotFoundError` or
    `ValueError`, naming it.
    """
    check_weights_file(file)
    try:
        weights = torch.load(file, map_location='cpu', weights_only=True)
    except Exception:
        raise ValueError(
            f'{file} holds more than weights, such as an optimizer: save them with learn.save(name, with_opt=False), '
            'or torch.save(model.state_dict(), file)'
        ) from None
    if isinstance(weights, dict):
        weights = weights.get('model', weights)
    if not isinstance(weights, dict):
        raise ValueError(f'{file} holds no state dict')
    return weights


def check_weights_file(file: Path):
    "Raise `FileNotFoundError` or `ValueError`, naming it, if `file` is missing or damaged."
    if not file.is_file():
        raise FileNotFoundError(f'{file} is missing')
    try:
        with zipfile.ZipFile(file) as z:
            damaged = z.testzip()  # torch.load does not look at the checksums
    except zipfile.BadZipFile:  # torch's format before 1.6, perhaps, which has none
        try:
            damaged = not isinstance(torch.load(file, map_location='cpu', weights_only=True), dict)
        except Exception:
            damaged = True
    if damaged:
        raise ValueError(f'{file} is damaged, or it holds no weights')


def weights_of(source) -> dict:
    """The state dict in a file, of a module, or one under plain names; on the CPU.

    Of a module it is a copy, of the weights as training has them, where its `eval()` moves them.
    """
    if isinstance(source, str | Path):
        return read_weights(Path(source))
    if isinstance(source, dict):
        return {plain_name(k): v for k, v in source.items()}
    with in_train_mode(source):
        return {k: _copied(v) for k, v in unwrap(source).state_dict().items()}


def _copied(value):
    "A tensor's copy; what else a state dict holds is the module's extra state."
    return value.detach().to('cpu', copy=True) if isinstance(value, torch.Tensor) else value


def load_into(module: nn.Module, weights, name: str = '') -> nn.Module:
    """`module` with the `weights`, a module, a state dict called `name`, or a path; where modes
    move weights, these are the ones in train mode.

    Raises `FileNotFoundError` or `ValueError`, naming it, if they do not serve.
    """
    state = weights_of(weights)
    try:
        with written_in_train_mode(module):
            module.load_state_dict(state)
    except RuntimeError as e:
        name = weights if isinstance(weights, str | Path) else name
        fault = ' '.join(str(e).split())[:200]
        raise ValueError(f'{name} does not hold weights of this architecture: {fault}') from None
    return module


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
