"""A model, and what its user has at hand, as evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from bnfix.calibration.reading import Mask
from bnfix.errors import TraceError
from bnfix.evidence.graphs import with_graph
from bnfix.evidence.loading import Sample
from bnfix.evidence.measuring import measured, sample_of
from bnfix.graph import norm_states
from bnfix.running import Call, as_call
from bnfix.running.call import Forward
from bnfix.types import DataEvidence, Evidence, Role

Say = Callable[[str], None]


def of_model(
    model: nn.Module,
    example: Any = None,
    *,
    data: Iterable[Any] | Sample | None = None,
    role: Role = "train",
    forward: Forward | None = None,
    mask: Mask = None,
    val_data: Iterable[Any] | None = None,
    max_samples: int | None = None,
    say: Say = lambda _line: None,
) -> Evidence:
    """Everything that can be known of ``model``; it is left as it was to the bit.

    Args:
        example: what the model is called with, or a list of that for several signatures. Without one the first batch
            of ``data`` is it; without both there is no graph.
        data: what a training (``role``: or validation) loop iterates over; read once, and only in part. Or what was
            read of it already.
        forward: how a batch is fed to the model, if not by calling it.
        mask: for padded positions, as for ``recalibrate``.
        val_data: data of deployment.
        max_samples: how many samples are measured at most.

    Raises:
        PassError: the forward failed on the example.
        CalibrationError: the data raised, is empty, is ambiguous, or holds NaN or Inf; a forward failed on it.
    """
    say("reading the norms")
    base = Evidence(norms=norm_states(model))
    sample, deployed = (
        d if d is None or isinstance(d, Sample) else sample_of(model, d, forward, mask, max_samples, say)
        for d in (data, val_data)
    )
    calls: list[Call] = []
    if example is not None:
        calls = [as_call(e, forward) for e in (example if isinstance(example, list) else [example])]
    elif sample is not None:
        calls = [sample.chunks[0].call]
    base = with_graph(base, model, calls, say, given=example is not None) if calls else base
    if sample is None:
        return base
    found: DataEvidence | None = None
    unmeasured = ""
    try:
        found = measured(model, sample, role=role, forward=forward, deployed=deployed, progress=say)
    except TraceError as error:
        unmeasured = f"the norms can't be listened to: {error.message}"
    return replace(base, data=found, data_missing=unmeasured, seen=found.seen if found is not None else ())
