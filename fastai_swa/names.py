"""Names of averages in a learner: which are free, and which of two averages of one name takes part in a fit."""

from fastai.callback.core import Callback
from fastai.learner import Learner

from .aside import LOOP
from .fitting import FitCallback, passed_callbacks

__all__ = ['is_free', 'is_learners_own', 'must_stand_aside']


def is_free(learn: Learner, name: str, cb: Callback) -> bool:
    "Is `learn.<name>` nobody's, or that of the callback `cb`?"
    if name in vars(learn):
        return vars(learn)[name] is cb or _is_from_an_export(vars(learn)[name])
    return not _is_known(learn, name)


def is_learners_own(learn: Learner, name: str, but: type) -> bool:
    "Is `learn.<name>` something of the learner's, other than a callback of the class `but`?"
    if name in vars(learn):
        return not isinstance(vars(learn)[name], but) and not _is_from_an_export(vars(learn)[name])
    return _is_known(learn, name)


def _is_known(learn, name) -> bool:
    "Does a learner have that at times, if not in its attributes now? Some come and go with a fit."
    return hasattr(type(learn), name) or name in (*LOOP, 'scaler', 'lock', 'lr_finder') or hasattr(learn.model, name)


def _is_from_an_export(value) -> bool:
    "Is it what a callback of this package has become in an exported learner?"
    return type(value) is Callback


def must_stand_aside(cb: FitCallback, namesakes: list, name: str) -> bool:
    """Is one of the `namesakes` of `cb` passed to the fit under way, while `cb` is attached to the learner for good?
    Raises `ValueError` if both are passed, or both attached.
    """
    passed = passed_callbacks(cb.learn)
    is_passed = any(other is cb for other in passed)
    other_is_passed = any(other is namesake for other in passed for namesake in namesakes)
    if is_passed == other_is_passed:
        raise ValueError(
            f'this fit has two SWACallbacks of the name {name!r}, whose columns would collide: pass one, or give them '
            'different names'
        )
    return other_is_passed
