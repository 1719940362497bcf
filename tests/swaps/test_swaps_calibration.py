"""Fitted layer by layer in the order of calls: what comes out is what the formulas say, however it was computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import CalledTwice, NormOnTwoConvs, lived_in, relative_error
from swaps.swap_nets import Head, Small, affine_by_hand, batches, fitted, swapped_by_hand
from torch import Tensor, nn

import bnfix
from bnfix.swaps import batches as sizes
from bnfix.swaps import calibrating

ORDER = ["bn1", "bn2", "bn3"]


def small(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[Tensor]]:
    data = batches(8, 3, 10, 10, dtype=dtype)
    torch.manual_seed(0)
    return fitted(Small().to(dtype), data), data


@pytest.mark.parametrize("init", ["moment", "ls"])
@pytest.mark.parametrize("groups", [1, 8])
def test_it_is_what_the_formulas_say_in_the_order_of_the_calls(groups: int, init: Any) -> None:
    model, data = small()
    result = bnfix.swap(model, "group", groups=groups, data=data, init=init)
    expected = swapped_by_hand(model, ORDER, torch.cat(data), groups, init)
    for path in ORDER:  # float64 against float64 in another order of summation
        found, right = result.model.get_submodule(path), expected.get_submodule(path)
        assert found.num_groups == groups
        torch.testing.assert_close(found.weight, right.weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.bias, right.bias, rtol=1e-9, atol=1e-12)


def test_another_order_would_be_another_result() -> None:
    """So that the test above can fail."""
    model, data = small()
    right = swapped_by_hand(model, ORDER, torch.cat(data), 8)
    wrong = swapped_by_hand(model, ORDER[::-1], torch.cat(data), 8)
    assert relative_error(wrong.bn3.weight, right.bn3.weight) > 1e-3


@pytest.mark.parametrize("way", ["joined", "by forward=", "little memory", "uneven batches"])
def test_it_does_not_depend_on_how_the_samples_are_run(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = small()
    expected = bnfix.swap(model, data=data).model
    passes = []
    counted = calibrating.Calibration._forward
    monkeypatch.setattr(
        calibrating.Calibration, "_forward", lambda self, *a, **k: passes.append(1) or counted(self, *a, **k)
    )
    if way == "by forward=":  # nothing can be put together: a pass for each norm
        found = bnfix.swap(model, data=[(x,) for x in data], forward=lambda m, b: m(b[0])).model
        assert len(passes) > 3 * len(data)
    elif way == "little memory":
        run = calibrating.Calibration.run
        monkeypatch.setattr(calibrating.Calibration, "run", lambda self, c: setattr(self, "budget", 1) or run(self, c))
        found = bnfix.swap(model, data=data).model
        assert len(passes) > 6
    elif way == "uneven batches":
        found = bnfix.swap(model, data=list(torch.cat(data).split(5))).model
    else:
        found = bnfix.swap(model, data=torch.cat(data).split(32)).model
    for path in ORDER:
        assert found.get_submodule(path).num_groups == expected.get_submodule(path).num_groups
        weight, right = found.get_submodule(path).weight, expected.get_submodule(path).weight
        torch.testing.assert_close(weight, right, rtol=1e-9, atol=1e-12)


def test_what_does_not_fit_into_memory_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = small()
    monkeypatch.setattr(sizes, "free_bytes", lambda _device: 0)
    monkeypatch.setattr(sizes, "budget_of", lambda _model: 1)
    assert sizes.fitting([bnfix.Call((x,)) for x in data], model, 1) == [bnfix.Call((data[0],))]
    assert len(sizes.fitting([bnfix.Call((x,)) for x in data], model, 1 << 40)) == 4


def test_max_samples_cuts_the_last_batch() -> None:
    model, data = small()
    result = bnfix.swap(model, data=data, max_samples=12, groups=1)
    expected = swapped_by_hand(model, ORDER, torch.cat(data)[:12], 1)
    torch.testing.assert_close(result.model.bn3.weight, expected.bn3.weight, rtol=1e-9, atol=1e-12)
    assert any("calibrated on 12 samples" in note for note in result.notes)


def test_batches_that_mix_samples_are_not_put_together() -> None:
    """A model whose output for a sample depends on its batch is calibrated on the batches as they come."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y / y.std())

    data = [b * (i + 1) for i, b in enumerate(batches(8, 3, 8, 8, dtype=torch.float64))]
    model = fitted(Mixing().double(), data)
    found = bnfix.swap(model, groups=1, data=data).model
    with torch.no_grad():
        x = torch.cat([(y := model.conv(b)) / y.std() for b in data])
        scale, shift, _, _ = affine_by_hand(model.bn(x), F.group_norm(x, 1), "moment")
    torch.testing.assert_close(found.bn.weight.detach(), scale, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.bn.bias.detach(), shift, rtol=1e-9, atol=1e-12)


