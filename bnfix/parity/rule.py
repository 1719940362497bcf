"""The rule of parity: a candidate passes where its error is that of rounding, measured, not assumed.

A candidate's distance from the float64 oracle may be ``k`` = 8 times the distance that the reference
itself has (its noise e0; from 4 times on it is a hint), by each of the four measures of
:class:`~bnfix.parity.measures.Distance`: one wrong channel in a thousand or one wrong sample in a
batch is not averaged away. Where e0 is (next to) nothing, ``FLOOR`` units of roundoff take its place.

Measured on 12 healthy models of timm and torchvision (resnet18, resnet50, mobilenetv2_100,
efficientnet_b0, vit_tiny, densenet121, shufflenet_v2, regnetx_002, googlenet, convnext_atto, ghostnet_100,
repvgg_a0; statistics calibrated, then perturbed; batches 1, 2 and 5) against ONNX Runtime with and
without its optimizations and against folds in float32: rms ≤ 1.47, peak ≤ 1.72, channel ≤ 1.47,
sample ≤ 1.48 times the reference's own. e0 spans 3.5e-7 (repvgg_a0) to 6.6e-6 (mobilenetv2_100), and 0.07
in the unstable efficientnet_b0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from bnfix.parity import measures
from bnfix.parity.measures import NOTHING, Distance
from bnfix.parity.oracle import FEW
from bnfix.types import Verdict

K_FAILS = 8.0
WARNS = 0.5
"""A candidate warns from this share of ``k`` on: 4 of 8."""

FLOOR = 4.0
"""Units of roundoff that stand for a noise of (next to) nothing: integer inputs, weights of ±1.

Of correct folds of such layers 120 were measured: up to 12 units, 3 times this floor. It is below the noise of
every healthy network (3.5e-7 is 6 units), so that it loosens nothing there."""

MOVED_LIMIT = 16.0
"""Moving the inputs by 1 ulp may raise the noise to so many times the other draws: beyond, a threshold was crossed."""

TIES = 1e-4
"""Share of integers that may flip where the reference's own don't: an argmax over near ties, in maps of many."""

MEASURES = {"rms": "", "peak": "its largest error", "channel": "its worst channel", "sample": "its worst sample"}


@dataclass(frozen=True)
class Case:
    """One output on one call."""

    index: int
    oracle: Tensor
    draws: tuple[Tensor, ...]
    candidate: Tensor | None
    moved: tuple[int, ...] = ()
    exact: bool = True


@dataclass(frozen=True)
class Judged:
    """What was found of one case; figures None where they can't be had."""

    verdict: Verdict
    reason: str = ""
    ratio: float | None = None
    noise: float | None = None
    rms_err: float | None = None
    own_err: float | None = None
    max_abs: float | None = None
    max_rel: float | None = None
    required: float | None = None
    cosine: float | None = None
    top1: float | None = None
    worst_sample: str = ""


def stability_limit(dtype: torch.dtype) -> float:
    """The noise e0 above which a model that computes in ``dtype`` is called unstable, and nothing can be judged.

    0.01 for float32, as k·e0 then allows errors of 8 %. Coarser types are noisy by nature (a bfloat16
    mobilenetv2 has 2.6e-3 or more): 25 units of roundoff, never above 0.1, where k·e0 nears the output itself.
    """
    return min(0.1, max(0.01, 25 * roundoff(dtype)))


