"""All or nothing: whatever goes wrong, and wherever, the model and the process are as they were, to the bit."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calib_nets import FIBERS, distances, residual
from nets import lived_in
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from trap_nets import EXACT, Two, as_is, exact, fails, images, mixed_modes, within

import bnfix
from bnfix.calibration import engines, staged
from bnfix.errors import CalibrationError

MARK = 60.0
"""A value that the nets below stumble over; in the data it stands in batch 7."""


def marked() -> list[Tensor]:
    batches = images()
    batches[7][3, 0, 0, 0] = MARK
    return batches


# The data.


@pytest.mark.parametrize("at", [0, 4])
def test_the_loader_raises(at: int) -> None:
    def data() -> Iterator[Tensor]:
        yield from images()[:at]
        raise OSError("the disk is gone")

    message = fails(mixed_modes(), data(), CalibrationError)
    assert "the disk is gone" in message
    assert ("after batch 3" if at else "at its first batch") in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["staged", "population", "online"])
def test_data_that_is_not_finite(method: str, value: float) -> None:
    batches = images()
    batches[5][3, 1, 2, 2] = value
    assert "batch 5 holds NaN or Inf" in fails(mixed_modes(), batches, CalibrationError, method=method)


def test_no_data() -> None:
    used_up = iter(images()[:1])
    next(used_up)
    for nothing in ([], used_up):
        assert "holds no batch" in fails(mixed_modes(), nothing, CalibrationError)
    assert "batch 0 is empty" in fails(mixed_modes(), [torch.empty(0, 3, 6, 6)], CalibrationError)
    for no_data in (None, 5):
        fails(mixed_modes(), no_data, TypeError)  # type: ignore[arg-type]


class Deadly(Dataset[Tensor]):
    """Ends the worker that asks for sample 50, by ``how``."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 100

    def __getitem__(self, i: int) -> Tensor:
        if i == 50 and self.how == "dies":
            os._exit(3)
        if i == 50:
            raise ValueError("no such image")
        return torch.randn(3, 6, 6)


@pytest.mark.parametrize("how", ["dies", "raises"])
def test_a_worker_of_the_loader(how: str) -> None:
    # Of a dead worker torch tells by a signal, which raises wherever the main thread is: mostly in the loader.
    kinds = (CalibrationError, RuntimeError) if how == "dies" else CalibrationError
    message = ""
    while not message:
        with contextlib.suppress(RuntimeError):  # it may even be here, once all is over
            message = fails(mixed_modes(), DataLoader(Deadly(how), batch_size=8, num_workers=1), kinds)
    expected = ["after batch 5"] if how == "raises" else ["data raised after batch", "worker"]
    assert any(words in message for words in expected)
    gc.collect()  # torch raises a worker's error from a frame that holds it: a cycle of its own
    assert within(10, lambda: not multiprocessing.active_children())


def test_no_workers_are_left_where_reading_stops_early() -> None:
    data = DataLoader(TensorDataset(torch.cat(images())), batch_size=8, num_workers=1)
    report = bnfix.recalibrate(lived_in(Two()), data, max_samples=20)
    assert report.n == 20
    assert within(10, lambda: not multiprocessing.active_children())


def test_an_interrupt_in_the_loader() -> None:
    def data() -> Iterator[Tensor]:
        yield images()[0]
        raise KeyboardInterrupt

    fails(mixed_modes(), data(), KeyboardInterrupt)


# The forward.


