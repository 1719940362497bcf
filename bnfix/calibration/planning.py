"""How it will be done: what fits into memory, which method, why; said before the work starts."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from bnfix.calibration.ambient import Turn
from bnfix.calibration.chunks import (
    LARGEST,
    LARGEST_IN_THREADS,
    LARGEST_ON_DEVICE,
    LEAST,
    MOST,
    PROBED,
    TARGET,
    Chunk,
    first_samples,
    joined,
    part,
    pieces,
    probed_at,
    splittable,
)
from bnfix.calibration.deciding import (
    ENDLESS,
    PLAIN_BATCHES,
    TOGETHER,
    Decision,
    Found,
    decide,
    expected,
    gigabytes,
    total_of,
)
from bnfix.calibration.fibers import Guard
from bnfix.calibration.memory_order import faster
from bnfix.calibration.plain import listen
from bnfix.calibration.reading import Reader, length
from bnfix.calibration.remembering import alike, look_for_memory
from bnfix.calibration.scouting import Scouted, mixed, scout
from bnfix.calibration.session import Session
from bnfix.calibration.streaming import rejoined
from bnfix.calibration.values import fingerprint
from bnfix.errors import CalibrationError
from bnfix.running import drawing, give_back, kept_random

READING = 256
"""Batches up to which they are kept as they are for nothing but that a forward looks at values."""
READS = "the way through the model may depend on what is in a batch"
SAID = 1.0
"""Seconds between two lines on how far the reading is."""
TOL = 0.01
"""Standard error at which a stream without an end is enough."""


ROWS = "the data is one tensor, and each of its rows was taken as a batch; batches of 64 samples:  data.split(64)"
"""The hint where a model does not take them."""


@dataclass
class Plan:
    """``chunks`` for the staged method (made of the loader's ``batches``), ``stream`` for the others, whose ``first``
    batch is kept to compare outputs on.

    ``scouted`` is None where this rank has no data.
    """

    method: str
    why: str
    reader: Reader
    scouted: Scouted | None
    chunks: Sequence[Chunk] = ()
    batches: Sequence[Chunk] = ()
    stream: Iterable[Chunk] = ()
    first: Chunk | None = None


def make_plan(session: Session) -> Plan:
    """Read as much of the data as the staged method can hold, and decide. All ranks decide alike.

    Raises:
        CalibrationError: there is no data, it is not usable, or a rank failed.
    """
    options, ranks = session.options, session.ranks
    reader = Reader(session.data, session.model, options.forward, options.mask, options.max_samples)
    scouted, held = _scouted(session, reader)
    mine, foretold = Found(), None
    if scouted is not None and options.method in ("auto", "staged"):
        budget, room = _room(session, scouted)
        foretold = _foretold(session, reader, scouted, budget, room)
        held, mine = _read(session, reader, scouted, held, budget, room)
    first = fingerprint(held[0].call.tensors()) if ranks.world > 1 and held else ""
    said = ranks.all_of((mine, scouted is not None, {n.key: n.why for n in session.norms if n.why}, first))
    if not any(has for _, has, _, _ in said):
        raise CalibrationError("the data holds no batch", hint="a generator that was used up gives nothing any more")
    for norm in session.norms:  # what one rank found out about a norm holds for all
        norm.why = norm.why or next((whys[norm.key] for _, _, whys, _ in said if norm.key in whys), "")
    session.notes += _repeated(session.data, [first for *_, first in said])
    return _decided(session, reader, scouted, held, mine, [found for found, has, _, _ in said if has], foretold)


def _repeated(data: Any, firsts: Sequence[str]) -> list[str]:
    """Where ranks go through the same samples, which then count several times."""
    said = []
    twins = [rank for rank, first in enumerate(firsts) if first and firsts.count(first) > 1]
    if twins:
        said.append(
            f"ranks {', '.join(map(str, twins))} begin with the same batch: each is to have a share of its own, else "
            "samples count several times, and standard errors are too small"
        )
    sampler = getattr(data, "sampler", None)
    if isinstance(sampler, DistributedSampler) and sampler.total_size > len(sampler.dataset):  # type: ignore[arg-type]
        more = sampler.total_size - len(sampler.dataset)  # type: ignore[arg-type]
        said.append(f"DistributedSampler gives {more} of the samples twice, for shares of one size: they count twice")
    return said


def _scouted(session: Session, reader: Reader) -> tuple[Scouted | None, list[Chunk]]:
    session.say("looking at the first samples")
    first = reader.next()
    session.advice = ROWS if isinstance(session.data, Tensor) else reader.advice
    if first is None:
        return None, []
    held = [first]
    if first.samples == 1 and splittable(first) and (second := reader.next()) is not None:
        held.append(second)
    lead = joined(held) or first
    start = probed_at(lead.samples) if splittable(lead) else None
    few = lead if start is None else part(lead, start, PROBED)
    ways: list[tuple[Chunk, Callable[[], nn.Module]]] = [(few, session.replicate), (few, lambda: session.model)]
    if few is not lead:
        ways.append((first, lambda: session.model))
    if splittable(few) and faster(session.device):
        ways.insert(0, (dataclasses.replace(few, laid_out=True), session.replicate))
    known = {name for name, _ in session.model.named_parameters()}
    for last, (chunk, make) in enumerate(ways, 1 - len(ways)):
        try:
            ran = make()
            with drawing() as drawn:
                found = scout(chunk, ran, session.norms)
        except CalibrationError:
            if not last:
                raise
            continue
        if built := _built(session, chunk, ran, known):
            raise CalibrationError(
                f"the forward builds a part of the model in its first call ({built}): it would be gone again",
                hint="run the model once on an example, then call bnfix",
            )
        chunk = found.chunk = few if chunk.laid_out else chunk
        look_for_memory(session, chunk, ran, None if start is None else _others(lead, start))
        if session.remembers:
            found.inseparable = found.inseparable or "the forward depends on earlier calls"
        if drawn and _depends_on_chance(session, chunk):
            _say_that_it_draws(session, found)
        if chunk is not few:
            found.inseparable = found.inseparable or "the model does not take a part of a batch"
        found.start = start
        return found, held
    raise AssertionError


def _built(session: Session, chunk: Chunk, ran: nn.Module, known: set[str]) -> str:
    """A parameter that the forward has made in its first call, to keep it: not one that is computed anew in each."""
    made = {name: p for name, p in ran.named_parameters() if name not in known}
    if not made:
        return ""
    try:
        listen(ran, chunk, session.norms)
    except CalibrationError:
        return next(iter(made))
    finally:
        session.rewind()
    return next((name for name, p in ran.named_parameters() if made.get(name) is p), "")


def _others(lead: Chunk, start: int) -> Chunk | None:
    """Samples of the first batch beside those from ``start`` on."""
    if lead.samples >= start + 2 * PROBED:
        return part(lead, start + PROBED, PROBED)
    return part(lead, 0, PROBED) if start >= PROBED else None


def _depends_on_chance(session: Session, chunk: Chunk) -> bool:
    """Whether norms see something else with other random numbers, and the same with the same.

    That generators moved is not enough: another thread may have drawn, or a draw may be of no consequence.
    """
    runs = []
    try:
        with kept_random():
            turn = Turn.now(session.device)
            for number in (0, 0, 1):
                Turn.seeded(turn, number, session.device).put_all(session.device)
                runs.append(listen(session.model, chunk, session.norms)[0])
    except CalibrationError:
        return False
    finally:
        session.rewind()
    return alike(runs[0], runs[1]) and not alike(runs[0], runs[2])


def _say_that_it_draws(session: Session, scouted: Scouted) -> None:
    session.draws = True
    scouted.inseparable = scouted.inseparable or "the forward draws random numbers"
    session.notes.append(
        "the forward draws random numbers in evaluation mode as well (dropout or noise that is always on?): statistics "
        "hold for one draw, and those of another differ by chance"
    )


def _room(session: Session, scouted: Scouted) -> tuple[int, int | None]:
    """The budget in bytes, and how many samples it holds; None: all."""
    options = session.options
    budget = session.budget
    if options.memory_budget is None and session.ranks.world > 1:  # shared with the ranks of this machine
        budget //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = max(1, int(budget / max(scouted.parked, 1.0))) if options.spill_dir is None else None
    if length(session.data) is None and options.max_samples is None and (room is None or room > ENDLESS):
        room = ENDLESS
    return budget, room


def _foretold(session: Session, reader: Reader, scouted: Scouted, budget: int, room: int | None) -> Decision | None:
    """What is going to be done, said before all the data is read, which takes its time."""
    found = expected(reader, session.data, session.options, budget, room)
    if found is None:
        most = "" if room is None else f", up to {room:,} ({gigabytes(budget)})"
        session.say(f"reading as many samples as there are{most}")
        return None
    batches = -(-found.samples // reader.largest)
    _keep_batches(scouted, batches)
    crowded = bool(scouted.inseparable) and batches > PLAIN_BATCHES
    fits = found.fits and not crowded
    _keep_batches(scouted, batches, fits)
    if not fits or session.coarse or batches > PLAIN_BATCHES:
        _look_closer(session, scouted)
    found = dataclasses.replace(found, fits=fits, crowded=crowded, inseparable=scouted.inseparable)
    decision = decide(session.options, [found], found.held, session.ranks.world)
    session.say(decision.line)
    return decision


def _read(
    session: Session, reader: Reader, scouted: Scouted, held: list[Chunk], budget: int, room: int | None
) -> tuple[list[Chunk], Found]:
    options = session.options
    said = time.monotonic()
    while room is None or reader.samples <= room:
        if len(held) == PLAIN_BATCHES:
            _look_closer(session, scouted)
        if len(held) > PLAIN_BATCHES and scouted.inseparable:
            break
        chunk = reader.next()
        if chunk is None:
            break
        held.append(_in_files(session, chunk))
        if time.monotonic() - said > SAID:
            said = time.monotonic()
            session.say(f"reading: {reader.samples:,} samples")
    _keep_batches(scouted, len(held))
    crowded = bool(scouted.inseparable) and len(held) > PLAIN_BATCHES
    fits = reader.ended and not crowded and (room is None or reader.samples <= room)
    session.reads = scouted.reads
    _keep_batches(scouted, len(held), fits)
    if scouted.reads and not scouted.inseparable and max(c.samples for c in held) < TARGET:
        session.notes.append(
            f"{READS}, and there are more than {READING} batches: they were joined, and that this makes no difference "
            "was seen on a part of them; to have them kept as they are, let the loader give larger ones"
        )
    if not fits or session.coarse:
        _look_closer(session, scouted)
    return held, Found(
        reader.samples,
        reader.samples if room is None else min(reader.samples, room),
        fits,
        scouted.inseparable,
        reader.largest,
        budget,
        total_of(reader, session.data, options),
        crowded,
        reader.cut,
    )


def _keep_batches(scouted: Scouted, batches: int, fits: bool = True) -> None:
    """Where they do not fit no proof follows that could show whether they may be joined."""
    if scouted.reads and (batches <= READING or not fits):
        scouted.inseparable = scouted.inseparable or READS


def _in_files(session: Session, chunk: Chunk, sources: Sequence[Chunk] = ()) -> Chunk:
    """The chunk with its inputs in files, if there is a folder for them; its ``sources`` leave the memory."""
    spiller = session.spiller
    if spiller is None:
        return chunk
    chunk = dataclasses.replace(chunk, call=chunk.call.map(spiller.kept))
    for source in sources:
        spiller.drop_all(source.call.tensors())
    give_back()  # blocks of many MB leave holes that the next ones don't fit into
    return chunk


def _look_closer(session: Session, scouted: Scouted) -> None:
    """Whether samples can be told apart, where no later proof will show it."""
    if not scouted.inseparable and not scouted.parted:
        scouted.inseparable = mixed(scouted.chunk, session.replicate, session.norms)
        scouted.parted = not scouted.inseparable


def _decided(
    session: Session,
    reader: Reader,
    scouted: Scouted | None,
    held: list[Chunk],
    mine: Found,
    said: Sequence[Found],
    foretold: Decision | None,
) -> Plan:
    fits = all(f.fits for f in said)
    kept = held if fits else _that_fit(held, mine.held)
    used = sum(c.samples for c in kept)
    decision = decide(session.options, said, used, session.ranks.world, mine if scouted is not None else Found())
    if foretold is None or not foretold.came_true(decision, reader.largest):
        session.say(decision.line)
    first = held[0] if held else None
    stream = itertools.chain(held, reader)
    method, why, apart = decision.method, decision.why, decision.apart
    if method == "staged":
        return Plan(method, why, reader, scouted, chunks=_chunks(session, kept, scouted, apart), batches=kept)
    if session.options.method == "auto" and not apart:
        return Plan(method, why, reader, scouted, stream=rejoined(stream, TOGETHER), first=first)
    return Plan(method, why, reader, scouted, stream=stream, first=first)


def _that_fit(held: list[Chunk], room: int) -> list[Chunk]:
    kept: list[Chunk] = []
    for chunk in held:
        if room <= 0:
            break
        part = first_samples(chunk, room) if splittable(chunk) else chunk
        if part.samples > room and kept:
            break
        kept.append(part)
        room -= part.samples
    return kept


def _chunks(session: Session, held: list[Chunk], scouted: Scouted | None, apart: str) -> Sequence[Chunk]:
    if scouted is None or apart or not held:
        return held
    total = sum(c.samples for c in held)
    room = session.budget
    largest = LARGEST_ON_DEVICE
    if session.device.type == "cpu":
        largest = LARGEST if scouted.ways is not None and Guard.possible() else LARGEST_IN_THREADS
    most = min(TARGET, int(largest / max(scouted.largest, 1.0)), int(room / 4 / max(scouted.forward, 1.0)))
    keep = partial(_in_files, session)
    return pieces(held, max(most, LEAST, -(-total // MOST)), keep, scouted.start)
