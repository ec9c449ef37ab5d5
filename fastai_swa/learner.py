"""`Learner` methods."""
from numbers import Real

import numpy as np
from fastai.callback.schedule import ParamScheduler
from fastai.learner import Learner
from fastcore.basics import patch
from fastcore.foundation import L

from .batchnorm import check_count
from .callback import SWACallback
from .schedules import start_epoch, swa_lr_factor

__all__ = ['EpochScheduler']


@patch
def to_swa(self:Learner, **kwargs):
    "Attach a `SWACallback(**kwargs)` for all later fits; it is then `learn.swa`. An earlier one is replaced. Returns the learner."
    return self.remove_swa().add_cb(SWACallback(**kwargs))


@patch
def remove_swa(self:Learner):
    "Detach the `SWACallback` of `to_swa`; the callback object and its average stay usable. Returns the learner."
    return self.remove_cb(SWACallback)


@patch
def fit_swa(self:Learner,
    n_epoch:int,    # number of epochs
    lr=None,    # learning rate of the first half, a number or a slice; default: the learner's
    swa_lr=None,    # learning rate while averaging; a pair (hi, lo): falling from hi to lo over each cycle; default: lr / 10
    swa_start=0.75,    # as in `SWACallback`
    cycle_len:int=1,    # as in `SWACallback`
    wd:float=None,    # weight decay; default: the learner's
    cbs=None,    # more callbacks for this fit
    **swa_kwargs    # other arguments of `SWACallback`
) -> SWACallback:
    """Fit with the SWA papers' schedule (`schedules.swa_lr_factor`) and average; returns the callback, which holds the average.

    The learning rate is `lr` for half the way to `swa_start`, falls to `swa_lr` in a straight line until 0.9 of it, and stays
    (or, for a pair, goes through cycles). Momentum is left alone; with a slice all groups follow the same curve, and `swa_lr` is
    that of the last one. Raises `TypeError` or `ValueError`, naming the argument, for one that cannot be used.
    """
    n_epoch = check_count('n_epoch', n_epoch, optional=False)
    if self.opt is None: self.create_opt()    # which may set `self.lr`
    lr = self.lr if lr is None else lr
    for x in ((lr.stop,) if lr.start is None else (lr.start, lr.stop)) if isinstance(lr, slice) else (lr,): _check_lr('lr', x, lr)
    if swa_lr is not None: swa_lr = _check_swa_lr(swa_lr)
    swa = SWACallback(swa_start=swa_start, cycle_len=cycle_len, **swa_kwargs)
    self.opt.set_hyper('lr', lr)
    lrs = np.array([h['lr'] for h in self.opt.hypers])
    if swa_lr is None: factor = .1
    else: factor = tuple(x / lrs[-1] for x in swa_lr) if isinstance(swa_lr, tuple) else swa_lr / lrs[-1]
    start = start_epoch(swa.swa_start, n_epoch)
    def schedule(epoch, step, n_steps): return lrs * swa_lr_factor(epoch, step, n_steps, start, factor, swa.cycle_len)
    self.fit(n_epoch, lr, wd=wd, cbs=[EpochScheduler({'lr': schedule}), swa, *L(cbs)])
    return swa


class EpochScheduler(ParamScheduler):
    "A `ParamScheduler` whose functions get `(epoch, step, n_steps)`, counted from 0, instead of the share of training done."
    by_epoch = True
    def before_batch(self):
        for name, f in self.scheds.items(): self.opt.set_hyper(name, f(self.epoch, self.iter, self.n_iter))


def _check_swa_lr(swa_lr):
    "`swa_lr` as a float or a pair of floats."
    is_pair = isinstance(swa_lr, tuple | list) and len(swa_lr) == 2
    pair = swa_lr if is_pair else (swa_lr,)
    for x in pair: _check_lr('swa_lr', x, swa_lr, 'a number or a pair (hi, lo)')
    if pair[0] < pair[-1]: raise ValueError(f'swa_lr must be a pair (hi, lo) with hi >= lo, not {swa_lr!r}')
    return tuple(map(float, pair)) if is_pair else float(swa_lr)


def _check_lr(name, x, given, expected='a number or a slice'):
    if isinstance(x, bool) or not isinstance(x, Real): raise TypeError(f'{name} must be {expected}, not {given!r}')
    if not 0 < x < float('inf'): raise ValueError(f'{name} must be positive, not {given!r}')
