"""Public architectures: all correct, every norm folded or left with its reason. A part in CI, all of them by --zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from nets import relative_error
from torch import Tensor

import bnfix

CASES = [n if n in zoo.IN_CI else pytest.param(n, marks=pytest.mark.zoo) for n in zoo.NAMES]


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for v in (out.values() if isinstance(out, dict) else out) for t in _tensors(v)]


@pytest.mark.parametrize("name", CASES)
def test_architecture_is_folded_right_and_what_stays_has_its_reason(name: str) -> None:
    model, x = zoo.build(name)
    result = bnfix.fold(model, x[:1])
    assert result.model is not None
    assert result.parity is not None
    own = max(o.noise or 0.0 for o in result.parity.outputs)
    compared = (zoo.judged(name, result.model), zoo.judged(name, model))
    if name in zoo.UNTRACEABLE:
        assert result.source == "observed"
        assert not result.refusals
    with torch.no_grad():
        for found, expected in zip(*(_tensors(m(x)) for m in compared), strict=True):
            # The limit that other tools were judged by; where the model's own rounding is worse, nobody can do better.
            assert relative_error(found, expected) < max(1e-3, 2 * own)
    assert result.parity.verdict in ("passed", "warned")
    assert not any(r.defect for r in result.refusals)
    assert all(r.reason for r in result.refusals)
    norms = {id(m) for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)}
    assert len(norms) == result.norms
