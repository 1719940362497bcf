"""Memory for many tensors that come and go, asked of the system once.

glibc gives the free end of its heap back whenever that is large, and takes it again at the next layer: fresh pages,
each with a fault of its own, took a fifth of the time of a MobileNet whose samples go from layer to layer together. A
block at the end of the heap keeps what lies below it, and pages that are asked for all at once cost a third of that.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from mmap import PAGESIZE

import torch
from torch import Tensor

from bnfix.running.memory import free_bytes, give_back

_BLOCK = 1 << 20
_MAPPED = (32 << 20) - (16 << 10)
"""The largest block whose release makes glibc take such ones from its heap from then on; larger ones never are."""
_KEPT = 1 << 30
"""Bytes that stay with the process for the next time, if that is no more than an eighth of what is free: to fetch them
anew takes a tenth of a MobileNet's time."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14; an older one says no, and each page is fetched when it is first used."""


_ends: list[Tensor] = []  # the block above what stayed


@contextmanager
def kept_heap(count: int) -> Iterator[None]:
    """``count`` bytes of the heap are ready for tensors on the CPU inside.

    Up to 1 GB of them stay with the process, for the next time and for whatever else it computes; more goes back to
    the system. Nothing is promised: where the C library or the kernel is another one, all is as it was.
    """
    last: Tensor | None = None
    if sys.platform == "linux" and count >= _BLOCK:
        with suppress(RuntimeError, MemoryError):  # a limit of the process: the work may do with less
            last = _prepared(count)
    try:
        yield
    finally:
        if last is not None:
            stays = count <= min(_KEPT, free_bytes(last.device) // 8)
            _ends[:] = [last] if stays else []
            last = None
            if not stays:
                give_back()  # a small block at the heap's end would keep all that lies below it


def _prepared(count: int) -> Tensor:
    _block(_MAPPED)
    blocks = sorted((_block(_BLOCK) for _ in range(-(-count // _BLOCK) + 1)), key=Tensor.data_ptr)
    last = blocks.pop()
    _populate([block.data_ptr() for block in blocks])
    return last


def _block(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")


def _populate(starts: list[int]) -> None:
    """Fetch the pages of blocks that begin there, those of neighbours together."""
    library = ctypes.CDLL(None)
    advise, resident = getattr(library, "madvise", None), getattr(library, "mincore", None)
    if advise is None or resident is None:
        return
    runs: list[list[int]] = []
    for start in starts:
        if runs and start - runs[-1][1] < _BLOCK:
            runs[-1][1] = start + _BLOCK
        else:
            runs.append([start, start + _BLOCK])
    for start, end in runs:
        first = -(-start // PAGESIZE) * PAGESIZE
        begin, count = ctypes.c_void_p(first), end // PAGESIZE * PAGESIZE - first
        there = ctypes.create_string_buffer(count // PAGESIZE)
        # To fetch what is there already takes an eighth of the time of fetching it, and to ask hardly any.
        if resident(begin, ctypes.c_size_t(count), there) or there.raw.count(b"\1") < len(there):
            advise(begin, ctypes.c_size_t(count), _POPULATE_WRITE)
