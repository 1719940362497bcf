"""From a model and its data to new statistics: plan, estimate, prove, judge, and only then write."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnfix.calibration import certifying, judging, summary
from bnfix.calibration.admission import asked, refuse_nothing, refuse_sharded
from bnfix.calibration.certifying import starts_with
from bnfix.calibration.chunks import Chunk, first_samples, splittable
from bnfix.calibration.engines import ROUGH, Outcome, in_plain_passes, staged
from bnfix.calibration.norms import Norms, Select, find_norms
from bnfix.calibration.planning import TOL, Plan, make_plan
from bnfix.calibration.ranks import Ranks
from bnfix.calibration.reading import length
from bnfix.calibration.scouting import Scouted
from bnfix.calibration.session import Options, Say, Session
from bnfix.calibration.staged import MemoryFullError, out_of_memory
from bnfix.calibration.streaming import stream
from bnfix.calibration.transaction import Handle, prepared
from bnfix.calibration.values import check_values, check_writable
from bnfix.errors import CalibrationError
from bnfix.graph import Outside, find_owners, no_footprints, replicator
from bnfix.running import let_go, modes_of_thread, preserved, set_modes, young_garbage_only
from bnfix.types import Recalibration

PROBE = 32
"""Samples on which outputs are compared where a decision hangs on it."""
UNJUDGED = (
    "whether the change is more than chance could not be told, for the data can't be halved: give more of it (what is "
    "one batch in the end has no halves); to have it in any case:   when='always'",
)


def recalibrate(
    model: nn.Module,
    data: Iterable[Any],
    options: Options,
    *,
    select: Select,
    include_frozen: bool,
    ranks: Ranks,
    say: Say,
    notes: Iterable[str] = (),
) -> Recalibration:
    """The work of :func:`bnfix.recalibrate`; ``model`` is unwrapped, the options are checked."""
    began = time.process_time()
    check_values(model)
    refuse_sharded(model)
    owners = find_owners(model)
    norms = find_norms(model, select, include_frozen, owners)
    refuse_nothing(norms)
    check_writable(norms)
    if ranks.world > 1:
        ranks.alike(asked(options, norms))
    device = next((n.mean.device for n in norms.known.values()), None) or _device(model)
    modes, grad = modes_of_thread(), torch.is_grad_enabled()
    mine, kept = preserved(model), no_footprints(model, options.forward, owners=owners)
    try:
        with young_garbage_only(), mine, kept, torch.no_grad():
            outside = Outside(owners, options.forward)
            report, stats, batches, counts = _worked(model, norms, data, options, ranks, say, outside, device, notes)
    except KeyboardInterrupt as error:
        let_go(error)
        set_modes(modes)
        torch.set_grad_enabled(grad)
        raise
    finally:  # where Ctrl-C came as one of them was left, it has not begun to put back
        kept.gen.close()
        mine.gen.close()
    # Only now, with the model back in its own modes: the one step that changes it.
    handle = Handle()
    if report.changed:
        ranks.agree()
        handle = prepared(norms, stats, batches, counts)
    took = {"total": time.process_time() - began, **report.seconds}
    report = dataclasses.replace(report, handle=handle, seconds=took)  # before: nothing may come between then
    if report.changed:
        with ranks.or_undone(handle.take_back):
            handle.write()
    return report


def _worked(
    model: nn.Module,
    norms: Norms,
    data: Iterable[Any],
    options: Options,
    ranks: Ranks,
    say: Say,
    outside: Outside,
    device: torch.device,
    notes: Iterable[str],
) -> tuple[Recalibration, dict[int, Any], int, dict[int, int]]:
    """Report, statistics by key, batches and counts, of the model in evaluation mode."""
    for module in model.modules():
        module.training = False
        if isinstance(module, DistributedDataParallel):  # one inside of the model: each forward would wait for all
            module.require_forward_param_sync = False
        if getattr(module, "_compiled_call_impl", None) is not None:  # model.compile(): what it compiled is intact
            module._compiled_call_impl = None
    replicate = replicator(model)
    session = Session(model, norms, data, options, ranks, say, replicate, device, outside, notes=list(notes))
    shared = replicate.shared
    if shared:
        session.notes.append(f"shared by all chunks, since it can't be copied: {', '.join(shared[:3])}")
    try:
        report, stats, batches = _Work(session).report()
        counted = {n.key: int(n.tracked) for n in norms if n.key in stats and n.tracked is not None}
        counts = _largest(ranks.all_of(counted))
        return dataclasses.replace(report, seconds=session.seconds), stats, batches, counts
    except MemoryFullError as error:
        told = str(error) if "out of memory" in str(error) else f"out of memory: {error}"
        raise CalibrationError(told, hint="let the loader give smaller batches") from error.__cause__
    except CalibrationError as error:
        if error.__cause__ is not None and out_of_memory(error.__cause__):
            error.hint = "out of memory: let the loader give smaller batches"
        elif error.hint is None and "the forward failed" in error.message:
            error.hint = session.advice or None
        raise
    finally:
        session.rewind()


LOOKED = (
    "looked for: modules with running_mean and running_var (BatchNorm, SyncBatchNorm), and calls of batch_norm with "
    "such buffers\nLayerNorm, GroupNorm and RMSNorm keep none"
)


class _Work:
    """One recalibration, step by step."""

    def __init__(self, session: Session) -> None:
        self.session, self.options, self.ranks = session, session.options, session.ranks

    def report(self) -> tuple[Recalibration, dict[int, Any], int]:
        """Everything but the writing."""
        session, options = self.session, self.options
        with self._timed("reading"):
            plan = make_plan(session)
        check_writable(session.norms)  # functional ones are known by now
        with self._timed("estimating"):
            plan, outcome = self._estimated(plan)
        chunks, reader, scouted = plan.chunks, plan.reader, plan.scouted
        before = residual = fresh = None
        with self._timed("certifying"):
            if options.certify == "full" and plan.method == "staged":
                # Of the loader's batches, as a user would run them: what joining them changed shows here at the latest.
                given = plan.batches or chunks
                before = certifying.residual(session, given, {}, outcome)
                residual = certifying.residual(session, given, outcome.stats, outcome)
                if certifying.disproved(session, residual, outcome):
                    session.notes.append(
                        f"plain forwards over the loader's batches disproved what chunks gave ({residual.mean:.2g} σ, "
                        f"{residual.var:.2g} of a variance): the norms were done one by one, in plain passes over these"
                    )
                    outcome = in_plain_passes(session, given, scouted)
                    plan = dataclasses.replace(plan, chunks=outcome.chunks)
                    chunks, residual = plan.chunks, certifying.residual(session, given, outcome.stats, outcome)
            if options.certify == "full":
                fresh = certifying.fresh(session, plan.batches, reader.samples, outcome)
        with self._timed("judging"):
            change = self._change(plan, outcome)
        samples = sum(self.ranks.each(sum(c.samples for c in chunks) if chunks else reader.samples))
        batches = sum(self.ranks.each(reader.batches))
        changed = not options.dry_run and bool(outcome.stats) and (options.when == "always" or change.worth_it)
        frozen, never, left_why = summary.left_alone(
            session.norms, outcome, self._reached(scouted), masked=options.mask is not None
        )
        found = summary.layers(outcome, session.norms)
        if not found and not outcome.sites and not session.norms.known and left_why:
            raise CalibrationError(f"the model has no norm that can be recalibrated: {_first(left_why)}", hint=LOOKED)
        if not found and not outcome.sites and not session.norms.known:
            raise CalibrationError("the model has no norm with running statistics: nothing to recalibrate", hint=LOOKED)
        if not found:
            met = "no batch norm met a value" if outcome.sites else "no batch norm was reached by any forward"
            if session.norms.odd:
                raise CalibrationError(
                    "batch_norm is called with statistics that are no buffers of the model (copied, computed, sliced): "
                    "what they come from can't be told",
                    hint="let the norms be modules of the model, called as such",
                )
            raise CalibrationError(
                met + (f": {_first(left_why)}" if left_why else ""),
                hint="is the data what the model is called with?  forward=lambda m, b: m(b[0])",
            )
        self._note_iterations(outcome)
        gist = summary.Gist.together(self.ranks.all_of(summary.Gist.of(outcome, reader, chunks)))
        if not reader.counted and samples == batches > 1:
            session.notes.append(
                f"the inputs do not tell how many samples a batch holds: each of the {batches:,} batches counts as "
                "one, in the standard errors too"
            )
        report = Recalibration(
            layers=found,
            method=plan.method,
            why=plan.why,
            n=samples,
            batches=batches,
            passes=1 + (fresh is not None),
            forwards=outcome.forwards,
            engine=outcome.engine,
            changed=changed,
            dry_run=options.dry_run,
            residual_before=before,
            residual=residual,
            residual_fresh=fresh,
            replay=outcome.replay,
            iterations=outcome.iterations,
            output_change=change.value,
            output_null=change.null,
            probe=change.probe,
            frozen=frozen,
            never_called=never,
            left=tuple(left_why),
            left_why=left_why,
            used=gist.used,
            ranks=self.ranks.world,
            needed=change.worth_it if options.when == "needed" else None,
            advice=(*self._leave_it(change), *summary.advice(outcome, session.norms, gist)),
            notes=(*session.notes, *self._odd(scouted is not None and scouted.mixing)),
        )
        return report, outcome.stats, batches

    def _estimated(self, plan: Plan) -> tuple[Plan, Outcome]:
        session = self.session
        if plan.method == "staged":
            try:
                outcome = staged(session, plan.chunks, plan.scouted, plan.batches)
                return dataclasses.replace(plan, chunks=outcome.chunks), outcome
            except MemoryFullError as error:
                if self.options.method == "staged":
                    raise CalibrationError(
                        f"out of memory: {error}",
                        hint="memory_budget='1GB', max_samples=…, spill_dir=… or method='population'",
                    ) from error
                why = "out of memory with all chunks at once: one pass over the same samples, batch by batch"
                session.notes.append(why)
                session.say(f"method population: {why}")
                plan = dataclasses.replace(
                    plan, method="population", why=why, stream=iter(plan.batches or plan.chunks), chunks=()
                )
        if length(session.data) is None and self.options.max_samples is None and self.options.tol is None:
            session.options = self.options = dataclasses.replace(self.options, tol=TOL)
            session.notes.append(
                f"a stream of unknown length: it ends where every standard error is at most {TOL:g} (tol=)"
            )
        if self.options.spill_dir is not None:
            session.notes.append(f"spill_dir= is of no use to method {plan.method}, which keeps no activations")
        return plan, stream(session, plan.stream, plan.method)

    def _change(self, plan: Plan, outcome: Outcome) -> judging.Change:
        session, scouted = self.session, plan.scouted
        probe: Chunk | None = None
        thorough = self.options.when == "needed" or self.options.dry_run
        found = judging.Change(None)
        if scouted is not None:
            probe, before = scouted.chunk, scouted.outputs
            if thorough and (some := plan.chunks or [c for c in (plan.first,) if c is not None]):
                largest = max(some, key=lambda c: c.samples)
                probe = first_samples(largest, PROBE) if splittable(largest) else largest
                before = judging.outputs(session, probe, {})
            replayed = (outputs for chunk, outputs in outcome.replayed if not thorough and _same_samples(chunk, probe))
            after = next(replayed, None)
            if after is None:
                after = judging.outputs(session, probe, outcome.stats)
            found = judging.Change(judging.change(before, after), None, probe.samples)
        if thorough and plan.method == "staged":
            null = judging.null(session, plan.chunks, probe, whole=plan.chunks is plan.batches)
            found = dataclasses.replace(found, null=null)
        elif thorough:
            found = dataclasses.replace(found, null=judging.between(session, probe, outcome.halves))
        if outcome.uneven is not None:
            found = dataclasses.replace(found, doubtful=True)
        if self.ranks.world == 1:
            return found
        return next((c for c in self.ranks.all_of(found) if c.value is not None), found)

    def _leave_it(self, change: judging.Change) -> tuple[str, ...]:
        if change.value is None or change.worth_it or change.doubtful:
            return ()
        if change.null is None:
            return UNJUDGED if self.options.when == "needed" and change.value > judging.CHANGE else ()
        if change.value > judging.CHANGE:
            return (
                f"the outputs change by {change.value:.2g} of their spread, less than {judging.OVER_NULL:g} times what "
                f"two halves of the data differ by ({change.null:.2g}): that can be chance, so take more samples",
            )
        return (
            f"recalibration changes nothing here (outputs by {change.value:.2g} of their spread, two halves of the "
            f"data differ by {change.null:.2g}): leave the model as it is",
        )

    def _note_iterations(self, outcome: Outcome) -> None:
        if outcome.moved is None:
            return
        far = max(outcome.moved.mean, outcome.moved.var)
        allowed = ROUGH if self.session.norms.half else 1e-4
        settled = f"settled to {far:.1g} σ" if far <= allowed else f"did NOT settle: still {far:.2g} σ apart (unshare)"
        times = f"{outcome.iterations} times" if outcome.iterations > 1 else "once"
        text = f"norms with several call sites were pooled and iterated {times}: {settled}"
        self.session.notes.append(text)

    def _odd(self, mixing: bool) -> tuple[str, ...]:
        odd = self.session.norms.odd
        said = (
            ["some norms use statistics that are no buffers of the model (copied, computed or sliced): left"]
            if odd
            else []
        )
        if mixing:
            said.append(
                "a norm uses the batch's own statistics in evaluation mode: the result holds for batches like these"
            )
        return tuple(said)

    def _reached(self, scouted: Scouted | None) -> set[int]:
        """The norm modules that were called on any rank."""
        here = scouted.reached if scouted is not None else set()
        keys = set().union(*self.ranks.all_of({n.key for n in self.session.norms if id(n.mean) in here}))
        return {id(n.mean) for n in self.session.norms if n.key in keys}

    def _timed(self, name: str) -> _Clock:
        return _Clock(self.session.seconds, name)


class _Clock:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.process_time()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.process_time() - self._start


def _same_samples(a: Chunk, b: Chunk) -> bool:
    return a.samples == b.samples and a.origin == b.origin and starts_with(a, b)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _largest(said: Sequence[dict[int, int]]) -> dict[int, int]:
    """The largest number that any rank has for each key."""
    return {key: max(each.get(key, 0) for each in said) for key in said[0]}


def _first(why: Any) -> str:
    name, reason = next(iter(why.items()))
    return f"{name} {reason}"