class Stumbles(Two):
    """Raises, or makes NaN, between its norms where the data holds MARK."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        if self.error is not None and x.max() == MARK:
            raise self.error
        return self.second(y / (x.amax((1, 2, 3), keepdim=True) != MARK))


@pytest.mark.parametrize("forward", [None, as_is])
@pytest.mark.parametrize("method", ["staged", "population", "online"])
def test_nan_that_is_made_in_the_middle_of_the_net(method: str, forward: Any) -> None:
    message = fails(lived_in(Stumbles(None)), marked(), CalibrationError, method=method, forward=forward)
    assert "batch 7: bn2: its input holds NaN or Inf" in message
    assert "such weights:  [n for n, p in model.named_parameters()" in message  # the batch was looked at: it isn't that


@pytest.mark.parametrize("method", ["staged", "population"])
def test_a_forward_that_fails_names_batch_and_layer(method: str) -> None:
    model = lived_in(Stumbles(ValueError("no route")))
    message = fails(model, marked(), CalibrationError, method=method, forward=as_is)
    assert "batch 7: the forward failed" in message
    assert "ValueError: no route" in message
    assert method == "population" or "behind bn1" in message


class Tabular(nn.Module):
    """Categories, and numbers that it can't do without, though the signature says that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bn = nn.Embedding(5, 3), nn.BatchNorm1d(5)

    def forward(self, categories: Tensor, numbers: Any = None, _scale: float = 1.0) -> Any:
        return self.bn(torch.cat([self.embed(categories), numbers], 1))


def test_the_hint_feeds_an_input_that_is_none_unless_it_is_given() -> None:
    batches = [(torch.arange(k) % 5, torch.randn(k, 2), torch.zeros(k)) for k in (6, 5, 3)]
    with pytest.raises(CalibrationError) as caught:
        bnfix.recalibrate(Tabular(), batches)
    assert caught.value.hint is not None
    said, line = caught.value.hint.splitlines()
    assert said.endswith("if it is to have numbers too")
    assert line == "forward=lambda m, b: m(b[0], b[1])"
    model = lived_in(Tabular())
    bnfix.recalibrate(model, batches, forward=lambda m, b: m(b[0], b[1]))
    assert max(residual(model, batches, lambda m, b: m(b[0], b[1]))) <= 1e-5


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d, (32, 4)), (nn.BatchNorm2d, (32, 4, 5, 5))])
def test_a_tensor_of_samples_is_not_a_list_of_batches(norm: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, data = lived_in(nn.Sequential(norm(4))), torch.randn(shape)
    with pytest.raises(CalibrationError) as failed:
        bnfix.recalibrate(model, data)
    assert "data.split(64)" in str(failed.value.hint)
    exact(model, data.split(64))
    bnfix.recalibrate(model, torch.stack((data, data + 1)))  # one that holds batches


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_forward_that_ends_the_process(error: type[BaseException]) -> None:
    fails(lived_in(Stumbles(error("stop"))), marked(), error)


class LeavesItsDtype(Two):
    """Changes the default dtype, and fails before it puts it back."""

    def forward(self, x: Tensor) -> Any:
        torch.set_default_dtype(torch.float64)
        y = self.first(x)
        if x.max() == MARK:
            raise ValueError("half-way")
        torch.set_default_dtype(torch.float32)
        return self.second(y)


def test_a_process_that_a_forward_leaves_changed() -> None:
    fails(lived_in(LeavesItsDtype()), marked(), CalibrationError)
    assert exact(LeavesItsDtype(), images()).engine == FIBERS


def test_a_progress_function_that_fails() -> None:
    def told(line: str) -> None:
        if "norm 2" in line:
            raise ValueError("told enough")

    fails(lived_in(Two()), images(), ValueError, progress=told)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Two()
        lived_in(model)
    report = bnfix.recalibrate(model, images())
    assert max(residual(model, images())) <= EXACT
    report.undo()


def test_inside_of_inference_mode() -> None:
    model = lived_in(Two())
    with torch.inference_mode():
        report = bnfix.recalibrate(model, images())
    assert not model.bn1.running_mean.is_inference()  # type: ignore[union-attr, operator]
    assert max(residual(model, images())) <= EXACT
    report.undo()
    model.train()(images()[0]).sum().backward()


# Memory.

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
]


class Hungry(Two):
    """Runs out of memory with larger batches, or where several forwards are under way."""

    under_way = 0

    def __init__(self, error: Exception, samples: int = 10_000, forwards: int = 10_000) -> None:
        super().__init__()
        self.error, self.samples, self.forwards = error, samples, forwards

    def forward(self, x: Tensor) -> Any:
        Hungry.under_way += 1
        try:
            if len(x) > self.samples or Hungry.under_way > self.forwards:
                raise self.error
            return self.second(self.first(x))
        finally:
            Hungry.under_way -= 1


