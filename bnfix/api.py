"""One short function per verb; the verbs are the public names. Here, and only here, rooms of one floor meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bnfix.folding import Folded, PlannedFold
    from bnfix.running import Call
    from bnfix.running.call import Forward
    from bnfix.types import Edit, Facts, FileInfo, Parity, Refusal, Result

Progress = Callable[[str], None]


def fold(
    model: nn.Module,
    example: Any = None,
    *,
    data: Iterable[Any] | None = None,
    forward: Forward | None = None,
    verify: bool = True,
    k: float = 8.0,
    inplace: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Fold norms into the layers that feed them: returns a changed copy, ``model`` itself stays as it is.

    Every norm is either folded or comes back with the reason why not. Weights are computed in float64
    and rounded once; the result is traced again, each stored number is checked against its exact
    value, and the outputs are compared with the float64 model. A fold that fails its proof is undone
    and reported as a refusal marked ``defect``. Folded models are for inference.

    Args:
        model: in evaluation mode (a norm in training mode is refused, not folded).
        example: what the model is called with: a tensor, a tuple of positional arguments, a dict of keyword
            arguments or a ``bnfix.Call``; a list of these for several signatures. Facts and proof
            hold for these signatures. None: the first batch of ``data``, else deduced from the layers (see ``notes``).
        data: what a training loop would iterate over.
        forward: ``forward(model, batch)`` where the model isn't simply called with the batch.
        verify: False leaves out the comparison of outputs (not the check of weights and of the trace).
        k: the outputs may be ``k`` times the model's own rounding noise away from the float64 model.
        inplace: change ``model`` itself, only after everything was proven on a copy.
        dry_run: plan only; ``Result.model`` is None.
        progress: called with a line before each step.

    Raises:
        PassError: the forward fails on the example.
        TraceError: the model can't be copied or traced faithfully; the message says why.
    """
    from bnfix import folding
    from bnfix.graph import Surgeon, gather, unwrap
    from bnfix.types import Result

    say = progress or _silent
    model, notes = unwrap(model)
    calls, assumed = _calls(model, example, data, forward)
    notes = (*notes, *assumed)
    say(f"tracing {', '.join(c.signature for c in calls)}")
    facts = gather(model, calls)
    plan = folding.plan(facts)
    signatures = tuple(c.signature for c in calls)
    if dry_run:
        folded = folding.compute(facts, plan.folds)
        edits = tuple(folding.edit(f, ()) for f in folded.folds)
        return Result(None, edits, (*plan.refusals, *folded.refusals), None, facts.source, signatures, notes, dry_run=True)
    proof = _FoldProof(model, calls, facts, verify, k, say)
    folds = folding.isolate(plan.folds, proof.holds)
    best = proof.of(folds)
    undone = proof.undone(plan.folds, folds, best.folded)
    result_model = best.model
    if inplace:
        folding.operate(facts, best.folded, Surgeon())
        result_model = model
    return Result(
        model=result_model,
        edits=best.edits,
        refusals=_in_order(facts, (*plan.refusals, *best.folded.refusals, *undone)),
        parity=best.parity,
        source=facts.source,
        signatures=signatures,
        notes=notes,
        recipe=folding.recipe(facts, best.folded),
    )


@dataclass(frozen=True)
class _Attempt:
    """One choice of folds, carried out on a copy and judged. ``failure`` is empty where all of the proof holds."""

    model: nn.Module
    folded: Folded
    edits: tuple[Edit, ...]
    parity: Parity | None
    failure: str


