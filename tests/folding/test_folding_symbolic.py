"""Without an input: what the code alone shows is folded, without a comparison of outputs, and that is said."""

from __future__ import annotations

import pytest
import torch
from nets import bits, lived_in, relative_error, same_bits
from torch import Tensor, nn

import bnfix
from bnfix.errors import PassError


class TwoInputs(nn.Module):
    """No input can be deduced: the second is an offset of a size that no layer tells."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.seq, self.norm1 = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, image: Tensor, offset: Tensor) -> Tensor:
        y = self.norm(self.conv(image)).relu() + offset
        out: Tensor = self.norm1(self.seq(y.flatten(2)))
        return out


class LooksAtIt(TwoInputs):
    def forward(self, image: Tensor, offset: Tensor) -> Tensor:
        if offset.sum() > 0:
            return super().forward(image, offset)
        return super().forward(image, -offset)


def test_what_the_classes_tell_is_folded_and_the_rest_asks_for_an_input() -> None:
    model = lived_in(TwoInputs())
    before = bits(model)
    result = bnfix.fold(model)
    assert same_bits(model, before)
    assert result.source == "symbolic"
    assert [e.site for e in result.edits] == ["norm"]
    assert all(e.ulp is not None and e.ulp <= 0.5 for e in result.edits)
    assert [r.site for r in result.refusals] == ["norm1"]
    assert "--input" in result.refusals[0].reason
    assert result.parity is None
    assert any("outputs were not compared" in note for note in result.notes)
    assert result.model is not None
    image, offset = torch.randn(2, 3, 8, 8), torch.randn(1, 4, 6, 6)
    # As in the laws: a few float32 roundings.
    assert relative_error(result.model(image, offset), model(image, offset)) < 1e-6


def test_a_forward_that_looks_at_its_input_asks_for_one() -> None:
    with pytest.raises(PassError, match="no example input was given") as caught:
        bnfix.fold(lived_in(LooksAtIt()))
    assert "--input image=" in (caught.value.hint or "")
