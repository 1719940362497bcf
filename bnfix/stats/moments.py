"""Moments per channel in float64, merged exactly, with what standard errors need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 6  # of Moments.gram


@dataclass(frozen=True, eq=False)
class Spread:
    """n, mean and M2 = Σ(x − mean)² per channel, float64: shapes (), (C,) and (C,)."""

    n: Tensor
    mean: Tensor
    m2: Tensor

    def joined(self, other: Spread) -> Spread:
        """Both together (Chan, Golub & LeVeque 1983). Where one side has n = 0 the result is the other."""
        n = self.n + other.n
        share = other.n / n.clamp(min=1)
        d = other.mean - self.mean
        return Spread(n, self.mean + d * share, self.m2 + other.m2 + d * d * (self.n * share))

    def variance(self, unbiased: bool = True) -> Tensor:
        """M2/(n − 1), or M2/n; NaN where that is 0/0. Shape (C,)."""
        return self.m2 / (self.n - 1 if unbiased else self.n).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Moments(Spread):
    """n, mean and M2 = Σ(x − mean)² per channel, float64, and the sums that standard errors need.

    With s, q and n the sum, the sum of squares and the count of one sample, each sample has the residuals
    s̃ = s − mean·n and r = q − 2·mean·s + mean²·n − (M2/n_total)·n: what it adds to the error of the mean and of the
    variance. ``gram`` has their products summed over samples, taken about the mean and variance held here, so that
    nothing cancels; ``merge`` moves them to the common ones.

    Attributes:
        n: values per channel, shape ().
        mean: shape (C,).
        m2: shape (C,).
        units: number of samples with at least one value, shape ().
        gram: Σrr, Σrs̃, Σrn, Σs̃s̃, Σs̃n, Σnn, shape (6, C).
        sure: known, without another wait for the device, to be of several values, finite and no larger than float32.
    """

    units: Tensor
    gram: Tensor
    sure: bool = False

    def merge(self, other: Moments) -> Moments:
        """Both together, as :meth:`joined`, and what standard errors need; to the bit the other where one has n = 0."""
        both_n = torch.stack((self.n, other.n)).unsqueeze(1)
        mean_a, m2_a = torch.stack((self.mean, other.mean)), torch.stack((self.m2, other.m2))
        both = self.joined(other)
        e = both.mean - mean_a
        f = m2_a / both_n.clamp(min=1) - both.m2 / both.n.clamp(min=1) + e * e
        gram = _moved(torch.stack((self.gram, other.gram), 1), e, f).sum(1)
        return Moments(both.n, both.mean, both.m2, self.units + other.units, gram)

    def standard_errors(self) -> tuple[Tensor, Tensor]:
        """Of the mean and of the variance, in their units, shape (C,); NaN for fewer than two samples.

        The sample is the unit, as positions of one sample are not independent. Samples may have different counts, so
        these are the errors of ratios of sums (Cochran 1977, Sampling Techniques, §6.4), √(N/(N − 1)·Σs̃²)/n
        and the same of r; with equal counts they are sd(m_i)/√N and sd(ψ_i)/√N.
        """
        scale = torch.where(self.units > 1, self.units / (self.units - 1), torch.nan).sqrt() / self.n
        return self.gram[3].clamp(min=0).sqrt() * scale, self.gram[0].clamp(min=0).sqrt() * scale

    def packed(self) -> Tensor:
        """All of it as one float64 tensor of length 2 + 8·C, for ``all_gather``."""
        return torch.cat((torch.stack((self.n, self.units)), self.mean, self.m2, self.gram.flatten()))

    @staticmethod
    def unpack(values: Tensor, channels: int) -> Moments:
        """What ``packed`` packed, to the bit.

        Raises:
            ValueError: the length is not that of ``channels`` channels.
        """
        if values.shape != (2 + (2 + _ROWS) * channels,):
            raise ValueError(f"{tuple(values.shape)} is not the shape of packed moments of {channels} channels")
        table = values[2:].view(2 + _ROWS, channels)
        return Moments(values[0], table[0], table[1], values[1], table[2:])

    @staticmethod
    def empty(channels: int, device: torch.device | str) -> Moments:
        """Of nothing: n = 0."""
        return Moments.unpack(torch.zeros(2 + (2 + _ROWS) * channels, dtype=torch.float64, device=device), channels)


def _moved(gram: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """``gram`` (6, ...) about another mean and variance: s̃ becomes s̃ − e·n, and r becomes r − 2e·s̃ + f·n."""
    rr, rs, rn, ss, sn, nn = gram
    ess, esn, enn, fsn, fnn = e * ss, e * sn, e * nn, f * sn, f * nn
    moved_sn = sn - enn
    moved_rn = rn + fnn - 2 * esn
    moved_rs = rs + fsn - 2 * ess
    return torch.stack(
        (
            rr + f * (rn + moved_rn + 2 * esn) - 2 * e * (rs + moved_rs + fsn),
            moved_rs - e * moved_rn,
            moved_rn,
            ss - e * (sn + moved_sn),
            moved_sn,
            nn,
        )
    )


def merge_all(parts: Sequence[Moments]) -> Moments:
    """All together, merged from left to right: the same parts in the same order give the same bits.

    Raises:
        ValueError: there are none.
    """
    if not parts:
        raise ValueError("no moments to merge")
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    return merged
