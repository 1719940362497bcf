"""Laws of the fit: merging is pooling, moments are matched, least squares is least, R² does not see an affine."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnfix.swaps.pairing import DEAD, Paired, grouped
from bnfix.swaps.target import divisors

seeds = st.integers(0, 2**20)
channels = st.sampled_from([1, 2, 6, 8])
positions = st.sampled_from([(), (1,), (3,), (2, 3), (2, 2, 2)])


def pairs(seed: int, count: int, c: int, shape: tuple[int, ...], far: float = 1.0) -> tuple[Tensor, Tensor]:
    """(y, z) that have something to do with one another, (count, c, *shape), float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, c, *shape, generator=g, dtype=torch.float64)
    noise = torch.randn(count, c, *shape, generator=g, dtype=torch.float64)
    slope = torch.randn(c, generator=g, dtype=torch.float64).reshape(1, c, *(1,) * len(shape))
    return slope * x + 0.5 * noise + far, x - far


def same(a: Paired, b: Paired) -> None:
    assert a.n == b.n
    for name in ("y", "z", "var_y", "var_z", "cov"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-10, atol=1e-12)


@given(seeds, st.integers(2, 12), channels, positions, st.data())
@settings(max_examples=60)
def test_merging_is_pooling(seed: int, count: int, c: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    y, z = pairs(seed, count, c, shape)
    at = data.draw(st.integers(1, count - 1))
    parts = [Paired.of(y[:at], z[:at]), Paired.of(y[at:], z[at:])]
    same(parts[0].merge(parts[1]), Paired.of(y, z))
    same(parts[1].merge(parts[0]), Paired.of(y, z))


@given(seeds, st.integers(3, 12), channels, positions)
@settings(max_examples=60)
def test_moments_are_matched_and_least_squares_is_least(seed: int, count: int, c: int, shape: tuple[int, ...]) -> None:
    y, z = pairs(seed, count, c, shape)
    paired = Paired.of(y, z)
    alive = paired.var_z >= DEAD
    view = (1, c, *(1,) * len(shape))

    def of(scale: Tensor, shift: Tensor) -> Tensor:
        return scale.reshape(view) * z + shift.reshape(view)

    def error(scale: Tensor, shift: Tensor) -> Tensor:
        return ((of(scale, shift) - y) ** 2).transpose(0, 1).flatten(1).mean(1)

    scale, shift = paired.fit("moment")
    out = Paired.of(of(scale, shift), z)
    torch.testing.assert_close(out.y, paired.y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.var_y[alive], paired.var_y[alive], rtol=1e-9, atol=1e-12)
    best = paired.fit("ls")
    least = error(*best)
    assert bool((least <= error(scale, shift) + 1e-12).all())
    for d in (0.01, -0.01):
        assert bool((least <= error(best[0] + d, best[1]) + 1e-12).all())
        assert bool((least <= error(best[0], best[1] + d) + 1e-12).all())
    if bool(alive.all()):  # what is left of the variance is what R² says
        assert paired.r2 == pytest.approx(1 - (least.sum() / paired.var_y.sum()).item(), abs=1e-9)


@given(seeds, channels, st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=40)
def test_r2_does_not_see_an_affine_of_the_new_output(seed: int, c: int, a: float, b: float) -> None:
    y, z = pairs(seed, 9, c, (3,))
    assert Paired.of(y, a * z + b).r2 == pytest.approx(Paired.of(y, z).r2, abs=1e-9)
    assert 0 <= Paired.of(y, z).r2 <= 1
    assert Paired.of(y, a * y + b).r2 == pytest.approx(1.0)


@given(seeds, st.integers(1, 7), st.sampled_from([4, 8, 12]), positions, st.floats(0, 100))
@settings(max_examples=60)
def test_the_closed_form_is_group_norm(seed: int, count: int, c: int, shape: tuple[int, ...], far: float) -> None:
    y, x = pairs(seed, count, c, shape, far)
    groups = [g for g in divisors(c) if c // g * math.prod(shape) > 1]
    for found, number in zip(grouped(y, x, groups, 1e-3), groups, strict=True):
        same(found, Paired.of(y, F.group_norm(x, number, eps=1e-3)))


def test_a_channel_that_says_nothing_is_the_mean() -> None:
    y = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    paired = Paired.of(y, torch.tensor([[0.0, 1.0], [0.0, 2.0]]))
    scale, shift = paired.fit("moment")
    assert scale.tolist() == [0.0, 3.0]
    assert shift.tolist() == [2.0, -1.0]
    assert paired.r2 == pytest.approx(2.25 / 3.25)
    assert Paired.of(torch.full((4, 2), 0.1), torch.randn(4, 2)).r2 == 1.0


def test_a_falling_relation_has_a_negative_scale() -> None:
    z = torch.linspace(-1, 1, 9)[:, None]
    scale, shift = Paired.of(3 - 2 * z, z).fit("moment")
    assert scale.item() == pytest.approx(-2)
    assert shift.item() == pytest.approx(3)


@pytest.mark.parametrize("c", [1, 2, 7, 27, 64, 96, 512, 720, 2048])
def test_divisors_are_few_and_divide(c: int) -> None:
    found = divisors(c)
    assert found[0] == 1
    assert len(found) <= 8
    assert all(c % d == 0 and d <= 32 for d in found)
