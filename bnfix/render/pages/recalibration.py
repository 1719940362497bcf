"""The page of a recalibration: one row a norm and call site, the verdict, and what the figures rest on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from bnfix.render.numbers import count, figure
from bnfix.render.page import Column, Line, Page, Row, State
from bnfix.render.pages import PageOf
from bnfix.render.runs import alike, named
from bnfix.types import LayerStats, Recalibration, Refusal, Residual

ROOT = "(root)"
COLUMNS = (
    Column("norm", "path"),
    Column("n", "extra"),
    Column("shift, σ", "number"),
    Column("var ratio", "number"),
    Column("SE, σ", "number"),
    Column("KL", "number"),
    Column("result"),
)
DRIFT = 1e-6
"""A divergence up to here (a shift of some thousandth of a standard deviation) is not called drift."""
ROWS = 20
"""Norms shown one a row up to here; beyond, those that drifted most, in the order of the model."""
FIXED = 1e-3
"""A residual up to here (in standard deviations, and of a variance) is called the fixed point."""
FAR = 1e-2
"""A residual above this is called none: a percent is also what ``needed_samples`` asks for."""
METHODS = {
    "population": "batches normalised with their own statistics: near the fixed point if they are alike, not at it",
    "online": "batches normalised with the statistics so far: near the fixed point if they are alike, not at it",
}
ENGINES = {
    "fibers": "chunks side by side, merged at each norm",
    "threads": "chunks in threads, merged at each norm",
    "one chunk": "all samples in one chunk",
    "plain passes": "plain passes, norm by norm",
    "stream": "batch by batch",
}


class RecalibrationPage(PageOf):
    """What drifted how far, what was kept and why, what the outputs make of it, and how sure it is."""

    kind = Recalibration

    def page(self, value: Recalibration) -> Page:
        kept = _kept(value)
        names = {r.site for r in kept}
        # A norm may have been measured and yet kept, such as one that got a single value a channel.
        value = replace(value, layers=tuple(s for s in value.layers if (s.site or ROOT) not in names))
        state, verdict = _verdict(value, len(kept))
        lines = [_line(s, value.changed) for s in value.layers]
        # Frozen and not selected is what somebody wanted: no annotation warns of it.
        wanted = {site or ROOT for site in (*value.frozen, *value.left)}
        lines += [Line("plain" if r.site in wanted else "kept", r.site, f"kept: {r.reason}") for r in kept]
        steps = [_step(line) for said in value.advice for line in said.splitlines()]
        return Page(
            title="the running statistics",
            columns=COLUMNS,
            rows=(*_rows(value), *(_kept_row(reason, group) for reason, group in alike(kept))),
            lines=tuple(lines),
            state=state,
            verdict=verdict,
            details=tuple(filter(None, _details(value))),
            notes=(*value.notes, *(line for label, line in steps if not label)),
            next=tuple((label, line) for label, line in steps if label),
        )


class LayerStatsPage(PageOf):
    """One norm at one call site, in a line."""

    kind = LayerStats

    def page(self, value: LayerStats) -> Page:
        line = _line(value, changed=False)
        return Page(line.site, (), (), (line,), line.state, (f"{line.site}: {line.text}",))


class ResidualPage(PageOf):
    """How far from the fixed point, in a line."""

    kind = Residual

    def page(self, value: Residual) -> Page:
        said = _residual(value)
        return Page("residual", (), (), (Line("plain", "residual", said),), "plain", (f"residual: {said}",))


def _verdict(value: Recalibration, kept: int) -> tuple[State, tuple[str, ...]]:
    done = len({s.site for s in value.layers})
    if not done:
        why = f"recalibrated 0 of {count(kept, 'norm')}: every one was kept" if kept else "found no norm to recalibrate"
        return "kept", (why,)
    how = [value.method, _passes(value.passes)]
    how += [f"{value.iterations} iterations"] if value.iterations > 1 else []
    how += [f"{value.ranks} ranks"] if value.ranks > 1 else []
    what = f"{done} of {count(done + kept, 'norm')} on {count(value.n, 'sample')} ({', '.join(how)})"
    proof = [f"part of a chunk replayed alone: {_number(value.replay)} apart"] if value.replay is not None else []
    if value.dry_run:
        change = [_change(value, "would change")] if value.output_change is not None else []
        if value.needed is False:
            return "kept", ("would leave it as it is", *change, f"measured {what}", *proof, "nothing was changed")
        return "done", (f"would recalibrate {what}", *change, *proof, *_before(value), "nothing was changed")
    if not value.changed:
        change = [_change(value, "would change")] if value.output_change is not None else []
        return "kept", ("left as it was", *change, f"measured {what}", *proof, *_before(value))
    change = [_change(value, "change")] if value.output_change is not None else []
    state, certified = _certified(value)
    return state, (f"recalibrated {what}", *change, *proof, *certified)


def _certified(value: Recalibration) -> tuple[State, list[str]]:
    found, fresh = value.residual, value.residual_fresh
    if found is None and fresh is not None:  # of a stream, which keeps nothing that could be run again
        return "done", [f"residual in one more pass over the loader {_residual(fresh)}"]
    if found is None:
        return "done", ['residual not measured (certify="full")']
    drawn = [f"on a new draw {_residual(fresh)}"] if fresh else []
    before = f" (before: {_residual(value.residual_before)})" if value.residual_before else ""
    said = f"residual {_residual(found)}{before}"
    if found.mean <= FIXED and found.var <= FIXED:
        return "done", [f"at the fixed point of the data seen: {said}", *drawn]
    if found.mean <= FAR and found.var <= FAR:
        return "done", [said, *drawn]
    return "unsure", [f"NOT at the fixed point of the data seen: {said}", *drawn]


def _before(value: Recalibration) -> list[str]:
    return [f"residual as it is {_residual(value.residual_before)}"] if value.residual_before else []


def _change(value: Recalibration, verb: str) -> str:
    on = f" on {count(value.probe, 'sample')}" if value.probe else ""
    null = f" (two halves of the data: {_number(value.output_null)})" if value.output_null is not None else ""
    if value.output_change == math.inf:
        return f"the outputs {verb} beyond comparison (NaN, infinities or another shape on one side){on}{null}"
    return f"the outputs {verb} by {_number(value.output_change)} of their spread{on}{null}"


def _details(value: Recalibration) -> list[str]:
    if not value.layers:
        return []
    forwards = [f"{value.forwards:.3g} forwards a sample"] if f"{value.forwards:.3g}" != f"{value.passes}" else []
    read = [count(value.batches, "batch").replace("batchs", "batches"), f"{_passes(value.passes)} over the loader"]
    engine = ENGINES.get(value.engine, value.engine)
    return [
        f"{value.method}: {value.why}" if value.why else "",
        METHODS.get(value.method, ""),
        ", ".join([*read, *forwards, engine, *_took(value.seconds)]),
        f"taken from a batch: {value.used}" if value.used else "",
        _sure(value),
        _furthest(value),
    ]


def _took(seconds: Mapping[str, float]) -> list[str]:
    if "total" not in seconds:
        return []
    # What took less than a twentieth is nothing to read about.
    parts = [f"{name} {s:.2g}" for name, s in seconds.items() if name != "total" and s > 0.05 * seconds["total"]]
    return [f"{seconds['total']:.2g} s of CPU time" + (f" ({', '.join(parts)})" if parts else "")]


def _sure(value: Recalibration) -> str:
    try:
        needed = value.needed_samples(0.01)
    except ValueError:
        return "standard error unknown: it takes at least two samples"
    means = [s for s in value.layers if not math.isnan(s.se)]
    if not means:
        return "no standard error: no channel has any spread"
    worst = max(means, key=lambda s: s.se)
    var_se = figure(_most(s.var_se for s in means))
    more = f"0.01 takes {count(needed, 'more sample')}" if needed else "within 0.01"
    return f"standard error at most {figure(worst.se)} σ of a mean ({worst.name}), {var_se} of a variance: {more}"


def _furthest(value: Recalibration) -> str:
    (worst,) = value.worst(1)
    c = worst.worst_channel
    if c is None or not worst.worst_kl > DRIFT:
        return ""
    mean = f"mean {worst.mean_before[c]:.4g} → {worst.mean[c]:.4g}"
    var = f"variance {worst.var_before[c]:.4g} → {worst.var[c]:.4g}"
    return f"drifted most: {worst.name}, channel {c}: {mean}, {var}"


def _rows(value: Recalibration) -> list[Row]:
    state: State = "done" if value.changed else "plain"
    worst = value.worst(ROWS)
    shown = {id(s) for s in worst}
    calls = _calls(value.layers)
    rows = []
    for s in value.layers:
        if id(s) not in shown:
            continue
        remarks = ["drifted most"] if s is worst[0] and len(value.layers) > 1 and s.worst_kl > DRIFT else []
        remarks += [f"pooled over {calls[s.site]} calls"] if calls[s.site] > 1 else []
        rows.append(Row(state, (s.name, f"{s.n:,}", *_figures([s]), ", ".join(remarks))))
    rest = [s for s in value.layers if id(s) not in shown]
    if rest:
        rows.append(Row(state, (f"… {len(rest)} more", "", *_figures(rest), "the worst of them")))
    return rows


def _figures(layers: Sequence[LayerStats]) -> tuple[str, ...]:
    """Of several layers each figure's worst: what the others don't exceed."""
    ratios = [s.var_ratio for s in layers if not math.isnan(s.var_ratio)]
    ratio = max(ratios, key=lambda r: abs(math.log(r)) if r > 0 else math.inf, default=None)  # 0: it was inf
    shift, se, kl = (_most(v) for v in zip(*((s.mean_shift, s.se, s.worst_kl) for s in layers), strict=True))
    return figure(shift), figure(ratio), figure(se), figure(kl)


def _calls(layers: Iterable[LayerStats]) -> dict[str, int]:
    calls: dict[str, int] = {}
    for s in layers:
        calls[s.site] = calls.get(s.site, 0) + 1
    return calls


def _kept(value: Recalibration) -> list[Refusal]:
    groups = (
        (value.frozen, "frozen in evaluation mode (include_frozen=True takes it)"),
        (value.never_called, "no forward reached it"),
        (value.left, "not selected"),
    )
    return [Refusal(site or ROOT, value.left_why.get(site, why)) for sites, why in groups for site in sites]


def _kept_row(reason: str, group: list[Refusal]) -> Row:
    return Row("kept", (named([r.site for r in group]), "", "", "", "", "", f"kept: {reason}"))


def _line(stats: LayerStats, changed: bool) -> Line:
    figures = {
        "mean_shift": figure(stats.mean_shift),
        "var_ratio": figure(stats.var_ratio),
        "se": figure(stats.se),
        "kl": figure(stats.worst_kl),
        "n": str(stats.n),
        "samples": str(stats.samples),
    }
    return Line("done" if changed else "plain", stats.name, " ".join(f"{k}={v}" for k, v in figures.items()))


def _step(said: str) -> tuple[str, str]:
    """A line of advice: the words before three spaces are the label of what is to be pasted; else it is a note."""
    label, gap, rest = said.partition("   ")
    return (label, rest.strip()) if gap else ("", said)


def _residual(value: Residual) -> str:
    return f"{_number(value.mean)} σ / {_number(value.var)}"


def _passes(passes: int) -> str:
    return "one pass" if passes == 1 else f"{passes} passes"


def _number(value: float | None) -> str:
    return "nan" if value is not None and math.isnan(value) else figure(value)


def _most(values: Iterable[float]) -> float | None:
    return max((v for v in values if not math.isnan(v)), default=None)
