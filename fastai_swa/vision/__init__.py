"""Networks and data of the experiments."""
from .data import digits, image_folder
from .models import digits_net

__all__ = ['digits', 'image_folder', 'digits_net']
