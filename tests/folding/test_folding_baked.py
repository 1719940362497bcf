"""Layers that compute their weight take a norm up: they become plain ones, and only those that do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nets import bits, lived_in, norms_left, relative_error, same_bits
from timm.layers import StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bnfix

pytestmark = pytest.mark.filterwarnings("ignore")  # torch deprecates the old weight_norm


class Computed(nn.Module):
    """A standardised convolution and a weight-normed one with norms behind, and one whose norm can't go."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm1 = StdConv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.two, self.norm2 = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, bias=False)), nn.BatchNorm2d(4)
        self.three, self.norm3 = StdConv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.two(self.norm1(self.one(x)).relu()))
        y = self.three(x)
        out: Tensor = self.norm3(y).relu() + y
        return out


def test_what_takes_a_norm_is_baked_and_nothing_else() -> None:
    model, x = lived_in(Computed()), torch.randn(2, 3, 8, 8)
    before = bits(model)
    result = bnfix.fold(model, x)
    assert same_bits(model, before)
    assert result.model is not None
    assert {(e.action, e.site) for e in result.edits} == {
        ("bake", "one"), ("bake", "two"), ("fold", "norm1"), ("fold", "norm2"),
    }  # fmt: skip
    assert (result.norms, result.done) == (3, 2)
    assert [r.site for r in result.refusals] == ["norm3"]
    assert type(result.model.get_submodule("one")) is nn.Conv2d
    assert type(result.model.get_submodule("three")) is StdConv2d
    assert norms_left(result.model) == 1
    other = torch.randn(3, 3, 9, 8)
    # As in the laws: a few float32 roundings.
    assert relative_error(result.model(other), model(other)) < 1e-6
    assert result.parity is not None
    assert result.parity.passed


def test_in_place_and_back_from_a_file(tmp_path: Path) -> None:
    model, x = lived_in(Computed()), torch.randn(2, 3, 8, 8)
    copied = bnfix.fold(model, x)
    result = bnfix.fold(model, x, inplace=True)
    assert result.model is model
    assert copied.model is not None
    assert same_bits(model, bits(copied.model))
    bnfix.save(copied.model, tmp_path / "w.pt", recipe=copied.recipe)
    back = bnfix.load(tmp_path / "w.pt", arch=Computed)
    assert isinstance(back, nn.Module)
    assert torch.equal(back.eval()(x), copied.model(x))


def test_a_dry_run_says_the_same() -> None:
    model, x = lived_in(Computed()), torch.randn(2, 3, 8, 8)
    planned, made = bnfix.fold(model, x, dry_run=True), bnfix.fold(model, x)
    assert [(e.action, e.site, e.after) for e in planned.edits] == [(e.action, e.site, e.after) for e in made.edits]
    assert planned.refusals == made.refusals
