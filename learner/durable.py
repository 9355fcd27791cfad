"""Files that survive a power cut: written whole or not at all, on disk before the function returns.

Nothing here knows what is written. What rename alone does not give: the bytes are synced before the new name exists,
and the directory is synced after, so that neither the bytes nor the name can be lost (the base of invariant I7).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`. A reader sees the old bytes or the new ones; after the return, the new ones for good.

    One writer at a time: the temporary file has a fixed name, so that a crash leaves at most one behind and the next
    write takes it over.

    Raises:
        OSError: the disk refused; the old file is untouched and the temporary one is gone.
    """
    write_all_atomic({path: data})


def write_all_atomic(files: Mapping[Path, bytes]) -> None:
    """Replace several files of one directory, each as `write_atomic` does, or none where the disk has no room for all.

    In order: who dies between two of them leaves the first ones new and the others old.

    Raises:
        OSError: the disk refused.
    """
    temporaries = {path.with_name(f"{path.name}.tmp"): path for path in files}
    try:
        for temporary, path in temporaries.items():
            write_synced(temporary, files[path])
        for temporary, path in temporaries.items():
            temporary.replace(path)
    except OSError:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    fsync_directory(next(iter(files)).parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` to `path` and wait until the bytes (not yet the name) are on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fsync_file(path: Path) -> None:
    """Wait until the bytes of a file that somebody else wrote are on disk."""
    _fsync(path, os.O_RDONLY)


def fsync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk: files made, renamed and removed in it."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
