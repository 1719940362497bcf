"""``unshare``: one norm for each call site, with the same outputs to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import BnfixError, PassError, TraceError, one_line
from bnfix.graph import copy_model, find_owners
from bnfix.graph.unsharing import per_call_name, take_apart
from bnfix.running import FAILURES, Call
from bnfix.sharing.planning import Plan, Planned, Step, Wanted, by_call, by_name, names_of_norms, only_called
from bnfix.sharing.sites import forwards
from bnfix.types import Edit, Refusal

Say = Callable[[str], None]


@dataclass(frozen=True)
class Unshared:
    """What was found and proven. ``steps`` are plain data; ``model`` is a copy in which they were carried out."""

    model: nn.Module
    edits: tuple[Edit, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    steps: tuple[Step, ...] = ()
    single: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def recipe(self) -> dict[str, Any]:
        """What brings a freshly built model into the same form."""
        edits = [
            {"norm": list(step.get("sites") or [step["site"]]), "into": [], "unshare": dict(step)}
            for step in self.steps
        ]
        return {"version": 2, "edits": edits} if edits else {}


def unshare(
    model: nn.Module, calls: Sequence[Call], sites: str | Iterable[str] | None, *, share_affine: bool, say: Say
) -> Unshared:
    """Take the shared norms of a copy of ``model`` apart; ``model`` itself is not touched.

    Only what leaves the outputs of every call in evaluation mode as they are, to the bit, is kept.

    Raises:
        PassError: the forward fails on a call.
        TraceError: the model can't be copied, or does not do the same twice.
        ValueError: ``sites`` names what is no norm.
    """
    wanted = Wanted(sites, share_affine=share_affine)
    say("counting the calls of each norm")
    seen, notes = forwards(model, calls)
    wanted.check(names_of_norms(model, seen))
    named = by_name(model, wanted)
    proof = _Proof(model, calls, say)
    kept, refusals = proof.largest(named)
    separate = model
    if kept:
        separate = proof.carried_out(kept)
        seen, notes = forwards(separate, calls)
        called = only_called(kept, separate, seen)
        if called != kept:
            kept, more_refusals = proof.largest(called)
            refusals += more_refusals
            separate = proof.carried_out(kept)
            seen, notes = forwards(separate, calls)
    plan = by_call(separate, seen, wanted, done=(s for p in kept for s in p.calls))
    more, thrown_out = proof.largest(plan.planned, kept)
    kept = [*kept, *more]
    copy = proof.carried_out(kept)
    return Unshared(
        model=copy,
        edits=_edits(model, copy, kept),
        refusals=_in_order(plan, (*refusals, *plan.refusals, *thrown_out)),
        steps=tuple(p.step for p in kept),
        single=plan.single,
        notes=notes,
    )


class _Proof:
    """Carries steps out on copies and holds their outputs against those of the model, bit by bit."""

    def __init__(self, model: nn.Module, calls: Sequence[Call], say: Say) -> None:
        self.model, self.calls, self.say = model, calls, say
        self._expected: list[list[Tensor]] | None = None

    def carried_out(self, planned: Sequence[Planned]) -> nn.Module:
        """A copy of the model in which this is done."""
        copy, _ = copy_model(self.model)
        take_apart(copy, [p.step for p in planned])
        return copy

    def largest(
        self, planned: Sequence[Planned], before: Sequence[Planned] = ()
    ) -> tuple[list[Planned], list[Refusal]]:
        """As many of ``planned`` as pass together, on top of ``before``; the others with what was found.

        Raises:
            TraceError: the model does not do the same twice, so that nothing can be proven.
        """
        if not planned or self._failure([*before, *planned]) is None:
            return list(planned), []
        good: list[Planned] = []
        refusals: list[Refusal] = []
        for one in planned:
            failure = self._failure([*before, *good, one])
            if failure is None:
                good.append(one)
            else:
                refusals.append(Refusal(one.site, failure, one.calls, before=one.before))
        return good, refusals

    def _failure(self, planned: Sequence[Planned]) -> str | None:
        """None where the outputs of all calls are what they were, to the bit."""
        self.say(
            f"comparing outputs to the bit, {'one norm' if len(planned) == 1 else f'{len(planned)} norms'} taken apart"
        )
        try:
            copy = self.carried_out(planned)
            found = [_outputs(copy, call) for call in self.calls]
        except (BnfixError, ValueError) as error:
            return f"the model needs it as it is: {error.args[0] if error.args else error}"
        if self._expected is None:
            private, again = copy_model(self.model)[0], copy_model(self.model)[0]
            self._expected = [_outputs(private, call) for call in self.calls]
            if not all(map(_same, self._expected, [_outputs(again, call) for call in self.calls])):
                raise TraceError(
                    "the model does not do the same twice in evaluation mode: that nothing changes can't be proven",
                    hint="its forward draws random numbers of its own, or keeps something from run to run",
                )
        for call, expected, now in zip(self.calls, self._expected, found, strict=True):
            if not _same(expected, now):
                return f"without it the outputs on {call.signature} are others"
        return None


def _outputs(copy: nn.Module, call: Call) -> list[Tensor]:
    """All tensors that a private copy returns in evaluation mode, with random numbers from a fixed seed."""
    copy.eval()
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            returned = call.run(copy)
    except FAILURES as error:
        raise PassError(f"the forward fails on {call.signature}: {one_line(error)}") from error
    return Call((returned,)).tensors()


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether these are the same tensors bit by bit, NaN and the sign of zero included."""
    return len(one) == len(other) and all(map(_same_bits, one, other))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
        return False
    if one.layout != torch.strided or one.is_quantized:
        return bool(torch.equal(one.to_dense(), other.to_dense())) if not one.is_quantized else torch.equal(one, other)
    flat = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return bool(torch.equal(flat[0], flat[1]))


def _edits(model: nn.Module, apart: nn.Module, planned: Sequence[Planned]) -> tuple[Edit, ...]:
    """What was done, each with the entries of the state_dict that came and went with it."""
    before, after = list(model.state_dict()), list(apart.state_dict())
    known, left = set(before), set(after)
    new, gone = [k for k in after if k not in known], [k for k in before if k not in left]
    owners = find_owners(apart)
    edits = []
    for one in planned:
        gains: tuple[str, ...] = ()
        loses: tuple[str, ...] = ()
        if one.step["how"] == "calls":
            places = tuple(f"{p}." for p in owners.paths(owners.module_at(one.step["site"])))
            gains, loses = (tuple(k for k in keys if k.startswith(places)) for keys in (new, gone))
        elif one.step["how"] == "function":
            holders = owners.paths(owners.module_at(one.step["site"]))
            dots = [f"{h}." if h else "" for h in holders]
            gains = tuple(k for k in new if k.startswith(tuple(d + per_call_name(one.step["mean"]) for d in dots)))
            loses = tuple(k for k in gone if k in {d + one.step[role] for d in dots for role in ("mean", "var")})
        edits.append(Edit("unshare", one.site, one.before, one.after, one.calls, gains=gains, loses=loses))
    return tuple(edits)


def _in_order(plan: Plan, refusals: Sequence[Refusal]) -> tuple[Refusal, ...]:
    return tuple({r.site: r for r in refusals}.values())
