"""Networks and data of the experiments."""

from .data import CIFAR_STATS, IMAGENET_STATS, cifar, digits, image_folder
from .models import VGG16, PreResNet, SmallPreResNet, WideResNet, digits_net
from .shake_shake import ShakeShake

__all__ = [
    'cifar',
    'digits',
    'image_folder',
    'CIFAR_STATS',
    'IMAGENET_STATS',
    'digits_net',
    'VGG16',
    'PreResNet',
    'SmallPreResNet',
    'WideResNet',
    'ShakeShake',
]