def judge_case(case: Case, pool: Distance, dtype: torch.dtype, k: float) -> Judged:
    plain, candidate = case.draws[0], case.candidate
    if candidate is None:
        return Judged("failed", "it is missing")
    if case.oracle.shape != plain.shape or any(d.shape != plain.shape for d in case.draws):
        return Judged("inconclusive", "its shape depends on rounding: compare what goes into the selection")
    if candidate.shape != plain.shape:
        return Judged("failed", f"it has the shape {_shape(candidate)}, not {_shape(plain)}")
    if plain.numel() == 0:
        return Judged("inconclusive", "it is empty")
    if plain.is_complex():
        real = tuple(torch.view_as_real(d.resolve_conj()) for d in case.draws)
        oracle = torch.view_as_real(case.oracle.resolve_conj())
        other = torch.view_as_real(candidate.resolve_conj()) if candidate.is_complex() else None
        return judge_case(replace(case, oracle=oracle, draws=real, candidate=other), pool, dtype, k)
    if not plain.is_floating_point():
        return _judge_integers(case, k)
    return _judge_floats(case, pool, dtype, k)


def _judge_integers(case: Case, k: float) -> Judged:
    """Labels and indices are equal or not; a near tie may flip either way, so that only what the model keeps counts."""
    oracle, other = _wide(case.oracle), _wide(case.candidate)  # type: ignore[arg-type]
    total = oracle.numel()
    flips = _unequal(case.oracle, case.candidate)  # type: ignore[arg-type]
    own = max(_unequal(case.oracle, d) for d in case.draws)
    sample = _sample(case, oracle, other) if flips else ""
    share = {"max_abs": float((other - oracle).abs().max()), "worst_sample": sample}
    if not flips:
        return Judged("passed", **share)  # type: ignore[arg-type]
    said = f"{flips} of {total} integers differ from the float64 run, {own} in the model's own run"
    if flips <= k * own or flips <= TIES * total:
        return Judged("inconclusive", f"{said}: near ties", **share)  # type: ignore[arg-type]
    return Judged("failed", said, **share)  # type: ignore[arg-type]


def _judge_floats(case: Case, pool: Distance, dtype: torch.dtype, k: float) -> Judged:
    oracle, other = _wide(case.oracle), _wide(case.candidate)  # type: ignore[arg-type]
    draws = [_wide(d) for d in case.draws]
    marks, own_marks = _marks(oracle), [_marks(d) for d in draws]
    steady = all(torch.equal(m, marks) for m in own_marks)
    if not any(torch.equal(_marks(other), m) for m in (marks, *own_marks)):
        strange = _marks(other) != marks
        kind = "NaN" if bool(other.isnan()[strange].any()) else "infinite or NaN in one, not in the other"
        return Judged("failed", f"{int(strange.sum())} of {oracle.numel()} values are {kind}", max_abs=math.nan)
    finite = torch.isfinite(oracle) & torch.isfinite(other)
    for draw in draws:
        finite &= torch.isfinite(draw)
    if not bool(finite.any()):
        return Judged("inconclusive", "no value is finite")
    if not bool(finite.all()):  # the finite ones are judged in place, so that channels and samples stay what they are
        oracle, other = oracle.where(finite, 0.0), other.where(finite, 0.0)
        draws = [d.where(finite, 0.0) for d in draws]
    found = _measured(case, oracle, other, draws, pool, dtype, k)
    if found.verdict != "failed" and bool(case.oracle.isnan().any()):
        return replace(found, verdict="inconclusive", reason="it holds NaN: nothing can be said where they are")
    if found.verdict != "failed" and not steady:
        reason = "the model's own run has infinities or NaN where float64 has none"
        return replace(found, verdict="inconclusive", reason=reason)
    return found


