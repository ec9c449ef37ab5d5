"""Ctrl-C and what must not be torn apart by it. Plain Python.

Python turns a SIGINT into a `KeyboardInterrupt` between any two steps of the main thread, and
launchers often send two in a row: the second arrives while `finally` clauses of the first are at
work, and cuts them short. These two context managers hold it.
"""

import sys
import threading

# as in `signal`, which looks each handler up in an enum besides: that took 15 of a context's 20 us, in each fold
from _signal import SIGINT, getsignal
from _signal import signal as set_handler
from contextlib import contextmanager

__all__ = ['uninterrupted', 'unwound_whole']


class uninterrupted:
    """A SIGINT that arrives within this context is held until its end: for changes of some
    milliseconds that must be whole or not at all.

    Only the main thread is ever interrupted; in another one nothing is done.
    """

    # a class, since each fold enters it: a generator would take three times as long

    def __enter__(self):
        self.arrived = []
        self.before = getsignal(SIGINT)
        self.holds = _is_interrupted_by(self.before)
        if self.holds:
            set_handler(SIGINT, self._hold)

    def _hold(self, *args):
        self.arrived.append(args)

    def __exit__(self, kind, error, traceback):
        if self.holds:
            set_handler(SIGINT, self.before)
            if self.arrived and kind is None:
                self.before(*self.arrived[0])


@contextmanager
def unwound_whole():
    """The first SIGINT within this context interrupts it as usual; one that arrives while that is
    unwinding is held until the context's end.

    So what `finally` clauses inside, and in the context managers entered inside, put back is put
    back even after two Ctrl-C in a row. Code that has caught the interruption and goes on can be
    interrupted again.
    """
    arrived = []
    handled = sys.exc_info()[1]  # by code around this context, such as an `except KeyboardInterrupt`

    def handler(before):
        def handle(*args):
            if _is_unwinding(handled):
                arrived.append(args)
            elif callable(before):
                before(*args)

        return handle

    try:
        with _handled_by(handler) as before:
            yield
    finally:
        if arrived and callable(before):
            before(*arrived[0])


def _is_unwinding(handled) -> bool:
    """Is a `KeyboardInterrupt` on its way up, so that what runs is an `except`, `finally` or
    `__exit__` of it?
    """
    e = sys.exc_info()[1]
    while e is not None and e is not handled:
        if isinstance(e, KeyboardInterrupt):
            return True
        e = e.__context__
    return False


@contextmanager
def _handled_by(make_handler):
    """SIGINT goes to `make_handler(before)` within this context, which gives the handler `before`;
    it goes there again at the end.
    """
    before = getsignal(SIGINT)
    if not _is_interrupted_by(before):
        yield None
        return
    set_handler(SIGINT, make_handler(before))
    try:
        yield before
    finally:
        set_handler(SIGINT, before)


def _is_interrupted_by(handler) -> bool:
    "Does it depend on `handler` whether this thread gets a KeyboardInterrupt?"
    # one that is not callable: ignored, left to the system, or not Python's
    return callable(handler) and threading.current_thread() is threading.main_thread()
