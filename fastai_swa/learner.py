"""`Learner` methods."""

import numpy as np
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Learner
from fastai.torch_core import rank_distrib
from fastcore.basics import GetAttr, patch
from fastcore.foundation import L
from fastcore.meta import delegates

from .callback import SWACallback
from .checks import check_count, check_positive
from .ensemble import Ensemble
from .fine_tune_soup import fine_tune_soup as soup_of_fine_tunings
from .landscape import figures, line, plane, rays
from .landscape.surfaces import Profile
from .landscape.wise_ft import wise_ft as between_fine_tunings
from .names import is_learners_own
from .schedules import fge_epochs, fge_lr_factor, snapshot_lr_factor, start_epoch, swa_lr_factor
from .snapshots import SnapshotCallback
from .solutions import has_solutions, named_solutions
from .warn import warn

__all__ = ['EpochScheduler']


def _attribute(self, name):
    "As fastai has it, but that `learn.swa` before `to_swa` is said to be that, and not a lack of the model's."
    try:
        return GetAttr.__getattr__(self, name)
    except AttributeError:
        if name != 'swa':
            raise
    raise AttributeError(
        'learn.swa is there after learn.to_swa(); the SWACallback of a single fit is what was passed as cbs, or what '
        'fit_swa returned'
    )


# not by `patch`, which would leave that name in this module, where Python takes it for the module's
Learner.__getattr__ = _attribute


@patch
def to_swa(self: Learner, **kwargs):
    """Attach a `SWACallback(**kwargs)` for all later fits; it is then `learn.<name>`, by default
    `learn.swa`. An earlier one of that name is replaced. Returns the learner. Raises `ValueError`
    for a name that is something else of the learner's, and what `SWACallback` raises."""
    swa = SWACallback(**kwargs)
    if is_learners_own(self, swa._name, SWACallback):
        raise ValueError(f'name={swa._name!r} is an attribute of the learner already: give the average another name')
    return self.remove_swa(swa._name).add_cb(swa)


@patch
def remove_swa(self: Learner, name: str = None):
    """Detach the `SWACallback` of that name, or all of them; callback and average stay usable.
    Returns the learner.
    """
    return self.remove_cbs([cb for cb in self.cbs if isinstance(cb, SWACallback) and name in (None, cb._name)])


@patch
def fit_swa(
    self: Learner,
    n_epoch: int,  # number of epochs
    lr=None,  # learning rate of the first half, a number or a slice; default: the learner's
    # learning rate while averaging; a pair (hi, lo): falling from hi to lo over each cycle;
    # default: lr / 10
    swa_lr=None,
    swa_start=0.75,  # as in `SWACallback`
    cycle_len=1,  # as in `SWACallback`; an int where `swa_lr` is a pair
    wd: float = None,  # weight decay; default: the learner's
    cbs=None,  # more callbacks for this fit
    **swa_kwargs,  # other arguments of `SWACallback`, and `include_start`, see below
) -> SWACallback:
    """Fit with the SWA papers' schedule (`schedules.swa_lr_factor`) and average; returns the
    callback, which holds the average.

    The learning rate is `lr` for half the way to `swa_start`, falls to `swa_lr` in a straight line
    until 0.9 of it, or until epoch `swa_start` where that comes first, and stays (or, for a pair,
    goes through cycles): every epoch that is averaged is trained at `swa_lr`. Momentum is left
    alone; with a slice all groups follow the same curve, and `swa_lr` is that of the last one. A
    `swa_lr` above `lr` gets a warning, but for `swa_start=0`, where there is no `lr` to come from:
    `fit_swa(n, lr, swa_lr=lr, swa_start=0)` is the tail after a training, at a constant rate; with a pair, as
    `swa_lr=(lr, lr / 100)`, at a cyclic one. With `include_start=True` the weights that the fit starts from are the
    average's first point.

    Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used.
    """
    n_epoch = check_count('n_epoch', n_epoch)
    if swa_lr is not None:
        swa_lr = _check_swa_lr(swa_lr)
    include_start = swa_kwargs.pop('include_start', False)
    swa = SWACallback(swa_start=swa_start, cycle_len=cycle_len, **swa_kwargs)
    swa.include_start = _check_include_start(include_start, swa.swa_start)
    if isinstance(swa_lr, tuple) and not isinstance(swa.cycle_len, int):
        raise ValueError(f'cycle_len must be an int where swa_lr is a pair (hi, lo), not {cycle_len!r}')
    lr, lrs = _group_lrs(self, 'lr', lr)
    if swa_lr is None:
        factor = 0.1
    elif isinstance(swa_lr, tuple):
        factor = tuple(x / lrs[-1] for x in swa_lr)
    else:
        factor = swa_lr / lrs[-1]
    if swa_lr is not None and swa.swa_start != 0:
        _warn_if_above(swa_lr, lrs[-1])
    start = start_epoch(swa.swa_start, n_epoch)

    def schedule(epoch, step, n_steps):
        return lrs * swa_lr_factor(epoch, step, n_steps, start, factor, swa.cycle_len)

    self.fit(n_epoch, lr, wd=wd, cbs=[EpochScheduler({'lr': schedule}), swa, *L(cbs)])
    return swa


