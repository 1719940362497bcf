"""Findings that a project knows of and lives with: those of an earlier JSON report are told no more."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bnfix.errors import BnfixError
from bnfix.types import SEVERITIES, Diagnosis, Finding

HOW = "bnfix check … --output-format json > report.json"


@dataclass(frozen=True)
class Baseline:
    """What was known of one model, as (code, sites, rank of the severity: 0 is an error)."""

    known: tuple[tuple[str, frozenset[str], int], ...]
    source: str = "the baseline"

    def knows(self, finding: Finding) -> bool:
        """Whether it was there before: the same code at the same sites or fewer, and no worse than it was."""
        rank = SEVERITIES.index(finding.severity)
        sites = frozenset(finding.sites)
        return any(code == finding.code and rank >= was and _within(sites, old) for code, old, was in self.known)

    def without_known(self, diagnosis: Diagnosis) -> Diagnosis:
        """``diagnosis`` with the known findings among ``ignored``, and a note that counts them."""
        known = tuple(f for f in diagnosis.findings if self.knows(f))
        if not known:
            return diagnosis
        told = "1 finding" if len(known) == 1 else f"{len(known)} findings"
        return replace(
            diagnosis,
            findings=tuple(f for f in diagnosis.findings if f not in known),
            ignored=(*diagnosis.ignored, *known),
            notes=(*diagnosis.notes, f"{told} known from {self.source}, not told again"),
        )


def read_baseline(source: str | os.PathLike[str] | Diagnosis, subject: str = "") -> Baseline:
    """What was known, out of an earlier diagnosis or the JSON file that ``bnfix check`` wrote.

    Findings that the earlier report left out itself are known too: a baseline may be written with a baseline. Of a
    report on several models, that on ``subject``; what it does not speak of has nothing that is known.

    Raises:
        BnfixError: the file can't be read, or is no such report.
    """
    if isinstance(source, Diagnosis):
        return Baseline(_keys([*source.findings, *source.ignored]))
    shown = os.fspath(source)
    document = _read(shown)
    several = document.get("type") == "list"
    reports = document.get("values") if several else [document]
    if not isinstance(reports, list) or not all(isinstance(r, Mapping) for r in reports):
        raise _not_one(shown, document)
    diagnoses = [d for d in map(_diagnosis, reports) if d is not None]
    if not diagnoses:
        raise _not_one(shown, document)
    if several:
        diagnoses = [d for d in diagnoses if d[1] == subject]
    known = [f for report, _ in diagnoses for part in ("findings", "ignored") for f in report.get(part) or ()]
    try:
        return Baseline(_keys([_finding(f) for f in known]), shown)
    except (TypeError, KeyError, AttributeError) as error:
        raise _not_one(shown, document) from error


def _within(sites: frozenset[str], old: frozenset[str]) -> bool:
    """A finding about the model as a whole has no sites, and is not known because one about some layers was."""
    return sites <= old if sites else not old


def _keys(findings: Iterable[Finding]) -> tuple[tuple[str, frozenset[str], int], ...]:
    return tuple((f.code, frozenset(f.sites), SEVERITIES.index(f.severity)) for f in findings)


def _diagnosis(report: Mapping[str, Any]) -> tuple[Mapping[str, Any], str] | None:
    """The diagnosis in a report, what was found before where something was mended; and what it is about."""
    run = report.get("run")
    subject = str(run.get("subject", "")) if isinstance(run, Mapping) else ""
    if report.get("type") == "Mended" and isinstance(report.get("diagnosis"), Mapping):
        report = report["diagnosis"]
    elif report.get("type") != "Diagnosis":
        return None
    return (report, subject) if isinstance(report.get("findings"), list) else None


def _finding(entry: Mapping[str, Any]) -> Finding:
    severity = entry["severity"]
    if severity not in SEVERITIES:
        raise TypeError(f"no severity {severity!r}")
    return Finding(str(entry["code"]), str(entry.get("name", "")), severity, "", tuple(map(str, entry["sites"])))


def _read(path: str) -> Mapping[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise BnfixError(f"the baseline {path} can't be read: {error.strerror}", hint=f"write one:   {HOW}") from error
    except (ValueError, RecursionError) as error:
        raise BnfixError(f"the baseline {path} is no JSON: {error}", hint=f"write one:   {HOW}") from error
    if not isinstance(document, Mapping):
        raise _not_one(path, {})
    return document


def _not_one(path: str, document: Mapping[str, Any]) -> BnfixError:
    kind = f" (it says type {document['type']!r})" if isinstance(document.get("type"), str) else ""
    return BnfixError(f"the baseline {path} is no report of bnfix check{kind}", hint=f"write one:   {HOW}")
