"""Claims on a file that several processes have open: shared by those who read it, alone by the one who writes it.

They are Linux's locks of open file descriptions (fcntl F_OFD_SETLK) on the whole file. The kernel drops a dead
process's, whichever way it died. An flock on the same file is another matter, and neither sees the other: that marks
who owns the file (staging.py). All processes must be on one kernel; they need not see each other's process ids.
"""

from __future__ import annotations

import errno
import fcntl
import struct

_FLOCK = struct.Struct("hhqqi4x")
"""struct flock on 64-bit Linux: type, whence, start, length (0: to the end), pid (0 for these locks)."""


def claim_shared(descriptor: int) -> bool:
    """Claim the file for reading, beside other readers. False: it is being written."""
    return _set(descriptor, fcntl.F_RDLCK)


def claim_alone(descriptor: int) -> bool:
    """Claim the file for writing; `descriptor` is open for that. False: somebody reads or writes it."""
    return _set(descriptor, fcntl.F_WRLCK)


def drop_claim(descriptor: int) -> None:
    """Give the claim of this open file up. Nothing happens without one."""
    _set(descriptor, fcntl.F_UNLCK)


def _set(descriptor: int, kind: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
