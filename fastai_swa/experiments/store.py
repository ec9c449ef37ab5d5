"""The files of a row: runs.jsonl, with a line for each seed that is complete and what was measured
on all of them together; and the report on it."""

import json
from contextlib import contextmanager
from pathlib import Path
from time import sleep

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ..files import InUse, Lock, parsed, replacing, write_text

__all__ = ['stored', 'store', 'has_types', 'read_begun', 'write_report', 'write_figure', 'shortest', 'RUNS_FILE']

RUNS_FILE = 'runs.jsonl'


def stored(folder: Path, kind: str) -> dict[int, dict]:
    """Seed -> its record, for the records of a `kind` in the file of `folder`, in the order of the
    seeds.

    Raises `ValueError`, naming file and line, if it is damaged.
    """
    found = {}
    for data in _read_lines(folder / RUNS_FILE):
        if data['kind'] == kind:
            found[data['seed']] = data
    return dict(sorted(found.items()))


def store(folder: Path, data: dict):
    """Put `data` into the file of `folder`, in place of what is there of the same 'kind' and
    'seed'.

    Several processes may do so at a time. Raises `ValueError` if the file is damaged, `OSError` if
    it cannot be written.
    """
    file = folder / RUNS_FILE
    with _locked(file):
        others = [d for d in _read_lines(file) if _place(d) != _place(data)]
        lines = [json.dumps(d, separators=(',', ':')) for d in sorted([*others, data], key=_place)]
        write_text(file, '\n'.join(lines) + '\n')


def _place(data: dict) -> tuple:
    return data['kind'], data['seed']


def write_report(folder: Path, text: str, records: list[dict], numbers: dict):
    """The report on `records`: `text` as report.md, the `numbers` in it, and what they are of, as
    report.json.

    Raises `OSError` if one cannot be written.
    """
    first = records[0]
    what = {
        'recipe': first['recipe'],
        'seeds': [r['seed'] for r in records],
        'images': first['images'],
        'settings': first['settings'],
    }
    write_text(folder / 'report.json', json.dumps(what | numbers, indent=1, allow_nan=False) + '\n')
    write_text(folder / 'report.md', text)


def has_types(data, types: dict) -> bool:
    "Is `data` a dict with values of the `types` under their keys? (`True` is no number.)"
    if not isinstance(data, dict) or not types.keys() <= data.keys():
        return False
    return all(isinstance(data[k], kind) and (type(data[k]) is not bool or kind is bool) for k, kind in types.items())


def read_begun(file: Path, fits, what: str) -> dict | None:
    """What stands beside the file of a row for a seed under way; `None` if it is not there: it may
    just have been stored. Raises `ValueError`, naming the file, if it is no `what`, of which `fits`
    says whether data are one.
    """
    try:
        data = parsed(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        data = None
    if not fits(data):
        raise ValueError(f'{file} is damaged, or no {what}: move it away')
    return data


def write_figure(file: Path, fig):
    """The figure `fig` as PNG of 256 colours, a third of the size of one of all colours, and close
    it. Raises `OSError` if it cannot be written.
    """
    fig.set_dpi(110)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    plt.close(fig)
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')
    with replacing(file) as f:
        image.quantize(256, dither=Image.Dither.NONE).save(f, 'PNG', optimize=True)


def shortest(value: float) -> float:
    "The number with the fewest digits that is the same as a float32; what is none stays as it is."
    with np.errstate(over='ignore'):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def _read_lines(file) -> list[dict]:
    if not file.exists():
        return []
    res = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            data = parsed(line)
        except ValueError:
            data = None
        if not has_types(data, {'kind': str, 'seed': int}):
            raise ValueError(f'{file} is damaged in line {number}: move it away')
        res.append(data)
    return res


@contextmanager
def _locked(file):
    "Writers wait for one another; each takes milliseconds."
    lock = None
    while lock is None:
        try:
            lock = Lock(file)
        except InUse:
            sleep(0.01)
    try:
        yield
    finally:
        lock.release()
