"""How far one tensor lies from another: four measures, each blind to something that another one sees.

All distances are in units of the RMS of the oracle's output, so that noise of several inputs can be pooled.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SLICE = 16
"""A channel or a sample needs so many numbers before its RMS says more than its largest one."""


@dataclass(frozen=True)
class Distance:
    """Distances of a tensor from the oracle, in units of RMS(oracle).

    ``rms`` is over everything, ``peak`` the largest element's, ``channel`` and ``sample`` the RMS of the
    worst slice along axis 1 and axis 0 (``rms`` again where slices are too small to say anything).
    """

    rms: float
    peak: float
    channel: float
    sample: float

    def worst(self, other: Distance) -> Distance:
        """The larger of both, measure by measure."""
        return Distance(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


NOTHING = Distance(0.0, 0.0, 0.0, 0.0)


def rms(tensor: Tensor) -> float:
    """Root of the mean square of a float64 tensor; 0 where it is empty."""
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0


def distance(oracle: Tensor, other: Tensor, scale: float) -> Distance:
    """How far ``other`` lies from ``oracle`` (same shape, finite, float64), in units of ``scale``."""
    error = (other - oracle) / scale
    overall = rms(error)
    return Distance(overall, float(error.abs().max()), _worst_slice(error, 1, overall), _worst_slice(error, 0, overall))


def peak_floor(oracle: Tensor, scale: float) -> float:
    """max|oracle| in units of ``scale``: what one rounding of the largest element is measured against."""
    return float(oracle.abs().max()) / scale


def _worst_slice(error: Tensor, axis: int, overall: float) -> float:
    if error.dim() <= axis or error.shape[axis] < 2 or error.numel() < SLICE * error.shape[axis]:
        return overall
    others = [d for d in range(error.dim()) if d != axis]
    return float(error.square().mean(dim=others).max().sqrt())


def required_tolerance(oracle: Tensor, other: Tensor) -> float:
    """The smallest r with |other − oracle| ≤ r·max|oracle| + r·|oracle| everywhere."""
    size = oracle.abs()
    allowed = size + size.max()
    error = (other - oracle).abs()
    return float((error / allowed.clamp_min(torch.finfo(torch.float64).tiny)).max())


def max_relative(oracle: Tensor, other: Tensor, scale: float) -> float:
    """Largest |other − oracle| / |oracle| over elements of at least 0.01 ``scale`` (0 where there are none)."""
    error, size = (other - oracle).abs(), oracle.abs()
    counted = size >= 0.01 * scale
    return float((error[counted] / size[counted]).max()) if bool(counted.any()) else 0.0


def cosine(oracle: Tensor, other: Tensor) -> float | None:
    """Cosine of the angle between both, seen as vectors; None where one is zero."""
    norms = float(oracle.norm() * other.norm())
    return float((oracle * other).sum()) / norms if norms > 0 else None


def top1_agreement(oracle: Tensor, other: Tensor) -> float | None:
    """Share of samples with the same largest score; None for tensors that are no (N, classes)."""
    if oracle.dim() != 2 or oracle.shape[1] < 2:
        return None
    return float((oracle.argmax(1) == other.argmax(1)).double().mean())


def worst_sample(oracle: Tensor, other: Tensor) -> int:
    """Index along axis 0 of the sample with the largest squared error."""
    if oracle.dim() == 0:
        return 0
    return int((other - oracle).reshape(oracle.shape[0], -1).square().sum(1).argmax())
