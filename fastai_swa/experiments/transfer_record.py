"""What is kept of a seed of transfer learning: its stages, the rows of the report, the seconds."""

import json
from dataclasses import asdict
from pathlib import Path
from time import monotonic

from ..files import write_text
from .machine import hardware, installed_versions, now
from .record import first_difference
from .store import RUNS_FILE, has_types, read_begun, store, stored

__all__ = ['TransferRecord', 'read_transfers', 'what_is_fine_tuned', 'check_transfer']

_KIND = 'transfer'
_KEYS = {
    'recipe': str,
    'seed': int,
    'trained': dict,
    'settings': dict,
    'images': dict,
    'threads': int,
    'finished': str | None,
    'sessions': list,
    'stages': list,
    'seconds': dict,
    'rows': dict,
}


class TransferRecord:
    """What was done of a seed, as `data`: in seed-<seed>.transfer.json, and at the end in the file of the row.

    - 'stages': those that are complete; 'seconds': stage -> what it took, over all sessions.
    - 'rows': name -> set of images -> loss and metric.
    - what the stages add: 'runs', 'best', 'soups', 'wise'; see `measure_transfers`.

    Raises `ValueError` if that is damaged, or was run with other settings or data; `OSError` if it cannot be written.
    """

    def __init__(self, recipe, seed: int, out: Path, settings, images: dict, threads: int, jobs: int):
        self.out = out
        self.seed = seed
        self.file = out / f'seed-{seed}.transfer.json'
        fixed = what_is_fine_tuned(recipe, settings, images)
        self.data = read_transfers(out).get(seed)
        if self.data is None:
            self.data = {
                'kind': _KIND,
                **fixed,
                'seed': seed,
                'threads': threads,
                'finished': None,
                'sessions': [],
                'stages': [],
                'seconds': {},
                'rows': {},
            }
        check_transfer(self.data, out, fixed)
        if not self.data['finished']:
            session = {'started': now(), 'jobs': jobs, 'versions': installed_versions()}
            self.data['sessions'].append(session | {'hardware': hardware(settings.device)})
            self._write()
        self.stage = None  # under way
        self._since = 0.0  # when its seconds were counted last

    def begin(self, stage: str):
        self.stage = stage
        self._since = monotonic()

    def spent(self) -> float:
        "Count the seconds of the stage under way; returns those since they were counted last."
        seconds = monotonic() - self._since
        self._since += seconds
        of_stage = self.data['seconds'].get(self.stage, 0.0) + seconds
        self.data['seconds'][self.stage] = round(of_stage, 2)
        return seconds

    def epoch_is_over(self) -> float:
        "Returns its seconds."
        seconds = self.spent()
        self._write()
        return seconds

    def end(self, found: dict):
        "The stage under way is complete, and has `found` this; its 'rows' join those of the others."
        self.spent()
        self.data['rows'] |= found.pop('rows', {})
        self.data |= found
        self.data['stages'].append(self.stage)
        self._write()

    def finish(self):
        "All stages are complete."
        if not self.data['finished']:
            self.data['finished'] = now()
            store(self.out, self.data)
        self.file.unlink(missing_ok=True)  # there, too, if it was killed when it was stored

    def _write(self):
        write_text(self.file, json.dumps(self.data, indent=1) + '\n')


def what_is_fine_tuned(recipe, settings, images: dict) -> dict:
    "What all seeds in a folder have in common."
    return {
        'recipe': recipe.name,
        'trained': json.loads(json.dumps(recipe.described())),
        'settings': asdict(settings),
        'images': images,
    }


def check_transfer(data: dict, folder: Path, fixed: dict):
    "Raises `ValueError` if the record `data` of a seed in `folder` does not agree with what is `fixed`."
    for name, value in fixed.items():
        if data[name] != value:
            said = first_difference(data[name], value, name)
            raise ValueError(f'{folder}: seed {data["seed"]} was run with {said}: give the same, or another folder')


def read_transfers(folder: Path) -> dict[int, dict]:
    "Seed -> its record, for all in `folder`, complete or not. Raises `ValueError` if something is damaged."
    begun = {}
    for file in folder.glob('seed-*.transfer.json'):
        data = read_begun(file, lambda data: has_types(data, _KEYS), 'record of a seed')
        if data is not None:
            begun[data['seed']] = data
    complete = stored(folder, _KIND)
    for seed, data in complete.items():
        if not has_types(data, _KEYS):
            raise ValueError(f'{folder / RUNS_FILE} is damaged: seed {seed} is no transfer: move it away')
    return dict(sorted((begun | complete).items()))
