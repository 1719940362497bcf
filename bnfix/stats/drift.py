"""How far stored statistics are from measured ones."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(mean1: Tensor, var1: Tensor, mean0: Tensor, var0: Tensor) -> Tensor:
    """KL(N(mean1, var1) ‖ N(mean0, var0)) in nats, float64, elementwise: the price of taking 0 for the true 1.

    ½(v1/v0 − 1 − ln(v1/v0) + (μ1 − μ0)²/v0). Inf where one of the variances is 0 and the other is not, or both are
    and the means differ; 0 where both are 0 and the means are the same; NaN for a negative or NaN variance or a NaN
    mean.
    """
    m1, v1, m0, v0 = (t.double() for t in (mean1, var1, mean0, var0))
    distance = m1 - m0
    excess = (v1 - v0) / v0  # ln(v1/v0) as log1p: near v1 = v0 the formula as written cancels
    value = (0.5 * (excess - torch.log1p(excess) + distance**2 / v0)).clamp(min=0)
    same = (v1 == v0) & (distance == 0)
    value = torch.where((v1 == 0) | (v0 == 0), torch.where(same, 0.0, torch.inf), value)
    return torch.where((v1 >= 0) & (v0 >= 0) & ~distance.isnan(), value, torch.nan)
