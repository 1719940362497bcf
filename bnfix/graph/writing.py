"""Values written into tensors that somebody else holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn


def put(tensor: Tensor, value: Tensor) -> None:
    """Write ``value`` into a tensor, also into one that was made in inference mode."""
    kind = tensor.is_inference()
    with torch.no_grad(), torch.inference_mode(kind) if kind != torch.is_inference_mode_enabled() else nullcontext():
        tensor.copy_(value)


class Saved(NamedTuple):
    """A tensor, the memory that it showed (an alias, for it may be resized or given another), and what was there."""

    tensor: Tensor
    alias: Tensor
    value: Tensor
    place: int

    @classmethod
    def of(cls, tensor: Tensor) -> Saved:
        """As it is now."""
        alias = tensor.detach()
        return cls(tensor, alias, alias.clone(), alias.data_ptr() if _has_place(alias) else 0)

    @property
    def changed(self) -> bool:
        """Whether it is another now."""
        return not (_in_place(self) and same_values(self.tensor, self.value))


def put_back(kept: Iterable[Saved]) -> None:
    """Make each tensor what it was, where it is another now; of several that can't be, the first error is raised."""
    failed: Exception | None = None
    for saved in kept:
        try:
            if not _in_place(saved):
                _show(saved.tensor, saved.alias)
            if not same_values(saved.tensor, saved.value):  # NaN compares unequal and is written again: the same bits
                put(saved.tensor, saved.value)
        except Exception as error:  # noqa: BLE001  # those behind it have to be put back nevertheless
            failed = failed or error
    if failed is not None:
        raise failed


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether shapes and values are the same; of sparse and nested tensors, those of their parts."""
    if a.layout is b.layout is torch.strided and not (a.is_nested or b.is_nested):
        return torch.equal(a, b)
    if a.shape != b.shape if not a.is_nested else not b.is_nested:
        return False
    parts, others = _parts(a), _parts(b)
    return len(parts) == len(others) and all(map(torch.equal, parts, others))


def _parts(t: Tensor) -> tuple[Tensor, ...]:
    if t.is_nested:
        return tuple(t.unbind())  # type: ignore[no-untyped-call]
    if t.layout is torch.sparse_coo:
        return t._indices(), t._values()
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return t.crow_indices(), t.col_indices(), t.values()
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return t.ccol_indices(), t.row_indices(), t.values()
    return (t,) if t.layout is torch.strided else (t.to_dense(),)


def _in_place(saved: Saved) -> bool:
    """Whether the tensor shows the memory that it showed, in the same shape."""
    tensor, alias = saved.tensor, saved.alias
    if not _has_place(tensor):
        return True
    # A storage that was resized is at another place.
    same = tensor.shape == alias.shape and tensor.stride() == alias.stride()
    return same and tensor.data_ptr() == saved.place


def _has_place(tensor: Tensor) -> bool:
    """Whether it is a plain one with memory of its own: a subclass may stand for several, or for none."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested
    return plain and torch._C._has_storage(tensor)


def _extent(t: Tensor) -> int:
    """Bytes of its storage up to its last value."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return int(t.storage_offset() + last + 1) * t.element_size() if t.numel() else 0


def _show(tensor: Tensor, alias: Tensor) -> None:
    memory = alias.untyped_storage()
    if memory.nbytes() < _extent(alias):
        memory.resize_(_extent(alias))
    # Not by a context manager of our own for both: Ctrl-C as it is left keeps its generator, and with it the mode.
    kind = tensor.is_inference()
    with torch.no_grad(), torch.inference_mode(kind) if kind != torch.is_inference_mode_enabled() else nullcontext():
        tensor.data = alias.data


def surely(restore: Callable[[], None]) -> None:
    """Run ``restore``, which may be run twice, to its end, also where an interrupt hits it; that is raised then.

    A second Ctrl-C comes while the first is dealt with; and a DataLoader whose worker was killed raises wherever its
    process happens to be.
    """
    try:
        restore()
    except BaseException:
        restore()
        raise
