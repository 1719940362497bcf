"""The divergence of normal distributions: its formula, its limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from bnfix.stats import kl


def one(mean1: float, var1: float, mean0: float, var0: float) -> float:
    return kl(*(torch.tensor([v], dtype=torch.float64) for v in (mean1, var1, mean0, var0))).item()


def test_it_is_that_of_torch() -> None:
    m1, m0 = torch.randn(2, 50, dtype=torch.float64)
    v1, v0 = torch.randn(2, 50, dtype=torch.float64).exp()
    expected = kl_divergence(Normal(m1, v1.sqrt()), Normal(m0, v0.sqrt()))
    assert torch.allclose(kl(m1, v1, m0, v0), expected, rtol=1e-10)


def test_it_is_in_float64_whatever_comes_in() -> None:
    half = [torch.tensor([v]).bfloat16() for v in (0.5, 2.0, 0.25, 1.0)]
    assert kl(*half).dtype == torch.float64
    assert kl(*half).item() == pytest.approx(one(0.5, 2.0, 0.25, 1.0), rel=1e-12)


@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-9])
def test_small_drifts_do_not_cancel(small: float) -> None:
    """Near v1 = v0 it is (v1/v0 − 1)²/4; the formula as written loses that to rounding from 1e-8 on."""
    assert one(0.0, 1 + small, 0.0, 1.0) == pytest.approx(small**2 / 4, rel=max(small, 1e-6))
    assert one(small, 1.0, 0.0, 1.0) == pytest.approx(small**2 / 2, rel=1e-12)


def test_the_same_has_none() -> None:
    assert one(0.3, 0.7, 0.3, 0.7) == 0
    assert one(0.3, 0.0, 0.3, 0.0) == 0


@pytest.mark.parametrize(
    "case", [(0.0, 1.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 0.0), (1.0, 0.0, 0.0, 2.0)]
)
def test_a_point_against_anything_else_is_infinitely_far(case: tuple[float, float, float, float]) -> None:
    assert one(*case) == math.inf


@pytest.mark.parametrize(
    "case",
    [
        (0.0, -1.0, 0.0, 1.0),
        (0.0, 1.0, 0.0, -1.0),
        (0.0, -1.0, 0.0, -1.0),
        (0.0, -1.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, -1.0),
        (math.nan, 1.0, 0.0, 1.0),
        (math.nan, 1.0, 0.0, 0.0),
        (math.nan, 0.0, 0.0, 0.0),
        (0.0, math.nan, 0.0, 0.0),
        (0.0, math.nan, 0.0, 1.0),
        (0.0, 1.0, 0.0, math.nan),
        (math.nan, 0.0, 0.0, 1.0),
    ],
)
def test_what_is_no_distribution_has_no_divergence(case: tuple[float, float, float, float]) -> None:
    assert math.isnan(one(*case))
