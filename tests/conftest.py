import gc
import os
import random
import signal
import sys

import matplotlib
import pytest
import torch
from fastprogress import fastprogress

from .core import is_core

matplotlib.use('agg')
torch.set_num_threads(1)  # the networks are tiny: a second thread only waits


def pytest_collection_modifyitems(items):
    for item in items:
        if is_core(item.path.stem, item.originalname):
            item.add_marker('core')


def pytest_collection_finish():
    "No collection of garbage goes through what is imported: the experiments ask for one after each run."
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def quiet_progress(monkeypatch):
    "fastai's progress callback runs as for a user, but prints nothing."
    monkeypatch.setattr(fastprogress, 'NO_BAR', True)
    monkeypatch.setattr(fastprogress, 'WRITER_FN', lambda *args, **kwargs: None)
    monkeypatch.setattr(fastprogress.ConsoleProgressBar, 'fill', '')


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close('all')


@pytest.fixture
def ctrl_c():
    "Sends a SIGINT, to Python's own handler also where the suite was started with SIGINT ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def more_ctrl_c(ctrl_c, monkeypatch):
    "Sends SIGINTs while a first one unwinds: whenever Python's random generator is put back."
    put_back, sent = random.setstate, []

    def setstate(state):
        if isinstance(sys.exc_info()[1], KeyboardInterrupt):
            sent.append(True)
            ctrl_c()
        put_back(state)

    monkeypatch.setattr(random, 'setstate', setstate)
    yield sent
    assert sent
