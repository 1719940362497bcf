"""The proof of a fold, where folding and parity meet: folds carried out on copies, judged, and narrowed down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from bnfix import folding, parity
from bnfix.errors import BnfixError, PassError, TraceError
from bnfix.folding import Folded, PlannedFold
from bnfix.graph import Surgeon, copy_model, gather
from bnfix.graph.routes import Held, hold
from bnfix.graph.sources.decisions import Tape
from bnfix.parity.compare import overall
from bnfix.running import Call
from bnfix.types import Edit, Facts, OutputParity, Parity, Refusal

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Attempt:
    """One choice of folds, carried out on a copy and judged. ``failure`` is empty where all of the proof holds.

    ``model`` is None after a failure.
    """

    model: nn.Module | None
    folded: Folded
    edits: tuple[Edit, ...]
    parity: Parity | None
    failure: str
    defect: bool = True
    """Whether a failure is bnfix's own, and not that the model's forward needs the norm to be there."""


class FoldProof:
    """Carries out folds on copies and judges them: weights, trace, and outputs at each site and at the end."""

    def __init__(
        self, model: nn.Module, calls: Sequence[Call], facts: Facts, verify: bool, k: float, say: Progress
    ) -> None:
        self.model, self.calls, self.facts, self.verify, self.k, self.say = model, calls, facts, verify, k, say
        self._references: list[Any] | None = None
        self._lost = ""
        self._attempts: dict[tuple[str, ...], Attempt] = {}
        self._blame: dict[str, tuple[str, bool]] = {}

    def holds(self, folds: Sequence[PlannedFold]) -> bool:
        """Whether these folds together pass."""
        return not self.of(folds).failure

    def narrowed(self, folds: Sequence[PlannedFold]) -> list[PlannedFold]:
        """Those of ``folds`` that pass together, found by halving.

        Raises:
            TraceError: even the copy in which nothing is folded doesn't pass: nothing can be proven of this model.
        """
        if self.holds(folds):
            return list(folds)
        if not self.holds(()):
            raise TraceError(
                f"the model does not do the same twice: {self.of(()).failure}",
                hint="its forward depends on state that changes from run to run: nothing was folded",
            )
        return folding.isolate(folds, self._holds_or_blames)

    def _holds_or_blames(self, folds: Sequence[PlannedFold]) -> bool:
        """As :meth:`holds`; a failure is remembered against the fold that came last, which in the end is one alone."""
        attempt = self.of(folds)
        if attempt.failure:
            self._blame[folds[-1].norm.path] = (attempt.failure, attempt.defect)
        return not attempt.failure

    def of(self, folds: Sequence[PlannedFold]) -> Attempt:
        """The attempt at these folds; made once."""
        key = tuple(f.norm.path for f in folds)
        if key not in self._attempts:
            attempt = self._attempt(folds)
            if attempt.failure:
                attempt = replace(attempt, model=None)
            else:  # one good copy is enough: the last, which holds most
                self._attempts = {k: a for k, a in self._attempts.items() if a.failure}
            self._attempts[key] = attempt
        return self._attempts[key]

    def undone(
        self, planned: Sequence[PlannedFold], kept: Sequence[PlannedFold], folded: Folded
    ) -> tuple[Refusal, ...]:
        """The folds that the proof threw out, each with what was found when it was tried with the good ones."""
        settled = {f.norm.path for f in kept} | {r.site for r in folded.refusals}
        refusals = []
        for one in planned:
            if one.norm.path in settled:
                continue
            failure, defect = self._blame.get(one.norm.path, ("", False))
            if not failure:
                reason = "planned, but not tried: too many other folds of this model failed their proof"
            elif defect:
                reason = f"planned, but thrown out by its proof and undone: {failure}"
            else:
                reason = f"the model needs it to be there: {failure}"
            refusals.append(one.refused(reason, defect=defect))
        return tuple(refusals)

    def with_affines(self, best: Attempt, left: Sequence[Refusal]) -> Attempt:
        """``best``, and in place of the norms ``left`` one multiply-add per channel each, as far as that is proven."""

        def attempt(part: Sequence[Refusal]) -> Attempt:
            self.say(f"leaving {len(part)} norms as affines")
            copy, memo = copy_model(self.model)
            edits = folding.operate(self.facts, best.folded, Surgeon(memo))
            known = {e.site: e for e in best.edits}
            edits = tuple(known.get(e.site, e) for e in edits) + folding.as_affines(self.facts, part, Surgeon(memo))
            if not self.verify or not self.calls:
                return Attempt(copy, best.folded, edits, None, "")
            return self._compare(copy, best.folded, edits)

        made: dict[int, Attempt] = {}

        def holds(part: Sequence[Refusal]) -> bool:
            found = attempt(part)
            if not found.failure:
                made[len(part)] = found  # parts that hold only grow
            return not found.failure

        good = folding.isolate(left, holds)
        return made[len(good)] if good else best

    def _attempt(self, folds: Sequence[PlannedFold]) -> Attempt:
        self.say(f"folding {len(folds)} norms" if folds else "nothing to fold: holding the model against itself")
        copy, memo = copy_model(self.model)
        folded = folding.compute(self.facts, folds)
        try:
            edits = folding.operate(self.facts, folded, Surgeon(memo))
            after = gather(copy, self.calls, like=self.facts)
        except BnfixError as error:  # the changed copy can't be operated on or traced: this choice of folds is wrong
            return Attempt(copy, folded, (), None, f"without it {error.message}", defect=False)
        errors = folding.weight_errors(self.facts, folded, after)
        failure = folding.worst_weight(self.facts, folded, errors) or folding.structure_differs(
            self.facts, after, folded
        )
        edits = tuple(replace(e, ulp=errors.get(e.site)) for e in edits)
        if failure or not self.verify or not self.calls:
            return Attempt(copy, folded, edits, None, failure or "")
        return self._compare(copy, folded, edits)

    def _compare(self, copy: nn.Module, folded: Folded, edits: tuple[Edit, ...]) -> Attempt:
        named = dict(copy.named_modules())
        shown = {e.site: _shown_at(e.site, folded) & named.keys() for e in edits}
        sites = sorted(set().union(*shown.values()))
        if self._references is None:
            self.say("measuring the model's own rounding noise against float64")
            original, _ = copy_model(self.model)
            every = {n.path for n in self.facts.norms if n.path in named} | set(sites)
            calls = hold(self.facts.binding.runs, self.calls)
            self._references = parity.references(original, calls, sites=sorted(every))
            self._lost = next((t.lost for t in _tapes(calls) if t.lost), "")
        self.say("proving the folds")
        private, _ = copy_model(copy)  # a forward may write on itself
        calls = hold(self.facts.binding.runs, self.calls)  # else a box at a threshold would look like an error
        try:
            runs = [parity.record(private, call, sites) for call in calls]
        except PassError as error:  # it ran when it was traced: these decisions are none that fit it
            return Attempt(copy, folded, edits, None, error.message)
        compared = parity.compare(self._references, runs, k=self.k, candidate="the folded model")
        compared = _as_decided(compared, _tapes(calls), self._lost)
        called = {s: s for s in sites if all(r.oracle.sites.get(s) for r in self._references)}
        at_sites = {o.name: o for o in parity.compare_sites(self._references, runs, called, k=self.k)}
        ratios: dict[str, float] = {}
        failure = ""
        for name, output in at_sites.items():
            site = name.partition("@")[0]
            if output.noise_ratio is not None:
                ratios[site] = max(ratios.get(site, 0.0), output.noise_ratio)
            if output.verdict == "failed" and not failure:
                failure = f"at {name}: {output.reason}"
        if compared.verdict == "failed" and not failure:
            worst = next(o for o in compared.outputs if o.verdict == "failed")
            failure = f"output {worst.name}: {worst.reason}"
        compared = _as_proven_at_sites(compared, list(at_sites.values()))
        edits = tuple(
            replace(e, noise_ratio=max((ratios[s] for s in shown[e.site] if s in ratios), default=None)) for e in edits
        )
        return Attempt(copy, folded, edits, compared, failure)


def _shown_at(norm: str, folded: Folded) -> set[str]:
    """The modules that give after the folds what they gave before, and have the norm in it.

    That is the norm's own place; of one that went forward the layers behind it. Where a norm follows that is folded as
    well, there is now the output of both: the last one is compared.
    """
    followed = {name for f in folded.folds if not f.forward for name in f.requires}
    behind = {t.holder for f in folded.folds if not f.forward for t in f.targets}
    planned = next((f for f in folded.folds if f.norm.path == norm), None)
    if planned is not None and planned.forward:
        return {t.holder for t in planned.targets} - behind
    return {norm} - followed


def _tapes(calls: Sequence[Call]) -> list[Tape]:
    return [tape for call in calls if isinstance(call.forward, Held) for tape in call.forward.tapes]


def _as_decided(compared: Parity, tapes: Sequence[Tape], lost: str) -> Parity:
    """``compared``, said what it rests on where the runs were held to the decisions on data of the original's.

    A run that could not be held to them may differ in its outputs without being wrong: then these prove nothing.
    """
    lost = lost or next((t.lost for t in tapes if t.lost), "")
    total, differs = sum(t.total for t in tapes), sum(t.differs for t in tapes)
    if lost:
        reason = f"compared runs that decide differently on their data ({lost})"
        outputs: tuple[OutputParity, ...] = tuple(
            replace(o, verdict="inconclusive", passed=False, reason=f"{reason}: {o.reason}")
            if o.verdict == "failed"
            else o
            for o in compared.outputs
        )
        verdict = overall(outputs)
        return replace(compared, outputs=outputs, verdict=verdict, passed=verdict in ("passed", "warned"))
    if not total:
        return compared
    own = f"in {differs} of them the folded model would decide otherwise" if differs else "the folded model agrees"
    note = f"compared on the model's own decisions on data ({total:,} comparisons, indices and the like): {own}"
    return replace(compared, notes=(*compared.notes, note))


def _as_proven_at_sites(compared: Parity, at_sites: Sequence[OutputParity]) -> Parity:
    """``compared``, and where outputs leave it open (no box was found, say), what was proven all the same."""
    if compared.verdict != "inconclusive" or not all(o.passed for o in at_sites):
        return compared
    worst = max((o.noise_ratio for o in at_sites if o.noise_ratio is not None), default=None)
    if worst is None:
        return compared
    note = f"the values at the {len(at_sites)} places of the folded norms are right, within {worst:.3g} × the noise"
    return replace(compared, notes=(*compared.notes, note))
