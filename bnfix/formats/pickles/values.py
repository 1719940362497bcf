"""What a pickle is made of, as its symbolic execution sees it: plain values, and these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Global:
    """An importable name, as the pickle spells it."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Table:
    """A dict, or something that acts as one. Keys that are no plain constants are counted, not kept."""

    entries: dict[Any, Any] = field(default_factory=dict)
    odd: list[Any] = field(default_factory=list)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, (str, int, float, bytes, type(None))):
            self.entries[key] = value
        else:
            self.odd.append((key, value))

    def get(self, key: Any) -> Any:
        return self.entries.get(key)


@dataclass(eq=False, slots=True)
class Object:
    """What a call of ``made_by(*args)`` would have returned, with what was then put into it."""

    made_by: Any
    args: tuple[Any, ...] = ()
    state: Any = None
    table: Table | None = None
    items: list[Any] | None = None


@dataclass(frozen=True, slots=True)
class Persistent:
    """A reference to something outside the pickle: in torch's files a storage."""

    id: Any
