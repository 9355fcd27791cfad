"""How this process's allocator treats memory that was freed. Of glibc; other C libraries stay as they are.

Every step allocates and frees the same large tensors. glibc gives most of them back to the kernel at once (whatever is
larger than 32 MiB, and the free end of its heap), and the next step gets them back page by page, each one zeroed. It
also gives threads heaps of their own, of at most 64 MiB. Kept memory costs nothing that the next step does not need.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""glibc's malloc.h."""
GIVEN_BACK_BYTES = 1 << 30
"""Blocks from this size on still go back at once."""
NEVER = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Have freed blocks stay with the process, in one heap for all threads; to be called before they are started."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    for name, value in ((M_MMAP_THRESHOLD, GIVEN_BACK_BYTES), (M_TRIM_THRESHOLD, NEVER), (M_ARENA_MAX, 1)):
        library.mallopt(name, value)
