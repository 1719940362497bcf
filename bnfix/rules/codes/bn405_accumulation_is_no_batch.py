from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_cases import batch, net, sgd
from bnfix.rules.loop_sites import not_seen
from bnfix.rules.reading import site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, LoopLog, LoopNorm, Skipped

NOISE = 0.25
"""Relative standard error √(2/(m − 1)) of a variance from m values, beyond which a batch is too small (BN301)."""


class AccumulationIsNoBatch(Rule):
    """Gradients are accumulated over batches that are too small for a norm.

    ## What it does

    Looks for steps with several backward passes whose norms see few values a channel in each forward: the standard
    error of a variance, √(2/(m − 1)) with m = N·H·W, is above .25 (m < 33).

    ## Why is this bad

    Accumulating gradients over k small batches gives the gradient of a large batch for every layer but batch norm,
    which normalises each small batch by itself. The noise of those statistics stays, however long one accumulates.

    ## Example

    ```python
    for x in micro_batches:  # bad, at 4 samples each with a BatchNorm1d inside
        (loss(model(x)) / k).backward()
    optimizer.step()
    ```

    ## Fix

    `bnfix.swap(model, to="group", only=…)` for the layers concerned, or larger micro batches.
    """

    code = "BN405"
    name = "accumulation-is-no-batch"
    needs = ("loop",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for the layers that see too few values."""
        log: LoopLog = evidence.loop
        yield from not_seen(self.code, log)
        limit = self.option(evidence, "noise", NOISE)
        found = [(n, k) for n in log.norms if (k := _backwards(n)) > 1 and too_few(n, limit)]
        if not found:
            return
        found.sort(key=lambda nk: nk[0].values or 0)
        norm, k = found[0]
        paths = tuple(site(n.path) for n, _ in found)
        yield self.found(
            "info",
            f"{some(paths)}: gradients are accumulated over {k} backward passes, but each forward is normalised by "
            f"itself, with {norm.values} values a channel: the relative error of a variance is "
            f"{noise(norm.values):.2f} (limit {limit:g})",
            paths,
            fix=Fix("swap", "a norm that needs no batch, for these layers", paths, {"to": "group", "only": paths}),
            backwards=k,
            values=norm.values,
            noise=noise(norm.values),
        )

    def bad(self) -> Case:
        """Four samples, eight times."""
        return Case(loop=lambda watch: _accumulate(watch, 4))

    def good(self) -> Case:
        """64 samples, eight times."""
        return Case(loop=lambda watch: _accumulate(watch, 64))


def noise(values: int | None) -> float:
    """Relative standard error of a variance from so many independent values."""
    return float((2 / (values - 1)) ** 0.5) if values and values > 1 else float("inf")


def too_few(norm: LoopNorm, limit: float) -> bool:
    """Whether a norm sees too few values in a forward; not where that is unknown."""
    return norm.values is not None and noise(norm.values) > limit


def _backwards(norm: LoopNorm) -> int:
    """Backward passes in the usual step; 1 where steps are of several kinds."""
    steps = sum(norm.per_step.values())
    usual = [p for p in norm.patterns if p.own and p.steps > 1]
    often = sum(n for k, n in norm.per_step.items() if k > 1)
    return usual[0].backwards if usual and 2 * often >= steps else 1


def _accumulate(watch: Any, n: int) -> Any:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(6):
            optimizer.zero_grad()
            for _ in range(8):
                (model(batch(n)).square().mean() / 8).backward()
            optimizer.step()
    return w.report()
