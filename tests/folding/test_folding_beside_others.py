"""The benchmark beside other tools judges as it says; bnfix is right, or leaves alone, where others were wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks import fold_patterns
from benchmarks.bench_fold_peers import Case, Outcome, case, judge, summary
from benchmarks.fold_peers import bnfix_fold, fx_fuse
from nets import conv_bn, lived_in
from torch import nn


def _case() -> Case:
    torch.manual_seed(0)
    return case("small", lived_in(conv_bn()), (torch.randn(1, 3, 8, 8),), (torch.randn(1, 3, 8, 8),))


def _nothing(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    return model


def _harm(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    model.get_submodule("0").weight.data *= 1.01  # type: ignore[operator]
    return model


def _warned_harm(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    warnings.warn("mind the weights", stacklevel=2)
    return _harm(model, args)


def _crash(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    raise IndexError("no such layer")


def _other_shape(model: nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    return lambda x: model(x).flatten(1)


@pytest.mark.parametrize(
    ("tool", "verdict", "left"),
    [
        (bnfix_fold, "right", 0),
        (fx_fuse, "right", 0),
        (_nothing, "right", 1),
        (_harm, "wrong", 1),
        (_warned_harm, "told", 1),
        (_other_shape, "wrong", 1),
        (_crash, "error", 1),
    ],
)
def test_each_verdict(tool: Callable[..., Any], verdict: str, left: int) -> None:
    outcome = judge(_case(), "tool", tool)
    assert (outcome.verdict, outcome.norms, outcome.left) == (verdict, 1, left)


def test_a_tool_gets_a_copy() -> None:
    small = _case()
    before = small.model.get_submodule("0").weight.clone()  # type: ignore[operator]
    judge(small, "harm", _harm)
    assert torch.equal(small.model.get_submodule("0").weight, before)  # type: ignore[arg-type]


def test_only_what_is_right_counts_as_folded() -> None:
    own = [
        Outcome("a", "t", "right", 10, 3, 0.0, 1.0),
        Outcome("b", "t", "wrong", 10, 0, 0.5, 1.0),
        Outcome("c", "t", "error", 20, 20, 0.0, 1.0),
    ]
    assert "| t | 1 of 3 | 7 of 40 (17.5%) | 0 | 1 | 0 | 1 | 3 s |" in summary(own, ["t"])


@pytest.mark.parametrize("name", fold_patterns.PATTERNS)
def test_right_or_left_alone_where_others_are_wrong(name: str) -> None:
    model, traced, seen = fold_patterns.build(name)
    half = any(p.dtype == torch.float16 for p in model.parameters())
    outcome = judge(case(name, model, traced, seen), "bnfix", bnfix_fold, limit=5e-3 if half else 1e-5)
    assert outcome.verdict == "right", outcome
