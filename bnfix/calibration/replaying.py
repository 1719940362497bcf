"""The proof that chunks ran as if each were alone: a part of one is run again, by itself, on the model itself.

Two samples of a chunk from the middle are run with the new statistics in the model's own buffers, without replicas
or threads. What each norm sees of them has to be what it saw of them among the others. That shows at once that
nothing leaked between chunks and that samples may be put together and cut apart. Only where it does not hold, or can't
be told with so few samples, the whole chunk is run again: that has to agree to the bit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnfix.calibration.ambient import Turn
from bnfix.calibration.chunks import PROBED, SHARED, Chunk, amid, joined, kind_of, part, splittable
from bnfix.calibration.ledger import Place
from bnfix.calibration.listening import Stats
from bnfix.calibration.plain import listen
from bnfix.calibration.scouting import mixed
from bnfix.calibration.session import Session
from bnfix.calibration.strands import Strand
from bnfix.errors import CalibrationError
from bnfix.stats import Moments, SampleSums

CLEAN, ORDER, MIXED, LEAKS = range(4)
NEAR = 5e-4
"""Distance of a sample alone and among others, in standard deviations. Kernels that depend on the batch size give up to
1e-4 in the depth of untrained networks (which amplify any rounding), leaks and layers that mix a batch 1e-1."""
LOOKED = 256
"""Values of a sample that are looked at for zeros."""
KINDS = 3
"""Kinds of chunks of which one is run again each."""
APART = 1e-5
"""The same for a whole chunk, which runs through the same kernels: clean models give 0."""


class Witness:
    """One chunk, and what it contributes at each call site among the others.

    After :meth:`judge`, ``distance`` says how far it was from what it gives alone, over ``samples`` samples; the
    outputs of ``replayed`` are in ``outputs``. ``single`` is the place of a sample that the loader gave in a batch of
    its own: then that is all that is judged.
    """

    def __init__(self, chunk: Chunk, single: int | None = None) -> None:
        self.chunk, self.single = chunk, single
        self.sums: dict[Place, SampleSums] = {}
        self.distance: float | None = None
        self.samples = 0
        self.replayed: Chunk | None = None
        self.outputs: list[Tensor] = []

    def take(self, place: Place, here: Sequence[Strand]) -> None:
        """Note what the chunk says at one place, if it is there."""
        for strand in here:
            if strand.chunk is self.chunk and strand.sums is not None:
                self.sums[place] = strand.sums

    def judge(
        self, session: Session, stats: dict[int, Stats], sites: Mapping[Place, Moments], turn: Turn, *, cut: bool
    ) -> tuple[int, str]:
        """Whether the chunk ran as if alone, and if not, what is wrong; ``cut``: it is not a batch of the loader's."""
        few, near, start, why = self.chunk, math.inf, 0, ""
        if self.single is not None:
            if self._others(session, stats, sites, turn, [self.single]) <= NEAR * (30 if session.coarse else 1):
                return CLEAN, ""
            return MIXED, "a single sample goes another way than several together"
        if cut and session.reads and splittable(self.chunk) and self.chunk.samples > 1:
            self.distance = self._batch_by_batch(session, stats, sites, turn)
            if not self.distance <= NEAR * (1 if not session.coarse else 30):
                return MIXED, "samples go other ways together than in the loader's batches"
        if splittable(self.chunk) and self.chunk.samples > PROBED and not session.coarse:
            # From the middle: there a sample has others before it and behind it that it could be mixed with.
            at = self.chunk.looked_at
            start = amid(self.chunk.samples, PROBED) if at is None else at
            few = part(self.chunk, start, PROBED)
            alone = self._replay(session, few, stats, turn)
            self.distance = near = _near(alone, self.sums, sites, start, PROBED)
            if near <= NEAR:
                least = _least(self.chunk) if cut else None
                if least is None or self._others(session, stats, sites, turn, least) <= NEAR:
                    return CLEAN, ""
                return MIXED, "samples are mixed within a batch"
            if self.chunk.laid_out and not cut:  # samples of a batch may well depend on one another
                as_given = dataclasses.replace(self.chunk, laid_out=False)
                self.distance = near = _exact(self._replay(session, as_given, stats, turn), self.sums, sites)
                why = f"samples differ by {near:.2g} σ in another memory order"
                return (CLEAN, "") if near <= NEAR else (ORDER, why)
            if self.chunk.laid_out:
                few = dataclasses.replace(few, laid_out=True)
                alone = self._replay(session, few, stats, turn)
                if _near(alone, self.sums, sites, start, PROBED) <= NEAR:
                    return ORDER, f"samples differ by {near:.2g} σ in another memory order"
            if cut and alone and alone.keys() != self.sums.keys():
                return MIXED, "samples go other ways together than alone"
        alone = self._replay(session, self.chunk, stats, turn)
        self.distance = _exact(alone, self.sums, sites)
        if not self.distance <= APART:
            far = f"a chunk alone differs by {self.distance:.2g} σ"
            if session.draws:
                return LEAKS, f"the forward draws random numbers that chunks which run in turns share ({far})"
            why = "the forward keeps values where chunks that run in turns overwrite them, or reads running statistics"
            return LEAKS, f"{why} ({far})"
        if cut and self.chunk.samples > 1 and splittable(self.chunk) and not session.coarse:
            with session.using(stats):
                if math.isfinite(near):
                    why = self._minds(session, few, start, sites, turn) or (
                        f"samples alone and among others differ by {near:.2g} σ (rounding that the network makes "
                        "large, or code that counts them)"
                    )
                else:
                    why = mixed(few, session.replicate, session.norms)
            if why:
                return MIXED, why
        return (ORDER, "samples may differ in another memory order") if self.chunk.laid_out else (CLEAN, "")

    def _others(
        self, session: Session, stats: dict[int, Stats], sites: Mapping[Place, Moments], turn: Turn, which: list[int]
    ) -> float:
        """How far these samples are together and among the others, and no less than what was found before."""
        few = joined([part(self.chunk, i, 1) for i in which])
        if few is None:
            return 0.0
        kept = self.replayed, self.outputs
        alone = self._replay(session, few, stats, turn)
        self.replayed, self.outputs = kept
        rows_fit = all(len(s.s) == self.chunk.samples for s in self.sums.values())
        far = _exact(alone, _rows(self.sums, which), sites) if rows_fit else 0.0
        self.distance = max(self.distance or 0.0, far)
        return far

    def _minds(self, session: Session, few: Chunk, start: int, sites: Mapping[Place, Moments], turn: Turn) -> str:
        """That samples are mixed, where ``few`` at its place in the chunk sees something else among others; or nothing.

        As many others: whatever depends on the number of samples alone, rounding above all, stays as it was.
        """
        behind = self.chunk.samples - start - few.samples
        others = joined([*_copies(few, start), few, *_copies(few, behind)])
        if others is not None:
            others.laid_out = few.laid_out
        turn.put(session.device)
        try:
            seen = {} if others is None else listen(session.model, others, session.norms)[0]
        except CalibrationError:
            seen = {}
        self.samples += self.chunk.samples
        here = slice(start, start + few.samples)
        far = _exact(_rows(seen, here), _rows(self.sums, here), sites)
        return "" if far <= APART else "samples are mixed within a batch"

    def _batch_by_batch(
        self, session: Session, stats: dict[int, Stats], sites: Mapping[Place, Moments], turn: Turn
    ) -> float:
        """How far what norms see of all of the chunk is from what they see of the loader's batches, one by one.

        Two samples are not enough where the forward looks at values: they may decide as the whole chunk does.
        """
        batches: dict[Place, list[SampleSums]] = defaultdict(list)
        start = 0
        for _, same in itertools.groupby(self.chunk.origin):
            count = len(list(same))
            for place, sums in self._replay(session, part(self.chunk, start, count), stats, turn).items():
                batches[place].append(sums)
            start += count
        if batches.keys() != self.sums.keys():
            return math.inf
        worst = 0.0
        for place, several in batches.items():
            apart, together = _total(several), _total([self.sums[place]])
            if not torch.equal(apart.n, together.n):
                return math.inf
            worst = max(worst, _distance(apart, together, sites[place]))
        return worst

    def _replay(self, session: Session, chunk: Chunk, stats: dict[int, Stats], turn: Turn) -> dict[Place, SampleSums]:
        turn.put(session.device)
        self.samples += chunk.samples
        try:
            with session.using(stats):
                alone, self.outputs = listen(session.model, chunk, session.norms)
        except CalibrationError:  # not the batch that it takes; or it can't run alone, as the plain passes will say
            return {}
        self.replayed = chunk
        return alone


