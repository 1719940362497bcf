"""On a GPU: the same fixed point, statistics that stay there, few waits for the device, an end of its memory."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calib_nets import FIBERS
from nets import bits, lived_in, same_bits
from torch import Tensor, nn

import bnfix
import bnfix.errors

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    """Convolutions in float32, not in TF32: it is the statistics that are tested."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = kept


def deep(norms: int, channels: int = 16) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
    for _ in range(norms):
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)]
    return lived_in(nn.Sequential(*layers)).cuda()


def images(count: int = 256, size: int = 16, pixels: int = 12) -> list[Tensor]:
    x = torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    return list((x * torch.linspace(0.5, 2, count).view(-1, 1, 1, 1) + 0.5).split(size))


def distance(a: nn.Module, b: nn.Module) -> float:
    """Worst difference of running statistics: of means in standard deviations, of variances relative."""
    worst = 0.0
    for m, n in zip(a.modules(), b.modules(), strict=True):
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            v, w = (x.running_var.double().cpu() for x in (m, n))  # type: ignore[union-attr]
            d = (m.running_mean.double().cpu() - n.running_mean.double().cpu()).abs() / w.sqrt()  # type: ignore
            worst = max(worst, d.max().item(), (v / w - 1).abs().max().item())
    return worst


@pytest.mark.parametrize("size", [2, 16, 256])
def test_the_fixed_point(size: int) -> None:
    model = deep(6)
    report = bnfix.recalibrate(model, images(size=size), certify="full")
    assert report.residual is not None
    assert max(report.residual.mean, report.residual.var) <= 1e-5  # the same kernels: float32 sums apart
    assert report.engine in (FIBERS, "one chunk")
    assert all(b.is_cuda for b in model.buffers())


def test_the_same_as_on_the_cpu() -> None:
    model = deep(6)
    other = copy.deepcopy(model).cpu()
    bnfix.recalibrate(model, images())
    bnfix.recalibrate(other, images())
    assert distance(model, other) <= 1e-4  # other convolution algorithms, six layers deep


def waits(norms: int) -> int:
    """How often the host waits for the device in one recalibration."""
    model, data = deep(norms), [batch.cuda() for batch in images()]
    bnfix.recalibrate(model, data, certify=None)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            bnfix.recalibrate(model, data, certify=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in said)


def test_one_wait_a_layer_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer more costs in waits, everything included: the run, the look ahead, the report."""
    from bnfix.calibration.staged import Run

    counted: list[int] = []
    through = Run.through

    def counting(run: Run) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            through(run)
        counted.append(sum("synchroniz" in str(w.message) for w in said))

    monkeypatch.setattr(Run, "through", counting)
    waits(5), waits(15)
    # Per norm one look at whether all is finite and well conditioned; a copy of the batch to the device a chunk.
    assert counted[-1] - counted[1] <= 10
    assert counted[1] <= 5 + 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = deep(4).to(dtype)
    report = bnfix.recalibrate(model, images(), certify="full")
    assert report.residual is not None
    assert max(report.residual.mean, report.residual.var) <= 2e-2  # the storage itself has 8 bits


class Makes(nn.Module):
    """Makes tensors on whatever device is the default one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = deep(3)

    def forward(self, x: Tensor) -> Any:
        return self.net(x + torch.full((1, 3, 1, 1), 0.25))


@pytest.mark.parametrize("parked", ["fibers", "threads"], indirect=True)
def test_default_device_and_autocast_of_the_caller(parked: str) -> None:
    model, data = Makes().eval(), images()
    other = copy.deepcopy(model.net)
    with torch.device("cuda"):
        report = bnfix.recalibrate(model, data)
    assert report.engine == parked
    bnfix.recalibrate(other, [batch + 0.25 for batch in images()])
    assert distance(model.net, other) <= 1e-4
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = bnfix.recalibrate(other, images(), certify="full")
    assert half.residual is not None
    assert max(half.residual.mean, half.residual.var) <= 1e-4


@pytest.mark.parametrize("parked", ["fibers", "threads"], indirect=True)
def test_a_stream_of_the_callers(parked: str) -> None:
    model = deep(4)
    other = copy.deepcopy(model)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert bnfix.recalibrate(model, images()).engine == parked
    torch.cuda.synchronize()
    bnfix.recalibrate(other, images())
    assert distance(model, other) <= 1e-6


def test_no_memory_left_on_the_device() -> None:
    model = deep(4, channels=64)
    data = images(512, 64, pixels=64)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    before = bits(model)
    # One forward of 64 holds some 200 MB, all chunks 540 MB at once.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4e8) / total)
    try:
        with pytest.raises(bnfix.errors.CalibrationError, match="out of memory"):
            bnfix.recalibrate(model, data, memory_budget="60GB", method="staged")
        assert same_bits(model, before)
        report = bnfix.recalibrate(model, data, memory_budget="60GB")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert report.method == "population"
    assert not same_bits(model, before)


def test_wrappers_are_looked_through() -> None:
    model = deep(3)
    other = copy.deepcopy(model)
    bnfix.recalibrate(nn.DataParallel(model), images())
    bnfix.recalibrate(torch.compile(other), images())  # type: ignore[arg-type]
    assert distance(model, other) <= 1e-6


def test_nccl(tmp_path: Any) -> None:
    import torch.distributed as dist

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        model = deep(3)
        other = copy.deepcopy(model)
        report = bnfix.recalibrate(model, images(), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    bnfix.recalibrate(other, images())
    assert report.ranks == 1
    assert distance(model, other) <= 1e-6
