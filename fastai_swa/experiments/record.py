"""What is kept of a seed: its record, the states at its forks, its weights."""

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import monotonic

from ..files import read, save_weights, write, write_text
from ..modules import unwrap
from ..state import take
from .machine import hardware, now, versions
from .recipes import described, parts, runs
from .store import RUNS_FILE, shortest, store, stored

__all__ = [
    'Settings',
    'Record',
    'what_is_run',
    'read_records',
    'find_record',
    'check_record',
    'weights_file',
    'snapshots_folder',
    'json_number',
    'seconds_text',
    'difference',
    'duration',
]


@dataclass(frozen=True)
class Settings:
    """What the numbers of a run depend on, besides recipe, data and seed. A seed goes on with the
    same settings only.
    """

    scale: float = 1.0  # multiplies all lengths
    images: int | None = None  # training images; None: as many as the recipe says
    test_images: int | None = None  # None: all
    device: str = 'cpu'
    precision: str = 'fp32'  # or 'bf16': autocast, with float32 weights
    # a mode of torch.compile: 'default', 'reduce-overhead' (captured steps), 'max-autotune'
    compile: str | None = None
    deterministic: bool = False  # only GPU kernels that give the same result each time


class Record:
    """A seed's record, as `data`: what was run, on what, and each epoch of each part.

    Until the seed is complete it stands in seed-<seed>.json, then in the file of the row. Raises
    `ValueError` if that is damaged, or was run with other settings or data; `OSError` if it cannot
    be written.
    """

    def __init__(self, recipe, seed: int, out: Path, settings: Settings, images: dict, threads: int, jobs: int = 1):
        self.recipe, self.seed, self.out, self.settings = recipe, seed, out, settings
        self.parts, self.number = parts(runs(recipe)), 0  # the number of the part in training
        fixed = what_is_run(recipe, settings, images) | {'seed': seed}
        self.data = find_record(out, seed)
        if self.data is not None:
            check_record(self.data, out, fixed)
            there = [(p['runs'], p['begin'], p['end']) for p in self.data['parts']]
            if there != [([r.name for r in p.runs], p.begin, p.end) for p in self.parts]:
                raise ValueError(f'{out}: seed {seed} was run with other runs of {recipe.name}: give another folder')
        else:
            # what an earlier run has left whose record is gone
            for file in (*out.glob(f'seed-{seed}.part*.ckpt'), *out.glob(f'seed-{seed}.fork*')):
                file.unlink()
            self.data = {
                'kind': 'training',
                **fixed,
                'threads': threads,
                'started': now(),
                'finished': None,
                'sessions': [],
                'parts': [
                    {'runs': [r.name for r in p.runs], 'begin': p.begin, 'end': p.end, 'done': False, 'epochs': []}
                    for p in self.parts
                ],
            }
        if self.data['finished']:
            if self.file('json').exists():
                self._save()  # it was killed when it was stored
        else:
            self.data['sessions'].append(
                {'started': now(), 'jobs': jobs, 'versions': versions(), 'hardware': hardware(settings.device)}
            )
            self._save()
        self.clock = _Clock(self)

    def file(self, ending) -> Path:
        return self.out / f'seed-{self.seed}.{ending}'

    def folder(self, run: str) -> Path:
        return snapshots_folder(self.out, self.seed, run)

    def _save(self):
        if not self.data['finished']:
            return write_text(self.file('json'), _as_json(self.data))
        store(self.out, self.data)
        self.file('json').unlink(missing_ok=True)

    def is_done(self, number) -> bool:
        return self.data['parts'][number]['done']

    def next(self):
        """The number of the part to be trained next and the state it begins in, `None` for none;
        `None` if all are done.

        A part whose end is needed and cannot be read is to be trained again.
        """
        todo = [i for i in range(len(self.parts)) if not self.is_done(i)]
        if not todo:
            return None
        self.number = todo[0]
        while (parent := self.parts[self.number].parent) is not None:
            try:
                return self.number, read(self.file(f'fork{parent}'), 'fork', 1)['state']
            except (ValueError, FileNotFoundError):
                self.data['parts'][parent] |= {'done': False, 'epochs': []}
                self.number = parent
        return self.number, None

    def epoch_is_over(self, rows):
        self.data['parts'][self.number]['epochs'] = list(map(_cells, rows))
        with suppress(OSError):
            self._save()  # a full disk stops nothing here; the checkpoint has the rows too

    def part_is_over(self, rows, learn, swa_model):
        """Everything that other parts and later questions need is written before the part counts as
        done.
        """
        part, data = self.parts[self.number], self.data['parts'][self.number]
        if part.is_last:
            self._save_weights(learn.model, part.runs[0].name)
            # `None`: nothing finite
            if part.runs[0].name == 'SWA' and swa_model is not None:
                self._save_weights(swa_model, 'SWA average')
        else:
            write(self.file(f'fork{self.number}'), 'fork', 1, {'state': take(learn)})
        data['epochs'], data['done'] = list(map(_cells, rows)), True
        if all(p['done'] for p in self.data['parts']):
            self.data['finished'] = now()
        self._save()

    def clean_up(self):
        "Remove what no part still to be trained needs."
        for i, part in enumerate(self.parts):
            # there, if it was killed in that moment
            if self.is_done(i):
                self.file(f'part{i}.ckpt').unlink(missing_ok=True)
            children = [j for j, p in enumerate(self.parts) if p.parent == i]
            if children and all(map(self.is_done, children)):
                self.file(f'fork{i}').unlink(missing_ok=True)

    def _save_weights(self, model, name):
        weights = {k: v.cpu() for k, v in unwrap(model).state_dict().items()}
        save_weights(weights_file(self.out, self.seed, name), weights)

    def keep_baseline(self, found: dict):
        "What another method gets on the same data."
        self.data['baseline'] = found
        self._save()

    def line(self) -> str:
        "Where the part in training stands, for a progress display."
        part, rows = self.parts[self.number], self.data['parts'][self.number]['epochs']
        metric = self.recipe.metric
        average = rows[-1].get(f'swa_{metric}')
        average = f' (average {100 * average:.2f} %)' if average is not None else ''
        return (
            f'seed {self.seed}  {", ".join(r.name for r in part.runs)}  epoch {part.begin + len(rows)} of {part.end}  '
            f'{metric} {100 * rows[-1][metric]:.2f} %{average}  {seconds_text(rows[-1]["seconds"])} an epoch  '
            f'{duration(self.clock.left())} left'
        )


