"""A model, and what its user has at hand, as evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bnfix.calibration.reading import Mask
from bnfix.errors import BnfixError, TraceError
from bnfix.evidence.measuring import measured, sample_of
from bnfix.graph import gather, norm_states
from bnfix.running import Call, as_call
from bnfix.running.call import Forward
from bnfix.types import DataEvidence, Evidence, Facts, Role

Say = Callable[[str], None]


def of_model(
    model: nn.Module,
    example: Any = None,
    *,
    data: Iterable[Any] | None = None,
    role: Role = "train",
    forward: Forward | None = None,
    mask: Mask = None,
    val_data: Iterable[Any] | None = None,
    max_samples: int | None = None,
    say: Say = lambda _line: None,
) -> Evidence:
    """Everything that can be known of ``model``; it is left as it was to the bit.

    Each loader is read once, and only in part. Without an ``example`` (or a list of them, for several signatures) the
    graph is that of the first batch.

    Raises:
        CalibrationError: the data raised, is empty, is ambiguous, or holds NaN or Inf; a forward failed on it.
    """
    say("reading the norms")
    norms = norm_states(model)
    sample, deployed = (
        None if d is None else sample_of(model, d, forward, mask, max_samples, say) for d in (data, val_data)
    )
    calls = _calls(example, forward) if example is not None else [] if sample is None else [sample.chunks[0].call]
    facts, missing = _facts(model, calls, say) if calls else (None, "")
    found: DataEvidence | None = None
    unmeasured = ""
    if sample is not None:
        try:
            found = measured(model, sample, role=role, forward=forward, deployed=deployed, progress=say)
        except TraceError as error:
            unmeasured = f"the norms can't be listened to: {error.message}"
    return Evidence(
        norms=norms,
        facts=facts,
        facts_missing=missing,
        data=found,
        data_missing=unmeasured,
        seen=found.seen if found is not None else (),
    )


def _calls(example: Any, forward: Forward | None) -> list[Call]:
    """Several examples in a list, or one."""
    return [as_call(e, forward) for e in (example if isinstance(example, list) else [example])]


def _facts(model: nn.Module, calls: list[Call], say: Say) -> tuple[Facts | None, str]:
    say("tracing the model")
    try:
        return gather(model, calls), ""
    except BnfixError as error:
        return None, f"the graph can't be had: {error.message}"
