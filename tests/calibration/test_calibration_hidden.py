"""Ties between samples or chunks that most samples don't show, and norms or layers that most models don't have."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calib_nets import residual
from nets import PassesOn, lived_in
from torch import Tensor, nn

import bnfix
from bnfix.errors import CalibrationError

EXACT = 1e-5
KEPT: dict[str, Tensor] = {}


class ReadsLate(nn.Module):
    """Keeps a value in a global, and reads it behind a norm for some inputs only."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.one, self.a, self.two, self.b = (
            nn.Conv1d(5, 6, 1),
            nn.BatchNorm1d(6),
            nn.Conv1d(6, 5, 1),
            nn.BatchNorm1d(5),
        )

    def forward(self, x: Tensor) -> Tensor:
        KEPT["mean"] = x.mean((0, 2))
        y = self.two(F.relu(self.a(self.one(x))))
        reads = x.shape[-1] == 8 if self.where == "length" else bool(x.mean() > 1.5)
        return self.b(y + KEPT["mean"][:, None] if reads else y)


@pytest.mark.parametrize("where", ["length", "brightness"])
def test_a_leak_that_few_chunks_show(where: str) -> None:
    """Three chunks were looked at, and these did not read: .34 σ off."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    if where == "length":
        data = [torch.randn(20, 5, k, generator=g) * (1 + 0.1 * k) + 0.1 * k for _ in range(2) for k in range(3, 13)]
    else:
        data = [torch.randn(20, 5, 7, generator=g) * 0.5 + 0.3 * i for i in range(8)]
    model = lived_in(ReadsLate(where))
    report = bnfix.recalibrate(model, data)
    assert report.engine == "plain passes"
    assert max(residual(model, data)) <= EXACT


class PaddedMean(nn.Module):
    """The mean over the positions that any sample of the batch has: behind the longest there are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.a, self.two, self.b = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        there = (x.abs().sum((0, 2)) > 0).to(x.dtype)
        mean = (x * there[None, :, None]).sum(1) / there.sum()
        return self.b(self.two(F.relu(self.a(self.one(mean)))))


@pytest.mark.parametrize("lengths", [[7, 6, 5, 4, 3, 2], [2, 3, 4, 5, 6, 7], [7, 7, 3, 7, 2, 5]])
def test_zeros_behind_the_longest_of_a_batch(lengths: list[int]) -> None:
    """The samples looked at were of the longest batch: alone and among others they are alike. 2.4 σ off."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    data = [torch.randn(8, 7, 5, generator=g) for _ in lengths]
    for x, length in zip(data, lengths, strict=True):
        x[:, length:] = 0
    model = lived_in(PaddedMean())
    bnfix.recalibrate(model, data)
    assert max(residual(model, data)) <= EXACT


class ByTheNumber(nn.Module):
    """Treats batches of eight otherwise: no sample that is looked at comes in such a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.two, self.b = nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(self.two(F.relu(self.a(x * (1 if len(x) == 8 else 3)))))
        return found


def test_what_a_full_certificate_disproves_is_not_written() -> None:
    """The residual said .95 σ, and the statistics were written all the same."""
    torch.manual_seed(1)
    model = lived_in(ByTheNumber())
    report = bnfix.recalibrate(model, vectors(), certify="full")
    assert any("disproved" in note for note in report.notes)
    assert report.engine == "plain passes"
    assert report.residual is not None
    assert max(report.residual.mean, report.residual.var) <= EXACT
    assert max(residual(model, vectors())) <= EXACT


class BuiltLate(nn.Module):
    """Makes a layer as large as its first input says."""

    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module | None = None
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = nn.Linear(x.shape[1], 5)
        found: Tensor = self.norm(self.first(x))
        return found


def vectors() -> list[Tensor]:
    g = torch.Generator().manual_seed(4)
    return [torch.randn(8, 5, generator=g) * (1 + i) + 1 for i in range(6)]