def _measured(
    case: Case, oracle: Tensor, other: Tensor, draws: Sequence[Tensor], pool: Distance, dtype: torch.dtype, k: float
) -> Judged:
    scale = measures.rms(oracle)
    max_abs = float((other - oracle).abs().max())
    if scale == 0.0:
        own = max(float(d.abs().max()) for d in draws)
        if max_abs <= k * own:
            return Judged("passed", "zero everywhere" if max_abs == 0 else "zero but for rounding", max_abs=max_abs)
        return Judged("failed", f"it is zero everywhere in float64, and up to {max_abs:.2g} here", max_abs=max_abs)
    noise = _noise(case, oracle, draws, scale, dtype)
    if oracle.numel() < FEW:
        noise = noise.worst(pool)
    found = measures.distance(oracle, other, scale)
    least = FLOOR * roundoff(dtype if noise.rms == 0.0 else case.draws[0].dtype)
    floors = {f.name: least for f in fields(Distance)} | {"peak": least * measures.peak_floor(oracle, scale)}
    ratios = {m: getattr(found, m) / max(getattr(noise, m), floors[m]) for m in MEASURES}
    worst = max(ratios, key=lambda m: ratios[m])
    base = Judged(
        "passed",
        ratio=ratios[worst],
        noise=noise.rms,
        rms_err=found.rms,
        own_err=measures.distance(oracle, draws[0], scale).rms,
        max_abs=max_abs,
        max_rel=measures.max_relative(oracle, other, scale),
        required=measures.required_tolerance(oracle, other),
        cosine=measures.cosine(oracle, other),
        top1=measures.top1_agreement(oracle, other),
        worst_sample=_sample(case, oracle, other),
    )
    part = f"{MEASURES[worst]}: " if MEASURES[worst] else ""
    said = f"{part}{ratios[worst]:.3g} × the model's own rounding noise (limit {k:g})"
    limit = stability_limit(dtype)
    if noise.rms > limit and case.exact:
        reason = f"the model itself is unstable: its own rounding moves it by {noise.rms:.2g} (limit {limit:.2g})"
        return replace(base, verdict="inconclusive", reason=reason)
    if ratios[worst] > k:
        return replace(base, verdict="failed", reason=said)
    if not case.exact:
        return replace(base, verdict="inconclusive", reason="no float64 oracle: only compared with the model's own run")
    return replace(base, verdict="warned", reason=said) if ratios[worst] > WARNS * k else base


def _noise(case: Case, oracle: Tensor, draws: Sequence[Tensor], scale: float, dtype: torch.dtype) -> Distance:
    """The reference's own distance: the worst of its draws. Moved inputs that cross a threshold don't count in full."""
    still, moved = NOTHING, NOTHING
    for i, draw in enumerate(draws):
        found = measures.distance(oracle, draw, scale)
        still, moved = (still, moved.worst(found)) if i in case.moved else (still.worst(found), moved)
    limit = MOVED_LIMIT * max(still.rms, roundoff(dtype))
    shrink = limit / moved.rms if still.rms and moved.rms > limit else 1.0
    return still.worst(Distance(*(getattr(moved, f.name) * shrink for f in fields(Distance))))


def pooled_noise(cases: Sequence[Case]) -> Distance:
    """The noise over all calls, for outputs so small that a single one may be exact by luck."""
    pool = NOTHING
    for case in cases:
        small = 0 < case.oracle.numel() < FEW and case.oracle.is_floating_point()
        if small and all(d.shape == case.oracle.shape for d in case.draws):
            oracle, draws = _wide(case.oracle), [_wide(d) for d in case.draws]
            scale = measures.rms(oracle)
            if 0.0 < scale < math.inf and all(bool(d.isfinite().all()) for d in draws):
                pool = pool.worst(_noise(case, oracle, draws, scale, case.draws[0].dtype))
    return pool


def _unequal(a: Tensor, b: Tensor) -> int:
    if b.is_floating_point():
        return int((_wide(a) != _wide(b)).sum())
    return int((a.cpu().long() != b.cpu().long()).sum())  # exact beyond 2**53, where float64 is not


def _marks(tensor: Tensor) -> Tensor:
    """0 where finite, 1 NaN, 2 +inf, 3 −inf."""
    return tensor.isnan() + 2 * tensor.isposinf() + 3 * tensor.isneginf()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _sample(case: Case, oracle: Tensor, other: Tensor) -> str:
    return f"input {case.index}, sample {measures.worst_sample(oracle, other)}"
