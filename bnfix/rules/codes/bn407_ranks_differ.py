from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bnfix.rules.loop_cases import batch, net, on_ranks, sgd, step
from bnfix.rules.reading import site, some
from bnfix.rules.rule import Case, Rule
from bnfix.types import Evidence, Finding, Fix, LoopLog, LoopNorm, RankDistance, Skipped

LIMIT = 0.1


class RanksDiffer(Rule):
    """Ranks have different statistics.

    ## What it does

    In a distributed run, compares the running statistics of all ranks at the end of the watch, and the batches that
    they saw in the same steps: d = median over channels of |μi − μj|/σ. Each rank leaves its figures in the store of
    `torch.distributed`; no collective call is made.

    ## Why is this bad

    One rank's statistics are saved, normally those of rank 0. Where shards differ (data sorted by class or by source
    and cut in pieces), they fit one shard. DDP's `broadcast_buffers=True` hides it: all ranks then carry what rank 0
    saw, and the other shards never count.

    ## Example

    ```python
    dataset = Subset(data, range(rank * n, (rank + 1) * n))  # bad where the data is sorted
    sampler = DistributedSampler(data, shuffle=True)  # good
    ```

    ## Fix

    Shuffle before sharding, or `SyncBatchNorm`; a trained model: `bnfix.recalibrate` on data from all shards.
    """

    code = "BN407"
    name = "ranks-differ"
    needs = ("loop",)

    def check(self, evidence: Evidence) -> Iterator[Finding | Skipped]:
        """One finding, for the norms that differ most."""
        log: LoopLog = evidence.loop
        if log.ranks is None:
            return
        if log.ranks.unseen:
            yield Skipped(self.code, log.ranks.unseen, "the watch to end on all ranks")
        limit = self.option(evidence, "shift", LIMIT)
        norms = {n.path: n for n in log.norms}
        far = [d for d in log.ranks.distances if _stored(d, norms[d.path], limit) or _batches(d, limit)]
        if not far:
            return
        far.sort(key=lambda d: -max(d.stored, d.batch or 0.0))
        worst = far[0]
        paths = tuple(site(d.path) for d in far)
        batches = f", {worst.batch:.2f} σ between their batches" if worst.batch is not None else ""
        yield self.found(
            "warning",
            f"{some(paths)}: ranks {worst.a} and {worst.b} differ at step {worst.step}, by {worst.stored:.2f} σ in "
            f"their statistics{batches} (limit {limit:g}); those of one rank are saved",
            paths,
            fix=Fix("code", "shuffle before sharding, or SyncBatchNorm; bnfix.recalibrate for a trained model", paths),
            stored=worst.stored,
            batch=worst.batch,
            step=worst.step,
            norms=len(far),
        )

    def bad(self) -> Case:
        """Shards with different means."""
        return Case(loop=lambda _: on_ranks(_sorted)[0])

    def good(self) -> Case:
        """Shards of one distribution."""
        return Case(loop=lambda _: on_ranks(_shuffled)[0])


def _stored(distance: RankDistance, norm: LoopNorm, limit: float) -> bool:
    # An exponential average holds about (2 − α)/α batches; values within a sample may be copies of one another, so a
    # sample counts once.
    alpha = norm.momentum or 0.1
    samples = max(norm.samples or 1, 1)
    chance: float = 4 * (2 / (samples * (2 - alpha) / alpha)) ** 0.5
    return distance.stored > max(limit, chance)


def _batches(distance: RankDistance, limit: float) -> bool:
    if distance.batch is None or distance.batches < 4:
        return False
    return distance.batch > max(limit, 4 * distance.batch_error)


def _sorted(watch: Any) -> Any:
    import torch.distributed as dist

    return _run(watch, 1.0 * dist.get_rank())


def _shuffled(watch: Any) -> Any:
    return _run(watch, 0.0)


def _run(watch: Any, shift: float) -> Any:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(net(), broadcast_buffers=False)
    torch.manual_seed(dist.get_rank())
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(20):
            step(optimizer, model(batch(64, shift)))
    return w.report()
