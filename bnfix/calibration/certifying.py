"""The certificate: what plain forwards over the loader's own batches see, held against the statistics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from bnfix.calibration.chunks import Chunk
from bnfix.calibration.engines import ROUGH, Outcome
from bnfix.calibration.listening import Stats
from bnfix.calibration.plain import measure, merged, residual_of
from bnfix.calibration.reading import Reader
from bnfix.calibration.session import Session
from bnfix.running import replayable
from bnfix.types import Residual

ROUNDED = 5e-3
"""Residual, in standard deviations or parts of a variance, that rounding may leave: of nearly dead channels 1e-3."""


def disproved(session: Session, found: Residual, outcome: Outcome) -> bool:
    """Whether it is more than rounding explains, or than iterated norms are apart."""
    moved = outcome.moved or Residual(0.0, 0.0)
    allowed = max(ROUGH if session.coarse else ROUNDED, 3 * moved.mean, 3 * moved.var)
    known = outcome.engine == "plain passes" or session.draws
    return not known and not max(found.mean, found.var) <= allowed


def residual(session: Session, chunks: Sequence[Chunk], stats: dict[int, Stats], outcome: Outcome) -> Residual:
    """How far ``stats``, or those in the model where there are none, are from what plain forwards with them see.

    Raises:
        CalibrationError, MemoryFullError: a forward fails.
    """
    session.say("certifying: plain forwards over the same tensors")
    norms = session.norms
    session.rewind()
    with session.using(stats):
        here = measure(session.model, chunks, norms, sum(c.samples for c in chunks))
        found = merged(here, norms, session.ranks)
        in_use = {n.key: (n.mean.detach().clone(), n.var.detach().clone()) for n in norms if n.key in outcome.stats}
    return residual_of(found, in_use, norms, session.options.unbiased)


def fresh(session: Session, batches: Sequence[Chunk], samples: int, outcome: Outcome) -> Residual | None:
    """The same over what the data gives when it is gone through again; None where that is the same, or is not possible.

    Raises:
        CalibrationError, MemoryFullError: the loader or a forward fails.
    """
    options = session.options
    streamed = outcome.engine == "stream"  # it kept nothing that could be run again, so that any pass tells more
    if not all(session.ranks.each(int(replayable(session.data)))):
        if streamed:
            session.notes.append("the residual could not be measured: the data can't be read a second time")
        return None
    reader = Reader(session.data, session.model, options.forward, options.mask, options.max_samples)
    first = reader.next()
    same = not streamed and (first is None or any(starts_with(old, first) for old in batches))
    if all(session.ranks.each(int(same))):
        return None  # the loader gives the same tensors again
    session.say(f"certifying: {'one more pass over' if streamed else 'a new draw of'} the data")
    start = [first] if first is not None else []
    session.rewind()
    with session.using(outcome.stats):
        here = measure(session.model, itertools.chain(start, reader), session.norms, samples)
        found = merged(here, session.norms, session.ranks)
    return residual_of(found, outcome.stats, session.norms, options.unbiased)


def starts_with(old: Chunk, new: Chunk) -> bool:
    """Whether the shorter of two is the beginning of the other."""
    pairs = zip(old.call.tensors(), new.call.tensors(), strict=False)
    return all(
        a.shape[1:] == b.shape[1:] and torch.equal(a[: len(b)], b[: len(a)]) for a, b in pairs if a.dim() and b.dim()
    )
