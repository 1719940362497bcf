"""Dtypes, layouts and devices: what is folded is stored as it was, as near to the exact number as its dtype allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
from nets import bits, lived_in, relative_error, same_bits
from torch import Tensor, nn

import bnfix

HALVES = [torch.float16, torch.bfloat16]
IMAGE = (2, 3, 8, 8)


def both_ways() -> nn.Module:
    """One norm goes back, one forward, one back through a pool; nothing else is in the model."""
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 2)]
    return lived_in(nn.Sequential(*layers, nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_is_as_near_as_the_original(dtype: torch.dtype) -> None:
    """Against float64: at most twice the original's own error, over many inputs."""
    model = both_ways().to(dtype)
    x = torch.randn(64, 3, 8, 8).to(dtype)
    before = bits(model)
    result = bnfix.fold(model, x)
    assert same_bits(model, before)
    assert result.edits
    assert all(e.ulp is not None and e.ulp <= 0.5 for e in result.edits)
    assert not any(r.defect for r in result.refusals)
    assert result.model is not None
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    exact = both_ways().to(dtype).double()(x.double())
    assert relative_error(result.model(x), exact) <= 2 * relative_error(model(x), exact)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("ahead", [False, True], ids=["back", "ahead"])
def test_half_layer_beside_float32_norm(dtype: torch.dtype, ahead: bool) -> None:
    """F.batch_norm takes half input with float32 statistics: the layer stays half, and is rounded once."""
    norm, conv = nn.BatchNorm2d(3 if ahead else 4), nn.Conv2d(3, 4, 3)
    model = lived_in(nn.Sequential(nn.Sigmoid(), *([norm, conv] if ahead else [conv, norm])))
    conv.to(dtype)
    x = torch.randn(IMAGE).to(dtype)
    result = bnfix.fold(model, x)
    assert len(result.edits) == 1, result.refusals
    assert result.edits[0].ulp is not None
    assert result.edits[0].ulp <= 0.5
    assert result.model is not None
    found = result.model(x)
    assert found.dtype == dtype
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert relative_error(found, model(x)) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("ahead", [False, True], ids=["back", "ahead"])
def test_norm_between_casts(ahead: bool) -> None:
    """``norm(x.float()).half()``, as models in half precision do it by hand: kept or refused."""

    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1).half(), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = x if ahead else self.conv(x)
            x = self.bn(x.float()).half()
            out: Tensor = self.conv(x) if ahead else x
            return out.relu()

    model, x = lived_in(Casts()), torch.randn(IMAGE).half()
    result = bnfix.fold(model, x)
    assert result.model is not None
    assert not any(r.defect for r in result.refusals)
    assert relative_error(result.model(x), model(x)) < 8 * torch.finfo(torch.float16).eps
    assert result.model(x).dtype == torch.float16


def test_overflow_between_is_no_reason_to_scale_differently() -> None:
    """A layer whose weights fit, and whose folded weights do not: refused, not infinite."""
    model = lived_in(nn.Sequential(nn.Sigmoid(), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)))
    with torch.no_grad():
        model[1].weight.fill_(3e4)
        model[2].weight.fill_(8.0)
    model[2].half()
    x = torch.rand(IMAGE).half()
    result = bnfix.fold(model, x, verify=False)
    assert not result.edits
    assert "holds" in result.refusals[0].reason


@pytest.mark.parametrize("case", ["eps", "var 0", "γ 0", "γ negative", "all γ 0"])
def test_extreme_norms_go_both_ways(case: str) -> None:
    for ahead in (False, True):
        norm, conv = nn.BatchNorm2d(3 if ahead else 4, eps=0.1 if case == "eps" else 1e-5), nn.Conv2d(3, 4, 3)
        model = lived_in(nn.Sequential(nn.Sigmoid(), *([norm, conv] if ahead else [conv, norm])))
        with torch.no_grad():
            if case == "var 0":
                norm.running_var[1] = 0.0  # type: ignore[index]
            elif case == "γ 0":
                norm.weight[0] = 0.0
            elif case == "γ negative":
                norm.weight.neg_()
            elif case == "all γ 0":
                norm.weight.zero_()
        x = torch.randn(IMAGE)
        result = bnfix.fold(model, x)
        assert len(result.edits) == 1, result.refusals
        assert result.model is not None
        other = torch.randn(IMAGE)
        # Variance 0 divides by √1e-5: what the layer gives is amplified 316 times, its rounding with it.
        assert relative_error(result.model(other), model(other)) < (1e-4 if case == "var 0" else 1e-6)


