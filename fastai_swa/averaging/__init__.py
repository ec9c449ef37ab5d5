"""Running averages of weights, and lending an average's tensors to the model that is in use. Plain PyTorch."""

from .average import WeightAverage, check_swa_model
from .lending import lent
from .links import check_match
from .tensors import all_finite, refuse_mismatch
from .weight import check_weight, ema, equal, power_ema

__all__ = [
    'WeightAverage',
    'equal',
    'ema',
    'power_ema',
    'lent',
    'all_finite',
    'check_match',
    'check_swa_model',
    'check_weight',
    'refuse_mismatch',
]
