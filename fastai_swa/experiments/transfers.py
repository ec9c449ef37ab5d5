"""The recipes of transfer learning: what is fine-tuned from what, how long, at which rates."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from ..vision import SmallPreResNet
from .transfer_tasks import HalfOfClasses, Photos, efficientnet_lite0

__all__ = ['Transfer', 'TRANSFERS', 'FineTuning']


@dataclass(frozen=True)
class FineTuning:
    "One of the runs from the frozen stage."

    base_lr: float
    seed: int

    @property
    def name(self) -> str:
        "As `fine_tune_soup` calls it."
        return f'lr-{self.base_lr:g}-seed-{self.seed}'


@dataclass(frozen=True)
class Transfer:
    """Fine-tunings from one frozen stage, and all that can be made of them: soups, WiSE-FT, a tail and so on.

    All is trained with fastai's own optimizer and in the stages of `fine_tune`.
    """

    name: str
    task: HalfOfClasses | Photos
    rates: tuple[
        float, ...
    ]  # as `base_lr` of `fine_tune`; the first one is that of the frozen stage, and the usual one
    epochs: int  # of each fine-tuning
    n_more: int  # further fine-tunings at the first rate, with seeds of their own
    tail_epochs: int
    tail_rate: float  # constant, as a share of the highest one of the run that it goes on with
    ema: float  # decay of an average over the steps of each run, with warm-up
    bs: int
    lr_mult: float  # the head is trained at so many times the rate of the body's first layers
    minutes: int  # what a seed takes, measured on one thread of a CPU
    freeze_epochs: int = 1
    pretrain_epochs: int = 0  # under one-cycle
    pretrain_lr: float = 0.0
    n_wise: int = 11  # points between the frozen stage and the best run
    metric: str = 'accuracy'  # by which is chosen

    def runs(self, seed: int) -> list[FineTuning]:
        "Those of a repetition: one for each rate, then the further ones."
        first = 100 * seed
        runs = [FineTuning(rate, first) for rate in self.rates]
        return runs + [FineTuning(self.rates[0], first + i) for i in range(1, self.n_more + 1)]

    @property
    def n_epochs(self) -> int:
        "Of a seed in all, those of the pretraining and the frozen stage included."
        n_runs = len(self.rates) + self.n_more
        after = self.tail_epochs + self.epochs + self.tail_epochs  # the tail, and one-cycle of as many epochs in all
        return self.pretrain_epochs + self.freeze_epochs + n_runs * self.epochs + after

    def scaled(self, scale: float) -> 'Transfer':
        "With all lengths times `scale`, but an epoch at least where there is one."

        def n(count):
            return max(1, round(count * scale)) if count else 0

        return replace(
            self,
            epochs=n(self.epochs),
            tail_epochs=n(self.tail_epochs),
            pretrain_epochs=n(self.pretrain_epochs),
            n_wise=max(3, n(self.n_wise)),
        )

    def described(self) -> dict:
        "All that decides what is trained, as plain data, for the record of a seed."
        res = asdict(self)
        for name in ('name', 'minutes'):
            del res[name]
        res['task'] = {name: _as_plain_data(value) for name, value in res['task'].items()}
        return res | {'rates': list(self.rates)}


def _as_plain_data(value):
    if isinstance(value, partial):
        arguments = [f'{k}={v!r}' for k, v in value.keywords.items()]
        return f'{value.func.__name__}({", ".join(arguments)})'
    if isinstance(value, tuple):
        return [list(v) for v in value]
    return value.__name__ if isinstance(value, Callable) else value


TRANSFERS: dict[str, Transfer] = {}


def _add(*recipes: Transfer):
    for recipe in recipes:
        TRANSFERS[recipe.name] = recipe


# Rates were chosen on seed 100, which is not reported. small-transfer, after 9 epochs of pretraining and 8 of
# fine-tuning, error on the images to choose on: at lr_mult 2 and rates of .016, .032 and .064: 50.3, 50.0, 50.8 %; at
# lr_mult 5 and .004 to .032: 53.9, 51.4, 50.8, 49.1 %.

_add(
    Transfer(
        'small-transfer',
        HalfOfClasses(partial(SmallPreResNet, width=32), blur=0.7, noise=0.06, n_pretrained=50),
        rates=(3.2e-2, 8e-3, 1.6e-2, 6.4e-2),
        epochs=15,
        n_more=2,
        tail_epochs=5,
        tail_rate=0.3,
        ema=0.99,
        bs=64,
        lr_mult=2,
        minutes=20,
        pretrain_epochs=30,
        pretrain_lr=5e-3,
    ),
    Transfer(
        'clothing-soup',
        Photos(efficientnet_lite0, blur=1.5, noise=0.1, stats=((127 / 255,) * 3, (128 / 255,) * 3)),
        rates=(4e-3, 1e-3, 2e-3, 8e-3),
        epochs=6,
        n_more=0,
        tail_epochs=3,
        tail_rate=0.3,
        ema=0.99,
        bs=64,
        lr_mult=10,
        minutes=55,
        n_wise=6,
    ),
)
