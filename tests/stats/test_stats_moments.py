"""Laws of moments: however the data are split, ordered, masked or packed, they are the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bnfix.stats import Moments, merge_all, pool, sample_sums

# Float64 rounding of a few hundred additions, magnified by mean²/var ≤ 100 of the data drawn here.
EXACT = 1e-12
CHANNELS = 3
FIELDS = ("n", "mean", "m2", "units", "gram")


def of(x: Tensor, samples: int | None = None, mask: Tensor | None = None) -> Moments:
    return pool([sample_sums(x, samples, mask)], [x], [mask])


def same(a: Moments, b: Moments, tolerance: float = EXACT) -> bool:
    """Each field to ``tolerance`` of its scale: σ for means, the product of residual sizes for the gram matrix."""
    sd = a.variance(False).sqrt()
    rr, _, _, ss, _, nn = a.gram.clamp(min=0)
    r, s, n = (rr + a.variance(False) ** 2 * nn).sqrt(), (ss + sd**2 * nn).sqrt(), nn.sqrt()
    scales = torch.stack((r * r, r * s, r * n, s * s, s * n, n * n))
    return (
        torch.equal(a.n, b.n)
        and torch.equal(a.units, b.units)
        and bool(((a.mean - b.mean).abs() <= tolerance * sd).all())
        and bool(((a.m2 - b.m2).abs() <= tolerance * a.m2).all())
        and bool(((a.gram - b.gram).abs() <= tolerance * scales).all())
    )


def identical(a: Moments, b: Moments) -> bool:
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in FIELDS)


@st.composite
def data(draw: st.DrawFn, least: int = 2) -> Tensor:
    """Samples (N, C, L), float64: some constant over their positions, means up to ten standard deviations."""
    samples, length = draw(st.integers(least, 12)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    centre = draw(st.floats(-5, 5)) * torch.ones(CHANNELS, 1)
    spread = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    x = torch.randn(samples, CHANNELS, length, generator=generator, dtype=torch.float64)
    x += torch.randn(samples, CHANNELS, 1, generator=generator, dtype=torch.float64)
    if length == 1 and samples < 4:  # else two values may coincide, and mean²/var has no bound
        x = x.cumsum(0).sign() + torch.arange(samples).view(-1, 1, 1)
    return (x + centre) * spread


@given(data(), st.data())
def test_any_split_has_the_same_moments(x: Tensor, more: st.DataObject) -> None:
    cuts = sorted(more.draw(st.lists(st.integers(0, len(x)), max_size=4)))
    parts = [x[a:b] for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True)]
    whole = of(x)
    assert same(whole, merge_all([of(p) for p in parts]))
    assert same(whole, pool([sample_sums(p) for p in parts], parts))


@given(data(), data(), data())
def test_merging_is_associative_and_commutative(x: Tensor, y: Tensor, z: Tensor) -> None:
    scale = x.abs().max() / y.abs().max()
    a, b, c = of(x), of(y * scale), of(z * (x.abs().max() / z.abs().max()))
    assert same(a.merge(b), b.merge(a))
    assert same(a.merge(b).merge(c), a.merge(b.merge(c)))


@given(data(), st.randoms(use_true_random=False))
def test_the_order_of_samples_is_of_no_matter(x: Tensor, random) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(x)))
    random.shuffle(order)
    assert same(of(x), of(x[order]))


@given(data())
def test_packed_moments_come_back_to_the_bit(x: Tensor) -> None:
    found = of(x)
    packed = found.packed()
    assert packed.shape == Moments.empty(CHANNELS, "cpu").packed().shape
    assert packed.dtype == torch.float64
    assert identical(Moments.unpack(packed.clone(), CHANNELS), found)


def test_packed_moments_of_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="4 channels"):
        Moments.unpack(Moments.empty(3, "cpu").packed(), 4)


@given(data())
def test_nothing_is_passed_over_exactly(x: Tensor) -> None:
    found, nothing = of(x), Moments.empty(CHANNELS, "cpu")
    assert identical(found.merge(nothing), found)
    assert identical(nothing.merge(found), found)
    assert identical(nothing.merge(nothing), nothing)


@given(data())
def test_all_masked_is_passed_over(x: Tensor) -> None:
    masked = of(torch.full_like(x, torch.nan), mask=torch.zeros(len(x), dtype=torch.bool))
    assert identical(masked, Moments.empty(CHANNELS, "cpu"))
    found = of(x)
    assert identical(found.merge(masked), found)


@given(data(), st.integers(0, 2**32))
def test_masked_is_the_same_as_absent(x: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(len(x), generator=generator) > 0.3
    kept[:2] = True
    mask = kept.view(-1, 1).expand(len(x), x.shape[2])
    hidden = torch.where(kept.view(-1, 1, 1), x, torch.nan)
    assert same(of(x[kept]), of(hidden, mask=mask))
    assert same(of(x[kept]), of(hidden, mask=kept))


def test_moments_are_those_of_the_values() -> None:
    x = torch.randn(20, CHANNELS, 7, dtype=torch.float64) * 3 + 2
    found, values = of(x), x.transpose(0, 1).flatten(1)
    assert found.n == 140
    assert found.units == 20
    assert torch.allclose(found.mean, values.mean(1), rtol=EXACT)
    assert torch.allclose(found.variance(), values.var(1), rtol=EXACT)
    assert torch.allclose(found.variance(False), values.var(1, unbiased=False), rtol=EXACT)


def test_one_value_leaves_the_variance_undefined() -> None:
    found = of(torch.randn(1, CHANNELS))
    assert found.n == 1
    assert found.variance().isnan().all()
    assert (found.variance(False) == 0).all()
    assert all(se.isnan().all() for se in found.standard_errors())


def test_no_value_leaves_both_variances_undefined() -> None:
    nothing = Moments.empty(CHANNELS, "cpu")
    assert nothing.variance().isnan().all()
    assert nothing.variance(False).isnan().all()
    assert all(se.isnan().all() for se in nothing.standard_errors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(40, CHANNELS), (40, CHANNELS, 6), (40, CHANNELS, 5, 7)])
@pytest.mark.parametrize("centre", [0.0, 3.0, 1000.0])
def test_standard_errors_with_the_sample_as_the_unit(dtype: torch.dtype, shape: tuple[int, ...], centre: float) -> None:
    """The formula of the design page: sd(m_i)/√N and sd(ψ_i)/√N, ψ_i = q_i − 2μm_i + μ² − σ²."""
    x = torch.randn(shape) + torch.randn(*shape[:2], *[1] * (len(shape) - 2)) + centre
    x = x.to(dtype)
    values = x.double().flatten(2) if x.dim() > 2 else x.double().unsqueeze(2)
    mean = values.mean((0, 2)).view(1, -1, 1)
    m, psi = values.mean(2), ((values - mean) ** 2).mean(2)
    se_mean, se_var = of(x).standard_errors()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10  # residuals in the dtype of the sums
    assert torch.allclose(se_mean, m.std(0) / math.sqrt(40), rtol=tolerance)
    assert torch.allclose(se_var, psi.std(0) / math.sqrt(40), rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centre", [0.0, 1000.0])
def test_standard_errors_of_samples_with_unequal_counts(dtype: torch.dtype, centre: float) -> None:
    x = (torch.randn(30, CHANNELS, 9) + torch.randn(30, CHANNELS, 1) + centre).to(dtype)
    mask = torch.arange(9) < torch.randint(0, 10, (30, 1))
    mask[0] = False
    kept = [[x[i, c, mask[i]].double() for i in range(30) if mask[i].any()] for c in range(CHANNELS)]
    se_mean, se_var = of(x, mask=mask).standard_errors()
    for c in range(CHANNELS):
        pooled = torch.cat(kept[c])
        mean, var, n, units = pooled.mean(), pooled.var(unbiased=False), len(pooled), len(kept[c])
        scale = math.sqrt(units / (units - 1)) / n
        s = torch.stack([(v - mean).sum() for v in kept[c]])
        r = torch.stack([((v - mean) ** 2 - var).sum() for v in kept[c]])
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        assert math.isclose(se_mean[c], scale * s.norm(), rel_tol=tolerance)
        assert math.isclose(se_var[c], scale * r.norm(), rel_tol=tolerance)


def test_standard_errors_come_through_merging() -> None:
    """Two halves with other means and counts: what one pool says of both."""
    x, y = torch.randn(20, CHANNELS, 6).double(), torch.randn(11, CHANNELS, 9).double() * 3 + 5
    merged = of(x).merge(of(y)).standard_errors()
    pooled = pool([sample_sums(x), sample_sums(y)], [x, y]).standard_errors()
    for a, b in zip(merged, pooled, strict=True):
        assert torch.allclose(a, b, rtol=1e-11)


def test_standard_errors_predict_the_spread_of_repetitions() -> None:
    """Positions of a sample are alike: an error that took them for independent would be three times too small."""
    found = []
    for _ in range(300):
        x = torch.randn(50, 1, 16) * 0.5 + torch.randn(50, 1, 1)
        moments = of(x)
        found.append(torch.stack((moments.mean, moments.variance(), *moments.standard_errors())))
    mean, var, se_mean, se_var = torch.stack(found).squeeze(2).unbind(1)
    # The sd of 300 repetitions is known to 1/√600 = 4 %, and SE(var) is low by some 3 % at 50 samples.
    assert abs(mean.std() / se_mean.mean() - 1) < 0.15
    assert abs(var.std() / se_var.mean() - 1) < 0.15


def test_merging_nothing_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="no moments"):
        merge_all([])


def test_chunks_of_several_sizes_and_masks_pool_together() -> None:
    xs = [torch.randn(4, CHANNELS, 5, 5), torch.randn(3, CHANNELS, 8, 8) + 1, torch.randn(0, CHANNELS, 5, 5)]
    masks = [None, torch.rand(3, 8, 8) > 0.5, None]
    found = pool([sample_sums(x, None, m) for x, m in zip(xs, masks, strict=True)], xs, masks)
    values = torch.cat([xs[0].transpose(0, 1).flatten(1), xs[1].transpose(0, 1)[:, masks[1]]], 1).double()
    assert found.n == values.shape[1]
    assert found.units == 7
    assert torch.allclose(found.mean, values.mean(1), atol=1e-7)
    assert torch.allclose(found.variance(), values.var(1), rtol=1e-6)
