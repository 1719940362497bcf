"""The pieces of the data that go through the model together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.calibration.memory_order import laid_out
from bnfix.errors import CalibrationError
from bnfix.running import Call, join, size, split

TARGET = 128
"""Samples a chunk at most: more save nothing."""
LEAST = 16
"""Samples a chunk at least: with fewer, PyTorch takes slower convolutions in one thread, and switching costs more than
it saves."""
LARGEST = 31 << 20
"""Bytes of the largest activation of a chunk: glibc takes blocks of 32 MB and more from the system with each use, and
fresh pages cost more time than the rest of a norm. Below that larger chunks are faster: each forward costs time."""
LARGEST_IN_THREADS = 12 << 20
"""The same in threads, whose heaps are smaller."""
LARGEST_ON_DEVICE = 384 << 20
"""The same on a GPU, which keeps its memory: there each chunk costs time on the host."""
PROBED = 2
"""Samples that are looked at first, and that are run again in the end."""
SHARED = 1 << 14
"""Values a sample of an input that may be the same for all samples of a batch: a domain, a graph, a prompt."""
MOST = 96
"""Chunks, that is threads, before they grow beyond all that."""

Mark = tuple[Any, ...] | None


@dataclass(eq=False)
class Chunk:
    """One call of the model: ``samples`` independent samples, from the loader's batches ``origin`` (one a sample).

    ``mask`` (N, *positions) is True where a position counts; None: all do. ``laid_out``: its images go into the model
    in the memory order that is faster; those of its parts as the loader gave them. ``looked_at``: where the samples are
    that were looked at first, if they are in it.
    """

    call: Call
    samples: int
    origin: tuple[int, ...]
    mask: Tensor | None = None
    laid_out: bool = False
    looked_at: int | None = None

    def run(self, model: nn.Module) -> Any:
        """The forward of ``model``, with copies of the inputs."""
        return laid_out(self.call).apply(model) if self.laid_out else self.call.run(model)

    @property
    def where(self) -> str:
        """The loader's batches it came from, for a person."""
        first, last = min(self.origin), max(self.origin)
        return f"batch {first}" if first == last else f"batches {first} to {last}"

    def batch_of(self, some: Sequence[int], rows: int) -> str:
        """The first batch that any of ``some`` of ``rows`` rows came from."""
        if rows == len(self.origin):
            return f"batch {min(self.origin[row] for row in some)}"
        return self.where


def pieces(
    batches: Sequence[Chunk],
    most: int = TARGET,
    keep: Callable[[Chunk, Sequence[Chunk]], Chunk] | None = None,
    looked_at: int | None = None,
) -> list[Chunk]:
    """The same samples in chunks of up to ``most``, as far as there are ``LEAST``: small batches joined, large split.

    Samples keep their order within batches of one signature, batches too. ``keep`` is given each that is a copy, as it
    is made, and what it was made of. With ``looked_at``, where in the first batch the samples are that were looked at,
    that batch comes amid the others of a chunk, and this chunk behind another one: these samples are run again in the
    end, there, with others before and behind them.
    """
    runs = [(run, _sizes(sum(c.samples for c in run), most, _unit(run, most))) for run in _alike(batches)]
    if looked_at is not None:
        run, sizes = runs[0]
        runs[0] = (_amidst(run, sizes[0], looked_at), sizes)
    chunks = [chunk for run, sizes in runs for chunk in _cut(run, sizes, keep)]
    return chunks if looked_at is None else _led(chunks, batches[0].origin[0], looked_at)


def _amidst(run: list[Chunk], size: int, looked_at: int) -> list[Chunk]:
    """Batches in such an order that the samples looked at come amid a chunk of ``size``; each stays whole."""
    lead = 1 if run[0].samples > 1 else 2
    count, at = looked_at, lead
    while at < len(run) and count < amid(size, PROBED):
        count += run[at].samples
        at += 1
    return [*run[lead:at], *run[:lead], *run[at:]]


def _led(chunks: list[Chunk], first: int, looked_at: int) -> list[Chunk]:
    """The chunk with the samples that were looked at knows where they are, and comes second of several."""
    seen = 0
    for i, chunk in enumerate(chunks):
        here = chunk.origin.count(first)
        if here and seen <= looked_at and chunk.origin.index(first) + looked_at - seen + PROBED <= chunk.samples:
            found = replace(chunk, looked_at=chunk.origin.index(first) + looked_at - seen)
            others = chunks[:i] + chunks[i + 1 :]
            return [others[0], found, *others[1:]] if len(others) > 1 else [found, *others]
        seen += here
    return chunks


