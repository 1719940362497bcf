"""From what was noted in some steps to sums over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bnfix.loop.samples import Forward, Record, Stands, fetched, moments
from bnfix.loop.sites import Pattern

if TYPE_CHECKING:
    from bnfix.loop.frames import Spot, WayIn
    from bnfix.loop.ranks import Ranks
    from bnfix.loop.sites import Moments
    from bnfix.loop.tally import Tally

_PATTERNS = 8
"""Kinds of steps that are kept of one norm."""

Spots = dict[int, tuple["Spot | None", "WayIn"]]


def measure(records: list[tuple[Tally, Record]], spots: Spots, ranks: Ranks) -> None:
    """Take in the measured steps that are over."""
    stands = fetched(f for _, record in records for f in record.forwards)
    with np.errstate(all="ignore"):  # a training that diverges is no fault of the arithmetic; moments() drops it
        _measure(records, stands, spots, ranks)


def _measure(records: list[tuple[Tally, Record]], stands: Stands, spots: Spots, ranks: Ranks) -> None:
    for tally, record in records:
        module = tally.module()
        if module is None:
            continue
        eps = float(module.eps)  # type: ignore[arg-type]
        reentrant = record.carried > 0  # its first forwards were without gradient, the backward pass repeated them
        live = [f for f in record.forwards if not f.abandoned]
        first = [f for f in live if f.grad or reentrant]
        gradless = [f for f in live if not (f.grad or reentrant)]
        lost = sum(f.abandoned for f in record.forwards)
        if first or lost:
            tally.looked += 1
        if lost:
            if tally.abandoned.first is None:
                tally.abandoned.base = tally.looked - 1
            tally.abandoned.add(record.window, lost)
            for f in record.forwards:
                spot = spots.get(f.place, (None, ()))[0]
                if f.abandoned and spot is not None and spot not in tally.abandoned.spots[:3]:
                    tally.abandoned.spots.append(spot)
        batches = [moments(f, stands, eps) for f in first]
        if first and batches[0] is not None and ranks.world > 1:
            ranks.note(tally, record.window, *batches[0])
        if len(first) > 1 and all(f.place for f in first):
            _add(tally, record, first, batches, eps)
        known = [b for b in batches if b is not None]
        others = [b for f in gradless if (b := moments(f, stands, eps)) is not None]
        if known and others:
            tally.gradless.add(known, others, min(f.values for f in [*first, *gradless]), eps)


def _add(tally: Tally, record: Record, first: list[Forward], batches: list[Moments | None], eps: float) -> None:
    calls = calls_of(first)
    key = (record.own, *((f.place, f.turn, c) for f, c in zip(first, calls, strict=True)))
    pattern = tally.patterns.get(key)
    if pattern is None:
        if len(tally.patterns) >= _PATTERNS:
            return
        pattern = tally.patterns[key] = Pattern(record.own)
        pattern.places = [(f.place, f.turn) for f in first]
        pattern.calls = calls
        pattern.values = [f.values for f in first]
        pattern.samples = [f.samples for f in first]
        pattern.groups = groups_of(first)
        pattern.backwards = pattern.groups[-1] + 1
    pattern.steps += 1
    complete = [b for b in batches if b is not None]
    if len(complete) == len(batches):
        pattern.values = [min(v, f.values) for v, f in zip(pattern.values, first, strict=True)]
        pattern.add(record.window, complete, eps)


def calls_of(forwards: list[Forward]) -> list[int]:
    """The forward of the whole model, counted from 0, that each is part of; one from outside is one of its own."""
    known: dict[int, int] = {}
    return [known.setdefault(f.call if f.inside else -1 - i, len(known)) for i, f in enumerate(forwards)]


def groups_of(forwards: list[Forward]) -> list[int]:
    """The backward pass, counted from 0, that each forward of a step belongs to: told by the probe's gradient."""
    groups, group = [], 0
    for i, forward in enumerate(forwards):
        if i and forward.mark is not None and forward.mark != forwards[i - 1].mark:
            group += 1
        groups.append(group)
    return groups
