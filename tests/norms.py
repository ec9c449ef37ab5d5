"""Layers that normalise in a way of their own, as papers, courses and other libraries have them:
what batch norm is refreshed around."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class BatchRenorm(nn.Module):
    """Ioffe 2017, with a running standard deviation; while it trains, it normalises by its running
    statistics, clipped.
    """

    def __init__(self, n, momentum=0.1, eps=1e-3, r_max=3.0, d_max=5.0):
        super().__init__()
        self.momentum, self.eps, self.r_max, self.d_max = momentum, eps, r_max, d_max
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.register_buffer('running_mean', torch.zeros(n))
        self.register_buffer('running_std', torch.ones(n))
        self.register_buffer('num_batches_tracked', torch.tensor(0))

    def forward(self, x):
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)

        def wide(t):
            return t.view(shape)

        if self.training:
            mean, std = x.mean(dims), x.var(dims, unbiased=False).sqrt() + self.eps
            r = (std.detach() / self.running_std).clamp(1 / self.r_max, self.r_max)
            d = ((mean.detach() - self.running_mean) / self.running_std).clamp(-self.d_max, self.d_max)
            x = (x - wide(mean)) / wide(std) * wide(r) + wide(d)
            self.running_mean += self.momentum * (mean.detach() - self.running_mean)
            self.running_std += self.momentum * (std.detach() - self.running_std)
            self.num_batches_tracked += 1
        else:
            x = (x - wide(self.running_mean)) / wide(self.running_std)
        return wide(self.weight) * x + wide(self.bias)


class OtherWayRound(nn.Module):
    """A batch norm as courses write it: statistics of shape (1, C, 1, ...), reassigned, with a
    momentum for the old value.
    """

    def __init__(self, n, dim=2, momentum=0.9):
        super().__init__()
        self.momentum, shape = momentum, (1, n) + (1,) * (dim - 2)
        self.gamma, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer('moving_mean', torch.zeros(shape))
        self.register_buffer('moving_var', torch.ones(shape))

    def forward(self, x):
        if not self.training:
            return self.gamma * (x - self.moving_mean) / (self.moving_var + 1e-5).sqrt() + self.beta
        dims = [0, *range(2, x.dim())]
        mean = x.mean(dims, keepdim=True)
        var = ((x - mean) ** 2).mean(dims, keepdim=True)
        self.moving_mean = self.momentum * self.moving_mean + (1 - self.momentum) * mean.detach()
        self.moving_var = self.momentum * self.moving_var + (1 - self.momentum) * var.detach()
        return self.gamma * (x - mean) / (var + 1e-5).sqrt() + self.beta


OtherWayRoundNorm = type('OtherWayRoundNorm', (OtherWayRound,), {})


class GhostBatchNorm(nn.BatchNorm2d):
    """As in the fast CIFAR networks: statistics of each of the splits of a batch, end to end;
    evaluated with those of the first one.
    """

    def __init__(self, n, num_splits, **kwargs):
        super().__init__(n, **kwargs)
        self.num_splits = num_splits
        self.register_buffer('running_mean', torch.zeros(n * num_splits))
        self.register_buffer('running_var', torch.ones(n * num_splits))

    def train(self, mode=True):
        if self.training and not mode:
            self.running_mean = self.running_mean.view(self.num_splits, -1).mean(0).repeat(self.num_splits)
            self.running_var = self.running_var.view(self.num_splits, -1).mean(0).repeat(self.num_splits)
        return super().train(mode)

    def forward(self, x):
        n, c, h, w = x.shape
        if self.training:
            return F.batch_norm(
                x.view(-1, c * self.num_splits, h, w),
                self.running_mean,
                self.running_var,
                self.weight.repeat(self.num_splits),
                self.bias.repeat(self.num_splits),
                True,
                self.momentum,
                self.eps,
            ).view(n, c, h, w)
        return F.batch_norm(
            x, self.running_mean[:c], self.running_var[:c], self.weight, self.bias, False, self.momentum, self.eps
        )


class ChunkedBatchNorm(nn.BatchNorm1d):
    "Ghost batch norm on chunks, one after the other, into statistics of torch's shape."

    def __init__(self, n, size=8, **kwargs):
        super().__init__(n, **kwargs)
        self.size = size

    def forward(self, x):
        return (
            torch.cat([super(ChunkedBatchNorm, self).forward(c) for c in x.split(self.size)])
            if self.training
            else super().forward(x)
        )


class BatchNormAct(nn.BatchNorm2d):
    "Batch norm with its activation, in place, as timm has it: its own call of the function."

    def forward(self, x):
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return x.relu_()


class RunningBatchNorm(nn.Module):
    "fastai's course, 2019: running sums, normalised by while it trains, too."

    def __init__(self, n, mom=0.1, eps=1e-5, factors=False):
        super().__init__()
        self.mom, self.eps, self.factors = mom, eps, factors
        self.mults, self.adds = nn.Parameter(torch.ones(n, 1, 1)), nn.Parameter(torch.zeros(n, 1, 1))
        for name in ('sums', 'sqrs'):
            self.register_buffer(name, torch.zeros(1, n, 1, 1))
        for name in ('count', 'batch', 'step'):
            self.register_buffer(name, torch.tensor(0.0))
        if factors:
            self.register_buffer('factor', torch.ones(1, n, 1, 1))
            self.register_buffer('offset', torch.zeros(1, n, 1, 1))

    def update_stats(self, x):
        n, c = x.shape[:2]
        s, ss = x.sum((0, 2, 3), keepdim=True), (x * x).sum((0, 2, 3), keepdim=True)
        mom1 = 1 - (1 - self.mom) / math.sqrt(n - 1)
        self.sums.lerp_(s.detach(), mom1)
        self.sqrs.lerp_(ss.detach(), mom1)
        self.count.lerp_(self.count.new_tensor(x.numel() / c), mom1)
        self.batch += n
        self.step += 1
        if self.factors:
            self.factor, self.offset = (t.detach() for t in self.scales())

    def scales(self):
        mean = self.sums / self.count
        var = self.sqrs / self.count - mean * mean
        if bool(self.batch < 20):
            var = var.clamp(min=0.01)
        factor = self.mults / (var + self.eps).sqrt()
        return factor, self.adds - mean * factor

    def forward(self, x):
        if self.training:
            self.update_stats(x)
        factor, offset = (self.factor, self.offset) if self.factors else self.scales()
        return x * factor + offset


class FrozenBatchNorm2d(nn.Module):
    "Statistics that never move, as detectors have them."

    def __init__(self, n):
        super().__init__()
        self.register_buffer('running_mean', torch.randn(n))
        self.register_buffer('running_var', torch.rand(n) + 0.5)

    def forward(self, x):
        return (x - self.running_mean.view(1, -1, 1, 1)) / (self.running_var.view(1, -1, 1, 1) + 1e-5).sqrt()


class NormEval(nn.Sequential):
    "mmdetection's `norm_eval`: its batch norm stays in eval mode whatever it is told."

    def train(self, mode=True):
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.eval()
        return self
