"""The functional gate of BN204: what recalibration would do to the outputs, held against what chance would.

With f the outputs with the statistics as stored and R those with the statistics of the data, e = rms(f − R)/std(R).
The null e0 is the same between the statistics of two disjoint halves of the data. Where what was read may be the
beginning of something sorted, it is the first and the second half: they differ as much as the beginning does from the
rest (measured on digits in order of class: e of .9 for a healthy net, and e0 of 1.2), and no drift is found then. Else
it is every other batch.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bnfix.calibration.chunks import Chunk, first_samples, halves, pieces, splittable
from bnfix.calibration.engines import Outcome, staged
from bnfix.calibration.ledger import Place
from bnfix.calibration.listening import Listener, Seen, Stats
from bnfix.calibration.planning import Plan, make_plan
from bnfix.calibration.session import Session
from bnfix.calibration.staged import MemoryFullError
from bnfix.calibration.summary import layers, left_alone
from bnfix.errors import BnfixError, CalibrationError, one_line
from bnfix.types import Drift

PROBES, PROBE = 4, 32
"""Pieces of the data on which outputs are compared, and samples of each."""
PASSES = 2.3
"""Passes over the samples after the first: two halves, the probes, and the measuring of call sites."""
FEWEST = 16
"""Samples without which nothing is said: statistics of eight against those of eight others."""


@dataclass
class Gauged:
    """The gate, and the statistics of the data (none where they could not be had)."""

    drift: Drift
    stats: dict[int, Stats] = field(default_factory=dict)


def gauge(session: Session, chunks: Sequence[Chunk], *, in_turn: bool) -> Gauged:
    """How far ``chunks`` would move the outputs. The session's data are just these; the model is left as it is.

    ``in_turn``: they stand for all of the data, so that every other one of them does as well.

    Where the statistics can't be had, or outputs can't be compared, the drift holds the reason: no error.
    """
    samples = sum(c.samples for c in chunks)
    if not session.norms.known:
        return Gauged(Drift(None, None, samples, reason="the model has no norm with running statistics"))
    try:
        plan = make_plan(session)
        start = time.monotonic()
        outcome = staged(session, plan.chunks, plan.scouted, plan.batches)
        left = PASSES * (time.monotonic() - start)
        if not outcome.stats:
            frozen, never, why = left_alone(
                session.norms, outcome, set(plan.scouted.reached) if plan.scouted else set()
            )
            kept = [*(f"{n}: {w}" for n, w in why.items()), *(f"{n} is frozen" for n in frozen)]
            said = [*kept, *(f"{n} is not called" for n in never), "no norm was reached"][0]
            return Gauged(Drift(None, None, samples, reason=f"nothing to recalibrate: {said}"))
        return Gauged(_drift(session, plan, outcome, samples, left, in_turn), outcome.stats)
    except MemoryFullError as error:
        return Gauged(Drift(None, None, samples, reason=f"no memory to recalibrate on the data: {error}"))
    except BnfixError as error:
        return Gauged(Drift(None, None, samples, reason=f"recalibration can't run here: {error.message}"))


def _drift(session: Session, plan: Plan, outcome: Outcome, samples: int, left: float, in_turn: bool) -> Drift:
    moved = {s.name: (s.mean_shift, s.var_ratio, s.worst_kl) for s in layers(outcome, session.norms)}
    probes = _probes(outcome.chunks, whole=not _joinable(plan, outcome))
    runs = [_run(session, probes, stats) for stats in ({}, outcome.stats)]
    two = _halves(plan, outcome, in_turn=in_turn)
    if two is not None and samples >= FEWEST:
        soon = f" (about {math.ceil(left)} s left)" if left > 1 else ""
        session.say(f"recalibrating on two halves of the data, to see what chance does{soon}")
        halved = [staged(session, half, None, quiet=True).stats for half in two]
        runs += [_run(session, probes, stats) for stats in halved]
    change = distance(runs[0].outputs, runs[1].outputs, probes)
    seen, where = [r.outputs for r in runs], ""
    if change is None:  # boxes that are kept, classes, sums: at the last norm that sees the same rows then
        place = _common([r.features for r in runs])
        if place is None:
            why = "the model returns nothing that can be compared sample by sample, nor does a norm see such"
            return Drift(None, None, samples, moved, why)
        seen = [[f[place] for f in r.features] for r in runs]
        where = session.norms.by_key(place[0]).path or "(root)"
        change = distance(seen[0], seen[1], probes, any_rows=True)
    if len(runs) < 4:
        return Drift(change, None, samples, moved, f"{samples} samples are too few to know what chance does", where)
    return Drift(change, distance(seen[2], seen[3], probes, any_rows=bool(where)), samples, moved, where=where)


def _joinable(plan: Plan, outcome: Outcome) -> bool:
    """Whether samples can be put together and cut apart at will."""
    return outcome.chunks is plan.chunks and plan.chunks is not plan.batches


def _halves(plan: Plan, outcome: Outcome, *, in_turn: bool) -> list[list[Chunk]] | None:
    """Two halves of the samples: every other batch, or the first and the last ones.

    None for one batch that can't be cut.
    """
    joinable = _joinable(plan, outcome)
    one: list[Chunk] = []
    two = list(plan.batches)
    if in_turn and len(two) > 1:
        one, two = two[::2], two[1::2]
    left = 0 if one else sum(c.samples for c in two) // 2  # of the first half, still to come
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


def _probes(chunks: Sequence[Chunk], *, whole: bool) -> list[Chunk]:
    """A few pieces from all over the data; ``whole`` batches where the model may not take a part of one."""
    step = max(1, len(chunks) // PROBES)
    return [c if whole or not splittable(c) else first_samples(c, PROBE) for c in chunks[step // 2 :: step][:PROBES]]


@dataclass
class _Run:
    """What the probes give with some statistics: outputs, and at each call site the normalised input, (R, C).

    Features are means over positions, with the norm's own scale: on small nets e at the last norm is within some 30 %
    of e at the outputs.
    """

    outputs: list[Any]
    features: list[dict[Place, Tensor]]


def _run(session: Session, probes: Sequence[Chunk], stats: dict[int, Stats]) -> _Run:
    found = _Run([], [])
    for probe in probes:
        features: dict[Place, Tensor] = {}
        calls: dict[int, int] = defaultdict(int)

        def ask(seen: Seen, features: dict[Place, Tensor] = features, calls: dict[int, int] = calls) -> None:
            place = (seen.norm.key, calls[seen.norm.key])
            calls[seen.norm.key] += 1
            features[place] = _feature(seen)

        try:
            with session.using(stats), Listener(session.norms, ask):
                found.outputs.append(probe.call.run(session.model))
        except Exception as error:  # the user's own forward
            raise CalibrationError(f"{probe.where}: the forward failed: {one_line(error)}") from error
        found.features.append(features)
    return found


def _feature(seen: Seen) -> Tensor:
    norm, x = seen.norm, seen.x.detach()
    means = x.double().flatten(2).mean(2) if x.dim() > 2 else x.double()
    scale = (norm.var.double().flatten() + norm.eps).rsqrt()
    weight = getattr(norm.module, "weight", None)
    if isinstance(weight, Tensor) and weight.numel() == norm.channels:
        scale = scale * weight.detach().double().flatten()
    return (means - norm.mean.double().flatten()) * scale


def _common(runs: Sequence[Sequence[dict[Place, Tensor]]]) -> Place | None:
    """The last call site that has the same rows in all runs."""
    first = runs[0]
    for place in reversed(first[0]):
        alike = all(
            place in f and place in g and f[place].shape == g[place].shape and len(f[place]) > 1
            for run in runs
            for f, g in zip(first, run, strict=True)
        )
        if alike:
            return place
    return None


def distance(
    before: Sequence[Any], after: Sequence[Any], probes: Sequence[Chunk], *, any_rows: bool = False
) -> float | None:
    """rms(before − after)/std(after) over all probes: the worst of the floating outputs that have a row a sample.

    None where there are none. An output whose shape depends on the statistics (boxes that are kept) is passed over, as
    is one without any spread, and values that are not finite with the new statistics (masks).
    """
    kept = [_rows(a, b, 1 if any_rows else probe.samples) for a, b, probe in zip(before, after, probes, strict=True)]
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
