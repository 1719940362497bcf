"""The samples that calibration looks at: read once, and put into one call where that changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bnfix.errors import CalibrationError, PassError, one_line
from bnfix.running import FAILURES, Call, Footprint, bind, check_finite, free_bytes, join, size, split
from bnfix.running.call import Forward, home
from bnfix.swaps.survey import evaluating

SHARE = 4
"""One part in so many of the free memory is used."""


@dataclass(frozen=True)
class Read:
    """What was read of the data: ``raw`` as the loader gave it, the calls, how many samples, how a batch was used."""

    raw: list[Any]
    calls: list[Call]
    samples: int
    used: str

    @property
    def first(self) -> Call:
        """The first call: the example where none was given."""
        return self.calls[0]


def read(data: Iterable[Any], model: nn.Module, forward: Forward | None, most: int) -> Read:
    """The first batches of ``data``, until ``most`` samples are there; the last one is cut if it can be.

    Raises:
        CalibrationError: the data raises, is empty, or holds NaN or Inf.
        PassError: a batch does not fit the forward.
    """
    raw: list[Any] = []
    calls: list[Call] = []
    count, used = 0, ""
    batches = iter(data)
    while count < most:
        try:
            batch = next(batches)
        except StopIteration:
            break
        except Exception as error:  # whatever a user's loader raises
            raise CalibrationError(f"batch {len(raw)} of the data raised {one_line(error)}") from error
        bound = bind(batch, model, forward)
        call = bound.call
        where = check_finite(call)
        if where is not None:
            raise CalibrationError(f"batch {len(raw)}, {where}: NaN or Inf")
        number = size(call)
        if number is not None and number > most - count:
            call, number = split(call, [most - count])[0], most - count
        raw.append(batch)
        calls.append(call)
        used = used or bound.used
        count += number if number is not None else _leading(call)
    if not calls:
        raise CalibrationError("the data holds no batch")
    return Read(raw, calls, count, used)


def _leading(call: Call) -> int:
    """The samples of a call that can't be cut, by the first axis of its first tensor."""
    return next((t.shape[0] for t in call.tensors() if t.dim()), 1)


def budget_of(model: nn.Module) -> int:
    """Bytes that activations may take."""
    like = home(model)
    return max(1 << 26, free_bytes(torch.device("cpu") if like is None else like.device) // SHARE)


def fitting(calls: list[Call], model: nn.Module, budget: int) -> list[Call]:
    """As many of ``calls`` as a forward of all of them at once has room for; the first one at least.

    ``model`` is a private copy; it runs on the first call.
    """
    first = size(calls[0])
    if first is None or len(calls) == 1:
        return calls
    tensors = [*model.parameters(), *model.buffers(), *calls[0].tensors()]
    try:
        with Footprint(tensors) as held, evaluating(model):
            calls[0].run(model)
    except FAILURES as error:
        raise PassError(f"the forward failed on {calls[0].signature}: {one_line(error)}") from error
    room = max(first, budget // max(1, held.peak // first))
    kept: list[Call] = []
    for call in calls:
        number = size(call)
        if number is None or number > room:
            break
        kept.append(call)
        room -= number
    return kept or calls[:1]


def counted(calls: list[Call]) -> str:
    """How much that is, for a reader: samples where they can be told apart."""
    sizes = [size(call) for call in calls]
    known = [s for s in sizes if s is not None]
    number, what = (sum(known), "sample") if len(known) == len(sizes) else (len(calls), "batch")
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}{'es' if what == 'batch' else 's'}"


def joined(calls: list[Call]) -> Call | None:
    """All samples in one call; None where they can't be put together."""
    return calls[0] if len(calls) == 1 else join(calls)
