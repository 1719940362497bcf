from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_cases import batch, net, sgd, step
from bnfix.rules.loop_sites import not_seen
from bnfix.rules.reading import count, site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, LoopLog, LoopNorm, Safety, Skipped


class RecomputedForward(Rule):
    """Activation checkpointing updates statistics twice.

    ## What it does

    Counts updates of running statistics that happen inside a backward pass: the second forward of
    `torch.utils.checkpoint`, of either kind.

    ## Why is this bad

    Each batch is taken in twice, so the momentum that acts is 1 − (1 − α)² instead of α: .19 for .1. The statistics
    follow the last batches more closely and are noisier; `num_batches_tracked` runs at double speed, and with
    `momentum=None` it still averages all batches alike. Rarely harmful, good to know when two runs are compared.

    ## Example

    ```python
    y = checkpoint(block, x, use_reentrant=False)  # every norm in block is updated twice a step
    ```

    ## Fix

    Momentum 1 − √(1 − α) for the norms that are recomputed (.0513 for .1): two updates then act as one did.
    """

    code = "BN404"
    name = "recomputed-forward"
    needs = ("loop",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for all norms of one momentum."""
        log: LoopLog = evidence.loop
        yield from not_seen(self.code, log)
        norms = [n for n in log.norms if n.recomputed]
        for alpha in dict.fromkeys(n.momentum for n in norms):
            yield self._found([n for n in norms if n.momentum == alpha], alpha)

    def _found(self, norms: list[LoopNorm], alpha: float | None) -> Finding:
        norm = max(norms, key=lambda n: n.recomputed)
        paths = tuple(site(n.path) for n in norms)
        again = norm.recomputing
        acts = f": momentum {alpha:.3g} acts as {1 - (1 - alpha) ** 2:.3g}" if alpha else ""
        where = f", from {again.lines[0]}" if again.lines else ""
        fix = None
        if alpha:
            options = {"momentum": 1 - (1 - min(alpha, 1.0)) ** 0.5}
            fix = Fix("set", "momentum 1 − √(1 − α)", paths, options, Safety.EXACT)
        return self.found(
            "info",
            f"{some(paths)}: updated a second time when the backward pass recomputes the forward "
            f"({count(norm.recomputed, 'time')}, since step {again.first}{where}){acts}",
            paths,
            fix=fix,
            recomputed=norm.recomputed,
            first_step=again.first,
        )

    def bad(self) -> Case:
        """A block under checkpoint."""
        return Case(loop=lambda watch: _steps(watch, checkpointed=True))

    def good(self) -> Case:
        """The same without."""
        return Case(loop=lambda watch: _steps(watch, checkpointed=False))


def _steps(watch: Any, checkpointed: bool) -> Any:
    from torch.utils.checkpoint import checkpoint

    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(4):
            x = batch()
            step(optimizer, checkpoint(model, x, use_reentrant=False) if checkpointed else model(x))
    return w.report()
