"""The experiments' networks, as plain modules."""
from torch import nn

__all__ = ['digits_net']


def digits_net(n_out: int = 10, width: int = 16) -> nn.Sequential:
    """A small batch-norm network for `data.digits`: (n, 1, 8, 8) images to (n, `n_out`) logits; 24,058 parameters by default.

    Three 3x3 convolutions of `width`, 2 and 4 times `width` channels, each with batch norm and ReLU, strides 1, 2 and 2; the mean
    over positions; dropout 0.1 and a linear layer.
    """
    layers, channels = [], 1
    for i, stride in enumerate((1, 2, 2)):
        layers += [nn.Conv2d(channels, width << i, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width << i), nn.ReLU()]
        channels = width << i
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.1), nn.Linear(channels, n_out))
