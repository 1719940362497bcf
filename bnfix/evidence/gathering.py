"""A model, and what its user has at hand, as evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from bnfix.errors import BnfixError
from bnfix.evidence.graphs import with_graph
from bnfix.graph import norm_states
from bnfix.running import Call, as_call, batch_call
from bnfix.types import Evidence

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
    """Everything that can be known of ``model``; it is left as it was to the bit.

    Args:
        example: what the model is called with, or a list of that for several signatures. Without one the first batch
            of ``data`` is it; without both there is no graph.
        data: what a training (``role``: or validation) loop iterates over.
        forward: how a batch is fed to the model, if not by calling it.
    """
    say("reading the norms")
    found = Evidence(norms=norm_states(model))
    calls: list[Call] = []
    if example is not None:
        calls = [as_call(e, forward) for e in (example if isinstance(example, list) else [example])]
    elif data is not None:
        batch = next(iter(data), None)
        try:
            calls = [] if batch is None else [batch_call(batch, model, forward)]
        except BnfixError as error:
            found = replace(found, facts_missing=f"the graph can't be had: {error.message}")
    return with_graph(found, model, calls, say) if calls else found
