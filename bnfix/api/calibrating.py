"""Statistics of a model, estimated anew."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from bnfix.api.asked import Progress

if TYPE_CHECKING:
    from torch import nn

    from bnfix.running.call import Forward
    from bnfix.types import Recalibration

Method = Literal["auto", "staged", "population", "online"]
Certify = Literal["replay", "full"]


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    method: Method = "auto",
    when: Literal["always", "needed"] = "always",
    forward: Forward | None = None,
    select: str | Iterable[str] | Callable[[str, nn.Module], bool] | None = None,
    include_frozen: bool = False,
    mask: str | Callable[[Any], Any] | None = None,
    max_samples: int | None = None,
    tol: float | None = None,
    certify: Certify | None = "replay",
    memory_budget: int | str | None = None,
    spill_dir: str | os.PathLike[str] | None = None,
    unbiased: bool = True,
    group: Any = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Recalibration:
    """Set the running statistics of every norm of ``model`` to those of ``data``: in place, all or nothing.

    Afterwards they are mean and variance of each norm's input when the model runs in evaluation mode over the same
    data (the fixed point). Also called precise BN, BN re-estimation, update_bn.
    """
    raise NotImplementedError
