"""What ``check`` and ``watch`` return: findings with their evidence and their fix, and what was not checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from bnfix.types.results import Edit, Refusal
from bnfix.types.values import Value

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""The worst first."""


class Safety(str, Enum):
    """What a fix costs. ``EXACT`` ones change no output in evaluation mode beyond rounding, or only what is broken."""

    EXACT = "exact"
    NEEDS_DATA = "needs data"
    NEEDS_TRAINING = "needs training"


@dataclass(frozen=True)
class Fix(Value):
    """What would heal a finding.

    ``verb`` is the function of bnfix that does it (``recalibrate``, ``unshare``, ``swap``, ``fold``, ``joint``), or
    ``set`` (attributes, in ``options``), ``float`` (statistics in float32), or ``code`` where only the user's own code
    can do it: then ``title`` says how. ``sites`` are module paths, ``options`` the arguments. ``line`` is what to type:
    of Python, or of a shell where the command line was asked. Whoever was asked fills it in; a rule leaves it empty.
    """

    verb: str
    title: str
    sites: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    safety: Safety = Safety.NEEDS_TRAINING
    line: str = ""


@dataclass(frozen=True)
class Finding(Value):
    """Something that a rule found: what, where, how it was measured, and what heals it.

    ``sites`` are module paths (or call sites such as ``head.bn@1``), the worst first; ``message`` is one sentence with
    the figures in it; ``measured`` holds the same figures for programs, with the limit each was held against.
    """

    code: str
    name: str
    severity: Severity
    message: str
    sites: tuple[str, ...] = ()
    fix: Fix | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """What makes it the same finding in another run: its code and where it is."""
        return self.code, self.sites


@dataclass(frozen=True)
class Skipped(Value):
    """A rule that was not checked, or not everywhere: why, and what it ``needs`` (``--data``, ``example=`` …)."""

    code: str
    reason: str
    needs: str = ""
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis(Value):
    """What was found, what was checked, what was not.

    ``checked`` are the codes of the rules that ran to their end, ``skipped`` those that could not (a rule may be in
    both: checked here, not there). ``ignored`` are findings that the user's own configuration, an inline
    ``bnfix_ignore`` or a baseline took out. ``seen`` says what the evidence was (samples, batches, steps, signatures).
    """

    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...] = ()
    checked: tuple[str, ...] = ()
    ignored: tuple[Finding, ...] = ()
    norms: int = 0
    seen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """No error and no warning; what was not checked stands in ``skipped``."""
        return not any(f.severity in ("error", "warning") for f in self.findings)

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of one severity."""
        return tuple(f for f in self.findings if f.severity == severity)

    def by_code(self, code: str) -> tuple[Finding, ...]:
        """The findings of one rule, or of a family: ``BN2`` takes in all that begin so."""
        return tuple(f for f in self.findings if f.code.startswith(code))


@dataclass(frozen=True)
class Mended(Value):
    """What ``check --fix`` did, and what is left.

    ``edits`` holds every norm that changed, with what it was and is; ``refusals`` the fixes that were not applied, by
    the code of their rule, and why. ``before`` is what was found first, ``diagnosis`` what a second check found on the
    mended model. ``dry_run``: nothing was written, this is what would be.
    """

    edits: tuple[Edit, ...]
    diagnosis: Diagnosis
    before: Diagnosis
    refusals: tuple[Refusal, ...] = ()
    dry_run: bool = False

    @property
    def fixed(self) -> tuple[Finding, ...]:
        """What was found before and is gone: no finding of that rule is left at any of its sites."""
        left = {(f.code, site) for f in self.diagnosis.findings for site in f.sites or ("",)}
        return tuple(f for f in self.before.findings if left.isdisjoint((f.code, s) for s in f.sites or ("",)))
