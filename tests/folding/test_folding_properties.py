"""Property tests of the folding algebra: whatever the layer's settings, the fold computes the same."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import bits, lived_in, norms_left, same_bits
from torch import nn

import bnfix

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

few = settings(max_examples=30)

# A stored weight may be ½ ulp off, a result of some hundred products a few units of roundoff: 16 units is ample
# in float32 and still 10,000 times less than what any wrong eps, sign or channel does.
TOLERANCE = {torch.float32: 16 * 2**-24 * 8, torch.float64: 16 * 2**-53 * 8}


@st.composite
def norms(draw: st.DrawFn, rank: int, channels: int) -> nn.Module:
    """A norm with statistics, affine or not, eps from 0 to large, any sign of γ."""
    norm = NORMS[rank](channels, eps=draw(st.sampled_from([0.0, 1e-8, 1e-5, 1e-3, 0.1])), affine=draw(st.booleans()))
    lived_in(norm, draw(st.integers(0, 99)))
    if norm.affine and draw(st.booleans()):
        with torch.no_grad():
            norm.weight[0] *= draw(st.sampled_from([-1.0, 0.0, 1e-6, 30.0]))
    return norm


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    kernel = draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if rank == 3 and mode == "reflect":
        mode = "replicate"
    conv = CONVS[rank](
        inputs, outputs, kernel, stride=draw(st.integers(1, 2)), padding=draw(st.integers(0, 1)),
        dilation=draw(st.integers(1, 2)), groups=groups, bias=draw(st.booleans()), padding_mode=mode,
    )  # fmt: skip
    return nn.Sequential(conv, draw(norms(rank, outputs))).eval(), (draw(st.integers(1, 2)), inputs, *(6,) * rank)


@st.composite
def transposed(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 3]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    stride = draw(st.integers(1, 2))
    conv = TRANSPOSED[rank](
        inputs, outputs, draw(st.integers(1, 3)), stride=stride, padding=0, groups=groups,
        output_padding=draw(st.integers(0, stride - 1)), bias=draw(st.booleans()),
    )  # fmt: skip
    return nn.Sequential(conv, draw(norms(rank, outputs))).eval(), (2, inputs, *(4,) * rank)


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    inputs, outputs = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    layer = nn.Linear(inputs, outputs, bias=draw(st.booleans()))
    return nn.Sequential(layer, draw(norms(1, outputs))).eval(), (draw(st.integers(2, 5)), inputs)


def _holds(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model = model.to(dtype)
    x, other = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    before = bits(model)
    result = bnfix.fold(model, x)
    assert same_bits(model, before)
    assert len(result.edits) == 1, result.refusals
    assert result.model is not None
    assert norms_left(result.model) == 0
    found, expected = result.model(other), model(other)
    # Relative to the terms that are added: where shift and response cancel, the sum says nothing of their precision.
    scale = max(expected.abs().max().item(), max(p.abs().max().item() for p in result.model.parameters()))
    assert (found - expected).abs().max().item() <= TOLERANCE[dtype] * scale * 8
    assert result.edits[0].ulp is not None
    assert result.edits[0].ulp <= (0.5 if dtype == torch.float32 else 8)
    again = bnfix.fold(result.model, x)
    assert not again.edits


PAIRS: Any = st.one_of(convolutions(), transposed(), linears())


@few
@given(pair=PAIRS, dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 9999))
def test_fold_keeps_outputs_is_idempotent_and_leaves_the_argument(
    pair: tuple[nn.Module, tuple[int, ...]], dtype: torch.dtype, seed: int
) -> None:
    model, shape = pair
    _holds(model, shape, dtype, seed)


@few
@given(pair=PAIRS, dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_is_rounded_once(pair: tuple[nn.Module, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Each stored number is the exact one, correctly rounded, or the fold is refused for leaving the range."""
    model, shape = pair
    result = bnfix.fold(model.to(dtype), torch.randn(shape).to(dtype), verify=False)
    for edit in result.edits:
        assert edit.ulp == 0.5
    for refusal in result.refusals:
        assert not refusal.defect
        assert "subnormal" in refusal.reason or "holds" in refusal.reason or "finite" in refusal.reason


@few
@given(pair=PAIRS, at=st.integers(1, 4))
def test_an_exception_on_the_way_leaves_the_argument(pair: tuple[nn.Module, tuple[int, ...]], at: int) -> None:
    """Ctrl-C at some step of the work, also when the model was to be changed in place."""
    model, shape = pair
    before = bits(model)
    steps = 0

    def interrupt(_: str) -> None:
        nonlocal steps
        steps += 1
        if steps == at:
            raise KeyboardInterrupt

    try:
        bnfix.fold(model, torch.randn(shape), inplace=True, progress=interrupt)
    except KeyboardInterrupt:
        assert same_bits(model, before)
    else:
        assert steps < at


@few
@given(
    values=st.lists(st.floats(-6e4, 6e4, allow_subnormal=False), min_size=1, max_size=20),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_round_once_is_nearest(values: list[float], dtype: torch.dtype) -> None:
    """No representable number is nearer than the one chosen, also where float32 on the way lands on a tie."""
    from bnfix.stats import round_once

    exact = torch.tensor(values, dtype=torch.float64)
    exact = torch.cat([exact, exact.to(dtype).double() * (1 + torch.finfo(dtype).eps / 2 + 2**-40)])
    chosen = round_once(exact, dtype)
    if not bool(chosen.isfinite().all()):
        return
    for towards in (float("inf"), float("-inf")):
        step = torch.nextafter(chosen, torch.full_like(chosen, towards))
        assert bool(((chosen.double() - exact).abs() <= (step.double() - exact).abs()).all())
