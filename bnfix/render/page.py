"""What a reader is shown, before it is drawn: one table, one verdict, notes, and what to type next.

A value becomes a :class:`Page` once (``pages/``, one file a kind of value); each output format draws
pages and knows nothing of values. Text is plain: no markup, no escapes, no colours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

State = Literal["done", "kept", "failed", "unsure", "warned", "told", "plain"]
"""``warned`` and ``told`` are a warning and an information about something that is as it was."""


@dataclass(frozen=True)
class Column:
    """``path`` breaks at dots, ``number`` is set right and never breaks, ``extra`` goes first where room is short.

    ``prose``, the last column, is sentences: a terminal sets them under the rest of their row.
    """

    title: str
    kind: Literal["path", "text", "number", "extra", "prose"] = "text"


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

    ``rows`` may run alike rows together; ``lines`` holds every single one, and ``annotations`` few instead of many for
    where each costs room (empty: the lines that tell of trouble). ``verdict`` is one sentence in parts, the result
    first; ``details`` belong to the proof, ``notes`` are what the reader has to know besides, ``next`` what to do now:
    pairs of a label and a line.
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
    annotations: tuple[Line, ...] = ()
    shortened: bool | None = None
    """Whether ``rows`` leave out what ``lines`` hold; None: there are fewer of them."""

    @property
    def more(self) -> bool:
        """Whether there is more to be seen in ``lines``."""
        return len(self.lines) > len(self.rows) if self.shortened is None else self.shortened


@dataclass(frozen=True)
class About:
    """What the value itself can't know: what was asked, which files were written, what to type next.

    ``next`` holds pairs of a label and a line to paste. ``failed``: the command counts it as a failure, whatever the
    value says of itself. ``worded`` says what is said of arguments in Python as it is asked for here.
    """

    command: str = ""
    subject: str = ""
    written: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    next: tuple[tuple[str, str], ...] = ()
    failed: bool = False
    worded: Callable[[str], str] | None = None
