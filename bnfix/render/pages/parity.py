"""The page of a comparison: one row an output."""

from __future__ import annotations

from bnfix.render import proof
from bnfix.render.page import Page
from bnfix.render.pages import PageOf
from bnfix.types import Parity


class ParityPage(PageOf):
    """Two models side by side, judged by the reference's own noise."""

    kind = Parity

    def page(self, value: Parity) -> Page:
        nearer = proof.nearer(value)
        lead = {"passed": ("passed",), "warned": ("passed with a warning",)}.get(value.verdict, ())
        return Page(
            title=f"parity of {value.candidate}" if value.candidate else "parity",
            columns=proof.COLUMNS,
            rows=tuple(proof.row(o) for o in value.outputs),
            lines=tuple(proof.line(o) for o in value.outputs),
            state=proof.STATES[value.verdict],
            verdict=(*lead, *proof.verdict(value)),
            details=tuple(filter(None, (nearer, *proof.details(value)))),
            notes=value.notes,
        )
