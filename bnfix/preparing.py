"""What is known and planned of a model before anything is folded, and layers baked that compute their weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from bnfix import folding
from bnfix.folding import Plan
from bnfix.graph import Baked, Surgeon, bake, gather, transfer
from bnfix.running import Call
from bnfix.types import Edit, Facts


@dataclass(frozen=True)
class Prepared:
    """The model that is folded (the user's own, or a copy with plain layers), its facts, and the plan made of them."""

    model: nn.Module
    facts: Facts
    plan: Plan
    baked: Baked | None = field(default=None, repr=False)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What was baked."""
        return self.baked.edits if self.baked is not None else ()

    def recipe(self, folded: dict[str, Any]) -> dict[str, Any]:
        """``folded``, the recipe of the folds, with what was baked before."""
        if self.baked is None:
            return folded
        return {"version": 1, "edits": [], **folded, "baked": [layer.entry for layer in self.baked.layers]}

    def surgeon(self, model: nn.Module) -> Surgeon:
        """One for the user's own ``model``, in which what was baked is already in place; it can take that back."""
        surgeon = Surgeon()
        if self.baked is not None:
            surgeon.memo = transfer(model, self.baked, surgeon)
        return surgeon


def prepare(model: nn.Module, calls: Sequence[Call], more: Callable[[], Sequence[Call]] | None = None) -> Prepared:
    """Facts and plan of ``model``; where a norm could go into a layer but for its computed weight, that is baked.

    Only layers that take a norm up in the end are baked. ``more`` is asked for further calls where facts come from
    runs; all of them are in ``facts.binding.calls``.

    Raises:
        PassError, TraceError: as for ``gather``.
    """
    facts = gather(model, calls, more=more)
    calls = facts.binding.calls
    plan = folding.plan(facts)
    if not plan.computed or not calls:  # what a weight is computed to be shows in runs
        return Prepared(model, facts, plan)
    baked = bake(model, facts, calls, only=set(plan.computed.values()))
    paths = {path for layer in baked.layers for path in layer.paths}
    better, best = facts, plan
    while paths:
        better = gather(baked.model, calls)
        best = folding.plan(better)
        used = {t.holder for f in best.folds for t in f.targets} & paths
        if used == paths:
            break
        paths = used
        baked = bake(model, facts, calls, only=paths)
    if not paths:
        return Prepared(model, facts, _explained(plan, baked))
    return Prepared(baked.model, better, _explained(best, baked), baked)


def _explained(plan: Plan, baked: Baked) -> Plan:
    """The plan, whose refusals for computed weights say why these could not be baked either."""
    refusals = []
    for refusal in plan.refusals:
        why = baked.refusals.get(plan.computed.get(refusal.site, ""))
        refusals.append(replace(refusal, reason=f"{refusal.reason}: {why}") if why else refusal)
    return replace(plan, refusals=tuple(refusals))
