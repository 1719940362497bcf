"""What was measured at each call site, and the statistics that follow from it.

A norm whose contributions were all in before it was first used gets its exact statistics at once. One that was used
before (several call sites, a recurrent cell, chunks on different routes) is *iterated*: the whole is run again
with what was pooled, until that no longer moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnfix.calibration.listening import Stats
from bnfix.calibration.norms import Norm, Norms
from bnfix.calibration.settling import Settling
from bnfix.errors import CalibrationError
from bnfix.stats import Moments, round_once
from bnfix.types import Residual

Place = tuple[int, int]
_WIDE = (torch.float32, torch.float64)


@dataclass
class Ledger:
    """The state of one run over all chunks; ``given`` are the statistics that iterated norms use from the start.

    ``used`` are those that each norm used last, ``passed`` those that iterated ones used at earlier calls.
    """

    norms: Norms
    unbiased: bool = True
    given: dict[int, Stats] = field(default_factory=dict)
    used: dict[int, Stats] = field(default_factory=dict)
    passed: list[tuple[int, Stats]] = field(default_factory=list)
    pooled: dict[int, Moments] = field(default_factory=dict)
    sites: dict[Place, Moments] = field(default_factory=dict)
    iterated: set[int] = field(default_factory=set)

    def settle(self, norm: Norm, place: Place, moments: Moments) -> Stats | None:
        """Take the contributions at one call site; return what the norm normalises with from here on."""
        key = norm.key
        known = self.sites.get(place)
        self.sites[place] = moments if known is None else known.merge(moments)
        before = self.pooled.get(key)
        self.pooled[key] = moments if before is None else before.merge(moments)
        if key in self.given:
            return self.given[key]
        if before is not None:  # its own statistics at the calls before did not know of this one
            self.iterated.add(key)
            self.passed.append((key, self.used.get(key, (norm.mean, norm.var))))
        stats = stored(norm, self.pooled[key], self.unbiased)
        if stats is not None:
            self.used[key] = stats
        return stats

    def again(self, settling: Settling) -> Ledger:
        """A ledger for the next run, in which iterated norms use what ``settling`` makes of this one."""
        used = dict.fromkeys(key for key, _ in self.sites if key in self.iterated)  # in the order of their use
        found = {
            key: now
            for key in used
            if (now := stored(self.norms.by_key(key), self.pooled[key], self.unbiased)) is not None
        }
        moved = self.moved()
        return self.starting(settling.next(self.given, found, max(moved.mean, moved.var)))

    def repeated(self) -> Ledger:
        """A ledger for this run once more, in which iterated norms use from the start what they used in the end."""
        return self.starting({key: self.used[key] for key in sorted(self.iterated) if key in self.used})

    def starting(self, given: dict[int, Stats]) -> Ledger:
        """A ledger for a run in which iterated norms use ``given`` from the start, at all of their calls."""
        return Ledger(self.norms, self.unbiased, given, dict(given), iterated=self.iterated | given.keys())

    def moved(self) -> Residual:
        """How far what iterated norms used, at any of their calls, is from what was pooled over them in the end."""
        last = [(k, self.used[k]) for k in sorted(self.iterated) if k in self.used and k in self.pooled]
        return residual(
            (stats, stored(self.norms.by_key(k), self.pooled[k], self.unbiased)) for k, stats in (*self.passed, *last)
        )

    def final(self) -> dict[int, Stats]:
        """What each norm gets: what it was normalised with in the last run."""
        return {key: self.used[key] for key in sorted(self.used) if key in self.pooled}


def stored(norm: Norm, moments: Moments, unbiased: bool) -> Stats | None:
    """Mean and variance as the norm's buffers hold them, rounded once; None where one value leaves no variance.

    Raises:
        CalibrationError: they are not finite, or too large for the type of the buffers.
    """
    wide = norm.mean.dtype in _WIDE and norm.var.dtype in _WIDE
    if not (moments.sure and wide) and float(moments.n.max()) <= 1:
        return None
    mean, var = moments.mean, moments.variance(unbiased)
    wanted = norm.var.shape
    found = round_once(mean, norm.mean.dtype).reshape(norm.mean.shape), round_once(var, norm.var.dtype).reshape(wanted)
    if moments.sure and wide:
        return found
    if not bool(torch.isfinite(torch.stack((found[0].sum(), found[1].sum()))).all()):
        _refuse(norm, mean, var, found)
    return found


def _refuse(norm: Norm, mean: Tensor, var: Tensor, found: Stats) -> None:
    exact = torch.isfinite(mean) & torch.isfinite(var)
    if not bool(exact.all()):
        raise not_finite(norm)
    if not all(bool(torch.isfinite(f).all()) for f in found):
        kind = str(norm.var.dtype).removeprefix("torch.")
        raise CalibrationError(
            f"{norm.path}: a variance of {var.max().item():.3g} does not fit its {kind} buffers",
            hint="keep norms in float32:  for m in model.modules(): isinstance(m, nn.BatchNorm2d) and m.float()"
            if norm.var.dtype not in _WIDE
            else "the activations explode: look at the weights and the data, or compute in float64:  model.double()",
        )


def not_finite(norm: Norm) -> CalibrationError:
    """What to raise where the input of ``norm`` is not finite, though its batch is: batches are looked at first."""
    return CalibrationError(
        f"{norm.path}: its input holds NaN or Inf",
        hint="the batch is finite, so the model makes it: weights that are not finite, an overflow, a division by 0\n"
        "such weights:  [n for n, p in model.named_parameters() if not p.isfinite().all()]",
    )


def residual(pairs: Iterable[tuple[Stats, Stats | None]]) -> Residual:
    """The worst distance of (statistics in use, measured ones), as :class:`~bnfix.types.Residual` defines it."""
    worst_mean = worst_var = 0.0
    for (mean, var), measured in pairs:
        if measured is None:
            continue
        m0, v0 = mean.double().flatten(), var.double().flatten()
        m1, v1 = measured[0].double().flatten(), measured[1].double().flatten()
        flat = (v0 <= 1e-12) | (v0 <= (1e-6 * m0) ** 2)
        sigma = torch.where(flat, torch.ones_like(v0), v0).sqrt()
        worst_mean = max(worst_mean, ((m1 - m0).abs() / sigma).nan_to_num(torch.inf, torch.inf).max().item())
        change = torch.where(flat, (v1 - v0).abs(), (v1 / torch.where(flat, torch.ones_like(v0), v0) - 1).abs())
        worst_var = max(worst_var, change.nan_to_num(torch.inf, torch.inf).max().item())
    return Residual(worst_mean, worst_var)