def to_be_proven(session: Session, chunks: Sequence[Chunk]) -> bool:
    """Where chunks could see one another, or samples of several batches be mixed, nobody may leave the proof out."""
    together = len(chunks) > 1 or any(len(set(chunk.origin)) > 1 for chunk in chunks)
    return together or session.options.certify is not None


def witnesses(chunks: Sequence[Chunk], *, every: bool = False) -> list[tuple[int, Witness]]:
    """The chunks to be run again, with their numbers; ``every`` one where something is known that they could mix up.

    A value kept in a wrong place is overwritten by a later chunk, or was there from an earlier one, perhaps only by one
    with inputs of the same kind (shapes, and what is no tensor): of each kind that has such the smallest chunk with
    both before and behind it, as far as :data:`KINDS` go, else one for each.
    """
    kinds = [kind_of(c) for c in chunks]
    later = [i for i, kind in enumerate(kinds) if kind in kinds[i + 1 :]]
    earlier = [i for i, kind in enumerate(kinds) if kind in kinds[:i]]
    between = sorted(set(later) & set(earlier), key=lambda i: chunks[i].samples)
    smallest: list[int] = []
    for i in between:
        if all(kinds[i] != kinds[j] for j in smallest):
            smallest.append(i)
    often = sorted(smallest, key=lambda i: -kinds.count(kinds[i]))
    chosen: Sequence[int] = often[:KINDS] or [*later[:1], *earlier[-1:]]
    if every or not chosen:
        chosen = [1] if len(chunks) > 2 and not every else range(len(chunks))
    found = [(i, Witness(chunks[i])) for i in chosen]
    single = _single(chunks)
    return found if single is None else [*found, (single[0], Witness(chunks[single[0]], single[1]))]


