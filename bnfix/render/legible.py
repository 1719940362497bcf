"""Names come from files, and files from anywhere: what a terminal would obey is shown, not sent."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")

# Control characters but for the line break, what reorders text (bidi), and lone surrogates of undecodable file names.
_OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def legible(text: str) -> str:
    r"""``text`` with everything that is no character to be seen written out, such as ``\x1b``."""
    return _OBEYED.sub(lambda m: m.group().encode("unicode_escape").decode("ascii"), text)


def all_legible(value: T) -> T:
    """A value of ``bnfix.render.page`` with every text in it legible."""
    return _legible(value)  # type: ignore[no-any-return]


def _legible(value: Any) -> Any:
    if isinstance(value, str):
        return legible(value)
    if isinstance(value, tuple):
        return tuple(_legible(v) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _legible(getattr(value, f.name)) for f in fields(value)})
    return value
