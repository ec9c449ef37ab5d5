"""Ensembles at one training budget: what the members that a recipe's seeds have left predict
together, and what that costs."""

from pathlib import Path
from time import perf_counter

import torch

from ..ensemble import Ensemble
from ..weights import read_index
from .record import json_number, snapshots_folder, weights_file
from .scores import disagreement, measures
from .store import store, stored

__all__ = ['METHODS', 'evaluate', 'is_compared', 'load']

METHODS = 'SGD', 'SWA', 'snapshots', 'FGE'
_TOGETHER = -1  # in the place of a seed, in the file of the row


def evaluate(out: Path, seeds, learn) -> dict:
    """Predict the test set of `learn` with what `seeds` have left in `out`, and measure it; returns
    what the file of the row then holds of it.

    - 'sizes': one row for each seed, method and number of members m: of the snapshots the last m,
      as their paper has it, of FGE the first.
    - 'budgets': one row for each method, k, and group of k seeds, of which none is in two: all
      their members. For SGD these are independent runs.
    - 'costs': of each method with all members of one seed: least seconds for one sample and for the
      test set, bytes of weights.
    """
    members = {seed: _members(Path(out), seed) for seed in seeds}
    preds, targets = {}, None
    for seed in seeds:
        for method in METHODS:
            preds[seed, method], targets = Ensemble(members[seed][method], learn).member_preds()

    def row(ps, **keys):
        return (
            keys | measures(ps.mean(0), targets) | {'members': len(ps), 'disagreement': json_number(disagreement(ps))}
        )

    sizes = [
        row(ps[-m:] if method == 'snapshots' else ps[:m], seed=seed, method=method)
        for (seed, method), ps in preds.items()
        for m in range(1, len(ps) + 1)
    ]
    groups = [(k, seeds[i : i + k]) for k in range(1, len(seeds) + 1) for i in range(0, len(seeds) - k + 1, k)]
    budgets = [
        row(torch.cat([preds[seed, method] for seed in group]), budgets=k, method=method)
        for method in METHODS
        for k, group in groups
    ]
    found = {
        'kind': 'ensembles',
        'seed': _TOGETHER,
        'seeds': list(seeds),
        'sizes': sizes,
        'budgets': budgets,
        'costs': _costs(members[seeds[0]], learn),
    }
    store(Path(out), found)
    return found


def _members(out, seed) -> dict:
    def files(run):
        folder = snapshots_folder(out, seed, run)
        return [folder / file for file in read_index(folder)['files']]

    return {
        'SGD': [weights_file(out, seed, 'SGD 1B')],
        'SWA': [weights_file(out, seed, 'SWA average')],
        'snapshots': files('snapshots'),
        'FGE': files('FGE'),
    }


def _costs(members, learn) -> list[dict]:
    batches, models = [x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid], {}
    for method, files in members.items():
        with Ensemble(files, learn).active():
            models[method] = learn.model

    def seconds(model, xs):
        start = perf_counter()
        for x in xs:
            out = model(x)
        out.sum().item()  # all is done
        return perf_counter() - start

    best = {method: [float('inf')] * 2 for method in members}
    for _ in range(7):  # in turn, so that what else the machine does falls on all
        for method, model in models.items():
            model.eval()
            with torch.no_grad():
                seconds(model, batches[:1])  # warm
                best[method] = [
                    min(old, seconds(model, xs)) for old, xs in zip(best[method], ([batches[0][:1]], batches))
                ]
    size = sum(t.numel() * t.element_size() for t in learn.model.state_dict().values())
    return [
        {'method': m, 'members': len(files), 'sample': best[m][0], 'test set': best[m][1], 'bytes': size * len(files)}
        for m, files in members.items()
    ]


def load(folder: Path) -> dict:
    "What `evaluate` found. Raises `ValueError` if it is not there or damaged."
    found = _stored(folder)
    if found is None:
        raise ValueError(f'{folder} has no comparison of its ensembles: the same reproduce command makes it')
    return found


def is_compared(folder: Path, seeds) -> bool:
    "Is what `seeds` have left part of a comparison already?"
    found = _stored(folder)
    return found is not None and set(seeds) <= set(found['seeds'])


def _stored(folder):
    return stored(folder, 'ensembles').get(_TOGETHER)
