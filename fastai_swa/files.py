"""Files that are replaced in one step, checked when they are read, and locked while they are in
use. Plain PyTorch."""

import json
import os
import secrets
import stat
import sys
import zipfile
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from .interrupts import uninterrupted, unwound_whole
from .warn import warn

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

__all__ = [
    'replacing',
    'save_weights',
    'write',
    'write_text',
    'append',
    'read',
    'check_zip',
    'parsed',
    'Lock',
    'InUse',
]

_HALF_WRITTEN = '.fastai_swa.tmp'  # the endings of what lies beside a file for a while
_LOCK = '.fastai_swa.lock'


# writing


@contextmanager
def replacing(file: Path):
    """A binary handle; what is written to it replaces `file` in one step at the end. On any error
    `file` stays as it was.

    - It is written beside `file` under a name that no other process or thread uses: two that write
      the same file never mix, the last one wins.
    - The mode of `file` is kept. Where it is a symbolic link, it stays one, and the file that it
      points to is replaced.
    - A writer that is killed leaves what it has half written. The next one to write the same file
      removes that; a living writer's is known by a lock on it. Where files cannot be locked, it
      stays.

    Raises `OSError`, naming `file`, if it cannot be written.
    """
    target = Path(os.path.realpath(file))
    handled = sys.exc_info()[1]  # by the caller: not an error of the writing
    new = None
    with unwound_whole():
        try:
            try:
                with uninterrupted():
                    mode = _mode(target)
                    _remove_left_behind(target)
                    new = _open_new(target, mode)
                with new:
                    yield new
                    new.flush()
                    os.fsync(new.fileno())
                    if os.name != 'posix':
                        new.close()  # Windows renames no open file; elsewhere it is locked until it has its name
                    os.replace(new.name, target)
                with suppress(OSError):
                    _sync_folder(target.parent)  # the renaming itself; not every file system can
            finally:
                _discard(new)
        except (OSError, RuntimeError) as e:
            cause = _cause(e, handled)
            if not isinstance(cause, Exception):
                raise cause  # torch.save makes a RuntimeError of Ctrl-C, as of what the system says
            raise OSError(f'{file} cannot be written: {_first_line(cause)}') from e
        finally:
            _discard(new)  # again: Ctrl-C may have cut that short, and another one is held now


def save_weights(file: Path, weights: dict):
    """Replace `file` by a state dict, as `torch.save` writes it, in one step. Raises `OSError` if
    it cannot be done.
    """
    with replacing(file) as f:
        torch.save(weights, f)


def write(file: Path, kind: str, version: int, content: dict):
    """Replace `file` by `content`, as `read` reads it, in one step. Raises `OSError` if it cannot
    be done.
    """
    save_weights(file, {'format': f'fastai_swa {kind}', 'version': version, **content})


def write_text(file: Path, text: str):
    "Replace `file` by `text` in one step. Raises `OSError` if it cannot be done."
    with replacing(file) as f:
        f.write(text.encode())


def append(file: Path, data: bytes, at: int):
    """Let `file` have `data` behind its first `at` bytes, and nothing else: what lies there, of a writer that was
    killed, goes. Raises `OSError`, naming `file`; then its first `at` bytes are as they were.
    """
    try:
        with unwound_whole(), uninterrupted():
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _append(handle, data, at)
            finally:
                os.close(handle)
    except OSError as e:
        raise OSError(f'{file} cannot be written: {_first_line(e)}') from e


def _append(handle: int, data: bytes, at: int):
    if os.fstat(handle).st_size < at:
        raise OSError('it has become shorter')
    os.ftruncate(handle, at)
    os.lseek(handle, at, os.SEEK_SET)
    try:
        while data:
            data = data[os.write(handle, data) :]  # a disk with too little room takes a part, and then raises
        os.fsync(handle)
    except OSError:
        with suppress(OSError):
            os.ftruncate(handle, at)
        raise


def _mode(target: Path) -> int | None:
    """The mode of the file that is to be replaced; `None`: there is none. Raises `OSError` for a
    folder, a device ...
    """
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        raise OSError('it is there, and it is no file')
    return stat.S_IMODE(mode)


def _open_new(target: Path, mode: int | None):
    """A new file beside `target`, open and locked, with `mode` or, for `None`, what the umask
    leaves.
    """
    opener = partial(os.open, mode=0o666 if mode is None else mode)  # never readable to more than it will be
    while True:
        # mode x follows no link that lies there
        name = f'{_short(target.name)}.{secrets.token_hex(8)}{_HALF_WRITTEN}'
        new = open(target.with_name(name), 'xb', opener=opener)
        try:
            is_own = _try_lock(new.fileno()) and _is_at(new.fileno(), new.name)
        except OSError:  # files cannot be locked here, and nobody takes it for left behind
            is_own = True
        if is_own:
            break
        new.close()  # another writer has taken it for left behind, before the lock, and removes it
    if mode is not None:
        with suppress(OSError):
            os.chmod(new.name, mode)  # what the umask took; not every file system has modes
    return new


def _short(name: str) -> str:
    "As much of a file's name as leaves room for an ending: a name has 255 bytes."
    return name.encode()[:200].decode(errors='ignore')


def _remove_left_behind(target: Path):
    "Remove what writers of `target` have left that are no more."
    with suppress(OSError), os.scandir(target.parent) as entries:
        for entry in entries:
            is_ours = entry.name.startswith(f'{_short(target.name)}.') and entry.name.endswith(_HALF_WRITTEN)
            if is_ours and entry.is_file(follow_symlinks=False):
                _remove_if_unlocked(entry.path)


