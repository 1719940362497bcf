"""Float32 data against a float64 reference: means to 1e-7 σ, variances to 1e-6, whatever the mean, size and spread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnfix.stats import Moments, pool, sample_sums

SHAPES = [(64, 8), (64, 8, 2, 2), (64, 8, 16, 16), (16, 4, 48, 48), (2, 4, 112, 112), (1, 4, 100, 100), (300, 4, 5, 5)]


def of(x: Tensor, mask: Tensor | None = None) -> Moments:
    return pool([sample_sums(x, None, mask)], [x], [mask])


def values(x: Tensor) -> Tensor:
    return x.double().transpose(0, 1).flatten(1)


def errors(x: Tensor) -> tuple[float, float]:
    """Of the mean in standard deviations, of the variance relative; the worst channel."""
    found, v = of(x), values(x)
    mean = (found.mean - v.mean(1)).abs() / v.std(1)
    return mean.max().item(), (found.variance() / v.var(1) - 1).abs().max().item()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ratio", [0.0, 0.9, 1.1, 2.0, 2.9, 3.9, 4.1, 10.0, 100.0, 1e4, 1e5])
@pytest.mark.parametrize("shape", SHAPES)
def test_mean_and_variance(shape: tuple[int, ...], ratio: float, memory: torch.memory_format) -> None:
    """``ratio`` is mean/σ: from √N (of mean²/var, at most 16) on, a channel is computed anew in float64."""
    x = torch.randn(shape) + ratio
    if x.dim() == 4:
        x = x.contiguous(memory_format=memory)
    mean, var = errors(x)
    assert mean < 1e-7
    assert var < (1e-6 if ratio < 4 else 2e-9)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_long_rows_do_not_add_up_their_rounding(memory: torch.memory_format) -> None:
    """One image of 224 px: a norm over 50,000 positions in one run is 1e-6 off."""
    _, var = errors((torch.randn(1, 64, 224, 224) + 0.5).contiguous(memory_format=memory))
    assert var < 4e-7


@pytest.mark.parametrize("scale", [1e-25, 1e-21, 1e-20, 1e-19, 1e-16, 1e-12, 1e12, 1e17, 1e20, 1e30, 3e37])
@pytest.mark.parametrize("shape", [(64, 8), (64, 8, 3, 3), (8, 8, 20, 20)])
def test_squares_that_float32_cannot_hold(shape: tuple[int, ...], scale: float) -> None:
    mean, var = errors(torch.randn(shape) * scale)
    assert mean < 1e-7
    assert var < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.0, 2.0, 40.0])
def test_half_precision_counts_as_stored(dtype: torch.dtype, ratio: float) -> None:
    mean, var = errors((torch.randn(64, 8, 7, 7) + ratio).to(dtype))
    assert mean < 1e-7
    assert var < 1e-6


def test_bf16_over_thousands_of_batches() -> None:
    """Mean 10, variance .25 in 2,500 batches: a bf16 running average gives mean 8 or variance 1."""
    merged = Moments.empty(2, "cpu")
    seen = []
    for _ in range(2500):
        x = (torch.randn(4, 2, 3) * 0.5 + 10).bfloat16()
        seen.append(x)
        merged = merged.merge(of(x))
    v = values(torch.cat(seen))
    assert torch.allclose(merged.mean, v.mean(1), rtol=1e-12)
    assert torch.allclose(merged.variance(), v.var(1), rtol=1e-10)  # mean²/var is 400: all in float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 3, 3), (7, 3, 37, 41)])
def test_a_constant_channel_has_no_variance_at_all(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    level = torch.tensor([1 / 3, -7e4 / 9, 0.0], dtype=torch.float64).to(dtype)
    x = level.view(1, 3, *[1] * (len(shape) - 2)).expand(shape).contiguous()
    found = pool([sample_sums(x)] * 3, [x] * 3)
    assert (found.m2 == 0).all()
    assert (found.mean == level.double()).all()
    se_mean, se_var = found.standard_errors()
    assert (se_mean <= 1e-14 * level.double().abs()).all()
    assert (se_var <= 1e-28 * level.double() ** 2).all()


def test_a_variance_is_never_negative() -> None:
    level = torch.randn(1, 64, 1, 1) * 10 ** torch.linspace(-6, 6, 64).view(1, 64, 1, 1)
    for step in (1e-9, 1e-7, 1e-6, 1e-4):
        x = level * (1 + step * torch.randn(16, 64, 6, 6))
        found = of(x)
        assert (found.m2 >= 0).all()
        assert torch.allclose(found.variance(), values(x).var(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_channel_and_nowhere_else(bad: float) -> None:
    x = torch.randn(8, 5, 6, 6)
    clean = of(x)
    x[3, 2, 1, 1] = bad
    found = of(x)
    poisoned = torch.arange(5) == 2
    assert torch.equal(found.mean.isfinite() & found.m2.isfinite(), ~poisoned)
    assert torch.equal(found.m2[~poisoned], clean.m2[~poisoned])


def test_inputs_are_read_again_for_doubtful_channels_only() -> None:
    x = torch.randn(64, 5, 4, 4)
    x[:, 3] += 50
    sums = sample_sums(x)
    gone = torch.full_like(x, torch.nan)
    gone[:, 3] = x[:, 3]
    found, whole = pool([sums], [gone]), of(x)
    assert torch.equal(found.m2, whole.m2)
    assert torch.equal(found.gram, whole.gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_stay_as_they_are(dtype: torch.dtype) -> None:
    x = torch.randn(8, 3, 6, 6, dtype=dtype) + 50
    before, mask = x.clone(), torch.rand(8, 6, 6) > 0.5
    of(x)
    of(x, mask)
    assert torch.equal(x, before)


def test_large_inputs_are_read_again_in_parts() -> None:
    """More values than are converted at a time; samples of two rows stay whole."""
    x = torch.randn(6, 3, 320, 320) + 30
    found = pool([sample_sums(x, 3)], [x])
    v = values(x)
    assert found.units == 3
    assert torch.allclose(found.mean, v.mean(1), rtol=1e-12)
    assert torch.allclose(found.variance(), v.var(1), rtol=1e-9)
    m = x.double().view(3, 2, 3, -1).mean((1, 3))
    assert torch.allclose(found.standard_errors()[0], m.std(0) / 3**0.5, rtol=1e-8)


@pytest.mark.parametrize("ratio", [0.0, 30.0])
def test_masks_go_through_the_guard(ratio: float) -> None:
    x = torch.randn(16, 4, 9) + ratio
    mask = torch.rand(16, 9) > 0.4
    found = of(torch.where(mask.unsqueeze(1), x, torch.inf), mask)
    v = x.transpose(0, 1)[:, mask].double()
    assert torch.allclose(found.mean, v.mean(1), atol=1e-7, rtol=1e-12)
    assert torch.allclose(found.variance(), v.var(1), rtol=1e-6 if ratio == 0 else 1e-10)


def test_inputs_and_sums_must_match() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="1 sums and 2 inputs"):
        pool([sample_sums(x)], [x, x])
    with pytest.raises(ValueError, match="0 sums"):
        pool([], [])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.0, 3.0, 1e4])
def test_on_cuda(shape: tuple[int, ...], ratio: float) -> None:
    x = torch.randn(shape, device="cuda") + ratio
    found, v = of(x), values(x.cpu())
    assert found.mean.is_cuda
    assert ((found.mean.cpu() - v.mean(1)).abs() / v.std(1)).max() < 1e-7
    assert (found.variance().cpu() / v.var(1) - 1).abs().max() < 1e-6