class _FoldProof:
    """Carries out folds on copies and judges them: weights, trace, and outputs at each site and at the end."""

    def __init__(
        self, model: nn.Module, calls: Sequence[Call], facts: Facts, verify: bool, k: float, say: Progress
    ) -> None:
        self.model, self.calls, self.facts, self.verify, self.k, self.say = model, calls, facts, verify, k, say
        self._references: list[Any] | None = None
        self._attempts: dict[tuple[str, ...], _Attempt] = {}

    def holds(self, folds: Sequence[PlannedFold]) -> bool:
        """Whether these folds together pass."""
        return not self.of(folds).failure

    def of(self, folds: Sequence[PlannedFold]) -> _Attempt:
        """The attempt at these folds; made once."""
        key = tuple(f.norm.path for f in folds)
        if key not in self._attempts:
            self._attempts = {k: a for k, a in self._attempts.items() if not a.failure}  # drop failed copies
            self._attempts[key] = self._attempt(folds)
        return self._attempts[key]

    def undone(
        self, planned: Sequence[PlannedFold], kept: Sequence[PlannedFold], folded: Folded
    ) -> tuple[Refusal, ...]:
        """The folds that the proof threw out, each with what was found when it was tried alone with the good ones."""
        from bnfix.types import Refusal

        settled = {f.norm.path for f in kept} | {r.site for r in folded.refusals}
        refusals = []
        for fold_ in planned:
            if fold_.norm.path not in settled:
                found = self.of([f for f in planned if f in kept or f is fold_]).failure
                reason = f"planned, but thrown out by its proof and undone: {found}"
                refusals.append(Refusal(fold_.norm.path, reason, defect=True))
        return tuple(refusals)

    def _attempt(self, folds: Sequence[PlannedFold]) -> _Attempt:
        from bnfix import folding
        from bnfix.errors import BnfixError
        from bnfix.graph import Surgeon, copy_model, gather

        self.say(f"folding {len(folds)} norms")
        copy, memo = copy_model(self.model)
        folded = folding.compute(self.facts, folds)
        try:
            edits = folding.operate(self.facts, folded, Surgeon(memo))
            after = gather(copy, self.calls, held=False) if folded.folds else self.facts
        except BnfixError as error:  # the changed copy can't be operated on or traced: this choice of folds is wrong
            return _Attempt(copy, folded, (), None, error.message)
        errors = folding.weight_errors(self.facts, folded, after)
        failure = folding.worst_weight(self.facts, folded, errors) or (
            folding.structure_differs(self.facts, after, folded) if folded.folds else None
        )
        edits = tuple(replace(e, ulp=errors.get(e.site)) for e in edits)
        if failure or not self.verify:
            return _Attempt(copy, folded, edits, None, failure or "")
        return self._compare(copy, folded, edits)

    def _compare(self, copy: nn.Module, folded: Folded, edits: tuple[Edit, ...]) -> _Attempt:
        from bnfix import parity

        named = dict(copy.named_modules())
        sites = [e.site for e in edits if e.site in named]
        if self._references is None:
            from bnfix.graph import copy_model

            self.say("measuring the model's own rounding noise against float64")
            original, _ = copy_model(self.model, isolate=True)
            self._references = parity.references(original, self.calls, sites=sites)
        self.say("proving the folds")
        runs = [parity.record(copy, call, sites) for call in self.calls]
        compared = parity.compare(self._references, runs, k=self.k, candidate="the folded model")
        at_sites = {o.name: o for o in parity.compare_sites(self._references, runs, dict(zip(sites, sites)), k=self.k)}
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
        edits = tuple(replace(e, noise_ratio=ratios.get(e.site)) for e in edits)
        return _Attempt(copy, folded, edits, compared, failure)


def _calls(
    model: nn.Module, example: Any, data: Iterable[Any] | None, forward: Forward | None
) -> tuple[list[Call], tuple[str, ...]]:
    """The examples as calls, and what was assumed where none was given."""
    from bnfix.running import as_call, batch_call, guess_call

    if isinstance(example, list):
        if not example:
            raise ValueError("the list of examples is empty")
        return [as_call(e, forward) for e in example], ()
    if example is not None:
        return [as_call(example, forward)], ()
    if data is not None:
        batch = next(iter(data), None)
        if batch is None:
            raise ValueError("data holds no batch")
        return [batch_call(batch, model, forward)], ()
    call = guess_call(model)
    return [call], (f"no example was given: traced on a random {call.signature}, as its first layers take it",)


def _in_order(facts: Facts, refusals: Iterable[Refusal]) -> tuple[Refusal, ...]:
    order = {n.path: i for i, n in enumerate(facts.norms)}
    return tuple(sorted(refusals, key=lambda r: order.get(r.site, len(order))))


def _silent(_: str) -> None:
    """Progress that nobody asked for."""
