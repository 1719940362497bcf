"""glibc's allocator, told to keep what is freed: the activations of the next layer go where the last ones were."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MMAP_THRESHOLDS = (1 << 30, 32 << 20)  # glibc before 2.35 takes no more than that: larger blocks are mapped anew
_KEPT = 1 << 30


def keep_freed_memory() -> None:
    """For the rest of this process; nothing where the C library is another one.

    As glibc starts out, each block of some MB is mapped when it is asked for and given back when it is freed, so that
    the kernel has to clear its pages every time, and threads keep heaps of their own. A process may decide
    that for itself, a library may not: only the command line calls this.
    """
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return
    for value in _MMAP_THRESHOLDS:
        if library.mallopt(_MMAP_THRESHOLD, value):
            break
    library.mallopt(_TRIM_THRESHOLD, _KEPT)
    library.mallopt(_ARENA_MAX, 1)
