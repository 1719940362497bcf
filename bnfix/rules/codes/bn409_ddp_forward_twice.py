from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from bnfix.rules.loop_cases import batch, net, on_ranks, sgd, step
from bnfix.rules.reading import site
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, LoopLog, Skipped


class DdpForwardTwice(Rule):
    """Two forwards of a DDP model under one backward pass, with buffers broadcast in front of each.

    ## What it does

    Watches a `DistributedDataParallel` wrapper whose `broadcast_buffers` is on (the default) for several forwards in
    training mode that share one backward pass.

    ## Why is this bad

    In front of each forward DDP overwrites the buffers of all ranks with those of rank 0: what the first forward
    taught the other ranks is gone before it could count, and a graph that still needs an overwritten buffer fails with
    'one of the variables needed for gradient computation has been modified by an inplace operation'.

    ## Example

    ```python
    za, zb = ddp(a), ddp(b)  # bad
    za, zb = bnfix.joint(ddp)(a, b)  # one forward
    ```

    ## Fix

    One forward (`bnfix.joint`), or `broadcast_buffers=False` together with `SyncBatchNorm`.
    """

    code = "BN409"
    name = "ddp-forward-twice"
    needs = ("loop",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding for the wrapper."""
        log: LoopLog = evidence.loop
        if log.ranks is None:
            return
        if not log.ranks.ddp:
            yield Skipped(self.code, "no DistributedDataParallel wrapper was seen", "bnfix.watch(ddp_model)")
            return
        forwards = log.ranks.forwards
        if not forwards.times:
            return
        where = f", from {forwards.lines[-1]}" if forwards.lines else ""
        yield self.found(
            "warning",
            f"{forwards.updates / forwards.times:.0f} forwards of the DDP model share one backward pass in "
            f"{forwards.times} of {max(log.steps, forwards.times)} steps, since step {forwards.first}{where}; each one "
            "replaces the buffers of all ranks by those of rank 0",
            [site(n.path) for n in log.norms if n.updates and not n.sync],
            fix=Fix("joint", "one forward for all batches: bnfix.joint(ddp)(a, b)"),
            steps=forwards.times,
            first_step=forwards.first,
        )

    def bad(self) -> Case:
        """Two forwards, one backward pass."""
        return Case(loop=lambda _: on_ranks(_twice)[0])

    def good(self) -> Case:
        """One forward."""
        return Case(loop=lambda _: on_ranks(_once)[0])


def _twice(watch: Any) -> Any:
    return _run(watch, 2)


def _once(watch: Any) -> Any:
    return _run(watch, 1)


def _run(watch: Any, forwards: int) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(net())
    optimizer = sgd(model)
    w = watch(model, optimizer)
    with suppress(RuntimeError), w:  # torch up to 2.7 fails in the backward pass, as the page says
        for _ in range(4):
            step(optimizer, *[model(batch(64)) for _ in range(forwards)])
    return w.report()
