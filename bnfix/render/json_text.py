"""JSON as a person can scroll it: indented, each list of numbers on one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_NOT_FINITE = ("nan", "inf", "-inf")


def dumped(value: Any) -> str:
    """``value`` (plain data, as ``to_dict`` gives it) as ASCII JSON with sorted keys.

    The statistics of a ResNet-50 are a quarter of a million numbers: one a line, nobody would find anything else.

    Raises:
        ValueError: a number is NaN or infinite (``bnfix.types.plain`` writes those as strings).
    """
    return _dumped(value, "\n")


def _dumped(value: Any, line: str) -> str:
    inner = f"{line}  "
    if isinstance(value, Mapping) and value:
        items = (f"{json.dumps(key)}: {_dumped(value[key], inner)}" for key in sorted(value))
        return f"{{{inner}{f',{inner}'.join(items)}{line}}}"
    if isinstance(value, (list, tuple)) and not _numbers(value):
        return f"[{inner}{f',{inner}'.join(_dumped(v, inner) for v in value)}{line}]"
    return json.dumps(value, allow_nan=False)


def _numbers(values: list[Any] | tuple[Any, ...]) -> bool:
    return all(isinstance(v, (int, float)) or v in _NOT_FINITE for v in values)
