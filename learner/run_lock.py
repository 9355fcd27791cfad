"""The lock of a run directory: one learner at a time, and no trace of one that was refused.

The file holds who has the lock, for the error of the next one; the lock itself is the kernel's (flock) and dies with
its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from pathlib import Path

from protocol.errors import ConfigError

LOCK_FILE = "learner.lock"
_READ_BYTES = 200


class RunLock:
    """Held from the call on until `release` or `undo`, or until the process ends in whatever way.

    Makes the directory where there is none.

    Raises:
        ConfigError: another learner holds it.
        OSError: the directory cannot be made, or its file system has no locks; nothing is left.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / LOCK_FILE
        self._made = [path for path in (directory, *directory.parents) if not path.exists()]
        try:
            self._descriptor, self._before = _lock(self._file)
        except OSError:
            self._remove_made()
            raise
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let another learner have the directory. The file stays."""
        os.close(self._descriptor)

    def undo(self) -> None:
        """Let another learner have the directory, as it was before: file and directories that were made are removed."""
        with contextlib.suppress(OSError):  # whatever the disk refuses now, the reason for giving up is said elsewhere
            if self._before is None:
                self._file.unlink()
            else:
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, self._before, 0)
        os.close(self._descriptor)
        self._remove_made()

    def _remove_made(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):  # it was not made after all, or somebody else writes there, too
                path.rmdir()


def _lock(file: Path) -> tuple[int, bytes | None]:
    """Lock the file that has this name; return its descriptor and what it said (None: it was not there)."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        was_there = file.exists()
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            said = os.pread(descriptor, _READ_BYTES, 0)
            # A refused learner may have removed it since it was opened: a lock on that file would lock nobody out.
            if _has_name(descriptor, file):
                return descriptor, said if was_there else None
            os.close(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, _READ_BYTES, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise ConfigError(
                f"{file.parent} is in use by another learner ({holder or 'a process that just started'}): stop it, or"
                " choose another run_name"
            ) from None
        except OSError:  # no locks on this file system
            os.close(descriptor)
            if not was_there:
                file.unlink()
            raise


def _has_name(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
