"""What `python -m fastai_swa demo` runs: SGD and SWA from the same start, on digits or on a folder of images."""
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import error_rate
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner
from fastprogress import fastprogress

from .experiments.tables import mean_and_half
from .files import replacing, save_weights
from .learner import EpochScheduler    # brings fit_swa along
from .plot import plot_swa
from .schedules import swa_lr_factor
from .vision import digits, digits_net, image_folder

__all__ = ['demo', 'summary']

_SGD = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)    # the papers' optimizer; fastai's own decouples weight decay


def demo(data=None, arch='resnet18', epochs=12, seeds=None, lr=.1, swa_lr=None, swa_start=.5, bs=None, size=None, pretrained=False,
         out='swa-demo') -> np.ndarray:
    """Train with SGD and with SWA from the same seeds, show the table of the first SWA fit, print what all found, draw `out`.png.

    - `data`: an image folder (`vision.image_folder`), trained with torchvision's `arch`, whose average, of the first seed, is saved
      as `out`.pth; `None`: scikit-learn's digits with a small network.
    - `epochs`, `lr`, `swa_lr`, `swa_start`: as for `fit_swa`, but `swa_lr` defaults to `lr / 2`, the ratio of the SWA paper's
      WRN-28-10; SGD gets as many epochs and falls to `lr / 100` by the same rule.
    - `seeds`: number of repetitions; default 5 on digits, 1 on a folder.

    Returns errors in %, shape (seeds, 3): SGD at its end, last single weights of the SWA run, their average.
    Raises what `image_folder` and `fit_swa` raise, and `ValueError` for an `arch` that torchvision does not have.
    """
    if data is None:
        dls, seeds, what = digits(n_train=500, bs=bs or 32), seeds or 5, 'scikit-learn digits, small batch-norm network'
    else:
        if arch not in torchvision.models.list_models(torchvision.models):
            raise ValueError(f"arch must be one of torchvision's classifiers, such as resnet18, not {arch!r}")
        dls, seeds, what = image_folder(data, size=size, bs=bs or 64), seeds or 1, f'{Path(data).name}, {arch}'
    print(f'{what}: {len(dls.train_ds)} training and {len(dls.valid_ds)} validation images, {epochs} epochs, {seeds} seed(s)\n')

    def new_learner(seed):
        set_seed(seed, reproducible=True)
        dls.train.rng = Random(seed)    # the loader's own: it orders the images
        settings = dict(loss_func=CrossEntropyLossFlat(), opt_func=_SGD, lr=lr, wd=5e-4, wd_bn_bias=True, metrics=error_rate)
        if data is None: return Learner(dls, digits_net(), **settings)
        learn = vision_learner(dls, getattr(torchvision.models, arch), pretrained=pretrained, **settings)
        learn.unfreeze()
        return learn

    def sgd_schedule(epoch, step, n_steps): return lr * swa_lr_factor(epoch, step, n_steps, epochs - 1, .01)

    errors, start = [], perf_counter()
    for seed in range(seeds):
        learn = new_learner(seed)
        with _progress(shown=seed == 0):
            swa = learn.fit_swa(epochs, lr=lr, swa_lr=lr/2 if swa_lr is None else swa_lr, swa_start=swa_start)
            row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
            if seed == 0:
                first = learn, swa
                print(f'\n{swa}\n')
            sgd = new_learner(seed)
            with sgd.no_logging(): sgd.fit(epochs, lr, cbs=EpochScheduler({'lr': sgd_schedule}))
        errors.append([100*sgd.recorder.values[-1][-1], 100*row['error_rate'], 100*row['swa_error_rate']])
        print(f'seed {seed}: error {errors[-1][0]:.2f} % with SGD, {errors[-1][2]:.2f} % with SWA  ({perf_counter() - start:.0f} s)')
    errors = np.array(errors)
    print('\n' + summary(errors, first[1].n_averaged))
    _draw(first[0].recorder, errors, Path(f'{out}.png'))
    print(f'\nwrote {out}.png')
    if data is not None:
        save_weights(Path(f'{out}.pth'), first[1].swa_model.state_dict())
        print(f'wrote {out}.pth, the averaged weights: learn.model.load_state_dict(torch.load({out + ".pth"!r}))')
    return errors


def summary(errors: np.ndarray, n_averaged: int) -> str:
    "What `errors`, in % and of shape (seeds, 3) as `demo` returns them, show: means, standard deviations, the paired difference."
    n = len(errors)
    def stats(x): return f'{x.mean():5.2f}' + (f' +- {x.std(ddof=1):.2f}' if n > 1 else '')
    names = 'SGD, at its end', 'SWA run, its last single weights', f'SWA run, the average of {n_averaged} epoch{"s" * (n_averaged > 1)}'
    lines = [f'validation error, %{"":16}{"mean +- std of " + str(n) + " seeds" if n > 1 else "one seed"}']
    lines += [f'{name:<34}{stats(column)}' for name, column in zip(names, errors.T)]
    gain = errors[:, 0] - errors[:, 2]
    if n == 1: return '\n'.join([*lines, f'SWA {_verb(gain[0])}; one seed cannot tell that from chance'])
    mean, half = mean_and_half(gain)
    lines.append(f'SWA {_verb(mean)} (seed by seed; 95 % confidence interval {mean - half:.2f} to {mean + half:.2f}; '
                 f'better in {(gain > 0).sum()} of {n})' + ('; that may be chance' if half >= abs(mean) else ''))
    return '\n'.join(lines)


def _verb(gain): return f'is {abs(gain):.2f} points {"better" if gain > 0 else "worse"} than SGD' if gain else 'is level with SGD'


@contextmanager
def _progress(shown):
    "fastai's table without bars where the output is not a terminal; nothing at all unless `shown`."
    bar, old = fastprogress.ConsoleProgressBar, (fastprogress.NO_BAR, fastprogress.WRITER_FN, fastprogress.ConsoleProgressBar.fill)
    if not shown or not sys.stdout.isatty(): fastprogress.NO_BAR, bar.fill = True, ''    # a bar prints its first mark even so
    if not shown: fastprogress.WRITER_FN = lambda *args, **kwargs: None
    try: yield
    finally: fastprogress.NO_BAR, fastprogress.WRITER_FN, bar.fill = old


def _draw(recorder, errors, path):
    n = 2 + (len(errors) > 1)
    fig, axs = plt.subplots(1, n, figsize=(5.2*n, 4), layout='constrained')
    plot_swa(recorder, axs[:2])
    if n == 3:
        ax = axs[2]
        for row in errors: ax.plot([0, 1], row[[0, 2]], color='0.6', lw=1, marker='o', ms=4)
        ax.plot([0, 1], errors[:, [0, 2]].mean(0), color='C3', lw=3, marker='o', label=f'mean of {len(errors)} seeds')
        ax.set(xticks=[0, 1], xticklabels=['SGD', 'SWA'], xlim=(-.4, 1.4), ylabel='validation error, %', title='the end of each run, by seed')
        ax.grid(alpha=.25)
        ax.legend(fontsize='small')
    axs[0].set_title('seed 0')
    with replacing(path) as f:
        fig.savefig(f, format='png', dpi=120)
    plt.close(fig)
