"""Fold and check in one step: the argument untouched, the outputs the same on another input, no defect."""

from __future__ import annotations

import torch
from nets import bits, lived_in, relative_error, same_bits
from torch import Tensor, nn

import bnfix
from bnfix import Result

IMAGE = (2, 3, 8, 8)
FLOAT32 = 1e-6  # as in the laws: ten times what two roundings of weights of order one amount to


def fold(model: nn.Module, shape: tuple[int, ...] = IMAGE, **options: object) -> tuple[nn.Module, Result]:
    """Fold, and hold the result against the original on another input than the one that was traced."""
    model = lived_in(model)
    before = bits(model)
    result = bnfix.fold(model, torch.randn(shape), **options)  # type: ignore[arg-type]
    assert same_bits(model, before)
    assert result.model is not None
    x = torch.randn(shape) * 1.5
    found, expected = result.model(x), model(x)
    for a, b in zip(_flat(found), _flat(expected), strict=True):
        assert relative_error(a, b) < FLOAT32
    assert not any(r.defect for r in result.refusals)
    return model, result


def _flat(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for v in values for t in _flat(v)]  # type: ignore[attr-defined]


def reasons(result: Result) -> str:
    return " | ".join(f"{r.site}: {r.reason}" for r in result.refusals)
