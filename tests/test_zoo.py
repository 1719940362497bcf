"""Public architectures: all correct, every norm folded or left with its reason. A part in CI, all of them by --zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from nets import relative_error
from torch import Tensor

import bnfix
from bnfix.errors import TraceError

CASES = [n if n in zoo.IN_CI else pytest.param(n, marks=pytest.mark.zoo) for n in zoo.NAMES]


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for v in (out.values() if isinstance(out, dict) else out) for t in _tensors(v)]


@pytest.mark.parametrize("name", CASES)
def test_architecture_is_folded_right_or_refused_in_one_error(name: str) -> None:
    model, x = zoo.build(name)
    if name in zoo.UNTRACEABLE:
        with pytest.raises(TraceError, match=r"torch\.export can't trace this model"):
            bnfix.fold(model, x[:1])
        return
    result = bnfix.fold(model, x[:1])
    assert result.model is not None
    assert result.parity is not None
    own = max(o.noise or 0.0 for o in result.parity.outputs)
    with torch.no_grad():
        for found, expected in zip(_tensors(result.model(x)), _tensors(model(x)), strict=True):
            # The limit that other tools were judged by; where the model's own rounding is worse, nobody can do better.
            assert relative_error(found, expected) < max(1e-3, 2 * own)
    assert result.parity.verdict in ("passed", "warned")
    assert not any(r.defect for r in result.refusals)
    assert all(r.reason for r in result.refusals)
    norms = {id(m) for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)}
    assert len(norms) == result.norms
