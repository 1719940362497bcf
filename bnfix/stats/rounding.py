"""From float64 to the dtype that is stored: rounded once, and measured in units in the last place."""

from __future__ import annotations

import torch
from torch import Tensor


def round_once(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` (float64) correctly rounded to ``dtype``, to nearest, ties to even.

    torch converts float64 to float16 and bfloat16 by way of float32, which rounds twice. Rounding to
    odd on the way (Boldo & Melquiond 2008, 'Emulation of FMA and correctly rounded sums') makes the second rounding the
    only one that counts.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return value.to(dtype)
    single = value.float()
    even = single.view(torch.int32) & 1 == 0
    inexact = single.double() != value
    towards = torch.where(value > single.double(), torch.inf, -torch.inf).to(torch.float32)
    odd = torch.where(even & inexact & torch.isfinite(single), torch.nextafter(single, towards), single)
    return odd.to(dtype)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The unit in the last place of ``dtype`` at each ``value`` (float64); that of the subnormal numbers near zero."""
    info = torch.finfo(dtype)
    power = value.abs().double().clamp(min=info.smallest_normal).view(torch.int64) & 0x7FF0_0000_0000_0000
    return power.view(torch.float64) * info.eps  # the power of two below the value, its mantissa cleared
