"""What is kept of a seed: its record, the states at its forks, its weights."""

import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import monotonic

from ..checkpoint_files import check_state, remove_checkpoint
from ..files import read, save_weights, write, write_text
from ..modules import unwrap
from ..state import take
from .machine import hardware, installed_versions, now
from .plan import parts, runs
from .recipes import described
from .store import RUNS_FILE, has_types, read_begun, shortest, store, stored

__all__ = [
    'Settings',
    'Record',
    'what_is_run',
    'read_records',
    'find_record',
    'check_record',
    'weights_file',
    'snapshots_folder',
    'history_folder',
    'json_number',
    'seconds_text',
    'first_difference',
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
        self.recipe = recipe
        self.seed = seed
        self.out = out
        self.settings = settings
        self.parts = parts(runs(recipe))
        self.number = 0  # of the part in training
        fixed = what_is_run(recipe, settings, images) | {'seed': seed}
        self.data = find_record(out, seed)
        if self.data is None:
            self._refuse_what_is_left()
            self.data = self._begun(fixed, threads)
        else:
            self._check(fixed)
        if not self.data['finished']:
            session = {
                'started': now(),
                'jobs': jobs,
                'versions': installed_versions(),
                'hardware': hardware(settings.device),
            }
            self.data['sessions'].append(session)
            self._save()
        elif self.file('json').exists():
            self._save()  # it was killed when it was stored
        self.clock = _Clock(self)

    def _refuse_what_is_left(self):
        "Hours of training may be in what an earlier run has left whose record is gone: it is the user's to remove."
        left = []
        for pattern in ('part*.ckpt', 'fork*'):
            left += sorted(file.name for file in self.out.glob(f'seed-{self.seed}.{pattern}'))
        if left:
            raise ValueError(
                f'{", ".join(left)} in {self.out}: of a training of seed {self.seed} whose record, '
                f'seed-{self.seed}.json, is gone: move that back, or these away as well, and the seed begins anew'
            )

    def _begun(self, fixed, threads) -> dict:
        return {
            'kind': 'training',
            **fixed,
            'threads': threads,
            'started': now(),
            'finished': None,
            'sessions': [],
            'parts': [_outline(part) for part in self.parts],
        }

    def _check(self, fixed):
        check_record(self.data, self.out, fixed)
        wanted = [_outline(part) for part in self.parts]
        if list(map(_what_and_when, self.data['parts'])) != list(map(_what_and_when, wanted)):
            raise ValueError(
                f'{self.out}: seed {self.seed} was run with other runs of {self.recipe.name}: give another folder'
            )

    def file(self, ending) -> Path:
        return self.out / f'seed-{self.seed}.{ending}'

    def folder(self, run: str) -> Path:
        return snapshots_folder(self.out, self.seed, run)

    def history_folder(self, run: str) -> Path:
        return history_folder(self.out, self.seed, run)

    def _save(self):
        if not self.data['finished']:
            write_text(self.file('json'), _as_json(self.data))
            return
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
                state = read(self.file(f'fork{parent}'), 'fork', 1)['state']
                check_state(state)
                return self.number, state
            except (ValueError, KeyError, TypeError, FileNotFoundError):
                self.data['parts'][parent] |= {'done': False, 'epochs': []}
                self.number = parent
        return self.number, None

    def epoch_is_over(self, rows):
        self.data['parts'][self.number]['epochs'] = list(map(_cells, rows))
        with suppress(OSError):
            self._save()  # a full disk stops nothing here; the checkpoint has the rows too

    def part_is_over(self, rows, learn, averages: dict):
        """Everything that other parts and later questions need is written before the part counts as
        done. `averages`: name -> model; `None` if nothing finite was averaged.
        """
        part = self.parts[self.number]
        if part.is_last:
            for name, model in ({part.runs[0].name: learn.model} | averages).items():
                if model is not None:
                    self._save_weights(model, name)
        else:
            write(self.file(f'fork{self.number}'), 'fork', 1, {'state': take(learn)})
        data = self.data['parts'][self.number]
        data['epochs'] = list(map(_cells, rows))
        data['done'] = True
        if all(p['done'] for p in self.data['parts']):
            self.data['finished'] = now()
        self._save()

    def clean_up(self):
        "Remove what no part still to be trained needs."
        for i in range(len(self.parts)):
            if self.is_done(i):
                # there, if it was killed in that moment
                remove_checkpoint(self.file(f'part{i}.ckpt'))
            children = [j for j, part in enumerate(self.parts) if part.parent == i]
            if children and all(map(self.is_done, children)):
                self.file(f'fork{i}').unlink(missing_ok=True)

    def _save_weights(self, model, name):
        self.keep_weights(unwrap(model).state_dict(), name)

    def keep_weights(self, weights: dict, name: str):
        save_weights(weights_file(self.out, self.seed, name), {k: v.cpu() for k, v in weights.items()})

    def keep_baseline(self, found: dict):
        "What another method gets on the same data."
        self.data['baseline'] = found
        self._save()

    def line(self) -> str:
        "Where the part in training stands, for a progress display."
        part = self.parts[self.number]
        rows = self.data['parts'][self.number]['epochs']
        runs_text = ', '.join(run.name for run in part.runs)
        metric = self.recipe.metric
        metric_text = f'{metric} {100 * rows[-1][metric]:.2f} %'
        average = rows[-1].get(f'swa_{metric}')
        if average is not None:
            metric_text += f' (average {100 * average:.2f} %)'
        return (
            f'seed {self.seed}  {runs_text}  epoch {part.begin + len(rows)} of {part.end}  {metric_text}  '
            f'{seconds_text(rows[-1]["seconds"])} an epoch  {duration(self.clock.left())} left'
        )


def _outline(part) -> dict:
    "What stands in a record of a part before it is trained."
    return {
        'runs': [run.name for run in part.runs],
        'begin': part.begin,
        'end': part.end,
        'done': False,
        'epochs': [],
    }


def _what_and_when(outline: dict) -> tuple:
    return outline['runs'], outline['begin'], outline['end']


class _Clock:
    "Times the epochs of a record's seed, and says how long those left will take."

    def __init__(self, record):
        self.record = record
        # does the epoch validate the average? -> what such epochs took, those of earlier sessions first
        self.seconds = {False: [], True: []}
        self.started = None  # when the epoch under way began
        for number, part in enumerate(record.data['parts']):
            for epoch, row in enumerate(part['epochs']):
                self.seconds[self._folds(number, epoch)].append(row['seconds'])

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
        n_done = len(self.record.data['parts'][number]['epochs'])
        return 1.2 * self._expected(self._folds(number, n_done))

    def left(self) -> float:
        "Expected seconds to the end of the seed's last part."
        seconds = {folds: self._expected(folds) for folds in (False, True)}
        total = 0.0
        for number, part in enumerate(self.record.parts):
            n_done = len(self.record.data['parts'][number]['epochs'])
            for epoch in range(n_done, part.end - part.begin):
                total += seconds[self._folds(number, epoch)]
        return total

    def _folds(self, number, epoch) -> bool:
        "Is the average validated in this epoch of a part?"
        part = self.record.parts[number]
        return part.is_last and part.begin + epoch >= part.runs[0].swa_start

    def _expected(self, folds) -> float:
        if self.seconds[folds]:
            return median(self.seconds[folds][-9:])
        if self.seconds[not folds]:
            of_the_others = median(self.seconds[not folds][-9:])
            return 1.5 * of_the_others if folds else of_the_others  # a forward pass more, and a validation
        return 0.0


# names of files


def snapshots_folder(out: Path, seed: int, run: str) -> Path:
    name = re.sub('[^a-z0-9.]+', '-', run.lower())
    return out / f'seed-{seed}-{name}'


def weights_file(out: Path, seed: int, run: str) -> Path:
    folder = snapshots_folder(out, seed, run)
    return folder.with_name(f'{folder.name}.pth')


def history_folder(out: Path, seed: int, run: str) -> Path:
    folder = snapshots_folder(out, seed, run)
    return folder.with_name(f'{folder.name}-history')


# records read and compared

_KEYS = {
    'recipe': str,
    'seed': int,
    'settings': dict,
    'images': dict,
    'parts': list,
    'finished': str | None,
}
_KEYS_OF_PART = {'runs': list, 'begin': int, 'end': int, 'done': bool, 'epochs': list}


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


def read_records(folder: Path) -> dict[int, dict]:
    """Seed -> its record, for all in `folder`, complete or not, in the order of the seeds. Raises
    `ValueError` if one is damaged.
    """
    if not folder.is_dir():
        return {}
    begun = {}
    for file in folder.iterdir():
        match = re.fullmatch(r'seed-(\d+)\.json', file.name)
        data = _read_begun(file) if match else None
        if data is not None:
            begun[int(match[1])] = data
    return dict(sorted((begun | _complete(folder)).items()))


def find_record(folder: Path, seed: int) -> dict | None:
    """The record of a seed in `folder`, complete or not; `None` if there is none. Raises
    `ValueError` if it is damaged.
    """
    begun = _read_begun(folder / f'seed-{seed}.json')
    return _complete(folder).get(seed, begun)


def _read_begun(file: Path) -> dict | None:
    return read_begun(file, _is_record, 'record of a seed')


def _is_record(data: dict) -> bool:
    return has_types(data, _KEYS) and all(has_types(part, _KEYS_OF_PART) for part in data['parts'])


def _complete(folder) -> dict[int, dict]:
    complete = stored(folder, 'training')
    for seed, data in complete.items():
        if not _is_record(data):
            raise ValueError(f'{folder / RUNS_FILE} is damaged: seed {seed} is no record of a training: move it away')
    return complete


def check_record(data: dict, folder: Path, fixed: dict):
    """Raises `ValueError` if the record `data` of a seed in `folder` does not agree with what is
    `fixed`.
    """
    for k, v in fixed.items():
        if data.get(k) != v:
            said = first_difference(data.get(k), v, k)
            raise ValueError(f'{folder}: seed {data["seed"]} was run with {said}: give the same, or another folder')


def first_difference(was, now, name: str) -> str:
    "Of two values that differ, or of two dicts the first entry that differs."
    if isinstance(was, dict) and isinstance(now, dict):
        name = next(k for k in {**was, **now} if was.get(k, 'nothing') != now.get(k, 'nothing'))
        was = was.get(name)
        now = now.get(name)
    return f'{name}={was!r}, not {now!r}'


# records written


def _cells(row: dict) -> dict:
    "The row of an epoch, as it is kept."
    res = {}
    for name, value in row.items():
        res[name] = round(value, 3) if name == 'seconds' else json_number(shortest(float(value)))
    return res


def json_number(v):
    "`v`, or `None` for what JSON does not know: nan and infinity."
    return v if abs(v) < float('inf') else None


def _as_json(data: dict) -> str:
    "Indented, but an epoch a line."
    outlines = [part | {'epochs': f'@{i}'} for i, part in enumerate(data['parts'])]
    text = json.dumps(data | {'parts': outlines}, indent=1)
    for i, part in enumerate(data['parts']):
        rows = ',\n   '.join(map(json.dumps, part['epochs']))
        text = text.replace(f'"@{i}"', f'[{rows}]', 1)
    return text + '\n'


# durations in words


def seconds_text(seconds: float) -> str:
    return f'{seconds:.2f} s' if seconds < 10 else f'{seconds:.0f} s'


def duration(seconds: float) -> str:
    minutes = seconds / 60
    if seconds < 90:
        return f'{seconds:.0f} s'
    if minutes < 90:
        return f'{minutes:.0f} min'
    return f'{minutes / 60:.1f} h'
