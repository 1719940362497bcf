"""Laws that every pattern obeys, over all of ``folds/`` and ``carriers/``: a new file is tested by being there."""

from __future__ import annotations

import pytest
import torch
from nets import bits, lived_in, norms_left, relative_error, same_bits

import bnfix
from bnfix.folding import Carrier, Example, Fold
from bnfix.registry import plugins

FOLDS = [*plugins("bnfix.folding.folds", Fold), *plugins("bnfix.folding.carriers", Carrier)]
CASES = [(fold, example) for fold in FOLDS for example in fold.examples]
IDS = [f"{type(fold).__name__}-{example.name}" for fold, example in CASES]

# Two float32 roundings of weights of order one, some dozens of additions each: 1e-6 is ten times what is seen.
FLOAT32 = 1e-6


def test_patterns_are_found() -> None:
    assert {k for fold in FOLDS if isinstance(fold, Fold) for k in fold.kinds} >= {"conv", "conv_transpose", "linear"}


@pytest.mark.parametrize(("fold", "example"), CASES, ids=IDS)
def test_outputs_stay_and_the_norms_go(fold: Fold | Carrier, example: Example) -> None:
    model, x = lived_in(example.build()), torch.randn(example.shape)
    result = bnfix.fold(model, x)
    assert result.model is not None
    assert len(result.edits) == example.folds
    assert norms_left(result.model) == norms_left(model) - example.folds
    other = torch.randn(example.shape)
    assert relative_error(result.model(other), model(other)) < FLOAT32
    assert all(e.ulp is not None and e.ulp <= 0.5 for e in result.edits)
    assert all(r.reason for r in result.refusals)
    assert not any(r.defect for r in result.refusals)


@pytest.mark.parametrize(("fold", "example"), CASES, ids=IDS)
def test_the_argument_stays_to_the_bit(fold: Fold | Carrier, example: Example) -> None:
    model, x = lived_in(example.build()), torch.randn(example.shape)
    before, out, modules = bits(model), model(x), [type(m) for m in model.modules()]
    bnfix.fold(model, x)
    assert same_bits(model, before)
    assert torch.equal(model(x), out)
    assert [type(m) for m in model.modules()] == modules


@pytest.mark.parametrize(("fold", "example"), CASES, ids=IDS)
def test_a_second_run_changes_nothing(fold: Fold | Carrier, example: Example) -> None:
    model, x = lived_in(example.build()), torch.randn(example.shape)
    once = bnfix.fold(model, x).model
    assert once is not None
    twice = bnfix.fold(once, x)
    assert not twice.edits
    assert twice.model is not None
    assert same_bits(twice.model, bits(once))


@pytest.mark.parametrize(("fold", "example"), CASES, ids=IDS)
def test_in_place_is_the_same_and_dry_run_is_nothing(fold: Fold | Carrier, example: Example) -> None:
    model, x = lived_in(example.build()), torch.randn(example.shape)
    before = bits(model)
    planned = bnfix.fold(model, x, dry_run=True)
    assert planned.model is None
    assert same_bits(model, before)
    copied = bnfix.fold(model, x)
    assert [(e.site, e.after, e.gains) for e in planned.edits] == [(e.site, e.after, e.gains) for e in copied.edits]
    assert planned.refusals == copied.refusals
    result = bnfix.fold(model, x, inplace=True)
    assert result.model is model
    assert copied.model is not None
    assert same_bits(model, bits(copied.model))
