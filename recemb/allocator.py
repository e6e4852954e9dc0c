"""Memory allocators set up for training: fewer page faults, less resident memory. For entry points, once.

A step frees and allocates the same dozen tensors of 5 to 30 MB. By default glibc returns blocks of that size to the
kernel and gets them back empty: thousands of page faults, each of which zeroes 4 kB, in every step. Arrow's default
pool, mimalloc, keeps about 50 MB more than the decoded columns that a loader holds at a time.
"""

from __future__ import annotations

import ctypes
import sys

import pyarrow as pa

# Options of mallopt, from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# The largest that glibc takes: blocks above are always mapped on their own.
_LARGEST_MMAP_THRESHOLD = 32 << 20


def tune_allocators(kept_bytes: int = 1 << 28) -> bool:
    """Keep freed memory for the next step, and Arrow's in the same heap. Right before training.

    What building the model freed (the initial tables) is given back first.

    Args:
        kept_bytes: bytes of freed memory at the top of the heap that stay with the process; several times the
            temporaries of a step. The default, 256 MiB, is enough for batches of 16,384 rows.

    Returns:
        Whether the process now does so: False, and nothing changed, where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    library.malloc_trim(0)
    pa.set_memory_pool(pa.system_memory_pool())
    keeps_blocks = library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(keeps_blocks and library.mallopt(_M_TRIM_THRESHOLD, kept_bytes))
