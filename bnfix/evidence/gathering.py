"""A model, and what its user has at hand, as evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bnfix.errors import BnfixError
from bnfix.graph import gather, norm_states
from bnfix.running import as_call, batch_call
from bnfix.types import Evidence, Facts

Say = Callable[[str], None]


def of_model(
    model: nn.Module,
    example: Any = None,
    *,
    data: Iterable[Any] | None = None,
    role: str = "train",
    forward: Any = None,
    say: Say = lambda _line: None,
) -> Evidence:
    """Everything that can be known of ``model``; it is left as it was to the bit."""
    say("reading the norms")
    norms = norm_states(model)
    facts: Facts | None = None
    missing = ""
    if example is not None:
        say("tracing the model")
        try:
            facts = gather(model, [as_call(example, forward)])
        except BnfixError as error:
            missing = f"the graph can't be had: {error.message}"
    elif data is not None:
        batch = next(iter(data), None)
        if batch is not None:
            try:
                facts = gather(model, [batch_call(batch, model, forward)])
            except BnfixError as error:
                missing = f"the graph can't be had: {error.message}"
    return Evidence(norms=norms, facts=facts, facts_missing=missing)
