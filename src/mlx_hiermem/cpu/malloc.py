"""Keeps memory that MLX frees on Linux, instead of giving it back to the system and asking for it again.

MLX has a cache of buffers on GPUs only. On a CPU every large array comes from malloc, which takes it from the
system page by page and returns it when it is freed: swapping a memory of 70 MB then takes 80 ms of CPU time,
of which 45 are page faults, and 34 without. Thread arenas could not hold such arrays, so all threads share one.
"""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # <malloc.h> of the GNU C library
LARGEST = 1 << 30  # bytes; what is larger still comes from the system


def keep_freed_memory() -> bool:
    """Tells malloc; whether it understood. C libraries other than GNU's have no such options."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = ((ARENA_MAX, 1), (MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, LARGEST))
    return all(mallopt(name, value) == 1 for name, value in options)
