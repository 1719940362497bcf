"""One edit, one refusal, one output by itself: a line."""

from __future__ import annotations

from typing import Any

from bnfix.render import proof
from bnfix.render.page import Line, Page
from bnfix.render.pages import PageOf
from bnfix.render.pages.result import line_of
from bnfix.types import Edit, OutputParity, Refusal


class EditPage(PageOf):
    """What was done to one norm."""

    kind = Edit

    def page(self, value: Edit) -> Page:
        return _page(line_of(value))


class RefusalPage(PageOf):
    """Why one norm was kept."""

    kind = Refusal

    def page(self, value: Refusal) -> Page:
        return _page(line_of(value))


class OutputPage(PageOf):
    """How far one output is off."""

    kind = OutputParity

    def page(self, value: Any) -> Page:
        return _page(proof.line(value))


def _page(line: Line) -> Page:
    return Page(line.site, (), (), (line,), line.state, (f"{line.site}: {line.text}",))
