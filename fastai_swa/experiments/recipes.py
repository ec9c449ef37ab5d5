"""What is trained on what, how long, at which learning rate, and what was published of it: a recipe
for each row."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial

from fastai.optimizer import OptimWrapper
from torch import nn, optim

from ..vision import CIFAR_STATS, IMAGENET_STATS, VGG16, PreResNet, ShakeShake, SmallPreResNet, WideResNet, digits_net
from .imagenet import ImageNet
from .tasks import ADULT, HOUSING, SST2, Sentences, Table

__all__ = [
    'Recipe',
    'EnsembleMethods',
    'ChosenAverages',
    'Tail',
    'RECIPES',
    'Landscape',
    'LANDSCAPES',
    'scaled',
    'optimizer',
    'described',
]


# what is trained


@dataclass(frozen=True)
class EnsembleMethods:
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
class ChosenAverages:
    """Averages of trainings of which one is chosen when the training is over, on `n_choose` samples for training
    that are in no training: those that follow these in the order of their files, of images the same number of each
    class. All are tested on the test set.

    The trainings are as long as the budget, under the SWA schedule, at a constant rate and under one-cycle. To
    one-cycle of shorter lengths, the shares `stops` of the budget, the constant rate is compared as if it had been
    stopped there.
    """

    n_choose: int
    stops: tuple[float, ...] = (0.25, 0.5)
    power: float = 0.1  # relative width of a power EMA beside each run
    label_noise: float = 0.0  # share of the training labels that are wrong, drawn by the seed


@dataclass(frozen=True)
class Tail:
    "A run of one budget that goes on from trained weights, at a rate of its own."

    name: str
    lr: float | tuple[float, float]  # a pair: falling from the first to the second within each epoch, a step at a time
    n_averaged: int = 1  # points of the average in each epoch, the last at its end; 0: its end alone, a control


@dataclass(frozen=True)
class Recipe:
    """How one network is trained on one data set. Epochs count from 0, learning rates are absolute,
    published accuracies in per cent.

    Izmailov et al. 2018 (arXiv 1803.05407), Table 1 and its public code; `budget` is the usual
    number of epochs of the SGD run, and the SWA run goes on to 1.5 budgets. Weight decay is coupled
    (L2) and acts on all parameters, momentum is 0.9, the batch size 128, and the last short batch
    is kept. A `cosine` recipe is Gastaldi's instead (2017, arXiv 1705.07485): SGD falls along half a
    cosine to 0 over the budget, and the SWA run leaves that curve at `swa_start`.
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
    ensembles: EnsembleMethods | None = None  # compare methods at one budget, instead of SGD and SWA at several
    averages: ChosenAverages | None = None  # compare averages of each run, instead of SGD and SWA
    tails: tuple[Tail, ...] = ()  # compare these, all from the task's trained weights, instead of SGD and SWA
    # compare methods at so many epochs each, instead of SGD and SWA at one budget and more
    lengths: tuple[int, ...] | None = None
    # greatest learning rate of `fit_one_cycle`, the control of fastai's users; None: without
    one_cycle_lr: float | None = None
    ema: float | None = None  # decay of an average over the steps of each run; None: without
    source: str | None = None  # of the images, if none is given
    images: int | None = None  # training images, or rows, if no number is given; None: all
    task: Table | Sentences | ImageNet | None = None  # instead of images
    opt: str = 'SGD'  # or 'Adam', fastai's, for tables and sentences; the plain runs are named after it
    nesterov: bool = False
    cosine: bool = False
    swa_label: str = 'SWA'  # what the rows of the SWA run are called
    note: str | None = None  # what is to be known beside the published numbers

    @property
    def metric(self) -> str:
        return 'accuracy' if self.task is None else self.task.metric

    @property
    def epochs(self) -> int:
        return self.epochs_at(1.5)

    def epochs_at(self, budgets: float) -> int:
        "Epochs of a run of so many budgets: 1, 1.25 or 1.5."
        return int(self.budget * budgets)


def scaled(recipe: Recipe, scale: float) -> Recipe:
    """`recipe` with all its lengths times `scale`. Raises `ValueError` if that leaves fewer than 4
    epochs to the budget.
    """
    least = min(recipe.lengths or [recipe.budget])
    left = round(least * scale)
    if left < 4:
        raise ValueError(f'scale={scale:g} leaves {left} of {least} epochs, and 4 are the least: scale {4 / least:g}')
    budget = round(recipe.budget * scale)
    swa_start = min(round(recipe.swa_start * scale), budget - 1)
    lengths = None
    if recipe.lengths:
        lengths = tuple(round(n * scale) for n in recipe.lengths)
    return replace(recipe, budget=budget, swa_start=swa_start, lengths=lengths)


