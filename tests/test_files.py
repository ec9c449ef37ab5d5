"""Files replaced in one step, checked and locked."""

import ast
import gc
import os
import resource
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import fastai_swa
from fastai_swa import files
from fastai_swa.files import InUse, Lock, read, replacing, save_weights, write, write_text

ROOT = Path(__file__).parents[1]


def test_what_is_written_is_read(tmp_path):
    content = {'a': torch.arange(5.0), 'b': [1, 'two', None, {'c': (3.0, True)}]}
    write(tmp_path / 'x', 'kind', 2, content)
    saved = read(tmp_path / 'x', 'kind', 2)
    assert (
        torch.equal(saved['a'], content['a'])
        and saved['b'] == content['b']
        and list(tmp_path.iterdir()) == [tmp_path / 'x']
    )


def test_another_kind_or_a_newer_version_is_refused(tmp_path):
    write(tmp_path / 'x', 'kind', 2, {})
    with pytest.raises(ValueError, match='is damaged, or it is no checkpoint of fastai_swa'):
        read(tmp_path / 'x', 'checkpoint', 2)
    with pytest.raises(ValueError, match=r'newer fastai_swa \(format 2, this one reads 1\)'):
        read(tmp_path / 'x', 'kind', 1)


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    content = {'a': torch.randn(50), 'b': list(range(20))}
    write(tmp_path / 'x', 'kind', 1, content)
    good = (tmp_path / 'x').read_bytes()
    noticed = 0
    for i in range(0, len(good), 3):
        (tmp_path / 'x').write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
        try:
            saved = read(tmp_path / 'x', 'kind', 1)
        except ValueError:
            noticed += 1
        else:
            assert torch.equal(saved['a'], content['a']) and saved['b'] == content['b']
    assert noticed > len(good) // 6


@pytest.mark.parametrize('length', [0, 1, 100, -1])
def test_a_file_cut_short_is_refused(tmp_path, length):
    write(tmp_path / 'x', 'kind', 1, {'a': torch.randn(50)})
    (tmp_path / 'x').write_bytes((tmp_path / 'x').read_bytes()[:length])
    with pytest.raises(ValueError, match='damaged'):
        read(tmp_path / 'x', 'kind', 1)


def test_no_code_runs_from_a_file(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'evil'),)

    torch.save({'format': 'fastai_swa kind', 'version': 1, 'x': Evil()}, tmp_path / 'x')
    with pytest.raises(ValueError, match='damaged, or it is no kind'):
        read(tmp_path / 'x', 'kind', 1)
    assert not (tmp_path / 'evil').exists()


def test_file_systems_that_cannot_sync_a_folder_or_lock_are_used_as_they_are(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f'/proc/self/fd/{handle}'):
            raise OSError(22, 'Invalid argument')
        real(handle)

    def lockf(*args):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr('fcntl.flock', lockf)
    write(tmp_path / 'x', 'kind', 1, {'n': 1})
    with pytest.warns(UserWarning, match='cannot lock files .*Operation not supported.*no other run uses x'):
        lock = Lock(tmp_path / 'x')
    lock.release()
    assert read(tmp_path / 'x', 'kind', 1)['n'] == 1 and list(tmp_path.iterdir()) == [tmp_path / 'x']


@pytest.mark.parametrize('step', ['save', 'fsync', 'replace'])
@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_an_error_at_any_step_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step, error):
    write(tmp_path / 'x', 'kind', 1, {'n': 1})

    def fail(*args, **kwargs):
        raise error

    if step == 'save':
        monkeypatch.setattr(torch, 'save', lambda o, f: (f.write(b'half'), fail()))
    else:
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write(tmp_path / 'x', 'kind', 1, {'n': 2})
    monkeypatch.undo()
    assert read(tmp_path / 'x', 'kind', 1)['n'] == 1 and list(tmp_path.iterdir()) == [tmp_path / 'x']


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_two_threads_that_write_one_file_never_mix(tmp_path):
    n_bytes, wrong = 300_000, []

    def work(letter):
        for _ in range(15):
            write_text(tmp_path / 'x', letter * n_bytes)
            found = set((tmp_path / 'x').read_text())
            if len(found) != 1 or (tmp_path / 'x').stat().st_size != n_bytes:
                wrong.append(found)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in 'abc']
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and left_in(tmp_path) == ['x']


