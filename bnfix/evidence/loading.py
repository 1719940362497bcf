"""A bounded part of a loader, read once: evenly spread where that can be, a few samples of many batches.

What is read has to stand for all of the data. A loader in a fixed order is often sorted, and its first batches are of
one class: where its batches can be reached by number, every k-th one is read. Large batches give a few samples each,
drawn at random (the first ones of a batch may be of one class too), so that there are enough batches to compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from bnfix.calibration.chunks import Chunk, splittable
from bnfix.calibration.reading import Mask, Reader, length
from bnfix.errors import CalibrationError
from bnfix.running.call import Forward
from bnfix.types import LoaderFacts

Say = Callable[[str], None]

SAMPLES = 2048
"""Samples that are measured, if nobody says otherwise: means are known to .02 σ then."""
BATCHES = 24
"""Batches that are wanted where there are as many: BN304 needs 20."""
LEAST = 8
"""Samples that a batch gives at least."""
APART = 256
"""Batches that are read at most where they can't be put together: each is run by itself, several times."""
READ = 6
"""Samples are read at most for each one that is wanted: enough batches of 512, where 2,048 samples are."""
BYTES = 256 << 20
"""Bytes of inputs that are kept: some 400 images of 224 px."""


@dataclass(frozen=True)
class Sample:
    """What was read: ``chunks``, one a batch, and how many samples each of these batches had (``sizes``).

    ``step`` is 3 where every third batch was read, ``whole`` says that nothing was left out. ``one_label`` is set where
    all labels that were met are the same. ``used`` says what of a batch went into the model.
    """

    chunks: tuple[Chunk, ...]
    sizes: tuple[int, ...]
    loader: LoaderFacts
    whole: bool
    step: int = 1
    one_label: bool = False
    used: str = ""

    @property
    def samples(self) -> int:
        """Samples that were kept."""
        return sum(c.samples for c in self.chunks)

    @property
    def stands_for_all(self) -> bool:
        """Whether it can't be the beginning of something sorted."""
        return self.whole or self.step > 1 or bool(self.loader.shuffles)

    @property
    def cut(self) -> bool:
        """Whether batches gave only some of their samples."""
        return any(c.samples < size for c, size in zip(self.chunks, self.sizes, strict=True))

    def seen(self) -> str:
        """For a person: ``512 of 50,000 samples, 16 batches``."""
        total = None if self.whole else self.loader.dataset
        if total is None and self.loader.batches is not None and not self.whole:
            total = self.loader.batches * max(self.sizes)
            of = f" of about {total:,}"
        else:
            of = f" of {total:,}" if total is not None and total != self.samples else ""
        every = f", every {_th(self.step)} one" if self.step > 1 else ""
        part = ", a part of each" if self.cut else ""
        return f"{self.samples:,}{of} samples, {len(self.chunks):,} batches{every}{part}"


def read(
    data: Iterable[Any],
    model: nn.Module,
    forward: Forward | None = None,
    mask: Mask = None,
    max_samples: int | None = None,
    takes: Callable[[Chunk], bool] = lambda _chunk: True,
    say: Say = lambda _line: None,
) -> Sample:
    """Read ``data`` once, as far as it takes. Generators of a ``DataLoader`` are put back as they were.

    ``takes`` says whether the model takes a part of a batch.

    Raises:
        CalibrationError: the loader raised or holds nothing, a batch is ambiguous, or holds NaN or Inf.
        TypeError: ``data`` is nothing to iterate over.
    """
    wanted = SAMPLES if max_samples is None else max_samples
    said = _facts(data)
    with _generators(data):
        source, step = _spread(data, wanted, APART if forward is not None else wanted)
        reader = Reader(source, model, forward, mask)
        chunks, sizes = _kept(reader, wanted, length(source), takes, say)
    if not chunks:
        raise CalibrationError("the data holds no batch", hint="a generator that was used up gives nothing any more")
    whole = reader.ended and step == 1 and reader.samples == sum(c.samples for c in chunks)
    one_label = len(reader.labels) == 1 and reader.pure == reader.batches
    return Sample(tuple(chunks), tuple(sizes), said, whole, step, one_label, reader.used)


