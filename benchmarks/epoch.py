"""What an epoch of a recipe costs, as the experiment runner trains it, and what each of its means
buys.

Variants, timed in turn, round by round: the runner's own; with fastai's Recorder, which reads the
loss in every step; with a loader that makes one batch at a time; with fastai's own SGD; without
bf16; compiled, with `--compile`. `host` is the processor time of the process's main thread per
step: what a GPU waits for if it is faster.

    python benchmarks/epoch.py [--recipe NAME ...] [--data FOLDER] [--images N] [--rounds N]
    [--device cpu|cuda] [--compile MODE]

The recipe `host` has a network of one layer: all that it costs is the loop, the loader and the
optimizer.
"""

import argparse
import statistics
import time
from dataclasses import replace
from functools import partial

import torch
from fastai.learner import Recorder
from fastai.optimizer import SGD
from torch import nn

from fastai_swa.experiments import RECIPES, Recipe, Settings
from fastai_swa.experiments.machine import process_settings
from fastai_swa.experiments.recipe_learner import EpochRecorder, recipe_data, recipe_learner


def tiny(n):
    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(12, n))


RECIPES['host'] = Recipe('host', tiny, 10, 4, 0.05, 0.01, 3, 5e-4, bs=16)  # small batches: many steps


def learners(recipe, settings, dls, modes):
    "Variant -> a learner."
    res = {'the runner': recipe_learner(recipe, 0, settings, dls)}
    res["fastai's Recorder"] = learn = recipe_learner(recipe, 0, settings, dls)
    learn.remove_cb(EpochRecorder)
    learn.add_cb(Recorder())
    res['a batch at a time'] = learn = recipe_learner(recipe, 0, settings, dls)
    learn.dls.train.chunk = 1
    res["fastai's SGD"] = learn = recipe_learner(recipe, 0, settings, dls)
    learn.opt_func = partial(SGD, mom=0.9, decouple_wd=False)
    learn.create_opt()
    if settings.precision == 'bf16':
        res['fp32'] = recipe_learner(recipe, 0, replace(settings, precision='fp32'), dls)
    for mode in modes:
        res[f'compiled, {mode}'] = recipe_learner(recipe, 0, replace(settings, compile=mode), dls)
    return res


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipe', nargs='+', default=['host'])
    parser.add_argument('--data', default='digits')
    parser.add_argument('--images', type=int)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--compile', nargs='*', default=[])
    args = parser.parse_args()
    on_gpu = args.device.startswith('cuda')
    if not on_gpu:
        torch.set_num_threads(1)
    settings = Settings(device=args.device, precision='bf16' if on_gpu else 'fp32')
    with process_settings(settings):
        for name in args.recipe:
            measure(name, settings, args)


def measure(name, settings, args):
    "Print the table of one recipe."
    on_gpu = args.device.startswith('cuda')
    recipe = RECIPES[name]
    dls, images = recipe_data(recipe, args.data, replace(settings, images=args.images))
    variants = learners(recipe, settings, dls, args.compile)
    seconds, host = ({v: [] for v in variants} for _ in range(2))
    for i in range(args.rounds + 1):  # the first warms up, and compiles
        for v, learn in variants.items():
            with learn.no_logging(), learn.no_bar():
                learn._do_epoch_validate = lambda *args, **kwargs: None  # the training part alone
                if on_gpu:
                    torch.cuda.synchronize()
                start, cpu = time.perf_counter(), time.thread_time()
                learn.fit(1)
                if on_gpu:
                    torch.cuda.synchronize()
            if i:
                seconds[v].append(time.perf_counter() - start), host[v].append(time.thread_time() - cpu)
    n = len(next(iter(variants.values())).dls.train)
    print(f'{name}, {images["train"]:,} images, {n} steps, {args.rounds} rounds, {args.device}\n')
    print('| variant | s an epoch | multiple of the runner (middle half) | host, ms a step |\n|---|---|---|---|')
    for v in variants:
        ratios = sorted(a / b for a, b in zip(seconds[v], seconds['the runner']))
        low, high = (ratios[int(len(ratios) * q)] for q in (0.25, 0.75))
        print(
            f'| {v} | {statistics.median(seconds[v]):.3f} | {statistics.median(ratios):.2f} ({low:.2f}-{high:.2f}) '
            f'| {1e3 * statistics.median(host[v]) / n:.2f} |'
        )
    print()


if __name__ == '__main__':
    main()
