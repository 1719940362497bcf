"""Norms that stay, as one multiply-add per channel: ``leave="affine"``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bnfix.graph import Binding, Surgeon, affine_in_place_of, all_or_nothing
from bnfix.stats import affine_of, round_once
from bnfix.types import Edit, Facts, NormFact, Refusal


def as_affines(facts: Facts, left: Sequence[Refusal], surgeon: Surgeon | None) -> tuple[Edit, ...]:
    """Put an affine in the place of each of these norms, all or nothing; what each was refused for stays in its edit.

    Without a surgeon nothing is changed: these are the edits that would be made.
    """
    binding: Binding = facts.binding
    known = {n.path: n for n in facts.norms}
    edits: list[Edit] = []
    for refusal in left:
        fact = known[refusal.site]
        edits.append(
            Edit(
                action="affine",
                site=fact.path,
                before=fact.summary,
                after=f"one multiply-add per channel (not folded: {refusal.reason})",
                calls=refusal.calls,
            )
        )
    if surgeon is None:
        return tuple(edits)
    with all_or_nothing(surgeon):
        for edit in edits:
            fact = known[edit.site]
            norm = binding.modules[fact.path]
            body = norm if surgeon.memo is None else surgeon.memo[id(norm)]
            exact = affine_of(*_state(facts, fact), _eps(facts, fact))
            dtype = binding.tensors[fact.tensors["running_var"]].dtype
            numbers = round_once(exact.scale, dtype), round_once(exact.shift, dtype)
            stand_in = affine_in_place_of(body, fact.after, *numbers)
            for slot in binding.owners.module_slots[id(norm)]:
                surgeon.put(slot, stand_in)
    return tuple(edits)


def affine_recipe(facts: Facts, edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """The entries by which a freshly built model gets its affines."""
    known = {n.path: n for n in facts.norms}
    return [
        {
            "norm": list(known[e.site].paths),
            "keep": list(known[e.site].after),
            "into": [],
            "affine": int(facts.binding.tensors[known[e.site].tensors["running_var"]].numel()),
        }
        for e in edits
        if e.action == "affine"
    ]


def _state(facts: Facts, fact: NormFact) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    given = {role: facts.binding.tensors[key].reshape(-1) for role, key in fact.tensors.items()}
    return given["running_mean"], given["running_var"], given.get("weight"), given.get("bias")


def _eps(facts: Facts, fact: NormFact) -> float:
    route, index = fact.calls[0]
    return float(facts.routes[route].ops[index].attrs["eps"])
