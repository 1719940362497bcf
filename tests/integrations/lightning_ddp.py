"""A fit in two processes: ``python lightning_ddp.py FOLDER``; each writes what it has in the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from integrations.lightning_nets import Module, fit

from bnfix.integrations.lightning import RecalibrateCallback


class Broken:
    """Raises on the first rank only."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        if self.rank == 0:
            raise OSError("disk gone")
        yield from [torch.randn(8, 4)]


class Keep(pl.Callback):  # type: ignore[misc]
    """Writes the outcome, in each process."""

    def __init__(self, good: RecalibrateCallback, bad: RecalibrateCallback, folder: Path) -> None:
        self.good, self.bad, self.folder = good, bad, folder

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        report = self.good.report
        assert report is not None, self.good.error
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        found = {"ranks": report.ranks, "n": report.n, "state": state, "failed": str(self.bad.error)}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    good = RecalibrateCallback(when="always")
    bad = RecalibrateCallback(lambda trainer: Broken(trainer.global_rank), when="always")
    fit(Module(), [bad, good, Keep(good, bad, folder)], folder, strategy="ddp_fork", devices=2)
