"""A model, and what its user has at hand, as evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bnfix.calibration.reading import Mask
from bnfix.errors import BnfixError, TraceError
from bnfix.evidence.loading import Sample
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

    Each loader is read once, and only in part; without an ``example`` the graph is that of its first batch.

    Raises:
        CalibrationError: the data raised, is empty, is ambiguous, or holds NaN or Inf; a forward failed on it.
    """
    say("reading the norms")
    norms = norm_states(model)
    sample, deployed = (
        None if d is None else sample_of(model, d, forward, mask, max_samples, say) for d in (data, val_data)
    )
    call = as_call(example, forward) if example is not None else _first(sample)
    facts, missing = (None, "") if call is None else _facts(model, call, say)
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


def _first(sample: Sample | None) -> Call | None:
    return None if sample is None else sample.chunks[0].call


def _facts(model: nn.Module, call: Call, say: Say) -> tuple[Facts | None, str]:
    say("tracing the model")
    try:
        return gather(model, [call]), ""
    except BnfixError as error:
        return None, f"the graph can't be had: {error.message}"
