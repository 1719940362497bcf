"""Forwards that remember: what a norm sees depends on the calls before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from calib_nets import FIBERS, residual
from nets import bits, lived_in, same_bits
from torch import Tensor
from trap_nets import EXACT, PLAIN, Two, exact, images

import bnfix
from bnfix.errors import CalibrationError

CALLS = 0
COUNTS = {"calls": 0}


class CountsInGlobal(Two):
    """Each call scales by another factor."""

    def forward(self, x: Tensor) -> Any:
        global CALLS
        CALLS += 1
        return self.second(self.first(x) * (1 + CALLS))


class CountsInDict(Two):
    """Every second call is another."""

    def forward(self, x: Tensor) -> Any:
        COUNTS["calls"] += 1
        return self.second(self.first(x) * (1 + COUNTS["calls"] % 2))


class CountsOnSelf(Two):
    """A counter among its attributes."""

    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.second(self.first(x) * (1 + self.calls % 2))


class CountsInBuffer(Two):
    """A counter among its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1  # type: ignore[operator]
        return self.second(self.first(x) * (1 + self.calls % 2))


class AnotherFirstTime(Two):
    """The first call is another than all later ones."""

    ready = False

    def forward(self, x: Tensor) -> Any:
        y = self.first(x) * (1 if self.ready else 3)
        self.ready = True
        return self.second(y)


class Decays(Two):
    """What it kept of earlier calls is mixed into the next: as of a spiking neuron or a moving average."""

    def kept(self) -> Any:
        raise NotImplementedError

    def keep(self, level: Tensor) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        level = 0.5 * self.kept() + y.abs().mean((0, 2, 3))
        self.keep(level)
        return self.second(y * level.view(1, -1, 1, 1))


class KeepsOnSelf(Decays):
    """A tensor among its attributes, another one each time."""

    level: Any = None

    def kept(self) -> Any:
        return 0.0 if self.level is None else self.level

    def keep(self, level: Tensor) -> None:
        self.level = level


class KeepsInTable(Decays):
    """A tensor in a dict among its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.memories: dict[str, Any] = {"level": 0.0}

    def kept(self) -> Any:
        return self.memories["level"]

    def keep(self, level: Tensor) -> None:
        self.memories["level"] = level


class KeepsInNewBuffer(Decays):
    """A buffer, another tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(()))

    def kept(self) -> Any:
        return self.level

    def keep(self, level: Tensor) -> None:
        self.level = level


class KeepsInPlace(Decays):
    """A tensor among its attributes, written into."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.zeros(4)

    def kept(self) -> Any:
        return self.level

    def keep(self, level: Tensor) -> None:
        self.level.copy_(level)


KEEPS = [KeepsOnSelf, KeepsInTable, KeepsInNewBuffer, KeepsInPlace]
REMEMBERS = [CountsInGlobal, CountsInDict, CountsOnSelf, CountsInBuffer, AnotherFirstTime, *KEEPS]


@pytest.fixture
def counted() -> Iterator[Callable[[], tuple[int, dict[str, int]]]]:
    global CALLS
    CALLS, COUNTS["calls"] = 0, 0
    yield lambda: (CALLS, dict(COUNTS))
    CALLS, COUNTS["calls"] = 0, 0


@pytest.mark.parametrize("options", [{}, {"certify": None}, {"certify": "full"}], ids=["replay", "none", "full"])
@pytest.mark.parametrize("count", [40, 400])
@pytest.mark.parametrize("net", REMEMBERS)
def test_a_forward_that_remembers_earlier_calls(
    net: type[Two], count: int, options: dict[str, Any], counted: Callable[[], Any]
) -> None:
    report = exact(net(), images(count), **options)  # the pass of the judge begins in the same state
    assert report.engine == PLAIN
    assert any("depends on earlier calls" in note for note in report.notes)
    if report.residual is not None:
        assert max(report.residual.mean, report.residual.var) <= EXACT


class KeepsRows(Two):
    """A state a sample: the next batch has to have as many."""

    level: Any = 0.0

    def reset(self) -> None:
        self.level = 0.0

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        self.level = 0.5 * self.level + y
        return self.second(self.level)


def test_a_state_that_is_reset_for_each_batch() -> None:
    batches = images(40)  # 16, 16, 8
    with pytest.raises(CalibrationError, match=r"KeepsRows.level from call to call; .*\n?.*m.reset\(\)"):
        bnfix.recalibrate(lived_in(KeepsRows()), batches)
    report = exact(KeepsRows(), batches, lambda m, b: (m.reset(), m(b))[1])
    assert report.engine == FIBERS
    assert not report.notes
    report = bnfix.recalibrate(lived_in(KeepsRows()), batches[:2])
    assert any("(it changes KeepsRows.level)" in note and "m.reset()" in note for note in report.notes)


def test_counts_that_matter_are_as_before(counted: Callable[[], Any]) -> None:
    for net in REMEMBERS:
        model, before = lived_in(net()), counted()
        stored, own = bits(model), {k: v for k, v in vars(model).items() if isinstance(v, int)}
        bnfix.recalibrate(model, images(), dry_run=True)
        assert counted() == before
        assert same_bits(model, stored)
        assert {k: v for k, v in vars(model).items() if isinstance(v, int)} == own


def test_a_counter_in_the_closure_of_the_users_forward(counted: Callable[[], Any]) -> None:
    calls = 0

    def forward(model: Any, batch: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return model.second(model.first(batch) * (1 + calls % 2))

    model = lived_in(Two())
    assert bnfix.recalibrate(model, images(), forward=forward).engine == PLAIN
    assert calls == 0
    assert max(residual(model, images(), forward)) <= EXACT


class OnlyCounts(Two):
    """Counts, and does nothing with it."""

    calls = 0

    def forward(self, x: Tensor) -> Any:
        global CALLS
        CALLS += 1
        self.calls += 1
        COUNTS["calls"] += 1
        return super().forward(x)


def test_a_count_that_does_not_matter_costs_nothing(parked: str, counted: Callable[[], Any]) -> None:
    assert exact(OnlyCounts(), images()).engine == (FIBERS if parked == "fibers" else "threads")


class Rounds(Two):
    """Keeps its features, as many do to be looked at; and is summed in another order each time."""

    features: Any = None

    def forward(self, x: Tensor) -> Any:
        global CALLS
        CALLS += 1
        self.features = self.first(x)
        return self.second(self.features * (1 + 1e-7 * (CALLS % 2)))


def test_rounding_is_no_memory(counted: Callable[[], Any]) -> None:
    assert exact(Rounds(), images()).engine == FIBERS


class Alternating(Two):
    """Every other call goes through another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.odd, self.even = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(self.odd(x) if self.calls % 2 else self.even(3 * x))


