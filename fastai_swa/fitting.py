"""Is this a real fit? A base class for callbacks that get the events of one training fit alone, and
what may not end it."""

import copy
import sys
import weakref
from collections import Counter
from contextlib import contextmanager
from functools import partial
from types import CellType, FunctionType, MethodType

from fastai.callback.core import Callback, _inner_loop
from fastai.callback.schedule import LRFinder
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau
from fastcore.foundation import L
from torch import nn

from .files import Lock
from .interrupts import uninterrupted
from .warn import warn

__all__ = ['FitCallback', 'SideWork', 'is_fitting', 'locked_for', 'no_fit', 'passed_callbacks']

_IN_A_BATCH = frozenset(_inner_loop)
_AROUND_EPOCHS = 'before_fit', 'after_cancel_fit', 'after_fit'
_OF_FIT = '_fit', '_is_listening', '_loss_func', '_muted'  # attributes of a `FitCallback` that a copy has not


class FitCallback(Callback):
    """A callback that gets the events of one training fit alone, from its own `before_fit` to its
    own `after_fit`.

    It gets none of `validate`, `get_preds`, `predict`, `lr_find` and `tta`, nor of a fit within the
    fit, also where another callback calls these in the middle of it. (fastai sends `before_fit` and
    many other events in all of them.)

    - `_fit`: what a subclass keeps about the fit under way. Its `before_fit` sets it; where that
      leaves `None`, the fit goes on without it.
    - `over()`: called when the fit is over, however it ended, and `_fit` is about to become `None`.
      After Ctrl-C or an error, which fastai announces by no event, that is when the callback is
      taken from the learner, or, if it is attached for good, when it is needed next.

    Pickled, it is a plain `Callback`, which does nothing: an exported learner needs nothing of this package where it is
    loaded. A copy keeps the settings.
    """

    _fit = None
    _is_listening = False  # whether the event sent last was one of the fit under way
    _loss_func = None  # the learner's when the fit began
    _muted = ()  # trackers that are switched off for an epoch

    @property
    def learn(self):
        """The learner; `None` once the callback is taken from it, as after a fit that it was passed
        to.
        """
        return vars(self).get('learn')

    @learn.setter
    def learn(self, learn):
        is_over = learn is None and self.learn is not None and not is_fitting(self.learn, '_do_fit')
        try:
            if is_over:  # else it is back in a moment
                with uninterrupted():
                    self._end(at_once=True)
        finally:
            vars(self)['learn'] = learn

    def __call__(self, event_name):
        if self.learn is None or event_name in _IN_A_BATCH and not hasattr(type(self), event_name):
            return
        if not self._concerns(event_name):
            return
        if event_name == 'before_fit':
            self._begin()
        elif self._fit is not None:
            super().__call__(event_name)
        if event_name == 'after_fit':
            self.run = True  # as fastai has it: switched off, a callback is off for one fit
            self._loss_func = None
            self._end()

    def _begin(self):
        self._end()  # what an interruption has left
        learn = self.learn
        # the former: a learner as a context manager
        if not is_fitting(learn) or any(isinstance(cb, LRFinder) for cb in learn.cbs):
            return
        self._loss_func = learn.loss_func
        try:
            super().__call__('before_fit')
        except BaseException:
            self._end()
            raise

    def __reduce__(self):
        return Callback, (), {'learn': self.learn}

    def __copy__(self):
        res = object.__new__(type(self))
        res.__setstate__(self.__getstate__())
        return res

    def __deepcopy__(self, memo):
        res = memo[id(self)] = object.__new__(type(self))
        settings = {k: v for k, v in self.__getstate__().items() if k not in _OF_FIT}
        vars(res).update(copy.deepcopy(settings, memo))
        res._init_state()
        return res

    @property
    def epoch_under_way(self) -> int:
        "The epoch of the fit; `learn.epoch` is 0 after a validation within it."
        frame = next(_frames(self.learn, '_do_fit'), None)
        return self.learn.epoch if frame is None else frame.f_locals.get('epoch', self.learn.epoch)

    def mute_trackers(self, columns):
        """Until `unmute_trackers`, what steers training by one of the `columns`, whose value could
        not be had, neither counts nor acts."""
        for cb in self.learn.cbs:
            if isinstance(cb, EarlyStoppingCallback | ReduceLROnPlateau) and cb.monitor in columns and cb.run:
                cb.run = False
                self._muted = [*self._muted, cb]

    def unmute_trackers(self):
        for cb in self._muted:
            cb.run = True
        self._muted = []

    def over(self):
        "The fit is over, however it ended."

    def clean_up(self):
        """If an interruption has ended the fit under way, what should have been done at its end is
        done now.
        """
        if self.learn is not None and not is_fitting(self.learn):
            self._end()

    def _end(self, at_once=False):
        """The fit is over; `at_once`: it was under way a moment ago, so that nobody but its
        callbacks has changed the loss.
        """
        if self._loss_func is not None:  # no `after_fit` has come
            _take_back_loss(self.learn, self._loss_func, at_once)
            self._loss_func = None
        self.unmute_trackers()
        if self._fit is None:
            return
        try:
            self.over()
        finally:
            self._fit = None

    def _concerns(self, event_name) -> bool:
        "Is this an event of the fit under way, or the beginning of one?"
        learn = self.learn
        if learn.lock.locked():  # validate, get_preds and predict hold it
            return False
        # to look through the stack in each batch would cost too much
        if event_name in _IN_A_BATCH and self._is_listening:
            return True
        depth = sum(1 for _ in _frames(learn, '_do_fit'))
        is_own = depth == (0 if event_name in _AROUND_EPOCHS else 1) and not is_fitting(learn, 'tta')
        is_end_of_another = event_name == 'after_fit' and depth == 1
        self._is_listening = is_own or is_end_of_another
        return is_own


