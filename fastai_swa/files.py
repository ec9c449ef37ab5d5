"""Files that are replaced in one step, checked when they are read, and locked while they are in use. Plain PyTorch."""
import os, warnings, zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

try: import fcntl
except ImportError: import msvcrt    # Windows

__all__ = ['replacing', 'write', 'read', 'Lock', 'InUse']


@contextmanager
def replacing(file: Path):
    "A binary handle; what is written to it replaces `file` in one step at the end. Raises `OSError` if that fails; `file` is then as before."
    new = file.with_name(file.name + '.fastai_swa.tmp')
    try:
        with open(new, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, file)
        with suppress(OSError): _sync_folder(file.parent)    # the renaming itself; not every file system can
    except BaseException as e:
        with suppress(OSError): new.unlink(missing_ok=True)
        # torch.save may make a RuntimeError of what the system says
        if isinstance(e, OSError | RuntimeError): raise OSError(f'{file} cannot be written: {_first_line(e)}') from e
        raise


def write(file: Path, kind: str, version: int, content: dict):
    "Replace `file` by `content` in one step: whatever happens, there is the old one or the new. Raises `OSError` if it cannot be done."
    with replacing(file) as f: torch.save({'format': f'fastai_swa {kind}', 'version': version, **content}, f)


def _sync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try: os.fsync(handle)
    finally: os.close(handle)


def read(file: Path, kind: str, version: int) -> dict:
    "What `write` wrote. Raises `ValueError` if `file` is damaged, of another kind or of a newer version than `version`; it is only read."
    try:
        with zipfile.ZipFile(file) as z: damaged = z.testzip()    # torch.load does not look at the checksums
        saved = None if damaged else torch.load(file, map_location='cpu', weights_only=True)
    except (PermissionError, FileNotFoundError): raise
    except Exception: saved = None
    advice = 'It is left as it is: move it away, or give another path'
    if not isinstance(saved, dict) or saved.get('format') != f'fastai_swa {kind}':
        raise ValueError(f'{file} is damaged, or it is no {kind} of fastai_swa. {advice}')
    if saved['version'] > version:
        raise ValueError(f'{file} was written by a newer fastai_swa (format {saved["version"]}, this one reads {version}). {advice}, or update')
    return saved


def _first_line(e): return str(e.__context__ if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError) else e).split('\n')[0]


class InUse(RuntimeError):
    "Another run holds the lock."


class Lock:
    """A lock on a path, beside it in a file of its own; the system takes it back when the process ends, however it does.

    Raises `InUse` if it is held, by another process or by this one.
    """
    held = {}    # path -> handle, of this process

    def __init__(self, file: Path):
        self.path, self.handle = file.with_name(file.name + '.fastai_swa.lock'), None
        refused = f'another run is using {file}; wait for it, or give each run a path of its own'
        if self.path in self.held: raise InUse(refused + ' (it is in this process)')
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:    # flock, unlike lockf, outlives a look into the file, as a copy of the folder takes one
                if os.name == 'posix': fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else: msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            except (BlockingIOError, PermissionError):
                os.close(handle)
                raise InUse(refused) from None
            except OSError as e: warnings.warn(f'{file.parent} cannot lock files ({e}): take care that no other run uses {file.name}')
            try: current = os.path.samestat(os.fstat(handle), os.stat(self.path))
            except FileNotFoundError: current = False
            if current: break
            os.close(handle)    # its last holder removed it in between
        self.handle = self.held[self.path] = handle

    def release(self):
        if self.handle is None or self.held.get(self.path) != self.handle: return    # never held, released before, or in a fork
        del self.held[self.path]
        with suppress(OSError): self.path.unlink()    # before the lock goes, or it could be another's by then
        os.close(self.handle)

    __del__ = release

    @classmethod
    def leave_to_parent(cls):
        "In a forked process, such as a loader's worker: close the handles, through which it would hold the locks after the parent's end."
        for handle in cls.held.values(): os.close(handle)
        cls.held.clear()


if hasattr(os, 'register_at_fork'): os.register_at_fork(after_in_child=Lock.leave_to_parent)
