"""Models and data of the kinds that real users have, drawn by Hypothesis. Nothing here knows the
package."""

import random

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD, Adam
from fastai.torch_core import set_seed
from hypothesis import strategies as st
from torch import nn

N_IN, N_OUT, WIDTH = 6, 3, 8


# parts of models


class MergedLora(nn.Linear):
    """A linear layer, its weight frozen, with a trained update of rank one that is merged into the
    weight in eval mode.
    """

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(1, n_in) / 2)
        self.b = nn.Parameter(torch.randn(n_out, 1) / 2)
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode and self.merged:
            self.weight.data -= self.b @ self.a
        if not mode and not self.merged:
            self.weight.data += self.b @ self.a
        self.merged = not mode
        return self

    def forward(self, x):
        return super().forward(x) if self.merged else super().forward(x) + x @ self.a.T @ self.b.T


class MergedByMode(nn.Linear):
    "The same, by the mode alone, in `train` called with either."

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.update = nn.Parameter(torch.randn(n_out, n_in) / 4)

    def train(self, mode=True):
        if mode != self.training:
            self.weight.data += (-1 if mode else 1) * 0.5 * self.update.data
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) + x @ (0.5 * self.update).T if self.training else super().forward(x)


class Counts(nn.Module):
    """Counts its training calls in a plain attribute, on which its output depends; keeps the last
    ones in a list of tensors.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.seen = 0, []

    def forward(self, x):
        if self.training:
            self.calls += 1
            self.seen = [*self.seen[-2:], x.detach().mean()]
        return x * (1 + 0.01 * min(self.calls, 50))


class Temperature(nn.Module):
    "Divides by a plain attribute that a callback changes as training goes on."

    def __init__(self):
        super().__init__()
        self.t = 1.0

    def forward(self, x):
        return x / self.t


class OwnStatistics(nn.Module):
    "A normalisation of one's own, with a buffer that follows the batches in training."

    def __init__(self, n):
        super().__init__()
        self.register_buffer('scale', torch.ones(n))

    def forward(self, x):
        if self.training:
            self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))
        return x / (self.scale + 0.1)


class FrozenNorms(nn.Sequential):
    "Keeps its first batch norm in eval mode whatever it is told."

    def train(self, mode=True):
        super().train(mode)
        next(m for m in self.modules() if isinstance(m, nn.BatchNorm1d)).eval()
        return self


class Instances(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.norm = nn.InstanceNorm1d(1, track_running_stats=True)

    def forward(self, x):
        return self.norm(x[:, None])[:, 0]


class Tied(nn.Module):
    "Two layers of one weight."

    def __init__(self, n):
        super().__init__()
        self.one, self.two = nn.Linear(n, n), nn.Linear(n, n)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def doubled(module, args, output):
    return 2 * output


class Patched(nn.Linear):
    "Its forward is another one than its class's."

    def __init__(self, *args):
        super().__init__(*args)
        self.forward = self.other

    def other(self, x):
        return super().forward(x).clamp(-2, 2)


def norm(kind):
    if kind == 'instance':
        return Instances(WIDTH)
    if kind == 'own':
        return OwnStatistics(WIDTH)
    if kind == 'none':
        return nn.Identity()
    res = nn.BatchNorm1d(WIDTH, momentum=None if kind == 'cumulative' else 0.1, affine=kind != 'not affine')
    if kind == 'fixed gamma':
        res.weight.requires_grad_(False)
    return res


FIRST = {'linear': nn.Linear, 'lora': MergedLora, 'by mode': MergedByMode, 'patched': Patched}
EXTRAS = {'counts': Counts, 'temperature': Temperature, 'tied': lambda: Tied(WIDTH), 'dropout': lambda: nn.Dropout(0.3)}
NORMS = 'batch', 'fixed gamma', 'frozen', 'cumulative', 'not affine', 'instance', 'own', 'none'


@st.composite
def architectures(draw):
    "Plain data that says what a model is made of."
    return {
        'first': draw(st.sampled_from(sorted(FIRST))),
        'norms': draw(st.lists(st.sampled_from(NORMS), min_size=2, max_size=2)),
        'extras': draw(st.lists(st.sampled_from(sorted(EXTRAS)), unique=True, max_size=2)),
        'hook': draw(st.booleans()),
    }


def built(architecture):
    one, two = architecture['norms']
    cls = FrozenNorms if 'frozen' in (one, two) else nn.Sequential
    res = cls(
        FIRST[architecture['first']](N_IN, WIDTH),
        norm(one),
        nn.ReLU(),
        *(EXTRAS[name]() for name in architecture['extras']),
        nn.Linear(WIDTH, WIDTH),
        norm(two),
        nn.ReLU(),
        nn.Linear(WIDTH, N_OUT),
    )
    if architecture['hook']:
        res[-1].register_forward_hook(doubled)
    return res.train()


class Anneals(Callback):
    "Changes a plain attribute of the model."

    order = 1

    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, Temperature):
                m.t = 1 + 0.3 * self.epoch


# data


class Cursor(list):
    "A data set whose samples depend on how many were fetched before."

    def __init__(self, *args):
        super().__init__(*args)
        self.fetched, self.log = 0, {'last': []}

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        self.fetched += 1
        self.log['last'] = [*self.log['last'][-3:], i]
        return x + 0.05 * (self.fetched % 7), y


class ByEpoch(DataLoader):
    "A loader that shuffles by the number of its passes."

    def get_idxs(self):
        self.n_passes = getattr(self, 'n_passes', 0) + 1
        return random.Random(self.n_passes).sample(range(self.n), self.n)


class Jitter:
    "A transform with a counter and a generator of its own."

    def __init__(self):
        self.n, self.rng = 0, random.Random(7)

    def __call__(self, item):
        self.n += 1
        return item[0] * (1 + 0.01 * (self.n % 5)) + 0.01 * self.rng.random(), item[1]


@st.composite
def datas(draw):
    n, bs, drop_last = draw(st.integers(24, 60)), draw(st.integers(5, 16)), draw(st.booleans())
    if n % bs == 1:
        n += 1  # batch norm cannot train on a batch of one
    return {
        'n': n,
        'bs': bs,
        'drop_last': drop_last,
        'set': draw(st.sampled_from([list, Cursor])),
        'loader': draw(st.sampled_from([DataLoader, ByEpoch])),
        'jitter': draw(st.booleans()),
    }


def loaders(data):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(data['n'] + 20, N_IN, generator=g) * 2 + 1
    pairs = list(zip(x, (x @ torch.randn(N_IN, N_OUT, generator=g)).argmax(1)))
    kwargs = {'after_item': Jitter()} if data['jitter'] else {}
    train = data['loader'](
        data['set'](pairs[: data['n']]),
        bs=data['bs'],
        shuffle=True,
        drop_last=data['drop_last'],
        num_workers=0,
        **kwargs,
    )
    return DataLoaders(train, DataLoader(pairs[data['n'] :], bs=8, num_workers=0), device='cpu')


def learner(architecture, data, opt='sgd', path='.'):
    "A learner that these three decide alone."
    set_seed(0, reproducible=True)
    dls = loaders(data)
    for dl in dls.loaders:
        dl.rng = random.Random(0)
    return Learner(
        dls,
        built(architecture),
        CrossEntropyLossFlat(),
        opt_func={'sgd': SGD, 'adam': Adam}[opt],
        lr=0.05,
        metrics=accuracy,
        cbs=Anneals(),
        path=path,
    )
