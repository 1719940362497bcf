"""The outcome as a reader gets it: statistics per call site, what stayed and why, what to do beside or instead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from bnfix.calibration.chunks import Chunk
from bnfix.calibration.engines import Outcome
from bnfix.calibration.ledger import Place
from bnfix.calibration.norms import Norm, Norms
from bnfix.calibration.reading import Reader
from bnfix.stats import Moments, kl
from bnfix.types import LayerStats

MEANS_APART, VARS_APART = 0.15, 0.1
"""Distance of call sites of one norm, in σ and as ½|ln v1/v2|, from which on one set of statistics fits none."""

CHANCE = 4
"""Standard errors of a difference that chance is granted: channels move together, and the pairs are many."""


def layers(outcome: Outcome, norms: Norms) -> tuple[LayerStats, ...]:
    """One entry a call site, in the order of the model."""
    sites = [(norms.by_key(key), call, outcome.sites[key, call]) for key, call in sorted(outcome.sites)]
    sites = [site for site in sites if float(site[2].n) > 0]
    if not sites:
        return ()
    raw = torch.cat([_raw(norm, moments, outcome).cpu() for norm, _, moments in sites], 1)
    rows = _rows(raw).tolist()
    found, start = [], 0
    for norm, call, _ in sites:
        end = start + norm.channels
        n, samples = map(int, raw[:2, start:end][:, :1].flatten().tolist() or (0, 0))  # of a norm without channels, 0
        found.append(LayerStats(norm.path, call, n, samples, *[tuple(row[start:end]) for row in rows], eps=norm.eps))
        start = end
    return tuple(found)


def _raw(norm: Norm, moments: Moments, outcome: Outcome) -> Tensor:
    """What :func:`_rows` needs of one site, float64, one column a channel: read from the device at once."""
    before = norm.mean.detach().double().flatten(), norm.var.detach().double().flatten()
    after = outcome.stats.get(norm.key)
    new = before if after is None else (after[0].double().flatten(), after[1].double().flatten())
    counts = (moments.n.expand_as(moments.mean), moments.units.expand_as(moments.mean))
    return torch.stack((*counts, moments.mean, moments.m2, *before, *new, *moments.gram))


def _rows(raw: Tensor) -> Tensor:
    """What :class:`~bnfix.types.LayerStats` says of each channel, for all sites together: many are small."""
    n, units, mean, m2, mean_before, var_before, mean_after, var_after, *gram = raw.unbind()
    moments = Moments(n, mean, m2, units, torch.stack(gram))
    var, (se_mean, se_var) = moments.variance(), moments.standard_errors()
    before, after = (mean_before, var_before), (mean_after, var_after)
    return torch.stack(
        (*before, mean, var, *after, se_mean, se_var, (mean - mean_before) / se_mean, kl(mean, var, *before))
    )


def left_alone(
    norms: Norms, outcome: Outcome, reached: set[int], *, masked: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...], Mapping[str, str]]:
    """Norms that keep their statistics: frozen ones, never called ones, and all others with the reason.

    ``masked``: a mask was given.
    """
    frozen, never, why = [], [], {}
    met = {key for key, _ in outcome.sites}
    for norm in norms:
        name = norm.path or "(root)"
        if norm.key in outcome.stats:
            continue
        if norm.frozen:
            frozen.append(name)
        elif norm.why:
            why[name] = norm.why
        elif norm.key in met:
            most = max(float(m.n.max()) for (key, _), m in outcome.sites.items() if key == norm.key)
            nothing = "the mask leaves no position" if masked else "its input never holds a value"
            why[name] = "one value a channel: that leaves no variance" if most else nothing
        elif id(norm.mean) in reached:
            itself = (
                f"{type(norm.module).__name__} normalises by itself, not through batch_norm: bnfix can't see its input"
            )
            elsewhere = "is called where bnfix can't see it (a thread of the model's own, torch functions disabled)"
            why[name] = elsewhere if type(norm.module).forward.__module__.startswith("torch.") else itself
        elif norms.odd:
            why[name] = "not called itself; batch_norm was called with statistics that may be copies of its own"
        else:
            never.append(name)
    for path in norms.without:
        why[path or "(root)"] = "keeps no running statistics: its output depends on the batch"
    for path in norms.instance:
        why[path or "(root)"] = (
            "an InstanceNorm averages statistics of single samples: it has no fixed point of this kind"
        )
    return tuple(frozen), tuple(never), why


@dataclass(frozen=True)
class Gist:
    """What was read, as far as advice hangs on it; ``ratio`` says how many times as much as by chance it differs."""

    samples: int
    batches: int
    largest: int
    pure: int
    labels: frozenset[int]
    counted: bool
    ratio: float | None
    used: str

    @classmethod
    def of(cls, outcome: Outcome, reader: Reader, chunks: Sequence[Chunk]) -> Gist:
        """By this rank."""
        samples = sum(c.samples for c in chunks) if chunks else reader.samples
        labels = frozenset(reader.labels)
        ratio = _sorted(outcome, chunks)
        return cls(samples, reader.batches, reader.largest, reader.pure, labels, reader.counted, ratio, reader.used)

    @classmethod
    def together(cls, said: Sequence[Gist]) -> Gist:
        """By all ranks."""
        return cls(
            sum(g.samples for g in said),
            sum(g.batches for g in said),
            max(g.largest for g in said),
            sum(g.pure for g in said),
            frozenset().union(*(g.labels for g in said)),
            all(g.counted for g in said),
            max((g.ratio for g in said if g.ratio is not None), default=None),
            next((g.used for g in said if g.used), ""),
        )


def advice(outcome: Outcome, norms: Norms, gist: Gist) -> tuple[str, ...]:
    """Where statistics are not the remedy, or not for long."""
    said = [*_apart(outcome.sites, norms)]
    if gist.samples == 1 and gist.counted:
        said.append("statistics of ONE sample: they fit that sample and no other; take hundreds")
    elif outcome.sites and all(not bool((m.variance() > 0).any()) for m in outcome.sites.values()):
        said.append("every variance is 0: all samples are alike and constant; is this the data?")
    if 1 <= gist.largest <= 4 and gist.batches > 1 and gist.counted:
        said.append(
            f"batches of {gist.largest}: if the model was trained with such small ones, better statistics do not "
            "heal it; norms with fewer than 33 values a channel and batch need another norm (GroupNorm)"
        )
    if outcome.uneven is not None:
        said.append(
            f"the batches differ more than chance would have it ({outcome.uneven:.1f} ×, shuffled data has about 1), "
            "and each was normalised by itself or by those before it: these statistics are NOT those of evaluation "
            "mode; shuffle the data, or let it fit:   spill_dir='DIR' or memory_budget="
        )
    if gist.batches >= 5 and gist.pure == gist.batches and len(gist.labels) > 1:
        harmless = "harmless here, but " if outcome.engine != "stream" else ""
        said.append(
            f"each batch holds one class: {harmless}a model trained on such batches learned from the batch "
            "itself, and statistics do not heal that: shuffle, and train anew"
        )
    elif gist.ratio is not None and gist.ratio > 3:
        said.append(
            f"the batches differ more than chance would have it ({gist.ratio:.1f} ×, shuffled data has about 1): "
            "sorted data is harmless here, but not for training"
        )
    return tuple(said)


def _apart(sites: Mapping[Place, Moments], norms: Norms) -> list[str]:
    by_norm: dict[int, list[Moments]] = {}
    for (key, _), moments in sorted(sites.items(), key=lambda item: item[0]):
        by_norm.setdefault(key, []).append(moments)
    said = []
    for key, calls in by_norm.items():
        gaps = [_gap(a, b) for a, b in combinations(calls[:8], 2)]
        if any(m > max(MEANS_APART, m0) or v > max(VARS_APART, v0) for (m, m0), (v, v0) in gaps):
            means, variances = (max(gap for gap, _ in each) for each in zip(*gaps, strict=True))
            said.append(
                f"{norms.by_key(key).path}: its {len(calls)} call sites differ (means by {means:.2g} σ, ½|ln var| by "
                f"{variances:.2g}): one set of statistics fits none of them; give each a norm of its own (unshare), "
                "then recalibrate"
            )
    return said


def _gap(a: Moments, b: Moments) -> tuple[tuple[float, float], tuple[float, float]]:
    """How far two call sites are apart in mean and variance, medians over channels; with each what chance may do."""
    va, vb = a.variance().clamp(min=1e-30), b.variance().clamp(min=1e-30)
    sigma = (0.5 * (va + vb)).sqrt()
    (ma, sa), (mb, sb) = a.standard_errors(), b.standard_errors()
    by_mean = (a.mean - b.mean).abs() / sigma, torch.hypot(ma, mb) / sigma
    by_var = 0.5 * (va / vb).log().abs(), 0.5 * torch.hypot(sa / va, sb / vb)
    (mean, mean_se), (var, var_se) = ([t.median().item() for t in pair] for pair in (by_mean, by_var))
    # Of one sample nothing is known (NaN): no distance is more than chance then.
    return (mean, _chance(mean_se)), (var, _chance(var_se))


def _chance(error: float) -> float:
    return math.inf if math.isnan(error) else CHANCE * error


def _sorted(outcome: Outcome, chunks: Sequence[Chunk]) -> float | None:
    """F = N·Var_b(mean_b)/Var_i(s_i) of the first norm, median over channels; None below 20 batches."""
    if outcome.first is None:
        return None
    origin = torch.tensor([o for c in chunks for o in c.origin], device="cpu")
    means = outcome.first
    count = int(origin.max()) + 1 if len(origin) else 0
    if count < 20 or len(origin) != len(means) or len(origin) < 2 * count:
        return None
    index = origin.to(means.device)
    sizes = torch.zeros(count, dtype=torch.float64, device=means.device).index_add(
        0, index, torch.ones_like(means[:, 0])
    )
    of_batch = torch.zeros(count, means.shape[1], dtype=torch.float64, device=means.device).index_add(0, index, means)
    of_batch = of_batch / sizes.unsqueeze(1)
    spread = means.var(0)
    live = spread > 0
    if not bool(live.any()):
        return None
    ratio = (sizes.median() * of_batch.var(0)[live] / spread[live]).median().item()
    return ratio if math.isfinite(ratio) else None
