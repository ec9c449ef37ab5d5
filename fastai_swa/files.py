"""Files that are replaced in one step, checked when they are read, and locked while they are in use. Plain PyTorch."""
import os, warnings, zipfile
from contextlib import suppress
from pathlib import Path

import torch

try: import fcntl
except ImportError: import msvcrt    # Windows

__all__ = ['write', 'read', 'Lock']


def write(file: Path, kind: str, version: int, content: dict):
    "Replace `file` by `content` in one step: whatever happens, there is the old one or the new. Raises `OSError` if it cannot be done."
    new = file.with_name(file.name + '.tmp')
    try:
        with open(new, 'wb') as f:
            torch.save({'format': f'fastai_swa {kind}', 'version': version, **content}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, file)
        with suppress(OSError): _sync_folder(file.parent)    # the renaming itself; not every file system can
    except BaseException as e:
        new.unlink(missing_ok=True)
        # torch.save may make a RuntimeError of what the system says
        if isinstance(e, OSError | RuntimeError): raise OSError(f'{file} cannot be written: {_first_line(e)}') from e
        raise


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


class Lock:
    "A lock on a path, beside it in a file of its own; the system takes it back when the process ends, however it does."
    held = set()    # by this process, whose own fits the system's lock does not keep apart

    def __init__(self, file: Path):
        self.path = file.with_name(file.name + '.lock')
        refused = f'another run is using {file}; wait for it, or give each run a path of its own'
        if self.path in self.held: raise RuntimeError(refused + ' (it is in this process)')
        while True:
            self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if os.name == 'posix': fcntl.lockf(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)    # unlike flock, no loader's worker inherits it
                else: msvcrt.locking(self.handle, msvcrt.LK_NBLCK, 1)
            except (BlockingIOError, PermissionError):
                os.close(self.handle)
                raise RuntimeError(refused) from None
            except OSError as e: warnings.warn(f'{file.parent} cannot lock files ({e}): take care that no other run uses {file.name}')
            try: current = os.path.samestat(os.fstat(self.handle), os.stat(self.path))
            except FileNotFoundError: current = False
            if current: break
            os.close(self.handle)    # its last holder removed it in between
        self.held.add(self.path)

    def release(self):
        self.held.discard(self.path)
        try: self.path.unlink()    # before the lock goes, or it could be another's by then
        except OSError: pass    # it may stay: the lock is the system's, not the file
        os.close(self.handle)
