"""No command prints the warning of another library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STRICT = (
    '-W',
    'error::FutureWarning',
    '-W',
    'error::DeprecationWarning',
)  # a warning that is not hidden ends the command


def run(*args, cwd):
    res = subprocess.run(
        [sys.executable, *STRICT, '-m', 'fastai_swa', *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'OMP_NUM_THREADS': '1'},
    )
    assert res.returncode == 0, res.stderr
    assert 'Warning' not in res.stdout + res.stderr


@pytest.mark.parametrize('command', ['', 'demo', 'reproduce', 'report'])
def test_the_help_prints_no_warning(command, tmp_path):
    run(*command.split(), '--help', cwd=tmp_path)


def test_the_demo_prints_no_warning(tmp_path):
    run('demo', '--epochs', '2', '--seeds', '1', cwd=tmp_path)


def test_reproduce_in_processes_of_its_own_and_report_print_no_warning(tmp_path):
    small = '--data digits --scale .07 --images 40 --test-images 40 --jobs 2'.split()
    run('reproduce', 'small-cifar10', *small, '--out', 'row', cwd=tmp_path)
    run('report', 'row', cwd=tmp_path)
