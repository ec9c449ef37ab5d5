"""The Shake-Shake network (Gastaldi 2017, arXiv 1705.07485): residual blocks of two branches, mixed at random."""

import torch
from torch import nn
from torch.nn import functional as F

from .models import init_convs

__all__ = ['ShakeShake']


class ShakeShake(nn.Sequential):
    """Shake-Shake-26 2x`width`d, "S-S-I" (Gastaldi 2017), for 3x32x32 images.

    A 3x3 convolution of 16 channels with batch norm, no ReLU; three stages of four blocks of `width`, 2 and 4
    times `width` channels, strides 1, 2 and 2; ReLU, the mean over positions, a linear layer. In training each
    block mixes its two branches at random, with shares of its own for each image, and shares the gradient out
    by other ones; in evaluation it takes their mean. What is random is drawn from torch's generator of the
    input's device.

    For 10 classes 11,653,978 parameters, with `width` 32 2,923,162. Raises `ValueError` unless `width` is
    positive and even.
    """

    def __init__(self, n_out: int = 10, width: int = 64):
        if width < 2 or width % 2:
            raise ValueError(f'width must be positive and even, such as 32 or 64, not {width}')
        layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
        channels = 16
        for factor, stride in ((1, 1), (2, 2), (4, 2)):
            for i in range(4):
                layers.append(_ShakeShakeBlock(channels, factor * width, stride if i == 0 else 1))
                channels = factor * width
        head = nn.Linear(channels, n_out)
        nn.init.zeros_(head.bias)
        super().__init__(*layers, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
        init_convs(self)


class _ShakeShakeBlock(nn.Module):
    "The skip plus a random mix of two branches; no ReLU after the sum."

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.branch1 = _branch(c_in, c_out, stride)
        self.branch2 = _branch(c_in, c_out, stride)
        self.skip = nn.Identity() if c_in == c_out else _ShiftedSkip(c_in, c_out, stride)

    def forward(self, x):
        first = self.branch1(x)
        second = self.branch2(x)
        if not self.training:
            return self.skip(x) + (first + second) / 2
        # of each image, forward and backward; both now, so that the order of the draws is that of the blocks
        shares = torch.rand(2, len(x), 1, 1, 1, device=x.device).to(first.dtype)
        return self.skip(x) + _Mix.apply(first, second, *shares)


def _branch(c_in, c_out, stride):
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(c_out),
    )


class _ShiftedSkip(nn.Module):
    """To other numbers of channels: ReLU, then half of the channels from every `stride`-th pixel, and half from
    the image moved by one pixel to the right and down, zeros entering at the top and at the left; batch norm.
    """

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out // 2, 1, stride, bias=False)
        self.conv2 = nn.Conv2d(c_in, c_out // 2, 1, stride, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        x = F.relu(x)
        moved = F.pad(x, (1, -1, 1, -1))
        return self.bn(torch.cat([self.conv1(x), self.conv2(moved)], 1))


class _Mix(torch.autograd.Function):
    """share * first + (1 - share) * second, whose gradient is shared out as if `share` had been `backward_share`.

    `first`, `second`: (n, c, h, w); `share`, `backward_share`: (n, 1, 1, 1), of the same dtype.
    """

    @staticmethod
    def forward(ctx, first, second, share, backward_share):
        ctx.save_for_backward(backward_share)
        return torch.lerp(second, first, share)

    @staticmethod
    def backward(ctx, grad):
        (share,) = ctx.saved_tensors
        return grad * share, grad * (1 - share), None, None
