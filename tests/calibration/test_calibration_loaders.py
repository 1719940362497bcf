"""Loaders and batches of the user's own making: each keeps its values, and nothing untrue is said of them."""

from __future__ import annotations

import random
import threading
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import pytest
import torch
from calib_nets import residual
from nets import lived_in
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from trap_nets import EXACT, Two, as_is, exact, images

import bnfix
from bnfix.types import Recalibration


class OneBuffer(Dataset[Tensor]):
    """Whole batches, each in the same memory."""

    def __init__(self) -> None:
        self.memory = torch.empty(16, 3, 6, 6)

    def __len__(self) -> int:
        return 25

    def __getitem__(self, i: int) -> Tensor:
        return self.memory.copy_(images()[i])


class Refilled(list[Tensor]):
    """A list that hands out one buffer, filled anew."""

    def __iter__(self) -> Iterator[Tensor]:
        memory = torch.empty(16, 3, 6, 6)
        for batch in super().__iter__():
            yield memory.copy_(batch)


@pytest.mark.parametrize(
    "data",
    [DataLoader(OneBuffer(), batch_size=1, collate_fn=lambda b: b[0]), Refilled(images())],
    ids=["collate", "list"],
)
def test_one_buffer_for_all_batches(data: Any) -> None:
    exact(Two(), images(), data=data)


def test_one_buffer_in_an_object_that_can_not_be_copied() -> None:
    class Locked:
        def __init__(self, x: Tensor) -> None:
            self.x, self.lock = x, threading.Lock()

    def refilled() -> Iterator[Locked]:
        record = Locked(torch.empty(16, 3, 6, 6))
        for batch in images():
            record.x.copy_(batch)
            yield record

    exact(Two(), [types.SimpleNamespace(x=b) for b in images()], lambda m, b: m(b.x), data=refilled())


@dataclass
class Computed:
    x: Tensor
    half: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.x = self.x * 2  # once, when it is made
        self.half = self.x / 2
        self.note = "more than its fields"


@dataclass
class Given:
    x: Tensor
    scale: InitVar[float] = 1.0

    def __post_init__(self, scale: float) -> None:
        self.x = self.x + scale


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Tensor


@pytest.mark.parametrize("kind", [Computed, Given, Slotted])
def test_records_are_not_made_anew(kind: Callable[[Tensor], Any]) -> None:
    batches = [kind(b) for b in images()]
    exact(Two(), batches, lambda m, b: m(b.x))
    assert all(torch.equal(b.x, kind(i).x) for b, i in zip(batches, images(), strict=True))


def test_containers_keep_what_else_they_hold() -> None:
    class Named(list[Tensor]):
        def __init__(self, items: list[Tensor], name: str) -> None:
            super().__init__(items)
            self.name = name

    class Pair(tuple[Tensor, ...]):
        def __new__(cls, a: Tensor, b: Tensor) -> Pair:
            return super().__new__(cls, (a, b))

    def feed(m: nn.Module, b: dict[str, Any]) -> Any:
        assert b["named"].name == "n"
        assert isinstance(b["pair"], Pair)
        assert isinstance(b["size"], torch.Size)
        assert b["max"].indices.shape == b["max"].values.shape
        b["new"].append(1)
        return m(b["named"][0] + b["pair"][1])

    batches = [
        defaultdict(list, named=Named([b], "n"), pair=Pair(b, b * 0), x=b, size=b.shape, max=b.max(1)) for b in images()
    ]
    exact(Two(), batches, feed)
    assert all(len(b["new"]) == 1 for b in batches)  # of the plain forwards over them: copies were used before


def test_nothing_is_said_of_batches_whose_samples_nobody_counts() -> None:
    opaque = [types.SimpleNamespace(x=b) for b in images()]
    said = exact(Two(), opaque, lambda m, b: m(b.x)).advice
    assert not any("batches of 1" in line for line in said)
    assert any("batches of 1" in line for line in exact(Two(), images(size=1)).advice)
    one = bnfix.recalibrate(lived_in(Two()), opaque[:1], forward=lambda m, b: m(b.x))
    assert not any("ONE sample" in line for line in one.advice)
    one = bnfix.recalibrate(lived_in(Two()), images(), memory_budget=1, method="staged")
    assert one.n == 1
    assert any("ONE sample" in line for line in one.advice)


class Domains(Two):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)

    def forward(self, x: Tensor, domain: Tensor) -> Any:  # type: ignore[override]
        return self.second(self.first(x) + self.embed(domain)[:, :, None, None])


