"""A fit in two processes: ``python lightning_ddp.py FOLDER``; each writes what it has in the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from integrations.lightning_nets import Module, fit
from torch import Tensor

from bnfix.integrations.lightning import RecalibrateCallback


class Broken:
    """Raises on the first rank only."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        if self.rank == 0:
            raise OSError("disk gone")
        yield from [torch.randn(8, 4)]


def raising(trainer: Any) -> Any:
    """A function of the trainer that raises on the second rank only."""
    if trainer.global_rank == 1:
        raise FileNotFoundError("rank1.npy")
    return [torch.randn(8, 4)]


class Scaling(Module):
    """On the second rank, training_step feeds the network with something else than the batches as they come."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return super().training_step((x * 10 if self.global_rank == 1 else x, y), index)


class Keep(pl.Callback):  # type: ignore[misc]
    """Writes the outcomes, in each process."""

    def __init__(self, folder: Path, **callbacks: RecalibrateCallback) -> None:
        self.folder, self.callbacks = folder, callbacks

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        reports = {name: c.report for name, c in self.callbacks.items()}
        found = {
            "state": {name: value.clone() for name, value in pl_module.state_dict().items()},
            "errors": {name: str(c.error) for name, c in self.callbacks.items()},
            "ranks": {name: r and (r.ranks, r.n) for name, r in reports.items()},
        }
        torch.save(found, self.folder / f"{'-'.join(self.callbacks)}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    bad = RecalibrateCallback(lambda trainer: Broken(trainer.global_rank), when="always")
    worse = RecalibrateCallback(raising, when="always")
    good = RecalibrateCallback(when="always")
    keep = Keep(folder, bad=bad, worse=worse, good=good)
    fit(Module(), [bad, worse, good, keep], folder, strategy="ddp_fork", devices=2)
    unlike = RecalibrateCallback(when="always")
    fit(Scaling(), [unlike, Keep(folder, unlike=unlike)], folder, strategy="ddp_fork", devices=2)
