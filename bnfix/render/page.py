"""What a reader is shown, before it is drawn: one table, one verdict, notes, and what to type next.

A value becomes a :class:`Page` once (``pages/``, one file a kind of value); each output format draws
pages and knows nothing of values. Text is plain: no markup, no escapes, no colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["done", "kept", "failed", "unsure", "plain"]


@dataclass(frozen=True)
class Column:
    """``path`` breaks at dots, ``number`` is set right and never breaks, ``extra`` goes first where room is short."""

    title: str
    kind: Literal["path", "text", "number", "extra"] = "text"


@dataclass(frozen=True)
class Row:
    """One row of a table; ``state`` gives it a mark and a colour."""

    state: State
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """One fact by itself, for ``grep`` and for annotations."""

    state: State
    site: str
    text: str


@dataclass(frozen=True)
class Page:
    """A value as it is read.

    ``rows`` may run alike rows together; ``lines`` holds every single one. ``verdict`` is one sentence in
    parts, the result first; ``details`` belong to the proof, ``notes`` are what the reader has to know
    besides, ``next`` what to do now: pairs of a label and a line.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    lines: tuple[Line, ...]
    state: State
    verdict: tuple[str, ...]
    details: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    next: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class About:
    """What the value itself can't know: what was asked, which files were written, what to type next.

    ``next`` holds pairs of a label and a line to paste. ``failed``: the command counts it as a failure, whatever the
    value says of itself.
    """

    command: str = ""
    subject: str = ""
    written: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    next: tuple[tuple[str, str], ...] = ()
    failed: bool = False