@patch
def fit_snapshots(
    self: Learner,
    n_cycles: int,  # number of snapshots
    cycle_len: int,  # epochs of each cycle, which ends in a snapshot
    lr=None,  # learning rate at the start of each cycle, a number or a slice; default: the learner's
    folder=None,  # for the snapshots' files; None: they stay in the host's memory
    wd: float = None,  # weight decay; default: the learner's
    cbs=None,  # more callbacks for this fit
    activation: str = None,  # as in `SnapshotCallback`
    max_preds_mb: float = 256,  # of validation predictions to keep for the columns; 0: no columns
) -> Ensemble:
    """Fit in cycles of a cosine that falls to zero, and keep the weights at the end of each;
    returns them as an `Ensemble`.

    The columns `ens_valid_loss` and `ens_<metric>` are of all snapshots so far; what they take of
    memory, and `max_preds_mb`: see `SnapshotCallback`.
    `SWACallback(cycle_len - 1, cycle_len=cycle_len)` in `cbs` averages the same weights. Huang et
    al. 2017 (arXiv 1704.00109), `schedules.snapshot_lr_factor`.

    Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used.
    """
    n_cycles = check_count('n_cycles', n_cycles)
    cycle_len = check_count('cycle_len', cycle_len)
    snapshots = SnapshotCallback(cycle_len - 1, cycle_len, folder, activation, max_preds_mb)
    lr, lrs = _group_lrs(self, 'lr', lr)
    n_epoch = n_cycles * cycle_len

    def schedule(epoch, step, n_steps):
        return lrs * snapshot_lr_factor(epoch * n_steps + step, n_epoch * n_steps, n_cycles)

    self.fit(n_epoch, lr, wd=wd, cbs=[EpochScheduler({'lr': schedule}), snapshots, *L(cbs)])
    return snapshots.ensemble(self)


