"""The report on loss surfaces: tables and figures of what was measured around the solutions of a
recipe, and the numbers as report.json."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ..checks import counted
from ..landscape.figures import plot_line, plot_paths, plot_planes, plot_width
from ..landscape.surfaces import Plane, Surface
from .machine import hardware_text, versions_text
from .recipes import LANDSCAPES, RECIPES
from .record import duration
from .store import write_figure, write_report
from .surface_record import images_text, read_surface_records
from .tables import difference_summary, markdown_table, mean_and_half, spread, summary

__all__ = ['has_surfaces', 'report_surfaces']

_ERROR = 'valid_error_rate'
_LOSS = 'train_loss'


@dataclass
class _Content:
    "What a report says of one kind of surface."

    sections: list[str]
    figures: dict  # name of a file -> function that draws it
    numbers: dict  # for report.json


def has_surfaces(folder) -> bool:
    "Is `folder` of a loss surface?"
    return bool(read_surface_records(Path(folder)))


def report_surfaces(folder: Path) -> str:
    """The report on what `reproduce` has measured in `folder`, as Markdown; written there as
    report.md, too, with its figures (of the first seed).

    Only complete seeds count. Raises `ValueError` if there is none, if a file is damaged, or if
    seeds were measured differently.
    """
    records = list(read_surface_records(folder).values())
    complete = [record for record in records if record['finished']]
    if not complete:
        raise ValueError(f'{folder} has no complete seed, and {len(records)} begun')
    _check_alike(folder, complete)
    recipe = LANDSCAPES[complete[0]['recipe']]
    found = [_unpacked(record) for record in complete]
    content_of = {'width': _width_content, 'plane': _plane_content, 'curve': _curve_content}[recipe.kind]
    landscape = complete[0]['landscape'] | {'level': recipe.level}
    content = content_of(landscape, found, RECIPES[recipe.base].wd)
    for name, draw in content.figures.items():
        write_figure(folder / name, draw())
    text = '\n\n'.join([*_head(recipe, complete, records), *content.sections]) + '\n'
    write_report(folder, text, complete, content.numbers)
    return text


def _check_alike(folder, records):
    first, *others = records
    for record in others:
        for name in ('recipe', 'landscape', 'settings', 'images'):
            if record[name] != first[name]:
                raise ValueError(
                    f'{folder} mixes measurements: seed {record["seed"]} has {name} {record[name]}, '
                    f'seed {first["seed"]} {first[name]}'
                )


def _unpacked(record) -> dict[str, Surface]:
    return {what: Surface.from_dict(content) for what, content in record['surfaces'].items()}


# the head


def _head(recipe, complete, records) -> list[str]:
    "The title, and what the numbers are of and what they are not."
    images = complete[0]['images']
    said = [
        _solutions_text(recipe, complete),
        f'measured on {images["train"]:,} training and {images["valid"]:,} test images; batch norm refreshed on the '
        'former at each point',
    ]
    if 'JPEG' in images['kind']:
        said.append("the images are JPEG-compressed: absolute errors are not comparable with the papers'")
    if not _is_at_full_size(recipe, complete[0]):
        said.append('**not at full size: the published figures are not reproduced**')
    said.append(_machine_text(complete))
    said += [f'seed {r["seed"]} is not complete and not counted' for r in records if not r['finished']]
    return [f'# {recipe.name}', '\n'.join(f'- {sentence}' for sentence in said)]


def _solutions_text(recipe, complete) -> str:
    trained = complete[0]['solutions'][0]
    many = counted(len(complete), 'pair' if recipe.kind == 'curve' else 'seed')
    seeds = []
    for record in complete:
        seeds.append('+'.join(str(solution['seed']) for solution in record['solutions']))
    return (
        f'{many} of solutions of {recipe.base} ({", ".join(seeds)}), trained on {images_text(trained["images"])}, '
        f'lengths times {trained["settings"]["scale"]:g}'
    )


def _is_at_full_size(recipe, record) -> bool:
    trained = record['solutions'][0]
    images = record['images']
    has_all_images = (trained['images']['train'], images['valid']) == (50_000, 10_000)
    if not has_all_images and images['kind'] != RECIPES[recipe.base].source:
        return False
    return trained['settings']['scale'] == 1 and record['settings']['scale'] == 1


def _machine_text(complete) -> str:
    machines = {}  # as ordered sets
    versions = {}
    seconds = 0
    steps = 0
    for record in complete:
        for session in record['sessions']:
            machines[hardware_text(session['hardware'], session['threads'])] = None
            versions[versions_text(session['versions'])] = None
            seconds += session.get('seconds', 0)
            steps += session.get('steps', 0)
    precision = complete[0]['settings']['precision']
    return (
        f'{"; ".join(machines)}; {precision}; {duration(seconds)} for {steps:,} points and epochs; '
        f'{" / ".join(versions)}'
    )


# cells of the tables


def _each(items: list, f) -> np.ndarray:
    "`f` of each, of which there is one for each seed."
    return np.array([f(item) for item in items], float)


def _percent(x) -> str:
    return spread(100 * np.asarray(x), 2)


# width


def _width_content(landscape, found, wd) -> _Content:
    level = landscape['level']
    by_seed = [surfaces['rays'].widths(_ERROR, level) for surfaces in found]
    widths = {}
    for name in found[0]['rays'].names:
        widths[name] = [of_seed[name] for of_seed in by_seed]
    return _Content(
        sections=_width_sections(landscape, found, widths),
        figures={
            'width.png': lambda: _draw_width(found[0]['rays'], level, wd),
            'line.png': lambda: plot_line(found[0]['line'], wd=wd)[0].figure,
        },
        numbers=_width_numbers(widths, found),
    )


def _draw_width(rays, level, wd):
    fig, axs = plt.subplots(1, 2, figsize=(12, 4.2), layout='constrained')
    plot_width(rays, _ERROR, level, axs[0])
    plot_width(rays, _LOSS, ax=axs[1], wd=wd)
    return fig


def _width_sections(landscape, found, widths) -> list[str]:
    over_seeds = '; mean +- std over the seeds' if len(found) > 1 else ''
    lines = [surfaces['line'] for surfaces in found]
    length = spread(np.array([line.length for line in lines]), 2)
    return [
        f'Random rays, {landscape["n_rays"]} from each solution, in the same directions; in brackets the standard '
        f'deviation over the rays{over_seeds}.',
        markdown_table(_width_rows(landscape, found, widths)),
        *_gain_sentence(widths),
        '![error and loss over the distance](width.png)',
        f'On the line from SGD (t = 0) through SWA (t = 1), which are {length} apart:',
        markdown_table(_line_rows(lines)),
        '![training loss and test error on the line](line.png)',
    ]


def _width_rows(landscape, found, widths) -> list[list[str]]:
    rows = [
        [
            '',
            'norm of the weights',
            'test error, %',
            'training loss',
            f'distance to {100 * landscape["level"]:g} % test error',
            'of the norm',
            'rays that reach it',
        ]
    ]
    for name, of_seeds in widths.items():
        n_crossed = sum(w.n_crossed for w in of_seeds)
        n_rays = sum(len(w.distances) for w in of_seeds)
        rows.append(
            [
                name,
                spread(_at_solution(found, name, 'norm'), 2),
                _percent(_at_solution(found, name, _ERROR)),
                spread(_at_solution(found, name, _LOSS), 4),
                _distance_cell([w.distance for w in of_seeds], [w.std for w in of_seeds], 2),
                _distance_cell([w.relative for w in of_seeds], [w.relative_std for w in of_seeds], 3),
                f'{n_crossed} of {n_rays}',
            ]
        )
    return rows


def _at_solution(found, name, column) -> np.ndarray:
    return _each(found, lambda surfaces: surfaces['rays'].profiles(column)[name][0, 0])


def _distance_cell(means, stds, digits) -> str:
    if np.isnan(means).any():
        return 'not reached on all'
    return f'{spread(np.array(means), digits)} ({np.mean(stds):.{digits}f})'


def _gain_sentence(widths) -> list[str]:
    "None where a ray does not reach the level."
    gains = np.array([swa.distances - sgd.distances for sgd, swa in zip(widths['SGD'], widths['SWA'])])
    if len(gains) > 1:
        gains = gains.mean(1)  # rays of one seed share its solutions
        sample = 'seeds'
    else:
        gains = gains[0]
        sample = 'rays'
    if not np.isfinite(gains).all():
        return []
    mean, half = mean_and_half(gains)
    return [
        f'The distance from SWA less that from SGD, on the same rays: {mean:+.2f} (95 % interval over the '
        f'{len(gains)} {sample}: {mean - half:+.2f} to {mean + half:+.2f}); positive in {(gains > 0).sum()} of '
        f'{len(gains)}.'
    ]


def _line_rows(lines) -> list[list[str]]:
    errors = np.array([line.column(_ERROR) for line in lines])
    at_sgd = [np.interp(0, line.t, error) for line, error in zip(lines, errors)]
    at_swa = [np.interp(1, line.t, error) for line, error in zip(lines, errors)]
    least_at = lines[0].t[np.nanargmin(errors, 1)]
    return [
        ['test error, %', 'at SGD', 'at SWA', 'least', 'at t'],
        ['', _percent(at_sgd), _percent(at_swa), _percent(np.nanmin(errors, 1)), spread(least_at, 2)],
    ]


def _width_numbers(widths, found) -> dict:
    """The error of each solution and, where all rays reach the level, the distance at which they
    do: Euclidean, and in units of the norm of the weights.
    """
    distance = {name: _each(of_seeds, lambda w: w.distance) for name, of_seeds in widths.items()}
    relative = {name: _each(of_seeds, lambda w: w.relative) for name, of_seeds in widths.items()}
    rows = {}
    for name, of_seeds in widths.items():
        rows[name] = {'error': summary(100 * _at_solution(found, name, _ERROR))}
        if all(w.n_crossed == len(w.distances) for w in of_seeds):
            rows[name]['distance'] = summary(distance[name])
            rows[name]['relative'] = summary(relative[name])
    differences = {}
    if all('distance' in row for row in rows.values()):
        differences['SWA - SGD'] = {
            'distance': difference_summary(distance['SWA'] - distance['SGD']),
            'relative': difference_summary(relative['SWA'] - relative['SGD']),
        }
    return {'rows': rows, 'differences': differences}


# plane

_TITLES = {
    'trajectory': (
        'Through the first, the middle and the last of the weights that the SWA run averages; the line is its path, '
        'the star the average, both projected'
    ),
    'solutions': "Through SGD's solution, SWA's, and the first of the weights averaged",
}


def _plane_content(landscape, found, wd) -> _Content:
    sections = []
    for what, title in _TITLES.items():
        sections += [
            f'{title}:',
            f'![training loss with weight decay, and test error]({what}.png)',
            markdown_table(_plane_rows(found[0][what], wd)),
        ]
    return _Content(
        sections=sections,
        figures={f'{what}.png': partial(_draw_plane, found[0][what], wd) for what in _TITLES},
        numbers={'rows': {}, 'differences': {}},
    )


def _draw_plane(plane, wd):
    fig, axs = plt.subplots(1, 2, figsize=(13, 4.8), layout='constrained')
    plot_planes({'': plane}, _LOSS, axs[:1], wd)
    plot_planes({'': plane}, _ERROR, axs[1:])
    return fig


def _plane_rows(plane, wd) -> list[list[str]]:
    rows = [['', 'x', 'y', 'distance from the plane']]
    for name, (x, y) in plane.solutions.items():
        rows.append(_place_cells(name, x, y))
    for name, (x, y, off) in plane.marks.items():
        rows.append(_place_cells(name, x, y, off))
    x, y = plane.points[np.nanargmin(plane.column(_LOSS, wd))]
    rows.append(_place_cells('least training loss + decay on the grid', x, y))
    x, y = plane.points[np.nanargmin(plane.column(_ERROR))]
    rows.append(_place_cells('least test error on the grid', x, y))
    return rows


def _place_cells(name, x, y, off=0.0) -> list[str]:
    return [name, f'{x:.2f}', f'{y:.2f}', f'{off:.2f}']


# curve

_WAYS = {'straight line': 'line-path', 'polygonal chain': 'chain-path', 'Bezier curve': 'bezier-path'}


def _curve_content(landscape, found, wd) -> _Content:
    sections = [
        f'Between the SGD solutions of two seeds; the bends were trained for {landscape["epochs"]} epochs from a '
        f'learning rate of {landscape["lr"]:g} and measured at {landscape["n_curve"]} points:',
        markdown_table(_way_rows(found)),
        '![test error and training loss along the three](paths.png)',
        '![training loss with weight decay in the planes of the bends](panels.png)',
    ]
    return _Content(
        sections=sections,
        figures={
            'paths.png': lambda: _draw_ways(found[0]),
            'panels.png': lambda: _draw_panels(found[0], wd),
        },
        numbers=_way_numbers(found),
    )


def _way_rows(found) -> list[list[str]]:
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
    for name, what in _WAYS.items():
        ways = [surfaces[what] for surfaces in found]
        rows.append(
            [
                name,
                spread(_each(ways, lambda way: way.length), 2),
                _percent(_each(ways, lambda way: way.min(_ERROR))),
                _percent(_each(ways, lambda way: way.max(_ERROR))),
                _percent(_each(ways, lambda way: way.mean(_ERROR))),
                spread(_each(ways, lambda way: way.max(_LOSS)), 4),
                spread(_each(ways, lambda way: way.mean(_LOSS)), 4),
            ]
        )
    return rows


def _way_numbers(found) -> dict:
    rows = {}
    for name, what in _WAYS.items():
        ways = [surfaces[what] for surfaces in found]
        rows[name] = {
            'greatest error': summary(100 * _each(ways, lambda way: way.max(_ERROR))),
            'length': summary(_each(ways, lambda way: way.length)),
        }
    return {'rows': rows, 'differences': {}}


def _draw_ways(surfaces):
    fig, axs = plt.subplots(1, 2, figsize=(12, 4.2), layout='constrained')
    paths = {name: surfaces[what] for name, what in _WAYS.items()}
    plot_paths(paths, _ERROR, axs[0])
    plot_paths(paths, _LOSS, axs[1])
    return fig


def _draw_panels(surfaces, wd):
    "The plane of the Bezier curve twice: with the straight way between its ends, and with the curve."
    bezier = surfaces['bezier-plane']
    start, end, _ = bezier.solutions.values()
    straight = [[x, y, 0.0] for x, y in np.linspace(start, end, 21).tolist()]
    panels = {
        'straight line': Plane(bezier.about | {'trajectory': straight}, bezier.points, bezier.values),
        'polygonal chain': surfaces['chain-plane'],
        'Bezier curve': bezier,
    }
    return plot_planes(panels, _LOSS, wd=wd)[0].figure
