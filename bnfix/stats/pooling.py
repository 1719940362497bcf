"""From the sums of all chunks at one call site to its moments, with the guard against cancellation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bnfix.stats.moments import Moments, Spread
from bnfix.stats.sums import SampleSums, aligned, row_sums, together

_CANCELLING = 16.0
"""Σx²/n − mean² magnifies the rounding of float32 sums by 1 + mean²/var: beyond this ratio, no more of that. Measured:
with N samples the error of a variance stays below 1e-6, mostly 3e-7, up to a ratio of √N or this."""
_INSIDE = 0.99
"""What passes for a chunk with this share of the limits passes for several of them, whatever is rounded."""
_TINY = 1e-30
"""Below this variance float32 squares lose digits to underflow."""
_CONSTANT = 1e-13
"""A variance that is so small a part of the mean square is float64 rounding: the channel is constant."""
_BLOCK = 1 << 16
"""Values that are converted to float64 at a time (512 kB, for the cache); 512 times as many on a GPU."""


def pool(sums: Sequence[SampleSums], xs: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> Moments:
    """The moments of all chunks at one call site.

    Channels whose variance float32 sums would lose to cancellation, overflow or underflow are computed anew from
    ``xs``, in float64 about their mean. NaN or Inf in a channel give NaN moments there. Waits for the device once, or
    twice where channels are computed anew.

    Args:
        sums: what ``sample_sums`` returned, one a chunk; all of the same dtype.
        xs: the inputs it was given; only read where channels are computed anew.
        masks: the masks it was given.

    Raises:
        ValueError: there are no chunks, or not as many inputs as sums.
    """
    if not sums or len(sums) != len(xs):
        raise ValueError(f"{len(sums)} sums and {len(xs)} inputs")
    found, counts = _found(sums)
    again = _doubtful(found, sums)
    if again is None:
        return _named_sure(found, counts, sums)
    shift = found.mean[again].nan_to_num(0.0, 0.0, 0.0)
    about = [
        _about(x, shift, again, part, mask) for x, part, mask in zip(xs, sums, masks or [None] * len(xs), strict=True)
    ]
    exact = _moments(_joined([s for s, _ in about], [q for _, q in about]), counts)
    square = exact.m2 + exact.n * exact.mean**2
    return Moments(
        found.n,
        found.mean.index_copy(0, again, shift + exact.mean),
        found.m2.index_copy(0, again, torch.where(exact.m2 <= _CONSTANT * square, 0, exact.m2)),
        found.units,
        found.gram.index_copy(1, again, exact.gram),
    )


def at_once(sums: SampleSums, among: int) -> Spread | None:
    """Count, mean and M2 of one chunk ``among`` so many samples; None where its input is needed for any channel.

    As the inputs of several chunks that pass here are not needed either: mean² ≤ Σw·mean_k² ≤ ratio·Σw·var_k ≤
    ratio·var, with the weights w of the chunks k. Waits for the device once.
    """
    n, _ = _totals(sums.n if isinstance(sums.n, int) else sums.n.unsqueeze(1), len(sums.s), sums.s.device)
    mean, var, _ = _level(torch.stack((sums.s, sums.q)), n)
    room, tiny = _room(mean, var, max(among, len(sums.s)), sums.s.dtype, _INSIDE)
    inside = torch.equal(room.clamp(tiny / _INSIDE, 1e300 * _INSIDE), room)  # False for NaN
    return Spread(n, mean, var * n) if inside else None


def summed(sums: Sequence[SampleSums]) -> Moments:
    """The moments of chunks each of which passes :func:`at_once`, all of the same dtype."""
    return _named_sure(*_found(sums), sums)


def _found(sums: Sequence[SampleSums]) -> tuple[Moments, int | Tensor]:
    counts = _counts(sums)
    return _moments(_joined([part.s for part in sums], [part.q for part in sums]), counts), counts


def _named_sure(found: Moments, counts: int | Tensor, sums: Sequence[SampleSums]) -> Moments:
    several = isinstance(counts, int) and counts * sum(len(part.s) for part in sums) > 1
    return replace(found, sure=several and sums[0].s.dtype == torch.float32)


def _joined(s: list[Tensor], q: list[Tensor]) -> Tensor:
    """Both over all samples: shape (2, N, C)."""
    return torch.cat(s + q).view(2, -1, s[0].shape[1])


def _counts(sums: Sequence[SampleSums]) -> int | Tensor:
    """Values per sample if all have the same number, else of each: float64, shape (N, 1)."""
    first = sums[0].n
    if isinstance(first, int) and all(isinstance(part.n, int) and part.n == first for part in sums):
        return first
    each = [
        part.n
        if isinstance(part.n, Tensor)
        else torch.full(part.s.shape[:1], part.n, dtype=torch.float64, device=part.s.device)
        for part in sums
    ]
    return torch.cat(each).unsqueeze(1)


def _moments(both: Tensor, counts: int | Tensor) -> Moments:
    """Of sums and sums of squares (2, N, C). Residuals are taken in their dtype, in units of σ: nothing overflows."""
    samples, dtype = both.shape[1], both.dtype
    n, units = _totals(counts, samples, both.device)
    mean, var, square = _level(both, n)
    sd = var.sqrt()
    inverse = sd / var.clamp(min=1e-300)  # 0 for a variance of 0
    s, q = both.unbind()
    each = counts if isinstance(counts, int) else counts.to(dtype)
    ratio = (mean * inverse).to(dtype)
    level = (square * inverse * inverse).to(dtype)
    # s̃/σ = s/σ − n·mean/σ, and r/var = q/var − n·(mean² + var)/var − 2·(mean/σ)·(s̃/σ)
    scaled = torch.addcmul(ratio * -each, s, inverse.to(dtype))
    rest = torch.addcmul(level * -each, q, (inverse * inverse).to(dtype)).addcmul_(scaled, ratio, value=-2)
    if isinstance(counts, Tensor):
        rn, sn = (rest * each).sum(0) * var, (scaled * each).sum(0) * sd
        nn = (counts * counts).sum().expand_as(var)
    else:  # with equal counts Σr·n = n·Σr = 0, and Σs̃·n too
        rn = sn = torch.zeros_like(var)
        nn = torch.full_like(var, float(samples * counts * counts))
    gram = (
        (rest * rest).sum(0) * (var * var),
        (rest * scaled).sum(0) * (var * sd),
        rn,
        (scaled * scaled).sum(0) * var,
        sn,
        nn,
    )
    return Moments(n, mean, var * n, units, torch.stack(gram))


def _level(both: Tensor, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and mean square, of the sums over all samples of (2, N, C)."""
    mean, square = (both.sum(1, dtype=torch.float64) / n.clamp(min=1)).unbind()
    return mean, torch.addcmul(square, mean, mean, value=-1).clamp(min=0), square


