"""What was measured at points of weight space: one small object for each question, that saves as
JSON or npz."""

import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checks import check_known, check_number
from ..columns import less_is_better
from ..files import Lock, check_zip, parsed, replacing, write_text
from ..interrupts import uninterrupted
from .geometry import crossing, mean_height

__all__ = ['Surface', 'Rays', 'Profile', 'Plane', 'Width', 'MemoryRows', 'PointFile']


class Surface:
    """Loss and metrics at points of weight space.

    - `points`: their coordinates, shape (n, d), see the subclass.
    - `values`: column -> float64 of shape (n,), nan where a point is not measured (yet). The
      columns are 'train_loss', 'train_<metric>', 'valid_loss', 'valid_<metric>' and 'norm', the
      Euclidean norm of the weights.
    - `about`: what it is of, as plain data; in it 'solutions', by name.

    `save` and `Surface.load` keep it as JSON, or as NumPy's npz. Raises `ValueError`, naming it,
    for a column that there is not and a file that cannot be read.
    """

    kinds = {}  # name in a file -> class

    def __init_subclass__(cls, kinds=()):
        Surface.kinds |= dict.fromkeys(kinds, cls)

    def __init__(self, about: dict, points, values: dict | None = None):
        self.about = about
        self.points = np.asarray(points, float)
        self.values = values or {name: np.full(len(self.points), np.nan) for name in about['columns']}

    @property
    def names(self) -> list[str]:
        "Of the solutions."
        return list(self.about['solutions'])

    @property
    def is_measured(self) -> np.ndarray:
        "Of each point: whether it is."
        return ~np.isnan(self.values['norm'])

    def column(self, name: str, wd: float = 0.0) -> np.ndarray:
        """Column `name`, shape (n,); `wd` adds `wd / 2 * norm**2`, as weight decay does to a loss.
        Raises `ValueError` if there is none of that name.
        """
        check_known('column', name, self.values)
        if not wd:
            return self.values[name]
        return self.values[name] + wd / 2 * self.values['norm'] ** 2

    def __repr__(self):
        n = len(self.points)
        done = int(self.is_measured.sum())
        points = f'{n} points' if done == n else f'{done} of {n} points'
        return f'{self._said()}; {points}, with {", ".join(self.values)}'

    # files

    def save(self, path):
        "Write it to `path`, as JSON or, if it ends so, as npz. Raises `OSError`."
        path = Path(path)
        if path.suffix == '.npz':
            with replacing(path) as f:
                np.savez(f, about=json.dumps(self.about), points=self.points, **self.values)
        else:
            write_text(path, json.dumps(self.to_dict()) + '\n')

    def to_dict(self) -> dict:
        "It as plain data, for JSON; `Surface.from_dict` makes it of that again."
        return self._head() | {'values': {k: _plain(v) for k, v in self.values.items()}}

    @staticmethod
    def from_dict(content: dict) -> 'Surface':
        "Raises `ValueError` or `KeyError` for what `to_dict` has not made."
        if content['format'] != _FORMAT:
            raise ValueError(f'format must be {_FORMAT!r}, not {content["format"]!r}')
        values = {k: np.array(v, float) for k, v in content.get('values', {}).items()}
        return _made(content['about'], content['points'], values)

    def _head(self):
        return {'format': _FORMAT, 'about': self.about, 'points': self.points.tolist()}

    @staticmethod
    def load(path) -> 'Surface':
        """What `save` wrote to `path`, or the `file` of a measurement, finished or not.

        Raises `ValueError` if it is damaged or something else, `FileNotFoundError` if it is not
        there.
        """
        content = Path(path).read_bytes()
        try:
            if content[:2] == b'PK':
                check_zip(path)
                with np.load(path, allow_pickle=False) as z:
                    arrays = {k: z[k] for k in z.files}
                about = parsed(str(arrays.pop('about')))
                return _made(about, arrays.pop('points'), arrays)
            head, _, rows = content.partition(b'\n')
            surface = Surface.from_dict(parsed(head))
            _read_rows(surface, rows)
            return surface
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError, OSError, zipfile.BadZipFile):
            raise ValueError(f'{path} is damaged, or it is no surface that fastai_swa wrote') from None


_FORMAT = 'fastai_swa surface 1'


def _made(about, points, values=None):
    if not {'kind', 'solutions', 'columns'} <= about.keys() or not isinstance(about['columns'], list):
        raise ValueError('it does not say what was measured')
    if any(len(v) != len(points) for v in (values or {}).values()):
        raise ValueError('there are not as many values as points')
    return Surface.kinds[about['kind']](about, points, values)


def _plain(values) -> list:
    # JSON knows neither nan nor infinity
    return [v if np.isfinite(v) else str(v) for v in np.asarray(values).tolist()]


class Width(NamedTuple):
    "The distance from a solution at which a level is crossed, over the rays."

    distance: float  # mean over the rays; nan unless all of them cross it
    std: float  # sample standard deviation over the rays
    relative: float  # both, in units of the norm of the solution's weights
    relative_std: float
    n_crossed: int  # rays that cross it
    distances: np.ndarray  # of each ray; nan where it does not

    @property
    def is_crossed_by_all(self) -> bool:
        return self.n_crossed == len(self.distances)


