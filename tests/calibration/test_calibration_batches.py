"""What a loader can give: bound, moved, cut and joined as it is meant, or refused with the lines that resolve it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calib_nets import FIBERS, Forward, residual
from nets import lived_in
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trap_nets import EXACT, Two, as_is, exact, fails, images, vectors

import bnfix
from bnfix.errors import CalibrationError

ways = pytest.mark.parametrize("forward", [None, as_is], ids=["joined", "as they are"])


# Sizes.


@ways
@pytest.mark.parametrize("sizes", [[64, 64, 64, 9], [300, 100], [1] * 65, [64, 1], [2], [1, 1], [150, 1, 150, 2]])
def test_uneven_batches_down_to_one_sample(sizes: list[int], forward: Forward | None) -> None:
    x = torch.cat(images(sum(sizes)))
    assert exact(Two(), list(x.split(sizes)), forward).n == sum(sizes)


@ways
def test_batches_of_one_value_a_channel(forward: Forward | None) -> None:
    norm = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    exact(norm, vectors(300, 1), forward)
    exact(norm, list(torch.cat(vectors(20)).split([16, 1, 3])), forward)


def test_one_value_a_channel_is_all_there_is() -> None:
    model = lived_in(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    before = model[1].running_var.clone()  # type: ignore[operator, union-attr]
    report = bnfix.recalibrate(model, vectors(1))
    assert not report.changed
    assert "leaves no variance" in report.left_why["1"]
    assert torch.equal(model[1].running_var, before)  # type: ignore[arg-type]


@ways
def test_images_of_many_sizes(forward: Forward | None) -> None:
    x = torch.cat(images(400))
    some = [F.interpolate(x[i : i + 5], size=(5 + i % 3, 6 + i % 2)) for i in range(0, 400, 5)]
    exact(Two(), some, forward)
    each = [F.interpolate(x[i : i + 1], size=(5 + i % 60, 6)) for i in range(0, 120)]  # a signature of its own each
    exact(Two(), each, forward)


@pytest.mark.parametrize(("asked", "read"), [(40, 40), (1, 1), (48, 48), (1000, 400)])
def test_max_samples_in_the_middle_of_a_batch(asked: int, read: int) -> None:
    x = torch.cat(images())[:read]
    report = exact(Two(), [x], data=images(), max_samples=asked)
    assert report.n == read
    assert exact(Two(), [torch.cat(images())[: -(-read // 16) * 16]], as_is, data=images(), max_samples=asked).n >= read


def test_a_budget_for_one_sample_only() -> None:
    model = lived_in(Two())
    report = bnfix.recalibrate(model, images(), memory_budget=1000)
    assert (report.method, report.n) == ("population", 400)
    assert "1 of 400 samples fit" in report.why
    assert max(residual(model, images())) < 0.15  # near the fixed point, not at it: 64 samples normalise themselves
    part = bnfix.recalibrate(model, images(), memory_budget="200KB", method="staged")
    assert part.method == "staged"
    assert 1 < part.n < 400
    assert max(residual(model, [torch.cat(images())[: part.n]])) <= EXACT


# Loaders.


class Reusing:
    """A loader that gives the same memory each time, filled anew."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __iter__(self) -> Iterator[Any]:
        memory = torch.empty(16, 3, 6, 6)
        array = memory.numpy()
        for batch in images():
            memory.copy_(batch)
            yield array if self.kind == "array" else {"x": memory, "y": 1} if self.kind == "dict" else memory


@pytest.mark.parametrize("kind", ["tensor", "array", "dict"])
def test_a_loader_that_writes_over_its_last_batch(kind: str) -> None:
    forward = (lambda m, b: m(b["x"])) if kind == "dict" else None
    model = lived_in(Two())
    bnfix.recalibrate(model, Reusing(kind), forward=forward)
    assert max(residual(model, images())) <= EXACT
    unbatched = DataLoader(_Rows(), batch_size=None)
    bnfix.recalibrate(lived_in(model), unbatched)
    assert max(residual(model, images())) <= EXACT