@pytest.mark.parametrize("error", NO_MEMORY, ids=["CUDA", "Python", "CPU"])
def test_no_memory_for_larger_batches_than_the_loaders(error: Exception) -> None:
    report = exact(Hungry(error, samples=16), images())
    assert report.engine == FIBERS
    assert any("no memory for larger batches" in note for note in report.notes)


@pytest.mark.parametrize("error", NO_MEMORY, ids=["CUDA", "Python", "CPU"])
def test_no_memory_for_all_chunks_at_once(error: Exception) -> None:
    model = lived_in(Hungry(error, forwards=2))
    assert "out of memory" in fails(model, images(), CalibrationError, method="staged", forward=as_is)
    report = bnfix.recalibrate(model, images(), forward=as_is)
    assert report.method == "population"
    assert "out of memory" in report.why
    assert max(distances(model, images())["bn1"]) <= EXACT  # nothing is normalised before it
    assert max(residual(model, images())) < 0.2


@pytest.mark.parametrize("error", NO_MEMORY, ids=["CUDA", "Python", "CPU"])
def test_no_memory_at_all(error: Exception) -> None:
    model = lived_in(Hungry(error, samples=4))
    assert "out of memory" in fails(model, images(), CalibrationError, method="staged")
    assert "batch 0" in fails(model, images(), CalibrationError)


def test_no_memory_where_moments_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(staged, "contributions", full)
    model = lived_in(Two())
    fails(model, images(), CalibrationError, method="staged")
    assert bnfix.recalibrate(model, images()).method == "population"


def test_no_memory_for_the_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(engines.Witness, "judge", full)
    model = lived_in(Two())
    fails(model, images(), CalibrationError, method="staged")
    assert bnfix.recalibrate(model, images()).method == "population"


@pytest.mark.parametrize("parked", ["threads"], indirect=True)
def test_no_more_threads(monkeypatch: pytest.MonkeyPatch, parked: str) -> None:
    start, started = threading.Thread.start, []

    def few(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) > 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    model = lived_in(Two())
    monkeypatch.setattr(threading.Thread, "start", few)
    report = bnfix.recalibrate(model, images(), forward=as_is)
    monkeypatch.undo()
    assert report.method == "population"
    assert within(5, lambda: all(not t.name.startswith("bnfix") for t in threading.enumerate()))


def test_no_memory_in_a_stream_is_called_that() -> None:
    class Greedy(Two):
        def forward(self, x: Tensor) -> Any:
            if len(x) > 2:
                torch.empty(1 << 60)
            return super().forward(x)

    model = lived_in(Greedy())
    told = fails(model, images(), CalibrationError, method="population")
    assert "out of memory in the forward of" in told
    assert "smaller batches" in told


class Fails(Two):
    """Stumbles, in the middle, over more than the samples that are looked at first."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if len(x) > 4:
            raise RuntimeError("boom")
        return y


@pytest.mark.parametrize("how", ["forward", "loader", "activations"])
def test_what_failed_leaves_no_memory_taken(how: str) -> None:
    """The traceback held a frame that held the error: activations stayed until garbage was collected."""
    kept: list[weakref.ref[Tensor]] = []

    def data() -> Iterator[Tensor]:
        for number, batch in enumerate(marked()):
            mine = batch.clone()
            kept.append(weakref.ref(mine))
            yield mine
            if how == "loader" and number == 9:
                raise OSError("gone")

    class Overflows(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.where(x == MARK, torch.inf, x))

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(CalibrationError):
            bnfix.recalibrate({"forward": Fails, "loader": Two, "activations": Overflows}[how](), data())
            pytest.fail("it has to fail")
        assert kept
        assert not [ref for ref in kept if ref() is not None]
    finally:
        gc.enable()
