import os
import signal
import threading
import time

import pytest

from fastai_swa.interrupts import uninterrupted, unwound_whole


@pytest.fixture(autouse=True)
def default_sigint():
    """Python's own handler, also where the suite was started with SIGINT ignored, as by `&` in a
    shell.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def work(seconds=0.005):
    "Many steps of Python, at any of which an interruption may come."
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_what_is_uninterrupted_is_whole_and_the_interruption_comes_after_it():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            interrupt()
            work()
            done.append('whole')
        done.append('after')
    assert done == ['whole']


def test_an_error_inside_is_not_hidden_by_an_interruption_held():
    with pytest.raises(ValueError, match='inside'), uninterrupted():
        interrupt()
        work()
        raise ValueError('inside')


def test_nested_sections_hold_until_the_outermost_ends():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            with uninterrupted():
                interrupt()
            work()
            done.append('whole')
    assert done == ['whole']


def test_the_handler_that_was_there_is_there_again():
    before = signal.getsignal(signal.SIGINT)
    with uninterrupted(), unwound_whole():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_two_interruptions_in_a_row_leave_nothing_half_put_back():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with unwound_whole():
            try:
                interrupt()
                work()
                done.append('not reached')
            finally:
                interrupt()  # while the first one unwinds
                work()
                done.append('put back')
    assert done == ['put back']


def test_code_that_caught_an_interruption_can_be_interrupted_again():
    with unwound_whole():
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                interrupt()
                work()


def test_other_threads_are_left_alone():
    seen = []

    def other():
        with uninterrupted(), unwound_whole():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_sigint_that_the_user_ignores_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted(), unwound_whole():
        interrupt()
        work()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_an_except_clause_of_an_interruption_another_one_comes_at_once():
    done = []
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt), unwound_whole():
            interrupt()
            work()
            done.append('not reached')
    assert done == []