@patch
def fit_fge(
    self: Learner,
    n_cycles: int,  # number of snapshots
    cycle_len: int,  # epochs of each cycle, an even number: 2 or 4 in the paper
    lr_max=None,  # learning rate at the start of each cycle, a number or a slice; default: the learner's
    lr_min: float = None,  # and in its middle, where the snapshot is taken; default: lr_max / 100
    folder=None,
    wd: float = None,
    cbs=None,
    activation: str = None,  # as in `fit_snapshots`
    max_preds_mb: float = 256,
) -> Ensemble:
    """Fast geometric ensembling: go on from a trained model in short cycles, and keep the weights
    at their low points; returns an `Ensemble`.

    The learning rate falls from `lr_max` to `lr_min` in a straight line and rises again; the fit
    ends at the low point of the last cycle, after `n_cycles * cycle_len - cycle_len / 2` epochs.
    The paper starts from 80 % of a usual SGD run. `SWACallback(cycle_len // 2 - 1,
    cycle_len=cycle_len)` in `cbs` averages the same weights. Garipov et al. 2018 (arXiv
    1802.10026), `schedules.fge_lr_factor`.

    Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used.
    """
    n_cycles = check_count('n_cycles', n_cycles)
    cycle_len = check_count('cycle_len', cycle_len)
    if cycle_len % 2:
        raise ValueError(
            f'cycle_len must be an even number of epochs, with the snapshot in the middle, not {cycle_len}'
        )
    snapshots = SnapshotCallback(cycle_len // 2 - 1, cycle_len, folder, activation, max_preds_mb)
    if lr_min is not None:
        check_positive('lr_min', lr_min)
    lr, lrs = _group_lrs(self, 'lr_max', lr_max)
    factor = 0.01 if lr_min is None else lr_min / lrs[-1]
    if factor > 1:
        raise ValueError(f'lr_min must be at most lr_max={lrs[-1]:g}, not {lr_min!r}')

    def schedule(epoch, step, n_steps):
        return lrs * fge_lr_factor(epoch, step, n_steps, cycle_len, factor)

    self.fit(fge_epochs(n_cycles, cycle_len), lr, wd=wd, cbs=[EpochScheduler({'lr': schedule}), snapshots, *L(cbs)])
    return snapshots.ensemble(self)


@patch
def fine_tune_soup(
    self: Learner,
    epochs: int,  # of each run
    base_lrs,  # as `base_lr` of `fine_tune`, one for each run; the first one is that of the frozen stage
    freeze_epochs: int = 1,  # of the frozen stage, which all runs share
    folder=None,  # for what is done, with which the same call goes on after a crash; None: in memory
    seeds=None,  # for each run what all random generators begin with; None: all go on from the frozen stage
    cbs=None,  # more callbacks: each fit gets copies of its own
    **kwargs,  # other arguments of `fine_tune`, such as lr_mult or wd
) -> Ensemble:
    """Fine-tune several times from one frozen stage: each run is the second stage of `fine_tune`, at a rate or with a
    seed of its own; returns the runs' weights as an `Ensemble`, whose `soup` makes one model of them, and whose `runs`
    is a table of what each has come to. The learner is afterwards as it was at the end of the frozen stage.

    Costs the frozen stage and `epochs` for each run. With `folder` nothing that is done is lost: the same call, made
    again, goes on within the run under way and ends bitwise the same; more rates or seeds may be added.
    `Ensemble(folder, learn)` reads the members. A run that ends with weights that are not finite is left out, which is
    said.

    Wortsman et al. 2022 (arXiv 2203.05482). Raises `TypeError` or `ValueError`, naming the argument, for one that
    cannot be used, or a folder of another soup; `RuntimeError` in several processes; at its end `OSError` if a member
    could not be written.
    """
    return soup_of_fine_tunings(self, epochs, base_lrs, freeze_epochs, folder, seeds, cbs, **kwargs)


@patch
@delegates(rays)
def plot_width(
    self: Learner,
    solutions,  # as for `rays`; a SWACallback stands for its average, and the learner's own weights beside it
    column: str = None,
    level: float = None,
    ax=None,
    wd: float = 0.0,  # as for `figures.plot_width`
    **kwargs,
):
    """Draw how loss or metric rise with the distance from `solutions`, on random rays; returns the
    axes.

    `rays(learn, solutions)` gives the numbers, `figures.plot_width` draws them; this does both. With
    `file` it can be interrupted and the numbers stay. Raises what `rays` raises.
    """
    return figures.plot_width(rays(self, _beside_own(self, solutions), **kwargs), column, level, ax, wd)


@patch
@delegates(line)
def plot_line(
    self: Learner,
    # two, as for `line`; a SWACallback stands for the way from the learner's own weights through
    # its average
    solutions,
    columns=None,
    ax=None,
    wd: float = 0.0,  # as for `figures.plot_line`
    **kwargs,
):
    """Draw loss and metric on the straight line through two solutions; returns the array of axes.
    Raises what `line` raises.
    """
    return figures.plot_line(line(self, _beside_own(self, solutions), **kwargs), columns, ax, wd)


@patch
@delegates(plane)
def plot_plane(
    self: Learner,
    # three, as for `plane`; what has `solutions()`, such as a SnapshotCallback or an Ensemble, stands
    # for its first, middle and last ones, and all as the trajectory
    solutions,
    column: str = None,
    ax=None,
    wd: float = 0.0,
    top: float = None,  # as for `figures.plot_plane`
    **kwargs,
):
    """Draw loss or metric in the plane through three solutions; returns the axes. Raises what
    `plane` raises.
    """
    if has_solutions(solutions):
        path = named_solutions(solutions)
        names = list(path)
        if len(path) > 3:
            kwargs = {'trajectory': path} | kwargs
        if len(path) > 2:
            solutions = {name: path[name] for name in (names[0], names[len(names) // 2], names[-1])}
    return figures.plot_plane(plane(self, solutions, **kwargs), column, ax, wd, top)


@patch
def wise_ft(
    self: Learner,
    before,  # the weights before fine-tuning: a state dict, module, learner or path
    by: str = 'valid_loss',  # column to pick t by: the loss, or a metric of the learner
    ts=11,  # where to measure: values of t, or so many from 0 to 1
    dl=None,  # loader of the samples to pick t on, such as shifted ones; default: the validation set
    exclude=(),  # names of parameters or modules that stay the learner's at every t
    comp=None,  # np.less or np.greater; default: less for a loss or an error, else greater
) -> Profile:
    """WiSE-FT: loss and metrics on the straight line from the weights before a fine-tuning (t = 0) to the learner's
    (t = 1). Picks the best t, and where other samples chose it says what it is on the validation set. The learner stays
    as it is; `apply()` of what is returned puts the weights at the chosen t into it, `averaged()` lends them.

    Interpolated are the floating-point parameters that both have under one name and shape, except `exclude`; all else,
    such as a new head, is the learner's at every t. With a head that was trained alone, take the weights after that
    (`fine_tune_soup` branches there). Batch norm is refreshed on the whole training set at each of the `ts`, and the
    validation set, and `dl`, are passed through once.

    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903). Raises `ValueError` if fewer than
    half of the parameters are shared, for an unknown column or name, and what `line` raises.
    """
    return between_fine_tunings(self, before, by, ts, dl, exclude, comp)


def _beside_own(learn, solutions):
    if not isinstance(solutions, SWACallback):
        return solutions
    if not solutions.n_averaged:
        raise ValueError(
            'this SWACallback has averaged nothing yet: pass it to a fit first, as in learn.fit(5, cbs=swa), that '
            f'comes to its swa_start={solutions.swa_start}'
        )
    return {'own weights': learn, 'average': solutions}


class EpochScheduler(ParamScheduler):
    """A `ParamScheduler` whose functions get `(epoch, step, n_steps)`, counted from 0, instead of
    the share of training done.
    """

    by_epoch = True

    def before_batch(self):
        for name, f in self.scheds.items():
            self.opt.set_hyper(name, f(self.epoch, self.iter, self.n_iter))


def _group_lrs(learn, name, lr):
    "`lr`, or the learner's own, and what it is for each parameter group."
    if learn.opt is None:
        learn.create_opt()  # which may set `learn.lr`
    lr = learn.lr if lr is None else lr
    ends = [lr.start, lr.stop] if isinstance(lr, slice) and lr.start is not None else [getattr(lr, 'stop', lr)]
    for end in ends:
        check_positive(name, end, 'a number or a slice')
    learn.opt.set_hyper('lr', lr)
    return lr, np.array([h['lr'] for h in learn.opt.hypers])


def _check_swa_lr(swa_lr):
    "`swa_lr` as a float or a pair of floats."
    is_pair = isinstance(swa_lr, tuple | list) and len(swa_lr) == 2
    pair = swa_lr if is_pair else (swa_lr,)
    for x in pair:
        check_positive('swa_lr', x, 'a number or a pair (hi, lo)')
    if pair[0] < pair[-1]:
        raise ValueError(f'swa_lr must be a pair (hi, lo) with hi >= lo, not {swa_lr!r}')
    return tuple(map(float, pair)) if is_pair else float(swa_lr)


def _check_include_start(include_start, swa_start) -> bool:
    if not isinstance(include_start, bool):
        raise TypeError(f'include_start must be True or False, not {include_start!r}')
    if include_start and swa_start != 0:
        raise ValueError(
            f'include_start=True averages what the fit starts from, and needs swa_start=0, not {swa_start!r}'
        )
    return include_start


def _warn_if_above(swa_lr, lr):
    "Warn if averaging begins at a rate above `lr`: most likely an epoch was meant."
    highest = swa_lr[0] if isinstance(swa_lr, tuple) else swa_lr
    if highest <= lr * (1 + 1e-9) or rank_distrib():  # rounding is no rise; once for all processes
        return
    given = f'({swa_lr[0]:g}, {swa_lr[1]:g})' if isinstance(swa_lr, tuple) else f'{swa_lr:g}'
    warn(
        f'swa_lr={given} is above lr={lr:g}: swa_lr is the learning rate while averaging, to which the rate now rises; '
        'if it was meant as the first epoch to average, that is swa_start'
    )