def _kept(
    reader: Reader, wanted: int, batches: int | None, takes: Callable[[Chunk], bool], say: Say
) -> tuple[list[Chunk], list[int]]:
    chunks: list[Chunk] = []
    sizes: list[int] = []
    room, kept, quota = float(BYTES), 0, wanted
    while kept < wanted and reader.samples < READ * wanted:
        if len(chunks) >= APART and not splittable(chunks[0]):
            break
        chunk = reader.next()
        if chunk is None:
            break
        if not chunks:
            expected = max(BATCHES, wanted // chunk.samples)
            expected = max(1, min(expected, batches or expected, READ * wanted // chunk.samples))
            quota = max(LEAST, math.ceil(wanted / expected))
            within = BYTES / expected / max(1.0, chunk.call.nbytes / chunk.samples)
            quota = max(LEAST, min(quota, int(within)))
            if quota < chunk.samples and splittable(chunk) and not takes(_some(chunk, quota, 1)):
                quota = chunk.samples
        sizes.append(chunk.samples)
        part = _some(chunk, quota, reader.batches)
        chunks.append(part)
        kept += part.samples
        room -= part.call.nbytes
        if room < 0 and len(chunks) > 1:
            break
        if reader.batches % 8 == 0:
            say(f"reading the data: {kept:,} samples of {reader.batches} batches")
    return chunks, sizes


def _some(chunk: Chunk, count: int, seed: int) -> Chunk:
    """``count`` samples of a chunk, drawn without the generators of anybody else; all where it can't be cut."""
    if chunk.samples <= count or not splittable(chunk):
        return chunk
    drawn = torch.randperm(chunk.samples, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    call = chunk.call.map(lambda t: t[drawn.to(t.device)])
    mask = None if chunk.mask is None else chunk.mask[drawn.to(chunk.mask.device)]
    return Chunk(call, count, chunk.origin[:count], mask)


def _facts(data: Iterable[Any]) -> LoaderFacts:
    """What a loader says of itself."""
    if not isinstance(data, DataLoader):
        return LoaderFacts(batches=length(data))
    sampler = data.sampler
    inner = getattr(data.batch_sampler, "sampler", None) if data.batch_size is None else sampler
    dataset = length(inner) if inner is not None else None
    if dataset is None or isinstance(data.dataset, IterableDataset):
        dataset = length(data.dataset)
    shuffles = True if isinstance(inner, RandomSampler) else False if isinstance(inner, SequentialSampler) else None
    size, drops = data.batch_size, data.drop_last
    if size is None and isinstance(data.batch_sampler, BatchSampler):
        size, drops = data.batch_sampler.batch_size, data.batch_sampler.drop_last
    stream = isinstance(data.dataset, IterableDataset)
    known = data.num_workers < 2 if stream else type(data.batch_sampler) is BatchSampler  # each worker has a tail
    return LoaderFacts(length(data), size, drops if known else None, dataset, shuffles)


def _spread(data: Iterable[Any], wanted: int, most: int) -> tuple[Iterable[Any], int]:
    """Every k-th batch of data in a fixed order whose batches can be reached by number, else the data itself; and k.

    ``most`` batches are enough.
    """
    if isinstance(data, (list, tuple)):
        step = _step(len(data), _size_of(data[0]) if data else 1, wanted, most)
        return (data[::step], step) if step > 1 else (data, 1)
    if type(data) is not DataLoader or type(data.batch_sampler) is not BatchSampler:
        return data, 1
    if not isinstance(data.sampler, SequentialSampler) or isinstance(data.dataset, IterableDataset):
        return data, 1
    batches = list(data.batch_sampler)
    step = _step(len(batches), len(batches[0]) if batches else 1, wanted, most)
    if step == 1:
        return data, 1
    return _numbered(data, batches[::step]), step


def _step(batches: int, size: int, wanted: int, most: int) -> int:
    return max(1, batches // max(BATCHES, min(most, math.ceil(wanted / max(1, size)))))


def _size_of(batch: Any) -> int:
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else (batch,)
    return next((len(v) for v in values if isinstance(v, torch.Tensor) and v.dim()), 1)


def _numbered(data: DataLoader[Any], batches: Sequence[Sequence[int]]) -> DataLoader[Any]:
    """The same loader, with these batches alone."""
    return DataLoader(
        data.dataset,
        batch_sampler=list(map(list, batches)),
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        timeout=data.timeout,
        worker_init_fn=data.worker_init_fn,
        multiprocessing_context=data.multiprocessing_context,
    )


@contextmanager
def _generators(data: Iterable[Any]) -> Iterator[None]:
    """The random generators that a ``DataLoader`` and its samplers hold stay as they were."""
    holders: list[Any] = []
    if isinstance(data, DataLoader):
        holders = [data, data.sampler, data.batch_sampler, getattr(data.batch_sampler, "sampler", None)]
    found = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)}
    states = [(g, g.get_state()) for g in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _th(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 not in (11, 12, 13) else "th"
    return f"{number}{ending}"
