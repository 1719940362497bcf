"""Wrong folds planted on purpose: a mutation test of the algebra, the planner and the surgery. Each must be caught.

A fault is planted by replacing one piece of bnfix for the time of one test. Whatever it does, the result that
comes back computes what the model computes, and the fold that was wrong is named as undone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import nets
import pytest
import torch
from nets import lived_in, relative_error
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import bnfix
from bnfix.folding import engine, planner, proof
from bnfix.folding.fold import Fold, ForwardFold
from bnfix.folding.folds.before_conv import BeforeConv
from bnfix.folding.folds.conv import ConvFold
from bnfix.folding.folds.conv_transpose import ConvTransposeFold
from bnfix.folding.walking import Walker
from bnfix.stats import Affine

Plant = Callable[[pytest.MonkeyPatch], None]


def _affine(change: Callable[[Affine, Mapping[str, Any]], Affine]) -> Plant:
    """A fault in the norm's own a and b."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = engine.norm_affine
        patch.setattr(engine, "norm_affine", lambda b, p: change(original(b, p), {"binding": b, "planned": p}))

    return plant


def _wrong_eps(affine: Affine, at: Mapping[str, Any]) -> Affine:
    planned = at["planned"]
    var = at["binding"].tensors[planned.norm.tensors["running_var"]].double()
    factor = torch.sqrt((var + planned.op.attrs["eps"]) / (var + 1e-3))
    return Affine(affine.scale * factor, affine.shift)


def _one_channel(affine: Affine, _: Any) -> Affine:
    scale = affine.scale.clone()
    scale[1] *= 1 + 1e-6
    return Affine(scale, affine.shift)


def _swapped(affine: Affine, _: Any) -> Affine:
    return Affine(affine.scale.roll(1), affine.shift)


ALGEBRA: dict[str, Plant] = {
    "shift forgotten": _affine(lambda a, _: Affine(a.scale, torch.zeros_like(a.shift))),
    "shift with the wrong sign": _affine(lambda a, _: Affine(a.scale, -a.shift)),
    "scale squared": _affine(lambda a, _: Affine(a.scale**2, a.shift)),
    "scale forgotten": _affine(lambda a, _: Affine(torch.ones_like(a.scale), a.shift)),
    "scale without its sign": _affine(lambda a, _: Affine(a.scale.abs(), a.shift)),
    "eps of another norm": _affine(_wrong_eps),
    "one channel off by a millionth": _affine(_one_channel),
    "channels shifted by one": _affine(_swapped),
    "computed in float32": _affine(
        lambda a, _: Affine((a.scale.float() * 1.0000001).double(), a.shift.float().double())
    ),
    "bias not scaled": lambda patch: patch.setattr(
        Fold, "bias", lambda self, bias, w, a, op: a.shift if bias is None else bias + a.shift
    ),
    "bias dropped": lambda patch: patch.setattr(Fold, "bias", lambda self, bias, w, a, op: a.shift),
    "scaled along the inputs": lambda patch: patch.setattr(
        ConvFold, "channels", lambda self, w, op: w.transpose(0, 1).unsqueeze(0)
    ),
    "rounded twice": lambda patch: patch.setattr(engine, "round_once", lambda v, d: v.to(torch.bfloat16).to(d)),
}


def square() -> nn.Module:
    """As many inputs as outputs, so that no wrong axis is caught by its size; a bias; one γ below zero."""
    model = lived_in(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    with torch.no_grad():
        model[1].weight[2] = -0.7
    return model


def _undone(model: nn.Module, example: Any) -> bnfix.Result:
    result = bnfix.fold(model, example)
    assert result.model is not None
    x = example[0] if isinstance(example, list) else example
    assert torch.equal(_first(result.model(x)), _first(model(x)))  # nothing was folded, so to the bit
    assert not result.edits
    assert result.refusals[0].defect
    assert "undone" in result.refusals[0].reason
    return result


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize("fault", ALGEBRA)
def test_fault_in_the_algebra_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ALGEBRA[fault](monkeypatch)
    _undone(square(), torch.randn(2, 4, 8, 8))


def test_transposed_convolution_with_its_groups_interleaved_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(self: Fold, weight: Tensor, op: Any) -> Tensor:
        return weight.view(2, -1, *weight.shape[1:]).transpose(1, 2).transpose(0, 1)

    monkeypatch.setattr(ConvTransposeFold, "channels", interleaved)
    model = lived_in(nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)))
    _undone(model, torch.randn(2, 4, 5, 5))


# ------------------------------------------------------------------------------------ the planner


def _blind(*names: str) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        for name in names:
            room = planner._Planner if hasattr(planner._Planner, name) else Walker
            patch.setattr(room, name, lambda self, *args: None)

    return plant


PLANNER: dict[str, tuple[Plant, Callable[[], nn.Module], tuple[int, ...]]] = {
    "two consumers not seen": (_blind("_alone"), nets.TwoConsumers, (2, 3, 8, 8)),
    "an output of the model not seen": (_blind("_alone", "_every_use"), nets.ConvIsOutput, (2, 3, 8, 8)),
    "a shared convolution not seen": (_blind("_every_use"), nets.SharedConv, (2, 3, 8, 8)),
    "a weight read elsewhere not seen": (_blind("_every_use"), nets.WeightReadElsewhere, (2, 3, 8, 8)),
    "the norm's own extras not seen": (
        _blind("_norm_itself"),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nets.NormWithActivation(4)),
        (2, 3, 8, 8),
    ),
}