def _take_back_loss(learn, loss_func, at_once):
    """MixUp and its like put a loss of theirs in the place while they train; an interruption leaves
    it there. It is known by the callback that it refers to, or, `at_once`, by the old loss."""
    if learn.loss_func is loss_func:
        return
    stack, seen = [learn.loss_func], set()
    while stack and len(seen) < 1000:
        o = stack.pop()
        if isinstance(o, Callback) or at_once and o is loss_func:
            learn.loss_func = loss_func
            return
        if id(o) not in seen:
            seen.add(id(o))
            stack.extend(_referred(o))


def _referred(o) -> list:
    "What a loss may be made of."
    if isinstance(o, partial):
        return [o.func, *o.args, *o.keywords.values()]
    if isinstance(o, MethodType):
        return [o.__self__, o.__func__]
    if isinstance(o, FunctionType):
        cells = [c.cell_contents for c in o.__closure__ or () if c != CellType()]
        return [*cells, *(o.__defaults__ or ())]
    if isinstance(o, nn.Module):
        return [*vars(o).values(), *o.children()]
    return list(getattr(o, '__dict__', {}).values()) if callable(o) and not isinstance(o, type) else []


_owners = weakref.WeakValueDictionary()  # path -> the callback that locked it last


def locked_for(cb: FitCallback, path, lock=Lock):
    """What `lock(path)` gives, for the fit of `cb`; what an interrupted fit of another callback has
    left locked is given back before. Raises what `lock` raises.
    """
    owner = _owners.get(path)
    is_left = owner not in (None, cb) and owner.learn is not None
    if is_left and not is_fitting(owner.learn, in_all_threads=True):
        owner.clean_up()
    res = lock(path)
    _owners[path] = cb
    return res


class SideWork:
    """What a callback does beside a training, which must not end it: a failure is said once for
    each kind of work, and counted.

    KeyboardInterrupt and other exceptions that are no `Exception` pass through.
    """

    def __init__(self):
        self.failures = Counter()  # kind of work -> how often it failed

    @contextmanager
    def attempt(self, work: str, consequence: str = ''):
        """Within this context an exception ends the context and nothing else.

        - `work`: what is attempted, as in 'validating the average'; `consequence`: what follows if
          it fails, as in 'its columns are nan'.
        """
        try:
            yield
        except Exception as e:
            self.note(work, e, consequence)

    def note(self, work: str, error: Exception, consequence: str = ''):
        "Count a failure, and warn at the first of its kind."
        self.failures[work] += 1
        if self.failures[work] == 1:
            text = ' '.join(str(error).split()) or 'no message'
            then = f'; {consequence}' if consequence else ''
            warn(f'{work} failed, and training goes on{then}: {type(error).__name__}: {text}')

    def conclude(self):
        "Say how often each kind of work failed, if any did."
        for work, n in self.failures.items():
            text = f'{work} failed {n} time{"s" if n > 1 else ""} in this fit'
            try:
                warn(text)
            except Warning:  # made an error by the user; here it would leave the learner half tidied up
                print(text, file=sys.stderr)


def is_fitting(learn, method='fit', in_all_threads=False) -> bool:
    """Is `learn.fit` under way in this thread, or with `_do_fit` an epoch of it? (Its own state
    does not tell: Ctrl-C leaves no trace in it, and `tta` sends the events of a fit.)"""
    frames = sys._current_frames().values() if in_all_threads else [sys._getframe()]
    return any(True for frame in frames for _ in _frames(learn, method, frame))


def _frames(learn, method, frame=None):
    """The calls of `learn.method` under way on the stack of `frame`, by default this one, the
    innermost first.
    """
    frame = frame or sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == method and frame.f_locals.get('self') is learn:
            yield frame
        frame = frame.f_back


def passed_callbacks(learn) -> list:
    """The callbacks that were passed to the `learn.fit` under way; those attached for good are not
    among them.
    """
    frame = next(_frames(learn, 'fit'), None)
    return [] if frame is None else list(L(frame.f_locals.get('cbs')))


@contextmanager
def no_fit(learn, reason='averaged() would train the average; leave that context first, or call apply()', also=()):
    """Within this context the methods of `learn` that train, and those named in `also`, raise
    `RuntimeError` before they change anything.
    """
    cls = type(learn)
    fits = [n for n in dir(cls) if n.startswith('fit') and callable(getattr(cls, n))]
    names = [*fits, *(n for n in ('fine_tune', 'lr_find', *also) if n in dir(cls))]
    kept = {n: vars(learn)[n] for n in names if n in vars(learn)}

    def refuse(name, *args, **kwargs):
        raise RuntimeError(f'{name} inside {reason}')

    def state():  # an export or a deepcopy made here is of the learner as it is outside
        state = cls.__getstate__(learn)
        return {k: v for k, v in state.items() if k not in (*names, '__getstate__')} | kept

    vars(learn).update({n: partial(refuse, n) for n in names}, __getstate__=state)
    try:
        yield
    finally:
        for n in (*names, '__getstate__'):
            vars(learn).pop(n, None)
        vars(learn).update(kept)
