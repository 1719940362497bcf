"""Call sites of a norm in a training loop: how far their data are apart. BN401 and BN303 read this, BN102 too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bnfix.rules.reading import site, some
from bnfix.types import LoopLog, LoopNorm, Severity, SitePair, Skipped, StepPattern

MEANS = 0.3
SPREADS = 0.5
ERROR = 0.5
"""As BN303 has them for data: below, what separate statistics leave out is under 2 % of the variance."""
BATCHES = 10
SAME_BATCH = 0.1
"""Scatter between sites over scatter between steps, at the first norm, below which they show one and the same batch
(measured: .75 to 1.2 for independent batches, .14 to .54 for two augmentations of one batch, below .05 for the closure
of LBFGS and for SAM at radii up to .5)."""


@dataclass(frozen=True)
class Apart:
    """Two call sites of a norm whose data differ beyond noise, and how bad that is. ``capped`` says why not worse."""

    norm: LoopNorm
    pattern: StepPattern
    pair: SitePair
    severity: Severity
    capped: str = ""


def beyond_noise(pair: SitePair, means: float = MEANS, spreads: float = SPREADS) -> tuple[bool, bool]:
    """Whether the means, and whether the variances, differ by more than the limits and by more than chance.

    Chance: 4√(2/(K·m)) for d and 4√(1/(K·m)) for l, with m independent values a channel in each of K batches; and
    4 standard errors by the scatter between batches, since values of one image are anything but independent.
    """
    if pair.batches < BATCHES:
        return False, False
    values = pair.batches * max(pair.values, 1)
    shifted = pair.shift > max(means, 4 * math.sqrt(2 / values), 4 * pair.shift_error)
    scaled = pair.ratio > max(spreads, 4 * math.sqrt(1 / values), 4 * pair.ratio_error)
    return shifted, scaled


def sites_apart(
    log: LoopLog, means: float = MEANS, spreads: float = SPREADS, error: float = ERROR
) -> tuple[Apart, ...]:
    """BN303 in a training loop: one entry for each norm whose call sites differ, the worst pair of them; worst first.

    Warning at d > ``means`` or l > ``spreads``, error at d > ``error``, both beyond noise, over ≥ 10 steps. Never more
    than information for a norm through which optimizers of others step (the discriminator of a GAN sees real and
    generated batches apart by recommended practice) and for one with a momentum teacher (BYOL, whose two augmentations
    are meant to differ).
    """
    found = [a for norm in log.norms if (a := _worst(log, norm, means, spreads, error)) is not None]
    return tuple(sorted(found, key=lambda a: -max(a.pair.shift, a.pair.ratio)))


def _worst(log: LoopLog, norm: LoopNorm, means: float, spreads: float, error: float) -> Apart | None:
    best: Apart | None = None
    capped = why_capped(log, norm)
    for pattern in norm.patterns:
        if not pattern.own or is_one_batch(log, pattern):
            continue
        for pair in pattern.pairs:
            shifted, scaled = beyond_noise(pair, means, spreads)
            if not (shifted or scaled):
                continue
            severity: Severity = "error" if shifted and pair.shift > error else "warning"
            found = Apart(norm, pattern, pair, "info" if capped else severity, capped)
            if best is None or max(pair.shift, pair.ratio) > max(best.pair.shift, best.pair.ratio):
                best = found
    return best


def is_one_batch(log: LoopLog, pattern: StepPattern) -> bool:
    """Whether the sites show the very same batch again: a closure that is called repeatedly, SAM's second look.

    Asked of the first norm that is called from these places: behind it, weights that moved in between (SAM) make one
    batch look like two.
    """
    places = [(s.line, s.turn) for s in pattern.sites]
    for norm in log.norms:
        for first in norm.patterns:
            if first.alike is not None and [(s.line, s.turn) for s in first.sites] == places:
                return first.alike < SAME_BATCH
    return False


def is_accumulation(pattern: StepPattern) -> bool:
    """Whether each forward has a backward pass of its own and comes from one and the same place."""
    return pattern.backwards == len(pattern.sites) and sum(s.turn == 0 for s in pattern.sites) == 1


def why_capped(log: LoopLog, norm: LoopNorm) -> str:
    """Why different data at the call sites of this norm are no fault; empty where they are one."""
    if norm.adversarial:
        return "separate batches are recommended practice for a discriminator"
    name = norm.path.rpartition(".")[2]
    twins = (n for n in log.norms if n.teacher and n.without_grad and n.channels == norm.channels)
    if any(n.path.rpartition(".")[2] == name for n in twins):
        return "it has a momentum teacher; views that differ are part of such a method"
    return ""


def several_updates(log: LoopLog, norm: LoopNorm) -> Iterator[StepPattern]:
    """Steps of its own optimizer in which a norm is updated several times on different batches, as a habit."""
    steps = sum(norm.per_step.values())
    if 2 * sum(n for k, n in norm.per_step.items() if k > 1) < steps:
        return
    for pattern in norm.patterns:
        if pattern.own and not is_one_batch(log, pattern) and not is_accumulation(pattern):
            yield pattern


def lines_of(pattern: StepPattern) -> str:
    """Where its call sites are, for a message."""
    lines = list(dict.fromkeys(str(s.line) for s in pattern.sites if s.line is not None))
    return f", from {'; '.join(lines[:3])}" if lines else ""


def in_one_forward(norm: LoopNorm) -> int:
    """How often one forward of the model calls a norm, where that is seen in several steps; else 1."""
    most = 1
    for pattern in norm.patterns:
        if pattern.steps > 1 and pattern.own:
            forwards = [s.forward for s in pattern.sites]
            most = max(most, *(forwards.count(f) for f in forwards))
    return most


def not_seen(code: str, log: LoopLog) -> Iterator[Skipped]:
    """Norms whose updates no hook could see: what this rule can't say anything about."""
    paths = tuple(site(n.path) for n in log.norms if n.unseen)
    if paths:
        what = f"{some(paths)}: updated in a compiled graph, where there are no hooks; counted, not looked at"
        everywhere = len(paths) == len(log.norms)
        yield Skipped(code, what, "a model that is not compiled", () if everywhere else paths)
