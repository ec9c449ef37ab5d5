"""One record for each published row: what is trained on what, how long, at which learning rate, and
what came out there."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial

from fastai.callback.schedule import combined_cos
from fastai.optimizer import OptimWrapper
from torch import nn, optim

from ..schedules import fge_epochs, fge_lr_factor, snapshot_lr_factor, swa_lr_factor
from ..vision import CIFAR_STATS, IMAGENET_STATS, VGG16, PreResNet, SmallPreResNet, WideResNet, digits_net
from .tasks import ADULT, HOUSING, SST2, Sentences, Table

__all__ = [
    'Recipe',
    'Ensembles',
    'RECIPES',
    'Landscape',
    'LANDSCAPES',
    'Run',
    'Beside',
    'Part',
    'sgd_lr',
    'swa_lr',
    'scaled',
    'runs',
    'parts',
    'optimizer',
    'described',
]


@dataclass(frozen=True)
class Ensembles:
    """What snapshot ensembles and fast geometric ensembling do within the budget of a recipe.

    Huang et al. 2017 (arXiv 1704.00109): `n_snapshots` cycles from `lr` on. Garipov et al. 2018
    (arXiv 1802.10026): SGD for `fge_start` of the budget, then cycles of `fge_len` epochs between
    the learning rates `fge_lr`.
    """

    lr: float
    fge_lr: tuple[float, float]
    fge_len: int
    n_snapshots: int = 5
    fge_start: float = 0.8


@dataclass(frozen=True)
class Recipe:
    """How one network is trained on one data set. Epochs count from 0, learning rates are absolute,
    published accuracies in per cent.

    Izmailov et al. 2018 (arXiv 1803.05407), Table 1 and its public code; `budget` is the usual
    number of epochs of the SGD run, and the SWA run goes on to 1.5 budgets. Weight decay is coupled
    (L2) and acts on all parameters, momentum is 0.9, the batch size 128, and the last short batch
    is kept.
    """

    name: str
    network: Callable[[int], nn.Module] | None  # from the number of classes; None: the task's own
    n_classes: int | None
    budget: int
    lr: float
    swa_lr: float
    swa_start: int  # index from 0 of the first epoch averaged
    wd: float
    stats: tuple = CIFAR_STATS  # mean and standard deviation that the images are normalised by
    padding: str | None = 'constant'  # or 'reflect'; None: no augmentation
    # row -> (mean, standard deviation of 3 runs; None where only one was)
    published: dict = field(default_factory=dict)
    bs: int = 128
    fixed_lr: bool = False  # the SWA run has `swa_lr` from its first epoch on
    ensembles: Ensembles | None = None  # compare methods at one budget, instead of SGD and SWA at several
    # compare methods at so many epochs each, instead of SGD and SWA at one budget and more
    lengths: tuple[int, ...] | None = None
    # greatest learning rate of `fit_one_cycle`, the control of fastai's users; None: without
    one_cycle_lr: float | None = None
    ema: float | None = None  # decay of an average over the steps of each run; None: without
    source: str | None = None  # of the images, if none is given
    images: int | None = None  # training images, or rows, if no number is given; None: all
    task: Table | Sentences | None = None  # instead of images
    opt: str = 'SGD'  # what the plain runs are named after; a task is trained with fastai's 'Adam'

    @property
    def metric(self) -> str:
        return 'accuracy' if self.task is None else self.task.metric

    @property
    def epochs(self) -> int:
        return self.epochs_at(1.5)

    def epochs_at(self, budgets: float) -> int:
        "Epochs of a run of so many budgets: 1, 1.25 or 1.5."
        return int(self.budget * budgets)


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


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """`recipe` with all its lengths times `scale`. Raises `ValueError` if that leaves fewer than 4
    epochs to the budget.
    """
    least = min(recipe.lengths or [recipe.budget])
    if round(least * scale) < 4:
        raise ValueError(
            f'scale={scale:g} leaves {round(least * scale)} of {least} epochs, and 4 are the least: scale {4 / least:g}'
        )
    budget = round(recipe.budget * scale)
    lengths = recipe.lengths and tuple(round(n * scale) for n in recipe.lengths)
    return replace(recipe, budget=budget, swa_start=min(round(recipe.swa_start * scale), budget - 1), lengths=lengths)


@dataclass(frozen=True)
class Beside:
    """A further average beside a run, which leaves its training alone; validated at its end.

    Either of the ends of the epochs from `start` on, all equal; or, with a `decay`, an exponential
    one of the steps, with its warm-up, from the epoch on in which the run parts from the others.
    """

    name: str  # what its columns begin with
    start: int = 0
    decay: float | None = None


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
    # of epoch, step and number of steps; None: the optimizer's own
    momentum: Callable[[int, int, int], float] | None = None

    @property
    def alone_from(self) -> int:
        "The epoch from which on it cannot be one training with others."
        starts = [b.start for b in self.beside if b.decay is None]
        return min([self.swa_start, *starts, *(self.snapshots[:1] if self.snapshots else ())])

    def lr(self, epoch, step, n_steps) -> float:
        return self.lrs[epoch](step, n_steps) if callable(self.lrs[epoch]) else self.lrs[epoch]


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
class SnapshotEpoch:
    "The learning rate in an epoch of a snapshot cycle."

    epoch: int
    cycle_len: int
    lr: float

    def __call__(self, step, n_steps):
        return self.lr * snapshot_lr_factor(self.epoch * n_steps + step, self.cycle_len * n_steps, 1)


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
    one-cycle of each."""
    if recipe.lengths:
        return _runs_of_lengths(recipe)
    sgd = _sgd_run(recipe, 'SGD 1B', recipe.budget)
    if recipe.ensembles:
        return [sgd, *_ensemble_runs(recipe)]
    one_cycle = []
    if recipe.one_cycle_lr:
        one_cycle = [
            _one_cycle_run(recipe, 'one-cycle 1B', recipe.budget),
            _one_cycle_run(recipe, 'one-cycle 1.5B', recipe.epochs),
        ]
    return [sgd, _sgd_run(recipe, 'SGD 1.5B', recipe.epochs), _swa_run(recipe, recipe.epochs), *one_cycle]


