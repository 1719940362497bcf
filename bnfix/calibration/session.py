"""What one recalibration works with, from beginning to end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bnfix.calibration.listening import Stats
from bnfix.calibration.norms import Norms
from bnfix.calibration.own_state import OwnState
from bnfix.calibration.ranks import Ranks
from bnfix.calibration.reading import Mask
from bnfix.calibration.spill import Spiller
from bnfix.graph import Outside, Replicator
from bnfix.graph.writing import Saved, put, put_back
from bnfix.running import free_bytes
from bnfix.running.call import Forward

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What was asked for; the meanings are those of :func:`bnfix.recalibrate`.

    ``settled``: norms with several call sites are iterated until they move by less (σ, or a part of the variance); 0:
    to rounding.
    """

    method: str = "auto"
    when: str = "always"
    forward: Forward | None = None
    mask: Mask = None
    max_samples: int | None = None
    tol: float | None = None
    certify: str | None = "replay"
    memory_budget: int | None = None
    spill_dir: str | os.PathLike[str] | None = None
    unbiased: bool = True
    dry_run: bool = False
    settled: float = 0.0


@dataclass
class Session:
    """The model (in evaluation mode, inside ``preserved``), its norms, the data and who takes part.

    ``advice`` is the hint where the forward fails on the data.
    """

    model: nn.Module
    norms: Norms
    data: Iterable[Any]
    options: Options
    ranks: Ranks
    say: Say
    replicate: Replicator
    device: torch.device
    outside: Outside
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    advice: str = ""

    start: dict[int, Stats] = field(default_factory=dict)
    """Where iterated norms start, if that is known."""
    draws: bool = False
    """Whether a forward draws random numbers."""
    remembers: str = ""
    """What a forward changes that matters to the next one; empty if nothing does."""

    shares: bool = False
    """Whether a forward changes something outside of the model, which chunks have in common."""

    reads: bool = False
    """Whether the way through the model may depend on what is in a batch."""

    def __post_init__(self) -> None:
        """Keep what a forward may write to besides."""
        statistics = {id(t) for n in self.norms for t in (n.mean, n.var, n.tracked)}
        others = [b for b in self.model.buffers() if id(b) not in statistics and not (b.is_meta or is_lazy(b))]
        self._others = [Saved.of(b) for b in others]
        self._own = OwnState(self.model)

    def changed(self, ran: nn.Module) -> list[str]:
        """What the first run changed, on the model or a replica, that the next may look at: in it, buffers, outside."""
        found = self._own.changed(ran)
        if any(saved.changed for saved in self._others):
            found.append("buffers")
        outside = self.outside.settle()
        self.shares = self.shares or bool(outside)
        return found + outside

    def rewind(self) -> None:
        """Give buffers that are no statistics (a counter, a moving average) the values that they came with.

        Where a forward ``remembers``, what it keeps as well.
        """
        put_back(self._others)
        if self.remembers:
            self._own.rewind()
            self.outside.rewind()

    @cached_property
    def spiller(self) -> Spiller | None:
        """Takes inputs and activations into files, where that was asked for."""
        return None if self.options.spill_dir is None else Spiller(self.options.spill_dir)

    @property
    def budget(self) -> int:
        """Bytes for what parked samples hold, as asked for, or a quarter of what is free now."""
        return self.options.memory_budget or free_bytes(self.device) // 4

    @property
    def coarse(self) -> bool:
        """Whether results depend visibly on the batch size: half precision, accelerators with a choice of kernels."""
        return self.norms.half or self.device.type != "cpu"

    @contextmanager
    def using(self, stats: Mapping[int, Stats]) -> Iterator[None]:
        """The model with these statistics in its buffers; inside only."""
        written = [(norm, stats[norm.key]) for norm in self.norms if norm.key in stats]
        kept = [(n.mean.detach().clone(), n.var.detach().clone()) for n, _ in written]
        try:
            for norm, (mean, var) in written:
                put(norm.mean, mean)
                put(norm.var, var)
            yield
        finally:
            for (norm, _), (mean, var) in zip(written, kept, strict=True):
                put(norm.mean, mean)
                put(norm.var, var)
