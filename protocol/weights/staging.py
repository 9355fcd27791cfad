"""The files that hold versions in transit: private, allocated in full, owned by one living process.

The owner holds an flock on each file; the kernel lets go of it when the process ends, however it ends, so the next
process can tell what the dead have left from what the living use, without trusting process ids (which are reused, and
mean nothing across containers that share /dev/shm). No fsync: a staged version that is lost is fetched again. This file
must not know what is inside the files.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import WeightsError
from protocol.weights.claims import claim_alone

_PREFIX, _SUFFIX = "weights-", ".safetensors"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - only a directory of our own in it is used, see clean_staging

LINKS_MARK = "-links-"
_PROCESS = secrets.token_hex(4)
"""Names this process: several may read one file."""
LEAST_SHARED_BYTES = 2 << 30
"""Shared memory smaller than this is not used: containers get 64 MiB by default, too little for any model."""


def default_staging_directory(shared_memory: Path = _SHARED_MEMORY) -> Path:
    """Return this user's staging directory, in shared memory where that is usable. Pass it to `clean_staging`."""
    usable = os.access(shared_memory, os.W_OK) and _total_bytes(shared_memory) >= LEAST_SHARED_BYTES
    return (shared_memory if usable else Path(tempfile.gettempdir())) / f"headway-{os.geteuid()}"


def clean_staging(directory: Path) -> int:
    """Make the directory (0700), remove what dead processes left there, and return how many files that were.

    Call once at start. Left alone are files of living processes, this one included, files that a living process reads
    (whoever reads a dead one's last removes it, `remove_if_left`), and files of other names.

    Raises:
        WeightsError: the directory cannot be made, is somebody else's, or is open to others.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(directory)
        with _locked(directory, fcntl.LOCK_EX):  # nobody is between creating a file and locking it
            leftovers = [path for path in directory.glob(f"{_PREFIX}*{_SUFFIX}") if remove_if_left(path)]
            for path in directory.glob(f"{_PREFIX}*{LINKS_MARK}*"):
                if not path.with_name(path.name.partition(LINKS_MARK)[0] + _SUFFIX).exists():
                    shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        raise WeightsError(f"staging directory {directory}: {error.strerror}") from error
    return len(leftovers)


def remove_if_left(path: Path) -> bool:
    """Remove a staging file that no living process owns or has claimed; say whether it was one.

    It is claimed alone meanwhile: a reader that comes too late finds it taken, rather than gone from under its engine.
    """
    try:
        with _locked(path, fcntl.LOCK_SH | fcntl.LOCK_NB, os.O_RDWR) as descriptor:  # removers do not stop each other
            if not claim_alone(descriptor):
                return False
            path.unlink()
    except (BlockingIOError, FileNotFoundError):  # owned; or renamed or removed by somebody else meanwhile
        return False
    return True


def links_directory(file: Path) -> Path:
    """Return where this process may put what an engine needs beside a staging file, which others may read, too."""
    return file.with_name(f"{file.name.removesuffix(_SUFFIX)}{LINKS_MARK}{_PROCESS}")


def staging_path(directory: Path) -> Path:
    """Return a fresh file name in the directory; the process id in it is for people only."""
    return directory / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"


def create_staging_file(path: Path, file_bytes: int) -> int:
    """Create the file (0600) with all its space allocated, and return its descriptor, which carries the owner's lock.

    The lock lasts until the last duplicate of the descriptor is closed; a mapping holds one.

    Raises:
        WeightsError: no room, or the file cannot be created. Nothing is left behind.
    """
    try:
        with _locked(path.parent, fcntl.LOCK_SH):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise WeightsError(f"cannot create the weights file {path}: {error.strerror}") from error
    try:
        os.posix_fallocate(descriptor, 0, file_bytes)  # else a full tmpfs is a SIGBUS in the middle of a copy
    except OSError as error:
        os.close(descriptor)
        path.unlink()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise WeightsError(f"cannot allocate the weights file {path}: {error.strerror}") from error
        space = os.statvfs(path.parent)
        raise WeightsError(
            f"no room for {file_bytes} bytes of weights in {path.parent}, which has"
            f" {space.f_bavail * space.f_frsize} free: make room or choose another directory"
        ) from error
    return descriptor


def disown(descriptor: int) -> None:
    """Give up the owner's lock, whoever still has a duplicate of the descriptor, or a mapping."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _total_bytes(directory: Path) -> int:
    space = os.statvfs(directory)
    return space.f_blocks * space.f_frsize


def _check_private(directory: Path) -> None:
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise WeightsError(f"staging directory {directory}: it is no directory, or a link to one")
    if found.st_uid != os.geteuid():
        raise WeightsError(f"staging directory {directory}: owned by user {found.st_uid}, not by {os.geteuid()}")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise WeightsError(f"staging directory {directory}: mode {mode:04o} lets others in: chmod 700 it")


@contextmanager
def _locked(path: Path, operation: int, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Hold an flock while the block runs, and give it the descriptor."""
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, operation)
        yield descriptor
    finally:
        os.close(descriptor)
