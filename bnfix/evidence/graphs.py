"""The graph of a model as evidence: in evaluation mode, and what is different in training mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from bnfix.errors import BnfixError, PassError
from bnfix.graph import copy_model, feeder_norms, gather, no_footprints, training_facts
from bnfix.running import Call, preserved
from bnfix.types import Evidence, NormState


def with_graph(
    evidence: Evidence, model: nn.Module, calls: Sequence[Call], say: Callable[[str], None], *, given: bool
) -> Evidence:
    """``evidence`` with the facts of ``model`` on ``calls``, or with the reason why they can't be had.

    Private copies are traced, one in evaluation mode and one in training mode, whatever mode ``model`` is in.

    Raises:
        PassError: the model's forward fails on a call that the user has ``given``.
    """
    say(f"tracing {', '.join(c.signature for c in calls)}")
    with preserved(model), no_footprints(model, *(c.forward for c in calls)):
        try:
            evaluated = copy_model(model)[0].eval() if any(m.training for m in model.modules()) else model
            facts = gather(evaluated, calls)
        except BnfixError as error:
            if given and isinstance(error, PassError):  # a verdict would hide that nothing was looked at
                raise
            return replace(evidence, facts_missing=f"the graph can't be had: {error.message}")
        sizes = feeder_norms(facts)
        facts_training, why = training_facts(model, calls)
    return replace(
        evidence,
        facts=facts,
        facts_training=facts_training,
        training_missing=why,
        norms=_with_feeders(evidence.norms, sizes),
        notes=(*evidence.notes, *facts.notes),
    )


def _with_feeders(norms: tuple[NormState, ...] | None, sizes: Mapping[str, Any]) -> tuple[NormState, ...] | None:
    if norms is None:
        return None
    found = ((n, next((sizes[p] for p in n.paths if p in sizes), None)) for n in norms)
    return tuple(n if size is None else replace(n, feeder=size) for n, size in found)
