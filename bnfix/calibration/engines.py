"""The staged method: threads where chunks keep apart, proven by a replay; plain passes where they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnfix.calibration.ambient import Ambient, Turn
from bnfix.calibration.chunks import Chunk
from bnfix.calibration.ledger import Ledger, Place
from bnfix.calibration.listening import Stats
from bnfix.calibration.plain import listen
from bnfix.calibration.scouting import Scouted
from bnfix.calibration.session import Session
from bnfix.calibration.spill import Spiller
from bnfix.calibration.staged import Run
from bnfix.calibration.strands import RerunStrand, Strand, StuckError, ThreadStrand
from bnfix.stats import Moments, SampleSums
from bnfix.types import Residual

APART = 1e-5
"""What a chunk may contribute otherwise alone than among others, in standard deviations. Clean models: exactly 0."""
SETTLED = 1e-6
"""Movement of iterated norms, in standard deviations, at which they count as settled."""
ROUNDS = 40
TAIL = 0.05
"""Share of a forward's time behind its last norm from which on it is worth ending the other chunks there."""


@dataclass
class Outcome:
    """Statistics for each norm, what was measured at each call site, and how it came about.

    ``outputs`` are those of the chunk that was replayed; ``first`` holds the mean of each sample at the first norm
    that the chunks met, (N, C) in their order.
    """

    stats: dict[int, Stats]
    sites: dict[Place, Moments]
    engine: str
    forwards: float = 1.0
    iterations: int = 1
    moved: Residual | None = None
    replay: float | None = None
    outputs: Any = None
    first: Tensor | None = None


def staged(session: Session, chunks: Sequence[Chunk], scouted: Scouted | None, *, quiet: bool = False) -> Outcome:
    """The fixed point of these chunks.

    Raises:
        CalibrationError: a forward fails, or the data is not finite.
        MemoryFullError: the chunks don't fit into memory together.
    """
    local = "one chunk" if len(chunks) == 1 else "threads"
    engine = "threads" if session.ranks.world > 1 else local
    try:
        found = _threads(session, chunks, scouted, engine, quiet)
    except StuckError:
        leak = "a chunk waited for another one (a lock held across a norm)"
    else:
        leak = _leak(session, chunks, found)
        if not leak:
            return found
    session.notes.append(f"{leak}: the norms were done one by one, in plain passes over the data")
    return _plain_passes(session, chunks, scouted, quiet)


def _threads(session: Session, chunks: Sequence[Chunk], scouted: Scouted | None, engine: str, quiet: bool) -> Outcome:
    ambient, turn = Ambient(session.device), Turn.now(session.device)
    spiller = Spiller(session.options.spill_dir) if session.options.spill_dir is not None else None
    contributed: dict[Place, SampleSums] = {}
    first: list[Tensor] = []

    def strands() -> Sequence[Strand]:
        one = len(chunks) == 1  # nobody to keep apart from: the model itself runs, not a replica
        return [
            ThreadStrand(
                chunk, session.model if one else session.replicate(), session.norms, ambient,
                Turn.seeded(turn, number, session.device), spiller.strand() if spiller else None,
            )
            for number, chunk in enumerate(chunks)
        ]  # fmt: skip

    def record(place: Place, here: Sequence[Strand]) -> None:
        if here[0].chunk is chunks[0] and here[0].sums is not None:
            contributed[place] = here[0].sums
        if not first:
            first.append(_means(here))

    found = _converged(session, strands, scouted, engine, record, quiet)
    found.first = first[0] if first else None
    if len(chunks) > 1 and session.options.certify is not None:
        session.say("replaying one chunk alone")
        Turn.seeded(turn, 0, session.device).put(session.device)
        with session.using(found.stats):
            alone, found.outputs = listen(session.model, chunks[0], session.norms)
        turn.put(session.device)
        found.replay = distance(alone, contributed)
        found.forwards += chunks[0].samples / sum(c.samples for c in chunks)
    return found


