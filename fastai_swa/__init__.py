"""Weight averaging for fastai: one callback, two models side by side."""
from . import learner    # noqa: F401  (patches Learner)
from .averaging import WeightAverage, ema, equal
from .batchnorm import update_bn
from .callback import SaveSWAModelCallback, SWACallback
from .checkpoint import CheckpointCallback
from .ensemble import Ensemble
from .plot import plot_swa
from .snapshots import SnapshotCallback, average_checkpoints
from .version import __version__    # noqa: F401

__all__ = ['SWACallback', 'SaveSWAModelCallback', 'CheckpointCallback', 'SnapshotCallback', 'Ensemble', 'average_checkpoints', 'WeightAverage',
           'equal', 'ema', 'update_bn', 'plot_swa']
