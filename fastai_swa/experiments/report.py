"""What the seeds of a recipe have found: tables beside the published numbers, and training curves."""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from ..files import replacing, write_text
from ..plot import plot_runs, plot_sizes
from . import ensembles
from .landscape_report import landscape_files, report_landscapes
from .recipes import RECIPES
from .record import read_record, seconds_text, seed_files
from .tables import difference_rows, spread, table

__all__ = ['report', 'compare', 'load', 'curves', 'ends']


_REFRESHED = ', batch norm refreshed'


def report(folder) -> str:
    """The report on the seeds that `reproduce` has left in `folder`, as Markdown; also written there as report.md, with its figure, curves.png.

    Only complete seeds count. Raises `ValueError` if `folder` has none, if a file in it is damaged, or if its seeds are of different settings.
    """
    folder = Path(folder)
    if landscape_files(folder): return report_landscapes(folder)
    records, unfinished = load(folder)
    fig, axs = plt.subplots(1, 2, figsize=(12, 4.2), layout='constrained')
    if RECIPES[records[0]['recipe']].ensembles:
        found = ensembles.load(folder)
        sections = ensembles.sections(records, found)
        accuracy, loss, draw = ensembles.size_curves(found, 'accuracy'), ensembles.size_curves(found, 'loss'), plot_sizes
        band = ': mean and its standard error'
    else:
        sections = _sections(records)
        accuracy, loss, draw = curves(records, 'accuracy'), curves(records, 'valid_loss'), plot_runs
        band = ': mean, and from the least to the greatest'
    text = '\n\n'.join([*_head(records, unfinished), *sections]) + '\n'
    draw({name: (x, 100 * (1 - values)) for name, (x, values) in accuracy.items()}, axs[0], 'test error, %')
    draw(loss, axs[1], 'test loss')
    fig.suptitle(f'{records[0]["recipe"]}, {_seeds(len(records))}' + band * (len(records) > 1))
    with replacing(folder/'curves.png') as f:
        fig.savefig(f, format='png', dpi=110)
    plt.close(fig)
    write_text(folder/'report.md', text)
    return text


def load(folder: Path) -> tuple[list[dict], list[dict]]:
    "The records of the complete seeds in `folder`, and those of the others, in the order of the seeds. Raises as `report` does."
    if not folder.is_dir(): raise ValueError(f'{folder} is no folder')
    records = [read_record(file) for file in seed_files(folder).values()]
    complete = [r for r in records if r['finished']]
    if not complete: raise ValueError(f'{folder} has no complete seed' + (f', and {len(records)} begun' if records else ''))
    if complete[0]['recipe'] not in RECIPES: raise ValueError(f'{folder} is of a recipe that is not known: {complete[0]["recipe"]}')
    for r in complete[1:]:
        for k in ('recipe', 'settings', 'images'):
            if r[k] == complete[0][k]: continue
            raise ValueError(f'{folder} mixes runs: seed {r["seed"]} has {k} {r[k]}, seed {complete[0]["seed"]} {complete[0][k]}')
    return complete, [r for r in records if not r['finished']]


def compare(folder, other) -> str:
    """The paired differences between two folders of `reproduce`, row by row, for the seeds that both have, as Markdown.

    Raises `ValueError` as `report` does, if their lengths differ, if they have no seed in common, or if they compare ensembles.
    """
    both = [{r['seed']: r for r in load(Path(f))[0]} for f in (folder, other)]
    seeds, names = sorted(both[0].keys() & both[1].keys()), [Path(f).name for f in (folder, other)]
    if not seeds: raise ValueError(f'{folder} and {other} have no seed in common')
    if any(RECIPES[r['recipe']].ensembles for records in both for r in records.values()): raise ValueError('ensembles cannot be compared row by row')
    if len({r['budget'] for records in both for r in records.values()}) > 1: raise ValueError(f'{folder} and {other} are of different lengths')
    a, b = ({name: values for name, (_, values) in ends([records[s] for s in seeds], 'accuracy').items()} for records in both)
    gains = {f'{name}, {names[0]}': values for name, values in a.items()} | {f'{name}, {names[1]}': values for name, values in b.items()}
    pairs = [(f'{name}, {names[0]}', f'{name}, {names[1]}') for name in a if _REFRESHED not in name]
    return f'Paired differences of {_seeds(len(seeds))}, in points of accuracy:\n\n' + table(difference_rows(gains, pairs)) + '\n'


def column(record: dict, run: str, name: str) -> list:
    "Column `name` over the epochs of `run`, those included that it shares with others; `None` where it has no value."
    parts = [p for p in record['parts'] if run in p['runs']]
    return [row.get(name) for p in sorted(parts, key=lambda p: p['begin']) for row in p['epochs']]


def ends(records: list[dict], name: str) -> dict[str, tuple[int, np.ndarray]]:
    "Row of the table -> its number of epochs, and `name` ('accuracy' or 'valid_loss') at its end for each seed."
    budget = records[0]['budget']
    lengths = {f'{b:g}B': int(budget * b) for b in (1, 1.25, 1.5)}
    def at(run, column_name, epochs): return epochs, np.array([_float(column(r, run, column_name)[epochs - 1]) for r in records])
    rows = {}
    for b in ('1B', '1.5B'):
        rows[f'SGD {b}'] = at(f'SGD {b}', name, lengths[b])
        rows[f'SGD {b}{_REFRESHED}'] = at(f'SGD {b}', f'swa_{name}', lengths[b])
    for b in lengths: rows[f'SWA run at {b}, single weights'] = at('SWA', name, lengths[b])
    for b in lengths: rows[f'SWA {b}'] = at('SWA', f'swa_{name}', lengths[b])
    return rows


