"""From a model to its result: which norms, into what, fitted, tried, and only then put into place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfix.graph import Surgeon, all_or_nothing, build_norm, copy_model, describe_norm, find_owners, norm_modules
from bnfix.graph.owners import Owners
from bnfix.running import Call
from bnfix.swaps.batches import budget_of, counted, fitting
from bnfix.swaps.calibrating import Calibration, UnfitError
from bnfix.swaps.operating import Move, keys, operate, recipe
from bnfix.swaps.optimizers import bring_along, kept_if_failed
from bnfix.swaps.pairing import Init
from bnfix.swaps.site import Site, out_of_reach
from bnfix.swaps.survey import Survey, look
from bnfix.swaps.target import Spec, Target, all_targets
from bnfix.swaps.trial import trial
from bnfix.types import Edit, Refusal, Result

ROOT = "the model is itself the norm: nothing holds it that it could be replaced in; without inplace the result is new"
UNREACHED = "no forward reached it: give an example or data that does"


@dataclass(frozen=True)
class Options:
    """How norms are swapped; see :func:`bnfix.swap`. ``chosen`` says of a path and a module whether it is wanted."""

    to: str
    groups: int | None = None
    init: Init = "moment"
    chosen: Callable[[tuple[str, ...], nn.Module], bool] | None = None
    optimizer: torch.optim.Optimizer | None = None
    inplace: bool = False
    dry_run: bool = False

    @property
    def fitted(self) -> bool:
        """Whether affines are fitted to data."""
        return self.init in ("moment", "ls")


@dataclass(frozen=True)
class Planned:
    """What is going to be done, found and tried on private copies; ``finish`` does it."""

    owners: Owners
    moves: list[Move]
    target: Target
    options: Options
    result: Result

    def finish(self, model: nn.Module) -> Result:
        """The same result with the model in it: a copy of ``model`` that has never run, or ``model`` itself."""
        options, notes = self.options, list(self.result.notes)
        if options.dry_run:
            return self.result
        if not options.inplace:
            copy, memo = copy_model(model, scripted=True)
            made = operate(copy, self.owners, self.moves, self.target, options.init, Surgeon(memo)).model
            return replace(self.result, model=made)
        with all_or_nothing(Surgeon()) as surgeon, kept_if_failed(options.optimizer):
            done = operate(model, self.owners, self.moves, self.target, options.init, surgeon)
            if options.optimizer is not None:
                notes += bring_along(options.optimizer, done.replaced)
        if options.optimizer is None and done.replaced:
            notes.append(
                "an optimizer made before this holds the old parameters: give it as optimizer=, or make a new one"
            )
        return replace(self.result, model=model, notes=tuple(notes))


def plan(
    model: nn.Module,
    options: Options,
    examples: Sequence[Call],
    samples: Sequence[Call],
    say: Callable[[str], None],
) -> Planned:
    """Everything but the change itself; ``model`` is read only.

    Args:
        examples: what shows the way through the model, and what the result is tried on; may be empty for targets that
            are exact.
        samples: what is calibrated on.

    Raises:
        TraceError: the model can't be copied.
        PassError, CalibrationError: a forward fails, or gives no numbers.
    """
    owners = find_owners(model)
    target = all_targets()[options.to]
    old, memo = copy_model(model, scripted=True)
    sites = _sites(owners)
    say(f"running it on {', '.join(c.signature for c in examples)}" if examples else "reading the norms")
    survey = (
        look(old, {id(s): memo[id(s.module)] for s in sites if id(s.module) in memo}, sites, examples)
        if examples
        else Survey()
    )
    wanted = [s for s in sites if options.chosen is None or options.chosen(s.paths, s.module)]
    already = [s for s in wanted if not out_of_reach(s, owners) and target.already(s)]
    plans = {id(s): _planned(s, target, options, survey, owners) for s in wanted if s not in already}
    refusals = {key: plan for key, plan in plans.items() if isinstance(plan, str)}
    left = len(sites) - len(wanted)
    notes = [f"{left} norm{' was' if left == 1 else 's were'} not asked for (only=)"] if left else []
    notes += _already(already)
    planned = [(s, plan) for s in wanted if isinstance(plan := plans.get(id(s)), list)]
    calls = list(samples)
    if target.calibrated and planned and options.fitted:
        calls = fitting(calls, old, budget_of(old))
        notes.append(f"calibrated on {counted(calls)}, layer by layer in the order of their calls")
    moves: list[Move] = []
    tried: list[str] = []
    while planned:
        moves = [Move(s, list(specs)) for s, specs in planned]
        bad, tried = _attempt(model, owners, old, memo, moves, target, options, examples, calls, say)
        if not bad:
            break
        refusals.update(bad)
        planned = [(s, specs) for s, specs in planned if id(s) not in bad]
        moves = []
    refused = [Refusal(s.path, refusals[id(s)], s.names, before=s.before) for s in wanted if id(s) in refusals]
    refused += survey.functional if options.chosen is None else []
    result = Result(
        model=None,
        edits=tuple(_edits(moves)),
        refusals=tuple(refused),
        source="run",
        signatures=tuple(c.signature for c in examples),
        notes=(*notes, *tried),
        recipe=recipe(moves) if moves else {},
        dry_run=options.dry_run,
        verb="swap",
    )
    return Planned(owners, moves, target, options, result)


def _sites(owners: Owners) -> list[Site]:
    found = []
    for module in norm_modules(owners):
        if isinstance(module, _InstanceNorm) and module.running_mean is None:
            continue  # per sample already
        found.append(Site(module, owners.paths(module), tuple(owners.module_slots[id(module)])))
    return found


def _planned(site: Site, target: Target, options: Options, survey: Survey, owners: Owners) -> list[Spec] | str:
    """The settings to choose from, or why the norm stays."""
    reason = out_of_reach(site, owners, target.keeps_parameters) or survey.refused.get(id(site), "")
    if reason:
        return reason
    if options.inplace and any(slot.container is None for slot in site.slots):
        return ROOT
    if not site.calls and (target.calibrated or not site.plain):
        return UNREACHED
    specs = target.specs(site, options.groups)
    if isinstance(specs, str) or not target.calibrated:
        return specs
    if not options.fitted:
        specs = [_usual(specs)]
    if not options.fitted and site.tensor("weight") is None:
        specs = [{**s, "args": {**s["args"], "affine": False}} for s in specs]
    return specs


def _usual(specs: list[Spec]) -> Spec:
    """Where nothing is measured that would choose: as many groups as have 16 channels each (Wu & He 2018)."""
    wide = [s for s in specs if s["args"].get("num_channels", 0) >= 16 * s["args"].get("num_groups", 1)]
    return wide[-1] if wide else specs[0]


def _attempt(
    model: nn.Module,
    owners: Owners,
    old: nn.Module,
    memo: dict[int, Any],
    moves: list[Move],
    target: Target,
    options: Options,
    examples: Sequence[Call],
    samples: Sequence[Call],
    say: Callable[[str], None],
) -> tuple[dict[int, str], list[str]]:
    """Operate on a private copy, calibrate and try it: norms that can't be swapped after all, and what to know."""
    new, new_memo = copy_model(model, scripted=True)
    done = operate(new, owners, moves, target, options.init, Surgeon(new_memo))
    notes: list[str] = []
    if target.calibrated and options.fitted:
        calibration = Calibration(
            old,
            done.model,
            {id(m.site): m for m in moves},
            {id(m.site): memo[id(m.site.module)] for m in moves},
            done.norms,
            target,
            options.init,
            budget_of(old),
            say,
        )
        try:
            calibration.run(samples)
        except UnfitError as unfit:
            return {unfit.site: unfit.reason}, []
        notes += calibration.notes
    if not examples:
        return {}, notes
    say("running the new model beside the old one")
    gone = {id(m.site): new_memo[id(m.site.module)] for m in moves}
    found = trial(old, done.model, moves, gone, done.norms, target, examples)
    return found.bad, [*notes, *found.notes]


def _edits(moves: Sequence[Move]) -> list[Edit]:
    found = []
    for move in moves:
        new = build_norm(move.spec, torch.empty(0))
        gains, loses = keys(move, new)
        after = describe_norm(new) + (f" + {', '.join(move.kept)}" if move.kept else "")
        site = move.site
        found.append(Edit("swap", site.path, site.before, after, site.names, (), gains, loses=loses, r2=move.r2))
    return found


def _already(sites: Sequence[Site]) -> list[str]:
    kinds = Counter(type(s.module).__name__ for s in sites)
    return [f"{n} norm{' is' if n == 1 else 's are'} {kind} already, and left alone" for kind, n in kinds.items()]
