"""The runs of a recipe: how long each trains and at which learning rate, and the parts that they share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fastai.callback.schedule import combined_cos

from ..schedules import fge_epochs, fge_lr_factor, snapshot_lr_factor, swa_lr_factor
from .recipes import Recipe

__all__ = ['Run', 'Beside', 'Part', 'sgd_lr', 'swa_lr', 'runs', 'stops', 'parts']


# the learning rates of SGD and SWA


def sgd_lr(recipe: Recipe, epoch: int, n_epoch: int) -> float:
    """The SGD run's learning rate in `epoch` of `n_epoch`: constant for half of them, linear down
    to a hundredth at 0.9, or in the last one where that comes first, constant."""
    return recipe.lr * swa_lr_factor(epoch, 0, 1, n_epoch - 1, 0.01)


def swa_lr(recipe: Recipe, epoch: int) -> float:
    """The SWA run's learning rate in `epoch`: the same curve over the epochs before the first averaged one,
    down to `recipe.swa_lr`; or that all along.
    """
    if recipe.fixed_lr:
        return recipe.swa_lr
    return recipe.lr * swa_lr_factor(epoch, 0, 1, recipe.swa_start, recipe.swa_lr / recipe.lr)


# its runs


@dataclass(frozen=True)
class Beside:
    """A further average beside a run, which leaves its training alone; validated at its end.

    Either of the ends of the epochs from `start` on, all equal; or one of the steps, from the epoch
    on in which the run parts from the others: an exponential one with a `decay` and its warm-up, or a
    power EMA with a relative width `power`.
    """

    name: str  # what its columns begin with
    start: int = 0
    decay: float | None = None
    power: float | None = None

    @property
    def is_of_epochs(self) -> bool:
        return self.decay is None and self.power is None


@dataclass(frozen=True)
class Run:
    """One fit of a recipe.

    An SGD run averages its last epoch alone: this "average" of one point is its end with the batch
    norm refreshed, a control.
    """

    name: str
    lrs: tuple  # the learning rate of each epoch: a number, or something to be called with step and number of steps
    swa_start: int  # the first epoch averaged, from 0
    snapshots: tuple[int, int] | None = None  # the first epoch of a snapshot, and the epochs from one to the next
    beside: tuple[Beside, ...] = ()
    swa_eval_freq: int = 1
    n_averaged: int = 1  # points of the average in each epoch
    keeps_average: bool = False  # as weights, beside those at its end
    # of epoch, step and number of steps; None: the optimizer's own
    momentum: Callable[[int, int, int], float] | None = None
    n_segments: int | None = None  # of a history of its weights; None: without

    @property
    def alone_from(self) -> int:
        "The epoch from which on it cannot be one training with others."
        if self.n_segments is not None:
            return 0
        starts = [self.swa_start]
        starts += [average.start for average in self.beside if average.is_of_epochs]
        if self.snapshots is not None:
            starts.append(self.snapshots[0])
        return min(starts)

    def lr(self, epoch, step, n_steps) -> float:
        lr = self.lrs[epoch]
        return lr(step, n_steps) if callable(lr) else lr


@dataclass(frozen=True)
class OneCycle:
    "Learning rate and momentum of fastai's `fit_one_cycle(n_epoch, lr)`, by its defaults."

    n_epoch: int
    lr_max: float

    def lr(self, epoch, step, n_steps) -> float:
        curve = combined_cos(0.25, self.lr_max / 25, self.lr_max, self.lr_max / 1e5)
        return float(curve(self._share(epoch, step, n_steps)))

    def momentum(self, epoch, step, n_steps) -> float:
        return float(combined_cos(0.25, 0.95, 0.85, 0.95)(self._share(epoch, step, n_steps)))

    def _share(self, epoch, step, n_steps):
        return (epoch + step / n_steps) / self.n_epoch


@dataclass(frozen=True)
class OneCycleEpoch:
    "The learning rate in an epoch of a `OneCycle`."

    epoch: int
    cycle: OneCycle

    def __call__(self, step, n_steps):
        return self.cycle.lr(self.epoch, step, n_steps)


@dataclass(frozen=True)
class CosineEpoch:
    "The learning rate in an epoch of a cycle that falls along half a cosine from `lr` to 0, a step at a time."

    epoch: int
    cycle_len: int
    lr: float

    def __call__(self, step, n_steps):
        return self.lr * snapshot_lr_factor(self.epoch * n_steps + step, self.cycle_len * n_steps, 1)


@dataclass(frozen=True)
class CyclicEpoch:
    "The learning rate in an epoch that is a cycle: it falls from `high` to `low`, reached in the last step."

    high: float
    low: float

    def __call__(self, step, n_steps):
        return swa_lr_factor(0, step, n_steps, 0, (self.high, self.low))


@dataclass(frozen=True)
class FGEEpoch:
    "The learning rate in an epoch of a cycle of fast geometric ensembling."

    epoch: int
    cycle_len: int
    lr: tuple[float, float]

    def __call__(self, step, n_steps):
        return self.lr[0] * fge_lr_factor(self.epoch, step, n_steps, self.cycle_len, self.lr[1] / self.lr[0])


def runs(recipe: Recipe) -> list[Run]:
    """The SGD runs of 1 and of 1.5 budgets, and the SWA run of 1.5, of which 1 and 1.25 are read
    off; where the recipe says so, one-cycle of 1 and 1.5. For a comparison of ensembles SGD, SWA,
    snapshots and FGE, none of which takes more than the budget; for one of lengths SGD, SWA and
    one-cycle of each; for one of averages SWA's schedule, a constant rate and one-cycle, and shorter
    one-cycle runs; tails as the recipe has them. By a cosine there is no SGD run of 1.5 budgets, which
    nothing shares: SWA at 1 is what SGD is compared with at equal length."""
    if recipe.lengths:
        return _runs_of_lengths(recipe)
    if recipe.ensembles:
        return _runs_of_ensembles(recipe)
    if recipe.averages:
        return _runs_of_averages(recipe)
    if recipe.tails:
        return [_tail_run(recipe, tail) for tail in recipe.tails]
    if recipe.cosine:
        return _runs_by_cosine(recipe)
    res = [
        _sgd_run(recipe, 'SGD 1B', recipe.budget),
        _sgd_run(recipe, 'SGD 1.5B', recipe.epochs),
        _swa_run(recipe, recipe.epochs),
    ]
    if recipe.one_cycle_lr:
        res.append(_one_cycle_run(recipe, 'one-cycle 1B', recipe.budget))
        res.append(_one_cycle_run(recipe, 'one-cycle 1.5B', recipe.epochs))
    return res


def _tail_run(recipe, tail) -> Run:
    "Its average is validated at its end alone: a pass for batch norm takes as long as half an epoch."
    lr = CyclicEpoch(*tail.lr) if isinstance(tail.lr, tuple) else tail.lr
    n = recipe.budget
    if tail.n_averaged == 0:
        return Run(tail.name, (lr,) * n, n - 1)
    return Run(tail.name, (lr,) * n, 0, swa_eval_freq=0, n_averaged=tail.n_averaged, keeps_average=True)


def _runs_by_cosine(recipe) -> list[Run]:
    curve = tuple(CosineEpoch(epoch, recipe.budget, recipe.lr) for epoch in range(recipe.budget))
    n_averaged = recipe.epochs - recipe.swa_start
    lrs = curve[: recipe.swa_start] + (recipe.swa_lr,) * n_averaged
    return [Run('SGD 1B', curve, recipe.budget - 1), _averaging_run(recipe, lrs)]


def _runs_of_lengths(recipe) -> list[Run]:
    res = []
    for n in recipe.lengths:
        swa_start = round(n * recipe.swa_start / recipe.budget)
        of_length = replace(recipe, budget=n, swa_start=swa_start)
        swa = _swa_run(of_length, n)
        res += [
            _sgd_run(of_length, f'{recipe.opt} {n}', n),
            replace(swa, name=f'SWA {n}', snapshots=None, swa_eval_freq=0, keeps_average=False),
            _one_cycle_run(of_length, f'one-cycle {n}', n),
        ]
    return res


def _runs_of_ensembles(recipe) -> list[Run]:
    return [
        _sgd_run(recipe, 'SGD 1B', recipe.budget),
        _swa_run(recipe, recipe.budget),
        _snapshots_run(recipe),
        _fge_run(recipe),
    ]


def _runs_of_averages(recipe) -> list[Run]:
    n = recipe.budget
    res = [
        _run_with_history(recipe, f'SWA {n}', tuple(swa_lr(recipe, epoch) for epoch in range(n))),
        _run_with_history(recipe, f'constant {n}', (recipe.swa_lr,) * n),
    ]
    for length in (n, *stops(recipe)):
        cycle = OneCycle(length, recipe.one_cycle_lr)
        lrs = tuple(OneCycleEpoch(epoch, cycle) for epoch in range(length))
        res.append(_run_with_history(recipe, f'one-cycle {length}', lrs, cycle.momentum))
    return res


def stops(recipe: Recipe) -> list[int]:
    "The lengths, in epochs, of the shorter one-cycle runs."
    return [round(share * recipe.budget) for share in recipe.averages.stops]


def _run_with_history(recipe, name, lrs, momentum=None) -> Run:
    "The averages beside it are SWA from the same share of the epochs on as in the budget, an EMA and a power EMA."
    n = len(lrs)
    start = min(round(n * recipe.swa_start / recipe.budget), n - 1)
    beside = *_ema_beside(recipe), Beside('power', power=recipe.averages.power)
    n_segments = max(32, math.ceil(4 * n / 3))  # ends of epochs are then borders
    return Run(name, lrs, start, None, beside, swa_eval_freq=0, momentum=momentum, n_segments=n_segments)


def _sgd_run(recipe, name, n) -> Run:
    lrs = tuple(sgd_lr(recipe, epoch, n) for epoch in range(n))
    return Run(name, lrs, n - 1, beside=_ema_beside(recipe))


def _swa_run(recipe, n) -> Run:
    "Of `n` epochs."
    return _averaging_run(recipe, tuple(swa_lr(recipe, epoch) for epoch in range(n)))


def _averaging_run(recipe, lrs) -> Run:
    "Ten snapshots of the weights that it averages, or fewer, show their path."
    n_averaged = len(lrs) - recipe.swa_start
    snapshots = recipe.swa_start, math.ceil(n_averaged / 10)
    return Run('SWA', lrs, recipe.swa_start, snapshots, _ema_beside(recipe), keeps_average=True)


def _one_cycle_run(recipe, name, n) -> Run:
    "Beside it the mean of the last third of its epochs, and of the last fifth."
    cycle = OneCycle(n, recipe.one_cycle_lr)
    lrs = tuple(OneCycleEpoch(epoch, cycle) for epoch in range(n))
    beside = (
        Beside('third', n - round(n / 3)),
        Beside('fifth', n - round(n / 5)),
        *_ema_beside(recipe),
    )
    return Run(name, lrs, n - 1, beside=beside, momentum=cycle.momentum)


def _ema_beside(recipe) -> tuple[Beside, ...]:
    return () if recipe.ema is None else (Beside('ema', decay=recipe.ema),)


def _snapshots_run(recipe) -> Run:
    methods = recipe.ensembles
    length = recipe.budget // methods.n_snapshots
    if length < 1:
        raise ValueError(
            f'{recipe.budget} epochs are too few for {methods.n_snapshots} snapshots: take a greater scale'
        )
    n = length * methods.n_snapshots
    lrs = tuple(CosineEpoch(epoch % length, length, methods.lr) for epoch in range(n))
    return Run('snapshots', lrs, n - 1, (length - 1, length))


def _fge_run(recipe) -> Run:
    methods = recipe.ensembles
    length = methods.fge_len
    start = round(methods.fge_start * recipe.budget)
    left = recipe.budget - start
    n_cycles = (left + length // 2) // length  # the last of which ends at its low point
    if n_cycles < 1:
        raise ValueError(f'{left} epochs are too few for a cycle of {length}: take a greater scale')
    before = tuple(sgd_lr(recipe, epoch, recipe.budget) for epoch in range(start))
    n = fge_epochs(n_cycles, length)
    cycles = tuple(FGEEpoch(epoch % length, length, methods.fge_lr) for epoch in range(n))
    return Run('FGE', before + cycles, start + n - 1, (start + length // 2 - 1, length))


# the parts that runs share


@dataclass(frozen=True)
class Part:
    """The epochs `begin` to `end` (not included), in which `runs` are the same training; it goes on
    from the end of part number `parent`.
    """

    runs: tuple[Run, ...]
    begin: int
    end: int
    parent: int | None

    @property
    def is_last(self) -> bool:
        return len(self.runs) == 1


def parts(runs: list[Run]) -> list[Part]:
    """What has to be trained so that all `runs` of a seed share the epochs before they part; each
    part stands behind its parent.
    """
    res = []
    _add_parts(res, tuple(runs), 0, None)
    return res


def _add_parts(res: list, group: tuple[Run, ...], begin: int, parent: int | None):
    "Add what has to be trained of a `group` that is one training up to epoch `begin`, the end of part `parent`."
    if len(group) == 1:
        res.append(Part(group, begin, len(group[0].lrs), parent))
        return
    latest = min(run.alone_from for run in group)
    end = begin
    while end < latest and len({run.lrs[end] for run in group}) == 1:
        end += 1
    if end > begin:
        res.append(Part(group, begin, end, parent))
        parent = len(res) - 1
    branches = {}
    for run in group:
        branch = run.name if end == latest else run.lrs[end]
        branches.setdefault(branch, []).append(run)
    for members in branches.values():
        _add_parts(res, tuple(members), end, parent)