def _runs_of_lengths(recipe) -> list[Run]:
    res = []
    for n in recipe.lengths:
        of_length = replace(recipe, budget=n, swa_start=round(n * recipe.swa_start / recipe.budget))
        swa = _swa_run(of_length, n)
        res += [
            _sgd_run(of_length, f'{recipe.opt} {n}', n),
            replace(swa, name=f'SWA {n}', snapshots=None, swa_eval_freq=0),
            _one_cycle_run(of_length, f'one-cycle {n}', n),
        ]
    return res


def _sgd_run(recipe, name, n) -> Run:
    return Run(name, tuple(sgd_lr(recipe, e, n) for e in range(n)), n - 1, beside=_emas(recipe))


def _swa_run(recipe, n) -> Run:
    "Of `n` epochs; ten snapshots of the weights that it averages, or fewer, show their path."
    snapshots = recipe.swa_start, -(-(n - recipe.swa_start) // 10)
    return Run('SWA', tuple(swa_lr(recipe, e) for e in range(n)), recipe.swa_start, snapshots, _emas(recipe))


def _one_cycle_run(recipe, name, n) -> Run:
    "Beside it the mean of the last third of its epochs, and of the last fifth."
    cycle = OneCycle(n, recipe.one_cycle_lr)
    beside = Beside('third', n - round(n / 3)), Beside('fifth', n - round(n / 5)), *_emas(recipe)
    return Run(name, tuple(OneCycleEpoch(e, cycle) for e in range(n)), n - 1, beside=beside, momentum=cycle.momentum)


def _emas(recipe):
    return () if recipe.ema is None else (Beside('ema', decay=recipe.ema),)


def _ensemble_runs(recipe) -> list[Run]:
    e, budget = recipe.ensembles, recipe.budget
    length = budget // e.n_snapshots
    if length < 1:
        raise ValueError(f'{budget} epochs are too few for {e.n_snapshots} snapshots: take a greater scale')
    snapshots = tuple(SnapshotEpoch(i % length, length, e.lr) for i in range(length * e.n_snapshots))
    start = round(e.fge_start * budget)
    n_cycles = (budget - start + e.fge_len // 2) // e.fge_len  # the last of which ends at its low point
    if n_cycles < 1:
        raise ValueError(f'{budget - start} epochs are too few for a cycle of {e.fge_len}: take a greater scale')
    fge = tuple(FGEEpoch(i % e.fge_len, e.fge_len, e.fge_lr) for i in range(fge_epochs(n_cycles, e.fge_len)))
    return [
        _swa_run(recipe, budget),
        Run('snapshots', snapshots, len(snapshots) - 1, (length - 1, length)),
        Run(
            'FGE',
            tuple(sgd_lr(recipe, i, budget) for i in range(start)) + fge,
            start + len(fge) - 1,
            (start + e.fge_len // 2 - 1, e.fge_len),
        ),
    ]


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

    def split(group, begin, parent):
        if len(group) == 1:
            return res.append(Part(group, begin, len(group[0].lrs), parent))
        latest = min(run.alone_from for run in group)
        end = next((e for e in range(begin, latest) if len({run.lrs[e] for run in group}) > 1), latest)
        if end > begin:
            res.append(Part(group, begin, end, parent))
            parent = len(res) - 1
        by_lr = {}
        for run in group:
            by_lr.setdefault(run.lrs[end] if end < latest else run.name, []).append(run)
        for members in by_lr.values():
            split(tuple(members), end, parent)

    split(tuple(runs), 0, None)
    return res


def described(recipe: Recipe) -> dict:
    "All that decides what `recipe` trains, as plain data, for the record of a seed."
    left = {'name', 'published', 'source', 'images'}  # the last two are in what the images are said to be
    return {f.name: _plain(getattr(recipe, f.name)) for f in fields(recipe) if f.name not in left}


def _plain(value):
    if isinstance(value, partial):
        arguments = [*map(repr, value.args), *(f'{k}={v!r}' for k, v in value.keywords.items())]
        return f'{value.func.__name__}({", ".join(arguments)})'
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value.__name__ if callable(value) else value


def optimizer(recipe: Recipe, fused: bool | None = None):
    """An `opt_func` for a Learner: torch's SGD with momentum 0.9 and coupled weight decay on all
    parameters. `fused`: its one-kernel form.
    """
    return partial(OptimWrapper, opt=partial(optim.SGD, momentum=0.9, weight_decay=recipe.wd, fused=fused))


def _rows(sgd, swa, swa_125, swa_150):
    return {'SGD 1B': sgd, 'SWA 1B': swa, 'SWA 1.25B': swa_125, 'SWA 1.5B': swa_150}


# of 32 x 32 pixels the 8 x 8 that there are
def _small_digits_net(n_out):
    return nn.Sequential(nn.AvgPool2d(4), digits_net(n_out, n_in=3))


_vgg16 = dict(network=VGG16, budget=200, lr=0.05, swa_lr=0.01, swa_start=160, wd=5e-4, stats=IMAGENET_STATS)
_preresnet = dict(budget=150, lr=0.1, swa_start=125, wd=3e-4)
_wrn = dict(budget=200, lr=0.1, swa_lr=0.05, swa_start=160, wd=5e-4)
_resnet110, _resnet164, _wrn_28_10 = (partial(PreResNet, 110), partial(PreResNet, 164), partial(WideResNet, 28, 10))

RECIPES = {
    r.name: r
    for r in (
        Recipe(
            'vgg16-cifar10',
            n_classes=10,
            **_vgg16,
            published=_rows((93.25, 0.16), (93.59, 0.16), (93.70, 0.22), (93.64, 0.18)),
        ),
        Recipe(
            'vgg16-cifar100',
            n_classes=100,
            **_vgg16,
            published=_rows((72.55, 0.10), (73.91, 0.12), (74.17, 0.15), (74.27, 0.25)),
        ),
        Recipe(
            'preresnet110-cifar10',
            _resnet110,
            10,
            swa_lr=0.01,
            **_preresnet,
            published=_rows((95.03, 0.05), (95.51, 0.10), (95.65, 0.03), (95.82, 0.03)),
        ),
        Recipe(
            'preresnet110-cifar100',
            _resnet110,
            100,
            swa_lr=0.05,
            **_preresnet,
            published=_rows((76.77, 0.38), (78.75, 0.16), (78.91, 0.29), (79.10, 0.21)),
        ),
        Recipe(
            'preresnet164-cifar10',
            _resnet164,
            10,
            swa_lr=0.01,
            **_preresnet,
            published=_rows((95.28, 0.10), (95.56, 0.11), (95.77, 0.04), (95.83, 0.03)),
        ),
        Recipe(
            'preresnet164-cifar100',
            _resnet164,
            100,
            swa_lr=0.05,
            **_preresnet,
            published=_rows((78.49, 0.36), (79.77, 0.17), (80.18, 0.23), (80.35, 0.16)),
        ),
        Recipe(
            'wrn28-10-cifar10',
            _wrn_28_10,
            10,
            **_wrn,
            published=_rows((96.18, 0.11), (96.45, 0.11), (96.64, 0.08), (96.79, 0.05)),
        ),
        Recipe(
            'wrn28-10-cifar100',
            _wrn_28_10,
            100,
            **_wrn,
            published=_rows((80.82, 0.23), (81.46, 0.23), (81.91, 0.27), (82.15, 0.27)),
        ),
        # a fixed learning rate from scratch; SGD has its own usual one
        Recipe(
            'wrn28-10-cifar100-fixed',
            _wrn_28_10,
            100,
            **{**_wrn, 'swa_start': 140},
            fixed_lr=True,
            published={'SWA 1.5B': (81.7, None)},
        ),
    )
}
# ensembles at one budget, on the same data: the SWA paper's networks, and one that a CPU trains in seconds
_fge = {'vgg16': Ensembles(0.05, (1e-2, 5e-4), 2), 'preresnet110': Ensembles(0.1, (5e-2, 5e-4), 4)}
for _net, _ensembles in _fge.items():
    _recipe = RECIPES[f'{_net}-cifar10']
    RECIPES[f'ensembles-{_net}-cifar10'] = replace(
        _recipe, name=f'ensembles-{_net}-cifar10', ensembles=_ensembles, published={}
    )
RECIPES['ensembles-digits'] = Recipe(
    'ensembles-digits',
    _small_digits_net,
    10,
    budget=40,
    lr=0.1,
    swa_lr=0.05,
    swa_start=32,
    wd=5e-4,
    bs=32,
    padding=None,
    source='digits',
    images=200,
    ensembles=Ensembles(0.1, (5e-2, 5e-4), 2),
)
# networks, numbers of images and lengths that one core of a CPU can do; chosen on seed 100 (results/README.md)
_small = dict(budget=60, lr=0.1, swa_lr=0.05, swa_start=48, wd=5e-4, one_cycle_lr=0.2, ema=0.998)
RECIPES['small-cifar10'] = Recipe('small-cifar10', SmallPreResNet, 10, **_small, images=10_000)
RECIPES['small-cifar100'] = Recipe(
    'small-cifar100', partial(SmallPreResNet, width=32), 100, **_small, images=5_000, bs=64
)
RECIPES['lengths-small-cifar100'] = replace(
    RECIPES['small-cifar100'], name='lengths-small-cifar100', lengths=(15, 30, 60, 90)
)
RECIPES['ensembles-small-cifar100'] = replace(
    RECIPES['small-cifar100'],
    name='ensembles-small-cifar100',
    one_cycle_lr=None,
    ema=None,
    ensembles=Ensembles(0.1, (5e-2, 5e-4), 2),
)
# beyond images: fastai's own optimizer, at several lengths
_beyond = dict(network=None, n_classes=None, opt='Adam', wd=0.01, ema=0.99)
for _task_recipe in (
    Recipe(
        'tabular-adult',
        **_beyond,
        budget=20,
        lr=1e-3,
        swa_lr=5e-4,
        swa_start=15,
        one_cycle_lr=1e-3,
        bs=256,
        lengths=(5, 10, 20),
        task=ADULT,
    ),
    Recipe(
        'tabular-housing',
        **_beyond,
        budget=40,
        lr=3e-3,
        swa_lr=1.5e-3,
        swa_start=30,
        one_cycle_lr=3e-3,
        bs=256,
        lengths=(10, 20, 40),
        task=HOUSING,
    ),
    Recipe(
        'text-sst2',
        **_beyond,
        budget=12,
        lr=3e-3,
        swa_lr=1.5e-3,
        swa_start=9,
        one_cycle_lr=3e-3,
        bs=256,
        lengths=(4, 8, 12),
        images=20_000,
        task=SST2,
    ),
):
    RECIPES[_task_recipe.name] = _task_recipe
# the question that the 2018 replication left open: does padding by reflection, its library's default, explain its
# higher accuracy?
for _name in ('vgg16-cifar10', 'preresnet110-cifar10'):
    RECIPES[f'{_name}-reflection'] = replace(
        RECIPES[_name], name=f'{_name}-reflection', padding='reflect', published={}
    )


@dataclass(frozen=True)
class Landscape:
    """What is measured around and between the solutions that the seeds of a recipe have left.

    'width': along random rays from SGD's and SWA's solution, and on the line through both (Izmailov
    et al. 2018, Figs. 4 and 5). 'plane': through the first, the middle and the last of the weights
    that the SWA run averages, and through SGD's solution, SWA's and the first of these (Figs. 3 and
    1). 'curve': along chains and Bezier curves with one bend between the SGD solutions of two seeds
    (Garipov et al. 2018, Table 2).
    """

    name: str
    kind: str
    base: str  # the recipe
    n_rays: int = 10
    n_distances: int = 20  # up to twice the norm of SGD's weights
    level: float = 0.5  # of the test error, for the width
    n_line: int = 41
    n_plane: int = 21  # on each axis
    n_curve: int = 61
    epochs: int = 200  # of a curve
    lr: float = 0.03

    def scaled(self, scale: float) -> 'Landscape':
        "With all numbers of points and epochs times `scale`, but for a few at least."

        def n(least, count):
            return max(least, round(count * scale))

        return replace(
            self,
            n_rays=n(2, self.n_rays),
            n_distances=n(4, self.n_distances),
            n_line=n(5, self.n_line),
            n_plane=n(3, self.n_plane),
            n_curve=n(5, self.n_curve),
            epochs=n(1, self.epochs),
        )


_landscape_bases = {
    'vgg16-cifar10': dict(epochs=600, lr=0.015),
    'vgg16-cifar100': dict(epochs=600, lr=0.015),
    'preresnet110-cifar10': {},
    'preresnet110-cifar100': {},
    'preresnet164-cifar10': {},
    'preresnet164-cifar100': {},
    'wrn28-10-cifar10': {},
    'wrn28-10-cifar100': {},
    'small-cifar10': dict(epochs=30),
    'small-cifar100': dict(epochs=30),
    'ensembles-digits': dict(epochs=20),
}
LANDSCAPES = {
    f'{kind}-{base.removeprefix("ensembles-")}': Landscape(
        f'{kind}-{base.removeprefix("ensembles-")}', kind, base, **curve
    )
    for base, curve in _landscape_bases.items()
    for kind in ('width', 'plane', 'curve')
}
