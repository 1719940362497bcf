"""The page of a repair by ``check --fix``: what changed, norm by norm, and what a second check still finds."""

from __future__ import annotations

from collections.abc import Sequence

from bnfix.render.numbers import count
from bnfix.render.page import Column, Line, Page, Row
from bnfix.render.pages import PageOf
from bnfix.render.pages.diagnosis import COLUMNS, counted, judged, rows, some
from bnfix.render.pages.diagnosis import lines as lines_of
from bnfix.render.pages.diagnosis import page as page_of_diagnosis
from bnfix.types import Edit, Mended

ROWS = 12
"""Changed norms shown one by one up to here."""


class MendedPage(PageOf):
    """What was changed stands first, then what is left."""

    kind = Mended
    columns = (Column("verdict"), Column("left"), Column("changed", "number"), Column("not checked", "number"))

    def page(self, value: Mended) -> Page:
        left = page_of_diagnosis(value.diagnosis)
        state, verdict = judged(value.diagnosis)
        edits = [Row("done", (e.action, e.site or "(root)", _changed(e))) for e in value.edits]
        shown = edits if len(edits) <= ROWS else [*edits[: ROWS - 1], _rest(value.edits[ROWS - 1 :])]
        changed = (Line("done", e.site or "(root)", f"{e.action}: {_changed(e)}") for e in value.edits)
        notes = [f"{r.site}: not fixed: {r.reason}" for r in value.refusals]
        return Page(
            title="the plan" if value.dry_run else "what was mended",
            columns=COLUMNS,
            rows=(*shown, *rows(value.diagnosis.findings)),
            lines=(*changed, *lines_of(value.diagnosis.findings)),
            state=state,
            verdict=(*_verdict(value), *verdict[1:]),
            details=(*_healed(value), *left.details),
            notes=(*notes, *left.notes),
            next=left.next,
            annotations=left.annotations,
            shortened=left.shortened or len(edits) > ROWS,
        )

    def cells(self, value: Mended) -> tuple[str, ...]:
        missing = len({s.code for s in value.diagnosis.skipped} - set(value.diagnosis.checked))
        numbers = (str(n) if n else "" for n in (_norms(value.edits), missing))
        return _verdict(value)[0], counted(value.diagnosis.findings), *numbers

    def remarks(self, value: Mended) -> tuple[str, ...]:
        told = rows(value.diagnosis.findings)
        return tuple(f"{r.cells[0]} at {r.cells[1]}: {r.cells[2]}".replace("\n", "; ") for r in told)

    def total(self, values: Sequence[Mended]) -> tuple[str, ...]:
        fixed, found = sum(len(v.fixed) for v in values), sum(len(v.before.findings) for v in values)
        verb = "would fix" if any(v.dry_run for v in values) else "fixed"
        left = counted([f for v in values for f in v.diagnosis.findings])
        return f"{verb} {fixed} of {count(found, 'finding')} in {count(len(values), 'file')}", f"left: {left}"


def _verdict(value: Mended) -> tuple[str, ...]:
    verb = "would fix" if value.dry_run else "fixed"
    found = len(value.before.findings)
    if not found:
        return ("nothing to fix: no finding",)
    if not value.edits:
        return (f"nothing that bnfix can fix by itself in {count(found, 'finding')}", *_left(value))
    done = f"{verb} {len(value.fixed)} of {count(found, 'finding')} ({count(_norms(value.edits), 'norm')} changed)"
    return (done, *_left(value), *(["nothing was written, this is the plan"] if value.dry_run else []))


def _healed(value: Mended) -> tuple[str, ...]:
    named = (f"{f.code} {f.name} ({some(f.sites)})" if f.sites else f"{f.code} {f.name}" for f in value.fixed)
    listed = list(dict.fromkeys(named))
    more = [f"and {len(listed) - ROWS} more"] if len(listed) > ROWS else []
    return (f"healed: {', '.join([*listed[:ROWS], *more])}",) if value.edits and listed else ()


def _left(value: Mended) -> tuple[str, ...]:
    return (f"left: {counted(value.diagnosis.findings)}",)


def _norms(edits: Sequence[Edit]) -> int:
    return len({e.site for e in edits})


def _changed(edit: Edit) -> str:
    return f"{edit.before} → {edit.after}" if edit.before else edit.after


def _rest(edits: Sequence[Edit]) -> Row:
    actions = ", ".join(dict.fromkeys(e.action for e in edits))
    return Row("done", (actions, some([e.site for e in edits]), f"{count(len(edits), 'more change')}"))
