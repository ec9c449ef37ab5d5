"""What is kept of a seed around whose solutions the loss surface is measured: what was measured on
what, and in which sessions."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..files import write_text
from ..landscape.surfaces import Surface
from .machine import hardware, installed_versions, now
from .record import first_difference
from .store import RUNS_FILE, has_types, read_begun, store, stored

__all__ = ['SurfaceRecord', 'read_surface_records', 'images_text']

_KEYS = {
    'recipe': str,
    'seed': int,
    'landscape': dict,
    'settings': dict,
    'images': dict,
    'solutions': list,
    'finished': str | None,
    'sessions': list,
}
_OF_SOLUTIONS = 'recipe', 'seed', 'budget', 'swa_start', 'settings', 'images'  # kept of their records


class SurfaceRecord:
    """What was measured on what, and in which sessions, as `data`: in seed-<seed>.landscape.json,
    and at the end in the file of the row.

    Raises `ValueError` if that is damaged, or what is there was measured otherwise.
    """

    def __init__(self, recipe, seed: int, out: Path, settings, images: dict, records: list[dict]):
        self.out = out
        self.seed = seed
        self.file = out / f'seed-{seed}.landscape.json'
        fixed = _what_is_measured(recipe, seed, settings, images, records)
        self.data = read_surface_records(out).get(seed)
        if self.data is None:
            self.data = {'kind': 'landscape', **fixed, 'finished': None, 'sessions': []}
        self._check(fixed)
        self.session = {
            'started': now(),
            'versions': installed_versions(),
            'hardware': hardware(settings.device),
            'threads': torch.get_num_threads(),
        }
        if self.data['finished']:
            self._clean_up()  # what a kill has left when it was stored
        else:
            self.data['sessions'].append(self.session)
            self._write()

    def _check(self, fixed):
        for k, v in fixed.items():
            was = self.data[k]
            if was != v:
                said = first_difference(was, v, k) if isinstance(v, dict) else f'other {k}'
                raise ValueError(
                    f'{self.out}: seed {self.seed} was measured with {said}: give the same, or another folder'
                )

    def end(self, watch, is_complete: bool):
        "The session is over: `watch` has counted its seconds and steps."
        self.session['seconds'] = round(watch.seconds, 1)
        self.session['steps'] = watch.steps
        if not is_complete:
            self._write()
            return
        self.data['finished'] = now()
        surfaces = {}
        for file in self._growing():
            what = file.name.split('.')[1]
            surfaces[what] = Surface.load(file).to_dict()
        store(self.out, self.data | {'surfaces': surfaces})
        self._clean_up()

    def _growing(self) -> list[Path]:
        "The files of the single measurements."
        return sorted(self.out.glob(f'seed-{self.seed}.*.jsonl'))

    def _clean_up(self):
        for file in (*self._growing(), self.file):
            file.unlink(missing_ok=True)

    def _write(self):
        write_text(self.file, json.dumps(self.data, indent=1) + '\n')


def _what_is_measured(recipe, seed, settings, images, records) -> dict:
    "What must be the same where a measurement goes on."
    landscape = asdict(recipe)
    for name in ('name', 'kind', 'base', 'level'):  # the level is the report's
        del landscape[name]
    solutions = []
    for record in records:
        solutions.append({name: record[name] for name in _OF_SOLUTIONS})
    return {
        'recipe': recipe.name,
        'seed': seed,
        'landscape': landscape,
        'settings': asdict(settings),
        'images': images,
        'solutions': solutions,
    }


def read_surface_records(folder: Path) -> dict[int, dict]:
    """Seed -> what was measured, for all in `folder`, complete (with its 'surfaces') or not. Raises
    `ValueError` if something is damaged.
    """
    begun = {}
    for file in folder.glob('seed-*.landscape.json'):
        data = read_begun(file, lambda data: has_types(data, _KEYS), 'note on a measurement')
        if data is not None:
            begun[data['seed']] = data | {'finished': None}  # complete is what is stored
    complete = stored(folder, 'landscape')
    for data in (*begun.values(), *complete.values()):
        if isinstance(data.get('landscape'), dict):
            data['landscape'].pop('level', None)  # as it was written once
    for seed, data in complete.items():
        if not has_types(data, _KEYS | {'surfaces': dict}):
            raise ValueError(f'{folder / RUNS_FILE} is damaged: seed {seed} is no measurement: move it away')
    return dict(sorted((begun | complete).items()))


def images_text(images: dict) -> str:
    return f'{images["train"]:,} + {images["valid"]:,} images of {images["kind"]} (SHA-256 {images["sha256"]}...)'
