"""What `python -m fastai_swa demo` runs: SWA, SGD and one-cycle from the same start, on digits or
on a folder of images."""

import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import error_rate
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner
from fastprogress import fastprogress
from matplotlib.ticker import MaxNLocator

from .callback import SWACallback
from .experiments.tables import mean_and_half
from .files import replacing, save_weights
from .learner import EpochScheduler  # brings fit_swa along
from .schedules import start_epoch, swa_lr_factor
from .vision import digits, digits_net, image_folder

__all__ = ['demo', 'summary']

# the papers' optimizer; fastai's own decouples weight decay
_SGD = partial(OptimWrapper, opt=torch.optim.SGD, momentum=0.9)


def demo(
    data=None,
    arch='resnet18',
    epochs=12,
    seeds=None,
    lr=0.1,
    swa_lr=None,
    swa_start=0.5,
    bs=None,
    size=None,
    pretrained=False,
    out='swa-demo',
    label_noise=0.2,
) -> np.ndarray:
    """Train with SWA, with SGD and with `fit_one_cycle` from the same seeds, show the tables of the
    first seed, print what all found, draw `out`.png.

    - `data`: an image folder (`vision.image_folder`), trained with torchvision's `arch`, whose
      average, of the first seed, is saved as `out`.pth; `None`: scikit-learn's digits with a small
      network.
    - `epochs`, `lr`, `swa_lr`, `swa_start`: as for `fit_swa`, but `swa_lr` defaults to `lr / 2`,
      the ratio of the SWA paper's WRN-28-10; SGD gets as many epochs and falls to `lr / 100` by the
      same rule; one-cycle as many, with its peak at `lr`.
    - `seeds`: number of repetitions; default 5 on digits, 1 on a folder.
    - `label_noise`: that share of the digits' training labels is drawn at random. (Of clean digits
      all methods read the same share right, within chance.)

    Returns errors in %, shape (seeds, 4): SGD at its end, last single weights of the SWA run, their
    average, one-cycle at its end. Raises what `image_folder` and `fit_swa` raise, and `ValueError`
    for an `arch` that torchvision does not have.
    """
    _check_start(swa_start, epochs)
    task = _digits(bs, label_noise) if data is None else _images(data, arch, size, bs, pretrained)
    seeds = seeds or task.seeds
    n_train, n_valid = len(task.dls.train_ds), len(task.dls.valid_ds)
    print(f'{task.what}: {n_train} training and {n_valid} validation images, {epochs} epochs, {seeds} seed(s)')
    fits = {
        'SWA': lambda learn: learn.fit_swa(epochs, lr, lr / 2 if swa_lr is None else swa_lr, swa_start),
        'SGD': lambda learn: _fit_sgd(learn, epochs, lr),
        'one-cycle': lambda learn: learn.fit_one_cycle(epochs, lr),
    }

    errors, start = [], perf_counter()
    for seed in range(seeds):
        runs, returned = _train(task, fits, lr, seed)
        if seed == 0:
            first, average = runs, returned['SWA']
        errors.append(_ends(runs))
        of_sgd, _, of_average, of_one_cycle = errors[-1]
        said = f'{of_sgd:.2f} % with SGD, {of_one_cycle:.2f} % with one-cycle, {of_average:.2f} % with SWA'
        under_way = f'seed {seed}' if seed == 0 else ''  # of the others `_train` has said it
        print(f'{under_way}: error {said}  ({perf_counter() - start:.0f} s)')
    errors = np.array(errors)
    print('\n' + summary(errors, average.n_averaged))
    if data is not None:
        save_weights(Path(f'{out}.pth'), average.swa_model.state_dict())
        load = f'learn.model.load_state_dict(torch.load({out + ".pth"!r}))'
        print(f'\nwrote {out}.pth, the averaged weights: {load}')
    _draw(first, errors, Path(f'{out}.png'))
    print(f'\nwrote {out}.png')
    return errors