class _Clock:
    "Times the epochs of a record's seed, and says how long those left will take."

    def __init__(self, record):
        self.record, self.seconds, self.started = record, {False: [], True: []}, None
        for i, part in enumerate(record.data['parts']):  # of earlier sessions
            for e, row in enumerate(part['epochs']):
                self.seconds[self._folds(i, e)].append(row['seconds'])

    def start(self):
        self.started = monotonic()

    def stop(self, epoch) -> float:
        "Seconds since `start`, for an epoch of the part in training."
        seconds = monotonic() - self.started
        self.seconds[self._folds(self.record.number, epoch)].append(seconds)
        return seconds

    def next_epoch(self) -> float:
        "What the next epoch can be expected to take at most."
        number = self.record.number
        return 1.2 * self._expected(self._folds(number, len(self.record.data['parts'][number]['epochs'])))

    def left(self) -> float:
        "Expected seconds to the end of the seed's last part."
        seconds = {folds: self._expected(folds) for folds in (False, True)}
        return sum(
            seconds[self._folds(i, e)]
            for i, (p, data) in enumerate(zip(self.record.parts, self.record.data['parts']))
            for e in range(len(data['epochs']), p.end - p.begin)
        )

    def _folds(self, number, epoch) -> bool:
        "Is the average validated in this epoch of a part?"
        part = self.record.parts[number]
        return part.is_last and part.begin + epoch >= part.runs[0].swa_start

    def _expected(self, folds) -> float:
        if self.seconds[folds]:
            return median(self.seconds[folds][-9:])
        # a forward pass more, and a validation
        if self.seconds[not folds]:
            return median(self.seconds[not folds][-9:]) * (1.5 if folds else 1)
        return 0.0


