"""Which method for what was found of data and memory, and the line that says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from bnfix.calibration.reading import Reader, length
from bnfix.calibration.session import Options

ENDLESS = 1 << 17
"""Samples after which data of unknown length is taken to have no end, if ``max_samples`` does not say where it is."""
PLAIN_BATCHES = 1024
"""Chunks (threads) at most where batches can't be joined."""
SMALL = 32
"""Batches from which on a batch's own statistics are good enough to normalise with."""
TOGETHER = 64
"""Samples to which the batches of a stream are joined, where they can be."""


@dataclass(frozen=True)
class Found:
    """What one rank knows, or expects (``about``); all of it is exchanged.

    ``held`` of ``samples`` fit into ``budget`` bytes, of ``total`` that there are; ``cut``: as many as were asked for.
    ``inseparable`` says why batches are kept as they are, ``crowded`` that there are too many of them for that.
    """

    samples: int = 0
    held: int = 0
    fits: bool = True
    inseparable: str = ""
    largest: int = 0
    budget: int = 0
    total: str = ""
    crowded: bool = False
    cut: bool = False
    about: bool = False


@dataclass(frozen=True)
class Decision:
    """The method, and why; ``apart`` says why batches are kept as they are, ``count`` how many samples are used.

    ``about``: that was expected, to a batch.
    """

    method: str
    why: str
    apart: str
    fits: bool
    count: int
    about: bool = False

    @property
    def line(self) -> str:
        """For the user, before the work starts."""
        return f"method {self.method}: {self.why}"

    def came_true(self, now: Decision, batch: int) -> bool:
        """Whether it has come as was said before; ``batch``: samples of one."""
        off = abs(now.count - self.count)
        same = (now.method, now.apart, now.fits) == (self.method, self.apart, self.fits)
        return same and (now.method != "staged" or off <= (batch if self.about else 0))


def decide(options: Options, said: Sequence[Found], count: int, world: int = 1, mine: Found | None = None) -> Decision:
    """What all ranks do, by what each has ``said``; ``count`` are the samples of this one that will be used.

    ``mine`` is what this rank has said; None: the first.
    """
    mine = mine or said[0]
    asked = "as asked for" if options.method != "auto" else ""
    apart = next((f.inseparable for f in said if f.inseparable), "")
    fits = all(f.fits for f in said)
    if options.method in ("population", "online"):
        return Decision(options.method, f"{asked}; one pass over the loader", apart, fits, count)
    budget = gigabytes(min(f.budget for f in said))
    if options.method == "staged" or fits:
        kept = f"; its batches are kept as they are ({apart})" if apart else ""
        share = f"{count:,} of {mine.total} samples"
        if fits:  # with max_samples nobody looked whether there are more
            share = f"{'about' if mine.about else 'all'} {count:,} samples"
            if mine.cut:  # whole batches, where these can't be cut
                more = options.max_samples is not None and count > options.max_samples
                share = f"the {count:,} samples of the batches read" if more else f"the {count:,} samples asked for"
            share = {0: "no samples", 1: "1 sample"}.get(count, share)
        share += " of this rank" * (world > 1)
        room = "in files" if options.spill_dir is not None else f"in memory ({budget})"
        fit = f"fits {room}" if count == 1 else f"fit {room} together"
        why = f"{share} {fit}{kept}; one pass over the loader"
        return Decision("staged", f"{asked}: {why}" if asked else why, apart, fits, count, mine.about)
    largest = max(f.largest for f in said)
    worst = next(f for f in said if not f.fits)
    short = f"{worst.held:,} of {worst.total} samples{' of one rank' * (world > 1)} fit ({budget})"
    if any(f.held == ENDLESS for f in said):
        short = f"data of unknown length, and more than {ENDLESS:,} samples"
    if any(f.crowded for f in said):
        short = f"more than {PLAIN_BATCHES} batches that can't be joined ({apart})"
    way = f"batches joined to {TOGETHER}" if not apart else f"batches of {largest} as they are ({apart})"
    why = f"{short}: {way}; one pass over the loader; spill_dir=, max_samples= or memory_budget= make it exact"
    return Decision("population" if not apart or largest >= SMALL else "online", why, apart, fits, count)


def expected(reader: Reader, data: Any, options: Options, budget: int, room: int | None) -> Found | None:
    """What will be found once all is read, by what the data says of its length; None where it says nothing."""
    batches = length(data)
    if not batches:  # it does not say, or says 0 though a batch was read
        return None
    total, known = _samples(batches, data, reader)
    cut = options.max_samples is not None and options.max_samples <= total
    total = min(total, options.max_samples or total)
    return Found(
        total,
        total if room is None else min(total, room),
        room is None or total <= room,
        largest=reader.largest,
        budget=budget,
        total=f"{'' if known or cut else 'about '}{total:,}",
        cut=cut,
        about=not known,
    )


def total_of(reader: Reader, data: Any, options: Options) -> str:
    """How many samples there are, for a person."""
    if reader.ended:
        return f"{reader.samples:,}"
    found = expected(reader, data, options, 0, None)
    return "an unknown number of" if found is None else found.total


def _samples(batches: int, data: Any, reader: Reader) -> tuple[int, bool]:
    """How many samples so many batches hold, and whether that is known: not with samplers that leave some out."""
    most = batches * reader.largest
    known = length(getattr(data, "dataset", None))
    if known is not None and most - reader.largest < known <= most:
        return known, True
    if isinstance(data, (list, tuple)) and 1 < batches <= PLAIN_BATCHES:
        rows = set(map(_rows, data[:-1]))
        return most - reader.largest + reader.samples_of(data[-1]), len(rows) == 1 and None not in rows
    return most, False


def _rows(batch: Any) -> int | None:
    """The first axis of the first tensor in a batch."""
    return next((leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), None)


def gigabytes(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
