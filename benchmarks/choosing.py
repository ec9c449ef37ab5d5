"""How often `WeightHistory.choose` says that an average helps where none does.

    python benchmarks/choosing.py [--seeds 20] [--json FILE]

Clean data: scikit-learn's digits, 500 to train, 600 to choose on, 697 to test, split anew for each seed; a network of
two layers without batch norm, 30 epochs, at a constant rate and with one-cycle. Each fit is chosen from by its loss and
by its error.

- *false alarm*: an average was chosen, and on the test samples it is no better than the last weights.
- *by chance*: averages that do not help by construction. For each of the samples to choose on, the differences of all
  averages from the last weights change their sign together or not, at random: none has a gain then, and they are as
  alike as before. In how many of 500 such draws does the best one pass two standard errors?
"""

import argparse
import json
import math
from functools import partial
from unittest import mock

import numpy as np
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import error_rate
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch import nn

from fastai_swa import WeightHistory, choosing

N_TRAIN, N_CHOOSE, N_EPOCH = 500, 600, 30
N_DRAWS = 500
FITS = {
    'constant': lambda learn, **kw: learn.fit(N_EPOCH, 0.1, **kw),
    'one-cycle': lambda learn, **kw: learn.fit_one_cycle(N_EPOCH, 0.3, **kw),
}


def learner(seed: int) -> tuple[Learner, DataLoader]:
    "And the loader of the test samples."
    set_seed(seed, reproducible=True)
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().flatten(1) / 16
    order = np.random.RandomState(seed).permutation(len(images))
    pairs = [(images[i], torch.tensor(bunch.target[i])) for i in order]
    train, held_out = pairs[:N_TRAIN], pairs[N_TRAIN:]
    dls = DataLoaders(DataLoader(train, bs=32, shuffle=True), DataLoader(held_out[:N_CHOOSE], bs=50), device='cpu')
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.9), metrics=error_rate)
    return learn, DataLoader(held_out[N_CHOOSE:], bs=256)


def chosen(history, by: str) -> tuple[dict, float]:
    "What is chosen, and the share of draws in which chance alone would choose."
    seen = []
    gain = choosing.gain

    def noting(scores, last, column, less_is_better):
        seen.append((scores, last))
        return gain(scores, last, column, less_is_better)

    with mock.patch.object(choosing, 'gain', noting), mock.patch('builtins.print'):
        history.choose(by)
    return history.chosen, by_chance(seen[1:], by)


def by_chance(scores, by) -> float:
    differences = np.array([last.parts[by] - s.parts[by] for s, last in scores])  # average, sample or batch
    weights = np.asarray(scores[0][1].weights[by], float)
    weights = weights / weights.sum()
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(N_DRAWS):
        drawn = differences * rng.choice([-1, 1], differences.shape[1])
        gains = drawn @ weights
        n = drawn.shape[1]
        errors = np.sqrt(n / (n - 1) * ((drawn - gains[:, None]) ** 2) @ weights**2)
        best = gains.argmax()
        alarms += gains[best] > 2 * errors[best]
    return alarms / N_DRAWS


def gain_on_test(learn, history, test, column: int) -> float:
    before = learn.validate(dl=test)[column]
    with history.averaged():
        return before - learn.validate(dl=test)[column]


def measure(n_seeds: int) -> list[dict]:
    rows = []
    for schedule, fit in FITS.items():
        found = {'valid_loss': [], 'error_rate': []}
        for seed in range(n_seeds):
            learn, test = learner(seed)
            history = WeightHistory()
            with learn.no_bar(), learn.no_logging():
                fit(learn, cbs=history)
                for column, (by, results) in enumerate(found.items()):
                    which, chance = chosen(history, by)
                    results.append((bool(which), gain_on_test(learn, history, test, column) if which else 0.0, chance))
        for by, results in found.items():
            rows.append(row(schedule, by, results))
            print(rows[-1])
    return rows


def row(schedule, by, results) -> dict:
    gains = np.array([g for is_chosen, g, _ in results if is_chosen])
    n = len(gains)
    return {
        'schedule': schedule,
        'by': by,
        'fits': len(results),
        'chosen': n,
        'false alarms': int((gains <= 0).sum()),
        'mean gain of those chosen': float(gains.mean()) if n else math.nan,
        'its standard error': float(gains.std(ddof=1) / n**0.5) if n > 1 else math.nan,
        'by chance': float(np.mean([chance for *_, chance in results])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, default=20)
    parser.add_argument('--json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(args.seeds)
    if args.json:
        with open(args.json, 'w') as f:
            json.dump(rows, f, indent=1)


if __name__ == '__main__':
    main()