def _remove_if_unlocked(path):
    with suppress(OSError):
        handle = os.open(path, os.O_RDWR)
        try:
            if _try_lock(handle):
                os.unlink(path)
        finally:
            os.close(handle)


def _discard(new):
    "Remove the new file, unless it has replaced the old one or was not opened."
    if new is not None:
        with suppress(OSError):
            os.unlink(new.name)


def _sync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(e: Exception, handled: BaseException | None) -> BaseException:
    """What `e` was raised for: Ctrl-C and the like, which an error of closing may hide; else what a
    RuntimeError hides.

    `handled`, and what came before it, has nothing to do with it.
    """
    causes = []
    while e is not None and e is not handled:
        causes.append(e)
        e = e.__context__
    for cause in causes:
        if not isinstance(cause, Exception):
            return cause
    return next((cause for cause in causes if not isinstance(cause, RuntimeError)), causes[0])


def _first_line(e) -> str:
    return str(e).split('\n')[0]


# reading


def read(file: Path, kind: str, version: int, mapped: bool = False) -> dict:
    """What `write` wrote. Raises `ValueError` if `file` is damaged, of another kind or newer than
    `version`.

    - `mapped`: tensors stay in the file, and take no memory. They hold as long as the file is not
      changed in place; replacing it does no harm but on Windows, where it cannot be replaced
      meanwhile. So they are for copying from them, soon.
    """
    try:
        check_zip(file)
        saved = torch.load(str(file), map_location='cpu', weights_only=True, mmap=mapped)
    except (PermissionError, FileNotFoundError):
        raise
    except Exception:
        saved = None
    advice = 'It is left as it is: move it away, or give another path'
    if not isinstance(saved, dict) or saved.get('format') != f'fastai_swa {kind}':
        raise ValueError(f'{file} is damaged, or it is no {kind} of fastai_swa. {advice}')
    if type(saved.get('version')) is not int:
        raise ValueError(f'{file} is damaged: it does not say of which format it is. {advice}')
    if saved['version'] > version:
        versions = f'format {saved["version"]}, this one reads {version}'
        raise ValueError(f'{file} was written by a newer fastai_swa ({versions}). {advice}, or update')
    return saved


def check_zip(file: Path):
    """Raise `ValueError` if a part of the zip `file` is damaged, or compressed: `torch.load` does not look at the
    checksums, and a file that is written compressed may need a thousand times its size in memory.
    """
    with zipfile.ZipFile(file) as z:
        parts = z.infolist()
        is_stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
        if not is_stored or sum(part.file_size for part in parts) > file.stat().st_size:
            raise ValueError(f'{file} is compressed')
        if z.testzip():
            raise ValueError(f'{file} is damaged')


def parsed(text: str | bytes, only_finite: bool = False):
    """The JSON in `text`. Raises `ValueError` if it is none, or nested without end.

    - `only_finite`: NaN and infinities, which JSON does not have and Python reads, are refused, too.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant if only_finite else None)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None


def _refuse_constant(name: str):
    raise ValueError(f'{name} is not finite')


# locking


class InUse(RuntimeError):
    "Another run holds the lock."


# By hand: torch brings filelock in any version; its 3.16 leaves the lock with a fork, and 4.3, as 3.16, raises OSError
# where files cannot be locked.
class Lock:
    """A lock on a file or a folder, in a file of its own; the system takes it back when the process
    ends, in whatever way.

    The lock of a file lies beside it. That of a folder, which must be there, lies within it: the
    folder may be all that can be written. Links are followed: what is locked has one lock, whatever
    it is called by. Raises `InUse` if it is held, by another process or by this one; `OSError` if
    it cannot be made.
    """

    held = {}  # path -> handle, of this process
    handle = None  # of the lock's file, open as long as it is held

    def __init__(self, file: Path):
        real = Path(os.path.realpath(file))
        self.path = real / _LOCK if real.is_dir() else real.with_name(real.name + _LOCK)
        refused = f'another run is using {file}; wait for it, or give each run a path of its own'
        if self.path in self.held:
            raise InUse(refused + ' (it is in this process)')
        try:
            with uninterrupted():
                self.handle = self._taken(file, refused)
                self.held[self.path] = self.handle
        except BaseException:  # Ctrl-C, held until now: a traceback may keep this object alive
            self.release()
            raise

    def _taken(self, file, refused) -> int:
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if self._is_taken(handle, file, refused):
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # its last holder removed it in between

    def _is_taken(self, handle, file, refused) -> bool:
        try:
            if not _try_lock(handle):
                raise InUse(refused)
        except OSError as e:
            file = Path(file)
            warn(f'{file.parent} cannot lock files ({e}): take care that no other run uses {file.name}')
        return _is_at(handle, self.path)

    def release(self):
        with uninterrupted():
            if self.handle is None or self.held.get(self.path) != self.handle:
                return  # never held, released before, or in a fork
            del self.held[self.path]
            with suppress(OSError):
                self.path.unlink()  # before the lock goes, or it could be another's by then
            os.close(self.handle)

    __del__ = release

    @classmethod
    def leave_to_parent(cls):
        """In a fork, such as a loader's worker: close the handles, which would hold the locks after
        the parent's end.
        """
        for handle in cls.held.values():
            os.close(handle)
        cls.held.clear()


def _try_lock(handle: int) -> bool:
    """Lock an open file, unless it is locked through another handle; raises `OSError` where files
    cannot be locked.
    """
    try:  # flock, unlike lockf, outlives a look into the file, as a copy of the folder takes one
        if os.name == 'posix':
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_at(handle: int, path) -> bool:
    "Is the open file still the one that lies at `path`?"
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=Lock.leave_to_parent)