def _single(chunks: Sequence[Chunk]) -> tuple[int, int] | None:
    """Chunk and place of a sample that came in a batch of its own: the last of those that are not as the first sample
    of their chunk is, to which code might look, else the last.
    """
    counts = Counter(itertools.chain.from_iterable(c.origin for c in chunks))
    last = None
    for i, chunk in reversed([*enumerate(chunks)]):
        singles = [k for k, batch in enumerate(chunk.origin) if counts[batch] == 1] if chunk.samples > 1 else []
        if not singles:
            continue
        unlike = _unlike_the_first(chunk)
        if others := [k for k in singles if unlike[k]]:
            return i, others[-1]
        last = last or (i, singles[-1])
    return last


def _unlike_the_first(chunk: Chunk) -> list[bool]:
    """Which samples differ from the first in an input that is discrete, or a single number: not what norms see."""
    tensors = [t for t in chunk.call.tensors() if not t.is_nested and t.shape[:1] == (chunk.samples,)]
    codes = [t for t in tensors if t.numel() == len(t) or (not t.is_floating_point() and t.numel() <= SHARED * len(t))]
    differ = [(t != t[:1]).reshape(chunk.samples, -1).any(1).tolist() for t in codes]
    return [any(row) for row in zip(*differ, strict=True)] or [False] * chunk.samples


def _near(
    alone: Mapping[Place, SampleSums],
    among: Mapping[Place, SampleSums],
    sites: Mapping[Place, Moments],
    start: int,
    count: int,
) -> float:
    """The distance of samples alone and among others, in deviations of the site; inf where rows don't match."""
    if alone.keys() != among.keys():
        return float("inf")
    if any(len(a.s) != count or len(among[place].s) < start + count for place, a in alone.items()):
        return float("inf")
    return _exact(alone, _rows(among, slice(start, start + count)), sites)


