"""What every value can do: become JSON, show itself; drawing is ``render``'s business and is reached lazily."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

SCHEMA_VERSION = 1
"""Of everything ``to_dict`` writes. Raised when a field changes its meaning or goes; not when one is added."""

NOT_IN_JSON = MappingProxyType({"json": False})


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: tuples as lists, non-finite numbers as the strings JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [f for f in dataclasses.fields(value) if f.metadata.get("json", True)]
        return {f.name: plain(getattr(value, f.name)) for f in shown}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return str(value)


class Value:
    """What every result can do: become JSON, show itself in a terminal, show itself in a notebook."""

    def to_dict(self) -> dict[str, Any]:
        """The whole value as JSON-able data, with ``schema_version`` and ``type`` beside its fields."""
        return {"schema_version": SCHEMA_VERSION, "type": type(self).__name__, **plain(self)}

    def __str__(self) -> str:
        return str(importlib.import_module("bnfix.render").to_text(self))

    def _repr_html_(self) -> str:
        return str(importlib.import_module("bnfix.render").to_html(self))

    def __rich__(self) -> Any:
        return importlib.import_module("bnfix.render").to_rich(self)
