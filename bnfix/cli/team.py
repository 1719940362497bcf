"""Under ``torchrun``: several processes that were given the same command and share its work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import typer

from bnfix.cli.door import INTERRUPTED, TERMINATED, WRONG, Terminated, UsageError
from bnfix.errors import BnfixError, one_line

LAUNCH = "torchrun --nproc-per-node 4 -m bnfix recalibrate …"


class Team:
    """This process alone. ``device`` is the one that this process works on."""

    rank, world = 0, 1

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @property
    def first(self) -> bool:
        """Whether this is the process that reports, and writes files."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong inside goes wrong in every process of the team, so that none waits for another.

        Raises:
            BnfixError: another process failed, or is gone; says what it said.
        """
        yield


class _Torchrun(Team):
    def __init__(self, device: str) -> None:
        import torch.distributed as dist

        super().__init__(device)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    @contextmanager
    def together(self) -> Iterator[None]:
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # noqa: BLE001 -- raised again below, after the others were told
            error = caught
        said = self._exchanged(None if error is None else one_line(error))
        failed = [(rank, text) for rank, text in enumerate(said) if text is not None]
        if failed:
            with suppress(BnfixError):
                self._exchanged(None)  # who leaves at once takes its connections along, and the others hear nothing
        if error is not None:
            raise error
        if failed:
            raise BnfixError(f"rank {failed[0][0]} of {self.world} failed: {failed[0][1]}")

    def _exchanged(self, text: str | None) -> list[str | None]:
        import torch.distributed as dist

        said: list[str | None] = [None] * self.world
        try:
            dist.all_gather_object(said, text)
        except (RuntimeError, ValueError) as error:  # what gloo and nccl raise where a process has died
            raise BnfixError(f"rank {self.rank} of {self.world} lost the others: {one_line(error)}") from error
        return said


@contextmanager
def team(*, device: str, traceback: bool) -> Iterator[Team]:
    """The processes that ``torchrun`` started, by the environment it sets; this one alone without.

    With ``device`` ``cuda`` each has the GPU of its number. The group of processes is gone afterwards in any case.
    An error is told by the first process alone.

    Raises:
        BnfixError: the processes don't find one another, or have no GPU.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2 or not os.environ.get("RANK"):
        yield Team(device)
        return
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise BnfixError("RANK and WORLD_SIZE are set, but this build of torch has no torch.distributed")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.startswith("cuda"):
        if device != "cuda" or torch.cuda.device_count() <= local:
            raise UsageError(
                f"--device {device}: process {local} of this machine needs a GPU of its own, and there are "
                f"{torch.cuda.device_count()}",
                hint="--device cuda, without a number, and at most as many processes as GPUs:  --nproc-per-node gpu",
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    except (ValueError, RuntimeError) as error:
        raise BnfixError(
            f"RANK and WORLD_SIZE are set, but the processes don't find one another: {error}",
            hint=f"{LAUNCH}\nor as one process:  unset RANK WORLD_SIZE",
        ) from error
    found = _Torchrun(device)
    try:
        yield found
    except (BnfixError, KeyboardInterrupt, Terminated) as error:
        if found.first or traceback:
            raise
        raise typer.Exit(_code(error)) from error
    finally:
        dist.destroy_process_group()


def _code(error: BaseException) -> int:
    return {KeyboardInterrupt: INTERRUPTED, Terminated: TERMINATED}.get(type(error), WRONG)
