"""Old output beside new: joint moments in float64, and the affine that makes one into the other."""

from __future__ import annotations

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