# what a record says of a recipe


_LATER_FIELDS = 'averages', 'tails', 'nesterov', 'cosine'  # records of before do not have them


def described(recipe: Recipe) -> dict:
    "All that decides what `recipe` trains, as plain data, for the record of a seed."
    left = {'name', 'published', 'swa_label', 'note'}
    left |= {'source', 'images'}  # they are in what the images are said to be
    res = {}
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        is_of_before = f.name in _LATER_FIELDS and value == f.default
        if f.name not in left and not is_of_before:
            res[f.name] = _as_plain_data(value)
    return res


def _as_plain_data(value):
    if isinstance(value, partial):
        arguments = [repr(arg) for arg in value.args]
        arguments += [f'{k}={v!r}' for k, v in value.keywords.items()]
        return f'{value.func.__name__}({", ".join(arguments)})'
    if is_dataclass(value):
        return {f.name: _as_plain_data(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_as_plain_data(v) for v in value]
    return value.__name__ if callable(value) else value


def optimizer(recipe: Recipe, fused: bool | None = None):
    """An `opt_func` for a Learner: torch's SGD with momentum 0.9, Nesterov's where the recipe says so,
    and coupled weight decay on all parameters. `fused`: its one-kernel form.
    """
    sgd = partial(optim.SGD, momentum=0.9, nesterov=recipe.nesterov, weight_decay=recipe.wd, fused=fused)
    return partial(OptimWrapper, opt=sgd)


# all recipes

RECIPES: dict[str, Recipe] = {}


def _add(*recipes: Recipe):
    for recipe in recipes:
        RECIPES[recipe.name] = recipe


def _add_variant(of: str, name: str, **changes):
    _add(replace(RECIPES[of], name=name, **changes))


# the SWA paper's Table 1


def _table_1(sgd, swa, swa_125, swa_150) -> dict:
    return {'SGD 1B': sgd, 'SWA 1B': swa, 'SWA 1.25B': swa_125, 'SWA 1.5B': swa_150}


_resnet110 = partial(PreResNet, 110)
_resnet164 = partial(PreResNet, 164)
_wrn_28_10 = partial(WideResNet, 28, 10)

_vgg16 = dict(network=VGG16, budget=200, lr=0.05, swa_lr=0.01, swa_start=160, wd=5e-4, stats=IMAGENET_STATS)
_preresnet = dict(budget=150, lr=0.1, swa_start=125, wd=3e-4)
_wrn = dict(network=_wrn_28_10, budget=200, lr=0.1, swa_lr=0.05, swa_start=160, wd=5e-4)

_add(
    Recipe(
        'vgg16-cifar10',
        n_classes=10,
        **_vgg16,
        published=_table_1((93.25, 0.16), (93.59, 0.16), (93.70, 0.22), (93.64, 0.18)),
    ),
    Recipe(
        'vgg16-cifar100',
        n_classes=100,
        **_vgg16,
        published=_table_1((72.55, 0.10), (73.91, 0.12), (74.17, 0.15), (74.27, 0.25)),
    ),
    Recipe(
        'preresnet110-cifar10',
        _resnet110,
        n_classes=10,
        swa_lr=0.01,
        **_preresnet,
        published=_table_1((95.03, 0.05), (95.51, 0.10), (95.65, 0.03), (95.82, 0.03)),
    ),
    Recipe(
        'preresnet110-cifar100',
        _resnet110,
        n_classes=100,
        swa_lr=0.05,
        **_preresnet,
        published=_table_1((76.77, 0.38), (78.75, 0.16), (78.91, 0.29), (79.10, 0.21)),
    ),
    Recipe(
        'preresnet164-cifar10',
        _resnet164,
        n_classes=10,
        swa_lr=0.01,
        **_preresnet,
        published=_table_1((95.28, 0.10), (95.56, 0.11), (95.77, 0.04), (95.83, 0.03)),
    ),
    Recipe(
        'preresnet164-cifar100',
        _resnet164,
        n_classes=100,
        swa_lr=0.05,
        **_preresnet,
        published=_table_1((78.49, 0.36), (79.77, 0.17), (80.18, 0.23), (80.35, 0.16)),
    ),
    Recipe(
        'wrn28-10-cifar10',
        n_classes=10,
        **_wrn,
        published=_table_1((96.18, 0.11), (96.45, 0.11), (96.64, 0.08), (96.79, 0.05)),
    ),
    Recipe(
        'wrn28-10-cifar100',
        n_classes=100,
        **_wrn,
        published=_table_1((80.82, 0.23), (81.46, 0.23), (81.91, 0.27), (82.15, 0.27)),
    ),
)
# a fixed learning rate from scratch; SGD has its own usual one
_add_variant(
    'wrn28-10-cifar100',
    'wrn28-10-cifar100-fixed',
    swa_start=140,
    fixed_lr=True,
    published={'SWA 1.5B': (81.7, None)},
)

# the seed row whose training the SWA paper did not publish: one GPU's half of Gastaldi's batch and rate; the share of
# the budget at which the average starts is that of the other networks, and the rate about the cosine's at that epoch
_add(
    Recipe(
        'shakeshake-cifar10',
        ShakeShake,
        n_classes=10,
        budget=1800,
        lr=0.1,
        swa_lr=0.01,
        swa_start=1440,
        wd=1e-4,
        bs=64,
        nesterov=True,
        cosine=True,
        swa_label='our SWA tail',
        published={
            'SGD 1B': (96.93, 0.10),
            'our SWA tail 1.25B': (97.16, 0.10),
            'our SWA tail 1.5B': (97.12, 0.06),
        },
        note=(
            'SGD is trained as Gastaldi 2017 published it (2.98 % error there); the SWA paper never published the '
            'learning rate and the start of its average, so that "our SWA tail", the constant rate 0.01 from epoch '
            '1,440 on, is ours and no reproduction of its rows; its published numbers were not read again at their '
            'source'
        ),
    )
)

# ImageNet: ten more epochs for networks that torchvision has trained

_TAIL_NOTE = (
    'the SWA paper never published the learning rates, the cycle, the batch size and the weight decay of its ImageNet '
    'rows: the cyclic rate here, 1e-3 to 1e-5 in each epoch, is from memory; with a guess a user found 71.46 % for '
    'ResNet-50, and by plain fine-tuning at 1e-4, the control of any gain, 76.78 % (timgaripov/swa#19). The constant '
    'rate 1e-3 with four points an epoch, batches of 256 and weight decay 1e-4, is what a user replicated of SWAG '
    '(wjmaddox/swa_gaussian#17), but for its first point, the pretrained weights'
)
PRETRAINED = 'pretrained weights'  # the row of what tails go on from
_FINE_TUNING = 'fine-tuning at 1e-4'
_tails = dict(
    network=None,
    n_classes=None,
    budget=10,
    lr=1e-4,
    swa_lr=1e-3,
    swa_start=0,
    wd=1e-4,
    bs=256,
    tails=(
        Tail(_FINE_TUNING, 1e-4, n_averaged=0),
        Tail('SWA, cyclic rate', (1e-3, 1e-5)),
        Tail('SWA, constant rate', 1e-3, n_averaged=4),
    ),
    note=_TAIL_NOTE,
)


def _published_tail(pretrained, swa) -> dict:
    return {PRETRAINED: (pretrained, None), 'SWA, cyclic rate': (swa, None)}


_add(
    Recipe(
        'imagenet-tail',
        **_tails,
        task=ImageNet('resnet50'),
        published=_published_tail(76.15, 76.97) | {_FINE_TUNING: (76.78, None)},
    ),
    Recipe('imagenet-tail-resnet152', **_tails, task=ImageNet('resnet152'), published=_published_tail(78.31, 78.94)),
    Recipe(
        'imagenet-tail-densenet161', **_tails, task=ImageNet('densenet161'), published=_published_tail(77.65, 78.44)
    ),
)

# ensembles at one budget, on the same data: the SWA paper's networks, and one that a CPU trains in seconds

_add_variant(
    'vgg16-cifar10',
    'ensembles-vgg16-cifar10',
    ensembles=EnsembleMethods(lr=0.05, fge_lr=(1e-2, 5e-4), fge_len=2),
    published={},
)
_add_variant(
    'preresnet110-cifar10',
    'ensembles-preresnet110-cifar10',
    ensembles=EnsembleMethods(lr=0.1, fge_lr=(5e-2, 5e-4), fge_len=4),
    published={},
)


# of 32 x 32 pixels the 8 x 8 that there are
def _small_digits_net(n_out):
    return nn.Sequential(nn.AvgPool2d(4), digits_net(n_out, n_in=3))


_small_ensembles = EnsembleMethods(lr=0.1, fge_lr=(5e-2, 5e-4), fge_len=2)
_add(
    Recipe(
        'ensembles-digits',
        _small_digits_net,
        n_classes=10,
        budget=40,
        lr=0.1,
        swa_lr=0.05,
        swa_start=32,
        wd=5e-4,
        bs=32,
        padding=None,
        source='digits',
        images=200,
        ensembles=_small_ensembles,
    )
)

# networks, numbers of images and lengths that one core of a CPU can do; chosen on seed 100 (results/README.md)

_small = dict(budget=60, lr=0.1, swa_lr=0.05, swa_start=48, wd=5e-4, one_cycle_lr=0.2, ema=0.998)
_add(
    Recipe('small-cifar10', SmallPreResNet, n_classes=10, **_small, images=10_000),
    Recipe('small-cifar100', partial(SmallPreResNet, width=32), n_classes=100, **_small, images=5_000, bs=64),
)
_add_variant('small-cifar100', 'lengths-small-cifar100', lengths=(15, 30, 60, 90))
_chosen = dict(swa_start=45, averages=ChosenAverages(n_choose=2_000))
_add_variant('small-cifar10', 'averages-small-cifar10', **_chosen)
_add_variant('small-cifar100', 'averages-small-cifar100', **_chosen)
_add_variant(
    'averages-small-cifar100',
    'averages-small-cifar100-noisy',
    averages=ChosenAverages(n_choose=2_000, label_noise=0.1),
)
_add_variant('small-cifar100', 'ensembles-small-cifar100', one_cycle_lr=None, ema=None, ensembles=_small_ensembles)

# beyond images: fastai's own optimizer, at several lengths

_beyond = dict(network=None, n_classes=None, opt='Adam', wd=0.01, ema=0.99, bs=256)
_add(
    Recipe(
        'tabular-adult',
        **_beyond,
        task=ADULT,
        budget=20,
        lengths=(5, 10, 20),
        lr=1e-3,
        one_cycle_lr=1e-3,
        swa_lr=5e-4,
        swa_start=15,
    ),
    Recipe(
        'averages-adult',
        **_beyond,
        task=ADULT,
        budget=20,
        averages=ChosenAverages(n_choose=5_000),
        lr=1e-3,
        one_cycle_lr=1e-3,
        swa_lr=5e-4,
        swa_start=15,
    ),
    Recipe(
        'tabular-housing',
        **_beyond,
        task=HOUSING,
        budget=40,
        lengths=(10, 20, 40),
        lr=3e-3,
        one_cycle_lr=3e-3,
        swa_lr=1.5e-3,
        swa_start=30,
    ),
    Recipe(
        'text-sst2',
        **_beyond,
        task=SST2,
        images=20_000,
        budget=12,
        lengths=(4, 8, 12),
        lr=3e-3,
        one_cycle_lr=3e-3,
        swa_lr=1.5e-3,
        swa_start=9,
    ),
)

# the question that the 2018 replication left open: does padding by reflection, its library's default, explain its
# higher accuracy?

for _name in ('vgg16-cifar10', 'preresnet110-cifar10'):
    _add_variant(_name, f'{_name}-reflection', padding='reflect', published={})


# what is measured around them


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
    level: float = 0.5  # of the test error: how far from a solution it is reached is the width
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


LANDSCAPES: dict[str, Landscape] = {}


def _add_landscapes(base: str, **settings):
    "All three kinds around the solutions of the recipe `base`; `settings`: fields of `Landscape`."
    for kind in ('width', 'plane', 'curve'):
        name = f'{kind}-{base.removeprefix("ensembles-")}'
        LANDSCAPES[name] = Landscape(name, kind, base, **settings)


_add_landscapes('vgg16-cifar10', epochs=600, lr=0.015)
_add_landscapes('vgg16-cifar100', epochs=600, lr=0.015)
for _name in ('preresnet110', 'preresnet164', 'wrn28-10'):
    _add_landscapes(f'{_name}-cifar10')
    _add_landscapes(f'{_name}-cifar100')
_add_landscapes('small-cifar10', epochs=30)
_add_landscapes('small-cifar100', epochs=30, level=0.8)  # its solutions read more than half of the images wrong
_add_landscapes('ensembles-digits', epochs=20)
