"""What scenarios for several processes share: who takes part, models, and what one rank met."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from nets import Functional, bits, lived_in, same_bits
from torch import Tensor, nn

import bnfix

WORLDS = (2, 3, 4)
SIZES = {2: (40, 57), 3: (60, 0, 37), 4: (30, 0, 1, 66)}
"""Samples on each rank: uneven, none at all, a single one."""


@dataclass
class Team:
    """The ranks that take part in a scenario, and which of them this is."""

    rank: int
    world: int
    group: Any

    def share(self, x: Tensor, sizes: tuple[int, ...] | None = None, batch: int = 16) -> list[Tensor]:
        """This rank's batches of ``x``; an empty list where it has none."""
        mine = x.split(sizes or SIZES[self.world])[self.rank]
        return list(mine.split(batch)) if len(mine) else []


@dataclass
class Met:
    """What one rank saw: the model afterwards, the report, or what was raised."""

    digest: str
    untouched: bool
    stats: list[tuple[Tensor, Tensor]]
    error: str = ""
    text: str = ""
    report: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


def data(n: int = 97, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, 3, 6, 6), each sample with a mean of its own."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 3, 6, 6, generator=generator) * 2 + torch.randn(n, 1, 1, 1, generator=generator)
    return x.to(dtype)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Four norms, the first of them on the input itself, and dropout."""
    torch.manual_seed(3)
    found = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6), nn.BatchNorm1d(6),
    )  # fmt: skip
    return lived_in(found.to(dtype))


def bright_and_dark(world: int) -> list[list[Tensor]]:
    """Rank 0 has bright batches, the last one dark ones, those between none."""
    x = data(64, torch.float64).abs() + 0.5
    return [list(x[:40].split(8)), *[[] for _ in range(world - 2)], list((-x[40:]).split(8))]


class Iterated(nn.Module):
    """One norm, twice in a row: its statistics depend on themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.bn = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(F.relu(self.bn(self.first(x)))))


class Routes(nn.Module):
    """Bright batches go one way, dark ones another; one of the ways has a functional norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bright, self.dark, self.last = nn.BatchNorm2d(3), Functional(), nn.BatchNorm1d(4)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.bright(x)) if x.flatten()[0] > 0 else self.dark(x)
        return self.last(y.mean((2, 3)))


KEPT: dict[str, Tensor] = {}


class Leaking(nn.Module):
    """Keeps a tensor where chunks that run in turns overwrite it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        KEPT["skip"] = self.conv(x)
        y = F.relu(self.one(KEPT["skip"]))
        return self.two(y + KEPT["skip"])


class Broken(nn.Module):
    """Behind its first norm it does what it was told, with batches that hold the value 1000."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.what = nn.BatchNorm2d(3), nn.BatchNorm2d(3), what

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.two(self.what(y) if bool((x == 1000).any()) else y)


def made(kind: type[nn.Module]) -> nn.Module:
    """The same on all ranks, and in the test."""
    torch.manual_seed(3)
    return lived_in(kind())


def digest(model: nn.Module) -> str:
    """Of every buffer, to the bit."""
    found = hashlib.sha256()
    for name, tensor in model.named_buffers():
        found.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def attempt(team: Team, model: nn.Module, given: Iterable[Any], **options: Any) -> Met:
    """Recalibrate, and say what came of it; afterwards the group must be in working order."""
    before, modes = bits(model), [m.training for m in model.modules()]
    met = Met("", False, [])
    try:
        met.report = bnfix.recalibrate(model, given, **{"group": team.group, **options})
    except BaseException as error:  # noqa: BLE001  # that is what is asked: which, on which rank
        met.error, met.text = type(error).__name__, str(error)
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    met.digest, met.untouched = digest(model), same_bits(model, before)
    met.stats = [
        (b.detach().clone(), v.detach().clone())
        for b, v in zip(
            (t for n, t in model.named_buffers() if n.endswith("running_mean")),
            (t for n, t in model.named_buffers() if n.endswith("running_var")),
            strict=True,
        )
    ]
    if met.report is not None:
        met.report = {
            name: getattr(met.report, name)
            for name in ("layers", "method", "n", "batches", "engine", "changed", "residual", "residual_before",
                         "residual_fresh", "iterations", "output_change", "output_null", "frozen", "never_called",
                         "left_why", "ranks", "notes", "passes")
        }  # fmt: skip
    return met


SCENARIOS: dict[str, Callable[[Team], Met | None]] = {}


def scenario(work: Callable[[Team], Met | None]) -> Callable[[Team], Met | None]:
    SCENARIOS[work.__name__] = work
    return work
