"""Files replaced in one step, checked and locked."""
import gc
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fastai_swa.files import Lock, read, write

ROOT = Path(__file__).parents[1]


def test_what_is_written_is_read(tmp_path):
    content = {'a': torch.arange(5.), 'b': [1, 'two', None, {'c': (3., True)}]}
    write(tmp_path/'x', 'kind', 2, content)
    saved = read(tmp_path/'x', 'kind', 2)
    assert torch.equal(saved['a'], content['a']) and saved['b'] == content['b'] and list(tmp_path.iterdir()) == [tmp_path/'x']


def test_another_kind_or_a_newer_version_is_refused(tmp_path):
    write(tmp_path/'x', 'kind', 2, {})
    with pytest.raises(ValueError, match='is damaged, or it is no checkpoint of fastai_swa'): read(tmp_path/'x', 'checkpoint', 2)
    with pytest.raises(ValueError, match=r'newer fastai_swa \(format 2, this one reads 1\)'): read(tmp_path/'x', 'kind', 1)


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    content = {'a': torch.randn(50), 'b': list(range(20))}
    write(tmp_path/'x', 'kind', 1, content)
    good = (tmp_path/'x').read_bytes()
    noticed = 0
    for i in range(0, len(good), 3):
        (tmp_path/'x').write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1:])
        try: saved = read(tmp_path/'x', 'kind', 1)
        except ValueError: noticed += 1
        else: assert torch.equal(saved['a'], content['a']) and saved['b'] == content['b']
    assert noticed > len(good)//6


@pytest.mark.parametrize('length', [0, 1, 100, -1])
def test_a_file_cut_short_is_refused(tmp_path, length):
    write(tmp_path/'x', 'kind', 1, {'a': torch.randn(50)})
    (tmp_path/'x').write_bytes((tmp_path/'x').read_bytes()[:length])
    with pytest.raises(ValueError, match='damaged'): read(tmp_path/'x', 'kind', 1)


def test_no_code_runs_from_a_file(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'evil'),)
    torch.save({'format': 'fastai_swa kind', 'version': 1, 'x': Evil()}, tmp_path/'x')
    with pytest.raises(ValueError, match='damaged, or it is no kind'): read(tmp_path/'x', 'kind', 1)
    assert not (tmp_path/'evil').exists()


def test_file_systems_that_cannot_sync_a_folder_or_lock_are_used_as_they_are(tmp_path, monkeypatch):
    real = os.fsync
    def fsync(handle):
        if os.path.isdir(f'/proc/self/fd/{handle}'): raise OSError(22, 'Invalid argument')
        real(handle)
    def lockf(*args): raise OSError(95, 'Operation not supported')
    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr('fcntl.flock', lockf)
    write(tmp_path/'x', 'kind', 1, {'n': 1})
    with pytest.warns(UserWarning, match='cannot lock files .*Operation not supported.*no other run uses x'): lock = Lock(tmp_path/'x')
    lock.release()
    assert read(tmp_path/'x', 'kind', 1)['n'] == 1 and list(tmp_path.iterdir()) == [tmp_path/'x']


@pytest.mark.parametrize('step', ['save', 'fsync', 'replace'])
@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_an_error_at_any_step_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step, error):
    write(tmp_path/'x', 'kind', 1, {'n': 1})
    def fail(*args, **kwargs): raise error
    if step == 'save': monkeypatch.setattr(torch, 'save', lambda o, f: (f.write(b'half'), fail()))
    else: monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)): write(tmp_path/'x', 'kind', 1, {'n': 2})
    monkeypatch.undo()
    assert read(tmp_path/'x', 'kind', 1)['n'] == 1 and list(tmp_path.iterdir()) == [tmp_path/'x']


# locks

HOLD = '''
import os, sys, time
from pathlib import Path
sys.modules['fastai_swa'] = type(sys)('fastai_swa')    # without the rest of the package, which takes seconds
sys.modules['fastai_swa'].__path__ = [sys.argv[1]]
from fastai_swa.files import Lock
lock = Lock(Path(sys.argv[2]))
if len(sys.argv) > 3 and not os.fork(): time.sleep(60)    # as a loader's worker that outlives its parent
print(os.getpid(), flush=True)
time.sleep(60)
'''

def hold(path, *args):
    child = subprocess.Popen([sys.executable, '-c', HOLD, str(ROOT/'fastai_swa'), str(path), *args], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout.readline().strip() == str(child.pid)
    return child


@pytest.mark.parametrize('args', [(), ('worker',)], ids=['alone', 'with a worker that lives on'])
def test_a_lock_keeps_another_process_out_until_a_kill(tmp_path, args):
    child = hold(tmp_path/'x', *args)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match='another run is using .*x; wait for it, or give each run a path of its own'): Lock(tmp_path/'x')
            gc.collect()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        lock = Lock(tmp_path/'x')
        lock.release()
        assert not list(tmp_path.iterdir())
    finally:
        with suppress(ProcessLookupError): os.killpg(child.pid, signal.SIGKILL)


def test_a_lock_keeps_another_fit_of_this_process_out(tmp_path):
    lock = Lock(tmp_path/'x')
    with pytest.raises(RuntimeError, match='it is in this process'): Lock(tmp_path/'x')
    lock.release()
    Lock(tmp_path/'x').release()


def test_a_lock_outlives_a_copy_of_its_folder_and_an_error_that_forgets_it(tmp_path):
    lock = Lock(tmp_path/'x')
    shutil.copytree(tmp_path, tmp_path.with_name('backup'))
    code = 'import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)'
    assert subprocess.run([sys.executable, '-c', code, str(lock.path)], stderr=subprocess.PIPE).returncode == 1
    del lock
    Lock(tmp_path/'x').release()


def test_a_lock_whose_file_was_replaced_while_it_was_taken_is_taken_again(tmp_path, monkeypatch):
    path, real, n = tmp_path/'x.fastai_swa.lock', os.open, [0]
    def opened(*args, **kwargs):
        handle = real(*args, **kwargs)
        n[0] += 1
        if n[0] == 1: path.unlink()    # its holder let go in between
        return handle
    monkeypatch.setattr(os, 'open', opened)
    lock = Lock(tmp_path/'x')
    assert n[0] == 2 and os.path.samestat(os.fstat(lock.handle), os.stat(path))
    lock.release()
