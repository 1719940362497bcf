"""glibc's allocator, told to keep what is freed: the activations of the next layer go where the last ones were."""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc takes no more on 64 bits: larger blocks are mapped anew each time
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
    for name, value in (
        (_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_TRIM_THRESHOLD, _KEPT),
        (_ARENA_MAX, 1),
    ):
        library.mallopt(name, value)