def test_a_norm_without_statistics_is_fitted_to_what_it_does_with_each_batch() -> None:
    data = [b + i for i, b in enumerate(batches(8, 3, 8, 8, dtype=torch.float64))]
    model = lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).double())
    found = bnfix.swap(model, groups=1, data=data).model
    with torch.no_grad():
        x = torch.cat([model[0](b) for b in data])
        y = torch.cat([model(b) for b in data])
        scale, _, _, _ = affine_by_hand(y, F.group_norm(x, 1), "moment")
    torch.testing.assert_close(found[1].weight.detach(), scale, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("net", "shape"), [(NormOnTwoConvs, (8, 3, 9, 9)), (CalledTwice, (8, 4, 9, 9))])
def test_a_norm_with_several_call_sites_is_fitted_to_all_of_them(net: type[nn.Module], shape: tuple[int, ...]) -> None:
    """The fixed point: with the affine that came out, the pooled sums give that affine again."""
    data = batches(*shape, dtype=torch.float64)
    model = fitted(net().double(), data)
    result = bnfix.swap(model, groups=1, data=data)
    assert result.edits[0].calls == ("bn", "bn@1")
    ys, zs = [], []
    for m, kept in ((model, ys), (result.model, zs)):
        m.bn.register_forward_hook(
            lambda mod, args, out, kept=kept: kept.append(out if kept is ys else F.group_norm(args[0], 1, eps=mod.eps))
        )
    with torch.no_grad():
        model(torch.cat(data))
        result.model(torch.cat(data))
    assert len(ys) == len(zs) == 2
    scale, shift, explained, total = affine_by_hand(torch.cat(ys), torch.cat(zs), "moment")
    # settled where a round changes less than 1e-3; what is left of a contraction is of that order
    assert relative_error(result.model.bn.weight, scale) < 2e-3
    assert (result.model.bn.bias - shift).norm() < 2e-3 * torch.cat([scale, shift]).norm()
    assert result.edits[0].r2 == pytest.approx((explained / total).item(), abs=2e-3)


def test_r2_is_the_share_explained_and_chooses_the_groups() -> None:
    model, data = small()
    result = bnfix.swap(model, "group", data=data)
    r2 = {}
    with torch.no_grad():
        x = model.c1(torch.cat(data))
        for groups in (1, 2, 4, 8, 16):
            _, _, explained, total = affine_by_hand(model.bn1(x), F.group_norm(x, groups, eps=1e-5), "moment")
            r2[groups] = (explained / total).item()
    best = max(r2, key=r2.get)
    edit = next(e for e in result.edits if e.site == "bn1")
    assert edit.r2 == pytest.approx(r2[best], rel=1e-9)
    assert edit.after == f"GroupNorm({best}, 16, eps=1e-05)"
    assert r2[best] > min(r2.values()) + 0.01  # there was something to choose


def test_groups_have_sixteen_values_at_least() -> None:
    data = batches(16, 3, 4, 4)  # 2x2 positions: 16 channels are 64 values
    result = bnfix.swap(fitted(Head(), data), "group", data=data)
    conv, top = result.model.bn, result.model.top
    assert 16 // conv.num_groups * 4 >= 16
    assert top.num_groups == 1


def test_dead_channels_are_their_mean() -> None:
    data = batches(8, 3, 8, 8)
    model = fitted(Head(), data)
    with torch.no_grad():
        model.fc.weight[:] = 0  # every sample gives the bias: what the top norm sees does not vary
    result = bnfix.swap(model, to="layer", only="bn", data=data)
    assert result.edits
    model = fitted(Small(), data)
    with torch.no_grad():
        model.bn2.weight.zero_()  # zero-initialised, as the last norm of a residual branch is
    result = bnfix.swap(model, to="layer", data=data)
    assert torch.equal(result.model.bn2.weight, torch.zeros(16))
    torch.testing.assert_close(result.model.bn2.bias, model.bn2.bias)
    assert next(e for e in result.edits if e.site == "bn2").r2 == 1.0


def test_calibration_keeps_what_a_copy_of_the_affine_loses() -> None:
    model, data = small(torch.float32)
    x = torch.cat(batches(8, 3, 10, 10, seed=7))
    with torch.no_grad():
        before = model(x)
        apart = {
            init: relative_error(bnfix.swap(model, "group", data=data, init=init).model(x), before)
            for init in ("moment", "ls", "copy", "fresh")
        }
    assert apart["moment"] < 0.5 * apart["copy"]
    assert apart["ls"] < 0.5 * apart["copy"]
    assert apart["moment"] < 0.5 * apart["fresh"]


def test_data_is_read_once() -> None:
    model, data = small()
    once = iter(data)
    result = bnfix.swap(model, data=once)
    assert result.signatures == ("8x3x10x10 float64",)
    torch.testing.assert_close(result.model.bn3.weight, bnfix.swap(model, data=data).model.bn3.weight)


def test_a_way_that_depends_on_values_is_refused_where_it_parts() -> None:
    """The new model takes a way that the old one does not: the norm there has no output to be fitted to."""

    class Parting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y) if float(y.mean((1, 2, 3)).std(correction=0)) < 0.1 else y

    data = batches(8, 8, 6, 6)
    model = fitted(Parting(), data)
    result = bnfix.swap(model, "layer", example=data[0][:1], data=data)  # one sample goes by both
    assert [e.site for e in result.edits] == ["first"]
    assert [r.site for r in result.refusals] == ["second"]
    assert "its way depends on values" in result.refusals[0].reason
