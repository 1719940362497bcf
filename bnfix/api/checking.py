"""What is wrong with a model, with evidence."""

from __future__ import annotations

from collections.abc import Iterable
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
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Find what is wrong with the norms of ``model``: changes nothing, to the bit."""
    from bnfix import evidence, rules
    from bnfix.graph import unwrap

    check_model(model)
    model, _ = unwrap(model)
    gathered = evidence.of_model(model, example, data=data, role=role, forward=forward, say=progress or silent)
    return rules.judge(gathered, rules.Selection(tuple(select), tuple(ignore)))
