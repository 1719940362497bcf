"""Calls of one module that do not wait for one another, taken apart: one confirmed run instead of dozens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calib_nets import distances
from nets import bits, lived_in, same_bits
from torch import Tensor, nn
from trap_nets import EXACT

import bnfix


class Encoder(nn.Module):
    """Six norms, one behind the other, that feel what those before them do; counts its calls."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n in range(6):
            layers += [nn.Conv2d(8 if n else channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))  # type: ignore[no-any-return]


class Siamese(nn.Module):
    """One encoder for both inputs, a head of its own for the pair."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))  # type: ignore[no-any-return]


class TwoTowers(nn.Module):
    """Two encoders, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Encoder(), Encoder()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([self.left(a), self.left(b), self.right(b), self.right(a)], 1)


class Chained(nn.Module):
    """The second call takes what the first gives: it can't be taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(torch.tanh(self.encoder(x)))  # type: ignore[no-any-return]


def pairs(size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Forty pairs, whose second is brighter."""
    a, b = torch.randn(40, 3, 12, 12), torch.randn(40, 3, 12, 12) * 1.5 + 1
    return [*zip(a.split(size), b.split(size), strict=True)]


def views(model: nn.Module, batch: Any) -> list[Tensor]:
    """The model, once for each view."""
    return [model(v) for v in batch]


def spread(model: nn.Module, batch: Any) -> object:
    """The model with both inputs."""
    return model(*batch)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any] | None]] = {
    "a call for each view": (Encoder, views),
    "an encoder inside": (Siamese, None),
    "an encoder inside, batches as they are": (Siamese, spread),
    "two encoders": (TwoTowers, None),
}


@pytest.mark.parametrize("case", CASES)
def test_calls_that_do_not_wait_for_one_another_are_settled_by_one_run(case: str) -> None:
    torch.manual_seed(0)
    make, forward = CASES[case]
    model, batches = lived_in(make()), pairs()
    report = bnfix.recalibrate(model, batches, forward=forward)
    assert report.iterations == 1
    assert report.forwards < 4  # collected, brought through, confirmed; and a part replayed
    assert any("iterated once: settled" in note for note in report.notes)
    assert max(max(d) for d in distances(model, batches, forward or spread).values()) <= EXACT
    sites = [layer for layer in report.layers if layer.site.endswith("layers.1")]
    assert len(sites) in (2, 4)  # each call by itself, as without
    assert abs(sites[0].mean[0] - sites[1].mean[0]) > 0.01


@pytest.mark.parametrize("options", [{"memory_budget": 200_000, "method": "staged"}, {"spill_dir": "here"}])
def test_without_memory_for_all_calls_at_once(options: dict[str, Any], tmp_path: Any) -> None:
    torch.manual_seed(0)
    if "spill_dir" in options:
        options = {"spill_dir": tmp_path}
    model, batches = lived_in(Encoder()), pairs()
    report = bnfix.recalibrate(model, batches, forward=views, **options)
    assert report.iterations > 1
    used = batches[: report.n // 8]
    assert max(max(d) for d in distances(model, used, views).values()) <= 10 * EXACT


def test_calls_that_take_what_earlier_ones_give_are_iterated() -> None:
    torch.manual_seed(0)
    model, batches = lived_in(Chained()), [*torch.randn(48, 6).split(8)]
    report = bnfix.recalibrate(model, batches)
    assert report.iterations > 1
    assert report.forwards < report.iterations + 1.5  # nothing was collected
    assert max(max(d) for d in distances(model, batches).values()) <= 10 * EXACT


class Depends(Siamese):
    """The second call's input depends on another norm, which only one of the runs has settled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a, self.stem(b))


def test_a_start_that_is_not_the_end() -> None:
    torch.manual_seed(0)
    model, batches = lived_in(Depends()), pairs()
    report = bnfix.recalibrate(model, batches)
    assert report.iterations > 1
    assert max(max(d) for d in distances(model, batches, spread).values()) <= 10 * EXACT


def test_nothing_is_left_of_it_where_a_forward_fails() -> None:
    torch.manual_seed(0)
    model, batches = lived_in(Encoder()), pairs()
    before = bits(model)

    def forward(m: nn.Module, batch: Any) -> list[Tensor]:
        if batch is batches[3] or batch[0].equal(batches[3][0]):
            raise ValueError("the fourth batch")
        return views(m, batch)

    with pytest.raises(bnfix.errors.CalibrationError, match="batch 3: the forward failed: ValueError"):
        bnfix.recalibrate(model, batches, forward=forward)
    assert same_bits(model, before)
    assert all(not m._forward_pre_hooks for m in model.modules())
