"""Weight averaging for fastai: one callback, two models side by side."""
from .averaging import WeightAverage, ema, equal
from .batchnorm import update_bn
from .callback import SaveSWAModelCallback, SWACallback
from .plot import plot_swa
from . import learner    # noqa: F401  (patches Learner)

__version__ = '0.1.0'
__all__ = ['SWACallback', 'SaveSWAModelCallback', 'WeightAverage', 'equal', 'ema', 'update_bn', 'plot_swa']