def test_a_way_that_depends_on_earlier_calls() -> None:
    """Chunks whose turn it was not were not run again: "takes another way each time", though no pass does."""
    model = Alternating()
    lived_in(model)
    report = bnfix.recalibrate(model, images())
    assert model.calls == 0
    assert any("depends on earlier calls" in note for note in report.notes)
    assert max(residual(model, images())) <= EXACT


class HooksItself(Two):
    """Installs a hook with its first call and notes that it did, as transformers does to capture outputs."""

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "ready", False):
            self.conv2.register_forward_hook(lambda _m, _args, out: out * 2 + 1)
            self.ready = True
        return super().forward(x)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("count", [3, 25])
def test_hooks_that_a_first_call_installs(count: int, broken: bool) -> None:
    """The note was taken back and the hooks were not: each call added some, and the model was another afterwards."""
    model, data = HooksItself(), images()[:count]
    lived_in(model)
    if broken:
        with pytest.raises(CalibrationError):
            bnfix.recalibrate(model, [*data, torch.full_like(data[0], torch.nan)])
    else:
        bnfix.recalibrate(model, data)
    assert not any(m._forward_hooks for m in model.modules())
    if not broken:
        model.eval()(data[0])
        assert [len(m._forward_hooks) for m in model.modules()].count(1) == 1
        assert max(residual(model, data)) <= EXACT


class Observes(Two):
    """Keeps the least value seen, in a buffer that the first call makes as large as it has to be (torch.ao's do so)."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("least", torch.tensor([]))
        self.register_buffer("calls", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        least = x.amin((0, 2, 3))
        if self.how == "data":
            self.least.data = least
        elif self.how == "storage":
            self.least.resize_(least.shape).copy_(least)
            self.calls.untyped_storage().resize_(0)
            return super().forward(x)
        else:
            self.least.resize_(least.shape).copy_(least)
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("how", ["resize", "data", "storage"])
def test_a_buffer_that_a_forward_resizes(how: str, broken: bool) -> None:
    """It was a RuntimeError, and whatever came behind it was not put back."""
    model, data = Observes(how), images()
    lived_in(model)
    model.train()
    model.calls.copy_(torch.tensor([1.0, 2.0, 3.0]))
    before, rng = bits(model), torch.get_rng_state()
    if broken:
        with pytest.raises(CalibrationError, match="batch 25 holds NaN"):
            bnfix.recalibrate(model, [*data, torch.full_like(data[0], torch.nan)])
        assert same_bits(model, before)
    else:
        bnfix.recalibrate(model, data)
        assert model.least.shape == (0,)
        assert model.calls.tolist() == [1.0, 2.0, 3.0]
    assert torch.equal(rng, torch.get_rng_state())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_a_sparse_buffer(layout: str) -> None:
    """An adjacency matrix, say: torch.equal knows no such tensors."""

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(5, 6), torch.nn.BatchNorm1d(6)
            edges = torch.eye(5) + torch.ones(5, 5).triu(3)
            self.register_buffer("edges", getattr(edges, layout)())
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.norm(self.linear((self.edges @ x.t()).t() if layout != "to_sparse_csc" else x))

    g = torch.Generator().manual_seed(0)
    model, data = Graph(), [torch.randn(8, 5, generator=g) * (1 + i) for i in range(6)]
    bnfix.recalibrate(model, data)
    assert model.calls == 0
    assert max(residual(model, data)) <= EXACT
