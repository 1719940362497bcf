"""The ways through a forward: exported where ``torch.export`` can, else recorded from runs, each decision seen to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bnfix.errors import BnfixError, TraceError
from bnfix.graph.copies import Memo, copy_model
from bnfix.graph.first_run import first_run
from bnfix.graph.owners import Owners, storage_key
from bnfix.graph.sources import exported, observed, symbolic
from bnfix.graph.sources.decisions import Tape, held, reads
from bnfix.types import Route

TURNS = 16
"""At most so many decisions that Python code reads are taken the other way, one a run."""

FEWEST, WORK = 4, 40_000
"""Fewer of a long forward: so many operations in all runs together, but this many turns anyway."""

_LONGER = 10  # times the operations of the run itself, and it is given up


@dataclass(frozen=True)
class Run:
    """How one route was recorded: on which call, after a first run (``warm``) or in it, and what it decided.

    ``turn`` is the number of a decision that was taken the other way, None in a run as it is.
    """

    call: int
    warm: bool
    tape: Tape
    turn: int | None = None


@dataclass
class Source:
    """One model and the calls to trace it on; what its first runs showed is gathered on the way."""

    model: nn.Module
    owners: Owners
    keys: dict[int, int]
    calls: list[Any]
    held: set[int] = field(default_factory=set)
    blockers: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)

    def exported(self) -> list[Route]:
        """A route for each call; two where a first run differs from a second, for its forward writes something.

        Raises:
            PassError: the forward fails on a call.
            TraceError: it can't be copied, or torch.export refuses.
        """
        return [exported.trace(copy, call, key_of) for _, _, call, copy, key_of in self._copies()]

    def symbolic(self) -> list[Route]:
        """One route, of which no shapes are known.

        Raises:
            TraceError: the forward looks at its input.
        """
        copy, memo = copy_model(self.model)
        return [symbolic.trace(copy, _KeyOf(self.owners, self.keys, memo))]

    def observed(self, refused: TraceError) -> tuple[list[Route], tuple[Run, ...], tuple[str, ...]]:
        """The same from runs; then one decision after another is turned, to see the other side of each ``if``.

        Raises:
            TraceError: no run can be recorded either; says both reasons.
        """
        routes: list[Route] = []
        runs: list[Run] = []
        for number, warm, call, copy, key_of in self._copies():
            try:
                route, tape = observed.trace(copy, call, key_of)
            except TraceError as error:
                raise TraceError(f"{refused.message}; {error.message}", hint=refused.hint) from error
            routes.append(route)
            runs.append(Run(number, warm, tape))
        taken = list(runs)
        turns = max(FEWEST, min(TURNS, WORK // max(len(r.ops) for r in routes)))
        seen: set[Any] = set()
        for r, i, which in [(r, i, d.where) for r, run in enumerate(taken) for i, d in reads(run.tape)]:
            if which in seen:
                continue
            seen.add(which)
            if len(seen) > turns:
                continue
            turned = self._turned(taken[r], i, len(routes[r].ops))
            if turned is not None:
                routes.append(turned[0])
                runs.append(turned[1])
        return routes, tuple(runs), tuple(_notes(refused, taken, len(runs) - len(taken), len(seen) - turns))

    def _turned(self, run: Run, turn: int, length: int) -> tuple[Route, Run] | None:
        """``run`` with one decision taken the other way; None if that doesn't end well: nothing wrong comes of it."""
        copy, memo = copy_model(self.model)
        key_of = _KeyOf(self.owners, self.keys, memo)
        limit = _LONGER * length
        try:
            with exported.quiet_export():
                if run.warm:
                    first_run(copy, self.calls[run.call], key_of)
                route, tape = observed.trace(copy, self.calls[run.call], key_of, turn=turn, limit=limit)
        except (BnfixError, SystemExit):
            return None
        return route, Run(run.call, run.warm, tape, turn)

    def observed_again(self, runs: Sequence[Run]) -> list[Route]:
        """A route for each of ``runs``, held to its decisions.

        Raises:
            TraceError: the model fails on these decisions.
        """
        routes = []
        for run in runs:
            copy, memo = copy_model(self.model)
            key_of = _KeyOf(self.owners, self.keys, memo)
            call = self.calls[run.call]
            if run.warm:
                first_run(copy, call, key_of)
            routes.append(observed.trace(copy, call, key_of, tape=run.tape)[0])
        return routes

    def _copies(self) -> Iterator[tuple[int, bool, Any, nn.Module, _KeyOf]]:
        for number, call in enumerate(self.calls):
            copy, memo = copy_model(self.model)
            seen = first_run(copy, call, _KeyOf(self.owners, self.keys, memo))
            self.held |= seen.held
            self.blockers += seen.blockers
            self.written += seen.wrote
            # Where the first run wrote something, a second may go another way: both ways count.
            if seen.wrote:
                fresh, its_memo = copy_model(self.model)
                yield number, False, call, fresh, _KeyOf(self.owners, self.keys, its_memo)
            yield number, bool(seen.wrote), call, copy, _KeyOf(self.owners, self.keys, memo)


class Held:
    """Calls a model as a :class:`~bnfix.running.Call` does, held to the decisions of a run. ``tapes``: of each run."""

    def __init__(self, tape: Tape, forward: Callable[..., Any] | None) -> None:
        self._tape, self._forward = tape, forward
        self.tapes: list[Tape] = []

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run ``model``."""
        tape = self._tape.blank()
        self.tapes.append(tape)
        with held(tape):
            return model(*args, **kwargs) if self._forward is None else self._forward(model, *args, **kwargs)


def hold(runs: Sequence[Run], calls: Sequence[Any]) -> list[Any]:
    """``calls``, each held to the decisions of its run; as they are where there are no runs."""
    tapes = {run.call: run.tape for run in runs if not run.warm and run.turn is None}
    return [
        dataclasses.replace(call, forward=Held(tapes[i], call.forward)) if i in tapes else call
        for i, call in enumerate(calls)
    ]


class _KeyOf:
    """The key of a tensor of one private copy: by identity, or by storage where export has wrapped it anew."""

    def __init__(self, owners: Owners, keys: dict[int, int], memo: Memo) -> None:
        self._by_id: dict[int, int] = {}
        self._by_storage: dict[Any, int] = {}
        for original, key in keys.items():
            twin = memo.get(original)
            if isinstance(twin, Tensor):
                self._by_id[id(twin)] = key
                stored = storage_key(twin)
                if stored is not None:
                    self._by_storage.setdefault(stored, key)

    def __call__(self, tensor: Tensor) -> int | None:
        key = self._by_id.get(id(tensor))
        return key if key is not None else self._by_storage.get(storage_key(tensor))


def _notes(refused: TraceError, taken: Sequence[Run], turned: int, left: int) -> Iterator[str]:
    times = f"{len(taken)} runs" if len(taken) > 1 else "one run"
    yield f"recorded from {times}, which hold for the ways taken: {refused.message[:160]}"
    if len({run.call for run in taken}) == 1:
        yield "all of this comes from one example: give several in a list that go different ways"
    if turned:
        yield f"{turned} decision{'s' * (turned > 1)} that its code takes on data: the other way was walked as well"
    if left > 0:
        yield f"{left} more were not: if a norm is skipped on the other side of one, that is not known"
