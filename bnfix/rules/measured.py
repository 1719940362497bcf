"""What rules on data share: which norms learn from batches, how far call sites are apart, figures for a reader."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from bnfix.types import DataEvidence, Drift, Evidence, NormState, SiteData, Skipped

if TYPE_CHECKING:
    from bnfix.types.evidence import Array

_TINY = 1e-30
ENOUGH_BATCHES = 10
"""Batches without which nothing is said about call sites."""
SEVERE = (0.5, 6.0)
"""From where on BN204 calls a change of the outputs an error: so much of their spread, and so many times chance."""
_PAIRS = 8
"""Call sites of one norm that are compared with each other: a recurrent cell has dozens."""


def by_path(evidence: Evidence) -> dict[str, NormState]:
    """The norms by each of their names."""
    return {path: norm for norm in evidence.norms or () for path in norm.paths}


def learns(norm: NormState | None) -> bool:
    """Whether a norm works on the statistics of its batch when the model trains; one that is only a call does."""
    if norm is None:
        return True
    frozen = norm.frozen_class or (bool(norm.root_training) and not norm.training)
    return not frozen and not norm.instance


def is_fresh(norm: NormState) -> bool:
    """Whether a norm is as it was made: statistics 0 and 1, and no sign of training in its scale and shift.

    Scales of 0 (at the end of residuals) and drawn from N(1, .02) are initial ones as well.
    """
    if norm.mean is None or norm.var is None or bool((norm.mean != 0).any()) or bool((norm.var != 1).any()):
        return False
    weight, bias = norm.weight, norm.bias
    drawn = weight is None or not bool((weight != 0).any()) or bool(abs(weight - 1).max() <= 0.12)
    return drawn and (bias is None or bool(abs(bias).max() <= 0.01))


def not_for_training(code: str) -> Skipped:
    """What a rule about batches says of data that nothing is trained on."""
    return Skipped(code, "batches are judged where they are trained on, and this is no training data", 'role="train"')


def batch_values(data: DataEvidence, site: SiteData) -> int:
    """Values a channel and batch at a call site, in the loader's usual batch: not in its tail, nor in a part of it."""
    import numpy

    values = site.batch_n * numpy.array([data.sizes[n] / data.kept[n] for n in site.numbers])
    usual = values[:-1] if data.whole and len(values) > 1 and site.numbers[-1] == data.batches - 1 else values
    return round(float(numpy.median(usual)))


@dataclass(frozen=True)
class Apart:
    """How far the call sites of one norm are from one another.

    ``means`` is max over pairs of median_c |μi − μj|/σ with σ² = (vi + vj)/2, ``spreads`` that of ½|ln vi/vj|.
    ``between`` is the share of the variance over all call sites that lies between them: what running statistics that
    are averaged call by call never see. ``stored`` says where the norm's own variance stands: 1 at the mean of those
    within call sites, 0 at that over all; None where these two are the same, or nothing is stored.
    """

    path: str
    calls: int
    samples: int
    batches: int
    means: float
    spreads: float
    between: float
    stored: float | None


def apart(evidence: Evidence, data: DataEvidence) -> list[Apart]:
    """Every norm with several call sites, in the order in which they are met."""
    groups: dict[str, list[SiteData]] = {}
    for site in data.sites:
        groups.setdefault(site.path, []).append(site)
    norms = by_path(evidence)
    return [_apart(path, sites, norms.get(path)) for path, sites in groups.items() if len(sites) > 1]


