"""Under ``torchrun``: several processes that were given the same command and share its work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from bnfix.cli.door import INTERRUPTED, TERMINATED, WRONG, Terminated
from bnfix.errors import BnfixError

if TYPE_CHECKING:
    from bnfix.calibration.ranks import Ranks

LAUNCH = "torchrun --nproc-per-node 4 -m bnfix recalibrate …"


class Team:
    """This process alone."""

    rank, world, local = 0, 1, 0

    @property
    def first(self) -> bool:
        """Whether this is the process that reports, and writes files."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong inside goes wrong in every process of the team, so that none waits for another.

        Raises:
            CalibrationError: another process failed; says what it said.
        """
        yield


class _Torchrun(Team):
    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.rank, self.world = ranks.rank, ranks.world
        self.local = int(os.environ.get("LOCAL_RANK", "0"))

    @contextmanager
    def together(self) -> Iterator[None]:
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # noqa: BLE001 -- raised again by agree, after the others were told
            error = caught
        self._ranks.agree(error)


@contextmanager
def team(*, cuda: bool, traceback: bool) -> Iterator[Team]:
    """The processes that ``torchrun`` started, by the environment it sets; this one alone without.

    The group of processes is gone afterwards in any case. An error is told by the first process alone.

    Raises:
        BnfixError: the processes don't find one another.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2 or not os.environ.get("RANK"):
        yield Team()
        return
    import torch.distributed as dist

    from bnfix.calibration.ranks import ranks_of

    if not dist.is_available():
        raise BnfixError("RANK and WORLD_SIZE are set, but this build of torch has no torch.distributed")
    try:
        dist.init_process_group("nccl" if cuda else "gloo")
    except (ValueError, RuntimeError) as error:
        raise BnfixError(
            f"RANK and WORLD_SIZE are set, but the processes don't find one another: {error}",
            hint=f"{LAUNCH}\nor as one process:  unset RANK WORLD_SIZE",
        ) from error
    found = _Torchrun(ranks_of(None))
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
