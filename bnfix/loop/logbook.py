"""What a session knows as plain data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from bnfix.loop.frames import line_of, where_they_part
from bnfix.loop.loads import Loads
from bnfix.loop.optimizers import Steps
from bnfix.loop.origins import Origins
from bnfix.loop.samples import count_of, version_of
from bnfix.loop.session import Session
from bnfix.loop.sites import Pattern
from bnfix.loop.tally import Run, Tally
from bnfix.types import Episodes, LoopLog, LoopNorm, LoopRanks, LoopSite, StepPattern

if TYPE_CHECKING:
    from bnfix.loop.measuring import Spots


def log_of(
    session: Session,
    steps: Steps,
    loads: Loads,
    origins: Origins,
    notes: tuple[str, ...],
    *,
    final: bool,
    compiled: bool,
) -> LoopLog:
    """The log so far. Reads from the device."""
    held = steps.ids()
    tallies = session.tallies
    # In the order of their first calls: the norms nearest to the input see least of what weights do to the data.
    called = sorted(tallies, key=lambda t: t.order)
    norms = tuple(_norm(t, session, origins, held, loads, compiled) for t in called)
    done = session.window + int(session.stepped)
    return LoopLog(
        norms,
        done,
        session.measured,
        steps.holding(),
        loads.log(),
        _ranks(session, final),
        dict(session.expected),
        _seen(norms, done, session, steps),
        (*notes, *_notes(norms, session)),
    )


def _norm(tally: Tally, session: Session, origins: Origins, held: set[int], loads: Loads, compiled: bool) -> LoopNorm:
    module = tally.module()
    learned = tally.updates + tally.without
    seen = learned + tally.recomputed + tally.calibrated + tally.expected
    counted, unseen = _unseen(tally, module, seen, compiled, tally.index in loads.loaded)
    values, samples = sorted(v for v, _ in tally.values), sorted(s for _, s in tally.values)
    own = [p for p in module._parameters.values() if p is not None] if module is not None else []
    return LoopNorm(
        path=tally.path,
        paths=tally.paths,
        cls=tally.cls,
        channels=int(module.num_features) if module is not None else 0,  # type: ignore[arg-type]
        momentum=tally.momentum,
        sync=isinstance(module, nn.SyncBatchNorm),
        affine=bool(own),
        trainable=tally.asks(),
        values=values[len(values) // 2] if values else None,
        samples=samples[len(samples) // 2] if samples else None,
        updates=tally.updates,
        gradless_steps=tally.gradless_windows,
        without_grad=tally.without,
        recomputed=tally.recomputed,
        calibrated=tally.calibrated,
        expected=tally.expected,
        evaluations=tally.evaluations,
        frozen=_episodes(tally.frozen, 0) if not tally.trained else Episodes(),
        recomputing=_episodes(tally.recomputing, tally.windows),
        resumed=_episodes(tally.resumed, tally.windows - tally.resumed.base),
        used=tally.used,
        trailing=tally.pending if tally.pending_counts else 0,
        gradless_lines=tuple(line for s in tally.resumed.spots if (line := line_of(s)) is not None),
        in_step=tally.gradless.pair(tally.path),
        abandoned=_episodes(tally.abandoned, tally.looked - tally.abandoned.base),
        thawed=_episodes(tally.thawed, 0, learned - tally.thawed.base if tally.thawed.times else 0),
        held=tally.held_before + tally.held,
        held_at_start=tally.held_at_start,
        written=origins.written(tally, held),
        twin=origins.twin(tally, session.tallies),
        left_out=origins.left_out(tally, held),
        counted=counted,
        unseen=unseen,
        per_step=dict(sorted(tally.per_step.items())),
        foreign=tally.foreign,
        patterns=_patterns(tally, session.spots),
    )


def _episodes(run: Run, of: int, updates: int | None = None) -> Episodes:
    lines = tuple(line for s in run.spots if (line := line_of(s)) is not None)
    return Episodes(run.updates if updates is None else updates, run.times, of, run.first, run.last, lines)


def _unseen(tally: Tally, module: nn.Module | None, seen: int, compiled: bool, loaded: bool) -> tuple[int | None, int]:
    """How far the counter came, and how much of it no hook saw. A counter that others write to tells nothing."""
    now = count_of(module)
    if module is None or now is None or tally.tracked is None or loaded:
        return None, 0
    grown = now - tally.tracked
    met = seen + tally.evaluations
    written = version_of(module, "running_mean") != tally.mean_first
    if grown < 0 or (written and met and not compiled):
        return None, 0
    return grown, max(grown - seen, 0)


def _patterns(tally: Tally, spots: Spots) -> tuple[StepPattern, ...]:
    found = sorted(tally.patterns.values(), key=lambda p: -p.steps)
    return tuple(p.log(_sites(tally.path, p, spots)) for p in found)


def _sites(path: str, pattern: Pattern, spots: Spots) -> tuple[LoopSite, ...]:
    known = [spots.get(place, (None, ())) for place, _ in pattern.places]
    # Called several times in one forward of the model: then the model's own line tells more than that of the loop.
    within = [pattern.calls.count(c) > 1 for c in pattern.calls]
    apart = where_they_part([way for (_, way), inside in zip(known, within, strict=True) if inside])
    spot = iter(apart)
    lines = [line_of((inside and next(spot)) or loop) for (loop, _), inside in zip(known, within, strict=True)]
    turns = [turn for _, turn in pattern.places]
    return tuple(
        LoopSite(f"{path or '(root)'}@{i}" if i else path or "(root)", lines[i], *rest)
        for i, rest in enumerate(
            zip(pattern.calls, pattern.groups, turns, pattern.values, pattern.samples, strict=True)
        )
    )


def _ranks(session: Session, final: bool) -> LoopRanks | None:
    ranks = session.ranks
    if ranks.world < 2:
        return None
    distances = ranks.compare(final)
    finite = tuple(d for d in distances if math.isfinite(d.stored))
    runs = [d.several for d in session.doors]
    worst = max(runs, key=lambda r: r.times, default=Run())
    broadcast = any(d.broadcast for d in session.doors)
    forwards = _episodes(worst, session.window)
    return LoopRanks(ranks.world, ranks.rank, bool(session.doors), broadcast, forwards, finite, ranks.unseen)


def _seen(norms: tuple[LoopNorm, ...], done: int, session: Session, steps: Steps) -> tuple[str, ...]:
    updates = sum(n.updates for n in norms)
    by = f"{steps.holding()} optimizer{'s' * (steps.holding() != 1)}" if not session.by_version else "changed weights"
    lines = [f"{done} steps of {by}, {session.measured} of them measured", f"{updates} updates of {len(norms)} norms"]
    lines += [f"{n} updates declared as {label!r}" for label, n in session.expected.items() if n]
    return tuple(lines)


def _notes(norms: tuple[LoopNorm, ...], session: Session) -> tuple[str, ...]:
    notes = [session.broken] if session.broken else []
    unseen = [n for n in norms if n.unseen]
    if unseen:
        notes.append(
            f"{sum(n.unseen for n in unseen)} updates of {len(unseen)} norms were counted and not seen: "
            f"in a compiled graph there are no hooks ({unseen[0].path or '(root)'} …)"
        )
    if new := session.newcomers():
        notes.append(f"{new} norms were put into the model while it was watched: those were not seen")
    if session.by_version and any(n.updates for n in norms):
        how = "steps were told by weights that changed" if session.window else "and no change of the weights"
        notes.append(f"no step of a torch optimizer was seen; {how}")
    return tuple(notes)
