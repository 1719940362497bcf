"""Channels that are all but dead, as published MobileNets have them: what a norm's eps drowns is no drift."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from nets import lived_in
from torch import Tensor, nn

import bnfix


class Faint(nn.Module):
    """Two norms in a row; channel 0 of the first sees values of 3e-5, seldom another than 0."""

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(4, eps=eps), nn.BatchNorm1d(4, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        seldom = 3e-5 * (x[:, :1] > 2.5)
        return self.b(torch.cat([self.a(torch.cat([seldom, x[:, 1:]], 1))[:, 1:], x[:, :1]], 1))


class Functional(Faint):
    """The same statistics of ``a``, handed to ``F.batch_norm``, with the eps that this has by default."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.register_buffer("running_mean", torch.zeros(4))
        self.a.register_buffer("running_var", torch.ones(4))
        self.a.forward = lambda x: F.batch_norm(x, self.a.running_mean, self.a.running_var)  # type: ignore[assignment]


def samples(count: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", [Faint(), Functional()], ids=["modules", "functional"])
def test_the_worst_is_a_norm_that_changes_something(model: Faint) -> None:
    model = lived_in(model)
    bnfix.recalibrate(model, samples(512).split(64))
    assert isinstance(model.a.running_var, Tensor)
    model.a.running_var[0] = 0.0  # a published file rounded or decayed it away
    model.b.running_mean += 0.1
    report = bnfix.recalibrate(model, samples(512).split(64))
    a, b = report.layers
    assert (a.var_before[0], a.kl[0]) == (0.0, float("inf"))
    assert 0 < a.var[0] < 1e-10
    assert report.worst(1) == (b,)
    assert a.worst_kl < 1e-6
    assert (a.mean_shift, a.var_ratio) == (pytest.approx(0, abs=1e-4), pytest.approx(1, abs=1e-4))
    assert max(a.se, a.var_se) < 0.15


def test_a_stream_does_not_wait_for_a_channel_that_is_all_but_dead() -> None:
    """A variance of 5e-12 that comes of one sample in 160 is known to 1 % after a million, and nobody asks."""

    def forever() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(64, 4, generator=generator)

    report = bnfix.recalibrate(lived_in(Faint()), forever(), method="population", tol=0.05, max_samples=2**14)
    assert report.n < 4096
    assert report.needed_samples(0.05) == 0
