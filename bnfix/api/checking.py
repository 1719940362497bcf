"""What is wrong with a model, with evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from bnfix.api.asked import Progress, check_model, silent

if TYPE_CHECKING:
    from torch import nn

    from bnfix.running.call import Forward
    from bnfix.types import Diagnosis


def check(
    model: nn.Module,
    example: Any = None,
    *,
    data: Iterable[Any] | None = None,
    role: Literal["train", "val"] = "train",
    val_data: Iterable[Any] | None = None,
    mask: str | Callable[[Any], Any] | None = None,
    max_samples: int | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Find what is wrong with the norms of ``model``: changes nothing, to the bit.

    Args:
        model: in any mode.
        example: an input, for the rules that look at the graph; default: the first batch of ``data``.
        data: what a training loop iterates over, in its own batches. It is read once, and only in part.
        role: what ``data`` is. Batches are judged (their size, their order, their tail) where it is for training.
        val_data: data of deployment; does it fit the statistics?
        mask: for padded positions: a key of the batch, or a function of it, that gives a boolean tensor
            (N, positions …), True where a position counts.
        max_samples: how many samples are measured at most; default 2,048, fewer of large ones.
        select: codes of rules, or their beginnings; default: all but the optional ones.
        ignore: codes that are left out.
        forward: ``forward(model, batch)`` where the model isn't simply called with the batch.
        progress: called with a line before each step.

    Raises:
        CalibrationError: the data raised, is empty, is ambiguous, or holds NaN or Inf; a forward failed on it.
        TypeError, ValueError: wrong arguments.
    """
    from bnfix import evidence, rules
    from bnfix.graph import unwrap

    check_model(model)
    if role not in ("train", "val"):
        raise ValueError(f"role is 'train' or 'val', not {role!r}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is at least 1, not {max_samples}")
    model, _ = unwrap(model)
    gathered = evidence.of_model(
        model,
        example,
        data=data,
        role=role,
        forward=forward,
        mask=mask,
        val_data=val_data,
        max_samples=max_samples,
        say=progress or silent,
    )
    return rules.judge(gathered, rules.Selection(tuple(select), tuple(ignore)))
