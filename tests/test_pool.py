"""The seeds of a job, one after the other and side by side: what becomes of each, and what is
shown."""

import os
from dataclasses import dataclass

import pytest

from fastai_swa.experiments.machine import TimeIsUp
from fastai_swa.experiments.pool import STOPPED, run_all
from fastai_swa.files import InUse

GOES_ON = 'the same command goes on from there'
EXIT = 7


@dataclass(frozen=True)
class Job:
    "Each of its seeds ends in another way."

    seeds: tuple
    jobs: int

    def run(self, seed, show):
        show(seed, f'seed {seed} begins')
        if seed == EXIT:
            os._exit(3)
        if seed in ENDS:
            raise ENDS[seed][0]


# seed -> what it raises, and what is said of it
ENDS = {
    1: (TimeIsUp('no time'), STOPPED),
    2: (ValueError('too  much\nspace'), 'too much space'),
    3: (OSError('no room'), 'no room'),
    4: (InUse('another run is using it'), 'another run is using it'),
    5: (
        RuntimeError('CUDA out of memory. Tried to allocate'),
        f'the GPU is out of memory (CUDA out of memory); {GOES_ON}: with fewer --jobs, perhaps',
    ),
    6: (
        RuntimeError('Exception occured in `X` when calling event `after_batch`: it broke'),
        f'failed (RuntimeError: it broke); {GOES_ON}',
    ),
}


class Lines:
    def __init__(self):
        self.shown = []

    def show(self, seed, text):
        self.shown.append((seed, text))


@pytest.mark.parametrize('jobs', [1, 3])
def test_each_seed_ends_in_a_sentence_or_completes_and_no_other_knows_of_it(jobs):
    lines = Lines()
    found = run_all(Job((0, *ENDS, 8), jobs), lines)
    assert found == {0: None, 8: None} | {seed: said for seed, (_, said) in ENDS.items()}
    assert list(found) == sorted(found)
    for seed in found:
        last = [(seed, f'seed {seed}  complete')] if found[seed] is None else []
        assert [line for line in lines.shown if line[0] == seed] == [(seed, f'seed {seed} begins'), *last]


def test_a_process_that_dies_is_named_by_its_exit_status():
    found = run_all(Job((0, EXIT, 8), 2), Lines())
    assert found == {0: None, EXIT: f'its process ended with 3; {GOES_ON}', 8: None}


@pytest.mark.parametrize('jobs', [1, 2])
def test_an_interruption_is_not_taken_for_an_end(jobs):
    class Interrupted(Lines):
        def show(self, seed, text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(Job((0, 8), jobs), Interrupted())
