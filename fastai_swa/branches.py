"""What is done of a `fine_tune_soup`: the state in which its runs branch, and the runs that have ended.

In memory, or in a folder, with which it goes on after a crash.
"""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastai.learner import Learner

from .checkpoint import CheckpointCallback, forget_fits
from .files import InUse, Lock, parsed, read, save_weights, write, write_text
from .warn import warn
from .weights import ANCHOR, SOUP_INDEX, sha256, write_index

__all__ = ['Run', 'Branches', 'BranchesInFolder', 'opened']

_FORMAT = 'fastai_swa fine_tune_soup 1'
_BRANCH = 'branch.pth'


@dataclass(eq=False)
class Run:
    "A fine-tuning from the branch."

    base_lr: float
    seed: int | None = None
    values: dict = field(default_factory=dict)  # column -> value in its last epoch
    weights: dict | Path | None = None  # at its end; `None`: it has not ended, or not with finite ones
    sha256: str | None = None  # of the file of its weights, if there is one
    has_ended: bool = False

    @property
    def name(self) -> str:
        seed = '' if self.seed is None else f'-seed-{self.seed}'
        return f'lr-{self.base_lr!r}{seed}'


class Branches:
    "In memory."

    def __init__(self, runs: list[Run]):
        self.runs = runs
        # of the learner at the branch, as `state.take` gives it; `None`: the frozen stage has not ended
        self.state = None
        self.anchor = None  # its weights there
        self.errors = []  # what could not be written

    def checkpoint(self, learn: Learner, name: str, keep: Callable) -> list:
        "Callbacks that keep the fit of that name of `learn`; they call `keep` when it has come to its end, or nobody."
        return []

    def keep_branch(self, state: dict, weights: dict):
        self.state = state
        self.anchor = weights

    def keep_anchor(self, weights: dict):
        self.anchor = weights

    def keep_run(self, run: Run, weights: dict | None):
        "`weights`: `None` where they are not finite. What cannot be written is among the `errors`, and in memory."
        run.weights = weights
        run.has_ended = True

    def close(self, activation: str | None):
        "All runs have ended. `activation`: as for `Ensemble`."

    def release(self):
        "Nothing more is written."


class _Checkpoint(CheckpointCallback):
    "Keeps what a fit has come to before its checkpoint goes."

    def __init__(self, path, keep: Callable):
        super().__init__(path)
        self.keep = keep

    def _remove(self):
        self.keep()
        super()._remove()