def test_float64_keeps_its_digits() -> None:
    model, x = both_ways().double(), torch.randn(IMAGE).double()
    result = bnfix.fold(model, x)
    assert len(result.edits) == 3, result.refusals
    assert result.model is not None
    assert {t.dtype for t in result.model.state_dict().values()} == {torch.float64}
    assert relative_error(result.model(x), model(x)) < 1e-14


@pytest.fixture
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double_by_default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_default_dtype_is_not_the_models(dtype: torch.dtype) -> None:
    model, x = both_ways().to(dtype), torch.randn(IMAGE, dtype=dtype)
    result = bnfix.fold(model, x)
    assert len(result.edits) == 3, result.refusals
    assert result.model is not None
    assert {t.dtype for t in result.model.state_dict().values()} == {dtype}
    assert result.model(x).dtype == dtype
    assert relative_error(result.model(x), model(x)) < 16 * torch.finfo(dtype).eps
    assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("rank", [2, 3])
def test_channels_last_weights_and_outputs(rank: int) -> None:
    """Back, ahead, and in a layer that was not touched."""
    layout = torch.channels_last if rank == 2 else torch.channels_last_3d
    conv: Any = getattr(nn, f"Conv{rank}d")
    norm: Any = getattr(nn, f"BatchNorm{rank}d")
    layers = [conv(3, 4, 3, bias=False), norm(4), nn.ReLU(), norm(4), conv(4, 4, 2), nn.ReLU(), conv(4, 4, 2)]
    model = lived_in(nn.Sequential(*layers)).to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(2, 3, *(6,) * rank).to(memory_format=layout)
    result = bnfix.fold(model, x)
    assert len(result.edits) == 2, result.refusals
    assert result.model is not None
    for at in (0, 4, 6):
        assert result.model[at].weight.stride() == model[at].weight.stride()
        assert result.model[at].weight.is_contiguous(memory_format=layout)
    assert result.model(x).stride() == model(x).stride()


def test_gradients_asked_for_stay_as_they_are() -> None:
    """Of each layer for itself: what was frozen stays frozen, a bias that is gained goes with its layer."""
    model = both_ways()
    model[0].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert len(result.edits) == 3, result.refusals
    assert result.model is not None
    asked = {n: p.requires_grad for n, p in result.model.named_parameters()}
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: asked[n] for n in asked if n in before} == {n: before[n] for n in asked if n in before}
    assert asked["0.bias"] is False


def test_buffers_of_others_keep_their_dtype() -> None:
    class Counts(nets.TwoConsumers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.tensor(7))
            self.register_buffer("mask", torch.tensor([True, False, True, True]))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x))) * self.mask.view(1, -1, 1, 1)

    result = bnfix.fold(lived_in(Counts()), torch.randn(IMAGE))
    assert len(result.edits) == 1
    assert result.model is not None
    assert result.model.steps.dtype == torch.int64
    assert result.model.mask.dtype == torch.bool


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_on_cuda(dtype: torch.dtype) -> None:
    """On the device, and all that is new there too."""
    model = both_ways().to("cuda", dtype)
    x = torch.randn(16, 3, 8, 8, device="cuda").to(dtype)
    before = bits(model)
    result = bnfix.fold(model, x)
    assert same_bits(model, before)
    assert len(result.edits) == 3, result.refusals
    assert not any(r.defect for r in result.refusals)
    assert result.model is not None
    assert {t.device.type for t in result.model.state_dict().values()} == {"cuda"}
    exact = both_ways().to(dtype).double()(x.double().cpu())
    # TF32 in convolutions of float32: the original's own error is what counts.
    assert relative_error(result.model(x).cpu(), exact) <= 4 * relative_error(model(x).cpu(), exact) + 1e-14
