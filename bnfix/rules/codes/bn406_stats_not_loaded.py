from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_cases import batch, net, sgd, step
from bnfix.rules.reading import count, site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, LoadedState, LoopLog

LEFT = 0.05


class StatsNotLoaded(Rule):
    """`load_state_dict` brought weights without their running statistics.

    ## What it does

    Listens to `load_state_dict` while the loop runs. A norm that gets its weights, but not `running_mean` and
    `running_var`, is reported, unless its statistics have been set or re-estimated since, or so many training steps
    came after that less than .05 of what stood there before is left.

    ## Why is this bad

    `strict=False` makes it silent: a state dict of parameters only (an average of weights, `named_parameters()`, a
    filter for trainable tensors) leaves the statistics that happened to be there. In evaluation mode the network then
    normalises with another network's numbers, or with 0 and 1.

    ## Example

    ```python
    ema = {k: average(p) for k, p in model.named_parameters()}  # bad: no buffers
    model.load_state_dict(ema, strict=False)
    model.load_state_dict({**ema, **dict(model.named_buffers())})  # good, with the buffers that belong to them
    ```

    ## Fix

    Load the statistics too; where there are none that belong to these weights: `bnfix.recalibrate(model, loader)`.
    """

    code = "BN406"
    name = "stats-not-loaded"
    needs = ("loop",)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all norms that lack their statistics."""
        log: LoopLog = evidence.loop
        limit = self.option(evidence, "left", LEFT)
        lost = [load for load in log.loads if not load.healed and _left(load) > limit]
        if not lost:
            return
        first = lost[0]
        paths = tuple(site(load.path) for load in lost)
        where = f", from {first.line}" if first.line else ""
        yield self.found(
            "error",
            f"{some(paths)}: load_state_dict brought weights without {' and '.join(first.missing)}, at step "
            f"{first.step}{where}; {count(first.updates_since, 'update')} came since",
            paths,
            fix=Fix("code", "load a state dict with its buffers; or bnfix.recalibrate(model, loader)", paths),
            missing=list(first.missing),
            first_step=first.step,
            updates_since=first.updates_since,
            norms=len(paths),
        )

    def bad(self) -> Case:
        """Parameters only."""
        return Case(loop=lambda watch: _load(watch, buffers=False))

    def good(self) -> Case:
        """Everything."""
        return Case(loop=lambda watch: _load(watch, buffers=True))


def _left(load: LoadedState) -> float:
    """How much of the statistics that stood there before is still in them: (1 − α)^n."""
    if load.momentum is None:  # a cumulative average never forgets, but ends up with what it saw most
        return 1.0 / (1 + load.updates_since)
    return math.pow(1 - min(load.momentum, 1.0), load.updates_since)


def _load(watch: Any, buffers: bool) -> Any:
    model, other = net(), net()
    optimizer = sgd(model)
    state = other.state_dict() if buffers else dict(other.named_parameters())
    with watch(model, optimizer) as w:
        step(optimizer, model(batch()))
        model.load_state_dict(state, strict=False)
    return w.report()
