"""The page of a written ONNX file."""

from __future__ import annotations

import os

from bnfix.render import proof
from bnfix.render.numbers import count, error, ratio
from bnfix.render.page import Column, Line, Page, Row, State
from bnfix.render.pages import PageOf
from bnfix.types import Export

COLUMNS = (Column("what", "path"), Column("found"))


class ExportPage(PageOf):
    """Where it lies, what is in it, what is left, and whether ONNX Runtime computes the same."""

    kind = Export

    def page(self, value: Export) -> Page:
        parity = value.parity
        beside = [f for f in value.files if f != value.path]
        rows = [
            Row("plain", ("file", value.path)),
            *([Row("plain", ("belongs to it", ", ".join(beside)))] if beside else []),
            Row("plain", ("opset", str(value.opset))),
            *([Row("plain", ("inputs", ", ".join(value.inputs)))] if value.inputs else []),
            *([Row("plain", ("outputs", ", ".join(value.outputs)))] if value.outputs else []),
            *([Row("plain", ("folded", f"{count(value.folded, 'norm')} before the export"))] if value.folded else []),
        ]
        rows += [Row("kept", (r.site, f"left in the graph: {r.reason}")) for r in value.norms_left]
        for output in parity.outputs if parity else ():
            figures = f"{ratio(output.noise_ratio)} × noise, max abs error {error(output.max_abs_err)}"
            said = f": {output.reason}" if output.reason else ""
            rows.append(Row(proof.STATES[output.verdict], (output.name, f"{output.verdict}{said} ({figures})")))
        lines = [Line(row.state, row.cells[0], row.cells[1]) for row in rows]
        state, judged = _judged(value)
        left = count(len(value.norms_left), "norm") + " left"
        return Page(
            title="the ONNX file",
            columns=COLUMNS,
            rows=tuple(rows),
            lines=tuple(lines),
            state=state,
            verdict=(_done(value), left, *judged),
            details=(tuple(filter(None, (proof.nearer(parity), *proof.details(parity)))) if parity else ()),
            notes=(*value.notes, *(parity.notes if parity else ())),
        )


def _done(value: Export) -> str:
    name = os.path.basename(value.path)
    failed = value.parity is not None and value.parity.verdict == "failed"
    return f"did not write {name}" if failed and not value.files else f"exported {name}"


def _judged(value: Export) -> tuple[State, tuple[str, ...]]:
    if value.parity is None:
        return "unsure", ("outputs NOT compared",)
    return proof.STATES[value.parity.verdict], proof.verdict(value.parity)
