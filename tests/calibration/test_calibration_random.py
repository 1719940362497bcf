"""Forwards that draw at random in evaluation mode: the same draws each time, and the generators as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calib_nets import Forward, distances, residual
from nets import bits, lived_in
from torch import Tensor
from trap_nets import EXACT, Two, as_is, everything, images

import bnfix


class Noisy(Two):
    """Draws at random, in evaluation mode too."""

    def __init__(self, draw: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x) + self.draw(x))


DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "torch": lambda x: torch.randn(len(x), 1, 1, 1),
    "dropout": lambda x: F.dropout(x[:, :1], 0.5),
    "random": lambda _: random.random(),
    "numpy": lambda _: float(np.random.rand()),
}


@pytest.mark.parametrize("forward", [None, as_is])
@pytest.mark.parametrize("draw", list(DRAWS))
def test_a_forward_that_draws_at_random(draw: str, forward: Forward | None) -> None:
    model = lived_in(Noisy(DRAWS[draw]))
    before = everything(model)
    found = []
    for _ in range(2):
        bnfix.recalibrate(lived_in(model), images(), forward=forward)
        found.append(bits(model))
    assert everything(model) == before
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])  # the same draws each time
    assert max(distances(model, images())["bn1"]) <= EXACT
    assert max(residual(model, images())) < 0.5