def test_a_layer_that_the_first_call_builds() -> None:
    """Statistics were those behind a layer that was thrown away again: 1.5 σ off in use."""
    model = BuiltLate()
    with pytest.raises(CalibrationError, match=r"first\.weight") as caught:
        bnfix.recalibrate(model, vectors())
    assert "run the model once" in str(caught.value.hint)
    assert model.first is None
    model.eval()(vectors()[0])
    bnfix.recalibrate(model, vectors())
    assert max(residual(model, vectors())) <= EXACT


def test_a_norm_in_a_wrapper_that_passes_attributes_on() -> None:
    """It was left, "called in a thread of the model's own": the wrapper's call counted as one of the norm's."""
    inner = nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(5, 6), PassesOn(inner), nn.Linear(6, 4), nn.BatchNorm1d(4))
    report = bnfix.recalibrate(model, vectors())
    assert [row.site for row in report.layers] == ["1.inner", "3"]
    assert not report.left_why
    x = model[0](torch.cat(vectors())).detach()
    torch.testing.assert_close(inner.running_mean, x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inner.running_var, x.var(0), rtol=1e-5, atol=1e-5)


class Meddles(nn.Module):
    """Changes in its forward what is not its business."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.random = nn.Linear(5, 6), nn.BatchNorm1d(6), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self.linear(x.detach()).pow(2).mean().backward()
        self.linear.weight.requires_grad_(False)
        return self.norm(self.linear(x)) + 0 * float(self.random.normal())


@pytest.mark.parametrize("broken", [False, True])
def test_gradients_flags_and_generators_of_the_model(broken: bool) -> None:
    model, data = Meddles(), vectors()
    before = model.random.bit_generator.state
    if broken:
        with pytest.raises(CalibrationError):
            bnfix.recalibrate(model, [*data, torch.full((8, 5), torch.nan)])
    else:
        bnfix.recalibrate(model, data)
    assert model.linear.weight.grad is None
    assert model.linear.bias.grad is None
    assert model.linear.weight.requires_grad
    assert model.random.bit_generator.state == before


def test_the_first_of_all_batches_that_are_not_finite_is_named() -> None:
    """Chunks hold batches in another order: with weights that are NaN it was batch 1."""
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"^batch 0: 1: "):
        bnfix.recalibrate(model, vectors() * 20)


def test_an_error_in_the_first_batch_names_the_norm_before_it() -> None:
    class Stumbles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(f"no way on from {self.norm(x).shape[1]}")

    with pytest.raises(CalibrationError, match="batch 0: the forward failed behind norm: RuntimeError: no way on"):
        bnfix.recalibrate(Stumbles(), vectors())


class Computed(nn.Module):
    """Sets a weight that it computes from another in each forward, as AWD-LSTM's WeightDrop does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.raw = self.linear.weight
        del self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight = nn.Parameter(self.raw * 2)
        found: Tensor = self.norm(self.linear(x))
        return found


def test_a_parameter_that_is_computed_anew_in_each_call_is_not_built() -> None:
    torch.manual_seed(0)
    model = Computed()
    bnfix.recalibrate(model, vectors())
    x = F.linear(torch.cat(vectors()), model.raw * 2, model.linear.bias).detach()
    torch.testing.assert_close(model.norm.running_mean, x.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.norm.running_var, x.var(0), rtol=1e-5, atol=1e-5)


def test_a_sparse_input() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.norm(self.linear(x.to_dense()))
            return found

    torch.manual_seed(0)
    model = Sparse()
    bnfix.recalibrate(model, [v.relu().to_sparse() for v in vectors()])
    x = model.linear(torch.cat([v.relu() for v in vectors()])).detach()
    torch.testing.assert_close(model.norm.running_mean, x.mean(0), rtol=1e-5, atol=1e-5)


def test_a_generator_without_a_state() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    model.random = random.SystemRandom()
    assert bnfix.recalibrate(model, vectors()).changed
