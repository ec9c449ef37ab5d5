"""What is done of a `fine_tune_soup`: the state in which its runs branch, and the runs that have ended.

In memory, or in a folder, with which it goes on after a crash.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import CheckpointCallback
from .files import InUse, Lock, parsed, read, save_weights, write, write_text
from .warn import warn
from .weights import sha256, write_index

__all__ = ['Run', 'Branches', 'BranchesInFolder', 'opened']

_FORMAT = 'fastai_swa fine_tune_soup 1'
_INDEX = 'soup.json'
_BRANCH = 'branch.pth'
_ANCHOR = 'anchor.pth'


@dataclass(eq=False)
class Run:
    "A fine-tuning from the branch."

    base_lr: float
    seed: int | None = None
    values: dict = field(default_factory=dict)  # column -> value in its last epoch
    weights: dict | Path | None = None  # at its end; `None`: it has not ended, or not with finite ones
    has_ended: bool = False

    @property
    def name(self) -> str:
        seed = '' if self.seed is None else f'-seed-{self.seed}'
        return f'lr-{self.base_lr:g}{seed}'


class Branches:
    "In memory."

    def __init__(self, runs: list[Run]):
        self.runs = runs
        self.state = (
            None  # of the learner at the branch, as `state.take` gives it; `None`: the frozen stage has not ended
        )
        self.anchor = None  # its weights there

    def checkpoint(self, name: str) -> list:
        "Callbacks that keep the fit of that name."
        return []

    def keep_branch(self, state: dict, weights: dict):
        self.state = state
        self.anchor = weights

    def keep_run(self, run: Run, weights: dict | None):
        "`weights`: `None` where they are not finite. What cannot be kept raises `OSError`, and is in memory then."
        run.weights = weights
        run.has_ended = True

    def close(self, activation: str | None):
        "All runs have ended. `activation`: as for `Ensemble`."

    def release(self):
        "Nothing more is written."


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
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ValueError(f'folder {folder} cannot be made: {e}') from None
        try:
            self.lock = Lock(folder / _INDEX)
        except InUse:
            raise InUse(f'another run is writing to {folder}: wait for it, or give each a folder') from None
        try:
            self._take_over()
        except BaseException:
            self.release()
            raise

    def _take_over(self):
        "What is there already."
        file = self.folder / _INDEX
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
            self._check(_BRANCH, there['branch'])
            self.state = read(self.folder / _BRANCH, 'fine_tune_soup', 1)['state']
            self.anchor = self.folder / _ANCHOR
        ended = {(record['base_lr'], record['seed']): record for record in there['runs']}
        for run in self.runs:
            record = ended.get((run.base_lr, run.seed))
            if record is None:
                continue
            if record['sha256'] is not None:
                try:
                    self._check(f'{run.name}.pth', record['sha256'])
                except ValueError as e:
                    warn(f'{e}: that run is trained again')
                    continue
                run.weights = self.folder / f'{run.name}.pth'
            run.values = record['values']
            run.has_ended = True

    def _check(self, name: str, expected: str):
        file = self.folder / name
        if not file.is_file() or sha256(file) != expected:
            raise ValueError(f'{file} is missing or damaged')

    def checkpoint(self, name):
        return [CheckpointCallback(self.folder / f'{name}.ckpt')]

    def keep_branch(self, state, weights):
        super().keep_branch(state, weights)
        write(self.folder / _BRANCH, 'fine_tune_soup', 1, {'state': state})
        save_weights(self.folder / _ANCHOR, weights)
        self.anchor = self.folder / _ANCHOR
        self._write()

    def keep_run(self, run, weights):
        super().keep_run(run, weights)
        if weights is not None:
            save_weights(self.folder / f'{run.name}.pth', weights)
            run.weights = self.folder / f'{run.name}.pth'
        self._write()

    def _write(self):
        records = []
        for run in self.runs:
            if run.has_ended and not isinstance(run.weights, dict):
                digest = None if run.weights is None else sha256(run.weights)
                records.append({'base_lr': run.base_lr, 'seed': run.seed, 'sha256': digest, 'values': run.values})
        branch = None if self.state is None else sha256(self.folder / _BRANCH)
        content = {'format': _FORMAT, 'settings': self.settings, 'branch': branch, 'runs': records}
        write_text(self.folder / _INDEX, json.dumps(content, indent=1))

    def close(self, activation):
        "So that `Ensemble(folder, learn)` reads it."
        files = [run.weights.name for run in self.runs if isinstance(run.weights, Path)]
        write_index(self.folder, files, activation=activation, anchor=_ANCHOR)

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
