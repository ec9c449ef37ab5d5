"""One record for each published row: what is trained on what, how long, at which learning rate, and what came out there."""
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from fastai.optimizer import OptimWrapper
from torch import nn, optim

from ..schedules import swa_lr_factor
from ..vision import CIFAR_STATS, IMAGENET_STATS, VGG16, PreResNet, WideResNet

__all__ = ['Recipe', 'RECIPES', 'sgd_lr', 'swa_lr', 'optimizer']


@dataclass(frozen=True)
class Recipe:
    """How one network is trained on one data set. Epochs count from 0, learning rates are absolute, published accuracies in per cent.

    Izmailov et al. 2018 (arXiv 1803.05407), Table 1 and its public code; `budget` is the usual number of epochs of the SGD run, and the SWA
    run goes on to 1.5 budgets. Weight decay is coupled (L2) and acts on all parameters, momentum is 0.9, the batch size 128, and the last short
    batch is kept.
    """
    name: str
    network: Callable[[int], nn.Module]    # from the number of classes
    n_classes: int
    budget: int
    lr: float
    swa_lr: float
    swa_start: int    # index from 0 of the first epoch folded
    wd: float
    stats: tuple = CIFAR_STATS    # mean and standard deviation that the images are normalised by
    padding: str = 'constant'
    published: dict = field(default_factory=dict)    # row -> (mean, standard deviation of 3 runs)
    bs: int = 128

    @property
    def epochs(self) -> int: return self.budget * 3 // 2

    def epochs_at(self, budgets: float) -> int:
        "Epochs of a run of so many budgets: 1, 1.25 or 1.5."
        return int(self.budget * budgets)

    @property
    def common(self) -> int:
        "The number of epochs in which the SGD and the SWA run have the same learning rate, from the first on."
        return next(e for e in range(self.epochs) if sgd_lr(self, e, self.budget) != swa_lr(self, e))


def sgd_lr(recipe: Recipe, epoch: int, n_epoch: int) -> float:
    "The SGD run's learning rate in `epoch` of `n_epoch`: constant for half of them, linear down to a hundredth at 0.9, constant."
    return recipe.lr * swa_lr_factor(epoch, 0, 1, n_epoch - 1, .01)


def swa_lr(recipe: Recipe, epoch: int) -> float:
    "The SWA run's learning rate in `epoch`: the same curve over the epochs before the first fold, down to `recipe.swa_lr`."
    return recipe.lr * swa_lr_factor(epoch, 0, 1, recipe.swa_start, recipe.swa_lr / recipe.lr)


def optimizer(recipe: Recipe, fused: bool | None = None):
    "An `opt_func` for a Learner: torch's SGD with momentum 0.9 and coupled weight decay on all parameters. `fused`: its one-kernel form."
    return partial(OptimWrapper, opt=partial(optim.SGD, momentum=.9, weight_decay=recipe.wd, fused=fused))


def _rows(sgd, swa, swa_125, swa_150): return {'SGD 1B': sgd, 'SWA 1B': swa, 'SWA 1.25B': swa_125, 'SWA 1.5B': swa_150}

_vgg16 = dict(network=VGG16, budget=200, lr=.05, swa_lr=.01, swa_start=160, wd=5e-4, stats=IMAGENET_STATS)
_preresnet = dict(budget=150, lr=.1, swa_start=125, wd=3e-4)
_wrn = dict(budget=200, lr=.1, swa_lr=.05, swa_start=160, wd=5e-4)
_resnet110, _resnet164, _wrn_28_10 = (partial(PreResNet, 110), partial(PreResNet, 164), partial(WideResNet, 28, 10))

RECIPES = {r.name: r for r in (
    Recipe('vgg16-cifar10', n_classes=10, **_vgg16, published=_rows((93.25, .16), (93.59, .16), (93.70, .22), (93.64, .18))),
    Recipe('vgg16-cifar100', n_classes=100, **_vgg16, published=_rows((72.55, .10), (73.91, .12), (74.17, .15), (74.27, .25))),
    Recipe('preresnet110-cifar10', _resnet110, 10, swa_lr=.01, **_preresnet,
           published=_rows((95.03, .05), (95.51, .10), (95.65, .03), (95.82, .03))),
    Recipe('preresnet110-cifar100', _resnet110, 100, swa_lr=.05, **_preresnet,
           published=_rows((76.77, .38), (78.75, .16), (78.91, .29), (79.10, .21))),
    Recipe('preresnet164-cifar10', _resnet164, 10, swa_lr=.01, **_preresnet,
           published=_rows((95.28, .10), (95.56, .11), (95.77, .04), (95.83, .03))),
    Recipe('preresnet164-cifar100', _resnet164, 100, swa_lr=.05, **_preresnet,
           published=_rows((78.49, .36), (79.77, .17), (80.18, .23), (80.35, .16))),
    Recipe('wrn28-10-cifar10', _wrn_28_10, 10, **_wrn, published=_rows((96.18, .11), (96.45, .11), (96.64, .08), (96.79, .05))),
    Recipe('wrn28-10-cifar100', _wrn_28_10, 100, **_wrn, published=_rows((80.82, .23), (81.46, .23), (81.91, .27), (82.15, .27))),
)}
# the question that the 2018 replication left open: does padding by reflection, its library's default, explain its higher accuracy?
for _name in ('vgg16-cifar10', 'preresnet110-cifar10'):
    _recipe = RECIPES[_name]
    RECIPES[f'{_name}-reflection'] = Recipe(**{**vars(_recipe), 'name': f'{_name}-reflection', 'padding': 'reflect', 'published': {}})
