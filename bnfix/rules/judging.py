"""All rules over one body of evidence: which run, which can't, what comes out."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from bnfix.registry import plugins
from bnfix.rules import codes
from bnfix.rules.rule import NEEDS, Rule
from bnfix.types import SEVERITIES, Diagnosis, Evidence, Finding, NormState, Skipped


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
        if _named(rule.code, self.ignore) or (self.loop and "loop" not in (*rule.needs, *rule.also)):
            return False
        return _named(rule.code, self.select) if self.select else not rule.optional


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


def unknown_codes(asked: Iterable[str]) -> tuple[str, ...]:
    """Those of ``asked``, codes or their beginnings, that fit no rule."""
    known = [r.code for r in all_rules()]
    return tuple(dict.fromkeys(a for a in asked if not any(_named(k, (a,)) for k in known)))


def near_codes(asked: str, most: int = 3) -> tuple[str, ...]:
    """The codes and names of rules that ``asked`` may have been meant as, the nearest first; none is no guess."""
    wanted = asked.strip()
    spelled = {word.lower(): r for r in all_rules() for word in (r.code, r.name)}
    close = difflib.get_close_matches(wanted.lower(), spelled, n=most, cutoff=0.6)
    found = [r for r in all_rules() if len(wanted) > 2 and wanted.lower() in r.name]
    return tuple(dict.fromkeys(f"{r.code} {r.name}" for r in [*(spelled[c] for c in close), *found]))[:most]


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
        if missing and all(getattr(evidence, part) is None for part in rule.also):
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
    findings.sort(key=_order(findings))
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


def _order(findings: Iterable[Finding]) -> Callable[[Finding], tuple[int, str, bool, str]]:
    """The worst first, then by code; a finding that another one explains comes behind that one."""
    behind = {rule.code: rule.behind for rule in all_rules()}
    there = {(f.severity, f.code) for f in findings}

    def key(finding: Finding) -> tuple[int, str, bool, str]:
        why = [c for c in behind.get(finding.code, ()) if (finding.severity, c) in there]
        return SEVERITIES.index(finding.severity), max((finding.code, *why)), bool(why), finding.code

    return key


def _sifted(findings: list[Finding], chosen: Selection, evidence: Evidence) -> tuple[list[Finding], list[Finding]]:
    """Findings that stay, and what the user has ignored: whole ones, or the ignored part of one that stays."""
    layers = {p or "(root)": n for n in evidence.norms or () for p in n.paths}
    kept: list[Finding] = []
    ignored: list[Finding] = []
    for finding in findings:
        out = tuple(s for s in finding.sites if _ignored(finding.code, s, chosen, layers))
        if not out:
            kept.append(finding)
            continue
        ignored.append(_at(finding, out))
        if len(out) < len(finding.sites):
            kept.append(_at(finding, tuple(s for s in finding.sites if s not in out)))
    return kept, ignored


def _at(finding: Finding, sites: tuple[str, ...]) -> Finding:
    """The part of a finding that is about ``sites``; its message says so, since its figures are those of the whole."""
    if len(sites) == len(finding.sites):
        return finding
    paths = {_path(s) for s in sites}
    fix = finding.fix
    if fix is not None and fix.sites:
        fix = replace(fix, sites=tuple(s for s in fix.sites if _path(s) in paths))
    said = f"{finding.message} ({len(finding.sites) - len(sites)} of the {len(finding.sites)} sites left out)"
    return replace(finding, sites=sites, fix=fix, message=said)


def _path(site: str) -> str:
    """The module path of a call site: ``head.bn`` for ``head.bn@1``."""
    return site.partition("@")[0] or "(root)"


def _ignored(code: str, site: str, chosen: Selection, layers: Mapping[str, NormState]) -> bool:
    """Whether the layer at ``site`` says so itself, or a pattern fits one of its names."""
    layer = layers.get(_path(site))
    if layer is not None and _named(code, layer.ignore):
        return True
    names = [p or "(root)" for p in layer.paths] if layer is not None else [_path(site)]
    fits = (codes_ for p, codes_ in chosen.by_site.items() if any(fnmatch.fnmatchcase(n, p) for n in names))
    return any(_named(code, codes_) for codes_ in fits)
