"""Curves on a screen of characters: four dots by two in each (Braille); where the encoding lacks them, one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

WIDTH, HEIGHT = 60, 11
_BRAILLE = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bit of each dot, by column and row in its character."""


@dataclass(frozen=True)
class Curve:
    """A line through ``points`` (x, y), ``label`` at its end; ``mark`` draws it where there are no dots."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str
    mark: str


def chart(curves: Sequence[Curve], *, ticks: Sequence[float], unit: str, dots: bool = True) -> list[Text]:
    """``curves`` on a screen of ``WIDTH`` by ``HEIGHT`` characters, in lines; ``unit`` is that of x.

    ``ticks`` are named at the left; y goes from 0 to a tenth above the highest.

    Curves are drawn in their order: of two in one character the later has the colour.
    """
    from rich.text import Text

    across, down = (2, 4) if dots else (1, 1)
    last = max(x for curve in curves for x, _ in curve.points) or 1.0
    top = 1.1 * max(ticks)
    screen = [[(0, "")] * WIDTH for _ in range(HEIGHT)]
    ends: dict[int, Curve] = {}
    for curve in curves:
        row = 0
        for column in range(WIDTH * across):
            y = _at(curve.points, column / (WIDTH * across - 1) * last)
            place = _row(y, top, HEIGHT * down)
            # as a line: from the row before to this one
            for between in range(min(row, place), max(row, place) + 1) if column else (place,):
                cells, cell = screen[between // down], column // across
                bits = _BRAILLE[column % 2][between % 4] if dots else ord(curve.mark)
                cells[cell] = (cells[cell][0] | bits if dots else bits, curve.style)
            row = place
        ends[row // down] = curve
    named = {_row(tick, top, HEIGHT): f"{tick:g}" for tick in ticks}
    lines = []
    for number, cells in enumerate(screen):
        line = Text(f"  {named.get(number, ''):>4} ", "dim").append("│" if dots else "|", "dim")
        for bits, style in cells:
            line.append(chr((0x2800 if dots else 0) + bits) if bits else " ", style)
        if number in ends:
            line.append(f" {ends[number].label}", f"bold {ends[number].style}")
        line.rstrip()
        lines.append(line)
    lines.append(Text(f"       {'└' if dots else '+'}{('─' if dots else '-') * WIDTH}", "dim"))
    lines.append(Text(f"        0{f'{last:g} {unit}':>{WIDTH - 1}}", "dim"))
    return lines


def _row(y: float, top: float, rows: int) -> int:
    return round((1 - min(max(y / top, 0.0), 1.0)) * (rows - 1))


def _at(points: Sequence[tuple[float, float]], x: float) -> float:
    """The height of the line through ``points`` at ``x``; before the first and behind the last as there."""
    before = points[0]
    for point in points:
        if point[0] >= x:
            share = (x - before[0]) / (point[0] - before[0]) if point[0] > before[0] else 0.0
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1]