def curves(records: list[dict], name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    "Curve -> its epochs (counted from 1: after so many), and `name` at each for each seed, shape (seeds, epochs)."
    res = {}
    for label, run, key in (('SGD 1B', 'SGD 1B', name), ('SGD 1.5B', 'SGD 1.5B', name), ('SWA run, single weights', 'SWA', name),
                            ('SWA run, average', 'SWA', f'swa_{name}')):
        values = np.array([[_float(v) for v in column(r, run, key)] for r in records])
        shown = ~np.isnan(values).all(0)
        res[label] = np.flatnonzero(shown) + 1, values[:, shown]
    return res


def _head(records, unfinished):
    first = records[0]
    recipe, settings, images = RECIPES[first['recipe']], first['settings'], first['images']
    is_whole = settings['scale'] == 1 and ((images['train'], images['valid']) == (50_000, 10_000) or recipe.source == images['kind'])
    yield f'# {recipe.name}'
    said = [f'{_seeds(len(records))} ({", ".join(str(r["seed"]) for r in records)}); {images["kind"]}, {images["train"]:,} training and '
            f'{images["valid"]:,} test images (SHA-256 {images["sha256"]}...)']
    if not is_whole:
        said.append(f'**not at full length: lengths times {settings["scale"]:g}, {images["train"]:,} training images'
                    + ': the published row is not reproduced' * bool(recipe.published) + '**')
    if 'JPEG' in images['kind']: said.append("the images are JPEG-compressed: absolute accuracies are not comparable with the papers'")
    said += [f'{_hardware(records)}; {settings["precision"]}' + f', torch.compile {settings["compile"]}' * bool(settings['compile'])
             + '; ' + _versions(records),
             f'{seconds_text(_seconds(records, False))} an epoch, {seconds_text(_seconds(records, True))} where the average is validated (medians)'
             + _side_by_side(records)]
    said += [f'seed {r["seed"]}: the {run} run diverged, nothing of it is finite' for r in records for run in _diverged(r)]
    said += [f'seed {r["seed"]} is not complete and not counted' for r in unfinished]
    yield '\n'.join(f'- {s}' for s in said)


def _sections(records):
    published = RECIPES[records[0]['recipe']].published
    accuracies, losses = ends(records, 'accuracy'), ends(records, 'valid_loss')
    if not _has_batch_norm(RECIPES[records[0]['recipe']]):    # there is nothing to refresh
        accuracies = {name: values for name, values in accuracies.items() if _REFRESHED not in name}
    of_three = ' (n = 3)' * any(std for _, std in published.values())
    rows = [['', 'epochs', f'test accuracy, % (n = {len(records)})', 'test loss', f'published, %{of_three}']]
    for name, (epochs, values) in accuracies.items():
        rows.append([name, str(epochs), spread(100 * values, 2), spread(losses[name][1], 4), _published(published.get(name))])
    yield table(rows)

    yield ('Paired differences, seed by seed, in points of accuracy:' if len(records) > 1 else
           'Differences in points of accuracy; one seed cannot tell them from chance:')
    pairs = (('SWA 1B', 'SGD 1B'), ('SWA 1B', f'SGD 1B{_REFRESHED}'), ('SWA 1.25B', 'SGD 1B'), ('SWA 1.5B', 'SGD 1B'), ('SWA 1.5B', 'SGD 1.5B'),
             ('SWA 1.5B', f'SGD 1.5B{_REFRESHED}'),
             ('SWA 1.5B', 'SWA run at 1.5B, single weights'), ('SGD 1.5B', 'SGD 1B'))
    yield table(difference_rows({name: values for name, (_, values) in accuracies.items()}, pairs, published))
    yield '![test error and loss over the epochs](curves.png)'


def _published(pair):
    if pair is None: return ''
    return f'{pair[0]:.2f}' + ('' if pair[1] is None else f' +- {pair[1]:.2f}')

def _float(v): return float('nan') if v is None else v

def _seeds(n): return f'{n} seed{"s" * (n > 1)}'

def _hardware(records):
    def machine(r, h): return h['gpu'] if 'gpu' in h else f'CPU, {h["machine"]}, {r["threads"]} thread{"s" * (r["threads"] > 1)}'
    return '; '.join(dict.fromkeys(machine(r, s['hardware']) for r in records for s in r['sessions']))

def _versions(records):
    return ' / '.join(dict.fromkeys(', '.join(f'{k} {v}' for k, v in s['versions'].items()) for r in records for s in r['sessions']))

def _side_by_side(records):
    jobs = sorted({s['jobs'] for r in records for s in r['sessions']})
    return '' if jobs == [1] else f', {" or ".join(map(str, jobs))} seeds side by side'

def _rows(record): return [row for p in record['parts'] for row in p['epochs']]

def _seconds(records, folds):
    return np.median([row['seconds'] for r in records for row in _rows(r) if (row.get('swa_accuracy') is not None) == folds])

def _diverged(record): return [p['runs'][0] for p in record['parts'] if len(p['runs']) == 1 and p['epochs'][-1]['swa_accuracy'] is None]

def _has_batch_norm(recipe):
    with torch.device('meta'): model = recipe.network(recipe.n_classes)
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