def _least(chunk: Chunk) -> list[int] | None:
    """The samples whose discrete or small inputs (lengths, tokens, masks) are the least, or that hold the most zeros
    (padding); None where all are alike.

    What code makes of the longest of a batch is the same for any two that are as long: these are not.
    """
    strided = [t for t in chunk.call.tensors() if not t.is_nested and t.layout is torch.strided and t.numel()]
    tensors = [t for t in strided if t.shape[:1] == (chunk.samples,) and not t.is_complex()]
    few = 16 if len(tensors) > 1 else 0  # values a sample of one that is a number, not what the norms see
    small = [t for t in tensors if t.numel() <= len(t) * (few if t.is_floating_point() else SHARED)]
    blank = [b for t in tensors if t.is_floating_point() and all(t is not s for s in small) and (b := _filled(t)).any()]
    if not (small or blank) or chunk.samples <= PROBED:
        return None
    sums = [t.double().flatten(1).sum(1).cpu() if t.dim() > 1 else t.double().cpu() for t in small]
    sizes = torch.stack([*sums, *blank], 1)
    sizes = ((sizes - sizes.mean(0)) / sizes.std(0).clamp(min=1e-300)).nan_to_num(0.0).sum(1)
    if bool((sizes == sizes[0]).all()):
        return None
    return sorted(sizes.argsort(stable=True)[:PROBED].tolist())


def _filled(t: Tensor) -> Tensor:
    """Minus the number of zeros in each sample, float64, (N,); of some hundred of its values."""
    values = t.reshape(len(t), -1)
    some = values[:, :: max(1, values.shape[1] // LOOKED)]
    return -(some == 0).sum(1, dtype=torch.float64).cpu()


def _rows(sums: Mapping[Place, SampleSums], here: slice | list[int]) -> dict[Place, SampleSums]:
    """What some of the samples contribute."""
    return {
        place: SampleSums(of.s[here], of.q[here], of.n if isinstance(of.n, int) else of.n[here])
        for place, of in sums.items()
    }


def _copies(chunk: Chunk, count: int) -> list[Chunk]:
    """``count`` samples: those of ``chunk`` over and over."""
    whole, rest = divmod(count, chunk.samples)
    return [chunk] * whole + ([part(chunk, 0, rest)] if rest else [])


class _Total(SampleSums):
    """All samples as one, in float64."""

    n: Tensor


def _total(several: Sequence[SampleSums]) -> _Total:
    n = [torch.full((len(x.s),), x.n, device=x.s.device) if isinstance(x.n, int) else x.n for x in several]
    s, q = torch.cat([x.s for x in several]), torch.cat([x.q for x in several])
    s, q, of_all = (t.double().sum(0, keepdim=True) for t in (s, q, torch.cat(n)))
    return _Total(s, q, of_all)


def _exact(
    alone: Mapping[Place, SampleSums], among: Mapping[Place, SampleSums], sites: Mapping[Place, Moments]
) -> float:
    if alone.keys() != among.keys():
        return float("inf")
    return max((_distance(a, among[place], sites[place]) for place, a in alone.items()), default=0.0)


def _distance(a: SampleSums, b: SampleSums, site: Moments) -> float:
    if a.s.shape != b.s.shape:
        return float("inf")
    if torch.equal(a.s, b.s) and torch.equal(a.q, b.q):
        return 0.0
    counts = [x.n if isinstance(x.n, int) else x.n.clamp(min=1).unsqueeze(1) for x in (a, b)]
    means = [x.s.double() / n for x, n in zip((a, b), counts, strict=True)]
    squares = [x.q.double() / n for x, n in zip((a, b), counts, strict=True)]
    # Rounding is relative to the values themselves where their spread is small.
    square = site.mean**2 + site.variance(unbiased=False)
    scale = (site.variance(unbiased=False) + 1e-4 * square).clamp(min=1e-30)
    mean = ((means[0] - means[1]).abs() / scale.sqrt()).max().item()
    power = ((squares[0] - squares[1]).abs() / (scale + torch.maximum(square, squares[0]))).max().item()
    return max(mean, power) if mean == mean and power == power else float("inf")
