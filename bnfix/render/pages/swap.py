"""The page of a swap: what each norm became, and how much of its output an affine of the new one can explain."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bnfix.render.numbers import NONE, count
from bnfix.render.page import Column, Line, Page, Row, State
from bnfix.render.pages import PageOf
from bnfix.render.runs import alike, named, together
from bnfix.types import Edit, Refusal, Result

COLUMNS = (Column("norm", "path"), Column("was", "extra"), Column("result"), Column("R²", "number"))
PLAN_ONLY = "nothing changed, this is the plan"
POOR = 0.5
"""R² below which a norm has lost more than it kept."""


class SwapPage(PageOf):
    """One row a norm, or a part of the model where there are many."""

    kind = Result

    def suits(self, value: object) -> bool:
        """What ``swap`` returned."""
        return isinstance(value, Result) and value.verb == "swap"

    def page(self, value: Result) -> Page:
        runs = together(value.edits)
        return Page(
            title="the plan" if value.dry_run else "the norms",
            columns=COLUMNS,
            rows=(*(_row(run, value.dry_run) for run in runs), *_rows_kept(value)),
            lines=(*(_line(e, value.dry_run) for e in value.edits), *(_refused(r) for r in value.refusals)),
            state=_worst(value),
            verdict=_verdict(value),
            notes=(*value.notes, *_doubts(value)),
        )

    def cells(self, value: Result) -> tuple[str, ...]:
        return (" · ".join(said for said in _verdict(value) if said != PLAN_ONLY),)

    def remarks(self, value: Result) -> tuple[str, ...]:
        return tuple(f"kept {row.cells[0]}: {row.cells[2].removeprefix('kept: ')}" for row in _rows_kept(value))

    def total(self, values: Sequence[Result]) -> tuple[str, ...]:
        planned = any(v.dry_run for v in values)
        done, norms = sum(len(v.edits) for v in values), sum(v.norms for v in values)
        kept = f", kept {norms - done}" if norms > done else ""
        changed = count(sum(bool(v.edits) for v in values), "file")
        said = f"{'would swap' if planned else 'swapped'} {done} of {count(norms, 'norm')} in {changed}{kept}"
        return (said, *([PLAN_ONLY] if planned else []))


def _worst(value: Result) -> State:
    return "kept" if not value.edits else "unsure" if any(_state(e) == "unsure" for e in value.edits) else "done"


def _doubts(value: Result) -> tuple[str, ...]:
    """What to do where R² is poor."""
    poor = [e for e in value.edits if _state(e) == "unsure"]
    if not poor:
        return ()
    where = count(len(poor), "norm")
    what = f"R² is below {POOR} at {where}: more is lost there than kept, so train the new model further"
    several = "; where one norm serves several calls that differ, un-share it before"
    return (what + (several if any(len(e.calls) > 1 for e in poor) else ""),)


def _verdict(value: Result) -> tuple[str, ...]:
    """How many norms became what, and the lowest R²."""
    if not value.norms:
        return ("found no norm to swap",)
    verb = "would swap" if value.dry_run else "swapped"
    into = Counter(_class(e.after) for e in value.edits)
    became = f" for {', '.join(f'{n} {cls}' if len(into) > 1 else cls for cls, n in into.items())}" if into else ""
    kept = f", kept {len(value.refusals)}" if value.refusals else ""
    parts = [f"{verb} {len(value.edits)} of {count(value.norms, 'norm')}{became}{kept}"]
    measured = [(e.r2, _name(e)) for e in value.edits if e.r2 is not None]
    if measured:
        lowest, where = min(measured)
        parts.append(f"R² {r2(lowest)} at {where}" + (", the lowest" if len(measured) > 1 else ""))
    return (*parts, *([PLAN_ONLY] if value.dry_run and value.edits else []))


def r2(value: float | None) -> str:
    """Two decimals; never 1.00 where it is less."""
    if value is None:
        return NONE
    return f"{value:.3f}" if 0.995 <= value < 1 else f"{value:.2f}"


def _rows_kept(value: Result) -> list[Row]:
    return [_kept(reason, group) for reason, group in alike(value.refusals)]


def _row(run: list[Edit], dry_run: bool) -> Row:
    worst = min((e.r2 for e in run if e.r2 is not None), default=None)
    verb = "would be" if dry_run else "now"
    if len(run) == 1:
        edit = run[0]
        return Row(_state(edit), (_name(edit), _short(edit.before), f"{verb} {_short(edit.after)}", r2(worst)))
    kinds = Counter(_class(e.after) for e in run)
    into = ", ".join(f"{n} × {cls}" for cls, n in kinds.items())
    was = " / ".join(sorted({_class(e.before) for e in run}))
    state: State = "unsure" if any(_state(e) == "unsure" for e in run) else "done"
    site = f"{run[0].site} … {run[-1].site} ({len(run)} norms)"
    return Row(state, (site, f"{len(run)} × {was}", f"{verb} {into}", r2(worst)))


def _state(edit: Edit) -> State:
    return "unsure" if edit.r2 is not None and edit.r2 < POOR else "done"


def _kept(reason: str, group: list[Refusal]) -> Row:
    was = _short(group[0].before) if len(group) == 1 else f"{len(group)} × {_class(group[0].before)}"
    return Row("kept", (named([_name(r) for r in group]), was, f"kept: {reason}", ""))


def _line(edit: Edit, dry_run: bool) -> Line:
    verb = "would be" if dry_run else "now"
    measured = f" (R² {r2(edit.r2)})" if edit.r2 is not None else ""
    return Line(_state(edit), _name(edit), f"{edit.before} {verb} {edit.after}{measured}")


def _refused(refusal: Refusal) -> Line:
    return Line("kept", _name(refusal), f"kept: {refusal.reason}")


def _name(value: Edit | Refusal) -> str:
    site = value.site or "(root)"
    return f"{site} ({len(value.calls)} calls)" if len(value.calls) > 1 else site


def _class(said: str) -> str:
    return said.partition("(")[0]


def _short(said: str) -> str:
    return said.replace(", eps=1e-05)", ")")
