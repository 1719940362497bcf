"""The page of what was un-shared or merged: one row a norm or network, what it was and what it is now."""

from __future__ import annotations

from collections.abc import Sequence

from bnfix.render import proof
from bnfix.render.numbers import count
from bnfix.render.page import Column, Line, Page, Row, State
from bnfix.render.pages import PageOf
from bnfix.render.pages.result import PLAN_ONLY
from bnfix.render.runs import alike, named
from bnfix.types import Edit, Refusal, Result

COLUMNS = (Column("site", "path"), Column("was", "extra"), Column("result"))
_DONE = {"unshare": "un-shared", "merge_calls": "merged"}
_PLANNED = {"unshare": "would un-share", "merge_calls": "would merge"}
_SAME = "outputs in evaluation mode identical to the bit"


class SharingPage(PageOf):
    """What each call got of its own, or which calls became one; what stays shared, and why."""

    kind = Result
    columns = (Column("result"),)

    def suits(self, value: object) -> bool:
        """The results of these two verbs."""
        return isinstance(value, Result) and value.verb in _DONE

    def page(self, value: Result) -> Page:
        state, verdict = _verdict(value)
        rows = [Row("done", (_name(e), e.before, _became(e))) for e in value.edits]
        rows += [_kept(reason, group) for reason, group in alike(value.refusals)]
        lines = [Line("done", _name(e), f"{e.before} {e.action}: {_became(e)}".replace("  ", " ")) for e in value.edits]
        lines += [Line("kept", _name(r), f"kept: {r.reason}") for r in value.refusals]
        return Page(
            title="the plan" if value.dry_run else "the calls",
            columns=COLUMNS,
            rows=tuple(rows),
            lines=tuple(lines),
            state=state,
            verdict=verdict,
            details=proof.details(value.parity) if value.parity else (),
            notes=(*value.notes, *(value.parity.notes if value.parity else ())),
        )

    def cells(self, value: Result) -> tuple[str, ...]:
        return (" · ".join(part for part in _verdict(value)[1] if part != PLAN_ONLY),)

    def remarks(self, value: Result) -> tuple[str, ...]:
        return tuple(f"kept {named([_name(r) for r in group])}: {reason}" for reason, group in alike(value.refusals))

    def total(self, values: Sequence[Result]) -> tuple[str, ...]:
        done, kept = sum(len(v.edits) for v in values), sum(len(v.refusals) for v in values)
        verb = values[0].verb
        planned = any(v.dry_run for v in values)
        said = f"{_PLANNED[verb] if planned else _DONE[verb]} {count(done, 'norm')} in {count(len(values), 'file')}"
        return (said + (f", kept {kept}" if kept else ""), *([PLAN_ONLY] if planned else []))


def _verdict(value: Result) -> tuple[State, tuple[str, ...]]:
    unshares = value.verb == "unshare"
    done = [e for e in value.edits if e.action != "momentum"]
    what = "shared norm" if unshares else "network"
    if not done and not value.refusals:
        nothing = (
            "found no norm that several calls share" if unshares else "found no network that is called several times"
        )
        return "kept", (f"{nothing}: nothing to do",)
    verb = _PLANNED[value.verb] if value.dry_run else _DONE[value.verb]
    kept = f", kept {len(value.refusals)}" if value.refusals else ""
    parts = [f"{verb} {len(done)} of {count(len(done) + len(value.refusals), what)}{kept}"]
    state: State = "done" if done else "kept"
    if done and unshares:
        parts.append(f"{_SAME} on {', '.join(value.signatures)}")
    if value.parity is not None:
        parts += proof.verdict(value.parity)
        if value.parity.verdict != "passed":
            state = proof.STATES[value.parity.verdict]
    if value.dry_run and done:
        parts.append(PLAN_ONLY)
    return state, tuple(parts)


def _name(value: Edit | Refusal) -> str:
    site = value.site or "(root)"
    return f"{site} ({len(value.calls)} calls)" if len([c for c in value.calls if "@" in c]) else site


def _became(edit: Edit) -> str:
    return edit.after


def _kept(reason: str, group: list[Refusal]) -> Row:
    was = sorted({r.before for r in group if r.before})
    return Row("kept", (named([_name(r) for r in group]), was[0] if len(was) == 1 else "", f"kept: {reason}"))
