"""What is used up when it is gone through, and how it is given again."""

import io
import itertools
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastai_swa.replay import Replay, is_replayable, is_used_up


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(['take', 'take', 'take', 'begin', 'rewind']), max_size=30))
def test_what_was_taken_since_the_beginning_comes_again_also_in_nested_ones(steps):
    replay = Replay(itertools.count())
    place, begun = 0, []  # as for a list with a cursor
    for step in steps:
        if step == 'take':
            assert next(replay) == place
            place += 1
        elif step == 'begin':
            replay.begin()
            begun.append(place)
        elif begun:
            place = begun.pop()
            replay.rewind()
    assert not replay.draws and next(replay) == place


def test_a_replay_that_differs_from_its_iterator_says_so():
    replay = Replay(iter('abc'))
    replay.begin()
    assert not replay.rewind()
    replay.begin()
    next(replay)
    assert replay.rewind() and list(replay) == list('abc')


def test_an_iterator_that_draws_for_what_is_given_twice_is_known():
    replay = Replay(random.random() for _ in range(3))
    next(replay)
    assert not replay.draws
    replay.begin()
    next(replay)
    assert replay.draws


class Counts:
    "An iterator that counts in an attribute, which can be put back."

    def __init__(self):
        self.n = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.n += 1
        return self.n


@pytest.mark.parametrize(
    'make, is_gone',
    [
        (lambda: (i for i in range(3)), True),
        (lambda: iter([1, 2]), True),
        (lambda: zip([1], [2]), True),
        (lambda: itertools.repeat(0), False),
        (Counts, False),
        (lambda: [1, 2], False),
        (lambda: io.BytesIO(b'a'), False),
    ],
)
def test_what_is_used_up_is_known(make, is_gone):
    assert is_used_up(make()) == is_replayable(make()) == is_gone


def test_a_pipe_is_used_up_and_no_replay_can_stand_for_it():
    reading, writing = os.pipe()
    with os.fdopen(reading) as pipe, os.fdopen(writing, 'w'):
        assert is_used_up(pipe) and not is_replayable(pipe)
