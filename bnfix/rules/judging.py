"""All rules over one body of evidence: which run, which can't, what comes out."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

from bnfix.registry import plugins
from bnfix.rules import codes
from bnfix.rules.rule import NEEDS, Rule
from bnfix.types import SEVERITIES, Diagnosis, Evidence, Finding, Skipped


@dataclass(frozen=True)
class Selection:
    """Which rules are wanted: codes or their beginnings (``BN2``). ``by_site``: patterns of paths → codes to ignore.

    Nothing selected means all but the optional ones; ``ignore`` goes before ``select``. ``loop`` keeps to the rules
    whose evidence is a training loop.
    """

    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    by_site: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    loop: bool = False

    def wants(self, rule: Rule) -> bool:
        """Whether a rule runs."""
        if _named(rule.code, self.ignore) or (self.loop and "loop" not in rule.needs):
            return False
        return _named(rule.code, self.select) if self.select else not rule.optional

    def unknown(self) -> tuple[str, ...]:
        """Codes that fit no rule."""
        known = [r.code for r in all_rules()]
        asked = [*self.select, *self.ignore, *(c for codes_ in self.by_site.values() for c in codes_)]
        return tuple(dict.fromkeys(a for a in asked if not any(_named(k, (a,)) for k in known)))


def _named(code: str, names: Iterable[str]) -> bool:
    return any(n and code.startswith(n) for n in names)


@cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule there is, by code; without importing torch."""
    found = plugins(codes.__name__, Rule)  # type: ignore[type-abstract]
    return tuple(sorted(found, key=lambda r: r.code))


def rule_of(code: str) -> Rule | None:
    """The rule with this code or name; None if there is none."""
    wanted = code.strip()
    return next((r for r in all_rules() if wanted.upper() == r.code or wanted.lower() == r.name), None)


def judge(evidence: Evidence, selection: Selection | None = None) -> Diagnosis:
    """Run the rules that are wanted over the evidence; the worst findings first."""
    chosen = selection or Selection()
    findings: list[Finding] = []
    skipped: list[Skipped] = []
    checked: list[str] = []
    for rule in all_rules():
        if not chosen.wants(rule):
            continue
        missing = [part for part in rule.needs if getattr(evidence, part) is None]
        if missing:
            reasons = {"facts": evidence.facts_missing, "data": evidence.data_missing}
            why = reasons.get(missing[0], "") if len(missing) == 1 else ""
            needs = "; ".join(NEEDS[part] for part in missing)
            skipped.append(Skipped(rule.code, why or f"needs {needs}", needs))
            continue
        whole = True
        for said in rule.check(evidence):
            (findings if isinstance(said, Finding) else skipped).append(said)  # type: ignore[arg-type]
            whole = whole and (isinstance(said, Finding) or bool(said.sites))
        if whole:  # what was skipped without a site was skipped everywhere
            checked.append(rule.code)
    findings.sort(key=lambda f: (SEVERITIES.index(f.severity), f.code))
    kept, ignored = _sifted(findings, chosen, evidence)
    return Diagnosis(
        tuple(kept),
        tuple(skipped),
        tuple(checked),
        tuple(ignored),
        len(evidence.norms or ()),
        evidence.seen,
        evidence.notes,
    )


def _sifted(findings: list[Finding], chosen: Selection, evidence: Evidence) -> tuple[list[Finding], list[Finding]]:
    """Findings that stay, and those all of whose sites the user has ignored; a part of the sites may go."""
    inline = {p or "(root)": n.ignore for n in evidence.norms or () for p in n.paths}
    kept: list[Finding] = []
    ignored: list[Finding] = []
    for finding in findings:
        left = [s for s in finding.sites if not _ignored(finding.code, s, chosen, inline)]
        if finding.sites and not left:
            ignored.append(finding)
        else:
            kept.append(finding)
    return kept, ignored


def _ignored(code: str, site: str, chosen: Selection, inline: Mapping[str, frozenset[str]]) -> bool:
    path = site.partition("@")[0]
    if _named(code, inline.get(path, frozenset())):
        return True
    return any(fnmatch.fnmatchcase(path, p) and _named(code, codes_) for p, codes_ in chosen.by_site.items())
