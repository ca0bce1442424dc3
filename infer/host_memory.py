"""Keep the memory of a long-running process flat."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3
"""Option of glibc's mallopt."""
LARGE_BLOCK = 2 * 2**20


def release_large_blocks() -> bool:
    """Have the C library give blocks of 2 MiB and more back to the system when they are freed; say whether it does.

    By default glibc keeps what was freed and places blocks of other sizes into it, so that a stream of hundreds of
    chunks on a CPU creeps up by a tenth. It is a setting of the whole process, hence only for our own commands.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK) == 1