def snapshots_folder(out: Path, seed: int, run: str) -> Path:
    return out / f'seed-{seed}-{re.sub("[^a-z0-9.]+", "-", run.lower())}'


def weights_file(out: Path, seed: int, run: str) -> Path:
    folder = snapshots_folder(out, seed, run)
    return folder.with_name(f'{folder.name}.pth')


def what_is_run(recipe, settings: Settings, images: dict) -> dict:
    "What all seeds in a folder have in common."
    return {
        'recipe': recipe.name,
        'budget': recipe.budget,
        'swa_start': recipe.swa_start,
        'trained': described(recipe),
        'settings': asdict(settings),
        'images': images,
    }


_KEYS = {'recipe', 'seed', 'settings', 'images', 'parts', 'finished'}


def read_records(folder: Path) -> dict[int, dict]:
    """Seed -> its record, for all in `folder`, complete or not, in the order of the seeds. Raises
    `ValueError` if one is damaged.
    """
    if not folder.is_dir():
        return {}
    names = (re.fullmatch(r'seed-(\d+)\.json', f.name) for f in folder.iterdir())
    begun = {int(m[1]): _read_begun(folder / m[0]) for m in names if m}
    begun = {seed: data for seed, data in begun.items() if data is not None}
    return dict(sorted((begun | _complete(folder)).items()))


def find_record(folder: Path, seed: int) -> dict | None:
    """The record of a seed in `folder`, complete or not; `None` if there is none. Raises
    `ValueError` if it is damaged.
    """
    begun = _read_begun(folder / f'seed-{seed}.json')
    return _complete(folder).get(seed, begun)


def _complete(folder) -> dict:
    complete = stored(folder, 'training')
    for seed, data in complete.items():
        if not _KEYS <= data.keys():
            raise ValueError(f'{folder / RUNS_FILE} is damaged: seed {seed} is no record of a training: move it away')
    return complete


def check_record(data: dict, folder: Path, fixed: dict):
    """Raises `ValueError` if the record `data` of a seed in `folder` does not agree with what is
    `fixed`.
    """
    for k, v in fixed.items():
        if data.get(k) == v:
            continue
        said = difference(data.get(k), v, k)
        raise ValueError(f'{folder}: seed {data["seed"]} was run with {said}: give the same, or another folder')


def _read_begun(file) -> dict | None:
    "`None` if it is not there; it may just have been stored."
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        data = None
    if not isinstance(data, dict) or not _KEYS <= data.keys():
        raise ValueError(f'{file} is damaged, or no record of a seed: move it away')
    return data


def seconds_text(seconds) -> str:
    return f'{seconds:.2f} s' if seconds < 10 else f'{seconds:.0f} s'


def _cells(row) -> dict:
    return {k: round(v, 3) if k == 'seconds' else json_number(shortest(float(v))) for k, v in row.items()}


def json_number(v):
    return v if abs(v) < float('inf') else None  # JSON knows neither nan nor infinity


def _as_json(data) -> str:
    "Indented, but an epoch a line."
    text = json.dumps(data | {'parts': [p | {'epochs': f'@{i}'} for i, p in enumerate(data['parts'])]}, indent=1)
    for i, p in enumerate(data['parts']):
        text = text.replace(f'"@{i}"', '[' + ',\n   '.join(map(json.dumps, p['epochs'])) + ']', 1)
    return text + '\n'


def difference(was, now, name) -> str:
    if not isinstance(was, dict) or not isinstance(now, dict):
        return f'{name}={was!r}, not {now!r}'
    name = next(k for k in {**was, **now} if was.get(k, 'nothing') != now.get(k, 'nothing'))
    return f'{name}={was.get(name)!r}, not {now.get(name)!r}'


def duration(seconds) -> str:
    minutes = seconds / 60
    return f'{seconds:.0f} s' if seconds < 90 else f'{minutes:.0f} min' if minutes < 90 else f'{minutes / 60:.1f} h'
