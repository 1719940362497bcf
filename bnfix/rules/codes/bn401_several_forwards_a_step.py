from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_cases import batch, net, sgd, step
from bnfix.rules.loop_sites import BATCHES, ERROR, RATIO, SHIFT, Apart, not_seen, several_updates, sites_apart
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, Line, LoopLog, LoopNorm, Skipped, StepPattern


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
    Beyond d = .15 (means, in standard deviations) or l = .1 (½ ln of the variances' ratio), and beyond chance over ten
    steps, this rule warns, and BN303 says how far apart the call sites are. For the discriminator of a GAN, whose
    separate batches are recommended practice, and next to a momentum teacher it stays information.

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
        """One finding for the norms whose batches differ, one for the others."""
        log: LoopLog = evidence.loop
        yield from not_seen(self.code, log)
        shift, ratio = self.option(evidence, "shift", SHIFT), self.option(evidence, "ratio", RATIO)
        apart = {a.norm.path: a for a in sites_apart(log, shift, ratio, self.option(evidence, "error", ERROR))}
        several = [(n, p) for n in log.norms if (p := next(several_updates(log, n), None)) is not None and p.steps > 1]
        differing = [(n, p, apart[n.path]) for n, p in several if n.path in apart and apart[n.path].severity != "info"]
        differing.sort(key=lambda found: -max(found[2].pair.shift, found[2].pair.ratio))
        if differing:
            yield self._warning(differing)
        alike = [(n, p) for n, p in several if n.path not in {d[0].path for d in differing}]
        if alike and not differing:
            yield self._information(alike, apart)

    def _warning(self, differing: list[tuple[LoopNorm, StepPattern, Apart]]) -> Finding:
        norm, pattern, apart = differing[0]
        paths = tuple(n.path for n, _, _ in differing)
        where = _lines(apart.pattern)
        return self.found(
            "warning",
            f"{_name(norm)} is updated {len(pattern.sites)} times in an optimizer step by batches that differ: "
            f"d = {apart.pair.shift:.2f} between the means (limit .15), l = {apart.pair.ratio:.2f} between the spreads "
            f"(.1), over {apart.pair.batches} steps{_others(len(differing))}{where}; evaluation mode can't normalise "
            "both as training did",
            paths,
            fix=Fix("joint", "one forward for all batches: bnfix.joint(net)(a, b)", paths),
            per_step=dict(norm.per_step),
            shift=apart.pair.shift,
            ratio=apart.pair.ratio,
            batches=apart.pair.batches,
            first_step=0,
        )

    def _information(self, alike: list[tuple[LoopNorm, StepPattern]], apart: dict[str, Apart]) -> Finding:
        norm, pattern = alike[0]
        steps = sum(norm.per_step.values())
        often = sum(n for k, n in norm.per_step.items() if k > 1)
        measured: dict[str, Any] = {"per_step": dict(norm.per_step)}
        said = ""
        capped = [apart[n.path] for n, _ in alike if n.path in apart]
        pairs = [a.pair for a in capped] or [p.pairs[0] for _, p in alike if p.pairs]
        if pairs:
            pair = max(pairs, key=lambda p: p.shift)
            measured.update(shift=pair.shift, ratio=pair.ratio, batches=pair.batches)
            far = f"d = {pair.shift:.2f}, l = {pair.ratio:.2f}"
            if capped:
                said = f"; their batches differ ({far}), but {capped[0].capped}"
            else:
                enough = pair.batches >= BATCHES
                said = f"; {'their batches are alike' if enough else 'too few steps to compare'} ({far})"
        return self.found(
            "info",
            f"{_name(norm)} is updated {len(pattern.sites)} times in an optimizer step, in {often} of {steps} steps"
            f"{_others(len(alike))}{_lines(pattern)}{said}",
            [n.path for n, _ in alike],
            **measured,
        )

    def bad(self) -> Case:
        """Anchors and negatives of different means, in forwards of their own."""
        return Case(loop=lambda watch: _siamese(watch, joint=False))

    def good(self) -> Case:
        """One forward for both."""
        return Case(loop=lambda watch: _siamese(watch, joint=True))


def _name(norm: LoopNorm) -> str:
    return norm.path or "(root)"


def _others(n: int) -> str:
    return f" (and {n - 1} more norms)" if n > 1 else ""


def _lines(pattern: StepPattern) -> str:
    lines: list[Line] = list(dict.fromkeys(s.line for s in pattern.sites if s.line is not None))
    return f", from {'; '.join(str(line) for line in lines[:3])}" if lines else ""


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
