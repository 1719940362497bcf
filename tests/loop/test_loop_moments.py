"""Batch moments read off running statistics are those of the batch; distances are those of the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop_nets import sgd, step, watch
from torch import Tensor, nn

from bnfix.loop.samples import Forward, Record, fetched, moments
from bnfix.loop.session import measured
from bnfix.loop.sites import Pattern
from bnfix.rules.loop_sites import beyond_noise
from bnfix.types import SitePair


def one_forward(norm: nn.Module, x: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    record, forward = Record(0), Forward(True, len(x), x.numel() // x.shape[1], 0)
    record.forwards.append(forward)
    record.begin(forward, norm)
    norm(x)
    record.close(norm)
    return moments(forward, fetched(record.forwards), float(norm.eps))


@settings(max_examples=40)
@given(
    momentum=st.one_of(st.none(), st.floats(1e-3, 1.0)),
    mean=st.floats(-20, 20),
    scale=st.floats(0.05, 20),
    before=st.integers(0, 4),
    double=st.booleans(),
    flat=st.booleans(),
)
def test_moments_of_the_batch(
    momentum: float | None, mean: float, scale: float, before: int, double: bool, flat: bool
) -> None:
    """Against the batch itself. Rounding of r to 24 bits, over α: 2⁻²⁴·|r|/α, twice; and F.batch_norm's own sums."""
    torch.manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    norm = (nn.BatchNorm1d(5, momentum=momentum) if flat else nn.BatchNorm2d(5, momentum=momentum)).to(dtype)
    shape = (64, 5) if flat else (16, 5, 4, 4)
    x = torch.randn(shape, dtype=dtype) * scale + mean
    for _ in range(before):
        norm(x * 1.5 + 1)
    found = one_forward(norm, x)
    dims = (0,) if flat else (0, 2, 3)
    true_mean, true_var = x.double().mean(dims).numpy(), x.double().var(dims).numpy()
    sigma = np.sqrt(true_var + norm.eps)
    alpha = momentum if momentum is not None else 1 / (before + 1)
    bits = 2.0**-53 if double else 2.0**-24
    largest = 2.5 * abs(mean) + scale + 1
    tolerance = 8 * bits * largest / alpha / scale + 16 * bits * (1 + largest / scale)
    if found is None:
        # Nothing is said only where rounding could blur it.
        blur = bits * max(largest / alpha / scale, max(1.0, (2 * scale) ** 2) * 2 / alpha / scale**2)
        assert blur > 0.005
        return
    assert abs((found[0] - true_mean) / sigma).max() <= tolerance
    spread = 8 * bits * max(1.0, 4 * scale**2 * 2.5) / alpha / scale**2 + 64 * bits * (1 + (largest / scale) ** 2)
    assert abs(found[1] / true_var - 1).max() <= max(spread, 1e-5)


def test_too_small_a_momentum_is_not_guessed_at() -> None:
    norm = nn.BatchNorm1d(4, momentum=1e-6)
    for _ in range(3):
        norm(torch.randn(32, 4) + 100)
    norm.running_mean.fill_(100.0)
    assert one_forward(norm, torch.randn(32, 4) + 100) is None


