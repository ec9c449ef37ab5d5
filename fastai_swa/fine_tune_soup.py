"`fine_tune_soup`: one frozen stage, and from its end a fine-tuning for each rate or seed."

import copy
from inspect import signature

import numpy as np
import pandas as pd
import torch
from fastai.callback.schedule import Learner  # from there, since its file gives it fine_tune and fit_one_cycle
from fastcore.foundation import L, noop

from .averaging import all_finite
from .branches import Branches, Run, opened
from .checkpoint import CheckpointCallback, data_sizes, look_before_the_first_fit
from .checks import check_count, check_positive
from .columns import recorder_of
from .ensemble import Ensemble
from .fitting import FitCallback
from .modules import unwrap
from .processes import Processes
from .randomness import seed_all
from .state import restore, take
from .warn import warn
from .weights import weights_of

__all__ = ['fine_tune_soup']

_OWN = 'lr_mult', 'pct_start', 'div'  # arguments that fastai's `fine_tune` has for its second stage


def fine_tune_soup(learn: Learner, epochs, base_lrs, freeze_epochs, folder, seeds, cbs, **kwargs) -> Ensemble:
    "See `Learner.fine_tune_soup`."
    epochs = check_count('epochs', epochs)
    freeze_epochs = check_count('freeze_epochs', freeze_epochs, least=0)
    runs = planned(base_lrs, seeds)
    cbs = list(L(cbs))
    _check_callbacks(cbs, learn)
    if Processes(learn).size > 1:
        raise RuntimeError('fine_tune_soup trains in one process: call it outside of distrib_ctx')
    defaults = signature(Learner.fine_tune).parameters
    stage = {name: kwargs.pop(name, defaults[name].default) for name in _OWN}
    unknown = sorted(kwargs.keys() - signature(Learner.fit_one_cycle).parameters.keys())
    if unknown:
        raise TypeError(f'fine_tune_soup got {unknown[0]!r}, which is no argument of fine_tune')
    if learn.opt is None:
        learn.create_opt()
    settings = {'epochs': epochs, 'freeze_epochs': freeze_epochs, 'first base_lr': runs[0].base_lr, **stage}
    settings |= {name: repr(value) for name, value in kwargs.items()}
    settings |= {'data': data_sizes(learn), 'hyperparameters': sorted(learn.opt.hypers[0])}
    if folder is not None:
        look_before_the_first_fit(learn)  # before it is brought to the branch
    branches = opened(runs, folder, settings)
    try:
        _to_branch(learn, branches, freeze_epochs, cbs, kwargs)
        for run in runs:
            if not run.has_ended:
                _train(learn, branches, run, epochs, stage, cbs, kwargs)
        return _ensemble(learn, branches)
    finally:
        if branches.state is not None:
            restore(learn, branches.state)
        branches.release()


def planned(base_lrs, seeds) -> list[Run]:
    """A run for each of the `base_lrs` and `seeds`; either may be one for all runs. Raises `TypeError` or `ValueError`,
    naming it, for what cannot be used.
    """
    rates = [float(check_positive('base_lrs', lr, 'a number or several')) for lr in _several(base_lrs)]
    numbers = [None] * len(rates)
    if seeds is not None:
        numbers = [check_count('seeds', seed, least=0) for seed in _several(seeds)]
    for name, given in (('base_lrs', rates), ('seeds', numbers)):
        if not given:
            raise ValueError(f'{name} is empty: one is needed at least')
    if len(rates) == 1:
        rates = rates * len(numbers)
    if len(numbers) == 1:
        numbers = numbers * len(rates)
    if len(rates) != len(numbers):
        raise ValueError(f'base_lrs and seeds must be as many, or one of either, not {len(rates)} and {len(numbers)}')
    runs = [Run(lr, seed) for lr, seed in zip(rates, numbers)]
    if len({run.name for run in runs}) < len(runs):
        raise ValueError('two runs of one rate need different seeds: they would be the same')
    return runs


def _several(given) -> list:
    "The numbers in an array, a tensor or a list; or one."
    if isinstance(given, np.ndarray | torch.Tensor):
        return given.reshape(-1).tolist()
    return list(L(given))


def _check_callbacks(cbs, learn):
    if any(isinstance(cb, CheckpointCallback) for cb in [*cbs, *learn.cbs]):
        raise ValueError('fine_tune_soup keeps checkpoints of its own: pass folder= instead of a CheckpointCallback')
    for cb in cbs:
        if isinstance(cb, FitCallback) and getattr(cb, 'folder', None) is not None:
            raise ValueError(
                f'{type(cb).__name__} writes to {cb.folder}, and each run would write there: give it no folder'
            )


def _to_branch(learn, branches: Branches, freeze_epochs, cbs, kwargs):
    "Train the frozen stage, unless that is done; the learner is at the branch afterwards."
    learn.freeze()
    if branches.state is not None:
        restore(learn, branches.state)
        branches.keep_anchor(weights_of(learn.model))
        return
    if freeze_epochs:
        base_lr = branches.runs[0].base_lr
        own = [*_fresh(cbs), *branches.checkpoint(learn, 'frozen', noop)]
        # as `fine_tune` does it
        learn.fit_one_cycle(freeze_epochs, slice(base_lr), pct_start=0.99, cbs=own, **kwargs)
    branches.keep_branch(take(learn), weights_of(learn.model))


def _train(learn, branches: Branches, run: Run, epochs, stage, cbs, kwargs):
    "Train a run from the branch."
    restore(learn, branches.state)
    if run.seed is not None:
        seed_all(learn, run.seed)

    def keep():
        run.values = _last_row(learn)
        is_finite = all_finite(unwrap(learn.model).parameters())
        if not is_finite:
            warn(f'the run {run.name} has ended with weights that are not finite: it is left out')
        branches.keep_run(run, weights_of(learn.model) if is_finite else None)

    # as `fine_tune` does its second stage
    base_lr = run.base_lr / 2
    rates = slice(base_lr / stage['lr_mult'], base_lr)
    learn.unfreeze()
    own = [*_fresh(cbs), *branches.checkpoint(learn, run.name, keep)]
    learn.fit_one_cycle(epochs, rates, pct_start=stage['pct_start'], div=stage['div'], cbs=own, **kwargs)
    if not run.has_ended:
        keep()


def _fresh(cbs) -> list:
    return [copy.deepcopy(cb) for cb in cbs]


def _last_row(learn) -> dict:
    "Column -> value in the last epoch, as text where it is no number JSON knows."
    recorder = recorder_of(learn)
    if recorder is None or not len(recorder.values):
        return {}
    names = list(recorder.metric_names)[1 : len(recorder.metric_names) - bool(recorder.add_time)]
    return {name: _number(value) for name, value in zip(names, recorder.values[-1])}


def _number(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _ensemble(learn, branches: Branches) -> Ensemble:
    kept = [run for run in branches.runs if run.weights is not None]
    if not kept:
        raise ValueError('all runs have ended with weights that are not finite: try lower base_lrs')
    res = Ensemble([run.weights for run in kept], learn)
    res.anchor = branches.anchor
    res.runs = _table(branches.runs, kept)
    if branches.errors:
        raise branches.errors[0]
    branches.close(res.probabilities.kind)
    return res


def _table(runs, kept) -> pd.DataFrame:
    rows = []
    for run in runs:
        member = kept.index(run) if run in kept else None
        rows.append({'base_lr': run.base_lr, 'seed': run.seed, **run.values, 'member': member})
    return pd.DataFrame(rows)
