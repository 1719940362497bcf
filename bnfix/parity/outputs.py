"""The outputs of a model under names: nested tuples, lists, dicts and dataclasses become one flat table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def named_tensors(value: Any, name: str = "out") -> dict[str, Tensor]:
    """Every tensor in ``value`` under the expression a reader would write: ``out``, ``out[0]``, ``out['logits']``.

    The order is the order of the structure itself, which is the order in which exporters flatten it.
    None and everything that is no tensor is left out.
    """
    if isinstance(value, Tensor):
        return {name: value}
    found: dict[str, Tensor] = {}
    for key, item in _items(value):
        found.update(named_tensors(item, f"{name}{key}"))
    return found


def nesting(value: Any) -> str:
    """The structure of ``value`` in one line: ``{'logits': tensor, 'aux': (tensor, tensor)}``."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return "(" + ", ".join(nesting(v) for v in value) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, list):
        return "[" + ", ".join(nesting(v) for v in value) + "]"
    items = _items(value)
    if items:
        return "{" + ", ".join(f"{key.strip('[].')}: {nesting(v)}" for key, v in items) + "}"
    return type(value).__name__


def _items(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):  # before dataclasses: the outputs of transformers are both
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{key}", getattr(value, key)) for key in value._fields]
    if isinstance(value, (tuple, list)):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(f".{f.name}", getattr(value, f.name)) for f in fields(value)]
    return []
