"""One pass over a stream: nothing is kept but moments.

``population``: each batch is normalised with its own statistics, as in training, and the moments are pooled over all
(with the variance between batches). ``online``: normalised with what was pooled so far, for batches too small
to stand alone. Both are near the fixed point, not at it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from bnfix.calibration.chunks import TARGET, Chunk, halves, joined, mask_at, same_mark
from bnfix.calibration.engines import Outcome
from bnfix.calibration.ledger import Place, not_finite, stored
from bnfix.calibration.listening import Listener, Seen, Stats
from bnfix.calibration.plain import by_norm, merged
from bnfix.calibration.session import Session
from bnfix.calibration.staged import MemoryFullError, forward_of, memory
from bnfix.errors import CalibrationError
from bnfix.stats import Gathering, Moments, Spread, round_once
from bnfix.types import no_spread

MANY = 256
"""Samples from which on float32 sums are as good as they get: streams are taken to have them."""
LOOK = 16
"""Batches between two looks at the standard error."""


def stream(session: Session, chunks: Iterable[Chunk], method: str) -> Outcome:
    """Statistics after one pass over ``chunks``.

    Raises:
        CalibrationError: the loader or a forward fails, or the data is not finite.
    """
    gathered: Gathering[Place] = Gathering(MANY)
    _through(session, chunks, method, gathered)
    sites = merged(gathered.moments(), session.norms, session.ranks)
    stats: dict[int, Stats] = {}
    for key, moments in by_norm(sites).items():
        found = stored(session.norms.by_key(key), moments, session.options.unbiased)
        if found is not None:
            stats[key] = found
    return Outcome(stats, sites, "stream")


def _through(session: Session, chunks: Iterable[Chunk], method: str, sites: Gathering[Place]) -> None:
    session.rewind()
    replica = session.replicate()
    so_far: dict[int, Spread] = {}
    for number, chunk in enumerate(chunks):
        session.say(f"{method}: {chunk.where}")
        calls: dict[int, int] = defaultdict(int)

        def ask(seen: Seen, chunk: Chunk = chunk, calls: dict[int, int] = calls) -> Stats | None:
            norm = seen.norm
            place = (norm.key, calls[norm.key])
            calls[norm.key] += 1
            mask = mask_at(chunk, seen.x, norm.path)
            mine = sites.add(place, session.norms.sums(place, seen.x, chunk.samples, mask), seen.x, mask)
            if not bool(torch.isfinite(mine.m2.sum() + mine.mean.sum())):
                raise not_finite(norm)
            so_far[norm.key] = so_far[norm.key].joined(mine) if norm.key in so_far else mine
            alone = method == "population" and float(mine.n.min()) > 1
            moments = mine if alone else so_far[norm.key]
            if float(moments.n.max()) <= 1:
                return None
            mean, var = moments.mean, moments.variance(not alone and session.options.unbiased)
            shape = norm.mean.shape
            return (
                round_once(mean, norm.mean.dtype).reshape(shape),
                round_once(var, norm.var.dtype).reshape(shape),
            )

        try:
            with memory(), forward_of(chunk), torch.no_grad(), Listener(session.norms, ask):
                chunk.call.run(replica)
        except MemoryFullError as full:  # its cause brings the hint
            raise CalibrationError(str(full)) from full.__cause__
        if session.options.tol is not None and number % LOOK == LOOK - 1 and _sure(session, sites.moments()):
            session.notes.append(f"stopped when every standard error was at most {session.options.tol:g}")
            return


def _sure(session: Session, sites: dict[Place, Moments]) -> bool:
    """Whether all standard errors are at most ``tol``: of means in standard deviations, of variances relative.

    Of channels with a spread, as :class:`LayerStats` says which: one that is all but dead need not be known to 1 %.
    """
    tol = session.options.tol or 0.0
    for (key, _), moments in sites.items():
        var = moments.variance()
        se_mean, se_var = moments.standard_errors()
        live = var > no_spread(moments.mean, session.norms.by_key(key).eps)
        worst = torch.maximum(se_mean[live] / var[live].sqrt(), se_var[live] / var[live])
        if worst.numel() and not bool((worst <= tol).all()):
            return False
    return True


def rejoined(chunks: Iterable[Chunk], target: int = TARGET) -> Iterator[Chunk]:
    """The same samples in chunks of ``target``, as they come; batches that don't fit together stay apart."""
    pending: Chunk | None = None
    for chunk in chunks:
        together = chunk if pending is None else joined([pending, chunk]) if same_mark(pending, chunk) else None
        if together is None:
            assert pending is not None
            yield pending
            together = chunk
        while together is not None and together.samples >= target:
            if together.samples < 2 * target:
                yield together
                together = None
            else:
                head, together = halves(together, target)
                yield head
        pending = together
    if pending is not None:
        yield pending
