"""Activations of parked chunks in files instead of memory.

At a norm a parked forward needs its tensors again only when its turn comes. Until then they lie in an unlinked file,
mapped into the same tensor objects: the user's code notices nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from bnfix.errors import CalibrationError, one_line

LEAST = 1 << 16
"""Bytes of a storage that is worth a file."""


class Spiller:
    """Files under ``folder``; they have no names and go with the process, however it ends."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = os.fspath(folder)
        # A weak reference keeps the address of a storage taken: as long as it is here, no other gets the same key.
        self._files: dict[int, StorageWeakRef] = {}
        self._many = 64
        if not hasattr(mmap, "MADV_DONTNEED") or not hasattr(os, "posix_fallocate"):
            raise CalibrationError("spilling to files needs Linux", hint="leave out spill_dir, or set memory_budget")
        if not os.path.isdir(self._folder):
            raise CalibrationError(f"spill_dir={self._folder!r} is no folder", hint="make it, or name another one")

    def strand(self, inputs: Iterable[Tensor] = ()) -> SpilledStrand:
        """For one chunk, whose ``inputs`` may be in files already."""
        return SpilledStrand(self, inputs)

    def kept(self, tensor: Tensor) -> Tensor:
        """An input of the model with its values in a file; itself where it is small, or not a plain one on the CPU."""
        if type(tensor) is not Tensor or not _dense(tensor) or tensor.numel() * tensor.element_size() < LEAST:
            return tensor
        own = tensor.detach().clone()  # of a view no more than it shows
        return own.set_(self.mapped(own.untyped_storage()), 0, own.shape, own.stride())  # type: ignore[call-overload]

    def mapped(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The bytes of a storage in a file; not in memory until they are read.

        Raises:
            CalibrationError: the disk is full or can't be written.
        """
        size = storage.nbytes()
        try:
            with tempfile.TemporaryFile(dir=self._folder, prefix="bnfix-") as file:
                # Room is taken at once: a mapped page that finds no room later ends the process.
                os.posix_fallocate(file.fileno(), 0, size)
                # By its number: an mmap.mmap would keep a descriptor for each, and there may be a thousand at most.
                path = f"/proc/self/fd/{file.fileno()}"
                found: Any = torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else one_line(error)
            raise CalibrationError(
                f"spill_dir={self._folder!r} can't take {size:,} bytes: {why}",
                hint="name a folder with more room, or take fewer samples:  max_samples=",
            ) from error
        found.copy_(storage)
        _forget(found)
        if len(self._files) >= self._many:
            self._files = {key: ref for key, ref in self._files.items() if not ref.expired()}  # type: ignore[no-untyped-call]
            self._many = 2 * len(self._files) + 64
        self._files[found._cdata] = StorageWeakRef(found)  # type: ignore[no-untyped-call]
        return found  # type: ignore[no-any-return]

    def drop(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage lies in a file already; its pages leave the memory again."""
        known = self._files.get(storage._cdata)
        mine = known is not None and not known.expired()  # type: ignore[no-untyped-call]
        if mine:
            _forget(storage)
        return mine

    def drop_all(self, tensors: Iterable[Tensor]) -> None:
        """The same for tensors of any kind."""
        for tensor in _dense(list(tensors)):
            self.drop(tensor.untyped_storage())


class SpilledStrand:
    """Watches the tensors that one forward makes, and moves those alive into files when it parks."""

    def __init__(self, spiller: Spiller, inputs: Iterable[Tensor] = ()) -> None:
        self._spiller = spiller
        self._inputs = list(inputs)
        self._made: list[weakref.ref[Tensor]] = []
        self._own: set[int] = set()
        self._foreign: set[int] = set()

    def watch(self, result: Any, given: Any) -> None:
        """Take note of what an operation made of what; buffers and the like, which it only hands on, stay in memory."""
        self._foreign.update({t.untyped_storage()._cdata for t in _dense(given)} - self._own)
        for tensor in _dense(result):
            key = tensor.untyped_storage()._cdata
            if type(tensor) is Tensor and key not in self._foreign:
                self._own.add(key)
                self._made.append(weakref.ref(tensor))

    def park(self) -> None:
        """Move what is alive, in memory and large; the forward has a copy of its inputs."""
        self._spiller.drop_all(self._inputs)
        self._inputs = []
        alive: dict[int, list[Tensor]] = {}
        kept: list[weakref.ref[Tensor]] = []
        for ref in self._made:
            tensor = ref()
            if tensor is not None:
                kept.append(ref)
                alive.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        self._made = kept
        for tensors in alive.values():
            storage = tensors[0].untyped_storage()
            if storage.nbytes() < LEAST or self._spiller.drop(storage):
                continue
            there = self._spiller.mapped(storage)
            with torch.no_grad():
                for tensor in tensors:
                    tensor.set_(there, tensor.storage_offset(), tensor.shape, tensor.stride())


def _forget(storage: torch.UntypedStorage) -> None:
    """Let the pages of a mapped file leave the memory."""
    _libc().madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _dense(value: Any) -> list[Tensor]:
    tensors = (t for t in tree_leaves(value) if isinstance(t, Tensor) and t.layout == torch.strided)
    return [t for t in tensors if t.device.type == "cpu" and torch._C._has_storage(t)]