def _apart(path: str, sites: Sequence[SiteData], norm: NormState | None) -> Apart:
    import numpy

    means = spreads = 0.0
    for a, b in combinations(sites[:_PAIRS], 2):
        va, vb = numpy.maximum(a.var, _TINY), numpy.maximum(b.var, _TINY)
        means = max(means, float(numpy.median(abs(a.mean - b.mean) / numpy.sqrt((va + vb) / 2))))
        spreads = max(spreads, float(numpy.median(abs(numpy.log(va / vb)) / 2)))
    weights = numpy.array([s.batch_n.sum() for s in sites])[:, None] / sum(s.batch_n.sum() for s in sites)
    within = (weights * numpy.array([s.var for s in sites])).sum(0)
    centre = (weights * numpy.array([s.mean for s in sites])).sum(0)
    total = within + (weights * (numpy.array([s.mean for s in sites]) - centre) ** 2).sum(0)
    share = 1 - within / numpy.maximum(total, _TINY)
    clear = share > 0.02
    stored = None
    if norm is not None and norm.var is not None and len(norm.var) == len(total) and bool(clear.any()):
        stored = float(numpy.median(((total - norm.var) / numpy.maximum(total - within, _TINY))[clear]))
    samples = round(min(s.batch_samples.sum() for s in sites))
    batches = min(len(s.numbers) for s in sites)
    return Apart(path, len(sites), samples, batches, means, spreads, float(numpy.median(share)), stored)


@dataclass(frozen=True)
class Limits:
    """From where on call sites differ, and so much that it is an error (see BN303)."""

    means: float = 0.3
    spreads: float = 0.5
    error: float = 0.5
    between: float = 0.05


def averaged(several: Sequence[Apart]) -> bool:
    """Whether norms have stored what separate calls leave: an average that misses what lies between them.

    Only the first norm still sees its inputs as they are; behind it, what it stored wrongly moves the others.
    """
    stale = next((a.stored for a in several if a.stored is not None), None)
    return stale is None or stale > 0.5


def differing(several: Sequence[Apart], limits: Limits) -> tuple[list[Apart], list[Apart]]:
    """Norms whose call sites differ by more than chance: so that it is an error, and the others."""
    known = [a for a in several if a.batches >= ENOUGH_BATCHES]
    off = []
    for a in known:
        chance = 4 * math.sqrt(2 / max(a.samples, 1))
        if a.means > max(limits.means, chance) or a.spreads > max(limits.spreads, chance):
            off.append(a)
    kept = averaged(several)
    severe = [a for a in off if kept and a.means > limits.error and a.between > limits.between]
    return severe, [a for a in off if a not in severe]


def exceeds(drift: Drift, large: float, over_null: float) -> bool:
    """Whether recalibration would change the outputs by more than ``large``, and than chance by that factor."""
    return drift.change is not None and drift.null is not None and drift.change > max(large, over_null * drift.null)


def moved_most(drift: Drift) -> list[str]:
    """The call sites whose statistics are visibly off, the worst first; the worst one in any case."""
    order = sorted(drift.layers, key=lambda name: -_size(drift.layers[name][2]))
    off = [n for n in order if abs(drift.layers[n][0]) > 0.1 or not 0.8 < drift.layers[n][1] < 1.25]
    return off or order[:1]


def undecided(code: str, drift: Drift, large: float) -> Iterator[Skipped]:
    """What is said of a change that is large, and no larger than what parts of the data differ by."""
    if drift.change is not None and drift.null is not None and drift.change > large:
        yield Skipped(
            code,
            f"recalibration changes {compared(drift)} by {drift.change:.2g} of the spread, and two halves of the data "
            f"differ by {drift.null:.2g}: sorted, or too little of it",
            "data in random order, or more of it",
        )


def compared(drift: Drift) -> str:
    """What a change is one of, for a reader."""
    return f"what {drift.where} sees" if drift.where else "the outputs"


def off_by(drift: Drift, name: str) -> str:
    """How far a call site is off, for a reader: ``mean off by 3.2 σ, variance × 41``."""
    shift, ratio, _ = drift.layers[name]
    return f"{name}: mean off by {shift if shift >= 0.005 else 0:.2g} σ, variance × {ratio:.2g}"


def paths_of(names: Iterable[str]) -> tuple[str, ...]:
    """Module paths of call sites, each once."""
    return tuple(dict.fromkeys(n.partition("@")[0] for n in names))


def median_of(values: Array) -> float:
    """The median as a number."""
    import numpy

    return float(numpy.median(values))


def _size(value: float) -> float:
    return value if value == value else float("inf")
