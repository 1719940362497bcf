"""The page of a file for which nothing came out."""

from __future__ import annotations

from bnfix.render.page import Column, Page, Row
from bnfix.render.pages import PageOf
from bnfix.render.several import Failure


class FailurePage(PageOf):
    """What went wrong."""

    kind = Failure

    def page(self, value: Failure) -> Page:
        said = f"error: {value.message}"
        steps = [line.partition("   ") for line in value.hint.splitlines()]
        return Page(
            title=value.path,
            columns=(Column("file", "path"), Column("result")),
            rows=(Row("failed", (value.path, said)),),
            lines=(),
            state="failed",
            verdict=(said,),
            next=tuple((label, rest.strip()) if gap else ("", label) for label, gap, rest in steps),
        )
