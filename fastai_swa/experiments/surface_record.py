"""What is kept of a seed around whose solutions the loss surface is measured: what was measured on
what, and in which sessions."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from ..files import write_text
from ..surfaces import Surface
from .machine import hardware, now, versions
from .record import difference
from .store import RUNS_FILE, store, stored

__all__ = ['SurfaceRecord', 'read_surface_records', 'images_text']


class SurfaceRecord:
    """What was measured on what, and in which sessions, as `data`: in seed-<seed>.landscape.json,
    and at the end in the file of the row.

    Raises `ValueError` if that is damaged, or what is there was measured otherwise.
    """

    def __init__(self, recipe, seed, out, settings, images, records):
        self.out, self.seed, self.file = out, seed, _note_file(out, seed)
        what = {k: v for k, v in asdict(recipe).items() if k not in ('name', 'kind', 'base')}
        solutions = [
            {k: r[k] for k in ('recipe', 'seed', 'budget', 'swa_start', 'settings', 'images')} for r in records
        ]
        fixed = {
            'recipe': recipe.name,
            'seed': seed,
            'landscape': what,
            'settings': asdict(settings),
            'images': images,
            'solutions': solutions,
        }
        self.data = read_surface_records(out).get(seed) or {
            'kind': 'landscape',
            **fixed,
            'finished': None,
            'sessions': [],
        }
        for k, v in fixed.items():
            if self.data[k] == v:
                continue
            said = difference(self.data[k], v, k) if isinstance(v, dict) else f'other {k}'
            raise ValueError(f'{out}: seed {seed} was measured with {said}: give the same, or another folder')
        self.session = {
            'started': now(),
            'versions': versions(),
            'hardware': hardware(settings.device),
            'threads': torch.get_num_threads(),
        }
        if self.data['finished']:
            self._clean_up()  # what a kill has left when it was stored
        else:
            self.data['sessions'].append(self.session)
            self._write()

    def end(self, watch, complete: bool):
        self.session |= {'seconds': round(watch.seconds, 1), 'steps': watch.steps}
        if not complete:
            return self._write()
        self.data['finished'] = now()
        surfaces = {f.name.split('.')[1]: Surface.load(f).to_dict() for f in self._growing()}
        store(self.out, self.data | {'surfaces': surfaces})
        self._clean_up()

    def _growing(self):
        return sorted(self.out.glob(f'seed-{self.seed}.*.jsonl'))

    def _clean_up(self):
        for file in (*self._growing(), self.file):
            file.unlink(missing_ok=True)

    def _write(self):
        write_text(self.file, json.dumps(self.data, indent=1) + '\n')


_KEYS = {'recipe', 'seed', 'landscape', 'settings', 'images', 'solutions', 'finished', 'sessions'}


def _note_file(out, seed):
    return out / f'seed-{seed}.landscape.json'


def read_surface_records(folder: Path) -> dict[int, dict]:
    """Seed -> what was measured, for all in `folder`, complete (with its 'surfaces') or not. Raises
    `ValueError` if something is damaged.
    """
    begun = {}
    for file in folder.glob('seed-*.landscape.json'):
        try:
            data = json.loads(file.read_text())
        except FileNotFoundError:
            continue  # it has just been stored
        except ValueError:
            data = None
        if not isinstance(data, dict) or not _KEYS <= data.keys():
            raise ValueError(f'{file} is damaged, or no note on a measurement: move it away')
        begun[data['seed']] = data | {'finished': None}  # complete is what is stored
    complete = stored(folder, 'landscape')
    for seed, data in complete.items():
        if not {*_KEYS, 'surfaces'} <= data.keys():
            raise ValueError(f'{folder / RUNS_FILE} is damaged: seed {seed} is no measurement: move it away')
    return dict(sorted((begun | complete).items()))


def images_text(images):
    return f'{images["train"]:,} + {images["valid"]:,} images of {images["kind"]} (SHA-256 {images["sha256"]}...)'
