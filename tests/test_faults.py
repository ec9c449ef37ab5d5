"""The short form of `benchmarks/faults.py`: faults done to real processes."""
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_fault_loses_a_run(tmp_path):
    command = [sys.executable, ROOT/'benchmarks'/'faults.py', '--kills', '4', '--times', '1', '--seed', '1', '--json', tmp_path/'rows.json']
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env={'PYTHONPATH': str(ROOT), 'PATH': '', 'HOME': str(tmp_path)}, capture_output=True, text=True, timeout=900)
    rows = json.loads((tmp_path/'rows.json').read_text())['rows']
    assert len(rows) == 10 and all(tried for _, tried, _, _ in rows)
    assert done.returncode == 0 and [lost for *_, lost in rows] == [0]*len(rows), done.stdout
