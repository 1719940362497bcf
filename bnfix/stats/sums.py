"""Per-sample sums of the input of a norm: two cheap kernels a chunk, in the memory order that the input has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# All four measured on CPU, one thread, in units of values.
_BLOCK = 1 << 18
"""The squares of so many values stay in the cache until they are summed."""
_PRODUCT = 36
"""Up to so many contiguous positions, a product with ones sums faster than a reduction, which costs 3 ns a row."""
_SQUARES = 16
"""Up to so many, squares are written out and summed; above, a norm needs no memory for them."""
_RUN = 1024
"""A norm adds up one position after the other in float32: longer runs are cut, for accuracy."""


@dataclass(frozen=True, eq=False)
class SampleSums:
    """Per-sample sums of one input of a norm: raw material, cheap, the same bits for the same input.

    The dtype is float32, or float64 for float64 inputs; half precision is accumulated in float32. Squares beyond
    3e38 are inf here: ``pool`` computes such channels anew in float64.

    Attributes:
        s: sum over positions of x, shape (N, C).
        q: sum of squares, shape (N, C).
        n: values per sample; with a mask a float64 tensor of shape (N,).
        repeats: how many times all samples come one after the other in the rows of the input.
    """

    s: Tensor
    q: Tensor
    n: Tensor | int
    repeats: int = 1


def sample_sums(x: Tensor, samples: int | None = None, mask: Tensor | None = None, repeats: int = 1) -> SampleSums:
    """Sum and sum of squares of ``x`` for each sample and channel. Never waits for the device.

    Args:
        x: the input of a norm, shape (R, C, *positions), floating point, any strides.
        samples: number N of independent samples. Where it divides R, each R/N consecutive rows are one sample (as
            ``x.flatten(0, 1)`` of (N, T, C) makes them); else each row is one.
        repeats: how many times all samples come one after the other, as ``torch.cat((a, b))`` of two (N, C, …) makes
            them twice; 1 where the rows can't be cut so.
        mask: bool, True for positions that count; shape (R,) or (R, *positions), where axes may have size 1. What is
            masked may be anything, NaN included.

    Raises:
        ValueError: the mask does not fit ``x``.
    """
    x = x.detach()
    rows = x.shape[0]
    if not samples or rows % (samples * repeats):
        repeats = 1
    group = rows // samples // repeats if samples and rows and rows % samples == 0 else 1
    n: Tensor | int
    if mask is None:
        n = x.shape[2:].numel() * group * repeats
    else:
        seen = aligned(mask, x)
        x = x.masked_fill(~seen.unsqueeze(1), 0)
        n = together(seen.reshape(rows // group, -1).sum(1, dtype=torch.float64), repeats)
    s, q = row_sums(x, group)
    return SampleSums(together(s, repeats), together(q, repeats), n, repeats)


def together(rows: Tensor, repeats: int) -> Tensor:
    """The sum over repeats of what (repeats·N, …) rows hold."""
    return rows if repeats == 1 else rows.reshape(repeats, -1, *rows.shape[1:]).sum(0)


def aligned(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` expanded to (R, *positions) of ``x``, on its device.

    Raises:
        ValueError: it is not of dtype bool, or does not fit.
    """
    shape = (x.shape[0], *x.shape[2:])
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is of dtype bool, True for positions that count, not {mask.dtype}")
    full = mask.reshape(mask.shape + (1,) * (len(shape) - mask.dim()))
    if full.dim() != len(shape) or any(a not in (1, b) for a, b in zip(full.shape, shape, strict=True)):
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the norm's input wants {shape}")
    return full.to(x.device).expand(shape)


def row_sums(x: Tensor, group: int = 1) -> tuple[Tensor, Tensor]:
    """Sums and sums of squares, shape (R/group, C), of each ``group`` consecutive rows of (R, C, *positions).

    They never share memory with ``x``, which a model may write to later.
    """
    if x.is_cuda:
        kernel = _fused
    else:
        kernel = _channels_last
        if x.dtype != torch.float32 and x.dtype != torch.float64:
            x = x.float()
    rows, channels = x.shape[:2]
    if x.dim() == 2 or x.shape[2:].numel() == 1:
        return kernel(x.reshape(rows // group, group, channels), 1)
    if x.stride(1) == 1 and x.stride(-1) != 1:
        # A view in channels_last; flatten(2) would copy.
        last = x.movedim(1, -1).flatten(1, -2)
        return kernel(last if group == 1 else last.reshape(rows // group, -1, channels), 1)
    s, q = (_fused if x.is_cuda else _channels_first)(x.flatten(2), 2)
    if group == 1:
        return s, q
    return s.view(-1, group, channels).sum(1), q.view(-1, group, channels).sum(1)


def _fused(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """On CUDA: nothing of the size of ``x`` is written."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    q = torch.linalg.vector_norm(x, dim=dim, dtype=dtype)
    return x.sum(dim, dtype=dtype), q.mul_(q)


def _channels_first(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of (R, C, P), over P = ``dim`` 2."""
    rows, channels, positions = x.shape
    if 0 < positions <= _PRODUCT and x.is_contiguous() and _products_are_exact():
        ones = x.new_ones(positions)
        s = _row_products(x, ones)
        if positions <= _SQUARES:
            return s, _row_products(x * x, ones)
    else:
        s = x.sum(dim)
        if positions <= _SQUARES:
            return s, (x * x).sum(dim)
    pieces = _pieces(positions)
    q = torch.linalg.vector_norm(x if pieces == 1 else x.view(rows, channels, pieces, -1), dim=-1)
    q.mul_(q)
    return s, q if pieces == 1 else q.sum(2)


def _row_products(x: Tensor, ones: Tensor) -> Tensor:
    return torch.mv(x.view(-1, x.shape[2]), ones).view(x.shape[:2])


def _products_are_exact() -> bool:
    """Whether matrix products in float32 are computed in float32, not in bfloat16 or TF32 as a user may allow."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through torch.backends.*.fp32_precision
        return False


@lru_cache
def _pieces(positions: int) -> int:
    """The fewest equal parts of a row that are no longer than ``_RUN``; 1 if that makes them short."""
    least = -(-positions // _RUN)
    return next((k for k in range(least, 8 * least) if positions % k == 0), 1)


def _channels_last(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Of (N, P, C), over P = ``dim`` 1."""
    if x.shape[1] == 1:
        s = x[:, 0].clone(memory_format=torch.contiguous_format)
        return s, s * s
    if x.numel() <= 2 * _BLOCK:
        return x.sum(dim), (x * x).sum(dim)
    samples, positions, channels = x.shape
    step = max(1, _BLOCK // (positions * channels))
    squares, q = x.new_empty(step, positions, channels), x.new_empty(samples, channels)
    for i in range(0, samples, step):
        part = x[i : i + step]
        torch.sum(torch.mul(part, part, out=squares[: len(part)]), dim, out=q[i : i + step])
    return x.sum(dim), q