def _totals(counts: int | Tensor, samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of values, and of samples that have any."""
    if isinstance(counts, Tensor):
        return counts.sum(), (counts > 0).sum(dtype=torch.float64)
    n, units = float(samples * counts), float(samples if counts else 0)
    return (
        torch.full((), n, dtype=torch.float64, device=device),
        torch.full((), units, dtype=torch.float64, device=device),
    )


def _doubtful(found: Moments, sums: Sequence[SampleSums]) -> Tensor | None:
    """The indices of channels whose variance can't be trusted; None if there are none."""
    var = found.m2 / found.n.clamp(min=1)
    room, tiny = _room(found.mean, var, sum(len(part.s) for part in sums), sums[0].s.dtype)
    if torch.equal(room.clamp(tiny, 1e300), room):  # False for NaN
        return None
    # A channel of zeros is what it is.
    sure = (room >= 0) & (room < torch.inf) & ((room > tiny) | (found.mean == 0) & (var == 0))
    indices = (~sure).nonzero().flatten()
    return indices if len(indices) else None


def _room(mean: Tensor, var: Tensor, samples: int, dtype: torch.dtype, share: float = 1.0) -> tuple[Tensor, float]:
    """How far the mean's square is below what the variance allows, times ``share``; and what that has to be above."""
    ratio = min(max(1.0, samples**0.5), _CANCELLING) * share
    return torch.addcmul(var * ratio, mean, mean, value=-1), _TINY if dtype == torch.float32 else 0.0


def _about(x: Tensor, shift: Tensor, channels: Tensor, of: SampleSums, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of x − shift and its square for some channels, float64, (N, len(channels)) each, as ``of`` has them."""
    blocks = len(of.s) * of.repeats
    group = len(x) // blocks if blocks else 1
    per_sample = group * len(channels) * x.shape[2:].numel()
    step = group * max(1, (_BLOCK << 9 if x.is_cuda else _BLOCK) // max(per_sample, 1))
    keep = None if mask is None else aligned(mask, x)
    offset = shift.view(-1, *[1] * (x.dim() - 2))
    parts = []
    for i in range(0, len(x), step):
        d = _chosen(x[i : i + step].detach(), channels).double().sub(offset)
        parts.append(row_sums(d if keep is None else d.masked_fill_(~keep[i : i + step].unsqueeze(1), 0), group))
    if not parts:
        return row_sums(_chosen(x.detach(), channels).double())
    s, q = torch.cat([s for s, _ in parts]), torch.cat([q for _, q in parts])
    return together(s, of.repeats), together(q, of.repeats)


def _chosen(x: Tensor, channels: Tensor) -> Tensor:
    """Some channels of ``x``, in its memory order: index_select(1) on channels_last takes fifteen times as long."""
    if len(channels) == x.shape[1]:
        return x
    if x.dim() > 2 and x.stride(1) == 1:
        return x.movedim(1, -1).index_select(-1, channels).movedim(-1, 1)
    return x.index_select(1, channels)
