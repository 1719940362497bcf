from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_cases import batch, net, on_ranks, sgd, step
from bnfix.rules.reading import site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, LoopLog

NOISE = 0.25


class SmallBatchPerRank(Rule):
    """Each rank has too few values for its norms, and they are not synchronised.

    ## What it does

    In a distributed run, looks for norms that see few values a channel on a rank (√(2/(m − 1)) > .25, m = N·H·W) and
    are no `SyncBatchNorm`.

    ## Why is this bad

    The global batch may be large, but each rank normalises with its own few samples: statistics as noisy as those of a
    small batch, which is the usual case in detection and segmentation.

    ## Example

    ```python
    model = DistributedDataParallel(model)  # bad, at 2 images a rank
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))  # good
    ```

    ## Fix

    `bnfix.swap(model, to="sync", only=…)` before the wrapper; where the ranks have no fast link, a group norm.
    """

    code = "BN408"
    name = "small-batch-per-rank"
    needs = ("loop",)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for the layers concerned."""
        log: LoopLog = evidence.loop
        if log.ranks is None:
            return
        limit = self.option(evidence, "noise", NOISE)
        few = [n for n in log.norms if n.values and not n.sync and n.updates and _noise(n.values) > limit]
        if not few:
            return
        few.sort(key=lambda n: n.values or 0)
        norm, paths = few[0], tuple(site(n.path) for n in few)
        yield self.found(
            "warning",
            f"{some(paths)}: {norm.values} values a channel on each of {log.ranks.world} ranks, not synchronised: the "
            f"relative error of a variance is {_noise(norm.values or 0):.2f} (limit {limit:g})",
            paths,
            fix=Fix("swap", "statistics over all ranks", paths, {"to": "sync", "only": paths}),
            values=norm.values,
            noise=_noise(norm.values or 0),
            world=log.ranks.world,
        )

    def bad(self) -> Case:
        """Four samples a rank."""
        return Case(loop=lambda _: on_ranks(_small)[0])

    def good(self) -> Case:
        """64."""
        return Case(loop=lambda _: on_ranks(_large)[0])


def _noise(values: int) -> float:
    return float((2 / (values - 1)) ** 0.5) if values > 1 else float("inf")


def _small(watch: Any) -> Any:
    return _run(watch, 4)


def _large(watch: Any) -> Any:
    return _run(watch, 64)


def _run(watch: Any, n: int) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(net())
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(4):
            step(optimizer, model(batch(n)))
    return w.report()
