"""The staged method: in fibers or threads, proven by a replay; in plain passes where chunks do not keep apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from bnfix.calibration.ambient import Ambient, Turn
from bnfix.calibration.chunks import PROBED, Chunk, of_one_kind, splittable
from bnfix.calibration.fibers import FiberStrand, Guard, NoFootingError
from bnfix.calibration.footing import Way
from bnfix.calibration.ledger import Ledger, Place
from bnfix.calibration.listening import Stats
from bnfix.calibration.passes import mended
from bnfix.calibration.plain import listen
from bnfix.calibration.remembering import RESET
from bnfix.calibration.replaying import CLEAN, LEAKS, MIXED, ORDER, Witness, to_be_proven, witnesses
from bnfix.calibration.scouting import Scouted
from bnfix.calibration.session import Session
from bnfix.calibration.settling import Settling
from bnfix.calibration.staged import ElsewhereError, FailedError, MemoryFullError, Run, memory
from bnfix.calibration.starting import start
from bnfix.calibration.strands import ParkedStrand, RerunStrand, Strand, StuckError
from bnfix.calibration.threads import ThreadStrand
from bnfix.errors import BnfixError, CalibrationError
from bnfix.graph.writing import surely
from bnfix.running import kept_heap
from bnfix.stats import Moments
from bnfix.types import Residual

_FULL = LEAKS + 1
SETTLED = 1e-6
"""Movement of iterated norms, in standard deviations, at which they count as settled."""
ROUGH = 1e-2
"""The same in half precision, whose rounding alone moves statistics by some 1e-3."""
ROUNDS = 40
"""Times that iterated norms are tried, not counting those after which one more of them stands for good."""
SLACK, SPARE = 1.15, 3
"""Memory made ready: so many times what chunks hold at once, and so many of the largest blocks. What is free between
others is seldom of the size that is asked for."""
TAIL = 0.05
"""Share of a forward's time behind its last norm from which on it is worth ending the other chunks there."""


@dataclass
class Outcome:
    """Statistics for each norm, what was measured at each call site, and how it came about.

    ``chunks`` are the pieces it was made from, ``replayed`` what was run again, with its outputs; ``first`` holds the
    mean of each sample at the first norm that the chunks met, (N, C) in their order. Of a stream: ``halves`` are the
    statistics of every second batch and of the others, ``uneven`` says how many times as much the batches differ as
    chance would have it, where that is more than chance and matters.
    """

    stats: dict[int, Stats]
    sites: dict[Place, Moments]
    engine: str
    forwards: float = 1.0
    iterations: int = 1
    moved: Residual | None = None
    chunks: Sequence[Chunk] = ()
    replay: float | None = None
    replayed: list[tuple[Chunk, list[Tensor]]] = field(default_factory=list)
    first: Tensor | None = None
    halves: Sequence[dict[int, Stats]] = ()
    uneven: float | None = None


def staged(
    session: Session,
    chunks: Sequence[Chunk],
    scouted: Scouted | None,
    batches: Sequence[Chunk] = (),
    *,
    quiet: bool = False,
) -> Outcome:
    """The fixed point of these chunks; of the loader's ``batches``, should samples turn out not to stand alone.

    Raises:
        CalibrationError: a forward fails, or the data is not finite.
        MemoryFullError: the chunks don't fit into memory together.
    """
    kept = batches or chunks
    said = session.ranks.numbers([int(chunks is not kept), int(bool(session.remembers))])
    cut = any(n for n, _ in said)
    notes: list[str] = [] if quiet else session.notes
    if any(n for _, n in said):
        where = session.remembers or "something, on another rank"
        notes.append(
            f"what the forward computes depends on earlier calls (it changes {where}): these are the statistics of one "
            f"pass over the batches in this order, found in plain passes; {RESET}"
        )
        return in_plain_passes(session, kept, scouted, quiet)
    session.start = start(session, chunks, scouted, partial(_once, session))
    found, verdict, why = _tried(session, _laid_out(session, chunks, scouted), scouted, quiet, cut=cut)
    if verdict == ORDER:
        notes.append(f"{why} (channels_last): the loader's was kept")
        found, verdict, why = _tried(session, chunks, scouted, quiet, cut=cut)
    elif found is not None:
        found.chunks = chunks  # the residual is measured on them as the loader gave them
    if verdict == MIXED:
        notes.append(f"{why}: the loader's batches were kept as they are")
        found, verdict, why = _tried(session, kept, scouted, quiet, cut=False)
    if verdict == CLEAN and found is not None:
        return found
    notes.append(f"{why}: the norms were done one by one, in plain passes over the data")
    return in_plain_passes(session, kept, scouted, quiet)


