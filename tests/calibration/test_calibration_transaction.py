"""All or nothing: whatever goes wrong, and wherever, the model and the process are as they were, to the bit."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calib_nets import distances, residual
from nets import bits, lived_in, same_bits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from trap_nets import EXACT, Two, as_is, everything, exact, fails, images, within

import bnfix
from bnfix.calibration import engines, staged
from bnfix.errors import CalibrationError

MARK = 60.0
"""A value that the nets below stumble over; in the data it stands in batch 7."""


def marked() -> list[Tensor]:
    batches = images()
    batches[7][3, 0, 0, 0] = MARK
    return batches


def mixed_modes() -> Two:
    """In training mode, one norm frozen, a momentum of its own."""
    model = lived_in(Two())
    assert isinstance(model, Two)
    model.train()
    model.bn1.eval()
    model.bn2.momentum = 0.03
    return model


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


@pytest.mark.parametrize("method", ["staged", "population"])
def test_a_forward_that_fails_names_batch_and_layer(method: str) -> None:
    model = lived_in(Stumbles(ValueError("no route")))
    message = fails(model, marked(), CalibrationError, method=method, forward=as_is)
    assert "batch 7: the forward failed" in message
    assert "ValueError: no route" in message
    assert method == "population" or "behind bn1" in message


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
    assert exact(LeavesItsDtype(), images()).engine == "fibers"


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
    assert report.engine == "fibers"
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


# Frozen norms, modes, momentum.


def test_norms_that_are_frozen_by_their_class() -> None:
    """Detectron2's and bnfix's own normalise by F.batch_norm: that alone does not ask for new statistics."""

    class FrozenNorm(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(channels))
            self.register_buffer("running_var", torch.ones(channels))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var)  # type: ignore[arg-type]

    model = Two()
    model.bn1 = FrozenNorm(4)
    model = lived_in(model)
    before = bits(model)
    report = bnfix.recalibrate(model, images())
    assert report.frozen == ("bn1",)
    assert {k for k, v in bits(model).items() if not torch.equal(v, before[k])} >= {"bn2.running_mean"}
    assert all(torch.equal(v, before[k]) for k, v in bits(model).items() if k.startswith("bn1."))
    assert bnfix.recalibrate(model, images(), include_frozen=True).frozen == ()
    assert not torch.equal(bits(model)["bn1.running_mean"], before["bn1.running_mean"])


def test_frozen_norms_and_the_modes_of_all_modules() -> None:
    model = mixed_modes()
    before, rest = bits(model.bn1), everything(model)
    report = bnfix.recalibrate(model, images())
    assert report.frozen == ("bn1",)
    assert same_bits(model.bn1, before)
    assert everything(model) == rest
    assert max(distances(model, images())["bn2"]) <= EXACT
    report = bnfix.recalibrate(model, images(), include_frozen=True)
    assert report.frozen == ()
    assert max(residual(model, images())) <= EXACT
    assert everything(model) == rest


def test_nothing_is_frozen_in_a_model_in_evaluation_mode() -> None:
    model = Two()
    report = exact(model, images())
    assert report.frozen == ()
    assert not any(m.training for m in model.modules())


def test_a_model_whose_norms_are_all_frozen() -> None:
    model = mixed_modes()
    model.bn2.eval()
    assert "include_frozen=True" in fails(model, images(), CalibrationError)


def test_num_batches_tracked_and_momentum_stay() -> None:
    model = mixed_modes()
    model.bn2.num_batches_tracked.fill_(777)  # type: ignore[union-attr, operator]
    bnfix.recalibrate(model, images())
    assert model.bn2.num_batches_tracked == 777
    assert (model.bn1.momentum, model.bn2.momentum) == (0.1, 0.03)


@pytest.mark.parametrize(("momentum", "before", "after"), [(0.1, 0, 44), (0.1, 5, 44), (0.03, 77, 152), (None, 3, 3)])
def test_a_counter_never_says_that_initial_values_are_left(momentum: float | None, before: int, after: int) -> None:
    model = mixed_modes()
    model.bn2.momentum = momentum  # type: ignore[union-attr, assignment]
    model.bn2.num_batches_tracked.fill_(before)  # type: ignore[union-attr, operator]
    report = bnfix.recalibrate(model, images())
    assert model.bn2.num_batches_tracked == after
    assert momentum is None or (1 - momentum) ** after <= 0.01 < (1 - momentum) ** (after - 1)
    report.undo()
    assert model.bn2.num_batches_tracked == before


# Back again, and not at all.


def test_undo_gives_the_bits_back() -> None:
    model = mixed_modes()
    before = bits(model)
    report = bnfix.recalibrate(model, images())
    assert not same_bits(model, before)
    report.undo()
    assert same_bits(model, before)
    with pytest.raises(CalibrationError, match="nothing to undo"):
        report.undo()


def test_undo_refuses_after_training() -> None:
    model = lived_in(Two())
    report = bnfix.recalibrate(model, images())
    model.train()(images()[0])
    moved = bits(model)
    with pytest.raises(CalibrationError, match=r"bn1.running_mean has changed since"):
        report.undo()
    assert same_bits(model, moved)


def test_undo_refuses_where_the_tensors_are_others() -> None:
    for change in (lambda m: m.double(), lambda m: setattr(m, "bn1", nn.BatchNorm2d(4))):
        model = lived_in(Two())
        report = bnfix.recalibrate(model, images())
        change(model)
        now = bits(model)
        with pytest.raises(CalibrationError, match=r"bn1.running_mean is another tensor by now"):
            report.undo()
        assert same_bits(model, now)


def test_undo_reaches_layers_whose_wrapper_is_gone() -> None:
    model = lived_in(Two())
    before = bits(model)
    report = bnfix.recalibrate(nn.Sequential(model).eval(), images())
    assert not same_bits(model, before)
    report.undo()
    assert same_bits(model, before)


def test_a_dry_run_changes_nothing() -> None:
    model = mixed_modes()
    before, rest = bits(model), everything(model)
    report = bnfix.recalibrate(model, images(), dry_run=True)
    assert same_bits(model, before)
    assert everything(model) == rest
    assert report.dry_run
    assert not report.changed
    done = copy.deepcopy(model)
    assert bnfix.recalibrate(done, images()).layers == report.layers  # what it measures is what would be written
    with pytest.raises(CalibrationError, match="nothing to undo"):
        report.undo()


def test_only_when_needed() -> None:
    model, shuffled = lived_in(Two()), list(torch.cat(images())[torch.randperm(400)].split(16))
    assert bnfix.recalibrate(model, shuffled, when="needed").changed
    good = bits(model)
    report = bnfix.recalibrate(model, shuffled, when="needed")
    assert not report.changed
    assert same_bits(model, good)
    assert any("leave the model as it is" in line for line in report.advice)


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
