"""Random numbers in a forward: whether a run drew any, a run with others, and what depends on them."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SEED = 0x5EED
"""Of the second run; any number will do that is not where the generators happen to stand."""


def generators() -> dict[str, Any]:
    """The state of the process's generators on the CPU, as something that can be compared."""
    state: dict[str, Any] = {"torch": torch.get_rng_state().numpy().tobytes(), "random": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        _, keys, position, *_ = numpy.random.get_state()
        state["numpy"] = (keys.tobytes(), position)
    return state


@contextlib.contextmanager
def other_numbers() -> Iterator[None]:
    """All generators are at another place inside; who restores them is the caller's business."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(SEED)
    yield


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> set[str]:
    """The names under which the two do not hold the same bits (NaN are alike)."""
    return {n for n in {*one, *other} if n not in one or n not in other or not _same(one[n], other[n])}


def where_drawn(operations: Mapping[str, str], drew: Sequence[str]) -> str:
    """``operations`` holds those that draw, by module path; ``drew`` the generators that moved, where none was seen."""
    shown = [f"{op} at {path or '(root)'}" for path, op in operations.items()]
    more = f" and {len(shown) - 2} more" if len(shown) > 2 else ""
    source = "; ".join(shown[:2]) + more or f"from {' and '.join(drew)}"
    return f"the model draws random numbers in its forward ({source}): two runs of it differ"


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    equal = a == b
    return bool((equal | ((a != a) & (b != b))).all())
