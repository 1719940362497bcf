"""Laws of unshare, over programs that call norms in any order, by any name."""

from __future__ import annotations

import copy
from collections import Counter

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import lived_in
from torch import Tensor, nn

import bnfix
from bnfix.graph import NormPerCall


class Program(nn.Module):
    """Calls its norms (some of them under two names) and a shared block in the order that ``steps`` says."""

    def __init__(self, steps: list[str], aliased: bool) -> None:
        super().__init__()
        self.steps = steps
        self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False)
        self.c = self.a if aliased else nn.BatchNorm1d(3)
        self.block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def run(self, step: str, x: Tensor) -> Tensor:
        if step == "f":
            return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)
        y: Tensor = self.get_submodule(step)(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        for i, step in enumerate(self.steps):
            x = self.run(step, x) * 0.9 + i * 0.1
        return x


programs = st.lists(st.sampled_from(["a", "b", "c", "block", "f"]), min_size=1, max_size=7)
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))


@given(steps=programs, aliased=st.booleans(), share_affine=st.booleans())
@settings(max_examples=40)
def test_law_same_bits_and_every_call_has_its_own(steps: list[str], aliased: bool, share_affine: bool) -> None:
    model = lived_in(Program(steps, aliased))
    result = bnfix.unshare(model, X, share_affine=share_affine)
    apart = result.model
    for x in (X, X * 3 - 1):
        assert torch.equal(apart(x), model(x))
    assert not result.refusals
    assert torch.equal(apart.train()(X), copy.deepcopy(model).train()(X))
    for path, calls in Counter({"f": "running_mean_per_call", "block": "block.1"}.get(s, s) for s in steps).items():
        found = getattr(apart, path, None) if "." not in path else apart.get_submodule(path)
        assert isinstance(found, NormPerCall) == (calls > 1)
        assert calls == 1 or len(found) == calls  # type: ignore[arg-type]
    again = bnfix.unshare(apart.eval(), X)
    assert not again.edits  # a second time finds nothing


@given(steps=programs, aliased=st.booleans())
@settings(max_examples=25)
def test_law_statistics_are_those_of_the_call(steps: list[str], aliased: bool) -> None:
    """After a forward in training mode each norm holds what one update by its own input gives, from what all had."""
    model = lived_in(Program(steps, aliased))
    apart = bnfix.unshare(model, X).model.train()
    apart(X)
    reference = copy.deepcopy(model).train()
    x, number = X, Counter[str]()
    for i, step in enumerate(steps):
        alone = copy.deepcopy(model).train()
        y = alone.run(step, x)
        place = {"f": "running_mean_per_call", "block": "block.1"}.get(step, step)
        norm = apart.get_submodule(place) if step != "f" or hasattr(apart, place) else apart
        norm = norm[number[step]] if isinstance(norm, NormPerCall) else norm
        number[step] += 1
        expected = alone if step == "f" else alone.get_submodule(place)
        assert torch.equal(norm.running_mean, expected.running_mean)
        assert torch.equal(norm.running_var, expected.running_var)
        x = y * 0.9 + i * 0.1
    assert torch.equal(x, reference(X))
