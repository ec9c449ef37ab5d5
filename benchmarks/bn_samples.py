"""How many samples the statistics of batch norm need, for the columns of an average in a fit.

The averages that a recipe has left are validated on the whole test set, once with batch norm refreshed on the
whole training set, and with it refreshed on the first batches of several random orders, as a fit does it. The table
has, over all draws of all seeds, the difference from the whole pass: its mean, and its standard deviation from draw
to draw.

    python benchmarks/bn_samples.py RECIPE [--data FOLDER] [--solutions FOLDER] [--seeds 0 1 2] [--draws N]
"""

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from fastai.torch_core import set_seed

from fastai_swa.experiments import RECIPES, Settings
from fastai_swa.experiments.machine import process_settings
from fastai_swa.experiments.recipe_learner import recipe_data, recipe_learner
from fastai_swa.passes import refresh_bn, refreshable, validate_aside

SAMPLES = 100, 200, 500, 1000, 2000, 5000


@dataclass
class Difference:
    "What a refresh on a part of the training set changes, against the whole pass."

    error: float  # of the test error, in points
    loss: float  # of the test loss


def values(learn, names, n_batches) -> tuple[float, float]:
    "Test error, in per cent, and test loss of the learner's model, refreshed on so many batches; `None`: on all."
    refresh_bn(learn, names, n_batches, in_fit=False)
    with learn.validation_context():
        loss, accuracy = validate_aside(learn)
    return 100 * (1 - accuracy), loss


def draw_anew(learn, seed: int):
    "The next pass takes the training images in another order, augmented in another way."
    set_seed(seed)
    learn.dls.train.rng = Random(seed)
    for transform in learn.dls.train.after_batch.fs:
        if hasattr(transform, 'generator'):
            transform.generator.manual_seed(seed)


def measure(recipe, seeds, draws: int, solutions: Path, settings, data):
    "(seed -> error and loss after the whole pass, samples -> differences); one difference for each draw and seed."
    whole = {}
    differences = {}
    for seed in seeds:
        learn = recipe_learner(recipe, seed, settings, data)
        learn.model.load_state_dict(torch.load(solutions / f'seed-{seed}-swa-average.pth', weights_only=True))
        names = refreshable(learn)
        whole[seed] = error, loss = values(learn, names, None)
        n_images = len(learn.dls.train_ds)
        for n in SAMPLES:
            n_batches = math.ceil(n / recipe.bs)
            if n_batches * recipe.bs >= n_images:
                continue
            for draw in range(draws):
                draw_anew(learn, 1000 * seed + draw)
                part_error, part_loss = values(learn, names, n_batches)
                difference = Difference(part_error - error, part_loss - loss)
                differences.setdefault(n_batches * recipe.bs, []).append(difference)
    return whole, differences


def table(differences) -> str:
    lines = [
        '| samples | draws | error, points | from draw to draw | loss | from draw to draw |',
        '|--:|--:|--:|--:|--:|--:|',
    ]
    for n, found in differences.items():
        errors = [d.error for d in found]
        losses = [d.loss for d in found]
        lines.append(
            f'| {n:,} | {len(found)} | {statistics.mean(errors):+.2f} | {statistics.stdev(errors):.2f} '
            f'| {statistics.mean(losses):+.4f} | {statistics.stdev(losses):.4f} |'
        )
    return '\n'.join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe')
    parser.add_argument('--data', help="folder of images; default: the recipe's own source")
    parser.add_argument('--solutions', type=Path, help='what `reproduce` wrote; default: results/RECIPE')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--draws', type=int, default=5)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    if args.draws < 2:
        parser.error('--draws must be at least 2')
    recipe = RECIPES[args.recipe]
    solutions = args.solutions or Path('results') / args.recipe
    settings = Settings(precision='bf16')
    data, about = recipe_data(recipe, args.data, settings)
    with process_settings(settings, args.threads):
        whole, differences = measure(recipe, args.seeds, args.draws, solutions, settings, data)
    shown = '; '.join(f'{error:.2f} %, {loss:.4f}' for error, loss in whole.values())
    print(
        f'{args.recipe}: {about["train"]:,} training images in batches of {recipe.bs}, {about["valid"]:,} test images, '
        f'seeds {", ".join(map(str, whole))}. Error and loss after the whole pass: {shown}.\n'
    )
    print(table(differences))


if __name__ == '__main__':
    main()
