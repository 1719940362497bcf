"""A norm in evaluation mode is x·a + b per channel (Ioffe & Szegedy 2015, algorithm 2, step 11)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """``scale`` a and ``shift`` b, one per channel: float64, shape (C,)."""

    scale: Tensor
    shift: Tensor


def affine_of(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Affine:
    """a = γ/√(var + eps), b = β − μ·a, in float64.

    Args:
        running_mean: μ, shape (C,).
        running_var: var as stored (PyTorch stores the unbiased one and normalises with just that in eval mode).
        weight: γ, shape (C,), or None for 1.
        bias: β, shape (C,), or None for 0.
        eps: as given in the call, not as the module says.
    """
    mean, var = running_mean.detach().double(), running_var.detach().double()
    scale = torch.rsqrt(var + eps) if weight is None else weight.detach().double() / torch.sqrt(var + eps)
    shift = -mean * scale if bias is None else bias.detach().double() - mean * scale
    return Affine(scale, shift)