def _check_start(swa_start, epochs):
    "Raise `ValueError` if a fit of so many epochs would average nothing."
    start = start_epoch(SWACallback(swa_start).swa_start, epochs)
    if start >= epochs:
        raise ValueError(
            f'swa_start={swa_start} is never reached: the epochs are counted from 0, and {epochs} end with epoch '
            f'{epochs - 1}; use a lower --swa-start, a share of the epochs such as 0.5, or more --epochs'
        )


@dataclass
class _Task:
    "What the demo trains on."

    dls: DataLoaders
    what: str  # in words
    seeds: int  # so many where nothing else is said
    learner: Callable  # makes one, of the settings that all have


def _digits(bs, label_noise) -> _Task:
    dls = digits(n_train=500, bs=bs or 32, label_noise=label_noise)
    noise = f', {100 * label_noise:g} % of the training labels drawn at random' if label_noise else ''
    what = f'scikit-learn digits{noise}, small batch-norm network'
    return _Task(dls, what, 5, lambda **settings: Learner(dls, digits_net(), **settings))


def _images(folder, arch, size, bs, pretrained) -> _Task:
    if arch not in torchvision.models.list_models(torchvision.models):
        raise ValueError(f"arch must be one of torchvision's classifiers, such as resnet18, not {arch!r}")
    dls = image_folder(folder, size=size, bs=bs or 64)

    def learner(**settings):
        learn = vision_learner(dls, getattr(torchvision.models, arch), pretrained=pretrained, **settings)
        learn.unfreeze()
        return learn

    return _Task(dls, f'{Path(folder).name}, {arch}', 1, learner)


def _fit_sgd(learn, epochs, lr):
    "The papers' control, down to a hundredth of `lr`."

    def schedule(epoch, step, n_steps):
        return lr * swa_lr_factor(epoch, step, n_steps, epochs - 1, 0.01)

    learn.fit(epochs, lr, cbs=EpochScheduler({'lr': schedule}))


def _train(task, fits, lr, seed) -> tuple[dict, dict]:
    """All `fits` from the start that `seed` gives: name -> column of the table -> its value in each
    epoch; name -> what the fit returns. Those of the first seed are shown.
    """
    runs, returned = {}, {}
    for name, fit in fits.items():
        set_seed(seed, reproducible=True)
        task.dls.train.rng = Random(seed)  # the loader's own: it orders the images
        settings = dict(opt_func=_SGD, lr=lr, wd=5e-4, wd_bn_bias=True, metrics=error_rate)
        learn = task.learner(loss_func=CrossEntropyLossFlat(), **settings)
        if seed == 0:
            print(f'\n{name}, seed 0:')
        else:
            print(f', {name}' if runs else f'seed {seed}: {name}', end='', flush=True)
        with _progress(learn, shown=seed == 0):
            returned[name] = fit(learn)
        runs[name] = _columns(learn)
    if seed == 0:
        print()
    return runs, returned


def _ends(runs) -> list:
    "Errors at the end, in %, in the order that `demo` returns them."
    sgd, swa, one_cycle = runs['SGD'], runs['SWA'], runs['one-cycle']
    columns = sgd['error_rate'], swa['error_rate'], swa['swa_error_rate'], one_cycle['error_rate']
    return [100 * column[-1] for column in columns]


def summary(errors: np.ndarray, n_averaged: int) -> str:
    """What `errors`, in % and of shape (seeds, 4) as `demo` returns them, show: means, standard
    deviations, paired differences.
    """
    n = len(errors)

    def stats(x):
        spread = f' +- {x.std(ddof=1):.2f}' if n > 1 else ''
        return f'{x.mean():5.2f}{spread}'

    sgd, single, average, one_cycle = errors.T
    said = 'SWA run, the average of ' + ('1 epoch' if n_averaged == 1 else f'{n_averaged} epochs')
    rows = {
        'SGD, at its end': sgd,
        'one-cycle, at its end': one_cycle,
        'SWA run, its last single weights': single,
        said: average,
    }
    of_what = f'mean +- std of {n} seeds' if n > 1 else 'one seed'
    lines = [f'{"validation error, %":<34}{of_what}']
    lines += [f'{name:<34}{stats(column)}' for name, column in rows.items()]
    return '\n'.join([*lines, _compared(sgd - average, 'SGD'), _compared(one_cycle - average, 'one-cycle')])


