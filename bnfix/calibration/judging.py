"""Whether recalibration changes what the model does: outputs before and after, against what chance would do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfix.calibration.chunks import Chunk, every_other, halves, splittable
from bnfix.calibration.engines import Outcome, staged
from bnfix.calibration.listening import Stats
from bnfix.calibration.plain import listen
from bnfix.calibration.session import Session

CHANGE = 0.25
"""Change of the outputs, in their spread, below which statistics are not worth replacing; BN204 warns beyond it."""
ROUNDING = 1e-5
"""Part of outputs without any spread by which two runs of a float32 network may differ."""
OVER_NULL = 4.0
"""Multiples of the change between two halves of the data that a change has to exceed."""


@dataclass(frozen=True)
class Change:
    """rms(before − after)/std(after) of the outputs on ``probe`` samples; ``null`` is the same between two halves.

    ``doubtful``: the new statistics may be worse than the old ones.
    """

    value: float | None
    null: float | None = None
    probe: int = 0
    doubtful: bool = False

    @property
    def worth_it(self) -> bool:
        """Whether the change is large, and known to be larger than chance."""
        if self.value == math.inf:  # there are numbers now, or none
            return True
        if self.doubtful:
            return False
        if self.value is None:  # no outputs to go by
            return True
        return self.null is not None and not self.value <= max(CHANGE, OVER_NULL * self.null)


def outputs(session: Session, chunk: Chunk, stats: dict[int, Stats]) -> list[Tensor]:
    """The model's floating outputs with these statistics."""
    session.rewind()
    with session.using(stats):
        return listen(session.model, chunk, session.norms)[1]


def change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    """The worst over all floating outputs (as :func:`kept_outputs` gives them); None where there are none to compare.

    Infinite where shapes differ, or where one of the two is a finite number and the other is none: a NaN that goes, or
    comes. What is not finite on both sides (a mask of −inf) is passed over.
    """
    pairs = list(zip(before, after, strict=False))
    if not pairs:
        return None
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            return float("inf")
        a, b = a.double(), b.double()
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return float("inf")
        a, b = a[finite], b[finite]
        if not len(b):
            continue
        spread = b.std(unbiased=False).item()
        moved = (a - b).square().mean().sqrt().item()
        rounding = ROUNDING * b.square().mean().sqrt().item()
        worst = max(worst, moved / spread if spread > 0 else (0.0 if moved <= rounding else float("inf")))
    return worst


def null(session: Session, chunks: Sequence[Chunk], probe: Chunk | None, *, whole: bool = False) -> float | None:
    """The change between recalibrations on two disjoint halves; None where the data can't be halved.

    Every second sample, so that both hold the same of data in any order; every second chunk where these have to stay
    ``whole``. All ranks take part, those without a ``probe`` of their own too.
    """
    if not whole and chunks and all(splittable(c) and c.samples > 3 for c in chunks):
        two = [list(half) for half in zip(*map(every_other, chunks), strict=True)]
    elif len(chunks) == 1 and chunks[0].samples > 3 and splittable(chunks[0]):
        two = [[half] for half in halves(chunks[0], chunks[0].samples // 2)]
    else:
        two = [list(chunks[0::2]), list(chunks[1::2])]
    counts = session.ranks.numbers([len(half) for half in two])
    if not all(map(sum, zip(*counts, strict=True))):
        return None
    session.say("recalibrating on two halves, to see what chance does")
    done: list[Outcome] = [staged(session, half, None, quiet=True) for half in two]
    return between(session, probe, [half.stats for half in done])


def between(session: Session, probe: Chunk | None, halves: Sequence[dict[int, Stats]]) -> float | None:
    """The change between two sets of statistics; None where one of them is empty."""
    if probe is None or not all(halves):
        return None
    return change(*(outputs(session, probe, stats) for stats in halves))
