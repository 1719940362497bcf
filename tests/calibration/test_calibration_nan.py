"""Statistics with a NaN in them: nothing needs recalibration more, though no number says by how much."""

from __future__ import annotations

import math

import pytest
import torch
from nets import lived_in
from torch import Tensor, nn

import bnfix
from bnfix.calibration.judging import change


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)))


DATA = [torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(8)]


def test_a_model_that_gives_nan_needs_recalibration() -> None:
    model = net()
    model[1].running_mean[2] = math.nan  # type: ignore[index]
    said = bnfix.recalibrate(model, DATA, when="needed")
    assert said.output_change == math.inf
    assert said.changed
    assert model[1].running_mean.isfinite().all()  # type: ignore[union-attr, operator]
    assert "beyond comparison" in str(said)
    assert not bnfix.recalibrate(model, DATA, when="needed").changed


A = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])


@pytest.mark.parametrize(("before", "after", "expected"), [
    (torch.where(A > 4, math.nan, A), A, math.inf),
    (A, torch.where(A > 4, math.inf, A), math.inf),
    (torch.where(A > 4, -math.inf, A), torch.where(A > 4, -math.inf, A), 0.0),  # a mask
    (torch.full_like(A, math.nan), torch.full_like(A, math.nan), 0.0),
    (A + 1, A, 1 / A.std(unbiased=False).item()),
])  # fmt: skip
def test_what_is_not_finite_is_compared(before: Tensor, after: Tensor, expected: float) -> None:
    assert change(before, after) == pytest.approx(expected, rel=1e-6)
