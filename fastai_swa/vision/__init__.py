"""Networks and data of the experiments."""
from .data import digits, image_folder
from .models import VGG16, PreResNet, WideResNet, digits_net

__all__ = ['digits', 'image_folder', 'digits_net', 'VGG16', 'PreResNet', 'WideResNet']
