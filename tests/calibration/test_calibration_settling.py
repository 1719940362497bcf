"""Norms with several call sites: their statistics have to agree with what they themselves cause."""

from __future__ import annotations

import pytest
import torch
from calib_nets import FIBERS, residual
from torch import Tensor, nn

import bnfix
from bnfix.calibration import engines
from bnfix.calibration.settling import Settling
from tests.nets import lived_in


class Cell(nn.Module):
    """A recurrent cell with norms on input, state and output: taking over what was measured swings without end."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.state = nn.Linear(5, 16), nn.Linear(8, 16)
        self.on_input, self.on_state, self.on_output = nn.BatchNorm1d(16), nn.BatchNorm1d(16), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 8)
        for step in x.unbind(1):
            i, f = (self.on_input(self.input(step)) + self.on_state(self.state(h))).chunk(2, 1)
            c = f.sigmoid() * c + i.tanh()
            h = self.on_output(c).tanh()
        return h


def cell(seed: int) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(seed)
    model = Cell()
    lived_in(model)
    return model, list(torch.randn(300, 6, 5).cumsum(1).split(20))


@pytest.mark.parametrize("seed", range(4))
def test_a_recurrent_cell_in_which_plain_iteration_swings(seed: int) -> None:
    model, data = cell(seed)
    report = bnfix.recalibrate(model, data)
    assert max(residual(model, data)) <= 1e-5  # three runs apart by rounding: some 1e-6
    assert report.engine == FIBERS
    assert report.iterations <= 41


def test_what_did_not_settle_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of the runs need not be the last, which is the one that the replay is held against."""
    model, data = cell(0)
    monkeypatch.setattr(engines, "ROUNDS", 5)
    report = bnfix.recalibrate(model, data)
    assert report.engine == FIBERS
    assert report.replay is not None
    assert report.replay <= 1e-5
    (said,) = report.notes
    assert "did NOT settle" in said
    found = residual(model, data)
    assert f"still {max(found):.2g} σ" in said  # what is said is so
    assert max(found) > 1e-3


def _rounds(matrix: Tensor, shift: Tensor) -> int:
    """How many rounds until a linear map of (mean, variance) has settled to 1e-9."""
    count = len(shift) // 2
    now = {7: (torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.float64))}
    settling = Settling()
    for number in range(1, 100):
        new = matrix @ torch.cat(now[7]) + shift
        found = {7: (new[:count], new[count:])}
        far = (new - torch.cat(now[7])).abs().max().item()
        if far <= 1e-9:
            return number
        now = settling.next(now, found, far)
    return 100


@pytest.mark.parametrize("swing", [-0.95, -1.5, -3.0])
def test_a_swing_that_plain_iteration_never_leaves(swing: float) -> None:
    """x → swing · x + shift has its fixed point at shift/(1 − swing), wherever it starts."""
    matrix = torch.diag(torch.tensor([swing, 0.5, 0.1, swing / 3, 0.2, 0.1], dtype=torch.float64))
    shift = torch.tensor([0.3, 0.1, 0.2, 1.2, 0.8, 0.9], dtype=torch.float64)
    assert _rounds(matrix, shift) <= 25


def test_feed_forward_nets_are_left_to_plain_iteration() -> None:
    """There each round settles one more norm, exactly: a nilpotent map."""
    matrix = torch.diag(torch.full((5,), 0.4, dtype=torch.float64), -1)
    assert _rounds(matrix, torch.ones(6, dtype=torch.float64)) <= 9


class GhostBatches(nn.Module):
    """Each norm is called for three samples at a time, in evaluation mode too, as ghost batch norm may be."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = torch.tanh(torch.cat([norm(part) for part in layer(x).split(3)]))
        return x


def test_norms_called_for_parts_of_a_batch_settle_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures of guesses moved norms that stood already: with 21 of them, 41 rounds left them 1e-3 σ apart."""
    torch.manual_seed(0)
    model, data = lived_in(GhostBatches(12)), list((torch.randn(40, 6) * torch.rand(40, 1) * 3).split(8))
    monkeypatch.setattr(engines, "ROUNDS", 4)  # a deep net needs more rounds than one gets that makes no progress
    report = bnfix.recalibrate(model, data)
    assert max(residual(model, data)) <= 1e-6
    assert report.iterations <= 13
    assert any("settled to" in note for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_its_rounding_is_no_swing(dtype: torch.dtype) -> None:
    """Some 1e-3 is all that it can do; a model that did that well was said not to have settled, or to leak."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
    model = lived_in(nn.Sequential(conv, norm, nn.ReLU(), conv, norm, nn.ReLU(), conv, norm)).to(dtype)
    data = list(torch.randn(200, 6, 8, 8).to(dtype).split(20))
    report = bnfix.recalibrate(model, data)
    assert report.engine == FIBERS
    assert report.iterations < 40
    (said,) = report.notes
    assert "settled to" in said
    assert max(residual(model, data)) <= 2e-2
