"""Keep the memory of a long-running process constant."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3
"""Option of glibc's mallopt."""
LARGE_BLOCK_BYTES = 2 * 2**20


def release_large_blocks() -> bool:
    """Set the C library to return freed blocks of 2 MiB and more to the system; return whether it does.

    By default glibc keeps freed memory and places blocks of other sizes into it. The memory of a stream of hundreds of
    chunks on a CPU then grows by a tenth. The setting affects the whole process, so only our own commands make it.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES) == 1
