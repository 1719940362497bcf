"""Proof of a fold without data: every stored number, and the operations of the traced result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnfix.folding.engine import Folded
from bnfix.folding.exact import Link, exact
from bnfix.folding.planner import Target
from bnfix.graph import Binding
from bnfix.stats import round_once, ulp
from bnfix.types import Facts, Op, Route

ULP_LIMIT = 0.5
"""Rounded once, a number is within half a unit in the last place of the exact one."""


def weight_errors(facts: Facts, folded: Folded, after: Facts) -> dict[str, float]:
    """For each folded norm the largest distance of a stored weight or bias from its exact value, in ulp.

    The exact values come from torch's own float64 ``batch_norm`` kernel applied to the weights, not from the
    algebra that is being checked. Its own rounding (a few units of 2⁻⁵³ of the terms that are added) is
    taken off, so that a bias that nearly cancels is judged by what it is, not by the checker's digits.

    Args:
        facts: of the model before.
        folded: what was planned and computed.
        after: facts of the folded model: what it really holds, under the same names.
    """
    errors: dict[str, float] = {}
    binding: Binding = facts.binding
    chains: dict[tuple[int, int | None, str], list[Link]] = {}
    for planned in folded.folds:
        for target in planned.targets:
            chains.setdefault((target.weight, target.bias, target.holder), []).append((planned, target))
    for chain in chains.values():
        layer = chain[0][1]
        weight, bias, slack = exact(binding, chain)
        found_weight = _stored(facts, after, layer, layer.weight)
        found_bias = _stored(facts, after, layer, layer.bias)
        worst = max(_ulps(found_weight, weight, torch.zeros(())), _ulps(found_bias, bias, slack))
        for planned, _ in chain:
            errors[planned.norm.path] = max(errors.get(planned.norm.path, 0.0), worst)
    return errors


def ulp_limit(dtype: torch.dtype) -> float:
    """½ for what is rounded from float64; a float64 layer is computed in its own precision, four roundings a norm."""
    return 8.0 if dtype == torch.float64 else ULP_LIMIT + 1e-6  # the two ways to the exact value differ by 2⁻²⁸ ulp


def worst_weight(facts: Facts, folded: Folded, errors: Mapping[str, float]) -> str | None:
    """The first fold whose numbers are not the exact ones, rounded; None where all are."""
    for planned in folded.folds:
        error = errors[planned.norm.path]
        limit = max(ulp_limit(facts.binding.tensors[t.weight].dtype) for t in planned.targets)
        if not error <= limit:
            where = planned.targets[0].holder
            return f"a stored number of {where} is {error:.3g} ulp from its exact value (limit {limit:.3g})"
    return None


def structure_differs(before: Facts, after: Facts, folded: Folded) -> str | None:
    """Where the folded model, traced again, does anything else than the original without the folded norms.

    None if each route has the same operations in the same order on values of the same shape, each layer
    reads the weights it is meant to read, and each layer that took up a norm has a bias.
    """
    gone = {place for f in folded.folds for place in f.norm.calls}
    targets = [t for f in folded.folds for t in f.targets]
    for r, (old, new) in enumerate(zip(before.routes, after.routes, strict=True)):
        expected = [op for op in _computed(old) if (r, op.index) not in gone]
        found = _computed(new)
        for left, right in zip(expected, found, strict=False):
            reason = _op_differs(left, right, before, after, targets, near=before.source == "observed")
            if reason:
                return f"{right.site}: {reason}"
        if len(expected) != len(found):
            return f"the forward on {new.signature} has {len(found)} operations where {len(expected)} were expected"
    return None


def _computed(route: Route) -> list[Op]:
    """The operations without inputs and constants, which export lists in an order of its own."""
    return [op for op in route.ops if op.kind not in ("input", "constant")]


def isolate(items: Sequence[Any], works: Callable[[Sequence[Any]], bool], attempts: int = 60) -> list[Any]:
    """The largest part of ``items`` found by halving for which ``works`` holds; the rest is at fault, or wasn't tried.

    ``works`` holds for no items at all, and is called about 2·log₂(n) times for each item at fault, at most
    ``attempts`` times. What it accepts was accepted as a whole.
    """
    good: list[Any] = []
    pending = [list(items)]
    while pending and attempts:
        part = pending.pop(0)
        attempts -= 1
        if works([*good, *part]):
            good += part
        elif len(part) > 1:
            middle = len(part) // 2
            pending[:0] = [part[:middle], part[middle:]]
    return good


def _stored(before: Facts, after: Facts, target: Target, key: int | None) -> Tensor:
    """The tensor that the folded model holds where the original held ``key`` in the target's module."""
    attribute = "bias"
    if key is not None:
        names = before.tensors[key].owners
        at_holder = [n for n in names if n.rpartition(".")[0] == target.holder]
        attribute = (at_holder or list(names))[0].rpartition(".")[2]
    path = f"{target.holder}.{attribute}".lstrip(".")
    for fact in after.tensors.values():
        if path in fact.owners:
            tensor: Tensor = after.binding.tensors[fact.key]
            return tensor
    return torch.empty(0)


def _same_settings(left: Op, right: Op, *, near: bool) -> bool:
    """The same constants; ``near``: those that came from the data (``tolist``) may move in their last bits."""
    one, two = sorted(left.attrs.items()), sorted(right.attrs.items())
    if repr(one) == repr(two):  # as text: NaN is NaN
        return True
    return near and [n for n, _ in one] == [n for n, _ in two] and all(map(_close, one, two))


def _close(one: tuple[str, Any], two: tuple[str, Any]) -> bool:
    a, b = one[1], two[1]
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-2)
    return repr(a) == repr(b)


def _ulps(stored: Tensor, exact: Tensor, slack: Tensor) -> float:
    """The largest distance in ulp; ½, unmeasured, where each number is the exact one correctly rounded."""
    stored = stored.detach().cpu()
    if stored.shape != exact.shape:
        return float("inf")
    wrong = stored != round_once(exact, stored.dtype)
    if not bool(wrong.any()):
        return ULP_LIMIT
    value = exact[wrong]
    distance = ((stored[wrong].double() - value).abs() - slack.expand_as(exact)[wrong]).clamp(min=0)
    worst = (distance / ulp(value, stored.dtype)).max().item()
    return float("inf") if worst != worst else max(worst, ULP_LIMIT)


def _op_differs(
    left: Op, right: Op, before: Facts, after: Facts, targets: Sequence[Target], *, near: bool = False
) -> str | None:
    if (left.kind, left.target, left.shape, left.dtype) != (right.kind, right.target, right.shape, right.dtype):
        return f"{right.target} where {left.target} was expected"
    if not _same_settings(left, right, near=near and left.kind == "other"):
        return f"{right.target} runs with other settings than before"
    mine = [t for t in targets if t.weight == left.tensors.get("weight")]
    gained = set(right.tensors) - set(left.tensors)
    if set(left.tensors) - set(right.tensors) or gained - ({"bias"} if mine else set()):
        return f"{right.target} reads other tensors than before"
    for role, key in left.tensors.items():
        names = set(before.tensors[key].owners)
        if mine and role in ("weight", "bias"):  # what was written must be what is read, not another name of it
            names = {n for n in names if n.rpartition(".")[0] in {t.holder for t in mine}} or names
        if not names & set(after.tensors[right.tensors[role]].owners):
            return f"{right.target} reads another {role} than before"
    if mine and "bias" not in right.tensors:
        return f"{right.site} does not use the bias it was given"
    return None