class _Rows(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(Reusing("tensor"))


def test_data_without_a_length() -> None:
    report = exact(Two(), images(), data=iter(images()))
    assert report.method == "staged"
    model = lived_in(Two())
    assert bnfix.recalibrate(model, (b for b in images())).n == 400


def forever() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(64, 4, generator=generator)


@pytest.mark.parametrize("method", ["auto", "population", "online", "staged"])
def test_data_without_an_end(method: Any, tmp_path: Path) -> None:
    model = lived_in(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    for options in ({}, {"tol": 0.05}, {"max_samples": 1000}, {"spill_dir": tmp_path}):
        report = bnfix.recalibrate(model, forever(), method=method, **options)  # type: ignore[arg-type]
        assert report.n <= (1000 if "max_samples" in options else 2**17 + 128)
        if report.method != "staged":
            assert max(s.se for s in report.layers) <= options.get("tol", 0.01) or "max_samples" in options


# What is in a batch.


def test_the_users_tensors_stay_as_they_are() -> None:
    class InPlace(Two):
        def forward(self, x: Any) -> Any:
            x = x if isinstance(x, Tensor) else x.x
            return super().forward(x.sub_(1).div_(2))

    @dataclass
    class Record:
        x: Tensor

    class Opaque:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Moving(Opaque):
        def to(self, *where: Any) -> Moving:
            self.x = self.x.to(*where)
            return self

    for wrap in (lambda x: x, Record, Opaque, Moving):
        batches = [wrap(b.clone()) for b in images()]
        model = lived_in(InPlace())
        bnfix.recalibrate(model, batches, forward=None if wrap in (Moving,) else as_is)
        given = [b if isinstance(b, Tensor) else b.x for b in batches]
        assert all(torch.equal(a, b) for a, b in zip(given, images(), strict=True))
        assert max(residual(model, batches)) <= EXACT


def test_an_object_that_the_forward_writes_to() -> None:
    class Graph:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def to(self, device: Any) -> Graph:
            self.x = self.x.to(device)
            return self

    class Net(Two):
        def forward(self, graph: Graph) -> Any:  # type: ignore[override]
            graph.x = self.conv1(graph.x)
            graph.x = F.relu(self.bn1(graph.x))
            return self.second(graph.x)

    batches = [Graph(b) for b in images()]
    report = exact(Net(), [Graph(b) for b in images()], data=batches)
    assert "a Graph" in report.used
    assert all(torch.equal(g.x, b) for g, b in zip(batches, images(), strict=True))


def test_arrays_in_a_batch_that_is_fed_by_hand() -> None:
    batches = [{"x": b.numpy().copy()} for b in images()]
    shown = copy.deepcopy(batches)

    def feed(m: nn.Module, b: dict[str, np.ndarray]) -> Any:
        return m(torch.from_numpy(b["x"]).sub_(1))

    exact(Two(), [{"x": b.numpy().copy()} for b in images()], feed, data=batches)
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(batches, shown, strict=True))


def test_inputs_that_require_gradients_and_inputs_in_channels_last() -> None:
    wanted = [b.clone().requires_grad_() for b in images()]
    exact(Two(), wanted)
    assert all(b.requires_grad and b.grad is None for b in wanted)
    model = Two().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    exact(model, [b.to(memory_format=torch.channels_last) for b in images()])
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_subclasses_of_tensors() -> None:
    class Image(Tensor):
        pass

    exact(Two(), images(), data=[b.as_subclass(Image) for b in images()])


@pytest.mark.parametrize("turns", [1, 7], ids=["in turns", "in blocks"])
def test_batches_that_differ_in_what_their_first_sample_says(turns: int) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.bn = nn.Parameter(torch.tensor([[1.0], [3.0], [0.2]])), nn.BatchNorm1d(4)

        def forward(self, x: Tensor, domain: Tensor) -> Tensor:
            return self.bn(x * self.scale[domain[:1]])

    model = lived_in(Scaled())
    batches = [(x, torch.full((16,), i // turns % 3)) for i, x in enumerate(vectors())]
    bnfix.recalibrate(model, batches)
    assert max(residual(model, batches, lambda m, b: m(*b))) <= EXACT


def test_images_in_a_list() -> None:
    class Untold(Two):
        def forward(self, images: Any, targets: Any = None) -> Any:
            return [self.second(self.first(image[None])) for image in images]

    class Detector(Untold):
        def forward(self, images: list[Tensor], targets: Any = None) -> Any:
            return super().forward(images)

    x = torch.cat(images(80))
    data = [
        ([a[0], b[0, :, :5]], [{"boxes": torch.zeros(1, 4)}] * 2)
        for a, b in zip(x[:40, None], x[40:, None], strict=True)
    ]
    assert "several inputs" in fails(lived_in(Untold()), data, CalibrationError)
    exact(Untold(), data, lambda m, b: m(b[0]))
    model = lived_in(Detector())
    report = bnfix.recalibrate(model, data)  # its signature says that a list is meant
    assert max(residual(model, data, lambda m, b: m(b[0]))) <= EXACT
    assert [s.name for s in report.layers] == ["bn1", "bn1@1", "bn2", "bn2@1"]


# What is meant.

TWO_LINES = (
    "separate:  forward=lambda m, b: [m(v) for v in b[0]]",
    "joint:     forward=lambda m, b: m(torch.cat(b[0]))",
)


def test_views_of_one_image_are_refused_with_the_lines_that_resolve_them() -> None:
    views = [([b, b.flip(3)], torch.zeros(len(b))) for b in images(100, 4)]
    message = fails(lived_in(Two()), views, CalibrationError)
    assert all(line in message for line in TWO_LINES)
    for line in TWO_LINES:
        forward = eval(line.partition("forward=")[2], {"torch": torch})
        report = exact(Two(), views, forward)
        assert len(report.layers) == (4 if "separate" in line else 2)


def test_triplets_are_refused() -> None:
    triplets = [(b, b + 1, b * 2) for b in images(40, 4)]
    assert "several inputs" in fails(lived_in(Two()), triplets, CalibrationError)


@pytest.mark.parametrize("kind", ["pair", "dict", "deep"])
def test_labels_are_left_out_and_named(kind: str) -> None:
    made: dict[str, Any] = {
        "pair": [(b, torch.arange(len(b))) for b in images()],
        "dict": [{"x": b, "label": torch.arange(len(b))} for b in images()],
        "deep": [({"x": b}, torch.arange(len(b))) for b in images()],
    }
    report = bnfix.recalibrate(lived_in(model := Two()), made[kind])
    assert max(residual(model, images())) <= EXACT
    assert "element 1, 16 int64, was left out" in report.used if kind == "pair" else "x of x" in report.used


def test_autocast_outside() -> None:
    model = lived_in(Two())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = bnfix.recalibrate(model, images(), forward=as_is)
        assert max(residual(model, images())) <= EXACT
    assert report.engine == FIBERS
    assert max(residual(model, images())) > 1e-4  # without it, the activations are others


def test_files_are_gone_and_give_the_same(tmp_path: Path) -> None:
    class Large(Two):
        def __init__(self) -> None:
            super().__init__(32)
            self.register_buffer("place", torch.randn(32, 6, 6).repeat(60, 1, 1, 1))

        def forward(self, x: Tensor) -> Any:
            place = self.place.to(x.device)  # type: ignore[union-attr, operator]
            return self.second(self.first(x) + place[0])

    model = lived_in(Large())
    other, at = copy.deepcopy(model), model.place.data_ptr()  # type: ignore[union-attr, operator]
    for forward in (None, as_is):
        report = bnfix.recalibrate(model, images(), spill_dir=tmp_path, forward=forward)
        assert "in files" in report.why
        assert not list(tmp_path.iterdir())
        assert model.place.data_ptr() == at  # type: ignore[union-attr, operator]
        bnfix.recalibrate(other, images(), forward=forward)
        for a, b in zip(model.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    fails(model, images(), CalibrationError, spill_dir=tmp_path / "nowhere")


def test_a_data_loader_that_shuffles() -> None:
    data = DataLoader(TensorDataset(torch.cat(images()), torch.arange(400)), batch_size=32, shuffle=True)
    model = lived_in(Two())
    bnfix.recalibrate(model, data)
    assert max(residual(model, images())) <= EXACT