def _compared(gain, other):
    "What the average gains over another run, seed by seed."
    if len(gain) == 1:
        return f'SWA {_verb(gain[0], other)}; one seed cannot tell that from chance'
    mean, half = mean_and_half(gain)
    chance = '; that may be chance' if half >= abs(mean) else ''
    return (
        f'SWA {_verb(mean, other)} (seed by seed; 95 % confidence interval {mean - half:.2f} to {mean + half:.2f}; '
        f'better in {(gain > 0).sum()} of {len(gain)}){chance}'
    )


def _verb(gain, other):
    if np.isnan(gain):
        return f'cannot be compared with {other}: one of them diverged'
    if gain == 0:
        return f'is level with {other}'
    return f'is {abs(gain):.2f} points {"better" if gain > 0 else "worse"} than {other}'


def _columns(learn) -> dict:
    "Column of the table -> its value in each epoch of the last fit."
    names = learn.recorder.metric_names[1:]
    return dict(zip(names, zip(*learn.recorder.values)))


@contextmanager
def _progress(learn, shown):
    "fastai's table without bars where the output is not a terminal; nothing at all unless `shown`."
    bar = fastprogress.ConsoleProgressBar
    old = fastprogress.NO_BAR, bar.fill
    if not shown or not sys.stdout.isatty():
        fastprogress.NO_BAR = True
        bar.fill = ''  # a bar prints its first mark even so
    try:
        with nullcontext() if shown else learn.no_logging():
            yield
    finally:
        fastprogress.NO_BAR, bar.fill = old


_CURVES = {  # label -> run, prefix of its columns, style
    'SGD': ('SGD', '', dict(color='0.4', ls='--')),
    'one-cycle': ('one-cycle', '', dict(color='C2', ls='-.')),
    'SWA run, single weights': ('SWA', '', dict(color='C0', lw=1, marker='.')),
    'SWA run, average': ('SWA', 'swa_', dict(color='C3', lw=2.5, marker='o', ms=4)),
}


def _draw(first: dict, errors, path):
    "The runs of the first seed, epoch by epoch, and the ends of all seeds."
    n = 3 if len(errors) > 1 else 2
    fig, axs = plt.subplots(1, n, figsize=(5.2 * n, 4.4), layout='constrained')
    _draw_curves(axs[0], first, 'error_rate', 100, 'validation error, %')
    _draw_curves(axs[1], first, 'valid_loss', 1, 'validation loss')
    fig.legend(*axs[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, frameon=False)
    if n == 3:
        _draw_ends(axs[2], errors)
    with replacing(path) as f:
        fig.savefig(f, format='png', dpi=120)
    plt.close(fig)


def _draw_curves(ax, first, column, scale, label):
    late = []
    for name, (run, prefix, style) in _CURVES.items():
        values = scale * np.array(first[run][prefix + column])
        ax.plot(np.arange(1, len(values) + 1), values, label=name, **style)
        late += [v for v in values[len(values) // 2 :] if np.isfinite(v)]  # the start would hide the end
    if late:  # else all have diverged
        margin = np.ptp(late) + 1e-9
        ax.set_ylim(min(late) - 0.1 * margin, max(late) + 0.25 * margin)
    ax.set(xlabel='epochs', ylabel=label, title='seed 0')
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.25)


def _draw_ends(ax, errors):
    shown = errors[:, [0, 3, 2]]
    for row in shown:
        ax.plot(range(3), row, color='0.6', lw=1, marker='o', ms=4)
    ax.plot(range(3), shown.mean(0), color='black', lw=3, marker='s')
    ax.set(
        xticks=range(3),
        xticklabels=['SGD', 'one-cycle', 'SWA'],
        xlim=(-0.4, 2.4),
        ylabel='validation error, %',
        title=f'the ends of {len(errors)} seeds, their mean in black',
    )
    ax.grid(alpha=0.25)
