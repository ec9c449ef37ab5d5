"""Ctrl-C and what must not be torn apart by it. Plain Python.

Python turns a SIGINT into a `KeyboardInterrupt` between any two steps of the main thread, and
launchers often send two in a row: the second arrives while `finally` clauses of the first are at
work, and cuts them short. These two context managers hold it.
"""

import signal
import sys
import threading
from contextlib import contextmanager

__all__ = ['uninterrupted', 'unwound_whole']


@contextmanager
def uninterrupted():
    """A SIGINT that arrives within this context is held until its end: for changes of some
    milliseconds that must be whole or not at all.

    Only the main thread is ever interrupted; in another one nothing is done.
    """
    arrived = []
    with _handled_by(lambda before: lambda *args: arrived.append(args)) as before:
        yield
    if arrived and callable(before):
        before(*arrived[0])


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
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    # ignored, left to the system, or not Python's: no KeyboardInterrupt comes
    if not is_main or not callable(before):
        yield None
        return
    signal.signal(signal.SIGINT, make_handler(before))
    try:
        yield before
    finally:
        signal.signal(signal.SIGINT, before)
