"""``leave="affine"``: norms that can't be folded become one multiply-add per channel; the rest is as before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import bits, lived_in, norms_left, relative_error, same_bits
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import bnfix
from bnfix.graph import ChannelAffine


class PreActivation(nn.Module):
    """One norm that folds, one behind a sum that is used twice, one with an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.before = nn.BatchNorm2d(4, eps=0.1)
        self.act = BatchNormAct2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        out: Tensor = self.before(y) + self.act(y) + y
        return out


def test_norms_that_stay_become_affines() -> None:
    model, x = lived_in(PreActivation()), torch.randn(2, 3, 8, 8)
    before = bits(model)
    result = bnfix.fold(model, x, leave="affine")
    assert same_bits(model, before)
    assert result.model is not None
    assert {e.site: e.action for e in result.edits} == {"norm": "fold", "before": "affine", "act": "affine"}
    assert not result.refusals
    assert norms_left(result.model) == 0
    other = torch.randn(3, 3, 9, 7) * 1.5
    # Two float32 operations a norm where there was one kernel: an ulp or two of the output.
    assert relative_error(result.model(other), model(other)) < 1e-6
    var, mean = model.before.running_var.double(), model.before.running_mean.double()
    exact = model.before.weight.double() / torch.sqrt(var + 0.1)
    found = result.model.get_submodule("before")
    assert isinstance(found, ChannelAffine)
    assert torch.equal(found.weight, exact.float())
    assert torch.equal(found.bias, (model.before.bias.double() - mean * exact).float())
    assert result.parity is not None
    assert result.parity.passed


def test_in_place_and_dry_run() -> None:
    model, x = lived_in(PreActivation()), torch.randn(2, 3, 8, 8)
    planned = bnfix.fold(model, x, leave="affine", dry_run=True)
    made = bnfix.fold(model, x, leave="affine")
    assert [(e.site, e.action, e.after) for e in planned.edits] == [(e.site, e.action, e.after) for e in made.edits]
    result = bnfix.fold(model, x, leave="affine", inplace=True)
    assert result.model is model
    assert made.model is not None
    assert same_bits(model, bits(made.model))


def test_half_precision_keeps_its_float32_statistics() -> None:
    model, x = lived_in(PreActivation()).to(torch.bfloat16), torch.randn(2, 3, 8, 8).to(torch.bfloat16)
    for norm in (model.norm, model.before, model.act):
        norm.float()
    result = bnfix.fold(model, x, leave="affine")
    assert result.model is not None
    affine = result.model.get_submodule("before")
    assert isinstance(affine, ChannelAffine)
    assert affine.weight.dtype == torch.float32
    assert result.parity is not None
    assert result.parity.passed


def test_saved_weights_come_back(tmp_path: Path) -> None:
    model, x = lived_in(PreActivation()), torch.randn(2, 3, 8, 8)
    result = bnfix.fold(model, x, leave="affine")
    assert result.model is not None
    bnfix.save(result.model, tmp_path / "w.safetensors", recipe=result.recipe)
    back = bnfix.load(tmp_path / "w.safetensors", arch=PreActivation)
    assert isinstance(back, nn.Module)
    assert result.model is not None
    assert torch.equal(back.eval()(x), result.model(x))


def test_a_norm_in_training_mode_stays_a_norm() -> None:
    model = lived_in(PreActivation())
    model.before.train()
    result = bnfix.fold(model, torch.randn(2, 3, 8, 8), leave="affine")
    assert [r.site for r in result.refusals] == ["before"]
    assert result.model is not None
    assert isinstance(result.model.get_submodule("before"), nn.BatchNorm2d)


def test_another_word_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leave='nothing'"):
        bnfix.fold(PreActivation().eval(), torch.randn(1, 3, 8, 8), leave="nothing")  # type: ignore[arg-type]
