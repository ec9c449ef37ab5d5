"""Weight averaging for fastai: one callback, two models side by side."""

import sys

from .version import __version__  # noqa: F401


def _is_the_command() -> bool:
    "Does `python -m fastai_swa` import this package, to run its `__main__`? That imports what it needs."
    return sys.argv[:1] == ['-m'] and 'fastai_swa' in sys.orig_argv


if not _is_the_command():
    from . import learner  # noqa: F401  (patches Learner)
    from .averaging import WeightAverage, ema, equal, power_ema
    from .batchnorm import update_bn
    from .callback import SWACallback
    from .checkpoint import CheckpointCallback
    from .ensemble import Ensemble
    from .history import WeightHistory
    from .landscape import (
        Curve,
        Surface,
        line,
        plane,
        plot_line,
        plot_paths,
        plot_plane,
        plot_planes,
        plot_width,
        rays,
    )
    from .plot import plot_swa
    from .saving import SaveSWAModelCallback
    from .snapshots import SnapshotCallback, average_checkpoints

__all__ = [
    'SWACallback',
    'SaveSWAModelCallback',
    'CheckpointCallback',
    'SnapshotCallback',
    'Ensemble',
    'average_checkpoints',
    'WeightAverage',
    'equal',
    'ema',
    'power_ema',
    'WeightHistory',
    'update_bn',
    'rays',
    'line',
    'plane',
    'Curve',
    'Surface',
    'plot_swa',
    'plot_width',
    'plot_line',
    'plot_plane',
    'plot_planes',
    'plot_paths',
]
