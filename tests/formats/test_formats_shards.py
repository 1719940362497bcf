"""Shares of the data for several processes: none dropped, none read twice, none padded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from bnfix.formats import load_data, shard
from bnfix.formats.data import Batches
from bnfix.formats.images import ImageLoader, Images, ImageTransform

SAMPLES = TensorDataset(torch.arange(23))


def doubled(samples: list[tuple[Tensor]]) -> Tensor:
    """A collation that shows."""
    return torch.stack([2 * s[0] for s in samples])


def seen(data: Any) -> list[int]:
    found: list[int] = []
    for batch in data:
        found += (batch[0] if isinstance(batch, (list, tuple)) else batch).reshape(-1).tolist()
    return found


def all_seen(data: Any, world: int) -> list[int]:
    """What all ranks together see, in order."""
    return sorted(i for rank in range(world) for i in seen(shard(data, rank, world)[0]))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(23)


class Once(DataLoader[Any]):
    """A loader that iterates in a way of its own."""

    def __iter__(self) -> Any:
        yield from torch.arange(23).split(4)


def weighted() -> DataLoader[Any]:
    return DataLoader(SAMPLES, 4, sampler=WeightedRandomSampler([1.0] * 23, 23, generator=_seeded()))


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("world", [2, 3, 5, 40])
@pytest.mark.parametrize(
    "data",
    [
        list(torch.arange(23).split(4)),
        torch.arange(23).split(4),
        DataLoader(SAMPLES, 4),
        DataLoader(SAMPLES, 4, shuffle=True),
        DataLoader(SAMPLES, 4, shuffle=True, drop_last=True),  # which ones it drops is chance: none for good
        DataLoader(SAMPLES, batch_size=None),
        DataLoader(SAMPLES, 4, sampler=DistributedSampler(SAMPLES, 4, 1)),
        DataLoader(Stream(), 4),
        DataLoader(SAMPLES, batch_sampler=[[i, i + 1] for i in range(0, 22, 2)] + [[22]]),
        Once(SAMPLES, 4),
        Batches(lambda: iter(torch.arange(23).split(4))),
    ],
    ids=["list", "tuple", "loader", "shuffled", "shuffled, drop_last", "no batches", "DistributedSampler", "stream",
         "batch_sampler", "own loader", "Batches"],
)  # fmt: skip
def test_shares_are_the_whole_and_nothing_twice(data: Any, world: int) -> None:
    assert all_seen(data, world) == list(range(23))
    share, _ = shard(data, world - 1, world)
    assert sorted(seen(share)) == sorted(seen(share))  # and can be gone through again
    assert shard(data, 0, 1) == (data, "")


def test_shares_of_one_pass_data() -> None:
    parts = [seen(shard(iter(torch.arange(23).split(4)), rank, 3)[0]) for rank in range(3)]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == list(range(23))
    assert parts[1] == [4, 5, 6, 7, 16, 17, 18, 19]


def test_ordered_pass_that_drops_its_end_drops_just_that() -> None:
    loader = DataLoader(SAMPLES, 4, drop_last=True)
    whole = seen(loader)
    assert len(whole) == 20
    assert all_seen(loader, 3) == whole


def test_shares_keep_the_settings_of_the_loader() -> None:
    loader = DataLoader(SAMPLES, 5, shuffle=True, collate_fn=doubled, generator=_seeded())
    share, note = shard(loader, 1, 2)
    assert note == "11 of 23 samples on rank 1"
    assert isinstance(share, DataLoader)
    assert isinstance(share.sampler, RandomSampler)
    assert [len(b) for b in share] == [5, 5, 1]
    assert sorted(seen(share)) == [2 * i for i in range(1, 23, 2)]
    with_workers = DataLoader(SAMPLES, 5, num_workers=1, prefetch_factor=3, persistent_workers=True, timeout=60)
    other, _ = shard(with_workers, 0, 2)
    assert isinstance(other, DataLoader)
    kept = ("num_workers", "prefetch_factor", "persistent_workers", "timeout", "batch_size")
    assert [getattr(other, k) for k in kept] == [getattr(with_workers, k) for k in kept]


def test_samplers_with_an_intention_keep_it() -> None:
    with_replacement = [shard(weighted(), rank, 2) for rank in range(2)]
    whole = [b[0].tolist() for b in weighted()]
    assert [b[0].tolist() for b in with_replacement[0][0]] == whole[::2]
    assert [b[0].tolist() for b in with_replacement[1][0]] == whole[1::2]
    assert "has to in the same order" in with_replacement[0][1]
    few = DataLoader(SAMPLES, 4, sampler=RandomSampler(SAMPLES, num_samples=6, generator=_seeded()))
    assert len(seen(shard(few, 0, 1)[0])) == 6
    assert "one batch in 2" in shard(few, 0, 2)[1]


def test_lists_say_how_many_batches() -> None:
    assert shard([1, 2, 3], 1, 2) == ([2], "1 of 3 batches on rank 1")
    assert shard([1], 1, 2) == ([], "0 of 1 batches on rank 1")
    assert shard([1], 0, 1) == ([1], "")


def test_images_are_shared_by_sample() -> None:
    images = Images([f"{i}.png" for i in range(9)], ImageTransform((8, 8), (8, 8)))
    share, note = shard(ImageLoader(images, 4, 0), 2, 4)
    assert note == "2 of 9 samples on rank 2"
    assert len(share.dataset) == 2  # type: ignore[attr-defined]


def test_batches_of_arrays_are_shared(tmp_path: Any) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", np.arange(23, dtype=np.int64))
    data = load_data(tmp_path / "x.npy", batch_size=4)
    assert all_seen(data, 4) == list(range(23))


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_rank_that_does_not_exist(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="there is no rank"):
        shard([1], rank, world)
