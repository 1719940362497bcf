"""Scenarios in which one rank fails, in every way and at every moment."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from nets import lived_in
from ranks_common import Broken, Met, Team, attempt, data, net, scenario
from torch import Tensor, nn

from bnfix.calibration import ranks


def raising(batches: list[Any], error: BaseException, after: int = 1) -> Iterator[Any]:
    yield from batches[:after]
    raise error


BAD = 1
"""The rank that fails."""


def spoiled(team: Team, **how: Any) -> Met:
    """All is well but on one rank, where ``how`` says otherwise."""
    given = team.share(data(), tuple(len(p) for p in data().tensor_split(team.world)), 8)
    usual: dict[str, Any] = {"model": net(), "given": given}
    if team.rank == BAD:
        usual |= {name: make(usual[name]) if name in usual else make(None) for name, make in how.items()}
    return attempt(team, usual.pop("model"), usual.pop("given"), **usual)


@scenario
def loader_raises(team: Team) -> Met:
    return spoiled(team, given=lambda batches: raising(batches, OSError("disk on fire")))


@scenario
def loader_raises_at_once(team: Team) -> Met:
    return spoiled(team, given=lambda batches: raising(batches, OSError("disk on fire"), 0))


@scenario
def stream_raises(team: Team) -> Met:
    method = "population"
    given = team.share(data(), tuple(len(p) for p in data().tensor_split(team.world)), 8)
    return attempt(team, net(), raising(given, OSError("disk on fire")) if team.rank == BAD else given, method=method)


@scenario
def interrupted(team: Team) -> Met:
    return spoiled(team, given=lambda batches: raising(batches, KeyboardInterrupt()))


@scenario
def holds_nan(team: Team) -> Met:
    return spoiled(team, given=lambda batches: [*batches[:1], batches[1] * float("nan")])


@scenario
def no_batches(team: Team) -> Met:
    return spoiled(team, given=lambda batches: 7)


@scenario
def wrong_argument(team: Team) -> Met:
    return spoiled(team, method=lambda _: "magic")


@scenario
def wrong_forward(team: Team) -> Met:
    return spoiled(team, forward=lambda _: 3)


@scenario
def no_such_norm(team: Team) -> Met:
    return spoiled(team, select=lambda _: "nothing")


@scenario
def other_arguments(team: Team) -> Met:
    return spoiled(team, unbiased=lambda _: False)


@scenario
def other_model(team: Team) -> Met:
    return spoiled(team, model=lambda model: model[:-1].eval())


@scenario
def other_weights(team: Team) -> Met:
    """A checkpoint that was loaded on one rank only."""

    def shifted(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            next(p for p in model.parameters() if p.dim() == 4).flatten()[-1] += 1e-3
        return model

    return spoiled(team, model=shifted)


@scenario
def other_eps(team: Team) -> Met:
    def larger(model: nn.Module) -> nn.Module:
        norm: Any = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
        norm.eps = 1e-3
        return model

    return spoiled(team, model=larger)


@scenario
def all_empty(team: Team) -> Met:
    return attempt(team, net(), [])


def broken(team: Team, what: Callable[[Tensor], Tensor]) -> Met:
    x = data()
    given = [b.clone() for b in team.share(x, tuple(len(p) for p in x.tensor_split(team.world)), 8)]
    if team.rank == BAD:
        given[1][0, 0, 0, 0] = 1000
    return attempt(team, lived_in(Broken(what)), given)


@scenario
def forward_raises(team: Team) -> Met:
    def what(_: Tensor) -> Tensor:
        raise RuntimeError("no such word")

    return broken(team, what)


@scenario
def forward_interrupted(team: Team) -> Met:
    def what(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    return broken(team, what)


@scenario
def forward_makes_nan(team: Team) -> Met:
    return broken(team, lambda y: y / (y - y))


@scenario
def any_step(team: Team) -> Met:
    """A rank fails at each step in turn, as far as progress is told."""

    def tried(step: int, **options: Any) -> Met:
        told = 0

        def say(_: str) -> None:
            nonlocal told
            told += 1
            if told == step + 1 and team.rank == step % team.world:
                raise KeyboardInterrupt

        return attempt(team, net(), team.share(data() * 20, batch=8), progress=say, certify="full", **options)

    staged = _until_all_is_well(team, lambda step: tried(step, when="needed"))
    return _all(staged + _until_all_is_well(team, lambda step: tried(step, method="population")))


@scenario
def any_exchange(team: Team) -> Met:
    """A rank is interrupted before, in and after each exchange in turn."""
    original = ranks.Group._collect

    def tried(step: int, where: str) -> Met:
        count = 0

        def collect(self: Any, mine: Tensor, then: Any, *, joining: bool = False) -> Any:
            nonlocal count
            count += 1
            now = count == step + 1 and team.rank == step % team.world
            if now and where == "before":
                raise KeyboardInterrupt
            if now and where == "in":
                self._land = lambda *_: interrupt(self)
            found = original(self, mine, then, joining=joining)
            if now and where == "after":
                raise KeyboardInterrupt
            return found

        ranks.Group._collect = collect
        try:
            return attempt(team, lived_in(nn.Sequential(nn.BatchNorm2d(3))), team.share(data(), batch=32))
        finally:
            ranks.Group._collect = original

    found = [_until_all_is_well(team, lambda step, where=where: tried(step, where)) for where in WHERE]
    return _all([met for part in found for met in part])


@scenario
def any_collective(team: Team) -> Met:
    """Ctrl-C comes as each collective in turn has begun, and before anybody could keep that in mind."""
    original = dist.all_gather

    def tried(step: int) -> Met:
        count = 0

        def gathering(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            work = original(*args, **options)
            if count == step + 1 and team.rank == step % team.world:
                signal.raise_signal(signal.SIGINT)
            return work

        dist.all_gather = gathering
        try:
            return attempt(team, lived_in(nn.Sequential(nn.BatchNorm2d(3))), team.share(data(), batch=32))
        finally:
            dist.all_gather = original

    return _all(_until_all_is_well(team, tried))


@scenario
def interrupted_before_the_others_come(team: Team) -> Met:
    """A rank that is alone yet gives up, and goes on with something else; the others come later."""
    if team.rank == BAD:
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        timer.start()
    else:
        time.sleep(1.0)
    return attempt(team, net(), team.share(data()))


WHERE = ("before", "in", "after")


def _until_all_is_well(team: Team, tried: Callable[[int], Met]) -> list[Met]:
    """``tried(0)``, ``tried(1)``, … up to the first that fails on no rank."""
    met: list[Met] = []
    wrong = torch.ones(1)
    while wrong.item():
        met.append(tried(len(met)))
        wrong = torch.tensor([1.0 if met[-1].error else 0.0])
        dist.all_reduce(wrong, group=team.group)
    return met


def interrupt(group: Any) -> None:
    """Ctrl-C while waiting for the others: once."""
    del group._land
    raise KeyboardInterrupt


def _all(met: list[Met]) -> Met:
    last = met[-1]
    last.extra = {name: [getattr(m, name) for m in met] for name in ("digest", "untouched", "error", "text")}
    return last


def dies(team: Team) -> Met:
    """The last scenario: a process is gone in the middle."""

    def ending(batches: list[Tensor]) -> Iterator[Tensor]:
        yield batches[0]
        os._exit(0)

    return spoiled(team, given=ending)


FAILURES = {
    "loader_raises": ("CalibrationError", "after batch 0: OSError: disk on fire"),
    "loader_raises_at_once": ("CalibrationError", "at its first batch: OSError: disk on fire"),
    "stream_raises": ("CalibrationError", "after batch 0: OSError: disk on fire"),
    "interrupted": ("KeyboardInterrupt", ""),
    "holds_nan": ("CalibrationError", "batch 1 holds NaN or Inf"),
    "no_batches": ("TypeError", "iterates over, not int"),
    "wrong_argument": ("ValueError", "method is one of"),
    "wrong_forward": ("CalibrationError", "batch 0: "),
    "no_such_norm": ("CalibrationError", "select='nothing' fits no norm"),
    "forward_raises": ("CalibrationError", "no such word"),
    "forward_interrupted": ("KeyboardInterrupt", ""),
    "interrupted_before_the_others_come": ("KeyboardInterrupt", ""),
}
"""What the rank that fails meets."""

SHARED = {
    "forward_makes_nan": "rank 1, batch 1: two: its input holds NaN or Inf",
    "other_arguments": "unbiased is True on rank 0, False on rank 1",
    "other_model": "the norms is 4 (digest",
    "other_weights": "the digest of the weights is ",
    "other_eps": "the norms is 4 (digest",
    "all_empty": "the data holds no batch",
}
"""What all ranks meet alike."""
