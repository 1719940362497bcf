"""A plan becomes numbers in float64, rounded once, and then a changed model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import TraceError
from bnfix.folding.leftovers import affine_recipe
from bnfix.folding.planner import PlannedFold, Target
from bnfix.graph import Binding, Slot, Surgeon, all_or_nothing, as_parameter, placeholder
from bnfix.stats import Affine, affine_of, round_once
from bnfix.types import Edit, Facts, Refusal

BiasName = tuple["int | None", str]
"""A bias by its key and holder; the key is None for one that the layer doesn't have yet."""


@dataclass
class Folded:
    """The numbers of a plan: ``exact`` in float64 as computed, ``stored`` as they are put into the model.

    ``folds`` are those of the plan that have good numbers, ``refusals`` the others.
    """

    folds: tuple[PlannedFold, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    weights: dict[int, Tensor] = field(default_factory=dict)
    biases: dict[BiasName, Tensor] = field(default_factory=dict)


def compute(facts: Facts, folds: Sequence[PlannedFold]) -> Folded:
    """Apply the algebra of each fold in turn, in float64, and round once at the end.

    A fold whose numbers don't fit the dtype of the layer (not finite, or too small to be stored) is
    refused, together with those that build on it.
    """
    result = Folded()
    kept: list[PlannedFold] = []
    refusals: list[Refusal] = []
    weights: dict[int, Tensor] = {}
    biases: dict[BiasName, Tensor] = {}
    for planned in folds:
        missing = planned.requires - {k.norm.path for k in kept}
        if missing:
            refusals.append(planned.refused(f"it follows {', '.join(sorted(missing))}, which stays"))
            continue
        new_weights, new_biases = _fold_one(facts.binding, planned, weights, biases)
        reason = _unfit(facts, planned, new_weights, new_biases)
        if reason:
            refusals.append(planned.refused(reason))
            continue
        weights.update(new_weights)
        biases.update(new_biases)
        kept.append(planned)
    dtype_of = {n: _dtype(facts.binding, t) for f in kept for t in f.targets for n in ((t.bias, t.holder),)}
    result.folds, result.refusals = tuple(kept), tuple(refusals)
    result.weights = {k: round_once(v, facts.binding.tensors[k].dtype) for k, v in weights.items()}
    result.biases = {n: round_once(v, dtype_of[n]) for n, v in biases.items()}
    return result


def operate(facts: Facts, folded: Folded, surgeon: Surgeon) -> tuple[Edit, ...]:
    """Write the numbers into the surgeon's model and take the norms out. All or nothing."""
    binding: Binding = facts.binding
    with all_or_nothing(surgeon):
        for key, value in folded.weights.items():
            holders = {t.holder for f in folded.folds for t in f.targets if t.weight == key}
            _put(surgeon, binding, key, holders, value)
        for (bias, holder), value in folded.biases.items():
            if bias is not None:
                _put(surgeon, binding, bias, {holder}, value)
        for holder in [holder for bias, holder in folded.biases if bias is None]:
            _give_bias(surgeon, binding, holder, folded.biases[None, holder])
        for planned in folded.folds:
            norm = binding.modules[planned.norm.path]
            body = norm if surgeon.memo is None else surgeon.memo[id(norm)]
            stand_in = placeholder(body, planned.norm.after)
            for slot in binding.owners.module_slots[id(norm)]:
                surgeon.put(slot, stand_in)
    return edits(folded)


def edits(folded: Folded) -> tuple[Edit, ...]:
    """What these folds change, for a reader; a bias that two norms share is gained once."""
    made: list[Edit] = []
    given: set[str] = set()
    for planned in folded.folds:
        new = [f"{t.holder}.bias".lstrip(".") for t in planned.targets if t.bias is None]
        gains = tuple(dict.fromkeys(name for name in new if name not in given))
        given.update(gains)
        made.append(_edit(planned, gains))
    return tuple(made)


def recipe(facts: Facts, folded: Folded, made: Sequence[Edit] = ()) -> dict[str, Any]:
    """What brings a freshly built model into the form that the folded state_dict fits, affines of ``made`` included."""
    edits: list[dict[str, Any]] = []
    for planned in folded.folds:
        into = [
            {
                "module": t.holder,
                "weight": facts.tensors[t.weight].owners[0].rpartition(".")[2],
                "bias": t.bias is None,
                "channels": int(folded.biases[t.bias, t.holder].numel()),
            }
            for t in planned.targets
        ]
        edits.append({"norm": list(planned.norm.paths), "keep": list(planned.norm.after), "into": into})
    edits += affine_recipe(facts, made)
    return {"version": 1, "edits": edits} if edits else {}


def norm_affine(binding: Binding, planned: PlannedFold) -> Affine:
    """The norm's map, from the model's own tensors and the eps of the call."""
    state: Mapping[str, Tensor] = {r: binding.tensors[key].reshape(-1) for r, key in planned.norm.tensors.items()}
    return affine_of(
        state["running_mean"], state["running_var"], state.get("weight"), state.get("bias"), planned.op.attrs["eps"]
    )


def bias_slot(binding: Binding, holder: str) -> Slot | None:
    """Where a layer without a bias would take one: its attribute ``bias`` that is None."""
    module = binding.owners.module_at(holder)
    if module is None or not hasattr(module, "bias") or module.bias is not None:
        return None
    return Slot(module, "bias", f"{holder}.bias".lstrip("."))


def lane_affine(affine: Affine, target: Target) -> Affine:
    """The norm's map on the layer's own channels: 1 and 0 where none of its are, no shift where that goes elsewhere."""
    lanes = torch.tensor(target.lanes, device=affine.scale.device)
    mine = lanes >= 0
    scale = torch.where(mine, affine.scale[lanes.clamp(min=0)], 1.0)
    shift = torch.where(mine & target.shift, affine.shift[lanes.clamp(min=0)], 0.0)
    return Affine(scale, shift)


def _fold_one(
    binding: Binding, planned: PlannedFold, weights: Mapping[int, Tensor], biases: Mapping[BiasName, Tensor]
) -> tuple[dict[int, Tensor], dict[BiasName, Tensor]]:
    new_weights: dict[int, Tensor] = {}
    new_biases: dict[BiasName, Tensor] = {}
    for target in planned.targets:
        weight = weights.get(target.weight)
        before = binding.tensors[target.weight].detach().double() if weight is None else weight
        device_affine = lane_affine(norm_affine(binding, planned), target)
        affine = Affine(device_affine.scale.to(before.device), device_affine.shift.to(before.device))
        new_weights[target.weight] = target.fold.weight(before, affine, target.op)
        bias = biases.get((target.bias, target.holder))
        if bias is None and target.bias is not None:
            bias = binding.tensors[target.bias].detach().double()
        new_biases[target.bias, target.holder] = target.fold.bias(bias, before, affine, target.op)
    return new_weights, new_biases


def _unfit(
    facts: Facts, planned: PlannedFold, weights: Mapping[int, Tensor], biases: Mapping[BiasName, Tensor]
) -> str | None:
    """Why these numbers must not be stored: they wouldn't be themselves any more."""
    for target in planned.targets:
        before, after = facts.binding.tensors[target.weight], weights[target.weight]
        if not before.is_floating_point():
            return f"{target.holder} has weights of {before.dtype}"
        if target.bias is None and bias_slot(facts.binding, target.holder) is None:
            return f"{target.op.site} has no bias, and {target.holder or 'the model'} has no place for one"
        reason = _unfit_numbers(target, after, biases[target.bias, target.holder], before.dtype)
        if reason:
            return reason
    return None


def _unfit_numbers(target: Target, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> str | None:
    info = torch.finfo(dtype)
    seen = target.fold.channels(weight, target.op)
    largest = torch.linalg.vector_norm(seen, ord=torch.inf, dim=tuple(range(2, seen.dim())))
    for what, values in (("weight", largest), ("bias", bias)):
        if not bool(torch.isfinite(values).all()):
            return f"its statistics or weights aren't finite: the folded {what} of {target.holder} would be NaN or Inf"
        worst = values.abs().max().item() if values.numel() else 0.0
        if worst > info.max:
            return f"the folded {what} of {target.holder} reaches {worst:.3g}, more than {dtype} holds"
    # A dead channel may well end up below the normal numbers; one that counts beside the others must not.
    counts = largest > largest.max() * info.eps**2
    if bool((counts & (largest < info.smallest_normal)).any()):
        return f"the folded weight of {target.holder} would be subnormal in {dtype} and lose its digits"
    return None


def _put(surgeon: Surgeon, binding: Binding, key: int, holders: Iterable[str], value: Tensor) -> None:
    slots = binding.slots(key)
    modules = {id(m) for h in holders if (m := binding.owners.module_at(h)) is not None}
    chosen = [s for s in slots if id(s.container) in modules] or slots
    made = as_parameter(value, binding.tensors[key])
    for slot in _distinct(chosen):
        surgeon.put(slot, made)


def _distinct(slots: Iterable[Slot]) -> list[Slot]:
    """A module under two names shows its tensors twice, in one and the same place."""
    return list({(id(s.container), s.key): s for s in slots}.values())


def _give_bias(surgeon: Surgeon, binding: Binding, holder: str, value: Tensor) -> None:
    slot = bias_slot(binding, holder)
    if slot is None:
        raise TraceError(f"{holder} has no place for a bias")
    trained = any(p.requires_grad for p in slot.container.parameters(recurse=False))
    surgeon.register(slot, nn.Parameter(value.clone(), requires_grad=trained))


def _edit(planned: PlannedFold, gains: tuple[str, ...]) -> Edit:
    into = tuple(dict.fromkeys(t.holder for t in planned.targets))
    kept = f", then {', '.join(planned.norm.after)}" if planned.norm.after else ""
    gained = " (gains a bias)" if gains else ""
    return Edit(
        action="fold forward" if planned.forward else "fold",
        site=planned.norm.path,
        before=planned.norm.summary,
        after=f"folded {'forward ' if planned.forward else ''}into {', '.join(into)}{gained}{kept}",
        calls=planned.calls,
        into=into,
        gains=gains,
    )


def _dtype(binding: Binding, target: Target) -> torch.dtype:
    return binding.tensors[target.weight if target.bias is None else target.bias].dtype