def test_a_writer_within_a_writer_takes_nothing_from_it_and_the_last_one_wins(tmp_path):
    with replacing(tmp_path / 'x') as f:
        f.write(b'outer')
        write_text(tmp_path / 'x', 'inner')
        assert (tmp_path / 'x').read_text() == 'inner' and len(left_in(tmp_path)) == 2
    assert (tmp_path / 'x').read_text() == 'outer' and left_in(tmp_path) == ['x']


def test_a_link_that_lies_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / 'victim').write_text('untouched')
    folder = tmp_path / 'folder'
    folder.mkdir()
    monkeypatch.setattr(secrets, 'token_hex', lambda n: '0123')
    write_text(folder / 'x', 'old')
    for planted in ('x.0123.fastai_swa.tmp', 'x.fastai_swa.tmp', 'x.1.fastai_swa.tmp'):
        (folder / planted).symlink_to(tmp_path / 'victim')
    with pytest.raises(OSError, match='x cannot be written: .*File exists'):
        write_text(folder / 'x', 'new')
    assert (tmp_path / 'victim').read_text() == 'untouched' and (folder / 'x').read_text() == 'old'


@pytest.mark.parametrize('mode', [0o600, 0o640, 0o664, 0o444])
def test_a_file_keeps_its_mode_and_has_no_wider_one_on_the_way(tmp_path, mode, monkeypatch):
    write_text(tmp_path / 'x', 'old')
    (tmp_path / 'x').chmod(mode)
    first, real = [], os.chmod

    def chmod(path, mode):
        first.append(stat.S_IMODE(os.stat(path).st_mode))
        real(path, mode)

    monkeypatch.setattr(os, 'chmod', chmod)
    with replacing(tmp_path / 'x') as f:
        assert not first[0] & ~mode
        assert stat.S_IMODE(os.fstat(f.fileno()).st_mode) == mode
        f.write(b'new')
    assert stat.S_IMODE((tmp_path / 'x').stat().st_mode) == mode and (tmp_path / 'x').read_text() == 'new'


def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / 'x', 'new')
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / 'x').stat().st_mode) == 0o640


@pytest.mark.parametrize('exists', [True, False])
def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path, exists):
    (tmp_path / 'data').mkdir()
    if exists:
        (tmp_path / 'data' / 'real').write_text('old')
    (tmp_path / 'x').symlink_to(Path('data') / 'real')
    (tmp_path / 'y').symlink_to('x')
    write_text(tmp_path / 'y', 'new')
    assert (tmp_path / 'y').is_symlink() and (tmp_path / 'x').is_symlink()
    assert (tmp_path / 'data' / 'real').read_text() == 'new' and left_in(tmp_path / 'data') == ['real']


def test_a_folder_a_pipe_and_a_circle_of_links_are_refused_by_name(tmp_path):
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'a').symlink_to('b')
    (tmp_path / 'b').symlink_to('a')
    before = left_in(tmp_path)
    for name in ('folder', 'pipe', 'a'):
        with pytest.raises(OSError, match=f'{name} cannot be written'):
            write_text(tmp_path / name, 'new')
    assert left_in(tmp_path) == before and (tmp_path / 'a').is_symlink()


def forked(f) -> int:
    """Run `f()` in a process of its own, which ends with 0 if it returns True; the number of that
    process.
    """
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if f() else 1)
        finally:
            os._exit(2)
    return pid


def ended(pid) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_a_killed_writer_has_left_goes_with_the_next_write_of_that_file(tmp_path):
    def killed():
        with replacing(tmp_path / 'x') as f:
            f.write(b'half')
            f.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    write_text(tmp_path / 'x', 'old')
    assert ended(forked(killed)) == -signal.SIGKILL
    assert (tmp_path / 'x').read_text() == 'old' and len(left_in(tmp_path)) == 2
    write_text(tmp_path / 'y', 'of another name')
    assert len(left_in(tmp_path)) == 3
    write_text(tmp_path / 'x', 'new')
    assert (tmp_path / 'x').read_text() == 'new' and left_in(tmp_path) == ['x', 'y']


class Interrupted:
    "A handle in which Ctrl-C comes at the third write."

    def __init__(self, f):
        self.f, self.n = f, 0

    def write(self, data):
        self.n += 1
        if self.n == 3:
            raise KeyboardInterrupt
        return self.f.write(data)

    def flush(self):
        self.f.flush()