def _laid_out(session: Session, chunks: Sequence[Chunk], scouted: Scouted | None) -> Sequence[Chunk]:
    """The chunks with images in the faster memory order, where the model was seen to take it and a proof follows."""
    if scouted is None or not scouted.laid_out or session.coarse or not to_be_proven(session, chunks):
        return chunks
    return [dataclasses.replace(c, laid_out=splittable(c) and c.samples > PROBED) for c in chunks]


def _tried(
    session: Session, chunks: Sequence[Chunk], scouted: Scouted | None, quiet: bool, *, cut: bool, fibers: bool = True
) -> tuple[Outcome | None, int, str]:
    """What parked forwards give, and whether that holds; ``cut`` says that the chunks are not the loader's batches.

    Raises:
        CalibrationError: the forward of one chunk fails alone as well, on this rank or another.
    """
    try:
        return _proven(session, chunks, scouted, quiet, cut, fibers)
    except MemoryFullError as full:
        if not cut:
            raise
        return None, MIXED, f"no memory for larger batches than the loader's ({full})"
    except StuckError as stuck:
        again = any(session.ranks.each(int(isinstance(stuck, NoFootingError))))
        verdict, why = LEAKS, "a chunk waited for another one (a lock held across a norm)"
        if isinstance(stuck, ElsewhereError):
            verdict, why = CLEAN, ""
        error: BnfixError | None = None
        if isinstance(stuck, FailedError):
            why = f"{stuck.told.message}, though not when it runs alone"
            if stuck.chunk.laid_out:
                verdict, why = ORDER, f"{stuck.told.message} in another memory order"
            if not _runs_alone(session, dataclasses.replace(stuck.chunk, laid_out=False)):
                verdict, why = MIXED, f"the model takes no other batches than the loader's ({stuck.told.message})"
                error = None if cut else stuck.told
    if again:  # threads can be left anywhere
        return _tried(session, chunks, scouted, quiet, cut=cut, fibers=False)
    try:
        session.ranks.agree(error)
    finally:
        error = None  # its traceback holds this frame, and with it all activations
    return None, max(session.ranks.each(verdict)), why or "on another rank"


def _runs_alone(session: Session, chunk: Chunk) -> bool:
    try:
        listen(session.model, chunk, session.norms)
    except (CalibrationError, MemoryError, RuntimeError):  # RuntimeError: only where there is no memory
        return False
    return True


def _proven(
    session: Session, chunks: Sequence[Chunk], scouted: Scouted | None, quiet: bool, cut: bool, fibers: bool
) -> tuple[Outcome, int, str]:
    turn = Turn.now(session.device)
    watched = witnesses(chunks, every=session.shares) if to_be_proven(session, chunks) else []
    found = _parked(session, chunks, scouted, turn, watched, quiet, fibers)
    found.chunks = chunks
    verdict, why = CLEAN, ""
    for number, witness in watched:
        session.say("replaying a part of one chunk alone")
        seeded = Turn.seeded(turn, number, session.device)
        try:
            with memory():
                verdict, why = witness.judge(session, found.stats, found.sites, seeded, cut=cut)
        except MemoryFullError as error:
            verdict, why = _FULL, str(error)
        turn.put(session.device)
        found.replay = max(witness.distance or 0.0, found.replay or 0.0)
        if witness.replayed is not None:
            found.replayed.append((witness.replayed, witness.outputs))
        found.forwards += witness.samples / sum(c.samples for c in chunks)
        if verdict != CLEAN:
            break
    worst = max(session.ranks.each(verdict))
    if worst == _FULL:
        raise MemoryFullError(why or "on another rank")
    return found, worst, why or "on another rank"


