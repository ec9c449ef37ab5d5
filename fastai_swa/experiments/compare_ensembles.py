"""Ensembles at one training budget: what the members that a recipe's seeds have left predict
together, and what that costs."""

from pathlib import Path
from time import perf_counter

import torch

from ..ensemble import Ensemble
from ..weights import read_index
from .record import json_number, snapshots_folder, weights_file
from .scores import disagreement, scores
from .store import store, stored

__all__ = ['METHODS', 'evaluate', 'is_compared', 'load_comparison']

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
    out = Path(out)
    members = {seed: _members_of_seed(out, seed) for seed in seeds}
    preds = {}  # seed, method -> (members, n, classes)
    for seed in seeds:
        for method in METHODS:
            preds[seed, method], targets = Ensemble(members[seed][method], learn).member_preds()
    found = {
        'kind': 'ensembles',
        'seed': _TOGETHER,
        'seeds': list(seeds),
        'sizes': _rows_of_sizes(preds, targets),
        'budgets': _rows_of_budgets(preds, targets, seeds),
        'costs': _costs(members[seeds[0]], learn),
    }
    store(out, found)
    return found


def _members_of_seed(out, seed) -> dict[str, list[Path]]:
    "Method -> the files of its members."
    return {
        'SGD': [weights_file(out, seed, 'SGD 1B')],
        'SWA': [weights_file(out, seed, 'SWA average')],
        'snapshots': _snapshot_files(out, seed, 'snapshots'),
        'FGE': _snapshot_files(out, seed, 'FGE'),
    }


def _snapshot_files(out, seed, run) -> list[Path]:
    folder = snapshots_folder(out, seed, run)
    return [folder / file for file in read_index(folder)['files']]


# what they predict


def _rows_of_sizes(preds, targets) -> list[dict]:
    rows = []
    for (seed, method), probs in preds.items():
        for m in range(1, len(probs) + 1):
            chosen = probs[-m:] if method == 'snapshots' else probs[:m]
            rows.append({'seed': seed, 'method': method} | _scores_together(chosen, targets))
    return rows


def _rows_of_budgets(preds, targets, seeds) -> list[dict]:
    rows = []
    for method in METHODS:
        for k in range(1, len(seeds) + 1):
            for group in _disjoint_groups(seeds, k):
                probs = torch.cat([preds[seed, method] for seed in group])
                rows.append({'budgets': k, 'method': method} | _scores_together(probs, targets))
    return rows


def _disjoint_groups(seeds, k) -> list:
    "As many groups of `k` seeds as there can be of which none is in two."
    return [seeds[i : i + k] for i in range(0, len(seeds) - k + 1, k)]


def _scores_together(probs, targets) -> dict:
    "Of members that predict `probs` (members, n, classes)."
    found = scores(probs.mean(0), targets)
    return found | {'members': len(probs), 'disagreement': json_number(disagreement(probs))}


# what that costs


def _costs(members: dict[str, list[Path]], learn) -> list[dict]:
    batches = [x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid]
    sample = [batches[0][:1]]
    models = {}
    for method, files in members.items():
        with Ensemble(files, learn).active():
            models[method] = learn.model
    for model in models.values():
        model.eval()
    of_sample = dict.fromkeys(members, float('inf'))
    of_all = dict.fromkeys(members, float('inf'))
    with torch.no_grad():
        for _ in range(7):  # in turn, so that what else the machine does falls on all
            for method, model in models.items():
                _seconds(model, batches[:1])  # warm
                of_sample[method] = min(of_sample[method], _seconds(model, sample))
                of_all[method] = min(of_all[method], _seconds(model, batches))
    size = sum(t.numel() * t.element_size() for t in learn.model.state_dict().values())
    return [
        {
            'method': method,
            'members': len(files),
            'sample': of_sample[method],
            'test set': of_all[method],
            'bytes': size * len(files),
        }
        for method, files in members.items()
    ]


def _seconds(model, xs) -> float:
    start = perf_counter()
    for x in xs:
        out = model(x)
    out.sum().item()  # all is done
    return perf_counter() - start


# what the file of the row holds


def load_comparison(folder: Path) -> dict:
    "What `evaluate` found. Raises `ValueError` if it is not there or damaged."
    found = _find_comparison(folder)
    if found is None:
        raise ValueError(f'{folder} has no comparison of its ensembles: the same reproduce command makes it')
    return found


def is_compared(folder: Path, seeds) -> bool:
    "Is what `seeds` have left part of a comparison already?"
    found = _find_comparison(folder)
    return found is not None and set(seeds) <= set(found['seeds'])


def _find_comparison(folder) -> dict | None:
    return stored(folder, 'ensembles').get(_TOGETHER)