def _leak(session: Session, chunks: Sequence[Chunk], found: Outcome) -> str:
    """Why the outcome can't be trusted, on this rank or another; empty if it can."""
    mine = found.replay is not None and not found.replay <= APART
    ranks = session.ranks.numbers([int(mine)])
    if not any(r[0] for r in ranks):
        return ""
    far = f" (a chunk alone differs by {found.replay:.2g} σ)" if mine else " (on another rank)"
    return f"the forward keeps values where chunks that run in turns overwrite them{far}"


def _plain_passes(session: Session, chunks: Sequence[Chunk], scouted: Scouted | None, quiet: bool) -> Outcome:
    turn = Turn.now(session.device)
    made: list[RerunStrand] = []

    def strands() -> Sequence[Strand]:
        made[:] = [
            RerunStrand(chunk, session.model, session.norms, Turn.seeded(turn, number, session.device))
            for number, chunk in enumerate(chunks)
        ]
        return made

    found = _converged(session, strands, scouted, "plain passes", None, quiet)
    found.forwards = sum(s.forwards for s in made) / max(len(made), 1) * found.iterations
    return found


def _converged(
    session: Session,
    strands: Callable[[], Sequence[Strand]],
    scouted: Scouted | None,
    engine: str,
    watch: Callable[[Place, Sequence[Strand]], None] | None,
    quiet: bool,
) -> Outcome:
    """Runs until norms with several call sites no longer move; one run where there are none."""
    order = {place: i for i, place in enumerate(scouted.route)} if scouted else {}
    stop = scouted is not None and scouted.tail > TAIL
    ledger = Ledger(session.norms, session.options.unbiased)
    damping, best, rounds, last = 1.0, ledger, 0, Residual(float("inf"), float("inf"))
    while True:
        rounds += 1
        label = f"iteration {rounds}, " if rounds > 1 else ""
        say = None if quiet else (lambda line, label=label: session.say(f"{label}{line}"))
        Run(strands(), ledger, session.ranks, order=order, stop=stop, watch=watch, progress=say).through()
        if not ledger.iterated:
            return Outcome(ledger.final(), ledger.sites, engine)
        moved = ledger.moved()
        if _size(moved) < _size(last):
            best = ledger
        elif damping > 0.1:
            damping /= 2
        settled = _size(moved) <= SETTLED or (rounds > 8 and _size(last) <= 10 * SETTLED)
        last = min(last, moved, key=_size)
        if settled or rounds >= ROUNDS:
            return Outcome(best.final(), best.sites, engine, float(rounds), rounds, last)
        ledger = ledger.again(damping)


def _means(here: Sequence[Strand]) -> Tensor:
    found = [s.sums for s in here if s.sums is not None]
    n = [f.n if isinstance(f.n, int) else f.n.clamp(min=1).unsqueeze(1) for f in found]
    return torch.cat([f.s.double() / k for f, k in zip(found, n, strict=True)])


def _size(moved: Residual) -> float:
    return max(moved.mean, moved.var)


def distance(alone: dict[Place, SampleSums], among: dict[Place, SampleSums]) -> float:
    """The largest distance between what one chunk gives alone and gave among others, in standard deviations."""
    if alone.keys() != among.keys():
        return float("inf")
    worst = 0.0
    for place, a in alone.items():
        b = among[place]
        if torch.equal(a.s, b.s) and torch.equal(a.q, b.q):
            continue
        if a.s.shape != b.s.shape:
            return float("inf")
        n = a.n if isinstance(a.n, int) else a.n.clamp(min=1).unsqueeze(1)
        square = (a.q.double() / n).mean(0)
        var = (square - (a.s.double() / n).mean(0) ** 2).clamp(min=0)
        scale = torch.where(var > 1e-12, var, square.clamp(min=1e-30)).sqrt()
        mean = ((a.s.double() - b.s.double()).abs() / n / scale).max().item()
        power = ((a.q.double() - b.q.double()).abs() / n / scale**2).max().item()
        worst = max(worst, mean, power) if mean == mean and power == power else float("inf")
    return worst
