"""From the sums of all chunks of one call site to its moments, with the guard against cancellation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnfix.stats.moments import Moments
from bnfix.stats.sums import SampleSums, aligned, row_sums

# Σx² − n·mean² loses log10(mean²/var) digits of float32 sums; beyond this ratio channels are computed anew in float64.
# Measured: see tests/stats/test_stats_accuracy.py.
_CANCELLING = 16.0
# Below this variance float32 squares lose digits to underflow.
_TINY = 1e-30
# A float64 variance that is so small a part of the mean square about the shift is rounding: the channel is constant.
_CONSTANT = 1e-13


def pool(sums: Sequence[SampleSums], xs: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> Moments:
    """The moments of all chunks of one call site.

    Channels in which the variance would be lost to cancellation (mean² > 16·var), to overflow or to underflow in
    float32 are computed anew from ``xs``, in float64 about their mean. NaN and Inf in the inputs give NaN moments in
    their channels. Waits for the device once.

    Args:
        sums: what ``sample_sums`` returned, one a chunk.
        xs: the inputs it was given; only read where a channel must be computed anew.
        masks: the masks it was given.

    Raises:
        ValueError: there are no chunks, or not as many inputs as sums.
    """
    if not sums or len(sums) != len(xs):
        raise ValueError(f"{len(sums)} sums and {len(xs)} inputs")
    s, q = _joined([part.s for part in sums]), _joined([part.q for part in sums])
    n, counts = _counts(sums)
    found = _moments(s, q, n, counts)
    again = _doubtful(found, s.dtype)
    if not again.numel():
        return found
    shift = found.mean[again]
    shift = torch.where(shift.isfinite(), shift, 0)
    pairs = [
        _about(x, shift, again, part.s.shape[0], mask)
        for x, part, mask in zip(xs, sums, masks or [None] * len(xs), strict=True)
    ]
    exact = _moments(_joined([a for a, _ in pairs]), _joined([b for _, b in pairs]), n, counts)
    square = exact.m2 + exact.n * exact.mean**2
    m2 = torch.where(exact.m2 <= _CONSTANT * square, 0, exact.m2)
    return Moments(
        found.n,
        found.mean.index_copy(0, again, shift + exact.mean),
        found.m2.index_copy(0, again, m2),
        found.units,
        found.gram.index_copy(1, again, exact.gram),
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _counts(sums: Sequence[SampleSums]) -> tuple[int | Tensor, Tensor | None]:
    """Values per sample if all have the same number, else their mean, and then the number of each, shape (N, 1)."""
    first = sums[0].n
    if isinstance(first, int) and all(isinstance(p.n, int) and p.n == first for p in sums):
        return first, None
    like = sums[0].s
    each = torch.cat(
        [
            p.n if isinstance(p.n, Tensor) else torch.full(p.s.shape[:1], p.n, dtype=torch.float64, device=like.device)
            for p in sums
        ]
    )
    return each.mean() if len(each) else 0, each.unsqueeze(1)


def _moments(s: Tensor, q: Tensor, n: int | Tensor, counts: Tensor | None) -> Moments:
    """Of sums (N, C) over samples; the products for standard errors in the dtype of the sums, scaled by n and σ."""
    samples = s.shape[0]
    device = s.device
    if isinstance(n, int):
        total = torch.full((), samples * n, dtype=torch.float64, device=device)
        units = torch.full((), samples if n else 0, dtype=torch.float64, device=device)
    else:
        total, units = n * samples, (counts > 0).sum(dtype=torch.float64)  # type: ignore[operator, union-attr]
    some = total.clamp(min=1)
    mean = s.sum(0, dtype=torch.float64) / some
    square = q.sum(0, dtype=torch.float64) / some
    var = square - mean * mean
    inverse = torch.where(var > 1e-300, var.rsqrt(), 0)
    per = max(n, 1) if isinstance(n, int) else n.clamp(min=1e-9)
    ratio = (mean * inverse).to(s.dtype)
    level = (square * inverse * inverse).to(s.dtype)
    weight = None if counts is None else (counts / per).to(s.dtype)
    if weight is not None:
        ratio_n, level_n = weight * ratio, weight * level
    else:
        ratio_n, level_n = ratio, level
    scaled = torch.addcmul(-ratio_n, s, (inverse / per).to(s.dtype))
    rest = torch.addcmul(-level_n, q, (inverse * inverse / per).to(s.dtype)).addcmul_(scaled, ratio, value=-2)
    per2 = per * per
    sd = var.clamp(min=0).sqrt()
    if weight is None:
        zero = torch.zeros_like(var)
        rn, sn, nn = zero, zero, zero + samples * n * n
    else:
        rn = (rest * weight).sum(0).double() * (var * per2)
        sn = (scaled * weight).sum(0).double() * (sd * per2)
        nn = (counts * counts).sum().expand_as(var)  # type: ignore[operator]
    gram = torch.stack(
        (
            (rest * rest).sum(0).double() * (var * var * per2),
            (rest * scaled).sum(0).double() * (var * sd * per2),
            rn,
            (scaled * scaled).sum(0).double() * (var * per2),
            sn,
            nn,
        )
    )
    return Moments(total, mean, var.clamp(min=0) * total, units, gram)


def _doubtful(found: Moments, dtype: torch.dtype) -> Tensor:
    """Channels whose variance can't be trusted: their indices."""
    square = found.mean * found.mean
    var = found.m2 / found.n.clamp(min=1)
    sure = (square * (1 / _CANCELLING) <= var) & (var < torch.inf)
    if dtype == torch.float32:
        sure &= (var > _TINY) | (var == 0)
    return (~sure).nonzero().flatten()


def _about(x: Tensor, shift: Tensor, channels: Tensor, samples: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of x − shift and of its square for some channels, float64."""
    d = x.detach().index_select(1, channels).double()
    d -= shift.view(-1, *[1] * (x.dim() - 2))
    if mask is not None:
        d.masked_fill_(~aligned(mask, x).unsqueeze(1), 0)
    return row_sums(d, x.shape[0] // max(samples, 1) or 1)
