"""Several processes that hold shards of the same data: every figure is exchanged, all end with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from bnfix.errors import CalibrationError
from bnfix.stats import Moments, merge_all


class Ranks:
    """This process alone."""

    world, rank = 1, 0

    def all_of(self, value: Any) -> list[Any]:
        """What each rank says (anything that can be pickled), in rank order."""
        return [value]

    def numbers(self, values: Sequence[int]) -> list[list[int]]:
        """The same for a few integers: cheaper."""
        return [list(values)]

    def merged(self, moments: Moments) -> Moments:
        """The moments of all ranks, merged in rank order; the same bits on each."""
        return moments

    def agree(self, error: BaseException | None) -> None:
        """All ranks go on, or none does.

        Raises:
            BaseException: this rank's own error.
            CalibrationError: another rank's; names it.
        """
        if error is not None:
            raise error


class Group(Ranks):
    """The ranks of a ``torch.distributed`` process group."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        nccl = "nccl" in str(dist.get_backend(group))
        self.device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def all_of(self, value: Any) -> list[Any]:
        """What each rank says, in rank order."""
        found: list[Any] = [None] * self.world
        self._guarded(lambda: dist.all_gather_object(found, value, group=self.group))
        return found

    def numbers(self, values: Sequence[int]) -> list[list[int]]:
        """The same for a few integers."""
        return [t.tolist() for t in self._gather(torch.tensor(list(values), dtype=torch.int64))]

    def merged(self, moments: Moments) -> Moments:
        """The moments of all ranks, merged in rank order."""
        home, channels = moments.mean.device, moments.mean.numel()
        shards = self._gather(moments.packed())
        return merge_all([Moments.unpack(shard.to(home), channels) for shard in shards])

    def agree(self, error: BaseException | None) -> None:
        """All ranks go on, or none does."""
        said = self.all_of(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [(rank, text) for rank, text in enumerate(said) if text is not None]
        if failed:
            rank, text = failed[0]
            raise CalibrationError(f"rank {rank} of {self.world} failed, so every rank's model is as it was: {text}")

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        mine = tensor.to(self.device).contiguous()
        found = [torch.empty_like(mine) for _ in range(self.world)]
        self._guarded(lambda: dist.all_gather(found, mine, group=self.group))
        return found

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except (RuntimeError, ValueError) as error:  # a rank that died: gloo and nccl say so in RuntimeErrors
            raise CalibrationError(
                f"rank {self.rank} of {self.world} lost the others; the model is as it was: {error}",
                hint="every rank has to call recalibrate; for one rank alone:  group=False",
            ) from error


def ranks_of(group: Any) -> Ranks:
    """The ranks that take part: those of ``group``, of the default group where one is set up, or this process alone.

    ``False`` means this process alone in any case.
    """
    if group is False or not dist.is_available() or not dist.is_initialized():
        return Ranks()
    found = Group(group)
    return found if found.world > 1 else Ranks()
