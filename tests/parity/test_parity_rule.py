"""The rule by itself, on tensors whose errors are known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnfix.parity import compare, judge, record, references
from bnfix.parity.compare import overall
from bnfix.parity.rule import FLOOR, stability_limit
from bnfix.running import Call

U = 2.0**-24
"""Unit roundoff of float32."""


def noisy(oracle: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    """``oracle`` with Gaussian errors of ``size`` times its RMS, in float64: they may be below roundoff."""
    generator = torch.Generator().manual_seed(seed)
    scale = oracle.square().mean().sqrt()
    return oracle + size * scale * torch.randn(oracle.shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def oracle() -> torch.Tensor:
    return torch.randn(4, 100, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize(("times", "verdict"), [(1, "passed"), (3, "passed"), (5.5, "warned"), (11, "failed")])
def test_the_verdict_follows_the_ratio_to_the_models_own_noise(oracle, times, verdict):
    # 400 Gaussian errors a side: RMS good to 4 %, the largest one to about 20 %; hence the gaps around 4 and 8
    found = judge("out", [oracle], [noisy(oracle, 1e-6, 1)], [noisy(oracle, times * 1e-6, 2)])
    assert found.verdict == verdict
    assert found.passed == (verdict in ("passed", "warned"))
    assert found.noise_ratio == pytest.approx(times, rel=0.3)
    assert found.noise == pytest.approx(1e-6, rel=0.15)
    assert found.rms_err == pytest.approx(times * 1e-6, rel=0.15)


@settings(max_examples=25)
@given(k=st.floats(2, 50), times=st.floats(0.1, 100))
def test_k_is_the_limit_whatever_it_is(k, times):
    oracle = torch.randn(8, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = noisy(oracle, 1e-6, 1) - oracle
    found = judge("out", [oracle], [oracle + error], [oracle + times * error], k=k)
    assert found.noise_ratio == pytest.approx(times, rel=1e-6)  # the same errors, scaled: no statistics involved
    if abs(times - k) > 1e-5 * k:
        assert found.passed == (times <= k)


def test_figures_are_those_of_their_definitions():
    oracle = torch.tensor([[1.0, -2.0, 4.0], [3.0, 5.0, -6.0]], dtype=torch.float64)
    reference = oracle + 1e-6
    candidate = oracle.clone()
    candidate[1, 2] += 4e-6
    found = judge("out", [oracle], [reference], [candidate])
    assert found.max_abs_err == pytest.approx(4e-6, rel=1e-6)
    assert found.max_rel_err == pytest.approx(4e-6 / 6, rel=1e-6)
    assert found.required_tolerance == pytest.approx(4e-6 / (6 + 6), rel=1e-6)
    assert torch.allclose(candidate, oracle, rtol=found.required_tolerance * 1.001, atol=found.required_tolerance * 6)
    assert found.rms_err == pytest.approx(4e-6 / math.sqrt(91), rel=1e-6)
    assert found.top1_agreement == 1.0
    assert found.cosine == pytest.approx(1.0, abs=1e-10)
    assert found.worst_sample == "input 0, sample 1"


def test_which_side_is_nearer_is_said(oracle):
    near, far = noisy(oracle, 1e-7, 1), noisy(oracle, 3e-7, 2)
    assert judge("out", [oracle], [far], [near]).nearer == "the candidate"
    assert judge("out", [oracle], [near], [far]).nearer == "the model"
    assert judge("out", [oracle], [near], [near.clone()]).nearer == "both alike"


def test_top1_agreement_counts_samples():
    oracle = torch.eye(4, dtype=torch.float64)
    candidate = oracle.clone()
    candidate[2] = oracle[3]
    assert judge("out", [oracle], [oracle + 1e-7], [candidate]).top1_agreement == 0.75


def test_one_wrong_channel_in_a_thousand_is_not_averaged_away():
    oracle = torch.randn(2, 1000, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    candidate = noisy(oracle, 1e-6, 2)
    candidate[:, 617] += 2e-5  # its share of the overall RMS: 2e-5 / sqrt(1000), less than the noise
    found = judge("out", [oracle], [noisy(oracle, 1e-6, 1)], [candidate])
    assert found.rms_err < 1.3e-6
    assert found.verdict == "failed"
    assert "channel" in found.reason


def test_one_wrong_sample_in_a_batch_is_not_averaged_away():
    oracle = torch.randn(256, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    candidate = noisy(oracle, 1e-6, 2)
    candidate[93] += 1.5e-5
    found = judge("out", [oracle], [noisy(oracle, 1e-6, 1)], [candidate])
    assert found.rms_err < 2e-6
    assert (found.verdict, found.worst_sample) == ("failed", "input 0, sample 93")
    assert "sample" in found.reason


def test_one_wrong_element_is_not_averaged_away():
    oracle = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    candidate = noisy(oracle, 1e-6, 2)
    candidate[3, 500] += 5e-5
    found = judge("out", [oracle], [noisy(oracle, 1e-6, 1)], [candidate])
    assert found.verdict == "failed"
    assert "largest error" in found.reason


# ------------------------------------------------------------------------- what is never judged by RMS


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_never_passes_where_only_the_candidate_has_it(oracle, value):
    candidate = noisy(oracle, 1e-7, 2)
    candidate[0, 3] = value
    assert judge("out", [oracle], [noisy(oracle, 1e-7, 1)], [candidate]).verdict == "failed"


def test_nan_never_passes_where_both_have_it(oracle):
    holed = oracle.clone()
    holed[0, 3] = math.nan
    found = judge("out", [holed], [noisy(oracle, 1e-7, 1).where(~holed.isnan(), math.nan)], [holed])
    assert found.verdict == "inconclusive"
    assert not found.passed
    assert "NaN" in found.reason


def test_nan_does_not_cover_a_failure_elsewhere(oracle):
    holed = oracle.clone()
    holed[0, 3] = math.nan
    found = judge("out", [holed], [noisy(holed.nan_to_num(), 1e-7, 1).where(~holed.isnan(), math.nan)], [holed * 1.1])
    assert found.verdict == "failed"


def test_all_nan_is_inconclusive(oracle):
    gone = torch.full_like(oracle, math.nan)
    assert judge("out", [gone], [gone], [gone]).verdict == "inconclusive"


def test_infinities_in_the_same_places_are_masks_and_the_rest_is_judged(oracle):
    masked = oracle.clone()
    masked[:, ::3] = -math.inf
    reference = noisy(oracle, 1e-7, 1).where(masked.isfinite(), masked)
    assert judge("out", [masked], [reference], [noisy(oracle, 1e-7, 2).where(masked.isfinite(), masked)]).passed
    assert judge("out", [masked], [reference], [(oracle * 1.01).where(masked.isfinite(), masked)]).verdict == "failed"
    assert judge("out", [masked], [reference], [masked.where(masked.isfinite(), math.inf)]).verdict == "failed"


def test_integers_are_equal_or_not():
    labels = torch.tensor([1, 2, 3, 2**60 + 1])
    off = labels.clone()
    off[3] -= 1  # float64 can't tell the two apart
    assert judge("top", [labels], [labels], [labels]).verdict == "passed"
    assert judge("top", [labels], [labels], [off]).verdict == "failed"
    masks = torch.tensor([True, False])
    assert judge("mask", [masks], [masks], [~masks]).verdict == "failed"


def test_integers_that_the_models_own_rounding_flips_are_inconclusive():
    labels = torch.arange(50)
    own, other = labels.clone(), labels.clone()
    own[7] += 1
    other[8] += 1
    found = judge("top", [labels], [own], [other])
    assert found.verdict == "inconclusive"
    assert "1 of 50" in found.reason


def test_empty_outputs_are_inconclusive():
    empty = torch.zeros(0, 4)
    assert judge("boxes", [empty.double()], [empty], [empty]).verdict == "inconclusive"


def test_shapes_that_differ_fail_and_ragged_ones_are_inconclusive(oracle):
    assert judge("out", [oracle], [oracle], [oracle[:2]]).verdict == "failed"
    assert judge("out", [oracle], [oracle[:2]], [oracle[:2]]).verdict == "inconclusive"
    assert judge("out", [oracle], [oracle], [None]).verdict == "failed"


def test_constant_zero_outputs_are_compared_with_zero():
    zero = torch.zeros(3, 4)
    assert judge("aux", [zero.double()], [zero], [zero]).verdict == "passed"
    assert judge("aux", [zero.double()], [zero], [zero + 1e-12]).verdict == "failed"
    assert judge("aux", [zero.double()], [zero + 1e-9], [zero - 2e-9]).verdict == "passed"


def test_an_unstable_model_is_inconclusive(oracle):
    found = judge("out", [oracle], [noisy(oracle, 0.05, 1)], [noisy(oracle, 0.05, 2)])
    assert found.verdict == "inconclusive"
    assert "unstable" in found.reason


def test_the_limit_of_stability_scales_with_the_type():
    assert stability_limit(torch.float32) == 0.01
    assert 0.01 < stability_limit(torch.float16) < 0.02
    assert 0.05 < stability_limit(torch.bfloat16) <= 0.1
    oracle = torch.randn(16, 64, dtype=torch.float64)
    reference, candidate = noisy(oracle, 0.03, 1), noisy(oracle, 0.03, 2)
    assert judge("out", [oracle], [reference], [candidate], dtype=torch.bfloat16).verdict == "passed"
    assert judge("out", [oracle], [reference], [candidate], dtype=torch.float32).verdict == "inconclusive"


def test_e0_of_zero_has_a_floor():
    oracle = torch.randint(-9, 9, (16, 64)).double()
    exact = oracle.float()
    assert judge("out", [oracle], [exact], [noisy(oracle, 4 * U, 2)]).verdict == "passed"
    assert judge("out", [oracle], [exact], [noisy(oracle, 12 * FLOOR * U, 2)]).verdict == "failed"


def test_a_small_output_that_is_exact_by_luck_borrows_the_noise_of_other_calls():
    oracle = [torch.tensor([[v]], dtype=torch.float64) for v in (0.7, 1.1, -0.8, 0.9)]
    errors = (0.0, 2e-6, 1e-6, 3e-6)
    reference = [o + e for o, e in zip(oracle, errors, strict=True)]
    assert judge("score", oracle, reference, [o + 2e-6 for o in oracle]).passed
    assert judge("score", oracle, reference, [o * (1 + 1e-4) for o in oracle]).verdict == "failed"


def test_each_signature_has_its_own_noise(oracle):
    loud, still = noisy(oracle, 1e-3, 1), noisy(oracle, 1e-7, 2)
    wrong = noisy(oracle, 1e-5, 3)  # far below the noise of the first call, a hundred times that of the second
    found = judge("out", [oracle, oracle], [loud, still], [noisy(oracle, 1e-3, 4), wrong])
    assert found.verdict == "failed"
    assert found.worst_sample.startswith("input 1")


def test_complex_outputs_are_judged():
    oracle = torch.randn(4, 40, dtype=torch.complex128)
    near = oracle.to(torch.complex64)
    assert judge("spectrum", [oracle], [near], [near]).passed
    assert judge("spectrum", [oracle], [near], [near * 1.001]).verdict == "failed"


def test_the_worst_verdict_wins_and_nothing_is_no_pass():
    def one(verdict):
        return judge("out", [torch.ones(3).double()], [torch.ones(3)], [torch.ones(3)]).__class__(
            "out", None, None, None, None, verdict == "passed", verdict
        )

    assert overall([one("passed"), one("inconclusive")]) == "inconclusive"
    assert overall([one("failed"), one("inconclusive"), one("passed")]) == "failed"
    assert overall([]) == "inconclusive"


def test_outputs_missing_and_additional_fail():
    model = nn.Linear(4, 3).eval()
    refs = references(model, [Call((torch.randn(2, 4),))])
    right = record(model, refs[0].call).outputs
    assert compare(refs, [right]).passed
    assert compare(refs, [{}]).verdict == "failed"
    more = compare(refs, [{**right, "aux": torch.ones(1)}])
    assert (more.verdict, more.outputs[1].name) == ("failed", "aux")
