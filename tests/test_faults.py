"""The short form of `benchmarks/faults.py`: faults done to real processes."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))

import faults  # noqa: E402
from writers import WRITERS  # noqa: E402


def test_no_fault_loses_a_run(tmp_path):
    command = [
        sys.executable,
        ROOT / 'benchmarks' / 'faults.py',
        '--kills',
        '4',
        '--times',
        '1',
        '--seed',
        '1',
        '--json',
        tmp_path / 'rows.json',
    ]
    env = {'PYTHONPATH': str(ROOT), 'PATH': '', 'HOME': str(tmp_path)}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    rows = json.loads((tmp_path / 'rows.json').read_text())['rows']
    assert len(rows) == 15 and all(tried for _, tried, _, _ in rows)
    assert done.returncode == 0 and [lost for *_, lost in rows] == [0] * len(rows), done.stdout


@pytest.mark.parametrize('name', WRITERS)
def test_a_writer_on_a_full_disk_says_so_by_name_and_leaves_what_was_there(tmp_path, name):
    assert faults.wrong_on_full_disk(name, tmp_path, random.Random(0)) == []