def test_ctrl_c_within_torch_save_is_not_taken_for_a_full_disk(tmp_path):
    save_weights(tmp_path / 'x', {'a': torch.zeros(1000)})
    before = (tmp_path / 'x').read_bytes()
    with pytest.raises(KeyboardInterrupt):
        with replacing(tmp_path / 'x') as f:
            torch.save({'a': torch.ones(1000)}, Interrupted(f))  # it raises RuntimeError
    assert (tmp_path / 'x').read_bytes() == before and left_in(tmp_path) == ['x']


def test_ctrl_c_is_not_taken_for_a_full_disk_that_it_meets_on_the_way_out(tmp_path):
    write_text(tmp_path / 'x', 'old')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(KeyboardInterrupt):
            with replacing(tmp_path / 'x') as f:
                f.write(b'a' * 100)
                resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # closing it cannot write the buffer
                raise KeyboardInterrupt
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / 'x').read_text() == 'old' and left_in(tmp_path) == ['x']


def test_an_error_of_writing_after_a_handled_ctrl_c_is_an_error(tmp_path):
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(OSError, match='x cannot be written: no room'):
            with replacing(tmp_path / 'x'):
                raise RuntimeError('no room')


@pytest.fixture
def default_sigint():
    """Python's own handler, also where the suite was started with SIGINT ignored, as by `&` in a
    shell.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_at(lines, f):
    """Run `f` with a Ctrl-C at each of the `lines`, counted as files.py runs them; what it raised,
    and how many ran.
    """
    n = 0

    def trace(frame, event, arg):
        nonlocal n
        if frame.f_code.co_filename != files.__file__:
            return None
        if event == 'line':
            n += 1
            if n in lines:
                os.kill(os.getpid(), signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        f()
    except (KeyboardInterrupt, OSError) as e:
        return e, n
    finally:
        sys.settrace(before)
    return None, n


@pytest.mark.parametrize('apart', [None, 1, 4], ids=['once', 'twice', 'twice, some lines apart'])
def test_ctrl_c_at_any_line_leaves_the_old_file_or_the_new_one_and_nothing_else(tmp_path, default_sigint, apart):
    def write_new():
        write_text(tmp_path / 'x', 'new')

    write_text(tmp_path / 'x', 'old')
    _, n_lines = interrupted_at(set(), write_new)
    seen = []
    for at in range(1, n_lines + 1):
        write_text(tmp_path / 'x', 'old')
        lines = {at} if apart is None else {at, at + apart}
        raised, _ = interrupted_at(lines, write_new)
        seen.append((tmp_path / 'x').read_text())
        assert isinstance(raised, KeyboardInterrupt) and left_in(tmp_path) == ['x'], f'at line {at}'
    assert set(seen) == {'old', 'new'} and len(seen) > 30


def test_ctrl_c_at_any_line_of_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, default_sigint):
    def fail():
        with replacing(tmp_path / 'x'):
            raise OSError('no room')

    write_text(tmp_path / 'x', 'old')
    _, n_lines = interrupted_at(set(), fail)
    for at in range(1, n_lines + 1):
        raised, _ = interrupted_at({at}, fail)
        assert isinstance(raised, KeyboardInterrupt), f'at line {at}'
        assert (tmp_path / 'x').read_text() == 'old' and left_in(tmp_path) == ['x'], f'at line {at}'


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # at a line of __del__ it is ignored
def test_ctrl_c_at_any_line_of_a_lock_leaves_it_free_and_no_handle_open(tmp_path, default_sigint):
    def open_handles():
        return len(os.listdir('/proc/self/fd'))

    def take_and_release():
        lock = Lock(tmp_path / 'x')
        lock.release()

    _, n_lines = interrupted_at(set(), take_and_release)
    before = open_handles()
    for at in range(1, n_lines + 1):
        raised, _ = interrupted_at({at}, take_and_release)
        if at < n_lines / 2:
            Lock(tmp_path / 'x').release()  # while the traceback keeps all that was in the making
        del raised
        Lock(tmp_path / 'x').release()
        assert open_handles() == before and not left_in(tmp_path), f'at line {at}'
    assert n_lines > 20


def test_all_files_of_the_package_are_written_by_this_module():
    """Whatever else writes gets a handle of `replacing`. PointFile's lines are the exception: half
    ones are dropped.
    """
    found = set()
    for path in sorted(Path(fastai_swa.__file__).parent.rglob('*.py')):
        if path.name == 'files.py':
            continue
        tree = ast.parse(path.read_text())
        handles = set()
        for item in (item for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items):
            if 'replacing(' in ast.unparse(item.context_expr):
                handles.add(ast.unparse(item.optional_vars))
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and writes(call) and not handles & set(map(ast.unparse, call.args)):
                found.add((path.name, ast.unparse(call)))
    assert found == {('surfaces.py', "open(self.path, 'ab', buffering=0)")}


def writes(call) -> bool:
    "Does it open a file to write, or write one?"
    called, texts = ast.unparse(call.func), list(map(ast.unparse, call.args))
    if called.endswith('open'):
        return any(text in texts for text in ("'w'", "'wb'", "'a'", "'ab'", "'x'", "'xb'", "'r+'", "'r+b'"))
    if called == 'torch.save':
        return not any('BytesIO' in text for text in texts)
    return called == 'save_model' or called.endswith(('.write_text', '.write_bytes', '.savez', '.savefig', '.to_csv'))


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
    child = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(ROOT / 'fastai_swa'), str(path), *args],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout.readline().strip() == str(child.pid)
    return child


@pytest.mark.parametrize('args', [(), ('worker',)], ids=['alone', 'with a worker that lives on'])
def test_a_lock_keeps_another_process_out_until_a_kill(tmp_path, args):
    child = hold(tmp_path / 'x', *args)
    try:
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match='another run is using .*x; wait for it, or give each run a path of its own'
            ):
                Lock(tmp_path / 'x')
            gc.collect()
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        lock = Lock(tmp_path / 'x')
        lock.release()
        assert not list(tmp_path.iterdir())
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def test_a_folder_is_locked_within_itself_from_all_its_names(tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'link').symlink_to('folder')
    child = hold(tmp_path / 'folder')
    try:
        for name in ('folder', 'link'):
            with pytest.raises(InUse, match=f'another run is using .*{name}; wait for it'):
                Lock(tmp_path / name)
        assert left_in(tmp_path) == ['folder', 'link']
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        lock = Lock(tmp_path / 'link')
        with pytest.raises(InUse, match='it is in this process'):
            Lock(tmp_path / 'folder')
        lock.release()
        assert not left_in(tmp_path / 'folder')
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def test_of_many_processes_that_want_a_folder_at_once_one_gets_it(tmp_path):
    wait, start = os.pipe()

    def is_mine():
        os.close(start)
        os.read(wait, 1)  # until the parent closes it
        try:
            lock = Lock(tmp_path)
        except InUse:
            return False
        time.sleep(0.3)
        lock.release()
        return True

    children = [forked(is_mine) for _ in range(8)]
    os.close(start)
    os.close(wait)
    assert sorted(ended(child) for child in children) == [0] + [1] * 7
    assert not left_in(tmp_path)


def test_a_lock_keeps_another_fit_of_this_process_out(tmp_path):
    lock = Lock(tmp_path / 'x')
    with pytest.raises(RuntimeError, match='it is in this process'):
        Lock(tmp_path / 'x')
    lock.release()
    Lock(tmp_path / 'x').release()


def test_a_lock_outlives_a_copy_of_its_folder_and_an_error_that_forgets_it(tmp_path):
    lock = Lock(tmp_path / 'x')
    shutil.copytree(tmp_path, tmp_path.with_name('backup'))
    code = 'import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)'
    assert subprocess.run([sys.executable, '-c', code, str(lock.path)], stderr=subprocess.PIPE).returncode == 1
    del lock
    Lock(tmp_path / 'x').release()


def test_a_lock_whose_file_was_replaced_while_it_was_taken_is_taken_again(tmp_path, monkeypatch):
    path, real, n = tmp_path / 'x.fastai_swa.lock', os.open, [0]

    def opened(*args, **kwargs):
        handle = real(*args, **kwargs)
        n[0] += 1
        if n[0] == 1:
            path.unlink()  # its holder let go in between
        return handle

    monkeypatch.setattr(os, 'open', opened)
    lock = Lock(tmp_path / 'x')
    assert n[0] == 2 and os.path.samestat(os.fstat(lock.handle), os.stat(path))
    lock.release()