class BranchesInFolder(Branches):
    """In a folder: soup.json says what is there, `branch.pth` is the state of the branch and `anchor.pth` its weights;
    each run has a file of its weights, and while it is under way a checkpoint.

    Raises `ValueError`, naming it, for a folder that holds something else, or a soup with other `settings`; `InUse`
    while another run writes there.
    """

    def __init__(self, runs: list[Run], folder: Path, settings: dict):
        super().__init__(runs)
        self.folder = folder
        self.settings = json.loads(json.dumps(settings))  # as they are when they are read again
        self.branch_sha256 = None  # `None`: the branch is not in a file
        self.others = []  # records of runs that ended in earlier calls, and are not wanted in this one
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f'folder {folder} cannot be made: {e}') from None
        try:
            self.lock = Lock(folder / SOUP_INDEX)
        except InUse:
            raise InUse(f'another run is writing to {folder}: wait for it, or give each a folder') from None
        try:
            self._take_over()
        except BaseException:
            self.release()
            raise

    def _take_over(self):
        "What is there already."
        file = self.folder / SOUP_INDEX
        if not file.exists():
            if (self.folder / 'index.json').exists():
                raise ValueError(f'folder {self.folder} holds the models of something else: give another one')
            return
        there = _content(file)
        for key in self.settings.keys() | there['settings'].keys():
            old, new = there['settings'].get(key), self.settings.get(key)
            if old != new:
                raise ValueError(
                    f'folder {self.folder} holds a soup with {key}={old!r}, not {new!r}: give another one, or remove it'
                )
        if there['branch'] is not None:
            if not self._is_whole(_BRANCH, there['branch']):
                raise ValueError(f'{self.folder / _BRANCH} is missing or damaged: give another folder, or remove it')
            self.state = read(self.folder / _BRANCH, 'fine_tune_soup', 1)['state']
            self.branch_sha256 = there['branch']
        wanted = {(run.base_lr, run.seed): run for run in self.runs}
        for record in there['runs']:
            run = wanted.get((record['base_lr'], record['seed']))
            if run is None:
                self.others.append(record)
            else:
                self._take_run(run, record)

    def _take_run(self, run: Run, record: dict):
        file = self.folder / f'{run.name}.pth'
        if record['sha256'] is not None:
            if not self._is_whole(file.name, record['sha256']):
                warn(f'{file} is missing or damaged: that run is trained again')
                return
            run.weights = file
            run.sha256 = record['sha256']
        run.values = record['values']
        run.has_ended = True

    def _is_whole(self, name: str, expected: str) -> bool:
        file = self.folder / name
        return file.is_file() and sha256(file) == expected

    def checkpoint(self, learn, name, keep):
        file = self.folder / f'{name}.ckpt'
        forget_fits(learn, file)  # it is one fit, however often it is begun in this session
        return [_Checkpoint(file, keep)]

    def keep_branch(self, state, weights):
        super().keep_branch(state, weights)
        with self._noted():
            write(self.folder / _BRANCH, 'fine_tune_soup', 1, {'state': state})
            self.branch_sha256 = sha256(self.folder / _BRANCH)
            self.keep_anchor(weights)
            self._write()

    def keep_anchor(self, weights: dict):
        "At the branch; raises `OSError`."
        save_weights(self.folder / ANCHOR, weights)
        self.anchor = self.folder / ANCHOR

    def keep_run(self, run, weights):
        super().keep_run(run, weights)
        with self._noted():
            if weights is not None:
                save_weights(self.folder / f'{run.name}.pth', weights)
                run.weights = self.folder / f'{run.name}.pth'
                run.sha256 = sha256(run.weights)
            self._write()

    @contextmanager
    def _noted(self):
        try:
            yield
        except OSError as e:
            self.errors.append(e)

    def _write(self):
        records = []
        for run in self.runs:
            if run.has_ended and not isinstance(run.weights, dict):
                record = {name: getattr(run, name) for name in ('base_lr', 'seed', 'sha256', 'values')}
                records.append(record)
        content = {
            'format': _FORMAT,
            'settings': self.settings,
            'branch': self.branch_sha256,
            'runs': [*records, *self.others],
        }
        write_text(self.folder / SOUP_INDEX, json.dumps(content, indent=1))

    def close(self, activation):
        "So that `Ensemble(folder, learn)` reads it."
        files = [run.weights.name for run in self.runs if isinstance(run.weights, Path)]
        anchor = {'anchor': ANCHOR, 'anchor_sha256': sha256(self.folder / ANCHOR)}
        write_index(self.folder, files, activation=activation, **anchor)

    def release(self):
        self.lock.release()


def _content(file: Path) -> dict:
    "Raises `ValueError` if it is no index of a soup."
    try:
        content = parsed(file.read_text())
        is_right = content['format'] == _FORMAT and isinstance(content['settings'], dict)
        for record in content['runs']:
            is_right = is_right and {'base_lr', 'seed', 'sha256', 'values'} <= record.keys()
            is_right = is_right and isinstance(record['values'], dict)
        is_right = is_right and (content['branch'] is None or isinstance(content['branch'], str))
    except (ValueError, TypeError, KeyError, AttributeError, IsADirectoryError):
        is_right = False
    if not is_right:
        raise ValueError(f'{file} is damaged, or it is no index of a fine_tune_soup')
    return content


def opened(runs: list[Run], folder, settings: dict) -> Branches:
    "In `folder`, or in memory for `None`."
    return Branches(runs) if folder is None else BranchesInFolder(runs, Path(folder).resolve(), settings)
