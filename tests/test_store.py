"""The one file of a row: what many write into it at a time, and what is read."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastai_swa.experiments.store import shortest, store, stored

from .test_distributed import SERVER  # whose processes have imported all this already


def line(seed, kind='training', **content):
    return {'kind': kind, 'seed': seed, **content}


def test_a_record_replaces_its_namesake_and_no_other(tmp_path):
    for data in line(1, a=1), line(0, a=2), line(1, 'landscape', a=3), line(1, a=4):
        store(tmp_path, data)
    assert stored(tmp_path, 'training') == {0: line(0, a=2), 1: line(1, a=4)} and stored(tmp_path, 'landscape') == {
        1: line(1, 'landscape', a=3)
    }
    assert len((tmp_path / 'runs.jsonl').read_text().splitlines()) == 3 and {f.name for f in tmp_path.iterdir()} == {
        'runs.jsonl'
    }


def _write(folder, seeds):
    for seed in seeds:
        store(folder, line(seed, numbers=[0.1] * 200))


def test_processes_that_write_at_a_time_lose_nothing(tmp_path):
    processes = [SERVER.Process(target=_write, args=(tmp_path, range(i, 40, 4))) for i in range(4)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert list(stored(tmp_path, 'training')) == list(range(40)) and {f.name for f in tmp_path.iterdir()} == {
        'runs.jsonl'
    }


DAMAGED = ['{', '[]', '{"seed": 1}', '', '[' * 100_000, '{"kind": "training", "seed": true}', '{"kind": 3, "seed": 1}']


@pytest.mark.parametrize('damaged', DAMAGED)
def test_a_damaged_line_is_named_and_nothing_is_written_over(tmp_path, damaged):
    store(tmp_path, line(0))
    file = tmp_path / 'runs.jsonl'
    file.write_text(file.read_text() + damaged + '\n')
    before = file.read_bytes()
    for call in (lambda: stored(tmp_path, 'training'), lambda: store(tmp_path, line(1))):
        with pytest.raises(ValueError, match='runs.jsonl is damaged in line 2: move it away'):
            call()
    assert file.read_bytes() == before


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_shortest_number_is_the_same_float32(value):
    short = shortest(value)
    assert struct.pack('f', short) == struct.pack('f', value) and len(json.dumps(short)) <= max(
        len(json.dumps(value)), 15
    )


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 0.1 + 0.2, 1e300, 12345678901.5])
def test_what_is_no_float32_stays_as_it_is(value):
    assert repr(shortest(value)) == repr(value)