def test_half_precision_statistics_are_not_read() -> None:
    norm = nn.BatchNorm1d(4).bfloat16()
    assert one_forward(norm, torch.randn(32, 4, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("hand", ["copy", "reset", "second forward", "load"])
def test_what_others_write_is_no_batch(hand: str) -> None:
    """Only exactly one update between two looks is a batch."""
    norm, x = nn.BatchNorm1d(4), torch.randn(32, 4)
    record, forward = Record(0), Forward(True, 32, 32, 0)
    record.forwards.append(forward)
    record.begin(forward, norm)
    norm(x)
    if hand == "copy":
        norm.running_mean.copy_(torch.ones(4))
    elif hand == "reset":
        norm.reset_running_stats()
    elif hand == "second forward":
        norm(x)
    else:
        norm.load_state_dict(nn.BatchNorm1d(4).state_dict())
    record.close(norm)
    assert moments(forward, fetched([forward]), norm.eps) is None


def test_distance_between_sites_is_the_formula() -> None:
    """d = median_c |mean_k (μ1 − μ2)/σ|, l = median_c |mean_k ½ ln(v1/v2)|, errors from the scatter between steps."""
    rng = np.random.default_rng(0)
    eps, steps = 1e-5, 12
    pattern = Pattern(own=True)
    pattern.values = [32, 64]
    d, lam = [], []
    for k in range(steps):
        mean, var = rng.normal(size=(2, 7)) + k, rng.uniform(0.5, 2, size=(2, 7))
        pattern.add(k, [(mean[0], var[0]), (mean[1], var[1])], eps)
        d.append((mean[0] - mean[1]) / np.sqrt(var.mean(0) + eps))
        lam.append(0.5 * np.log((var[0] + eps) / (var[1] + eps)))
    (pair,) = pattern.pairs(["a", "b"])
    assert pair.shift == pytest.approx(np.median(abs(np.mean(d, 0))), rel=1e-12)
    assert pair.ratio == pytest.approx(np.median(abs(np.mean(lam, 0))), rel=1e-12)
    assert pair.shift_error == pytest.approx(np.median(np.std(d, 0, ddof=1)) / math.sqrt(steps), rel=1e-9)
    assert pair.ratio_error == pytest.approx(np.median(np.std(lam, 0, ddof=1)) / math.sqrt(steps), rel=1e-9)
    assert (pair.batches, pair.values) == (steps, 32)


@settings(max_examples=30)
@given(scale=st.floats(0.01, 100), offset=st.floats(-50, 50), sites=st.integers(2, 4))
def test_distance_does_not_depend_on_units(scale: float, offset: float, sites: int) -> None:
    """Means in σ and ratios of variances: the same for a·x + b (eps aside)."""
    rng = np.random.default_rng(1)
    one, other = Pattern(own=True), Pattern(own=True)
    one.values = other.values = [32] * sites
    for k in range(6):
        mean, var = rng.normal(size=(sites, 5)), rng.uniform(0.5, 2, size=(sites, 5))
        one.add(k, list(zip(mean, var, strict=True)), 0.0)
        other.add(k, list(zip(scale * mean + offset, scale**2 * var, strict=True)), 0.0)
    names = [str(i) for i in range(sites)]
    for a, b in zip(one.pairs(names), other.pairs(names), strict=True):
        assert (a.a, a.b) == (b.a, b.b)
        assert (a.shift, a.ratio) == (pytest.approx(b.shift, rel=1e-6, abs=1e-9), pytest.approx(b.ratio, abs=1e-9))


@pytest.mark.parametrize(("n", "seed"), [(n, s) for n in (2, 4, 16, 64) for s in range(4)])
def test_branches_of_one_distribution_are_not_told_apart(n: int, seed: int) -> None:
    """Two samples a batch, four or many, correlated pixels: chance alone is never a finding."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(14):
            step(optimizer, *[model(torch.randn(n, 3, 6, 6) + 3 * torch.randn(n, 3, 1, 1)) for _ in range(3)])
    report = w.report()
    assert report.clean
    assert any(p.batches >= 10 for norm in w.log.norms for s in norm.patterns for p in s.pairs)
    assert not any(any(beyond_noise(p)) for norm in w.log.norms for s in norm.patterns for p in s.pairs)


def test_noise_floor() -> None:
    """d > 4√(2/(K·m)), l > 4√(1/(K·m)), and ten batches at least."""
    floor = 4 * math.sqrt(2 / (10 * 32))
    assert beyond_noise(SitePair("a", "b", 10, 32, floor * 1.01, 0.0)) == (True, False)
    assert beyond_noise(SitePair("a", "b", 10, 32, floor * 0.99, 0.0)) == (False, False)
    assert beyond_noise(SitePair("a", "b", 9, 4096, 5.0, 5.0)) == (False, False)
    assert beyond_noise(SitePair("a", "b", 10, 4096, 0.4, 0.6, shift_error=0.11)) == (False, True)
    assert beyond_noise(SitePair("a", "b", 10, 4096, 0.4, 0.6, ratio_error=0.16)) == (True, False)
    assert beyond_noise(SitePair("a", "b", 10, 4096, 0.29, 0.49)) == (False, False)


def test_which_steps_are_measured() -> None:
    assert [i for i in range(100) if measured(i)] == [*range(16), 16, 32, 48, 64, 80, 96]
    assert [i for i in range(256, 600) if measured(i)] == [256, 320, 384, 448, 512, 576]
