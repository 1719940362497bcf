"""What a recalibration says of itself, against brute force: the worst channel, what is unknown, what has no spread."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnfix.types import LayerStats, Recalibration, Residual

NAN, INF = math.nan, math.inf
numbers = st.floats(-1e3, 1e3) | st.just(NAN)
variances = st.floats(1e-6, 1e4) | st.sampled_from([0.0, 1e-30, NAN])
channel = st.tuples(numbers, variances, numbers, variances, st.floats(0, 10) | st.just(NAN), st.floats(0, 10))


def stats(rows: list[tuple[float, ...]], samples: int = 100, site: str = "bn") -> LayerStats:
    """Rows of (mean before, variance before, mean, variance, SE of the mean, SE of the variance)."""
    before, stored, mean, var, se_mean, se_var = (tuple(column) for column in zip(*rows, strict=True))
    rest = tuple(NAN for _ in rows)
    return LayerStats(site, 0, 9 * samples, samples, before, stored, mean, var, mean, var, se_mean, se_var, rest, rest)


def with_kl(*each: float, site: str = "bn", call: int = 0) -> LayerStats:
    plain = tuple(1.0 for _ in each)
    return LayerStats(site, call, 9, 3, plain, plain, plain, plain, plain, plain, plain, plain, plain, each)


def known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def same(got: float, wanted: np.ndarray) -> bool:
    """Up to a few roundings of float64: squares and roots are taken in another order, and a square may underflow."""
    return math.isnan(got) if wanted.size == 0 else bool(np.isclose(got, wanted.max(), rtol=1e-12, atol=1e-150))


@given(st.lists(channel, min_size=1, max_size=8))
def test_a_layer_is_as_its_worst_channel(rows: list[tuple[float, ...]]) -> None:
    layer = stats(rows)
    before, stored, mean, var, se_mean, se_var = np.array(rows, dtype=np.float64).T
    floor = 1e-12 + (2.0**-23 * mean) ** 2
    spread = var > floor
    with np.errstate(all="ignore"):
        assert same(layer.mean_shift, known(np.abs(mean - before) / np.where(spread, np.sqrt(var), 1)))
        assert same(layer.se, known((se_mean / np.sqrt(var))[spread]))
        assert same(layer.var_se, known((se_var / var)[spread]))
        logs = known(np.log(np.maximum(var, floor)) - np.log(np.maximum(stored, floor)))
    if logs.size == 0:
        assert math.isnan(layer.var_ratio)
    else:
        # A log of 1e-12 is some 28: 1e-12 is a few of its units in the last place.
        assert abs(math.log(layer.var_ratio)) == pytest.approx(np.abs(logs).max(), rel=1e-12, abs=1e-12)
        assert np.abs(logs - math.log(layer.var_ratio)).min() <= 1e-12


def test_a_shift_is_in_standard_deviations_of_the_new_variance() -> None:
    layer = stats([(0.0, 1.0, 6.0, 9.0, 0.3, 0.9), (0.0, 1.0, -1.0, 1.0, 0.2, 0.1)])
    assert (layer.mean_shift, layer.var_ratio) == (2.0, 9.0)
    assert (layer.se, layer.var_se) == (pytest.approx(0.2, rel=1e-15), 0.1)


def test_half_a_variance_is_as_far_as_a_double_one() -> None:
    assert stats([(0, 1, 0, 0.25, 0, 0), (0, 1, 0, 3.9, 0, 0)]).var_ratio == 0.25
    assert stats([(0, 1, 0, 0.25, 0, 0), (0, 1, 0, 4.1, 0, 0)]).var_ratio == 4.1
    assert stats([(0, 1, 0, 1, 0, 0)]).var_ratio == 1.0


def test_a_channel_that_was_and_is_dead_has_not_drifted() -> None:
    """A ReLU died: the stored variance decays towards 0 for ever, and 1e-30/1e-20 would be the worst ratio of all."""
    layer = stats([(0.5, 1e-20, 0.5, 0.0, 0.0, 0.0), (0.5, 1e-30, 0.5, 1e-20, 0.0, 0.0)])
    assert layer.mean_shift == 0.0
    assert layer.var_ratio == pytest.approx(1.0)
    assert math.isnan(layer.se)
    # A constant of 1000 with the rounding of float32 as its variance moved by that rounding: 9 of its 'deviations'.
    assert stats([(1000.0, 1e-11, 1000.00003, 1e-11, 0.0, 0.0)]).mean_shift == pytest.approx(3e-5, rel=1e-3)


def test_a_channel_that_came_alive_or_died_has() -> None:
    assert stats([(0.0, 0.0, 0.0, 2.0, 0.1, 0.1)]).var_ratio == 2e12
    assert stats([(0.0, 2.0, 0.0, 0.0, 0.0, 0.0)]).var_ratio == 5e-13
    assert stats([(3.0, 2.0, 1.0, 0.0, 0.0, 0.0)]).mean_shift == 2.0


def test_nan_is_passed_over_and_all_nan_is_unknown() -> None:
    layer = stats([(NAN, NAN, NAN, NAN, NAN, NAN), (0.0, 1.0, 1.0, 4.0, NAN, NAN)])
    assert (layer.mean_shift, layer.var_ratio) == (0.5, 4.0)
    assert math.isnan(layer.se)
    assert math.isnan(layer.var_se)
    unknown = stats([(NAN, NAN, NAN, NAN, NAN, NAN)])
    assert all(map(math.isnan, (unknown.mean_shift, unknown.var_ratio, unknown.se, unknown.worst_kl)))


def test_the_worst_divergence_may_be_infinite_but_not_nan() -> None:
    assert with_kl(NAN, 0.25, 0.5).worst_kl == 0.5
    assert with_kl(0.25, INF).worst_kl == INF
    assert math.isnan(with_kl(NAN).worst_kl)


def test_the_divergence_of_a_dead_channel_does_not_hide_the_others() -> None:
    plain = with_kl(INF, 0.25, 0.5)
    assert plain.worst_channel == 0
    dead = dataclasses.replace(plain, mean=(1.1, 1.0, 1.0), var=(0.0, 1.0, 1.0), var_before=(1e-30, 1.0, 1.0))
    assert (dead.worst_kl, dead.worst_channel) == (0.5, 2)
    moved = dataclasses.replace(dead, mean=(3.0, 1.0, 1.0))
    assert (moved.worst_kl, moved.worst_channel) == (2.0, 0)
    died = dataclasses.replace(dead, var_before=(1.0, 1.0, 1.0))
    assert (died.worst_kl, died.worst_channel) == (INF, 0)
    assert with_kl(NAN).worst_channel is None


def test_a_channel_far_below_eps_does_not_pass_for_the_worst() -> None:
    """Published MobileNets and EfficientNets have such: 0 before, 7e-12 now, by the eps of .001 the same."""
    rows = [(0.0, 0.0, 0.0, 7e-12, 1e-9, 7e-12), (0.0, 1.0, 0.5, 1.0, 0.1, 0.1)]
    layer = dataclasses.replace(stats(rows), kl=(INF, 0.125), eps=1e-3)
    assert (layer.worst_kl, layer.worst_channel) == (0.125, 1)
    assert (layer.var_ratio, layer.mean_shift) == (1.0, 0.5)
    assert (layer.var_se, layer.se) == (pytest.approx(0.1), pytest.approx(0.1))
    alone = dataclasses.replace(layer, eps=0.0)
    assert alone.worst_kl == INF
    assert alone.var_se == pytest.approx(1.0)


def test_eps_leaves_the_figures_of_channels_with_a_spread_as_they_are() -> None:
    rows = [(0.0, 0.5, 0.25, 2e-5, 1e-3, 1e-6), (1.0, 1.0, 2.0, 4.0, 0.1, 0.1)]
    plain = dataclasses.replace(stats(rows), kl=(0.3, 0.2))
    with_eps = dataclasses.replace(plain, eps=1e-2)
    for name in ("mean_shift", "var_ratio", "se", "var_se", "worst_kl", "worst_channel"):
        assert getattr(with_eps, name) == getattr(plain, name)


def test_worst_has_the_largest_divergence_first_and_the_unknown_last() -> None:
    layers = tuple(with_kl(most, site=f"{n}") for n, most in enumerate((0.1, NAN, INF, 0.3, 0.3)))
    report = Recalibration(layers, "staged", "", 3)
    assert [s.site for s in report.worst(9)] == ["2", "3", "4", "0", "1"]
    assert [s.site for s in report.worst(2)] == ["2", "3"]


@given(st.lists(st.tuples(st.floats(1e-3, 1), st.floats(1e-3, 1), st.integers(2, 5000)), min_size=1, max_size=4))
def test_needed_samples_are_just_enough(layers: list[tuple[float, float, int]]) -> None:
    """An error falls with the root of the samples: with those it is within the tolerance, with one less it is not."""
    tol = 0.02
    rows = tuple(stats([(0, 1, 0, 4, 2 * se, 4 * var_se)], n) for se, var_se, n in layers)
    more = Recalibration(rows, "staged", "", 1).needed_samples(tol)

    def worst(added: int) -> float:
        return max(max(se, var_se) * math.sqrt(n / (n + added)) for se, var_se, n in layers)

    assert worst(more) <= tol * (1 + 1e-9)
    assert more == 0 or worst(more - 1) >= tol * (1 - 1e-9)


def test_channels_without_spread_need_no_samples() -> None:
    rows = [(0.0, 1.0, 5.0, 0.0, 1.0, 1.0), (0.0, 1.0, 0.0, 1.0, 0.005, 0.001)]
    assert Recalibration((stats(rows),), "staged", "", 9).needed_samples() == 0
    assert Recalibration((stats(rows[:1]),), "staged", "", 9).needed_samples() == 0


def test_unknown_errors_are_no_small_ones() -> None:
    one = Recalibration((stats([(0, 1, 0, 1, NAN, NAN)], 1),), "staged", "", 1)
    with pytest.raises(ValueError, match="at least two samples"):
        one.needed_samples()
    with pytest.raises(ValueError, match="at least two samples"):
        Recalibration((), "staged", "", 0).needed_samples()
    for tol in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="positive"):
            one.needed_samples(tol)


def test_what_was_summed_up_is_no_part_of_the_value() -> None:
    """The sums are kept beside the fields: equality, copies and JSON know nothing of them."""
    layer, fresh = (stats([(0.0, 1.0, 1.0, 4.0, 0.1, 0.1)]) for _ in range(2))
    assert layer.mean_shift == 0.5
    assert layer == copy.deepcopy(layer)
    assert layer.to_dict() == fresh.to_dict()
    assert set(fresh.to_dict()) == {"schema_version", "type"} | {f.name for f in dataclasses.fields(LayerStats)}
    moved = dataclasses.replace(layer, mean_after=(2.0,))
    assert moved.mean_shift == 1.0
    assert pickle.loads(pickle.dumps(layer)).mean_shift == 0.5


def test_to_dict_is_pure_json_and_holds_no_handle() -> None:
    layer = dataclasses.replace(stats([(0.0, 0.0, 1.0, 1.0, NAN, NAN)]), kl=(INF,))
    report = Recalibration((layer,), "staged", "", 9, residual=Residual(NAN, INF), handle=object())
    held = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert held == report.to_dict()
    assert held["layers"][0]["kl"] == ["inf"]
    assert held["layers"][0]["se_mean"] == ["nan"]
    assert held["residual"] == {"mean": "nan", "var": "inf"}
    assert "handle" not in held


def test_a_prompt_prints_no_channel() -> None:
    layer = stats([(0.0, 1.0, 1.0, 4.0, 0.1, 0.1)] * 2048)
    assert repr(layer) == "LayerStats(site='bn', call=0, n=900, samples=100)"
    assert len(repr(Recalibration((layer,) * 53, "staged", "", 9))) < 5000


def test_names_tell_calls_apart() -> None:
    assert [with_kl(0.0, site="b.bn", call=n).name for n in (0, 1)] == ["b.bn", "b.bn@1"]
    assert [with_kl(0.0, site="", call=n).name for n in (0, 2)] == ["(root)", "(root)@2"]
    assert with_kl(0.0, 0.0).channels == 2
