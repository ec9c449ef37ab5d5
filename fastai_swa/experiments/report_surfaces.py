"""The report on landscapes: tables and figures of what was measured around the solutions of a
recipe, and the numbers as report.json."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ..files import replacing
from ..plot import plot_line, plot_paths, plot_planes, plot_width
from ..surfaces import Surface
from .recipes import LANDSCAPES, RECIPES
from .record import duration
from .store import write_report
from .surface_record import images_text, read_surface_records
from .tables import difference_summary, mean_and_half, spread, summary, table

__all__ = ['has_landscapes', 'report_landscapes']


def has_landscapes(folder) -> bool:
    "Is `folder` of a loss surface?"
    return bool(read_surface_records(Path(folder)))


def report_landscapes(folder: Path) -> str:
    """The report on what `reproduce` has measured in `folder`, as Markdown; written there as
    report.md, too, with its figures (of the first seed).

    Only complete seeds count. Raises `ValueError` if there is none, if a file is damaged, or if
    seeds were measured differently.
    """
    notes = list(read_surface_records(folder).values())
    complete = [n for n in notes if n['finished']]
    if not complete:
        raise ValueError(f'{folder} has no complete seed, and {len(notes)} begun')
    for n in complete[1:]:
        for k in ('recipe', 'landscape', 'settings', 'images'):
            if n[k] == complete[0][k]:
                continue
            raise ValueError(
                f'{folder} mixes measurements: seed {n["seed"]} has {k} {n[k]}, seed {complete[0]["seed"]} '
                f'{complete[0][k]}'
            )
    recipe = LANDSCAPES[complete[0]['recipe']]
    surfaces = {
        n['seed']: {what: Surface.from_dict(content) for what, content in n['surfaces'].items()} for n in complete
    }
    wd = RECIPES[recipe.base].wd
    parts = {'width': _report_width, 'plane': _report_plane, 'curve': _report_curve}[recipe.kind]
    figures, sections, numbers = parts(complete[0]['landscape'], surfaces, wd)
    for name, draw in figures.items():
        fig = draw()
        with replacing(folder / name) as f:
            fig.savefig(f, format='png', dpi=110)
        plt.close(fig)
    text = '\n\n'.join([*_head(recipe, complete, notes), *sections]) + '\n'
    write_report(folder, text, complete, numbers)
    return text


def _head(recipe, notes, all_notes):
    first, base = notes[0], RECIPES[recipe.base]
    images, trained, settings = first['images'], first['solutions'][0], first['settings']
    yield f'# {recipe.name}'
    many = f'{len(notes)} {"pair" if recipe.kind == "curve" else "seed"}{"s" * (len(notes) > 1)}'
    seeds = ', '.join('+'.join(str(s['seed']) for s in n['solutions']) for n in notes)
    said = [
        f'{many} of solutions of {recipe.base} ({seeds}), trained on {images_text(trained["images"])}, lengths times '
        f'{trained["settings"]["scale"]:g}',
        f'measured on {images["train"]:,} training and {images["valid"]:,} test images; batch norm refreshed on the '
        'former at each point',
    ]
    if 'JPEG' in images['kind']:
        said.append("the images are JPEG-compressed: absolute errors are not comparable with the papers'")
    whole = (50_000, 10_000) == (trained['images']['train'], images['valid']) or base.source == images['kind']
    if not whole or trained['settings']['scale'] != 1 or settings['scale'] != 1:
        said.append('**not at full size: the published figures are not reproduced**')
    sessions = [s for n in notes for s in n['sessions']]

    def machine(s):
        return (
            s['hardware'].get('gpu')
            or f'CPU, {s["hardware"]["machine"]}, {s["threads"]} thread{"s" * (s["threads"] > 1)}'
        )

    kinds = dict.fromkeys(map(machine, sessions))
    seconds, steps = (sum(s.get(k, 0) for s in sessions) for k in ('seconds', 'steps'))
    said.append(
        f'{"; ".join(kinds)}; {settings["precision"]}; {duration(seconds)} for {steps:,} points and epochs; '
        + ' / '.join(dict.fromkeys(', '.join(f'{k} {v}' for k, v in s['versions'].items()) for s in sessions))
    )
    said += [f'seed {n["seed"]} is not complete and not counted' for n in all_notes if not n['finished']]
    yield '\n'.join(f'- {s}' for s in said)


def _over(surfaces, f) -> np.ndarray:
    return np.array([f(s) for s in surfaces.values()], float)


def _percent(x):
    return spread(100 * x, 2)


def _report_width(landscape, surfaces, wd):
    level, first, n = landscape['level'], next(iter(surfaces.values())), len(surfaces)
    widths = {
        name: [s['rays'].widths('valid_error_rate', level)[name] for s in surfaces.values()]
        for name in first['rays'].names
    }
    rows = [
        [
            '',
            'norm of the weights',
            'test error, %',
            'training loss',
            f'distance to {100 * level:g} % test error',
            'of the norm',
            'rays that reach it',
        ]
    ]
    for name, ws in widths.items():

        def at_it(column, name=name):
            return _at_solution(surfaces, name, column)

        distance = _distance([w.distance for w in ws], [w.std for w in ws], 2)
        relative = _distance([w.relative for w in ws], [w.relative_std for w in ws], 3)
        rows.append(
            [
                name,
                spread(at_it('norm'), 2),
                _percent(at_it('valid_error_rate')),
                spread(at_it('train_loss'), 4),
                distance,
                relative,
                f'{sum(w.n_crossed for w in ws)} of {sum(len(w.distances) for w in ws)}',
            ]
        )

    def draw_width():
        fig, axs = plt.subplots(1, 2, figsize=(12, 4.2), layout='constrained')
        plot_width(first['rays'], 'valid_error_rate', level, axs[0])
        plot_width(first['rays'], 'train_loss', ax=axs[1], wd=wd)
        return fig

    def sections():
        yield (
            f'Random rays, {landscape["n_rays"]} from each solution, in the same directions; in brackets the standard '
            'deviation over the rays' + '; mean +- std over the seeds' * (n > 1) + '.'
        )
        yield table(rows)
        gains, of = (
            [b.distances - a.distances for a, b in zip(widths['SGD'], widths['SWA'])],
            'seeds' if n > 1 else 'rays',
        )
        gains = np.mean(gains, 1) if n > 1 else gains[0]  # rays of one seed share its solutions
        if np.isfinite(gains).all():
            mean, half = mean_and_half(gains)
            yield (
                f'The distance from SWA less that from SGD, on the same rays: {mean:+.2f} (95 % interval over the '
                f'{len(gains)} {of}: '
                f'{mean - half:+.2f} to {mean + half:+.2f}); positive in {(gains > 0).sum()} of {len(gains)}.'
            )
        yield '![error and loss over the distance](width.png)'
        lines = [s['line'] for s in surfaces.values()]
        errors = np.array([p.column('valid_error_rate') for p in lines])
        at = [[np.interp(t, p.t, e) for p, e in zip(lines, errors)] for t in (0, 1)]
        distance = spread(np.array([line.length for line in lines]), 2)
        yield f'On the line from SGD (t = 0) through SWA (t = 1), which are {distance} apart:'
        yield table(
            [
                ['test error, %', 'at SGD', 'at SWA', 'least', 'at t'],
                [
                    '',
                    *(_percent(np.array(e)) for e in (*at, np.nanmin(errors, 1))),
                    spread(lines[0].t[np.nanargmin(errors, 1)], 2),
                ],
            ]
        )
        yield '![training loss and test error on the line](line.png)'

    figures = {'width.png': draw_width, 'line.png': lambda: plot_line(first['line'], wd=wd)[0].figure}
    return figures, sections(), _width_numbers(widths, surfaces)


def _width_numbers(widths, surfaces) -> dict:
    """For report.json: the error of each solution and, where all rays reach the level, the distance
    at which they do.
    """
    rows = {}
    for name, ws in widths.items():
        rows[name] = {'error': summary(100 * _at_solution(surfaces, name, 'valid_error_rate'))}
        if all(w.n_crossed == len(w.distances) for w in ws):
            for k in _DISTANCES:
                rows[name][k] = summary(_each(ws, k))
    of_both = {}
    if all('distance' in row for row in rows.values()):
        gains = {k: _each(widths['SWA'], k) - _each(widths['SGD'], k) for k in _DISTANCES}
        of_both['SWA - SGD'] = {k: difference_summary(gain) for k, gain in gains.items()}
    return {'rows': rows, 'differences': of_both}


_DISTANCES = 'distance', 'relative'  # Euclidean, and in units of the norm of the weights


def _each(widths, name):
    return np.array([getattr(w, name) for w in widths])


def _at_solution(surfaces, name, column):
    return _over(surfaces, lambda s: s['rays'].profiles(column)[name][0, 0])


def _distance(means, stds, digits):
    means, stds = np.array(means), np.array(stds)
    return 'not reached on all' if np.isnan(means).any() else f'{spread(means, digits)} ({stds.mean():.{digits}f})'


def _report_plane(landscape, surfaces, wd):
    first = next(iter(surfaces.values()))

    def draw(what):
        def figure():
            fig, axs = plt.subplots(1, 2, figsize=(13, 4.8), layout='constrained')
            plot_planes({'': first[what]}, 'train_loss', axs[:1], wd)
            plot_planes({'': first[what]}, 'valid_error_rate', axs[1:])
            return fig

        return figure

    def sections():
        titles = {
            'trajectory': 'Through the first, the middle and the last of the weights that the SWA run averages; the '
            'line is its path, the star the average, both projected',
            'solutions': "Through SGD's solution, SWA's, and the first of the weights averaged",
        }
        for what, title in titles.items():
            yield f'{title}:'
            yield f'![training loss with weight decay, and test error]({what}.png)'
            p = first[what]
            rows = [['', 'x', 'y', 'distance from the plane']]
            for name, (x, y, *off) in {**p.solutions, **p.marks}.items():
                rows.append([name, f'{x:.2f}', f'{y:.2f}', f'{off[0] if off else 0:.2f}'])
            for column, label in (
                ('train_loss', 'least training loss + decay on the grid'),
                ('valid_error_rate', 'least test error on the grid'),
            ):
                x, y = p.points[np.nanargmin(p.column(column, wd if column == 'train_loss' else 0))]
                rows.append([label, f'{x:.2f}', f'{y:.2f}', '0.00'])
            yield table(rows)

    return (
        {'trajectory.png': draw('trajectory'), 'solutions.png': draw('solutions')},
        sections(),
        {'rows': {}, 'differences': {}},
    )


def _report_curve(landscape, surfaces, wd):
    names = {'straight line': 'line-path', 'polygonal chain': 'chain-path', 'Bezier curve': 'bezier-path'}
    first = next(iter(surfaces.values()))
    rows = [
        [
            '',
            'length',
            'test error, %, least',
            'greatest',
            'mean over the way',
            'training loss, greatest',
            'mean over the way',
        ]
    ]
    for name, what in names.items():

        def of(f, what=what):
            return _over(surfaces, lambda s: f(s[what]))

        error = 'valid_error_rate'
        rows.append(
            [
                name,
                spread(of(lambda p: p.length), 2),
                _percent(of(lambda p: p.min(error))),
                _percent(of(lambda p: p.max(error))),
                _percent(of(lambda p: p.mean(error))),
                *(spread(of(f), 4) for f in (lambda p: p.max('train_loss'), lambda p: p.mean('train_loss'))),
            ]
        )

    def draw_paths():
        fig, axs = plt.subplots(1, 2, figsize=(12, 4.2), layout='constrained')
        paths = {name: first[what] for name, what in names.items()}
        for ax, column in zip(axs, ('valid_error_rate', 'train_loss')):
            plot_paths(paths, column, ax)
        return fig

    def draw_panels():
        p = first['bezier-plane']
        ends = np.array(list(p.solutions.values()))[:2]
        straight = type(p)(
            p.about | {'trajectory': [[*xy, 0] for xy in np.linspace(*ends, 21).tolist()]}, p.points, p.values
        )
        panels = {'straight line': straight, 'polygonal chain': first['chain-plane'], 'Bezier curve': p}
        return plot_planes(panels, 'train_loss', wd=wd)[0].figure

    def sections():
        yield (
            f'Between the SGD solutions of two seeds; the bends were trained for {landscape["epochs"]} epochs from a '
            f'learning rate of {landscape["lr"]:g} and measured at {landscape["n_curve"]} points:'
        )
        yield table(rows)
        yield '![test error and training loss along the three](paths.png)'
        yield '![training loss with weight decay in the planes of the bends](panels.png)'

    numbers = {'rows': {}, 'differences': {}}
    for name, what in names.items():
        greatest = 100 * _over(surfaces, lambda s, what=what: s[what].max('valid_error_rate'))
        length = _over(surfaces, lambda s, what=what: s[what].length)
        numbers['rows'][name] = {'greatest error': summary(greatest), 'length': summary(length)}
    return {'paths.png': draw_paths, 'panels.png': draw_panels}, sections(), numbers
