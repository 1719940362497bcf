"""The share of each process in the data: none dropped, none read twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler

from bnfix.formats.data import Batches


def shard(data: Iterable[Any], rank: int, world: int) -> tuple[Iterable[Any], str]:
    """What process ``rank`` of ``world`` reads of ``data``, and a line for the reader.

    A DataLoader over a dataset with a length becomes one over every ``world``-th sample, with the same batch size,
    workers and collation; samples that it would drop at the end of an ordered pass (``drop_last``) stay dropped,
    no others. Its DistributedSampler is left out: that repeats samples until the shares are even. Of a list
    of batches every ``world``-th is taken, of anything else as well, but there every process loads all batches, and
    they have to come in the same order on each. A share may be empty.

    Raises:
        ValueError: there is no such rank.
    """
    if not 0 <= rank < world:
        raise ValueError(f"there is no rank {rank} among {world}")
    if world == 1:
        return data, ""
    if isinstance(data, (list, tuple)):
        own = data[rank::world]
        return own, f"{len(own):,} of {len(data):,} batches on rank {rank}"
    if isinstance(data, DataLoader) and _is_plain(data):
        count = _kept(data)
        mine = range(rank, count, world)
        return _loader(data, mine), f"{len(mine):,} of {count:,} samples on rank {rank}"
    note = f"one batch in {world} on rank {rank}; each process loads all of them, and has to in the same order"
    if hasattr(data, "__next__"):  # used up by one pass, and so is its share
        return itertools.islice(data, rank, None, world), note
    return Batches(lambda: itertools.islice(data, rank, None, world)), note


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether the loader's batches follow from its dataset and settings alone."""
    samplers = (SequentialSampler, RandomSampler, DistributedSampler)
    sampler = loader.sampler
    return (
        type(loader).__iter__ is DataLoader.__iter__
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(loader.dataset, "__len__")
        and type(sampler) in samplers
        and (loader.batch_sampler is None or type(loader.batch_sampler) is BatchSampler)
        and not (isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != _size(loader)))
    )


def _size(loader: DataLoader[Any]) -> int:
    dataset: Any = loader.dataset
    return len(dataset)


def _kept(loader: DataLoader[Any]) -> int:
    """How many samples an ordered pass gives; a shuffled one drops others each time, so none are dropped for good."""
    count = _size(loader)
    if loader.drop_last and loader.batch_size and isinstance(loader.sampler, SequentialSampler):
        return count // loader.batch_size * loader.batch_size
    return count


def _loader(loader: DataLoader[Any], indices: Sequence[int]) -> DataLoader[Any]:
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
        }
    return DataLoader(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        # RandomSampler refuses an empty dataset, which a share may be
        shuffle=isinstance(loader.sampler, RandomSampler) and len(indices) > 0,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
        **workers,
    )
