"""The functional gate of BN204: what recalibration would do to the outputs, held against what chance would.

With f the outputs with the statistics as stored and R those with the statistics of the data, e = rms(f − R)/std(R).
The null e0 is the same between the statistics of the first and of the second half of the data, in the order in which
it was read: where the data is sorted, its halves differ, and a drift of that size says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bnfix.calibration.chunks import Chunk, first_samples, halves, pieces, splittable
from bnfix.calibration.engines import Outcome, staged
from bnfix.calibration.listening import Stats
from bnfix.calibration.plain import listen
from bnfix.calibration.planning import Plan, make_plan
from bnfix.calibration.session import Session
from bnfix.calibration.staged import MemoryFullError
from bnfix.calibration.summary import layers, left_alone
from bnfix.errors import BnfixError
from bnfix.types import Drift

PROBES, PROBE = 4, 32
"""Pieces of the data on which outputs are compared, and samples of each."""
FEWEST = 16
"""Samples without which nothing is said: statistics of eight against those of eight others."""


@dataclass
class Gauged:
    """The gate, and the statistics of the data (none where they could not be had)."""

    drift: Drift
    stats: dict[int, Stats] = field(default_factory=dict)


def gauge(session: Session, chunks: Sequence[Chunk]) -> Gauged:
    """How far ``chunks`` would move the outputs. The session's data are just these; the model is left as it is.

    Where the statistics can't be had, or outputs can't be compared, the drift holds the reason: no error.
    """
    samples = sum(c.samples for c in chunks)
    if not session.norms.known:
        return Gauged(Drift(None, None, samples, reason="the model has no norm with running statistics"))
    try:
        plan = make_plan(session)
        outcome = staged(session, plan.chunks, plan.scouted, plan.batches)
        if not outcome.stats:
            frozen, never, why = left_alone(
                session.norms, outcome, set(plan.scouted.reached) if plan.scouted else set()
            )
            left = [*(f"{n}: {w}" for n, w in why.items()), *(f"{n} is frozen" for n in frozen)]
            said = [*left, *(f"{n} is not called" for n in never), "no norm was reached"][0]
            return Gauged(Drift(None, None, samples, reason=f"nothing to recalibrate: {said}"))
        return Gauged(_drift(session, plan, outcome, samples), outcome.stats)
    except MemoryFullError as error:
        return Gauged(Drift(None, None, samples, reason=f"no memory to recalibrate on the data: {error}"))
    except BnfixError as error:
        return Gauged(Drift(None, None, samples, reason=f"recalibration can't run here: {error.message}"))


def _drift(session: Session, plan: Plan, outcome: Outcome, samples: int) -> Drift:
    moved = {s.name: (s.mean_shift, s.var_ratio, s.worst_kl) for s in layers(outcome, session.norms)}
    probes = _probes(outcome.chunks)
    before, after = _outputs(session, probes, {}), _outputs(session, probes, outcome.stats)
    change = distance(before, after, probes)
    if change is None:
        return Drift(None, None, samples, moved, "the model returns nothing that can be compared sample by sample")
    two = _halves(plan, outcome)
    if two is None or samples < FEWEST:
        return Drift(change, None, samples, moved, f"{samples} samples are too few to know what chance does")
    session.say("recalibrating on two halves of the data, to see what chance does")
    done = [staged(session, half, None, quiet=True).stats for half in two]
    null = distance(_outputs(session, probes, done[0]), _outputs(session, probes, done[1]), probes)
    return Drift(change, null, samples, moved)


def _halves(plan: Plan, outcome: Outcome) -> list[list[Chunk]] | None:
    """The first and the second half of the samples; None for one batch that can't be cut."""
    joinable = outcome.chunks is plan.chunks and plan.chunks is not plan.batches
    one: list[Chunk] = []
    two = list(plan.batches)
    left = sum(c.samples for c in two) // 2  # of the first half, still to come
    while left > 0 and two:
        head = two.pop(0)
        if head.samples > left and joinable and splittable(head):
            head, rest = halves(head, left)
            two.insert(0, rest)
        elif head.samples > 2 * left:  # nearer to the half without it
            two.insert(0, head)
            break
        one.append(head)
        left -= head.samples
    if not one or not two:
        return None
    return [pieces(half) for half in (one, two)] if joinable else [one, two]


def _probes(chunks: Sequence[Chunk]) -> list[Chunk]:
    """A few pieces from all over the data."""
    step = max(1, len(chunks) // PROBES)
    return [first_samples(c, PROBE) if splittable(c) else c for c in chunks[step // 2 :: step][:PROBES]]


def _outputs(session: Session, probes: Sequence[Chunk], stats: dict[int, Stats]) -> list[Any]:
    with session.using(stats):
        return [listen(session.model, probe, session.norms)[1] for probe in probes]


def distance(before: Sequence[Any], after: Sequence[Any], probes: Sequence[Chunk]) -> float | None:
    """rms(before − after)/std(after) over all probes: the worst of the floating outputs that have a row a sample.

    None where there are none. An output whose shape depends on the statistics (boxes that are kept) is passed over, as
    is one without any spread, and values that are not finite with the new statistics (masks).
    """
    kept = [_rows(a, b, probe.samples) for a, b, probe in zip(before, after, probes, strict=True)]
    if not kept or any(len(k) != len(kept[0]) for k in kept):
        return None
    worst: float | None = None
    for pairs in zip(*kept, strict=True):
        if any(p is None for p in pairs):
            continue
        a = torch.cat([p[0].double().flatten() for p in pairs if p is not None])
        b = torch.cat([p[1].double().flatten() for p in pairs if p is not None])
        usable = b.isfinite()
        a, b = a[usable], b[usable]
        spread = b.std(unbiased=False).item() if len(b) > 1 else 0.0
        if spread <= 1e-6 * max(b.abs().mean().item(), 1e-30) if len(b) else True:
            continue
        moved = (a - b).square().mean().sqrt().item()
        value = moved / spread if math.isfinite(moved) else math.inf
        worst = value if worst is None else max(worst, value)
    return worst


def _rows(before: Any, after: Any, samples: int) -> list[tuple[Tensor, Tensor] | None]:
    """Pairs of floating outputs; None for those that can't be compared."""
    pairs = list(zip(tree_leaves(before), tree_leaves(after), strict=False))
    both = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor) and b.is_floating_point()]
    return [
        (a.detach(), b.detach()) if a.shape == b.shape and b.dim() and b.shape[0] >= samples and b.numel() else None
        for a, b in both
    ]
