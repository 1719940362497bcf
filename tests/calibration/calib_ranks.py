"""Scenarios for several processes, run in one go: ``python calib_ranks.py FOLDER`` starts four, forked after imports.

Each rank writes what it met to ``FOLDER/<rank>.pt``: {(scenario, world): the fields of a Met}. A scenario is a
function of a Team. Worlds of two and three are sub-groups of the four.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import greenlet
import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))


from ranks_common import (
    SCENARIOS,
    WORLDS,
    Iterated,
    Leaking,
    Met,
    Routes,
    Team,
    attempt,
    bright_and_dark,
    data,
    digest,
    made,
    net,
    scenario,
)
from ranks_failing import dies

import bnfix
from bnfix.calibration import patience, ranks


@scenario
def staged(team: Team) -> Met:
    return attempt(team, net(), team.share(data()), method="staged")


@scenario
def staged_float64(team: Team) -> Met:
    return attempt(team, net(torch.float64), team.share(data(dtype=torch.float64)), certify="full")


@scenario
def population(team: Team) -> Met:
    sizes = {2: (128, 64), 3: (64, 0, 128), 4: (64, 0, 64, 64)}[team.world]
    x = data(192, torch.float64)
    return attempt(team, net(torch.float64), team.share(x, sizes, 64), method="population")


@scenario
def online(team: Team) -> Met:
    return attempt(team, net(), team.share(data()), method="online")


@scenario
def iterated(team: Team) -> Met:
    return attempt(team, made(Iterated).double(), team.share(data(dtype=torch.float64)))


@scenario
def routes(team: Team) -> Met:
    return attempt(team, made(Routes).double(), bright_and_dark(team.world)[team.rank], certify="full")


@scenario
def leaking(team: Team) -> Met:
    x = data(400, torch.float64)
    return attempt(team, made(Leaking).double(), team.share(x, spread(team.world)), certify="full")


@scenario
def needed_by_none(team: Team) -> Met:
    model = net()
    with_all = bnfix.recalibrate(model, [data()], group=False)
    assert with_all.changed
    return attempt(team, model, team.share(data()), when="needed")


@scenario
def needed(team: Team) -> Met:
    return attempt(team, net(), team.share(data() * 20 + 40), when="needed")


@scenario
def dry(team: Team) -> Met:
    return attempt(team, net(), team.share(data()), dry_run=True, certify="full")


@scenario
def at_most(team: Team) -> Met:
    """``max_samples`` counts on each rank by itself."""
    return attempt(team, net(), team.share(data()), max_samples=10 + team.rank)


@scenario
def beyond_the_budget(team: Team) -> Met:
    """One rank has hardly any samples, the others more than fit."""
    shares = [4, *[160] * (team.world - 1)]
    given = list(data(sum(shares)).split(shares)[team.rank].split(8))
    return attempt(team, net(), given, method="staged", memory_budget=60_000)


@scenario
def counted_apart(team: Team) -> Met:
    """As after a training in which ranks counted on their own."""
    model = net()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
            norm.num_batches_tracked.fill_(3 + 7 * team.rank)
    return attempt(team, model, team.share(data()))


class Inside(nn.Module):
    """A model that holds a DistributedDataParallel: each of its forwards synchronises buffers."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.body = nn.parallel.DistributedDataParallel(net(), process_group=group)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x)
        return found


@scenario
def wrapped_inside(team: Team) -> Met:
    return attempt(team, Inside(team.group).eval(), team.share(data()))


@scenario
def the_same_on_all(team: Team) -> Met:
    return attempt(team, net(), list(data(32).split(16)))


@scenario
def drawn_anew(team: Team) -> Met:
    """Rank 0's data differs each time it is gone through."""

    class Draws:
        def __init__(self) -> None:
            self.seen = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.seen += 1
            return iter([data()[:32] + self.seen])

        def __len__(self) -> int:
            return 1

    given = Draws() if team.rank == 0 else team.share(data())
    return attempt(team, net(), given, certify="full")


@scenario
def used_up(team: Team) -> Met:
    """On one rank the data can't be gone through a second time."""
    mine = team.share(data())
    return attempt(team, net(), iter(mine) if team.rank == 0 else mine, certify="full")


@scenario
def wrapped(team: Team) -> Met:
    """DDP around it; trained a step afterwards."""
    model = net()
    parallel = nn.parallel.DistributedDataParallel(model, process_group=team.group)
    met = attempt(team, parallel, team.share(data()))
    met.digest = digest(model)
    parallel.eval()(data(4)).sum().backward()
    return met