@pytest.mark.parametrize("fault", PLANNER)
def test_fault_in_the_planner_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, build, shape = PLANNER[fault]
    plant(monkeypatch)
    model, x = lived_in(build()), torch.randn(shape)
    result = bnfix.fold(model, x)
    assert any(r.defect for r in result.refusals)
    assert result.model is not None
    assert relative_error(_first(result.model(x)), _first(model(x))) < 1e-6


def test_rank_not_looked_at_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "lanes", lambda labels, axis: tuple(range(labels.shape[axis])))
    _undone(lived_in(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))), torch.randn(3, 6, 5))


def ahead(**options: Any) -> nn.Module:
    """A norm whose input is the model's, and a layer that takes it up."""
    return lived_in(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, **options)))


FORWARD: dict[str, Plant] = {
    "shift not added": lambda patch: patch.setattr(ForwardFold, "bias", lambda self, bias, w, a, op: bias),
    "sum over a part of the kernel": lambda patch: patch.setattr(
        ForwardFold, "bias", lambda self, bias, w, a, op: bias + (w[..., 0, 0] * a.shift[:2]).sum(1)
    ),
    "groups not seen": lambda patch: patch.setattr(
        BeforeConv, "channels", lambda self, w, op: w.transpose(0, 1).repeat(2, 1, 1, 1)[:4].unsqueeze(0)
    ),
    "scale forgotten": _affine(lambda a, _: Affine(torch.ones_like(a.scale), a.shift)),
}


@pytest.mark.parametrize("fault", FORWARD)
def test_fault_in_the_forward_algebra_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FORWARD[fault](monkeypatch)
    _undone(ahead(), torch.randn(2, 4, 8, 8))


def test_zeros_of_the_padding_not_seen_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BeforeConv, "refuse", lambda self, *args: None)
    _undone(ahead(padding=1), torch.randn(2, 4, 8, 8))


def test_only_one_signature_looked_at_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made for the small input alone, in a model whose large inputs go another way."""
    full = planner.plan
    monkeypatch.setattr(
        "bnfix.folding.plan",
        lambda facts: full(replace(facts, routes=facts.routes[:1], norms=_first_route(facts.norms))),
    )
    model = lived_in(nets.ShapeRoute())
    _undone(model, [torch.randn(1, 3, 8, 8), torch.randn(1, 3, 16, 16)])


def _first_route(norms: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(replace(n, calls=tuple(c for c in n.calls if c[0] == 0)) for n in norms)


# ------------------------------------------------------------------------------------ the surgery


def test_norm_left_in_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "placeholder", lambda norm, after: norm)
    _undone(square(), torch.randn(2, 4, 8, 8))


def test_activation_lost_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "placeholder", lambda norm, after: nn.Identity())
    _undone(lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4))), torch.randn(2, 3, 8, 8))


def test_bias_not_written_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_give_bias", lambda *args: None)
    _undone(lived_in(nets.conv_bn(bias=False)), torch.randn(2, 3, 8, 8))


def test_one_bad_fold_among_good_ones_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.norm_affine

    def bad_at_four(binding: Any, planned: Any) -> Affine:
        affine = original(binding, planned)
        return Affine(affine.scale * 1.5, affine.shift) if planned.norm.path == "4" else affine

    monkeypatch.setattr(engine, "norm_affine", bad_at_four)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()]
    model = lived_in(nn.Sequential(*layers))
    x = torch.randn(2, 3, 6, 6)
    result = bnfix.fold(model, x)
    assert [e.site for e in result.edits] == ["1", "7", "10"]
    assert [(r.site, r.defect) for r in result.refusals] == [("4", True)]
    assert result.model is not None
    assert relative_error(result.model(x), model(x)) < 1e-6


def test_norm_before_a_bad_one_is_judged_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    original = engine.norm_affine

    def bad_at_two(binding: Any, planned: Any) -> Affine:
        affine = original(binding, planned)
        return Affine(affine.scale * 1.5, affine.shift) if planned.norm.path == "2" else affine

    monkeypatch.setattr(engine, "norm_affine", bad_at_two)
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    result = bnfix.fold(model, torch.randn(2, 3, 6, 6))
    assert [e.site for e in result.edits] == ["1"]
    assert [(r.site, r.defect) for r in result.refusals] == [("2", True)]


def test_check_of_weights_alone_finds_what_no_data_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit in the last place of one weight: far below the noise of any output."""
    compute = engine.compute

    def nudged(facts: Any, folds: Any) -> Any:
        folded = compute(facts, folds)
        for key, weight in folded.weights.items():
            changed = weight.clone()
            changed.view(-1)[5] = torch.nextafter(changed.view(-1)[5], torch.tensor(9.0))
            folded.weights[key] = changed
        return folded

    monkeypatch.setattr("bnfix.folding.compute", nudged)
    result = _undone(square(), torch.randn(2, 4, 8, 8))
    assert "ulp" in result.refusals[0].reason


def test_isolate_finds_each_culprit() -> None:
    bad = {3, 11}
    assert proof.isolate(list(range(16)), lambda part: not bad & set(part)) == [i for i in range(16) if i not in bad]