def _unit(run: list[Chunk], most: int) -> int:
    """Samples of each batch but the last, where that is one number and several fit into a chunk; else 1."""
    sizes = {c.samples for c in run[:-1]}
    unit = sizes.pop() if len(sizes) == 1 else 1
    return unit if run[-1].samples <= unit <= most // 2 else 1


def _sizes(total: int, most: int, unit: int = 1) -> list[int]:
    """The fewest that are not above ``most``, or up to half as many more if these divide it. All alike but the last,
    so that the first one, with the samples that were looked at, is one of many; as equal as can be if that is too
    small. Multiples of ``unit`` where they can be: what holds within a batch is cut apart nowhere then.
    """
    fewest = max(1, -(-total // most))
    count = next((c for c in range(fewest, fewest * 3 // 2 + 1) if total % c == 0), fewest)
    count = max(1, min(count, total // LEAST))
    each = -(-total // count)
    if (whole := -(-each // unit) * unit) <= most and total - whole * (count - 1) >= LEAST:
        each = whole
    last = total - each * (count - 1)
    if last >= max(LEAST, each // 2):
        return [each] * (count - 1) + [last]
    small, more = divmod(total, count)
    groups = ([small + 1] * more, [small] * (count - more))
    return [size for group in sorted(groups, key=len, reverse=True) for size in group]


def _alike(batches: Sequence[Chunk]) -> list[list[Chunk]]:
    """Batches that can be joined, together; in the order in which their signatures first come."""
    marks = [_mark(batch) for batch in batches]
    if len(set(marks)) > MOST:
        marks = [None] * len(batches)
    runs: list[list[Chunk]] = []
    mark_of: list[Mark] = []
    for batch, mark in zip(batches, marks, strict=True):
        for run, other in zip(runs, mark_of, strict=True):
            if _fit(mark, other) and _joinable(run[0], batch):
                run.append(batch)
                break
        else:
            runs.append([batch])
            mark_of.append(mark)
    return runs


def same_mark(a: Chunk, b: Chunk) -> bool:
    """Whether nothing that holds for all samples of the one is otherwise for the other."""
    return _fit(_mark(a), _mark(b))


def _fit(mark: Mark, other: Mark) -> bool:
    return mark is None or other is None or mark == other


def _mark(batch: Chunk) -> Mark:
    """Inputs beside others that are the same for each sample of a batch, such as the domain that it comes from.

    A forward may look at the first of them only: batches that differ in it are not to be joined. None: can't be told.
    """
    tensors = batch.call.tensors()
    if len(tensors) < 2 or batch.samples < 2:
        return None
    small = [t for t in tensors if 0 < t.numel() <= SHARED * batch.samples and t.shape[:1] == (batch.samples,)]
    return tuple(tuple(t[0].flatten().tolist()) if _all_alike(t) else None for t in small)


def _all_alike(rows: Tensor) -> bool:
    return torch.equal(rows[0], rows[1]) and bool((rows == rows[:1]).all())


def _joinable(a: Chunk, b: Chunk) -> bool:
    # Empty slices: only the signatures are compared.
    none = [Chunk(c.call.map(lambda t: t[:0]), 0, (), None if c.mask is None else c.mask[:0]) for c in (a, b)]
    return joined(none) is not None


def _cut(run: list[Chunk], sizes: list[int], keep: Callable[[Chunk, Sequence[Chunk]], Chunk] | None) -> Iterator[Chunk]:
    """Chunks of exactly these sizes out of consecutive batches; views where one batch is enough."""
    pending = list(run)
    for wanted in sizes:
        taken: list[Chunk] = []
        while wanted:
            head = pending.pop(0)
            if head.samples > wanted:
                head, rest = halves(head, wanted)
                pending.insert(0, rest)
            taken.append(head)
            wanted -= head.samples
        made = joined(taken)
        assert made is not None  # _alike saw to it
        yield made if keep is None or len(taken) == 1 else keep(made, taken)


def halves(chunk: Chunk, at: int) -> tuple[Chunk, Chunk]:
    """The first ``at`` samples, and the rest; views."""
    one, two = split(chunk.call, [at])
    masks = (None, None) if chunk.mask is None else (chunk.mask[:at], chunk.mask[at:])
    return (
        Chunk(one, at, chunk.origin[:at], masks[0]),
        Chunk(two, chunk.samples - at, chunk.origin[at:], masks[1]),
    )


def every_other(chunk: Chunk) -> tuple[Chunk, Chunk]:
    """Every second sample from the first on, and the others; views."""
    return _stepped(chunk, slice(0, None, 2)), _stepped(chunk, slice(1, None, 2))


def _stepped(chunk: Chunk, rows: slice) -> Chunk:
    origin = chunk.origin[rows]
    return Chunk(
        chunk.call.map(lambda t: t[rows]), len(origin), origin, None if chunk.mask is None else chunk.mask[rows]
    )


def part(chunk: Chunk, start: int, count: int) -> Chunk:
    """``count`` samples from ``start`` on; views."""
    rest = halves(chunk, start)[1] if start else chunk
    return first_samples(rest, count)


def probed_at(samples: int) -> int:
    """Where in a first batch those are that are looked at: not the first, which may well be its longest."""
    return amid(min(samples, TARGET), PROBED) if samples > PROBED else 0


def amid(samples: int, count: int) -> int:
    """Where ``count`` of so many samples have others before and behind them, and are no mirror image of themselves."""
    return min(max(1, samples // 3), samples - count)


def joined(taken: Sequence[Chunk]) -> Chunk | None:
    """The samples of several chunks in one; None where they don't fit together."""
    if len(taken) == 1:
        return taken[0]
    call = join([c.call for c in taken])
    masks = [c.mask for c in taken if c.mask is not None]
    if call is None or len(masks) not in (0, len(taken)) or len({m.shape[1:] for m in masks}) > 1:
        return None
    origin = tuple(o for c in taken for o in c.origin)
    return Chunk(call, sum(c.samples for c in taken), origin, torch.cat(masks) if masks else None)


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def of_one_kind(chunks: Sequence[Chunk]) -> bool:
    """Whether code that looks at shapes and plain values, but not into tensors, takes one way with all of them.

    The number of samples may differ, but for 1, which forwards treat as a case of its own. False where inputs are
    objects, whose values can't be told.
    """
    kinds = [(kind_of(c, int(splittable(c))), c.samples == 1) for c in chunks]
    return all(kind is not None and (kind, one) == kinds[0] for kind, one in kinds)


def kind_of(chunk: Chunk, cut: int = 0) -> Any:
    """What of a chunk's inputs can be seen without a look into tensors: shapes from axis ``cut`` on, types, values.

    None where that can't be told.
    """
    return _kind((chunk.call.args, dict(chunk.call.kwargs)), cut)


def _kind(value: Any, cut: int) -> Any:
    if isinstance(value, Tensor):
        return None if value.is_nested else (tuple(value.shape[cut:]), value.dtype)
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if not isinstance(value, (tuple, list)):
        return None
    parts = [_kind(v, cut) for v in value]
    return None if None in parts else parts


def splittable(chunk: Chunk) -> bool:
    """Whether the samples of a chunk lie along the first axis of all of its tensors."""
    return size(chunk.call) == chunk.samples


def first_samples(chunk: Chunk, count: int) -> Chunk:
    """A chunk of the first ``count`` samples."""
    return chunk if chunk.samples <= count else halves(chunk, count)[0]


def mask_at(chunk: Chunk, x: Tensor, site: str) -> Tensor | None:
    """The chunk's mask as it applies to the input (R, C, *positions) of a norm; None where everything counts.

    Raises:
        CalibrationError: the positions of ``x`` are not those of the mask.
    """
    mask = chunk.mask
    if mask is None:
        return None
    positions = tuple(x.shape[2:])
    if tuple(mask.shape) == (x.shape[0], *positions):
        return mask
    if not positions and mask.numel() == x.shape[0]:
        return mask.reshape(-1)
    if not positions and mask.shape[0] == x.shape[0]:  # pooled over positions: padding is gone by then
        return mask.flatten(1).any(1)
    if mask.dim() == 2 and positions and mask.shape[0] == x.shape[0] and positions[0] == mask.shape[1]:
        return mask.reshape(*mask.shape, *(1,) * (len(positions) - 1)).expand(x.shape[0], *positions)
    if not positions and x.shape[0] == int(mask.sum()):  # h[mask]: what is padded was left out before
        return None
    raise CalibrationError(
        f"{site}: its input has the positions {(x.shape[0], *positions)}, the mask {tuple(mask.shape)}",
        hint="give the mask at the resolution of the norms, or leave it out:  mask=None",
    )
