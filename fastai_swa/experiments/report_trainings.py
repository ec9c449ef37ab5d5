"""The part of a report that is on SGD, SWA and what is trained beside: its table beside the
published numbers, its curves and its numbers."""

import numpy as np

from ..plot import plot_lengths, plot_runs
from .recipes import PRETRAINED, RECIPES
from .rows import curves, curves_of_lengths, error_name, error_of, pairs_of, rows_of, values
from .tables import difference_rows, differences, markdown_table, spread, summary

__all__ = ['sections', 'numbers', 'draw', 'has_learned_nothing']


def sections(records: list[dict]) -> list[str]:
    "The tables of the report."
    errors, losses = _errors_and_losses(records)
    published = _published_errors(records[0])
    at_chance = {name for name in errors if has_learned_nothing(errors[name], records[0])}
    if len(records) > 1:
        said = 'Paired differences, seed by seed, in points of error and in test loss (less is better):'
    else:
        said = (
            'Differences in points of error and in test loss (less is better); one seed cannot tell them from chance:'
        )
    compared = None
    if published:
        compared = {name: pair for name, pair in published.items() if name not in at_chance}
    return [
        markdown_table(_result_rows(records, errors, losses, published, at_chance)),
        said,
        markdown_table(difference_rows(errors, pairs_of(records[0]), 2, compared, losses)),
        '![test error and loss over the epochs](curves.png)',
    ]


def _errors_and_losses(records) -> tuple[dict, dict]:
    "Row -> a value for each seed, that of the baseline among them."
    errors = values(records, 'error')
    losses = values(records, 'valid_loss')
    if 'baseline' in records[0]:
        name, errors_of_it, losses_of_it = _baseline(records)
        errors[name] = errors_of_it
        losses[name] = losses_of_it
    return errors, losses


def _published_errors(record) -> dict:
    "Row -> mean, and standard deviation or `None`, in per cent."
    published = RECIPES[record['recipe']].published
    return {name: (100 - mean, std) for name, (mean, std) in published.items()}


def _result_rows(records, errors, losses, published, at_chance) -> list[list[str]]:
    recipe = RECIPES[records[0]['recipe']]
    head = ['', 'epochs', f'{error_name(recipe)} (n = {len(records)})', 'test loss']
    if published:
        has_spread = any(std for _, std in published.values())
        head.append('published, % (n = 3)' if has_spread else 'published, %')
    rows = [head]
    for name, row in rows_of(records[0]).items():
        cells = [name, str(row.epochs), spread(errors[name], 2), spread(losses[name], 4)]
        if published:
            cells.append(_published_cell(published.get(name), name in at_chance, recipe))
        rows.append(cells)
    if 'baseline' in records[0]:
        rows.append(_baseline_row(records, published))
    return rows


def _baseline_row(records, published) -> list[str]:
    name, error, loss = _baseline(records)
    label = name if name == PRETRAINED else f'{name} (scikit-learn)'
    cells = [label, '', spread(error, 2), spread(loss, 4)]
    if published:
        cells.append(_published_cell(published.get(name), False, RECIPES[records[0]['recipe']]))
    return cells


def _published_cell(pair, is_at_chance, recipe) -> str:
    if pair is None:
        return ''
    if is_at_chance:
        return f'learned nothing: chance is {100 - 100 / recipe.n_classes:g}'
    mean, std = pair
    return f'{mean:.2f}' if std is None else f'{mean:.2f} +- {std:.2f}'


def _baseline(records) -> tuple[str, np.ndarray, np.ndarray]:
    "What another method gets on the same data: its name, error and loss for each seed."
    found = [record['baseline'] for record in records]
    errors = np.array([error_of(baseline['metric']) for baseline in found])
    losses = np.array([baseline['loss'] for baseline in found])
    return found[0]['name'], errors, losses


def has_learned_nothing(errors: np.ndarray, record: dict) -> bool:
    """Is the mean of `errors`, in per cent, within three standard errors of what guessing gets?

    On images one of the classes at random; of a number to be predicted its mean. Of tables' classes
    it is not known.
    """
    recipe = RECIPES[record['recipe']]
    if recipe.metric == 'r2_score':
        return bool(np.nanmean(errors) >= 100)
    if recipe.n_classes is None:
        return False
    guessed = 1 / recipe.n_classes
    by_chance = (guessed * (1 - guessed) / record['images']['valid']) ** 0.5
    return bool(np.nanmean(errors) > 100 * (1 - guessed - 3 * by_chance))


def numbers(records: list[dict]) -> dict:
    "What report.json holds of them."
    errors, losses = _errors_and_losses(records)
    epochs = {name: {'epochs': row.epochs} for name, row in rows_of(records[0]).items()}
    rows = {}
    for name in errors:
        rows[name] = epochs.get(name, {}) | {'error': summary(errors[name]), 'loss': summary(losses[name])}
    return {'rows': rows, 'differences': differences(errors, losses, pairs_of(records[0]))}


def draw(records: list[dict], axs):
    """Error and loss over the epochs, on two axes; or over the lengths, and below, on two more, their differences from
    the plain run of each length, seed by seed.
    """
    recipe = RECIPES[records[0]['recipe']]
    quantities = {'error': error_name(recipe), 'valid_loss': 'test loss'}
    if not recipe.lengths:
        for ax, (name, label) in zip(axs, quantities.items()):
            plot_runs(curves(records, name), ax, label)
        return
    for (above, below), (name, label) in zip(axs.T, quantities.items()):
        found = curves_of_lengths(records, name)
        plot_lengths(found, above, label)
        above.get_legend().remove()  # it is that of the axes below
        plain = found[recipe.opt][1]
        against_plain = {method: (lengths, values - plain) for method, (lengths, values) in found.items()}
        plot_lengths(against_plain, below, f'{label}: difference from {recipe.opt}')
