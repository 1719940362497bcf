"""A proof in words: shared by every page that holds one."""

from __future__ import annotations

import math

from bnfix.render.numbers import NONE, error, percent, ratio, worst
from bnfix.render.page import Column, Line, Row, State
from bnfix.types import OutputParity, Parity

STATES: dict[str, State] = {"passed": "done", "warned": "unsure", "failed": "failed", "inconclusive": "unsure"}

COLUMNS = (
    Column("output", "path"),
    Column("verdict"),
    Column("× noise", "number"),
    Column("max abs", "number"),
    Column("max rel", "number"),
    Column("rtol needed", "number"),
    Column("top-1", "number"),
)


def row(output: OutputParity) -> Row:
    """One output with its figures, in the order of :data:`COLUMNS`."""
    said = output.verdict + (f": {output.reason}" if output.reason else "")
    if output.worst_sample and output.verdict == "failed":
        said += f" (worst: {output.worst_sample})"
    return Row(
        STATES[output.verdict],
        (
            output.name,
            said,
            ratio(output.noise_ratio),
            error(output.max_abs_err),
            error(output.max_rel_err),
            error(output.required_tolerance),
            percent(output.top1_agreement),
        ),
    )


def line(output: OutputParity) -> Line:
    """One output by itself, everything that was measured."""
    figures = {
        "noise_ratio": ratio(output.noise_ratio),
        "max_abs": error(output.max_abs_err),
        "max_rel": error(output.max_rel_err),
        "rtol_needed": error(output.required_tolerance),
        "top1": percent(output.top1_agreement).replace(" ", ""),
    }
    known = " ".join(f"{k}={v}" for k, v in figures.items() if v != NONE)
    said = output.verdict + (f": {output.reason}" if output.reason else "")
    return Line(STATES[output.verdict], output.name, " ".join(filter(None, (said, known))))


def verdict(parity: Parity) -> tuple[str, ...]:
    """What the comparison found, result first, in the words of the design: noise, limit, signatures."""
    on = f" on {', '.join(parity.signatures)}" if parity.signatures else ""
    bad = [o for o in parity.outputs if o.verdict == parity.verdict]
    top = worst(o.noise_ratio for o in parity.outputs)
    limit = f"(limit {ratio(parity.k)})" if parity.k % 1 else f"(limit {parity.k:.0f})"
    if parity.verdict == "failed":
        said = [f"FAILED: {_failure(o, limit)}" for o in bad] or ["FAILED"]
        if parity.first_divergence:
            said.append(f"first divergence: {parity.first_divergence}")
        return (*_few(said), *([f"tried{on}"] if on else []))
    if parity.verdict == "inconclusive":
        said = [f"{o.name}: {o.reason}" for o in bad if o.reason] or ["no output could be judged"]
        return (f"INCONCLUSIVE: {said[0]}", *_few(said[1:]), *([f"tried{on}"] if on else []))
    if top is None:
        return (f"outputs agree{on}",)
    if top == 0:
        return (f"outputs equal to the float64 oracle{on}",)
    words = f"outputs within {ratio(top)} × the model's own rounding noise {limit}{on}"
    return (words, "more than a rounding would explain: look at it") if parity.verdict == "warned" else (words,)


def details(parity: Parity) -> tuple[str, ...]:
    """What it was measured with."""
    with_versions = [f"{name} {version}" for name, version in parity.versions.items()]
    return (" · ".join([*with_versions, *parity.providers]),) if with_versions or parity.providers else ()


def nearer(parity: Parity) -> str:
    """Which side lies nearer to the float64 oracle, where the comparison can tell."""
    sides = {o.nearer for o in parity.outputs if o.nearer}
    return f"nearer to float64: {sides.pop()}" if len(sides) == 1 else ""


def _failure(output: OutputParity, limit: str) -> str:
    if output.reason:
        return f"{output.name}: {output.reason}"
    if output.noise_ratio is not None and not math.isfinite(output.noise_ratio):
        return f"{output.name}: NaN or Inf where the model itself has numbers"
    if output.noise_ratio is not None:
        return f"{output.name} is {ratio(output.noise_ratio)} × the model's own rounding noise away {limit}"
    return f"{output.name}: max abs error {error(output.max_abs_err)}"


def _few(said: list[str], most: int = 3) -> tuple[str, ...]:
    return tuple(said) if len(said) <= most else (*said[:most], f"and {len(said) - most} more")
