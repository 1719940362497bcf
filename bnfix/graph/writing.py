"""Values written into tensors that somebody else holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor


def put(tensor: Tensor, value: Tensor) -> None:
    """Write ``value`` into a tensor, also into one that was made in inference mode."""
    kind = tensor.is_inference()
    with torch.no_grad(), torch.inference_mode(kind) if kind != torch.is_inference_mode_enabled() else nullcontext():
        tensor.copy_(value)


def put_back(kept: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give each tensor the value that was kept of it, where it has another one."""
    for tensor, value in kept:
        if not torch.equal(tensor, value):  # NaN compares unequal and is written again: the same bits
            put(tensor, value)


def surely(restore: Callable[[], None]) -> None:
    """Run ``restore``, which may be run twice, to its end, also where an interrupt hits it; that is raised then.

    A second Ctrl-C comes while the first is dealt with; and a DataLoader whose worker was killed raises wherever its
    process happens to be.
    """
    try:
        restore()
    except BaseException:
        restore()
        raise