class Rays(Surface, kinds=['rays']):
    """Along rays from solutions, in the same directions from each. `points`: number of the
    solution, number of the ray (-1: the solution), distance.
    """

    @property
    def distances(self) -> np.ndarray:
        return np.array([0, *self.about['distances']])

    @property
    def norms(self) -> dict[str, float]:
        "Of the solutions' weights."
        return self.about['solutions']

    def profiles(self, column: str, wd: float = 0.0) -> dict[str, np.ndarray]:
        """Solution -> `column` on each ray at each of the `distances`, of which the first is 0:
        shape (rays, distances).
        """
        values = self.column(column, wd).reshape(len(self.names), -1)
        n_rays = self.about['n_rays']
        res = {}
        for name, v in zip(self.names, values):
            at_solution = np.full((n_rays, 1), v[0])
            on_rays = v[1:].reshape(n_rays, -1)
            res[name] = np.concatenate([at_solution, on_rays], 1)
        return res

    def widths(self, column: str, level: float, wd: float = 0.0) -> dict[str, Width]:
        """Solution -> how far from it `column` first comes to the other side of `level`
        (`geometry.crossing`).
        """
        res = {}
        for name, profiles in self.profiles(column, wd).items():
            distances = np.array([crossing(self.distances, ys, level) for ys in profiles])
            norm = self.norms[name] or np.nan
            mean = float(distances.mean())
            std = float(distances.std(ddof=1)) if len(distances) > 1 else np.nan
            n_crossed = int((~np.isnan(distances)).sum())
            res[name] = Width(mean, std, mean / norm, std / norm, n_crossed, distances)
        return res

    def _said(self):
        return f'{self.about["n_rays"]} rays from each of {", ".join(self.names)}, to distance {self.distances[-1]:.4g}'


class Profile(Surface, kinds=['line', 'curve']):
    """Along a line or a curve from one solution (t = 0) to another (t = 1), and beyond. `points`: t.

    That of `line` also gives the weights there: `solution`, `averaged`, `apply`. It keeps both solutions in memory for
    that, and no file has them. `chosen`: the t that `wise_ft` has picked.
    """

    way = None  # gives the weights: a `measure.Way`
    chosen = None

    @property
    def t(self) -> np.ndarray:
        return self.points[:, 0]

    @property
    def arc(self) -> np.ndarray:
        "Of each point: the length of the way to it from the first solution, negative before that."
        return np.array(self.about['arc'])

    @property
    def length(self) -> float:
        "Of the way from the first solution to the second, in weight space."
        return self.about['length']

    def _between(self, column, wd):
        inside = (self.t >= 0) & (self.t <= 1)
        if not inside.any():
            raise ValueError('no point lies between the two solutions: take some t from 0 to 1')
        return self.arc[inside], self.column(column, wd)[inside]

    def max(self, column: str, wd: float = 0.0) -> float:
        """The greatest value of `column` at the points between the solutions and at these: on a way
        that rises nowhere, an end's.
        """
        return float(self._between(column, wd)[1].max())

    def min(self, column: str, wd: float = 0.0) -> float:
        "The least one."
        return float(self._between(column, wd)[1].min())

    def best(self, column: str, comp=None) -> float:
        """The measured t at which `column` is best, of equal ones the largest: least for a loss or an error, else
        greatest, or as `comp` says, `np.less` or `np.greater`. Raises `ValueError` if it is nowhere a number.
        """
        values = self.column(column)
        if np.isnan(values).all():
            raise ValueError(f'{column} is nowhere a number: there is no best')
        best = np.nanmin(values) if less_is_better(column, comp) else np.nanmax(values)
        return float(self.t[values == best].max())

    def solution(self, t: float | None = None) -> dict:
        """The weights at `t`, by default the chosen one, as plain names and tensors in the host's memory; no pass is
        made. `RuntimeError` for a curve, and what was read from a file.
        """
        return self._way().solution(self._t(t))

    def averaged(self, t: float | None = None):
        """Within this context the learner predicts, validates, shows, saves and exports with the weights at `t`, by
        default the chosen one; gives the learner. Batch norm is refreshed on the whole training set first.
        """
        return self._way().model(self._t(t)).averaged()

    def apply(self, t: float | None = None):
        "Put the weights at `t` into the learner's model for good, in place, batch norm refreshed."
        self._way().model(self._t(t)).apply()

    def _way(self):
        if self.way is None:
            raise RuntimeError('this profile has no weights: only what line() or wise_ft() has just given has them')
        return self.way

    def _t(self, t) -> float:
        if t is None and self.chosen is None:
            raise ValueError('say t: only wise_ft() chooses one')
        t = self.chosen if t is None else check_number('t', t)
        if not np.isfinite(t):
            raise ValueError(f't must be finite, not {t!r}')
        return t

    def mean(self, column: str, wd: float = 0.0) -> float:
        """The mean of `column` over the length of the way, straight between the points (Garipov et
        al. 2018, equation 1).
        """
        arc, values = self._between(column, wd)
        return mean_height(arc, values, 0.0, self.length)

    def _said(self):
        kind = self.about.get('curve', 'line')
        how = {'line': 'Line', 'bezier': 'Bezier curve', 'chain': 'Polygonal chain'}[kind]
        return f'{how} from {" to ".join(self.names)}, {self.length:.4g} long'


