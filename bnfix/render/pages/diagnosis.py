"""The page of a diagnosis: what was found, worst first, what heals it, and what was not checked."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from bnfix.render.numbers import count
from bnfix.render.page import Column, Line, Page, Row, State
from bnfix.render.pages import PageOf
from bnfix.types import SEVERITIES, Diagnosis, Finding, Fix, Safety, Skipped

COLUMNS = (Column("rule"), Column("where", "path"), Column("found", "prose"))
STATES: dict[str, State] = {"error": "failed", "warning": "warned", "info": "told"}
MODEL = "(the model)"
FEW = 4
"""Findings of one rule shown one a row below this many, and as many sites named in a row."""
COST = {
    Safety.EXACT: "exact",
    Safety.NEEDS_DATA: "needs data",
    Safety.NEEDS_TRAINING: "needs training",
}


class DiagnosisPage(PageOf):
    """Each finding with its site, its figures and its fix; the verdict counts what was not checked."""

    kind = Diagnosis
    columns = (
        Column("verdict"),
        Column("found"),
        Column("errors", "number"),
        Column("warnings", "number"),
        Column("not checked", "number"),
    )

    def page(self, value: Diagnosis) -> Page:
        return page(value)

    def cells(self, value: Diagnosis) -> tuple[str, ...]:
        codes = Counter(f"{f.code} {f.name}" for f in value.findings)
        found = ", ".join(f"{named} × {n}" if n > 1 else named for named, n in codes.items())
        numbers = (len(value.of("error")), len(value.of("warning")), len(_unchecked_codes(value)))
        return judged(value)[1][0], found, *(str(n) if n else "" for n in numbers)

    def remarks(self, value: Diagnosis) -> tuple[str, ...]:
        told = (_told(group) for group in _groups(value.findings))
        return tuple(f"{row.cells[0]} at {row.cells[1]}: {row.cells[2]}".replace("\n", "; ") for row in told)

    def total(self, values: Sequence[Diagnosis]) -> tuple[str, ...]:
        counts = [counted([f for v in values for f in v.findings])]
        bad = sum(not v.clean for v in values)
        files = count(len(values), "file")
        return (*counts, f"{bad} of {files} not clean" if bad else f"{files} clean")


class FindingPage(PageOf):
    """One finding in a line."""

    kind = Finding

    def page(self, value: Finding) -> Page:
        row = _row([value])
        state, site, text = _annotation([value])
        return Page(value.code, (), (), (Line(state, site, text),), row.state, (f"{site}: {text}",))


class SkippedPage(PageOf):
    """One rule that was not checked, in a line."""

    kind = Skipped

    def page(self, value: Skipped) -> Page:
        (said,) = unchecked([value])
        return Page(value.code, (), (), (Line("plain", value.code, said),), "plain", (said,))


class FixPage(PageOf):
    """One fix in a line."""

    kind = Fix

    def page(self, value: Fix) -> Page:
        said = f"{value.verb}: {value.title} ({_cost(value)})"
        where = some(value.sites) or MODEL
        return Page(value.verb, (), (), (Line("plain", where, said),), "plain", (f"{where}: {said}",))


def page(value: Diagnosis) -> Page:
    """The whole diagnosis, laid out."""
    state, verdict = judged(value)
    groups = _groups(value.findings)
    return Page(
        title="the diagnosis",
        columns=COLUMNS,
        rows=rows(value.findings),
        lines=lines(value.findings),
        state=state,
        verdict=verdict,
        details=(*value.seen, *unchecked(value.skipped)),
        notes=value.notes,
        next=steps(value.findings),
        shortened=len(groups) < len(value.findings) or any(len(f.sites) > FEW for f in value.findings),
        annotations=tuple(Line(*_annotation(group)) for group in groups),
    )


def judged(value: Diagnosis) -> tuple[State, tuple[str, ...]]:
    """The state of a diagnosis, and its verdict in parts: what was found, on what, what was left out."""
    worst = next((s for s in SEVERITIES if value.of(s)), None)
    missing, partly = _unchecked_codes(value), {s.code for s in value.skipped} & set(value.checked)
    parts = [counted(value.findings)]
    parts.append(f"{count(value.norms, 'norm')}, {count(len(value.checked), 'rule')} checked")
    parts += [f"NOT checked: {count(len(missing), 'rule')}"] if missing else []
    parts += [f"{count(len(partly), 'rule')} not everywhere"] if partly else []
    parts += [f"{len(value.ignored)} ignored"] if value.ignored else []
    if not value.checked:
        return "unsure", ("nothing was checked", *parts[1:])
    return "done" if worst in (None, "info") else STATES[worst], tuple(parts)


def counted(findings: Sequence[Finding]) -> str:
    """``2 errors, 1 warning, 3 infos``."""
    numbers = Counter(f.severity for f in findings)
    said = [count(numbers[s], s) for s in SEVERITIES if numbers[s]]
    clean = [] if numbers["error"] or numbers["warning"] else ["no error, no warning"]
    return ", ".join([*clean, *said])


def rows(findings: Sequence[Finding]) -> tuple[Row, ...]:
    """A row a finding; many of one rule together."""
    return tuple(_told(group) for group in _groups(findings))


def lines(findings: Iterable[Finding]) -> tuple[Line, ...]:
    """A line for each site of each finding, for ``grep``."""
    return tuple(
        Line(STATES[f.severity], site or "(root)", f"{f.code} {f.severity} {f.name}: {_said(f)}")
        for f in findings
        for site in f.sites or (MODEL,)
    )


def unchecked(skipped: Iterable[Skipped]) -> tuple[str, ...]:
    """What was not checked, rules with one reason together; what could have been brought stands first."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for s in skipped:
        reason = f"needs {s.needs}" if s.needs and s.reason in ("", f"needs {s.needs}") else s.reason
        codes = reasons.setdefault((reason, some(s.sites)), [])
        codes += [s.code] if s.code not in codes else []
    said = []
    for (reason, where), codes in reasons.items():
        at = f" at {where}" if where else ""
        reason = re.sub(r"^needs ", "need ", reason) if len(codes) > 1 else reason
        said.append(f"not checked: {', '.join(_ranges(codes))}{at}: {_in_python(reason)}")
    return tuple(said)


