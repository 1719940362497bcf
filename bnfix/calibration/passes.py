"""Statistics held against plain forwards of the model over all chunks, and mended where they do not stand."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from bnfix.calibration.ambient import Turn
from bnfix.calibration.chunks import Chunk
from bnfix.calibration.ledger import Place, residual, stored
from bnfix.calibration.listening import Stats
from bnfix.calibration.plain import by_norm, measure, merged
from bnfix.calibration.session import Session
from bnfix.calibration.staged import MemoryFullError
from bnfix.errors import CalibrationError
from bnfix.stats import Moments
from bnfix.types import Residual

STANDS = 1e-5
"""Distance from what plain forwards measure, in standard deviations, at which statistics stand."""
COARSE = 1e-2
"""The same for models that know no better, such as those that quantise their weights as they run."""
ROUNDS, UNDAMPED = 24, 8


def mended(
    session: Session, chunks: Sequence[Chunk], stats: dict[int, Stats], moved: Residual | None
) -> tuple[dict[int, Stats], dict[Place, Moments], int]:
    """Statistics that plain forwards with them reproduce, what these measured, and how many passes it took.

    What was estimated norm by norm does, unless the model's own code reads running statistics somewhere (a norm folded
    into its convolution as it runs) or remembers earlier calls. Then all norms are measured with all of them in the
    buffers, again and again; ``moved`` is what iterated norms may be apart anyway.

    Raises:
        CalibrationError: they come nowhere near; names the norm. Or a forward fails.
    """
    turn = Turn.now(session.device)
    allowed = max(STANDS, *(3 * m for m in (moved.mean, moved.var))) if moved is not None else STANDS
    best, nearest, worst = (stats, dict[Place, Moments]()), math.inf, -1
    for number in range(1, ROUNDS + 1):
        session.say(f"checking the statistics in plain forwards, pass {number}")
        sites = _measured(session, chunks, stats, turn)
        found = {
            key: new
            for key, moments in by_norm(sites).items()
            if (new := stored(session.norms.by_key(key), moments, session.options.unbiased)) is not None
        }
        met = [*stats, *(k for k in found if k not in stats)]  # forwards may come by others with these statistics
        far, key = max(((_apart(stats.get(k), found.get(k)), k) for k in met), default=(0.0, -1))
        if far <= allowed:
            return stats, sites, number
        if far < nearest:
            best, nearest, worst = (stats, sites), far, key
        step = 1.0 if number <= UNDAMPED or number % 2 else 0.5  # what swings is halved, what follows comes along
        stats = found | {k: _towards(old, found.get(k, old), step) for k, old in stats.items()}
    told = (
        f"{session.norms.by_key(worst).path}: its statistics do not settle: {nearest:.2g} σ between what it was given "
    )
    told += "and what it sees then; the model remembers earlier calls, rounds coarsely or draws at random"
    if nearest > COARSE:
        raise CalibrationError(told, hint="method='population' averages over that")
    session.notes.append(told)
    return *best, ROUNDS


def _measured(session: Session, chunks: Sequence[Chunk], stats: dict[int, Stats], turn: Turn) -> dict[Place, Moments]:
    def seeded() -> Iterator[Chunk]:
        for number, chunk in enumerate(chunks):
            Turn.seeded(turn, number, session.device).put_all(session.device)
            yield chunk

    session.rewind()  # each pass is the one that the user would make
    found, full = dict[Place, Moments](), None
    try:
        with session.using(stats):
            found = measure(session.model, seeded(), session.norms, sum(c.samples for c in chunks))
    except MemoryFullError as error:
        full = error
    finally:
        turn.put(session.device)
    if any(session.ranks.each(int(full is not None))):  # another way is tried then, by all
        raise full or MemoryFullError("another rank")
    return merged(found, session.norms, session.ranks)


def _apart(old: Stats | None, new: Stats | None) -> float:
    far = residual([(old, new)]) if old is not None and new is not None else Residual(math.inf, math.inf)
    return max(far.mean, far.var)


def _towards(old: Stats, new: Stats, step: float) -> Stats:
    return (torch.lerp(old[0], new[0], step), torch.lerp(old[1], new[1], step)) if step < 1 else new
