"""Statistics with a NaN in them: nothing needs recalibration more, though no number says by how much."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from nets import lived_in
from torch import Tensor, nn

import bnfix
from bnfix.calibration.judging import change
from bnfix.errors import CalibrationError


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_a_variance_that_is_none_is_measured_and_shown(value: float, tmp_path: Path) -> None:
    model = net()
    model[1].running_var.fill_(value)  # type: ignore[union-attr, operator]
    said = bnfix.recalibrate(model, DATA, certify="full")
    assert said.residual_before is not None
    assert said.residual is not None
    # Only its own input counts, as no norm comes behind it: σ²/inf − 1, σ² − NaN, σ² − (−1).
    found = said.residual_before.var
    assert found == 1.0 if value == math.inf else found == math.inf if math.isnan(value) else 1 < found < math.inf
    assert max(said.residual.mean, said.residual.var) <= 1e-6
    assert "recalibrated" in str(said)
    said.plot(tmp_path / "drift.png")


def test_statistics_that_make_later_norms_overflow() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.0), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var.fill_(1e-45)  # type: ignore[union-attr, operator]
    said = bnfix.recalibrate(model, [d.mean((2, 3)) for d in DATA], certify="full")
    assert said.residual_before is not None
    assert said.residual_before.var == math.inf
    assert said.residual is not None
    assert max(said.residual.mean, said.residual.var) <= 1e-6


def test_outputs_in_a_record_are_compared() -> None:
    @dataclass
    class Out:
        scores: Tensor
        aux: list[dict[str, Tensor]]

    class Records(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Out:
            y = self.net(x)
            return Out(y, [{"more": y * 2}])

    plain, records = net(), Records().eval()
    assert bnfix.recalibrate(records, DATA).output_change == bnfix.recalibrate(plain, DATA).output_change
    again = bnfix.recalibrate(records, DATA, when="needed")
    assert again.output_change == pytest.approx(0, abs=1e-5)
    assert not again.changed


def test_a_report_can_be_pickled() -> None:
    model = net()
    said = bnfix.recalibrate(model, DATA)
    read = pickle.loads(pickle.dumps(said))
    assert read.layers == said.layers
    with pytest.raises(CalibrationError, match="a copy of the report"):
        read.undo()
    said.undo()


A = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])


@pytest.mark.parametrize(("before", "after", "expected"), [
    (torch.where(A > 4, math.nan, A), A, math.inf),
    (A, torch.where(A > 4, math.inf, A), math.inf),
    (torch.where(A > 4, -math.inf, A), torch.where(A > 4, -math.inf, A), 0.0),  # a mask
    (torch.full_like(A, math.nan), torch.full_like(A, math.nan), 0.0),
    (A + 1, A, 1 / A.std(unbiased=False).item()),
])  # fmt: skip
def test_what_is_not_finite_is_compared(before: Tensor, after: Tensor, expected: float) -> None:
    assert change([before], [after]) == pytest.approx(expected, rel=1e-6)