def test_what_the_model_takes_is_no_label() -> None:
    batches = [(b, torch.full((len(b),), i % 3)) for i, b in enumerate(images())]
    call = lambda m, b: m(*b)  # noqa: E731
    model = lived_in(Domains())
    report = bnfix.recalibrate(model, batches)
    assert max(residual(model, batches, call)) <= EXACT
    assert not any("one class" in line for line in report.advice)
    labelled = bnfix.recalibrate(lived_in(Two()), batches)
    assert any("one class" in line for line in labelled.advice)


def test_a_norm_whose_input_is_always_empty() -> None:
    class Never(Two):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x).mean((2, 3))
            return self.head(y[y[:, 0] > 1e9])

    report = exact(Never(), images())
    assert report.left_why == {"head": "its input never holds a value"}


# What a forward remembers, and what it draws.


class Averaging(Two):
    """A moving average that its forward keeps in evaluation mode too, and uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        self.calls += 1
        self.average.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
        return self.second(y + self.average[:, None, None])


def test_a_pass_starts_from_what_the_model_came_with() -> None:
    model = Averaging()
    report = bnfix.recalibrate(lived_in(model), images(), forward=lambda m, b: m(b))
    assert report.engine == "plain passes"
    assert not model.average.any()
    assert not model.calls
    assert max(residual(model, images())) <= EXACT


@pytest.mark.parametrize("method", ["staged", "population"])
def test_random_numbers_in_evaluation_mode_are_said(method: Any) -> None:
    class Noisy(Two):
        def forward(self, x: Tensor) -> Any:
            return self.second(nn.functional.dropout(self.first(x)))

    said = bnfix.recalibrate(lived_in(Noisy()), images(), method=method).notes
    assert any("draws random numbers in evaluation mode" in line for line in said)
    assert not any("mixed" in line for line in said)
    assert not bnfix.recalibrate(lived_in(Two()), images(), method=method).notes


def test_random_numbers_of_no_consequence_are_not_said() -> None:
    class Draws(Two):
        def forward(self, x: Tensor) -> Any:
            random.random()
            return super().forward(x + 0 * torch.rand_like(x))

    assert not exact(Draws(), images()).notes


# What is going to be done is said before the data is read, as far as the data says how much there is.


class Slow:
    """A loader that notes what was said before it gives its next batch."""

    def __init__(self, batches: list[Tensor], length: int | None, dataset: int | None = None) -> None:
        self.batches, self.said, self.before = batches, [], []  # type: ignore[var-annotated]
        self.length = length
        if dataset is not None:
            self.dataset = range(dataset)

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("of no length")
        return self.length

    def __iter__(self) -> Any:
        for batch in self.batches:
            self.before.append([line for line in self.said if line.startswith("method ")])
            yield batch


def told(loader: Slow, **options: Any) -> tuple[list[str], list[str], Recalibration]:
    """The decisions said before the second batch was read, and those said later."""
    report = bnfix.recalibrate(lived_in(Two()), loader, progress=loader.said.append, **options)
    early = loader.before[1] if len(loader.before) > 1 else []
    return early, [line for line in loader.said if line.startswith("method ")][len(early) :], report


FIT = "samples fit in memory"


def test_what_will_be_done_is_said_after_the_first_batch() -> None:
    early, later, report = told(Slow(images(100), 7, dataset=100))
    assert len(early) == 1
    assert early[0].startswith(f"method staged: all 100 {FIT} (")
    assert later == []
    assert early[0] == f"method {report.method}: {report.why}"


def test_how_many_samples_is_an_estimate_without_a_dataset() -> None:
    early, later, report = told(Slow(images(100), 7))
    assert early[0].startswith(f"method staged: about 112 {FIT} (")
    assert later == []  # it is what was said, but for a part of a batch
    assert report.why.startswith(f"all 100 {FIT}")


def test_a_list_of_batches_whose_last_is_smaller() -> None:
    said: list[str] = []
    report = bnfix.recalibrate(lived_in(Two()), images(100), progress=said.append)
    assert [line for line in said if line.startswith("method ")] == [f"method staged: {report.why}"]
    assert report.why.startswith(f"all 100 {FIT}")


def test_a_sampler_that_leaves_samples_out() -> None:
    early, later, _ = told(Slow(images(96), 6, dataset=50_000))
    assert early[0].startswith(f"method staged: about 96 {FIT} (")
    assert later == []


@pytest.mark.parametrize("length", [3, 40])
def test_a_length_that_is_wrong_is_said_again(length: int) -> None:
    early, later, _ = told(Slow(images(100), length))
    assert early[0].startswith(f"method staged: about {16 * length} {FIT} (")
    assert len(later) == 1
    assert later[0].startswith(f"method staged: all 100 {FIT} (")


def test_what_does_not_fit_is_said_after_the_first_batch() -> None:
    early, later, report = told(Slow(images(), 25), memory_budget="100KB")
    assert report.method == "population"
    assert early[0] == f"method population: {report.why}"
    assert "of about 400 samples fit (0.1 MB): batches joined to 64" in early[0]
    assert later == []
    early, later, report = told(Slow(images(), 25, dataset=400), memory_budget="100KB", method="staged")
    assert early[0] == f"method staged: {report.why}"
    assert "of 400 samples fit in memory (0.1 MB) together" in early[0]
    assert later == []


def test_what_was_taken_to_fit_and_does_not() -> None:
    early, later, report = told(Slow(images(), 2), memory_budget="100KB")
    assert early[0].startswith(f"method staged: about 32 {FIT} (")
    assert report.method == "population"
    assert [line.split(":")[0] for line in later] == ["method population"]


def test_max_samples_are_what_is_asked_for() -> None:
    early, later, _ = told(Slow(images(), 25), max_samples=50)
    assert early[0].startswith("method staged: the 50 samples asked for fit in memory (")
    assert later == []
    early, later, _ = told(Slow(images(100), 7, dataset=100), max_samples=500)
    assert early[0].startswith(f"method staged: all 100 {FIT} (")
    assert later == []


def test_batches_that_are_kept_are_said_so_at_once() -> None:
    early, later, _ = told(Slow(images(100), 7, dataset=100), forward=as_is)
    assert "its batches are kept as they are (forward= takes a batch as it is)" in early[0]
    assert later == []


def test_data_that_does_not_say_how_much_there_is() -> None:
    loader = Slow(images(100), None)
    early, later, _ = told(loader)
    assert early == []
    assert [line.split(" samples")[0] for line in later] == ["method staged: all 100"]
    assert any(line.startswith("reading as many samples as there are, up to ") for line in loader.said)


class TensorTable(Mapping[str, Any]):
    """A TensorDict in small: going through it gives its samples, it knows how many, and wants all of one length."""

    def __init__(self, source: Mapping[str, Any], batch_size: Sequence[int] = ()) -> None:
        self._tensors, self.batch_size = dict(source.items()), tuple(batch_size)
        count = len(self.batch_size)
        if any(tuple(t.shape[:count]) != self.batch_size for t in self._tensors.values()):
            raise RuntimeError("batch dimension mismatch")

    def __getitem__(self, key: str) -> Any:
        return self._tensors[key]

    def __iter__(self) -> Iterator[Any]:
        if not self.batch_size:
            raise TypeError("iteration over a 0-d tensordict")
        return ({k: t[i] for k, t in self._tensors.items()} for i in range(len(self)))

    def __len__(self) -> int:
        return self.batch_size[0] if self.batch_size else 0

    def keys(self) -> Any:
        return self._tensors.keys()

    def values(self) -> Any:
        return self._tensors.values()

    def items(self) -> Any:
        return self._tensors.items()

    def to(self, device: Any) -> TensorTable:
        return TensorTable({k: t.to(device) for k, t in self.items()}, self.batch_size)


class Whole(nn.Module):
    """Takes such a table as it is, and asks it how many samples it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Two()

    def forward(self, table: TensorTable) -> Any:
        (count,) = table.batch_size
        return self.net(table["picture"])[:count]


@pytest.mark.parametrize("way", ["whole", "by name", "forward"])
def test_batches_that_are_tensordicts(way: str) -> None:
    """They count as mappings, and going through one gives no keys: every way to use them ended in an error."""
    data = [TensorTable({"picture": x, "input": x[:, :1, 0, 0]}, [len(x)]) for x in images()]
    if way == "whole":
        model: nn.Module = lived_in(Whole())
        report = bnfix.recalibrate(model, data)  # type: ignore[arg-type]
    elif way == "forward":
        model = lived_in(Two())
        report = bnfix.recalibrate(model, data, forward=lambda m, table: m(table["picture"]))
    else:
        model = lived_in(Two())
        data = [TensorTable({"x": x, "label": torch.zeros(len(x))}, [len(x)]) for x in images()]
        report = bnfix.recalibrate(model, data)
        assert report.used == "keys x of x, label"
    assert report.n == sum(len(x) for x in images())
    inner = model.net if isinstance(model, Whole) else model
    assert max(residual(inner, images())) <= EXACT