def _parked(
    session: Session,
    chunks: Sequence[Chunk],
    scouted: Scouted | None,
    turn: Turn,
    watched: Sequence[tuple[int, Witness]],
    quiet: bool,
    fibers: bool,
) -> Outcome:
    """What parked forwards give; what they left changed outside of the model is put back."""
    ways = scouted.ways if scouted is not None and fibers and Guard.possible() else None
    spiller = session.spiller
    first: list[Tensor] = []
    bounded = session.options.memory_budget is not None or spiller is not None
    stack = ExitStack()
    try:
        if scouted is not None and ways is not None and not bounded and session.device.type == "cpu":
            stack.enter_context(kept_heap(_room(scouted, chunks)))
        kind = _kind(stack, session, ways)

        def strands() -> Sequence[Strand]:
            one = len(chunks) == 1  # nobody to keep apart from: the model itself runs, not a replica
            return [
                kind(
                    chunk,
                    session.model if one else session.replicate(),
                    session.norms,
                    Turn.seeded(turn, number, session.device),
                    spiller.strand(chunk.call.tensors()) if spiller else None,
                    bounded=bounded,
                )
                for number, chunk in enumerate(chunks)
            ]

        def watch(place: Place, here: Sequence[Strand]) -> None:
            for _, witness in watched:
                witness.take(place, here)
            if not first:
                first.append(_means(here))

        engine = (
            "one chunk" if len(chunks) == 1 and session.ranks.world == 1 else "threads" if ways is None else "fibers"
        )
        session.outside.settle()
        stack.callback(session.outside.put_back)
        found = _converged(session, chunks, strands, scouted, engine, watch, quiet)
    finally:
        surely(stack.close)
    found.first = first[0] if first else None
    return found


def _room(scouted: Scouted, chunks: Sequence[Chunk]) -> int:
    """Bytes in which one chunk runs while the others are parked."""
    runs = max(c.samples for c in chunks)
    parked = sum(c.samples for c in chunks) - runs
    held = scouted.parked * parked + scouted.forward * runs
    return int(SLACK * held + SPARE * scouted.largest * runs)


def _kind(stack: ExitStack, session: Session, ways: frozenset[Way] | None) -> Callable[..., ParkedStrand]:
    """What makes strands, inside ``stack``: fibers where forwards can be left on these ways, else threads."""
    if ways is None:
        return partial(ThreadStrand, ambient=Ambient(session.device))
    guard = Guard()
    for _ in range(2):  # Ctrl-C may come as the first begins
        stack.callback(guard.end)
    guard.start()
    return partial(FiberStrand, guard=guard, ways=ways)


def _once(session: Session, chunks: Sequence[Chunk], make: Callable[[], nn.Module], scouted: Scouted) -> Ledger:
    """One run of ``chunks`` through modules of ``make``, each its own.

    Raises:
        CalibrationError, StuckError, MemoryFullError: as :meth:`Run.through`.
    """
    ledger, turn = Ledger(session.norms, session.options.unbiased), Turn.now(session.device)
    stack = ExitStack()
    try:
        kind = _kind(stack, session, scouted.ways if Guard.possible() else None)
        session.outside.settle()
        stack.callback(session.outside.put_back)
        strands = [
            kind(chunk, make(), session.norms, Turn.seeded(turn, number, session.device))
            for number, chunk in enumerate(chunks)
        ]
        order = {place: i for i, place in enumerate(scouted.route)}
        Run(strands, ledger, session.ranks, order=order, progress=session.say).through()
    finally:
        surely(stack.close)
    return ledger


