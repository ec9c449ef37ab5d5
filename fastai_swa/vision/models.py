"""The experiments' networks, as plain modules: (n, c, h, w) images in, (n, `n_out`) logits out."""

import math

from torch import nn
from torch.nn import functional as F

__all__ = ['digits_net', 'VGG16', 'PreResNet', 'SmallPreResNet', 'WideResNet']


def digits_net(n_out: int = 10, width: int = 16, n_in: int = 1) -> nn.Sequential:
    """A small batch-norm network for `data.digits`: (n, `n_in`, 8, 8) images to (n, `n_out`)
    logits; 24,058 parameters by default.

    Three 3x3 convolutions of `width`, 2 and 4 times `width` channels, each with batch norm and
    ReLU, strides 1, 2 and 2; the mean over positions; dropout 0.1 and a linear layer.
    """
    layers, channels = [], n_in
    for i, stride in enumerate((1, 2, 2)):
        layers += [
            nn.Conv2d(channels, width << i, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width << i),
            nn.ReLU(),
        ]
        channels = width << i
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(channels, n_out))


def init_convs(model):
    "He et al. 2015, fan out: N(0, 2 / (k k out)); biases 0."
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class VGG16(nn.Sequential):
    """VGG16 (Simonyan and Zisserman 2015, configuration D) for 3x32x32 images, with the SWA paper's
    head: two hidden layers of 512.

    13 3x3 convolutions with bias and ReLU (`batch_norm`: with batch norm between), five 2x2 max
    pools, dropout 0.5 before both hidden layers. For 10 classes 15,245,130 parameters, with batch
    norm 15,253,578.
    """

    def __init__(self, n_out: int = 10, batch_norm: bool = False):
        layers, channels = [], 3
        for width, n_convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(n_convs):
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1),
                    *[nn.BatchNorm2d(width)] * batch_norm,
                    nn.ReLU(inplace=True),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        head = [
            nn.Dropout(0.5),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(512, 512),
            nn.ReLU(inplace=True),
            nn.Linear(512, n_out),
        ]
        super().__init__(nn.Sequential(*layers), nn.Flatten(), nn.Sequential(*head))
        init_convs(self)


class _Bottleneck(nn.Module):
    """Pre-activation bottleneck: 1x1, 3x3 with the stride, 1x1; batch norm and ReLU before each; a
    bare 1x1 convolution as shortcut.
    """

    def __init__(self, c_in, width, stride):
        super().__init__()
        c_out = 4 * width
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, width, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), nn.Conv2d(width, c_out, 1, bias=False)
        self.shortcut = nn.Identity() if (c_in, stride) == (c_out, 1) else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        return self.conv3(F.relu(self.bn3(y))) + self.shortcut(x)


class PreResNet(nn.Sequential):
    """Pre-activation ResNet of bottlenecks (He et al. 2016b) for 3x32x32 images.

    `depth` = 9n + 2: three stages of n bottlenecks of 16, 32 and 64 channels, times 4 outside. For
    10 classes PreResNet-110 has 1,146,842 parameters, PreResNet-164 1,703,258. Raises `ValueError`
    for any other depth.
    """

    def __init__(self, depth: int = 110, n_out: int = 10):
        n, rest = divmod(depth - 2, 9)
        if rest or n < 1:
            raise ValueError(f'depth must be 9n + 2, such as 20, 110 or 164, not {depth}')
        layers, channels = [nn.Conv2d(3, 16, 3, padding=1, bias=False)], 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range(n):
                layers.append(_Bottleneck(channels, width, stride if i == 0 else 1))
                channels = 4 * width
        super().__init__(
            *layers,
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, n_out),
        )
        init_convs(self)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions, the stride in the first; batch norm and ReLU before each; a bare 1x1
    convolution as shortcut.
    """

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        is_same = (c_in, stride) == (c_out, 1)
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + self.shortcut(x)


class SmallPreResNet(nn.Sequential):
    """A pre-activation ResNet (He et al. 2016b) for 3x32x32 images that one CPU core trains: a 4x4
    convolution of stride 2, then three blocks of two 3x3 convolutions with `width`, 2 and 4 times
    `width` channels, strides 1, 2 and 2.

    174,490 parameters for 10 classes; with `width` 32 and 100 classes 320,548.
    """

    def __init__(self, n_out: int = 10, width: int = 24):
        layers, channels = [nn.Conv2d(3, width, 4, 2, padding=1, bias=False)], width
        for i, stride in enumerate((1, 2, 2)):
            layers.append(_BasicBlock(channels, width << i, stride))
            channels = width << i
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, n_out)
        super().__init__(*layers, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), *head)
        init_convs(self)


class _WideBlock(nn.Module):
    """Two 3x3 convolutions with bias, the stride in the second; batch norm and ReLU before each;
    dropout between.
    """

    def __init__(self, c_in, c_out, stride, dropout):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, stride, 1)
        self.dropout = nn.Dropout(dropout)
        self.shortcut = nn.Identity() if (c_in, stride) == (c_out, 1) else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x):
        y = self.dropout(self.conv1(F.relu(self.bn1(x))))
        return self.conv2(F.relu(self.bn2(y))) + self.shortcut(x)


class WideResNet(nn.Sequential):
    """Wide ResNet (Zagoruyko and Komodakis 2016) for 3x32x32 images, as the SWA paper's code has
    it: convolutions with bias, PyTorch's own initialisation, momentum 0.9 in the last batch norm.

    `depth` = 6n + 4: three stages of n blocks of 16, 32 and 64 times `widen` channels. WRN-28-10
    for 10 classes has 36,489,290 parameters. Raises `ValueError` for any other depth.
    """

    def __init__(self, depth: int = 28, widen: int = 10, n_out: int = 10, dropout: float = 0.0):
        n, rest = divmod(depth - 4, 6)
        if rest or n < 1:
            raise ValueError(f'depth must be 6n + 4, such as 16 or 28, not {depth}')
        layers, channels = [nn.Conv2d(3, 16, 3, padding=1)], 16
        for width, stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for i in range(n):
                layers.append(_WideBlock(channels, width, stride if i == 0 else 1, dropout))
                channels = width
        super().__init__(
            *layers,
            nn.BatchNorm2d(channels, momentum=0.9),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, n_out),
        )
