"""Chunks that come one after the other have the moments of all of them together, though their inputs are gone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_stats_moments import EXACT, data, of, same
from torch import Tensor

from bnfix.stats import Gathering, Moments, Spread, gathering, sample_sums

# What float32 sums of some samples cost a variance (Gathering says so); of many, less.
ROUGH, FINE = 4e-6, 1e-6


def gathered(parts: list[Tensor], among: int = 0, masks: list[Tensor] | None = None) -> Moments:
    found: Gathering[str] = Gathering(among)
    for x, mask in zip(parts, masks or [None] * len(parts), strict=True):
        given_up = x.clone()
        found.add("a", sample_sums(x, None, mask), given_up, mask)
        given_up.fill_(torch.nan)
    return found.moments()["a"]


def near(found: Moments, x: Tensor, tolerance: float) -> bool:
    """Mean in σ and variance, of float64 references."""
    flat = x.double().transpose(0, 1).flatten(1)
    sd = flat.std(1, correction=0)
    return bool(
        ((found.mean - flat.mean(1)).abs() <= tolerance * sd).all()
        and ((found.variance(False) / sd**2 - 1).abs() <= tolerance).all()
    )


@given(data(), st.data())
def test_any_split_has_the_moments_of_all(x: Tensor, more: st.DataObject) -> None:
    cuts = sorted(more.draw(st.lists(st.integers(1, len(x) - 1), max_size=4)))
    parts = [x[a:b] for a, b in zip([0, *cuts], [*cuts, len(x)], strict=True) if b > a]
    assert same(of(x), gathered(parts))


@given(data(), st.integers(1, 11))
def test_spreads_join_as_moments_merge(x: Tensor, cut: int) -> None:
    a, b = of(x[: cut % len(x)]), of(x[cut % len(x) :])
    merged, joined = a.merge(b), Spread(a.n, a.mean, a.m2).joined(b)
    assert torch.equal(joined.n, merged.n)
    torch.testing.assert_close(joined.mean, merged.mean, rtol=EXACT, atol=0)
    torch.testing.assert_close(joined.m2, merged.m2, rtol=EXACT, atol=0)


def test_each_chunk_is_told_its_own_spread() -> None:
    torch.manual_seed(0)
    found: Gathering[str] = Gathering()
    for x in torch.randn(5, 16, 4, 7) * torch.tensor([0.1, 1, 5, 50]).view(4, 1) + 0.5:
        own, alone = found.add("a", sample_sums(x), x), of(x)
        assert own.n == 16 * 7
        torch.testing.assert_close(own.mean, alone.mean, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(own.m2, alone.m2, rtol=EXACT, atol=0)


@pytest.mark.parametrize("centre", [0.0, 3.0, 100.0, 1e4])
def test_cancellation_is_seen_while_the_input_is_there(centre: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(60, 5, 8) + centre
    assert near(gathered([*x.split(8)]), x, FINE)


def test_what_many_samples_allow_is_not_pooled_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """mean²/var is 9: too much for the sums of 4 samples, not for those of 256."""
    torch.manual_seed(2)
    x = torch.randn(256, 5, 32) + 3
    assert near(gathered([*x.split(4)]), x, FINE)
    calls: list[int] = []
    monkeypatch.setattr(gathering, "pool", lambda *_: calls.append(1))
    assert near(gathered([*x.split(4)], among=256), x, FINE)
    assert near(gathered([*x[:8].split(4)], among=256), x[:8], ROUGH)  # there were fewer than was said
    assert not calls


@pytest.mark.parametrize("most", [1, 100, 1 << 18])
def test_sums_do_not_pile_up(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_WAITING", most)
    torch.manual_seed(3)
    x = torch.randn(90, 6, 4, dtype=torch.float64) * 2 + 1
    found: Gathering[str] = Gathering()
    for part in x.split(7):
        found.add("a", sample_sums(part), part)
        assert found._numbers < most
    assert same(of(x), found.moments()["a"])
    assert same(of(x), found.moments()["a"])  # asked again


def test_chunks_of_several_dtypes() -> None:
    torch.manual_seed(4)
    x = torch.randn(40, 3, 16)
    assert near(gathered([x[:10], x[10:20].double(), x[20:]]), x, FINE)


def test_masked_positions_and_a_chunk_that_is_all_padding() -> None:
    torch.manual_seed(5)
    x = torch.randn(30, 3, 12, dtype=torch.float64) + 1
    mask = torch.rand(30, 12) < 0.6
    mask[10:20] = False
    x[10:20] = torch.nan
    found = gathered([*x.split(10)], masks=[*mask.split(10)])
    kept = x.transpose(1, 2)[mask]
    torch.testing.assert_close(found.mean, kept.mean(0), rtol=EXACT, atol=0)
    torch.testing.assert_close(found.variance(False), kept.var(0, correction=0), rtol=EXACT, atol=0)
    assert found.n == int(mask.sum())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_channel_alone(value: float) -> None:
    torch.manual_seed(6)
    x = torch.randn(20, 3, 5)
    x[13, 1, 2] = value
    found: Gathering[str] = Gathering()
    finite = [bool(torch.isfinite(found.add("a", sample_sums(p), p).m2).all()) for p in x.split(5)]
    assert finite == [True, True, False, True]
    assert torch.isfinite(found.moments()["a"].m2).tolist() == [True, False, True]


def test_channels_of_zeros_and_huge_values() -> None:
    torch.manual_seed(7)
    x = torch.randn(20, 3, 5)
    x[:, 0], x[:, 1] = 0, x[:, 1] * 1e25
    found = gathered([*x.split(5)])
    assert found.mean[0] == found.m2[0] == 0
    flat = x[:, 1:].double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found.mean[1:], flat.mean(1), rtol=FINE, atol=0)
    torch.testing.assert_close(found.variance(False)[1:], flat.var(1, correction=0), rtol=FINE, atol=0)


def test_places_keep_apart_and_settle_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_WAITING", 500)
    torch.manual_seed(8)
    xs = {c: torch.randn(40, c, 6, dtype=torch.float64) + c for c in (2, 3, 9)}
    found: Gathering[int] = Gathering()
    for i in range(0, 40, 4):
        for c, x in xs.items():
            found.add(c, sample_sums(x[i : i + 4]), x[i : i + 4])
            assert sum(len(s.s.flatten()) for waiting in found._waiting.values() for s in waiting) < 500
    moments = found.moments()
    assert all(same(of(x), moments[c]) for c, x in xs.items())


def test_nothing_has_no_moments() -> None:
    assert Gathering().moments() == {}
