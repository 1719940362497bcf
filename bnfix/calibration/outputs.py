"""What a forward returned, kept: copies, since a model may return the same memory each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def kept_outputs(value: Any) -> list[Tensor]:
    """Copies of all floating tensors in ``value``, in order: those in nested containers and in records' attributes."""
    found = _tensors(value, set())
    return [t.detach().clone() for t in found if torch.is_floating_point(t) and t.numel()]


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(list(leaf.values()), seen)
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, nn.Module)) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _tensors(list(vars(leaf).values()), seen)
