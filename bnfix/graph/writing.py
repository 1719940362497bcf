"""Values written into tensors that somebody else holds."""

from __future__ import annotations

from collections.abc import Iterable
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
