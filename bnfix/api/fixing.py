"""What a diagnosis asks for, done: fixes that are exact, and with data those that need data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bnfix.api.asked import Progress, silent
from bnfix.errors import BnfixError
from bnfix.types import Diagnosis, Edit, Finding, Fix, Mended, Recalibration, Refusal, Safety

if TYPE_CHECKING:
    from torch import nn

    from bnfix.running.call import Forward

ROUNDS = 3
"""A fix may bring another finding to light: norms taken apart want statistics of their own."""
_MENDS = ("set", "float", "reset")
_RESULTS = ("unshare",)
_ORDER = (*_MENDS, *_RESULTS, "recalibrate")
"""Statistics come last: they are those of the model as it will be."""


@dataclass(frozen=True)
class Fixing:
    """What fixes may use and where they go.

    ``data`` is what a training loop iterates over, once more for each recalibration. ``whole``: the model goes where
    all of it is kept, and not its tensors alone. ``example`` is as for ``fold``.
    """

    example: Any = None
    data: Callable[[], Iterable[Any]] | None = None
    whole: bool = True
    forward: Forward | None = None
    mask: Any = None
    max_samples: int | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Fixed:
    """The mended model, the report on it, and the recipe by which its weights can be loaded again (empty: as ever)."""

    model: nn.Module
    report: Mended
    recipe: Mapping[str, Any] = field(default_factory=dict)


def fix(
    model: nn.Module, check: Callable[[nn.Module], Diagnosis], how: Fixing, progress: Progress | None = None
) -> Fixed:
    """Apply what heals the findings of ``check`` and check again: changes ``model``, or returns a copy of it.

    Only fixes that are exact, and with data those that need data: nothing that needs training is ever applied. A fix
    that fails leaves the model as it was before it, and stands among the refusals.
    """
    before = diagnosis = check(model)
    edits: list[Edit] = []
    refused: dict[str, set[str]] = {}
    recipe: Mapping[str, Any] = {}
    tried: set[str] = set()
    for _ in range(ROUNDS):
        done: list[Edit] = []
        for codes, one in _wanted(diagnosis.findings):
            reason = refusal_of(one, how) or _clash(one, recipe)
            if not reason and _key(one) not in tried:
                tried.add(_key(one))
                (progress or silent)(f"{one.verb}: {one.title}")
                try:
                    model, changed, made = _apply(model, one, how, progress)
                except BnfixError as error:
                    reason = error.message
                else:
                    done += changed
                    recipe = made or recipe
            if reason:
                refused.setdefault(reason, set()).update(codes)
        if not done:
            break
        edits += done
        diagnosis = check(model)
    left = {f.code for f in diagnosis.findings}
    refusals = [Refusal(", ".join(sorted(codes & left)), why) for why, codes in refused.items() if codes & left]
    return Fixed(model, Mended(tuple(edits), diagnosis, before, tuple(refusals), how.dry_run), recipe)


def _wanted(findings: Iterable[Finding]) -> list[tuple[set[str], Fix]]:
    """The fixes in the order in which they are done, those that one call does together as one, with their rules."""
    merged: dict[str, tuple[set[str], Fix]] = {}
    for finding in findings:
        if finding.fix is None:
            continue
        alike = finding.fix.verb in (*_RESULTS, "recalibrate")
        key = repr((finding.fix.verb, finding.fix.safety, finding.fix.options)) if alike else _key(finding.fix)
        codes, one = merged.setdefault(key, (set(), finding.fix))
        sites = dict.fromkeys((*one.sites, *finding.fix.sites))
        merged[key] = (codes | {finding.code}, replace(one, sites=tuple(sites)))
    resets = [codes for codes, one in merged.values() if one.verb == "reset" and one.safety is Safety.NEEDS_DATA]
    fresh = {code for codes in resets for code in codes}
    if fresh and not any(one.verb == "recalibrate" for _, one in merged.values()):
        anew = Fix("recalibrate", "measure the new statistics", safety=Safety.NEEDS_DATA)
        merged["recalibrate"] = (fresh, anew)
    rank = {verb: n for n, verb in enumerate(_ORDER)}
    return sorted(merged.values(), key=lambda pair: rank.get(pair[1].verb, len(rank)))


def refusal_of(fix: Fix, how: Fixing) -> str:
    """Why a fix is not applied; empty where it is."""
    if fix.safety is Safety.NEEDS_TRAINING:
        return f"it takes training: {fix.title}"
    if fix.verb not in _ORDER:
        return f"it takes {'your own code' if fix.verb == 'code' else f'bnfix {fix.verb}'}: {fix.title}"
    if fix.safety is Safety.NEEDS_DATA and how.data is None:
        return "it needs data"
    if fix.verb in _MENDS and not how.whole:
        return f"the code that builds the model sets that, a file of weights does not: {fix.title}"
    return ""


def python_line(fix: Fix) -> str:
    """The fix as a line of Python; empty where there is none."""
    if fix.verb == "recalibrate":
        return f"bnfix.recalibrate(model, data{_arguments(fix.options)})"
    if fix.verb in (*_RESULTS, "fold", "swap"):
        given = ", data=data" if fix.verb == "swap" else ", example"
        return f"model = bnfix.{fix.verb}(model{given}{_arguments(fix.options)}).model"
    where = [f"model.get_submodule({_path(s)!r})" for s in fix.sites]
    if fix.verb == "set" and len(where) == 1:
        return "; ".join(f"{where[0]}.{name} = {value!r}" for name, value in fix.options.items())
    if fix.verb == "float" and len(where) == 1:
        return f"{where[0]}.float()"
    return ""


def with_lines(diagnosis: Diagnosis, line: Callable[[Finding, Fix], str]) -> Diagnosis:
    """``diagnosis`` with what to type for each fix."""
    return replace(
        diagnosis,
        findings=tuple(
            f if f.fix is None else replace(f, fix=replace(f.fix, line=line(f, f.fix))) for f in diagnosis.findings
        ),
    )


def _apply(
    model: nn.Module, fix: Fix, how: Fixing, progress: Progress | None
) -> tuple[nn.Module, tuple[Edit, ...], Mapping[str, Any]]:
    """The model afterwards, what was changed, and its recipe where it has another form."""
    from bnfix import api

    if fix.verb in _MENDS:
        from bnfix.graph.mending import mend

        try:
            return model, mend(model, fix), {}
        except ValueError as error:
            raise BnfixError(str(error)) from error
    if fix.verb == "recalibrate":
        assert how.data is not None
        report = api.recalibrate(
            model,
            how.data(),
            forward=how.forward,
            mask=how.mask,
            max_samples=how.max_samples,
            progress=progress,
            **fix.options,
        )
        return model, _moved(report), {}
    data = how.data() if how.data is not None and how.example is None else None
    sites = fix.sites or None
    result = api.unshare(model, how.example, sites, data=data, forward=how.forward, progress=progress, **fix.options)
    return result.model or model, result.edits, result.recipe


def _clash(fix: Fix, recipe: Mapping[str, Any]) -> str:
    """Two changes of form can't be written into one recipe."""
    if fix.verb in _RESULTS and recipe:
        return f"one change of the model's form at a time: fix it in another run ({fix.title})"
    return ""


def _moved(report: Recalibration) -> tuple[Edit, ...]:
    from bnfix.render.numbers import figure

    if not report.changed:
        return ()
    return tuple(
        Edit("recalibrate", s.name, "", f"mean moved by {figure(s.mean_shift)} σ, variance × {figure(s.var_ratio)}")
        for s in report.layers
    )


def _key(fix: Fix) -> str:
    if fix.verb == "recalibrate":  # one does it for all norms
        return "recalibrate"
    return repr((fix.verb, sorted(fix.sites), sorted(fix.options.items(), key=str)))


def _arguments(options: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in options.items())


def _path(site: str) -> str:
    return site.partition("@")[0].removeprefix("(root)")
