"""Old output beside new: joint moments in float64, and the affine that makes one into the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Init = Literal["moment", "ls", "copy", "fresh"]
DEAD = 1e-6
"""Variance of z below which a channel of the new norm has nothing to say. Where it lives, it is near 1."""

CONSTANT = 1e-24
"""Of the mean square: a variance below is what float64 makes of a constant."""


@dataclass(frozen=True, eq=False)
class Paired:
    """n, ȳ, z̄ and the mean products about them of pairs (y, z) by channel, float64, shape (C,); ``n`` is an int."""

    n: int
    y: Tensor
    z: Tensor
    var_y: Tensor
    var_z: Tensor
    cov: Tensor

    @classmethod
    def of(cls, y: Tensor, z: Tensor) -> Paired:
        """From values of shape (N, C, *positions)."""
        y, z = (v.double().transpose(0, 1).flatten(1) for v in (y, z))
        mean_y, mean_z = y.mean(1), z.mean(1)
        y, z = y - mean_y[:, None], z - mean_z[:, None]
        return cls(y.shape[1], mean_y, mean_z, (y * y).mean(1), (z * z).mean(1), (y * z).mean(1))

    def merge(self, other: Paired) -> Paired:
        """Both together (Chan, Golub & LeVeque 1983, for products of two variables)."""
        n = self.n + other.n
        a, b = self.n / n, other.n / n
        dy, dz = other.y - self.y, other.z - self.z
        return Paired(
            n,
            self.y + b * dy,
            self.z + b * dz,
            a * self.var_y + b * other.var_y + a * b * dy * dy,
            a * self.var_z + b * other.var_z + a * b * dz * dz,
            a * self.cov + b * other.cov + a * b * dy * dz,
        )

    def fit(self, init: Init) -> tuple[Tensor, Tensor]:
        """(γ', β') with γ'·z + β' near y, shape (C,).

        ``moment`` gives it the mean and variance of y: γ' = sign(cov)·√(var y / var z). ``ls`` is the least squares
        γ' = cov / var z, whose output has the variance ρ²·var y only: over many layers that shrinks.
        Both have β' = ȳ − γ'·z̄. A channel with var z < 1e-6 is the constant ȳ.
        """
        alive = self.var_z >= DEAD
        var_z = torch.where(alive, self.var_z, torch.ones_like(self.var_z))
        scale = self.cov / var_z if init == "ls" else self.cov.sign() * (self.var_y / var_z).sqrt()
        scale = torch.where(alive, scale, torch.zeros_like(scale))
        return scale, self.y - scale * self.z

    @property
    def r2(self) -> float:
        """Share of the variance of y, over all channels, that an affine of z explains: Σ cov²/var z / Σ var y.

        1 where y does not vary.
        """
        alive = (self.var_z >= DEAD) & (self.var_y > 0)
        explained = torch.where(alive, self.cov**2 / self.var_z.clamp(min=DEAD), torch.zeros_like(self.cov)).sum()
        total = self.var_y.sum()
        varies = total > CONSTANT * (self.y**2).sum()
        return float((explained / total).clamp(max=1.0)) if varies else 1.0


def grouped(y: Tensor, x: Tensor, groups: Sequence[int], eps: float) -> list[Paired]:
    """(y, z) for z the GroupNorm of ``x`` with each number of groups; one look at the values for all of them.

    ``y`` and ``x`` have the shape (N, C, *positions). With the moments m_x, v_x, m_y, v_y, c_xy of each sample and
    channel over its positions, a group has the mean μ = mean(m_x) and the variance v = mean(v_x + (m_x − μ)²) over its
    channels, z = (x − μ)/√(v + eps), and what pairs need are means over samples.
    """
    y, x = (v.double().flatten(2) if v.dim() > 2 else v.double()[:, :, None] for v in (y, x))
    n, channels, positions = x.shape
    m_x, m_y = x.mean(2), y.mean(2)
    x, y = x - m_x[:, :, None], y - m_y[:, :, None]
    v_x, v_y, c_xy = (x * x).mean(2), (y * y).mean(2), (x * y).mean(2)
    mean_y = m_y.mean(0)
    var_y = v_y.mean(0) + ((m_y - mean_y) ** 2).mean(0)
    found = []
    for number in groups:
        size = channels // number
        mu = m_x.view(n, number, size).mean(2).repeat_interleave(size, 1)
        var = (v_x + (m_x - mu) ** 2).view(n, number, size).mean(2).repeat_interleave(size, 1)
        scale = torch.rsqrt(var + eps)
        m_z = (m_x - mu) * scale
        mean_z = m_z.mean(0)
        var_z = (v_x * scale**2).mean(0) + ((m_z - mean_z) ** 2).mean(0)
        cov = (c_xy * scale).mean(0) + ((m_y - mean_y) * (m_z - mean_z)).mean(0)
        found.append(Paired(n * positions, mean_y, mean_z, var_y, var_z, cov))
    return found
