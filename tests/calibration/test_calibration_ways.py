"""Forwards whose way through the norms depends on shapes, on plain values, or on what a batch holds together."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calib_nets import FIBERS, residual
from nets import lived_in
from torch import Tensor, nn
from trap_nets import EXACT, Two, as_is, exact, images

import bnfix


def sequences(count: int, steps: int, seed: int = 0) -> list[Tensor]:
    """Batches of 8 sequences (5, steps)."""
    x = torch.randn(count, 5, steps, generator=torch.Generator().manual_seed(seed))
    return list((x * torch.linspace(0.5, 2, count)[:, None, None] + 1).split(8))


class Tail(nn.Module):
    """Takes so long that it is worth leaving out for all chunks but one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(channels, 4000), nn.Linear(4000, 2000)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))  # type: ignore[no-any-return]


class NormAStep(nn.Module):
    """A recurrent cell with a norm for each time step."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.hidden = nn.Linear(5, 6), nn.Linear(6, 6)
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(9))
        self.tail = Tail(6)

    def forward(self, x: Tensor) -> Any:
        h = torch.zeros(len(x), 6)
        for t in range(x.shape[2]):
            h = torch.tanh(self.norms[t](self.inp(x[:, :, t]) + self.hidden(h)))
        return self.tail(h)


@pytest.mark.parametrize("forward", [None, as_is], ids=["joined", "as they are"])
def test_longer_sequences_are_not_cut_where_the_first_ended(forward: Any) -> None:
    short, long = sequences(64, 4), sequences(16, 9, seed=1)
    batches = [*short[:4], *long, *short[4:]]
    report = exact(NormAStep(), batches, forward)
    assert not report.never_called
    assert report.engine == FIBERS  # nothing keeps the chunks from being parked
    assert exact(NormAStep(), [*long, *sequences(40, 6, seed=2), *short], forward).engine == FIBERS


def test_a_norm_that_one_domain_alone_has_behind_the_others() -> None:
    class Domain(Two):
        def __init__(self) -> None:
            super().__init__()
            self.extra, self.tail = nn.BatchNorm2d(4), Tail(144)

        def forward(self, x: Tensor, domain: str) -> Any:  # type: ignore[override]
            y = super().forward(x)
            return self.tail((self.extra(y) if domain == "extra" else y).flatten(1))

    batches = [{"x": b, "domain": "extra" if i == 2 else "plain"} for i, b in enumerate(images())]
    model = lived_in(Domain())
    report = bnfix.recalibrate(model, batches)
    assert max(residual(model, batches, lambda m, b: m(**b))) <= EXACT
    assert not report.left
    assert not report.notes


def test_what_leaks_with_inputs_of_one_kind_alone() -> None:
    kept: dict[str, Tensor] = {}

    class Leaks(Two):
        def forward(self, x: Tensor, domain: str) -> Any:  # type: ignore[override]
            y = self.conv1(x)
            if domain == "leak":
                kept["y"] = y
            z = F.relu(self.bn1(y))
            return self.second(z + kept["y"] if domain == "leak" else z)

    batches = [{"x": b, "domain": "leak" if i % 4 == 3 else "plain"} for i, b in enumerate(images())]
    model = lived_in(Leaks())
    feed = lambda m, b: m(**b)  # noqa: E731
    report = bnfix.recalibrate(model, batches, forward=feed)
    assert max(residual(model, batches, feed)) <= EXACT
    assert report.engine == "plain passes"


@pytest.mark.parametrize("known", [True, False])
def test_a_way_that_takes_so_many_samples_together(known: bool) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Two(3), Two(3)

        def forward(self, x: Tensor) -> Any:
            y = self.one(x)
            bright = y.mean((1, 2, 3)) > 0.3
            many = len(torch.where(bright)[0]) if known else sum(ctypes.string_at(bright.data_ptr(), len(bright)))
            return self.two(y) if many > 5 else F.relu(y)

    torch.manual_seed(0)
    report = exact(Many(), images())
    assert not report.never_called
    if known:
        assert "the way through the model may depend on what is in a batch" in report.why
    else:  # found only when samples were run again alone
        assert any("samples go other ways together than alone" in line for line in report.notes)