@scenario
def synchronised(team: Team) -> Met:
    """In evaluation mode a SyncBatchNorm exchanges nothing by itself."""
    return attempt(team, nn.SyncBatchNorm.convert_sync_batchnorm(net()).train(), team.share(data()))


@scenario
def alone(team: Team) -> Met | None:
    return attempt(team, net(), [data()], group=False) if team.rank == 0 else None


@scenario
def late(team: Team) -> Met:
    ranks.PATIENCE = 0.2
    if team.rank == 1:
        time.sleep(0.6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        met = attempt(team, net(), team.share(data()))
    met.extra["warned"] = [str(w.message) for w in caught]
    return met


def spread(world: int) -> tuple[int, ...]:
    """400 samples, on the first rank several chunks of them, between none."""
    return (300, *[0] * (world - 2), 100)


@scenario
def stuck_on_one(team: Team) -> Met:
    """One rank's chunks wait for one another: a lock held across a norm."""
    patience.PATIENCE = 0.3
    lock = threading.Lock()
    model = net(torch.float64)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with lock if team.rank == 0 else contextlib.nullcontext():
            return m(x)

    return attempt(team, model, team.share(data(400, torch.float64), spread(team.world)), forward=forward)


def by_itself() -> bool:
    """Whether a forward runs by itself: neither in a thread nor in a fiber of the engine's."""
    return threading.current_thread() is threading.main_thread() and greenlet.getcurrent().parent is None


@scenario
def full_on_one(team: Team) -> Met:
    """One rank has no memory for all of its chunks at once."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if team.rank == 1 and len(x) > 4 and not by_itself():
            raise torch.OutOfMemoryError("no memory left")
        return m(x)

    return attempt(team, net(), team.share(data(400), (200, 200, *[0] * (team.world - 2))), forward=forward)


@scenario
def full_in_proof(team: Team) -> Met:
    """One rank has no memory left when it runs a part of a chunk again; its first look at the data went well."""
    times = itertools.count()  # no number in a closure: that would be put back

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if by_itself() and next(times) == 1 and team.rank == 1:
            raise torch.OutOfMemoryError("no memory left")
        return m(x)

    return attempt(team, net(), team.share(data(400), (200, 200, *[0] * (team.world - 2))), forward=forward)


@scenario
def remembers_on_one(team: Team) -> Met:
    """What one rank computes depends on how often it ran."""
    calls = 0

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        calls += team.rank == 1
        return m(x * (1 + calls % 2))

    met = attempt(team, net(), team.share(data(400), (200, 200, *[0] * (team.world - 2))), forward=forward)
    met.extra["calls"] = calls
    return met


def _save(results: dict[tuple[str, int], Met | None], path: Path) -> None:
    torch.save({key: met and vars(met) for key, met in results.items()}, path)


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=max(WORLDS))
    groups = {world: dist.new_group(list(range(world))) if world < max(WORLDS) else None for world in WORLDS}
    results: dict[tuple[str, int], Met | None] = {}
    log = (folder / f"{rank}.log").open("w")
    usual = ranks.PATIENCE, patience.PATIENCE
    try:
        for name, work in SCENARIOS.items():
            for world in WORLDS:
                if rank >= world:
                    continue
                began = time.monotonic()
                ranks.PATIENCE, patience.PATIENCE = usual
                torch.manual_seed(rank)  # no rank may rely on the others having the same
                results[name, world] = work(Team(rank, world, groups[world]))
                working = torch.ones(1)
                dist.all_reduce(working, group=groups[world])  # nothing is left half-way between the ranks
                assert working.item() == world, name
                log.write(f"{name} {world} {time.monotonic() - began:.2f}\n")
                log.flush()
        if rank == 3:
            results["not a member", 4] = attempt(Team(rank, 4, groups[2]), net(), [data()])
        dist.barrier()
        _save(results, folder / f"{rank}.pt")
        results["dies", 4] = dies(Team(rank, 4, None))
        _save(results, folder / f"{rank}.pt")
    except BaseException:  # noqa: BLE001  # into the log: the test shows it
        traceback.print_exc(file=log)
        log.flush()
        os._exit(1)
    os._exit(0)  # no clean farewell: a process of the group is gone


if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    team = [fork.Process(target=main, args=(rank, Path(sys.argv[1]))) for rank in range(max(WORLDS))]
    for process in team:
        process.start()
    for process in team:
        process.join()
    sys.exit(any(p.exitcode for p in team))
