"""Breaking text so that nothing is lost: at spaces first, inside a path after a dot or a slash, and then anywhere."""

from __future__ import annotations

import re

_JOINTS = re.compile(r"(?<=[./:_@=,])(?=\w)")


def wrap(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` characters; no character but the spaces at the breaks goes away."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            if line and len(line) + 1 + len(word) <= width:
                line = f"{line} {word}"
                continue
            if line:
                lines.append(line)
            *full, line = _pieces(word, width)
            lines += full
        lines.append(line)
    return lines


def _pieces(word: str, width: int) -> list[str]:
    if len(word) <= width:
        return [word]
    pieces, line = [], ""
    for part in _JOINTS.split(word):
        if line and len(line) + len(part) > width:
            pieces.append(line)
            line = ""
        line += part
        while len(line) > width:
            pieces.append(line[:width])
            line = line[width:]
    return [*pieces, line]


def shares(natural: list[int], wraps: list[bool], room: int, least: int = 14) -> list[int]:
    """Column widths within ``room``: columns that may not wrap keep theirs, the others share what is left fairly.

    A column narrower than its fair share gives the rest to the others. Where there is no room for ``least``
    characters each, the table becomes wider than the room rather than unreadable.
    """
    widths = list(natural)
    free = room - sum(w for w, may in zip(natural, wraps, strict=True) if not may)
    open_columns = [i for i, may in enumerate(wraps) if may]
    while open_columns:
        fair = max(free // len(open_columns), least)
        small = [i for i in open_columns if natural[i] <= fair]
        if not small:
            for i in open_columns:
                widths[i] = fair
            return widths
        for i in small:
            free -= natural[i]
            open_columns.remove(i)
    return widths