class Plane(Surface, kinds=['plane']):
    """On a grid in the plane through three solutions. `points`: x and y, in Euclidean distance in
    weight space from the first solution.

    - `solutions`: name -> (x, y) of the three; `marks`: name -> (x, y, distance from the plane) of
      others, projected onto it; `trajectory`: the same of the points of a path, shape (n, 3).
    """

    @property
    def xs(self) -> np.ndarray:
        return np.array(self.about['xs'])

    @property
    def ys(self) -> np.ndarray:
        return np.array(self.about['ys'])

    @property
    def solutions(self) -> dict:
        return {k: tuple(v) for k, v in self.about['solutions'].items()}

    @property
    def marks(self) -> dict:
        return {k: tuple(v) for k, v in self.about['marks'].items()}

    @property
    def trajectory(self) -> np.ndarray:
        return np.array(self.about['trajectory']).reshape(-1, 3)

    def grid(self, column: str, wd: float = 0.0) -> np.ndarray:
        "`column` over the grid, shape (len(ys), len(xs))."
        return self.column(column, wd).reshape(len(self.ys), len(self.xs))

    def _said(self):
        return f'Plane through {", ".join(self.names)}, {len(self.xs)} x {len(self.ys)}'


# where points go as they are measured


class MemoryRows:
    "Into the `surface`."

    def __init__(self, surface: Surface):
        self.surface = surface

    def add(self, i: int, row: dict):
        for name, values in self.surface.values.items():
            values[i] = row[name]

    def close(self):
        pass


class PointFile(MemoryRows):
    """Into the `surface`, and a file that gets a line for each point as it is measured; what the
    file holds of it already is taken over.

    Raises `ValueError` if the file is damaged or of another measurement; `InUse` if another process
    writes it; `OSError`.
    """

    def __init__(self, path, surface: Surface):
        super().__init__(surface)
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(self.path)
        try:
            if self.path.exists() and self.path.stat().st_size:
                self._take_over()
            else:
                write_text(self.path, json.dumps(surface._head()) + '\n')
            # without a buffer: nothing is left over that closing would have to write
            self.handle = open(self.path, 'ab', buffering=0)
        except BaseException:
            self.lock.release()
            raise

    def _take_over(self):
        head, _, rows = self.path.read_bytes().partition(b'\n')
        if head[:2] == b'PK' or b'"values": {' in head:
            raise ValueError(f'{self.path} was written by save, and does not grow: give another file')
        there = Surface.load(self.path)
        new = self.surface.about
        old_spec = there.about.get('spec')
        if not isinstance(old_spec, dict):
            raise ValueError(f'{self.path} is damaged: it does not say what was measured')
        spec = json.loads(json.dumps(new['spec']))
        for k in {**old_spec, **spec}:
            if old_spec.get(k) != spec.get(k):
                raise ValueError(
                    f'{self.path} is of another measurement, with {k}={old_spec.get(k)!r}, not {spec.get(k)!r}: give '
                    'another file, or remove it'
                )
        for k in ('marks', 'trajectory'):  # what is drawn in it may have changed since
            if k in new:
                there.about[k] = new[k]
        whole = rows[: rows.rfind(b'\n') + 1]  # without a line that was not written to its end
        write_text(self.path, json.dumps(there._head()) + '\n' + whole.decode())
        self.surface = there

    def add(self, i: int, row: dict):
        super().add(i, row)
        values = [row[name] for name in self.surface.about['columns']]
        line = (json.dumps([i, *_plain(values)]) + '\n').encode()
        try:
            with uninterrupted():
                self._append(line)
        except OSError as e:
            raise OSError(f'{self.path} cannot be written: {e}') from e

    def _append(self, line: bytes):
        "All of `line`, or nothing of it."
        end = os.fstat(self.handle.fileno()).st_size
        try:
            while line:
                line = line[self.handle.write(line) :]  # a disk with too little room takes a part, and then raises
            self.handle.flush()
        except OSError:
            with suppress(OSError):
                os.ftruncate(self.handle.fileno(), end)
            raise

    def close(self):
        try:
            self.handle.close()
        except OSError as e:  # of what was written before, on some disks
            raise OSError(f'{self.path} cannot be written: {e}') from e
        finally:
            self.lock.release()


def _read_rows(surface, rows: bytes):
    columns = surface.about['columns']
    # behind the last end of a line there is nothing, or what was not written to its end
    *lines, _ = rows.split(b'\n')
    for line in lines:
        i, *values = parsed(line)
        if type(i) is not int or len(values) != len(columns) or not 0 <= i < len(surface.points):
            raise ValueError('no row')
        if any(isinstance(v, bool) for v in values):
            raise ValueError('no numbers')
        for name, v in zip(columns, values):
            surface.values[name][i] = float(v)
