"""What looks like a fault, and is meant: a table of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bnfix.types import Diagnosis


@dataclass(frozen=True)
class Oddity:
    """``show()`` runs it and returns what bnfix says; neither errors nor warnings are right."""

    name: str
    show: Callable[[], Diagnosis]


ODDITIES: list[Oddity] = []
"""All of them, filled as the modules are imported."""


def oddity(show: Callable[[], Diagnosis]) -> Callable[[], Diagnosis]:
    """Adds one to the table, under the name of its function."""
    ODDITIES.append(Oddity(show.__name__, show))
    return show
