"""``merge_calls``: several calls of one network in a model's own forward become one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import BnfixError, TraceError, one_line
from bnfix.graph import copy_model, find_owners
from bnfix.running import FAILURES, Call
from bnfix.sharing.conditions import Candidate, UnfitError, calls_of, candidates, cast, check, norms_in
from bnfix.sharing.rewritten import Bodies, Body, rewrite
from bnfix.sharing.tracing import merge, trace
from bnfix.sharing.watching import Watched, watch
from bnfix.types import Edit, Refusal

Say = Callable[[str], None]
Proof = Callable[[nn.Module], str]
"""Holds the changed copy against the model; says what is wrong, or nothing."""

DRAWS = "it draws random numbers (dropout): in one call for all they are others than in separate calls"


@dataclass(frozen=True)
class Step:
    """The forward of one module with merged calls in it, and how many updates of which norms are one from now on."""

    caller: str
    bodies: Bodies
    updates: dict[str, int]


@dataclass(frozen=True)
class Merged:
    """What was found and proven. ``model`` is a copy in which ``steps`` were carried out."""

    model: nn.Module
    edits: tuple[Edit, ...]
    refusals: tuple[Refusal, ...]
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()


def merge_calls(
    model: nn.Module, calls: Sequence[Call], sites: str | Iterable[str] | None, *, prove: Proof, say: Say
) -> Merged:
    """Merge the calls of every network with norms in it that a forward calls several times, on a copy of ``model``.

    Args:
        sites: only these networks, by their paths.
        prove: is given the changed copy, and says why its outputs in evaluation mode are not the model's, or nothing.

    Raises:
        PassError: the forward fails on a call.
        TraceError: the model can't be copied.
        ValueError: ``sites`` names what is not called several times.
    """
    say("watching the calls of the model")
    runs = [watch(model, call, training=training) for call in calls for training in (False, True)]
    found = _wanted(candidates(runs), sites)
    refusals: list[Refusal] = []
    edits: list[Edit] = []
    steps: list[Step] = []
    for caller in dict.fromkeys(c.caller for c in found):
        good: list[Candidate] = []
        for one in (c for c in found if c.caller == caller):
            say(f"looking at the calls of {one.site}")
            try:
                check(model, one, runs)
                good.append(one)
            except UnfitError as reason:
                refusals.append(_refused(one, str(reason)))
        kept, step, thrown_out = _rewritten(model, good, calls, runs, steps, prove)
        refusals += [_refused(one, reason) for one, reason in thrown_out]
        steps += [step] if step is not None else []
        edits += [_edit(model, one) for one in kept]
    notes = (DRAWS,) if edits and any(r.draws for r in runs) else ()
    return Merged(carried_out(model, steps), tuple(edits), tuple(refusals), tuple(steps), notes)


def carry_out(model: nn.Module, steps: Sequence[Step]) -> None:
    """Do this to ``model``: in place, all or nothing. k updates become one that reaches as far: m' = 1 − (1 − m)^k.

    Raises:
        TypeError: a class of the model can't be derived from.
    """
    before: list[tuple[Any, str, Any]] = []
    try:
        for step in steps:
            module = model.get_submodule(step.caller)
            before.append((module, "__class__", type(module)))
            rewrite(module, step.bodies)
            for path, count in step.updates.items():
                norm: Any = model.get_submodule(path)
                before.append((norm, "momentum", norm.momentum))
                norm.momentum = joined_momentum(norm.momentum, count)
    except BaseException:
        for target, name, value in reversed(before):
            setattr(target, name, value)
        raise


def carried_out(model: nn.Module, steps: Sequence[Step]) -> nn.Module:
    """A copy of ``model`` in which this is done."""
    copy, _ = copy_model(model)
    carry_out(copy, steps)
    return copy


def joined_momentum(momentum: float, count: int) -> float:
    """Of one update in place of ``count``: what is left of the old statistics is the same."""
    return float(1 - (1 - momentum) ** count)


def _wanted(found: list[Candidate], sites: str | Iterable[str] | None) -> list[Candidate]:
    if sites is None:
        return found
    wanted = {sites} if isinstance(sites, str) else set(sites)
    missing = sorted(wanted - {c.site for c in found})
    if missing:
        known = ", ".join(c.site for c in found) or "there is none in this model"
        raise ValueError(f"{missing[0]!r} is no network with norms that a forward calls several times: {known}")
    return [c for c in found if c.site in wanted]


def _rewritten(
    model: nn.Module,
    good: Sequence[Candidate],
    calls: Sequence[Call],
    runs: Sequence[Watched],
    before: Sequence[Step],
    prove: Proof,
) -> tuple[list[Candidate], Step | None, list[tuple[Candidate, str]]]:
    """The new forward of one caller with all of ``good`` merged in it that pass together, and why others do not."""
    thrown_out: list[tuple[Candidate, str]] = []
    kept: list[Candidate] = []
    step: Step | None = None
    for one in good:
        try:
            attempt = _step(model, [*kept, one], runs)
            failure = _gradients_differ(model, [*before, attempt], calls)
            failure = failure or prove(carried_out(model, [*before, attempt]))
        except BnfixError as error:
            failure = error.message
        except FAILURES as error:
            failure = f"with one call its forward fails: {one_line(error, 160)}"
        if failure:
            thrown_out.append((one, failure))
        else:
            kept, step = [*kept, one], attempt
    return kept, step, thrown_out


def _step(model: nn.Module, chosen: Sequence[Candidate], runs: Sequence[Watched]) -> Step:
    bodies: dict[bool, Body] = {}
    for run in runs:
        for frame, _ in calls_of(run, chosen[0]):
            body = _body(model, chosen, frame.call, run.training)
            if bodies.setdefault(run.training, body) != body:
                raise TraceError("its forward takes different ways on different inputs")
    return Step(chosen[0].caller, bodies, _updates(model, chosen))


def _body(model: nn.Module, chosen: Sequence[Candidate], call: Call, training: bool) -> Body:
    copy, _ = copy_model(model)
    copy.train(training)
    traced = trace(copy.get_submodule(chosen[0].caller), call.private())
    for one in chosen:
        nodes = traced.calls(copy.get_submodule(one.site))
        if len(nodes) != one.count:
            raise TraceError(f"torch.fx sees {len(nodes)} calls of {one.site}, and a run {one.count}")
        traced = replace(traced, graph=merge(traced.graph, nodes))  # its ancestors are looked for anew each time
    return traced.body()


def _updates(model: nn.Module, chosen: Sequence[Candidate]) -> dict[str, int]:
    """The norms that move their statistics with a momentum, and how many updates are to be one."""
    owners = find_owners(model)
    return {
        owners.paths(norm)[0]: one.count
        for one in chosen
        for norm in norms_in(model.get_submodule(one.site))
        if isinstance(getattr(norm, "momentum", None), float)
    }


def _gradients_differ(model: nn.Module, steps: Sequence[Step], calls: Sequence[Call]) -> str:
    """Why the gradients of the changed model are not the model's, in evaluation mode; empty where they are."""
    for call in calls:
        limit, expected = _gradients(copy_model(model)[0], call)
        _, found = _gradients(carried_out(model, steps), call)
        for name, value in expected.items():
            other = found[name]
            if value is None or other is None:
                if value is not other:
                    return f"with one call the gradient of {name} would {'appear' if value is None else 'vanish'}"
            elif value.numel():
                apart = (value.to(other.dtype) - other).abs().max().item()
                if not apart <= limit * max(value.abs().max().item(), 1e-6):
                    return f"with one call the gradient of {name} would change by {apart:.2g}"
    return ""


