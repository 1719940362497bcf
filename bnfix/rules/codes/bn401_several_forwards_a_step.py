from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_cases import batch, net, sgd, step
from bnfix.rules.loop_sites import (
    BATCHES,
    ERROR,
    MEANS,
    SPREADS,
    Apart,
    lines_of,
    not_seen,
    several_updates,
    sites_apart,
)
from bnfix.rules.reading import site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, LoopLog, LoopNorm, Skipped, StepPattern


class SeveralForwardsAStep(Rule):
    """Several forwards on different batches in one optimizer step.

    ## What it does

    Watches a training loop for norms that are updated more than once in an optimizer step, each time by another batch:
    the anchor, the positive and the negative of a triplet, two views, real and generated images. Gradient accumulation
    (one forward, one backward pass, again and again) is not meant, nor is one batch that is shown again (LBFGS, SAM).

    ## Why is this bad

    It need not be, and by itself it is information. Each forward is normalised with the statistics of its own batch,
    but all of them share one set of running statistics. Where the batches come from one distribution, nothing is lost.
    Where they differ it is a warning: `running_var` then ends near the mean of the variances within a forward and
    misses what lies between them, so the network that is evaluated is another one than the one that was trained.
    Measured on triplets with negatives of another modality: loss .054 in training mode, 1.033 in evaluation mode.
    The limits are those of BN303, which says how far apart the batches are. For the discriminator of a GAN, whose
    separate batches are recommended practice, and next to a momentum teacher it stays information. A norm that one
    forward of the model calls repeatedly is the business of BN102.

    ## Example

    ```python
    za, zp, zn = net(anchor), net(positive), net(negative)  # bad, where the three differ in distribution
    za, zp, zn = bnfix.joint(net)(anchor, positive, negative)  # one forward: one set of statistics
    ```

    ## Fix

    `bnfix.joint(net)` concatenates, runs one forward and splits. It changes the training, so train again; a model that
    is trained already can be helped by `unshare` and `recalibrate`.
    """

    code = "BN401"
    name = "several-forwards-a-step"
    needs = ("loop",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for the norms whose batches differ; where there are none, one for all others."""
        log: LoopLog = evidence.loop
        yield from not_seen(self.code, log)
        means, spreads = self.option(evidence, "means", MEANS), self.option(evidence, "spreads", SPREADS)
        apart = {a.norm.path: a for a in sites_apart(log, means, spreads, ERROR)}
        several = [
            (n, p)
            for n in log.norms
            if (p := next(several_updates(log, n), None)) is not None and p.steps > 1 and _forwards(p) > 1
        ]
        differing = [(n, p, apart[n.path]) for n, p in several if n.path in apart and apart[n.path].severity != "info"]
        if differing:
            differing.sort(key=lambda found: -max(found[2].pair.shift, found[2].pair.ratio))
            yield self._warning(differing, means, spreads)
        elif several:
            yield self._information(several, apart)

    def _warning(self, differing: list[tuple[LoopNorm, StepPattern, Apart]], means: float, spreads: float) -> Finding:
        norm, pattern, apart = differing[0]
        paths = tuple(site(n.path) for n, _, _ in differing)
        return self.found(
            "warning",
            f"{some(paths)}: {len(pattern.sites)} forwards in an optimizer step on batches that differ, d = "
            f"{apart.pair.shift:.2f} between the means (limit {means:g}), l = {apart.pair.ratio:.2f} between the "
            f"spreads ({spreads:g}), over {apart.pair.batches} steps{lines_of(apart.pattern)}: evaluation mode can't "
            "normalise them all as training did",
            paths,
            fix=Fix("joint", "one forward for all batches: bnfix.joint(net)(a, b)", paths),
            per_step=dict(norm.per_step),
            shift=apart.pair.shift,
            ratio=apart.pair.ratio,
            batches=apart.pair.batches,
        )

    def _information(self, several: list[tuple[LoopNorm, StepPattern]], apart: dict[str, Apart]) -> Finding:
        norm, pattern = several[0]
        paths = tuple(site(n.path) for n, _ in several)
        steps = sum(norm.per_step.values())
        often = sum(n for k, n in norm.per_step.items() if k > 1)
        measured: dict[str, Any] = {"per_step": dict(norm.per_step)}
        capped = [apart[n.path] for n, _ in several if n.path in apart]
        pairs = [a.pair for a in capped] or [p.pairs[0] for _, p in several if p.pairs]
        said = ""
        if pairs:
            pair = max(pairs, key=lambda p: p.shift)
            measured.update(shift=pair.shift, ratio=pair.ratio, batches=pair.batches)
            figures = f"d = {pair.shift:.2f}, l = {pair.ratio:.2f}"
            if capped:
                said = f"; their batches differ ({figures}), but {capped[0].capped}"
            else:
                enough = pair.batches >= BATCHES
                said = f"; {'their batches are alike' if enough else 'too few steps to compare'} ({figures})"
        return self.found(
            "info",
            f"{some(paths)}: {len(pattern.sites)} forwards in an optimizer step, in {often} of {steps} steps"
            f"{lines_of(pattern)}{said}",
            paths,
            **measured,
        )

    def bad(self) -> Case:
        """Anchors and negatives of different means, in forwards of their own."""
        return Case(loop=lambda watch: _siamese(watch, joint=False))

    def good(self) -> Case:
        """One forward for both."""
        return Case(loop=lambda watch: _siamese(watch, joint=True))


def _forwards(pattern: StepPattern) -> int:
    return len({s.forward for s in pattern.sites})


def _siamese(watch: Any, joint: bool) -> Any:
    import torch

    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(16):
            one, other = batch(), batch(shift=2.0)
            if joint:
                step(optimizer, *model(torch.cat([one, other])).chunk(2))
            else:
                step(optimizer, model(one), model(other))
    return w.report()