def in_plain_passes(session: Session, chunks: Sequence[Chunk], scouted: Scouted | None, quiet: bool = False) -> Outcome:
    """What the model itself gives, run from end to end for each norm: slow, and nothing can come between.

    Raises:
        CalibrationError: a forward fails, or statistics do not settle.
        MemoryFullError: out of memory.
    """
    turn = Turn.now(session.device)
    made: list[RerunStrand] = []

    def strands() -> Sequence[Strand]:
        made[:] = [
            RerunStrand(
                chunk,
                session.model,
                session.norms,
                Turn.seeded(turn, number, session.device),
                session.using,
                None if number else session.rewind,
                passes_on=bool(session.remembers),
            )
            for number, chunk in enumerate(chunks)
        ]
        return made

    found = _converged(session, chunks, strands, scouted, "plain passes", None, quiet)
    found.chunks = chunks
    found.stats, found.sites, passes = mended(session, chunks, found.stats, found.moved)
    found.forwards = sum(s.forwards for s in made) / max(len(made), 1) * found.iterations + passes
    return found


def _converged(
    session: Session,
    chunks: Sequence[Chunk],
    strands: Callable[[], Sequence[Strand]],
    scouted: Scouted | None,
    engine: str,
    watch: Callable[[Place, Sequence[Strand]], None] | None,
    quiet: bool,
) -> Outcome:
    """Runs until norms with several call sites no longer move; one run where there are none."""
    order = {place: i for i, place in enumerate(scouted.route)} if scouted else {}
    limit = max(SETTLED, session.options.settled)
    stop = scouted is not None and scouted.tail > TAIL and not scouted.reads and of_one_kind(chunks)
    settling = Settling(lambda numbers: session.ranks.all_of(numbers)[0])
    rounds, stalled, last = 0, 0, Residual(float("inf"), float("inf"))
    ledger = best = Ledger(session.norms, session.options.unbiased).starting(session.start)

    def run() -> None:
        label = f"iteration {rounds}, " if rounds > 1 else ""
        say = None if quiet else (lambda line: session.say(f"{label}{line}"))
        Run(strands(), ledger, session.ranks, order=order, stop=stop, watch=watch, progress=say).through()

    while True:
        rounds += 1
        run()
        if not ledger.iterated:
            return Outcome(ledger.final(), ledger.sites, engine)
        moved = ledger.moved()
        stalled = 0 if _size(moved) < _size(last) else stalled + 1
        if not stalled:
            best, last = ledger, moved
        settled = _size(last) <= limit or (stalled >= 2 and _size(last) <= max(limit, 10 * SETTLED))
        settled = settled or (session.norms.half and stalled >= 4 and _size(last) <= ROUGH)
        if settled or rounds - settling.gained >= ROUNDS:
            break
        ledger = ledger.again(settling)
    if ledger is not best or (_size(last) > limit and not ledger.given):
        # What was watched is of the last run, so that has to be the one whose statistics count.
        rounds, ledger = rounds + 1, best.repeated()
        run()
        last = ledger.moved()
    passes = rounds + 2 * bool(session.start)  # one to collect calls, one to bring them through together
    return Outcome(ledger.final(), ledger.sites, engine, float(passes), rounds, last)


def _means(here: Sequence[Strand]) -> Tensor:
    found = [s.sums for s in here if s.sums is not None]
    n = [f.n if isinstance(f.n, int) else f.n.clamp(min=1).unsqueeze(1) for f in found]
    return torch.cat([f.s.double() / k for f, k in zip(found, n, strict=True)])


def _size(moved: Residual) -> float:
    return max(moved.mean, moved.var)
