"""Per-sample sums of the input of a norm: two cheap kernels per chunk, in the memory order that the input has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Squares of this many values (2 MB) stay in the cache between the multiplication and the sum. Measured on CPU.
_BLOCK = 1 << 19
# Up to so many contiguous positions a product and a sum are faster than a norm. Measured on CPU.
_FEW_POSITIONS = 16


@dataclass(frozen=True, eq=False)
class SampleSums:
    """Per-sample sums of one input of a norm: raw material, cheap, and the same bits for the same input.

    The dtype is float32, or float64 for float64 inputs; half precision is accumulated in float32. Squares beyond
    3e38 are inf here; ``pool`` sees that and recomputes such channels in float64.

    Attributes:
        s: sum over positions of x, shape (N, C).
        q: sum of squares, shape (N, C).
        n: values per sample; with a mask a float64 tensor of shape (N,).
    """

    s: Tensor
    q: Tensor
    n: Tensor | int


def sample_sums(x: Tensor, samples: int | None = None, mask: Tensor | None = None) -> SampleSums:
    """Sum and sum of squares of ``x`` for each sample and channel. Never waits for the device.

    Args:
        x: the input of a norm, shape (R, C, *positions), floating point, any strides.
        samples: number N of independent samples. Where it divides R, each R/N consecutive rows are one sample (as
            ``x.flatten(0, 1)`` of (N, T, C) makes them); else each row is one.
        mask: bool, True for positions that count; shape (R,) or (R, *positions), where axes may have size 1. What is
            masked may be anything, NaN included.

    Raises:
        ValueError: the mask does not fit ``x``.
    """
    x = x.detach()
    rows = group_size(x.shape[0], samples)
    if mask is not None:
        seen = aligned(mask, x)
        x = x.masked_fill(~seen.unsqueeze(1), 0)
        count = seen.flatten(1).sum(1, dtype=torch.float64)
        n: Tensor | int = count if rows == 1 else count.view(-1, rows).sum(1)
    else:
        n = x[:, :1].numel() // max(x.shape[0], 1) * rows
    if x.dtype != torch.float32 and x.dtype != torch.float64:
        x = x.float()
    s, q = row_sums(x, rows)
    return SampleSums(s, q, n)


def group_size(rows: int, samples: int | None) -> int:
    """How many consecutive rows make one sample."""
    return rows // samples if samples and rows and rows % samples == 0 else 1


def aligned(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` expanded to (R, *positions) of ``x``."""
    shape = (x.shape[0], *x.shape[2:])
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is of dtype bool, True for positions that count, not {mask.dtype}")
    full = mask.reshape(mask.shape + (1,) * (len(shape) - mask.dim())).to(x.device)
    if full.dim() != len(shape) or any(a not in (1, b) for a, b in zip(full.shape, shape, strict=True)):
        raise ValueError(f"the mask has shape {tuple(mask.shape)}, the norm's input wants {shape}")
    return full.expand(shape)


def row_sums(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Sums and sums of squares, shape (R/rows, C), in the dtype of ``x``, of each ``rows`` consecutive rows."""
    if x.dim() == 2:
        return _channels_last(x.reshape(-1, rows, x.shape[1]))
    if x.stride(1) == 1 and x.stride(-1) != 1:
        last = x.movedim(1, -1).flatten(1, -2)
        return _channels_last(last if rows == 1 else last.reshape(-1, rows * last.shape[1], last.shape[2]))
    s, q = _channels_first(x.flatten(2))
    if rows == 1:
        return s, q
    return s.view(-1, rows, s.shape[1]).sum(1), q.view(-1, rows, q.shape[1]).sum(1)


def _channels_first(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of (R, C, P), over P."""
    if x.shape[2] <= _FEW_POSITIONS:
        return x.sum(2), (x * x).sum(2)
    q = torch.linalg.vector_norm(x, dim=2)
    return x.sum(2), q.mul_(q)


def _channels_last(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of (N, P, C), over P. The results never share memory with ``x``, which the model may write to later."""
    if x.shape[1] == 1:
        s = x[:, 0].clone(memory_format=torch.contiguous_format)
        return s, s * s
    if x.numel() <= _BLOCK or x.is_cuda:
        return x.sum(1), (x * x).sum(1)
    step = max(1, _BLOCK * x.shape[0] // x.numel())
    return x.sum(1), torch.cat([(x[i : i + step] * x[i : i + step]).sum(1) for i in range(0, x.shape[0], step)])