def _gradients(copy: nn.Module, call: Call) -> tuple[float, dict[str, Tensor | None]]:
    """Of all outputs, weighted so that none stands for another; in float64 where the model runs so, and what rounding
    explains then.
    """
    copy.eval()
    try:
        return 1e-8, _backward(copy_model(copy)[0].double(), call.map(cast(torch.float64)))
    except FAILURES:
        return 1e-3, _backward(copy, call.map(cast(None)))


def _backward(copy: nn.Module, call: Call) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    with torch.enable_grad():
        out = [t for t in Call((call.run(copy),)).tensors() if t.requires_grad]
        draw = torch.Generator().manual_seed(0)
        terms = [(t * torch.randn(t.shape, generator=draw).to(t)).sum() for t in out]
        if terms:
            torch.stack([t.real if t.is_complex() else t for t in terms]).sum().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in copy.named_parameters()}


def _momentum(norm: Any) -> float:
    return float(norm.momentum)


def _refused(one: Candidate, reason: str) -> Refusal:
    return Refusal(one.site, reason, one.calls, before=one.told)


def _edit(model: nn.Module, one: Candidate) -> Edit:
    norms = _updates(model, [one])
    moved = dict.fromkeys(
        f"{m:.3g} → {joined_momentum(m, one.count):.3g}" for m in (_momentum(model.get_submodule(p)) for p in norms)
    )
    momentum = f"; momentum of {'its norm' if len(norms) == 1 else f'its {len(norms)} norms'} {', '.join(moved)}"
    after = f"one call in the forward of {one.caller or 'the model'}{momentum if norms else ''}"
    return Edit("merge", one.site, one.told, after, one.calls, into=tuple(norms))
