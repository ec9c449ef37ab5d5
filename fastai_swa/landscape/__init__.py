"""The loss surface: points of weight space, what is measured there, curves between solutions, figures."""

from .curve import Curve
from .figures import plot_line, plot_paths, plot_plane, plot_planes, plot_width
from .measure import line, plane, rays
from .surfaces import Surface

__all__ = [
    'rays',
    'line',
    'plane',
    'Curve',
    'Surface',
    'plot_width',
    'plot_line',
    'plot_plane',
    'plot_planes',
    'plot_paths',
]
