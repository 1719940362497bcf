"""The page of a repair: one row a norm, folded or kept, each with its reason."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from bnfix.render import proof
from bnfix.render.numbers import count, ratio, ulp, worst
from bnfix.render.page import Column, Line, Page, Row, State
from bnfix.render.pages import PageOf
from bnfix.render.runs import alike, named, together
from bnfix.types import Edit, Refusal, Result

COLUMNS = (
    Column("norm", "path"),
    Column("was", "extra"),
    Column("result"),
    Column("ulp", "number"),
    Column("× noise", "number"),
)
PLAN_ONLY = "nothing changed, this is the plan"
NOT_COMPARED = "outputs NOT compared"
OTHER_VERBS = ("swap", "unshare", "merge_calls")
"""Whose results have a page of their own."""
SOURCES = {
    "symbolic": "read without an example input: with one (--input, example=) more can be folded, and outputs compared",
    "observed": "the graph was recorded from one concrete run: it holds for the route that the run took",
}


class ResultPage(PageOf):
    """What was folded into what, what was kept and why, and the proof."""

    kind = Result
    columns = (Column("result"), Column("ulp", "number"), Column("× noise", "number"))

    def suits(self, value: object) -> bool:
        """Every result that no other page is made for."""
        return isinstance(value, Result) and value.verb not in OTHER_VERBS

    def page(self, value: Result) -> Page:
        state, verdict = _verdict(value)
        runs = together(_folds(value))
        parts = Counter(_shared([e.site for e in run]) for run in runs if len(run) > 1)
        rows = [_row(run, value.dry_run, parts) for run in runs]
        rows += [_otherwise(what, group, value.edits) for what, group in alike(_others(value))]
        kept = [_kept(reason, group) for reason, group in alike(value.refusals)]
        lines = [_line(e, value.dry_run) for e in value.edits] + [_refused(r) for r in value.refusals]
        source = (SOURCES[value.source],) if value.source in SOURCES and value.norms else ()
        return Page(
            title="the plan" if value.dry_run else "the norms",
            columns=COLUMNS,
            rows=(*rows, *kept),
            lines=tuple(lines),
            state=state,
            verdict=verdict,
            details=proof.details(value.parity) if value.parity else (),
            notes=(*source, *value.notes, *(value.parity.notes if value.parity else ())),
        )

    def cells(self, value: Result) -> tuple[str, ...]:
        _, said = _verdict(replace(value, parity=None))
        elsewhere = (PLAN_ONLY, *([NOT_COMPARED] if value.parity is not None else []))
        parts = [part for part in said if " ulp" not in part and part not in elsewhere]
        if value.parity is not None and value.parity.verdict != "passed":
            parts.append(proof.verdict(value.parity)[0])
        noise = worst(o.noise_ratio for o in value.parity.outputs) if value.parity is not None else None
        return " · ".join(parts), ulp(worst(e.ulp for e in value.edits)), ratio(noise)

    def remarks(self, value: Result) -> tuple[str, ...]:
        rows = [_kept(*group) for group in alike(value.refusals)]
        kept = [f"kept {row.cells[0]}: {row.cells[2].removeprefix('kept: ')}" for row in rows]
        kept += [f"{named([_name(r) for r in group])}: {what}" for what, group in alike(_others(value))]
        signatures = value.parity.signatures if value.parity is not None else ()
        return (*kept, *([f"outputs compared on {', '.join(signatures)}"] if signatures else []))

    def total(self, values: Sequence[Result]) -> tuple[str, ...]:
        planned = any(v.dry_run for v in values)
        done, kept = sum(len(_folds(v)) for v in values), sum(len(v.refusals) for v in values)
        changed = sum(bool(v.edits) for v in values)
        said = f"{'would fold' if planned else 'folded'} {done} of {count(sum(v.norms for v in values), 'norm')}"
        affine = sum(_affines(v) for v in values)
        parts = [f"{said} in {count(changed, 'file')}{_became(affine)}" + (f", kept {kept}" if kept else "")]
        noise = worst(o.noise_ratio for v in values if v.parity is not None for o in v.parity.outputs)
        proofs = [v.parity for v in values if v.parity is not None]
        if noise is not None and len(proofs) == len(values) and all(p.verdict == "passed" for p in proofs):
            parts.append(f"outputs within {ratio(noise)} × each model's own rounding noise (limit {proofs[0].k:.0f})")
        return (*parts, *([PLAN_ONLY] if planned else []))


def _verdict(value: Result) -> tuple[State, tuple[str, ...]]:
    if not value.norms:
        return "kept", ("found no norm with running statistics: nothing to fold",)
    verb = "would fold" if value.dry_run else "folded"
    done, kept = len(_folds(value)), len(value.refusals)
    became = _became(_affines(value))
    parts = [f"{verb} {done} of {count(value.norms, 'norm')}{became}" + (f", kept {kept}" if kept else "")]
    defects = sum(r.defect for r in value.refusals)
    if defects:
        parts.append(f"{count(defects, 'plan')} of bnfix failed the proof: undone")
    furthest = worst(e.ulp for e in value.edits)
    if furthest is not None and furthest <= 0.5:
        parts.append(f"exact up to one rounding (≤ {ulp(furthest)} ulp)")
    elif furthest is not None:
        parts.append(f"stored numbers up to {ulp(furthest)} ulp from exact")
    state: State = "done" if value.done else "kept"
    if value.parity is not None:
        parts += proof.verdict(value.parity)
        if value.parity.verdict != "passed":
            state = proof.STATES[value.parity.verdict]
    elif value.done:
        parts.append(PLAN_ONLY if value.dry_run else NOT_COMPARED)
    return state, tuple(parts)


def _row(run: list[Edit], dry_run: bool, parts: Counter[str]) -> Row:
    figures = ulp(worst(e.ulp for e in run)), ratio(worst(e.noise_ratio for e in run))
    if len(run) == 1:
        edit = run[0]
        return Row("done", (_name(edit), _short(edit.before), _into(edit, dry_run), *figures))
    return Row("done", (_span(run, parts), _was(run), _into_many(run, dry_run), *figures))


def _folds(value: Result) -> list[Edit]:
    """The edits by which a norm went into other layers."""
    return [e for e in value.edits if e.into or e.action.startswith("fold")]


def _others(value: Result) -> list[Refusal]:
    """Every other edit, with what was done as its reason, to be told together where alike."""
    folds = _folds(value)
    rest = [e for e in value.edits if e not in folds]
    return [Refusal(e.site, _otherwise_done(e), e.calls, before=e.before) for e in rest]


def _affines(value: Result) -> int:
    return value.done - len(_folds(value))


def _became(affine: int) -> str:
    return f", {affine} became {'a multiply-add' if affine == 1 else 'multiply-adds'}" if affine else ""


def _otherwise(what: str, group: list[Refusal], edits: Sequence[Edit]) -> Row:
    sites = {r.site for r in group}
    noise = ratio(worst(e.noise_ratio for e in edits if e.site in sites))
    return Row("done", (named([_name(r) for r in group]), _was(group), what, "", noise))


def _kept(reason: str, group: list[Refusal]) -> Row:
    state: State = "failed" if any(r.defect for r in group) else "kept"
    return Row(state, (named([_name(r) for r in group]), _was(group), f"kept: {reason}", "", ""))


def line_of(value: Edit | Refusal) -> Line:
    """One norm by itself: what was done with it, or why nothing was."""
    return _line(value, dry_run=False) if isinstance(value, Edit) else _refused(value)


def _line(edit: Edit, dry_run: bool) -> Line:
    figures = [f"{ulp(edit.ulp)} ulp"] if edit.ulp is not None else []
    figures += [f"{ratio(edit.noise_ratio)} x noise"] if edit.noise_ratio is not None else []
    measured = f" ({', '.join(figures)})" if figures else ""
    return Line("done", _name(edit), f"{edit.before} {_into(edit, dry_run)}{measured}")


def _refused(refusal: Refusal) -> Line:
    return Line("failed" if refusal.defect else "kept", _name(refusal), f"kept: {refusal.reason}")


def _name(value: Edit | Refusal) -> str:
    calls = [c for c in value.calls if c != value.site]
    site = value.site or "(root)"
    if not calls:
        return site
    if len(value.calls) == 1:
        return calls[0]
    return f"{site} ({len(value.calls)} calls)"


def _verb(dry_run: bool) -> str:
    return "would fold into" if dry_run else "folded into"


def _into(edit: Edit, dry_run: bool) -> str:
    gained = sorted({key.rpartition(".")[2] for key in edit.gains})
    gains = f", gains {' and '.join(gained)}" if gained else ""
    if not edit.into:
        return f"{_otherwise_done(edit)}{'' if edit.loses else gains}"
    verb = _verb(dry_run)
    if edit.action.endswith("forward"):
        verb = verb.replace(" into", " forward into")
    return f"{verb} {', '.join(edit.into)}{gains}"


def _otherwise_done(edit: Edit) -> str:
    return f"{_DONE.get(edit.action, edit.action)}: {edit.after}"


_DONE = {"bake": "baked", "unshare": "un-shared", "merge": "merged", "momentum": "momentum"}


def _span(run: list[Edit], parts: Counter[str]) -> str:
    """The part of the model that only this row is about, or its first and last norm."""
    shared = _shared([e.site for e in run])
    if shared and parts[shared] == 1:
        return f"{shared}.* ({len(run)} norms)"
    return f"{run[0].site} … {run[-1].site} ({len(run)} norms)"


def _was(values: Sequence[Edit] | Sequence[Refusal]) -> str:
    classes = sorted({v.before.split("(")[0] for v in values if v.before})
    if len(values) == 1:
        return _short(values[0].before)
    return f"{len(values)} × {' / '.join(classes)}" if classes else ""


def _into_many(run: list[Edit], dry_run: bool) -> str:
    into = list(dict.fromkeys(path for e in run for path in e.into))
    shared = _shared(into)
    if shared and shared == _shared([e.site for e in run]):
        under = ""
    else:
        under = f" under {shared}" if shared else f", {into[0]} … {into[-1]}" if len(into) > 1 else ""
    gains = sum(bool(e.gains) for e in run)
    gained = ", all gain a bias" if gains == len(run) else f", {gains} gain a bias" if gains else ""
    return f"{_verb(dry_run)} {count(len(into), 'layer')}{under}{gained}"


def _shared(paths: list[str]) -> str:
    parts = [p.split(".")[:-1] for p in paths]
    common = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))]
    return ".".join(common)


def _short(before: str) -> str:
    return before.replace(", eps=1e-05)", ")")
