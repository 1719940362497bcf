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
_RESULTS = ("unshare", "fold")
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
    refused: dict[tuple[str, str], Refusal] = {}
    recipe: Mapping[str, Any] = {}
    tried: set[str] = set()
    for _ in range(ROUNDS):
        wanted = [(f, f.fix) for f in diagnosis.findings if f.fix is not None]
        reasons = {id(x): refusal_of(x, how) or _clash(x, recipe) for _, x in wanted}
        for finding, one in wanted:
            reason = reasons[id(one)]
            if reason:
                refused.setdefault((finding.code, reason), Refusal(finding.code, reason))
        todo = [(f, x) for f, x in wanted if not reasons[id(x)] and _key(x) not in tried]
        done: list[Edit] = []
        for finding, one in sorted(todo, key=lambda pair: _ORDER.index(pair[1].verb)):
            if _key(one) in tried or _clash(one, recipe):
                continue
            tried.add(_key(one))
            (progress or silent)(f"{one.verb}: {one.title}")
            try:
                model, changed, made = _apply(model, one, how, progress)
            except BnfixError as error:
                refused.setdefault((finding.code, error.message), Refusal(finding.code, error.message))
                continue
            done += changed
            recipe = made or recipe
        if not done:
            break
        edits += done
        diagnosis = check(model)
    left = {f.code for f in diagnosis.findings}
    refusals = tuple(r for r in refused.values() if r.site in left)
    return Fixed(model, Mended(tuple(edits), diagnosis, before, refusals, how.dry_run), recipe)


def refusal_of(fix: Fix, how: Fixing) -> str:
    """Why a fix is not applied; empty where it is."""
    if fix.safety is Safety.NEEDS_TRAINING:
        return f"it takes training: {fix.title}"
    if fix.verb not in _ORDER:
        return f"it takes your own code: {fix.title}"
    if fix.verb == "recalibrate" and how.data is None:
        return "it needs data"
    if fix.verb in _MENDS and fix.verb != "reset" and not how.whole:
        kept = "the dtype of a norm is" if fix.verb == "float" else f"{' and '.join(fix.options)} is"
        return f"{kept} set by the code that builds the model, a file of weights does not hold it: {fix.title}"
    return ""


def python_line(fix: Fix) -> str:
    """The fix as a line of Python; empty where there is none."""
    if fix.verb == "recalibrate":
        return f"bnfix.recalibrate(model, data{_arguments(fix.options)})"
    if fix.verb in (*_RESULTS, "swap"):
        given = "" if fix.verb == "swap" else ", example"
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
    result = getattr(api, fix.verb)(model, how.example, **fix.options)
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
