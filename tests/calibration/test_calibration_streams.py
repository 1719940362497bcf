"""Data that comes in an order, and decisions that hang on it: streams of batches that differ, halves that are alike."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from calib_nets import batched, residual
from nets import bits, same_bits
from torch import Tensor, nn

import bnfix
from bnfix.errors import CalibrationError

CLASSES, COUNT, LITTLE = 4, 512, 200_000


class Net(nn.Module):
    """Two convolutions with norms, one behind pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.last, self.b3 = nn.Linear(8, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b1(self.c1(x)).relu()
        return self.b3(self.last(self.b2(self.c2(x)).relu().mean((2, 3))))


def labelled() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    y = torch.randint(0, CLASSES, (COUNT,), generator=g)
    return torch.randn(COUNT, 3, 10, 10, generator=g) + 1.5 * y.view(-1, 1, 1, 1), y


def data(order: str, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    x, y = labelled()
    at = y.argsort(stable=True) if order == "sorted" else torch.arange(COUNT)
    return list(zip(batched(x[at], size), batched(y[at], size), strict=True))


def net() -> Net:
    torch.manual_seed(2)
    return Net()


def healthy() -> Net:
    model = net()
    bnfix.recalibrate(model, data("shuffled"))
    return model


@pytest.mark.parametrize("when", ["always", "needed"])
def test_a_stream_of_sorted_data_does_no_harm_unasked(when: Any) -> None:
    """Each batch normalises away what tells it from the others: statistics were .97 σ off, "harmless here"."""
    model = healthy()
    before = bits(model)
    if when == "needed":
        report = bnfix.recalibrate(model, data("sorted"), when=when, memory_budget=LITTLE)
        assert (report.method, report.changed, report.needed) == ("population", False, False)
        assert any("batches differ more than chance" in line for line in report.advice)
    else:
        with pytest.raises(CalibrationError, match="batches differ more than chance") as caught:
            bnfix.recalibrate(model, data("sorted"), memory_budget=LITTLE)
        assert "spill_dir" in str(caught.value.hint)
    assert same_bits(model, before)


@pytest.mark.parametrize("method", ["population", "online"])
def test_who_asks_for_a_stream_of_sorted_data_is_told(method: Any) -> None:
    report = bnfix.recalibrate(net(), data("sorted"), method=method)
    assert report.changed
    assert any("NOT those of evaluation mode" in line for line in report.advice)
    assert not any("harmless" in line for line in report.advice)


def test_sorted_data_is_found_out_before_all_of_it_was_read() -> None:
    read = 0

    def endless() -> Any:
        nonlocal read
        while True:
            for batch in data("sorted", 32):
                read += 1
                yield batch

    with pytest.raises(CalibrationError, match="batches differ"):
        bnfix.recalibrate(net(), endless(), memory_budget=LITTLE)
    assert read < 200


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [4, 32, 64])
def test_shuffled_data_is_not_taken_for_sorted(seed: int, size: int) -> None:
    """Means of few batches differ by chance: B of them by √(2/(B − 1)) of what is expected."""
    x, _ = labelled()
    x = x[torch.randperm(COUNT, generator=torch.Generator().manual_seed(seed))]
    report = bnfix.recalibrate(net(), batched(x[: 5 * size], size), method="population")
    assert not any("batches differ" in line for line in report.advice)


def test_correlated_positions_are_not_taken_for_sorted_batches() -> None:
    """The sample is the unit: images that are each of one colour differ a lot, their batches no more than chance."""
    colours = torch.randn(COUNT, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(-1, -1, 10, 10)
    report = bnfix.recalibrate(net(), batched(colours * 1.0 + 0.01 * labelled()[0], 16), method="population")
    assert not any("batches differ" in line for line in report.advice)


@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("size", [64, COUNT])
def test_whether_it_is_needed_does_not_hang_on_the_order(order: str, size: int) -> None:
    """Halves of sorted data differ as much as classes do: a broken model was left broken."""
    broken = healthy()
    with torch.no_grad():
        broken.c1.weight.mul_(2.0)
        assert broken.c2.bias is not None
        broken.c2.bias.add_(3.0)
    report = bnfix.recalibrate(broken, data(order, size), when="needed")
    assert report.changed
    assert report.output_null is not None
    assert report.output_null < 0.3
    assert max(residual(broken, [x for x, _ in data(order)])) <= 1e-5


@pytest.mark.parametrize("options", [{}, {"method": "population"}])
@pytest.mark.parametrize("count", [2, 3])
def test_what_cannot_be_told_from_chance_is_not_needed(options: dict[str, Any], count: int) -> None:
    model = healthy()
    before = bits(model)
    x, _ = labelled()
    report = bnfix.recalibrate(model, [x[:count]], when="needed", **options)
    assert report.output_null is None
    assert not report.changed
    assert same_bits(model, before)
    assert any("could not be told" in line for line in report.advice)


def test_a_stream_is_compared_with_its_halves_as_well() -> None:
    model = healthy()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.c1.weight.mul_(2.0)
    found = {
        name: bnfix.recalibrate(m, data("shuffled", 32), when="needed", method="population")
        for name, m in (("healthy", model), ("broken", broken))
    }
    assert {name: r.changed for name, r in found.items()} == {"healthy": False, "broken": True}
    for report in found.values():
        assert report.output_null is not None
        assert 0 < report.output_null < 0.5


class Graphs(nn.Module):
    """Nodes of several graphs in one batch, those of one graph alike."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.last = nn.BatchNorm1d(5), nn.Linear(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        found: Tensor = self.last(self.linear(self.norm(x)))
        return found


@pytest.mark.parametrize("seed", range(5))
def test_nodes_of_few_graphs_are_not_taken_for_sorted_samples(seed: int) -> None:
    """The nodes of a graph are alike, and a batch holds four graphs: shuffled batches differ 12 times as much as such
    of independent nodes. They were refused.
    """
    g = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(40):
        graph = torch.arange(4).repeat_interleave(torch.randint(3, 12, (4,), generator=g))
        level = 2 * torch.randn(4, 5, generator=g)
        x = level[graph] + torch.randn(len(graph), 5, generator=g)
        batches.append((x, torch.zeros(2, 7, dtype=torch.long), graph))
    report = bnfix.recalibrate(Graphs(), batches, memory_budget=1000)
    assert report.method in ("population", "online")
    assert report.changed
    assert not any("batches differ" in line for line in report.advice)


def test_a_dry_run_over_sorted_data_measures_and_tells() -> None:
    report = bnfix.recalibrate(healthy(), data("sorted"), memory_budget=LITTLE, dry_run=True)
    assert any("NOT those of evaluation mode" in line for line in report.advice)


def test_a_stream_of_batches_that_differ_heals_what_is_not_finite() -> None:
    """Whatever may be wrong with the new statistics, those of NaN are worse."""
    model = healthy()
    model.b1.running_mean.fill_(float("nan"))
    assert bnfix.recalibrate(model, data("sorted"), when="needed", memory_budget=LITTLE).changed