def steps(findings: Iterable[Finding]) -> tuple[tuple[str, str], ...]:
    """What to type, each line once, with the codes of the rules that it is for."""
    codes: dict[str, list[str]] = {}
    for f in findings:
        if f.fix is not None and f.fix.line:
            listed = codes.setdefault(f.fix.line, [])
            listed += [f.code] if f.code not in listed else []
    return tuple((f"fix {', '.join(for_)}", line) for line, for_ in codes.items())


def some(sites: Sequence[str]) -> str:
    """The first of ``sites``, the worst, and how many more there are."""
    named = [s or "(root)" for s in sites]
    return ", ".join(named) if len(named) <= FEW else f"{', '.join(named[:3])} and {len(named) - 3} more"


def _told(group: Sequence[Finding]) -> Row:
    row = _row(group)
    fix = next((f.fix for f in group if f.fix is not None), None)
    if fix is None:
        return row
    verb = f": bnfix.{fix.verb}" if fix.verb in _PUBLIC else ""
    return Row(row.state, (*row.cells[:2], f"{row.cells[2]}\nfix ({_cost(fix)}{verb}): {fix.title}"))


_PUBLIC = ("recalibrate", "unshare", "swap", "fold", "joint", "merge_calls")


def _row(group: Sequence[Finding]) -> Row:
    first = group[0]
    more = f" (and {len(group) - 1} more like this)" if len(group) > 1 else ""
    sites = tuple(dict.fromkeys(site for f in group for site in f.sites))
    return Row(STATES[first.severity], (f"{first.code} {first.name}", some(sites) or MODEL, _said(first) + more))


def _cost(fix: Fix) -> str:
    """What a fix takes: a change of the user's own code is no training, though one may have to follow."""
    return "in your code" if fix.verb == "code" and fix.safety is Safety.NEEDS_TRAINING else COST[fix.safety]


def _said(finding: Finding) -> str:
    """The message without the place in front of it, where the reader sees that beside it."""
    if not finding.sites:
        return finding.message
    first = re.escape(finding.sites[0] or "(root)")
    place = re.match(rf"(?:{first}|\d+ [\w ]+\({first}[^()]*\)): ", finding.message)
    return finding.message[place.end() :] if place else finding.message


def _annotation(group: Sequence[Finding]) -> tuple[State, str, str]:
    row = _told(group)
    return row.state, row.cells[1], f"{row.cells[0]}: {row.cells[2]}"


def _groups(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of one rule and severity together where they are many; the worst first."""
    ordered = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
    groups = [list(g) for _, g in itertools.groupby(ordered, key=lambda f: (f.severity, f.code))]
    return [part for group in groups for part in ([group] if len(group) >= FEW else [[f] for f in group])]


def _unchecked_codes(value: Diagnosis) -> list[str]:
    return sorted({s.code for s in value.skipped} - set(value.checked))


def _ranges(codes: Iterable[str]) -> list[str]:
    """``BN101, BN301–BN304``: three and more in a row are told by the first and the last."""
    runs: list[list[str]] = []
    for code in sorted(codes):
        last = runs[-1][-1] if runs else ""
        follows = code[2:].isdigit() and last[2:].isdigit() and int(code[2:]) == int(last[2:]) + 1
        if not follows:
            runs.append([])
        runs[-1].append(code)
    return [part for run in runs for part in ([f"{run[0]}–{run[-1]}"] if len(run) > 2 else run)]


def _in_python(reason: str) -> str:
    return re.sub(r" \(on the command line: [^)]*\)", "", reason)
