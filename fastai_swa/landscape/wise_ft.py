"""WiSE-FT: between the weights before a fine-tuning and those after."""

from dataclasses import dataclass

import numpy as np
import torch
from fastai.learner import Learner

from ..checks import check_known
from ..columns import less_is_better, validated_columns
from ..modules import named_tensors, unwrap
from ..solutions import one_solution, source_of
from ..weights import named_as_in, weights_of
from .measure import measured_line
from .space import Space, check_ts, line_grid
from .surfaces import Profile

__all__ = ['wise_ft']


def wise_ft(learn: Learner, before, by: str, ts, dl, exclude, comp=None) -> Profile:
    "See `Learner.wise_ft`."
    check_known('by', by, validated_columns(learn))
    ts = check_ts(ts, 0, 1)
    before = source_of(one_solution('before', before))
    start = _start(learn, weights_of(before, 'before'), exclude)
    profile = measured_line(line_grid(Space(learn), {'before': start, 'after': learn}, ts), sets='valid', dl=dl)
    choice = _choice(profile, by, dl is not None, comp)
    profile.chosen = choice.t
    print(choice)
    return profile


def _start(learn, before: dict, exclude) -> dict:
    """The learner's weights, but for those parameters that `before` has, too, which are its.

    Raises `ValueError` for a name in `exclude` that is none, or if fewer than half of the rest is shared.
    """
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    model = unwrap(learn.model)
    own = weights_of(model)
    params = named_tensors(model.named_parameters)
    before = named_as_in(model.state_dict(keep_vars=True), before)
    for left in exclude:
        if not any(_is_within(name, left) for name in params):
            raise ValueError(f'exclude names {left!r}, which is no parameter or module with parameters')
    shared = {}
    n_shared = n_wanted = 0
    for name, p in params.items():
        if not p.is_floating_point() or any(_is_within(name, left) for left in exclude):
            continue
        n_wanted += p.numel()
        value = before.get(name)
        if isinstance(value, torch.Tensor) and value.shape == p.shape:
            shared[name] = value
            n_shared += p.numel()
    if not n_wanted:
        raise ValueError('exclude names all parameters of the model: there is nothing to interpolate')
    if 2 * n_shared < n_wanted:
        raise ValueError(
            f'before has {n_shared:,} of the {n_wanted:,} numbers of the model, by name and shape: it is of another '
            'architecture, or has other names'
        )
    return own | {name: value.to(own[name].dtype) for name, value in shared.items()}


def _is_within(name: str, left: str) -> bool:
    "Is the parameter `name` the one called `left`, or of the module called so?"
    return name == left or name.startswith(f'{left}.')


@dataclass
class _Choice:
    "The point picked, and what it costs elsewhere."

    t: float
    column: str  # that it was picked by
    value: float
    at_1: float  # of the fine-tuned weights
    other: str | None = None  # the validation loss, where it was picked on other samples
    other_value: float = np.nan
    other_at_1: float = np.nan

    def __str__(self):
        at_1 = '' if np.isnan(self.at_1) else f' against {self.at_1:.4f} at t = 1'
        res = f'Chosen: t = {self.t:g}, {self.column} {self.value:.4f}{at_1}, on the samples that chose it, which '
        res += 'therefore flatter it'
        if self.other is None:
            return f'{res}.'
        at_1 = '' if np.isnan(self.other_at_1) else f' against {self.other_at_1:.4f}'
        return f'{res}; {self.other} there {self.other_value:.4f}{at_1}.'


def _choice(profile: Profile, by: str, has_dl: bool, comp) -> _Choice:
    measure = 'loss' if by == 'valid_loss' else by
    column = f'{"dl" if has_dl else "valid"}_{measure}'
    t = profile.best(column, np.less if less_is_better(by, comp) else np.greater)

    def at(name, t):
        return float(profile.column(name)[profile.t == t][0]) if t in profile.t else np.nan

    res = _Choice(t, column, at(column, t), at(column, 1))
    if has_dl:
        res.other = 'valid_loss'
        res.other_value = at('valid_loss', t)
        res.other_at_1 = at('valid_loss', 1)
    return res
