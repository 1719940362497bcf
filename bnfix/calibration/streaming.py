"""One pass over a stream: nothing is kept but moments.

``population``: each batch is normalised with its own statistics, as in training, and the moments are pooled over all
(with the variance between batches). ``online``: normalised with what was pooled so far, for batches too small
to stand alone. Both are near the fixed point, not at it, as long as the batches are alike: of sorted data each one
normalises away what tells it from the others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bnfix.calibration.chunks import TARGET, Chunk, halves, joined, mask_at, same_mark, splittable
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
SHARE = 0.02
"""Part of the variance that lies between batches, beyond chance, from which on it matters that they differ."""
MUCH = 0.3
"""The same, from which on statistics are so far off that nobody gets them without asking."""
LOOK = 16
"""Batches between two looks at the standard error."""

LOOKS = frozenset(4**k for k in range(2, 12))
"""Numbers of batches after which it is seen whether they are alike."""


def stream(session: Session, chunks: Iterable[Chunk], method: str) -> Outcome:
    """Statistics after one pass over ``chunks``.

    Raises:
        CalibrationError: the loader or a forward fails, or the data is not finite.
    """
    gathered: Gathering[Place] = Gathering(MANY)
    wanted = session.options.when == "needed" or session.options.dry_run
    halves: list[Gathering[Place]] = [Gathering(MANY) for _ in range(2)] if wanted else []
    first = _through(session, chunks, method, gathered, halves)
    uneven = max(session.ranks.all_of(first.uneven(gathered.moments())))
    _refuse_uneven(session, uneven)
    stats, sites = _merged(session, gathered)
    return Outcome(
        stats,
        sites,
        "stream",
        halves=[_merged(session, half)[0] for half in halves],
        uneven=uneven.ratio or None,
    )


def _refuse_uneven(session: Session, uneven: Uneven) -> None:
    """Nobody asked for a stream, and its result would be far off.

    Raises:
        CalibrationError: that is so.
    """
    options = session.options
    asked = options.method != "auto" or options.when != "always" or options.dry_run
    if not asked and uneven.share > MUCH:
        raise CalibrationError(
            f"the samples have to go through as a stream, and its batches differ more than chance would have it "
            f"({uneven.ratio:.1f} ×, shuffled data has about 1): normalised apart they are far from evaluation mode",
            hint="shuffle the data; or take what fits:  spill_dir='DIR', memory_budget= or max_samples=\n"
            "to have such statistics nevertheless:  method='population'",
        )


def _merged(session: Session, gathered: Gathering[Place]) -> tuple[dict[int, Stats], dict[Place, Moments]]:
    """The statistics of all ranks, and what they were made from."""
    sites = merged(gathered.moments(), session.norms, session.ranks)
    stats: dict[int, Stats] = {}
    for key, moments in by_norm(sites).items():
        found = stored(session.norms.by_key(key), moments, session.options.unbiased)
        if found is not None:
            stats[key] = found
    return stats, sites


class Uneven(NamedTuple):
    """How much batches differ: ``ratio`` is F = Var_b(mean_b)·N_b/Var_i(mean_i), the median over channels, ``share``
    the part of the variance that lies between them beyond chance. Both 0 where they are alike.
    """

    ratio: float = 0.0
    share: float = 0.0


@dataclass
class _FirstNorm:
    """How much the batches differ at the norm that they meet first: behind it they are normalised apart."""

    place: Place | None = None
    batches: int = 0
    known: bool = True
    within: Tensor | None = None

    def take(self, place: Place, mine: Spread, *, counted: bool) -> None:
        """One batch at one place; ``counted``: its rows are samples, not nodes or tokens of which many are one's."""
        if self.place is None:
            self.place = place
        if place == self.place and not counted:
            self.known = False
        if place == self.place:
            self.batches += 1
            self.within = mine.m2 if self.within is None else self.within + mine.m2

    def uneven(self, found: Mapping[Place, Moments]) -> Uneven:
        """Whether they do: more than chance, and so much that it is of consequence.

        With B batches chance gives a ratio of 1 ± √(2/(B − 1)).
        """
        if self.place is None or self.within is None or self.batches < 2 or not self.known:
            return Uneven()
        all_of, degrees = found[self.place], self.batches - 1
        positions = all_of.n / all_of.units
        chance = degrees * all_of.gram[3] / (all_of.units - 1).clamp(min=1) / positions
        between = all_of.m2 - self.within
        live = (chance > 0) & (all_of.m2 > 0)
        if not bool(live.any()):
            return Uneven()
        ratio = (between / chance)[live].median().item()
        share = ((between - chance) / all_of.m2)[live].median().item()
        differ = ratio > max(3.0, 1 + 6 * math.sqrt(2 / degrees)) and share > SHARE
        return Uneven(ratio, share) if differ else Uneven()


def _through(
    session: Session, chunks: Iterable[Chunk], method: str, sites: Gathering[Place], halves: Sequence[Gathering[Place]]
) -> _FirstNorm:
    session.rewind()
    replica = session.replicate()
    so_far: dict[int, Spread] = {}
    first = _FirstNorm()
    for number, chunk in enumerate(chunks):
        session.say(f"{method}: {chunk.where}")
        calls: dict[int, int] = defaultdict(int)

        half = halves[number % 2] if halves else None

        def ask(
            seen: Seen, chunk: Chunk = chunk, calls: dict[int, int] = calls, half: Gathering[Place] | None = half
        ) -> Stats | None:
            norm = seen.norm
            place = (norm.key, calls[norm.key])
            calls[norm.key] += 1
            mask = mask_at(chunk, seen.x, norm.path)
            sums = session.norms.sums(place, seen.x, chunk.samples, mask)
            mine = sites.add(place, sums, seen.x, mask)
            if half is not None:
                half.add(place, sums, seen.x, mask)
            first.take(place, mine, counted=splittable(chunk) and len(sums.s) == chunk.samples)
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
        if number + 1 in LOOKS:
            _refuse_uneven(session, first.uneven(sites.moments()))
        if session.options.tol is not None and number % LOOK == LOOK - 1 and _sure(session, sites.moments()):
            session.notes.append(f"stopped when every standard error was at most {session.options.tol:g}")
            break
    return first


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
