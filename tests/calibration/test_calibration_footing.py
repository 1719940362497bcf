"""Where a forward can be left in a thread that others use: nowhere else does a fiber park, no process ends.

pybind11 ends the process where calls of its functions return in another order than they were made in: each test here
that fails does so for all.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calib_nets import FIBERS
from nets import bits, lived_in, same_bits
from torch import Tensor
from trap_nets import Two, as_is, exact, images

import bnfix
from bnfix.calibration import fibers, patience


class Forked(Two):
    """Norms inside a function that C++ calls (torch.jit.fork), ``when`` the batch says so."""

    def __init__(self, when: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.when = when

    def forward(self, x: Tensor) -> Any:
        y = torch.jit.fork(self.first, x).wait() if self.when(x) else self.first(x)
        return self.second(y)


def test_inside_of_a_bound_function() -> None:
    assert exact(Forked(lambda _x: True), images(), as_is).engine == "threads"


def test_a_way_that_only_larger_batches_take() -> None:
    assert exact(Forked(lambda x: len(x) > 2), images()).engine == "threads"


def test_a_way_that_only_some_batches_take() -> None:
    seen: list[int] = []

    def third(x: Tensor) -> bool:
        seen.append(len(x))
        return len(seen) % 3 == 0

    bnfix.recalibrate(model := lived_in(Forked(third)), images(), forward=as_is)
    assert all(torch.isfinite(b).all() for b in model.buffers())


class Operator(Two):
    """Normalises by an operator object, as exported programs do."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv1(x)
        n = self.bn1
        y = torch.ops.aten.batch_norm(y, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, n.eps, False)
        return self.second(F.relu(y))


def test_operators_of_aten() -> None:
    assert exact(Operator(), images(), as_is).engine == "threads"


def test_under_a_profiler_that_is_the_users() -> None:
    calls = []
    sys.setprofile(mine := lambda _f, event, _a: calls.append(event))
    try:
        assert exact(Two(), images(), as_is).engine == "threads"
        assert sys.getprofile() is mine
    finally:
        sys.setprofile(None)
    assert exact(Two(), images(), as_is).engine == FIBERS
    assert sys.getprofile() is None


class Profiled(Two):
    """Counts its own calls while it runs, and leaves it at that."""

    def forward(self, x: Tensor) -> Any:
        self.calls: list[str] = []
        sys.setprofile(mine := lambda _f, event, _a: self.calls.append(event))
        y = self.second(self.first(x))
        assert sys.getprofile() is mine
        sys.setprofile(None)
        return y


def test_a_profiler_that_the_forward_sets_stays_its_own() -> None:
    assert exact(Profiled(), images()).engine == "threads"
    assert sys.getprofile() is None


def test_where_ctrl_c_is_ignored_as_in_the_background_of_a_shell() -> None:
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert exact(Two(), images(), as_is).engine == FIBERS
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)


def test_where_somebody_else_uses_the_signal() -> None:
    mine = lambda _n, _f: None  # noqa: E731 -- to be compared
    signal.signal(signal.SIGURG, mine)
    try:
        assert exact(Two(), images(), as_is).engine == "threads"
        assert signal.getsignal(signal.SIGURG) is mine
    finally:
        signal.signal(signal.SIGURG, signal.SIG_DFL)
    assert exact(Two(), images(), as_is).engine == FIBERS
    assert signal.getsignal(signal.SIGURG) is signal.SIG_DFL


def test_in_another_thread_than_the_main_one() -> None:
    found: list[Any] = []
    worker = threading.Thread(target=lambda: found.append(exact(Two(), images(), as_is).engine))
    worker.start()
    worker.join()
    assert found == ["threads"]


def test_ctrl_c_of_the_user_is_no_end_of_a_wait() -> None:
    count = []

    class Interrupts(Two):
        def forward(self, x: Tensor) -> Any:
            count.append(1)
            if len(count) == 4:
                raise KeyboardInterrupt
            return super().forward(x)

    model = lived_in(Interrupts())
    before = bits(model)
    with pytest.raises(KeyboardInterrupt):
        bnfix.recalibrate(model, images(), forward=as_is)
    assert same_bits(model, before)


def test_a_wait_is_ended_by_the_guard_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is global, and another thread holds it for good: every engine waits; the fiber's wait ends."""
    monkeypatch.setattr(patience, "PATIENCE", 0.6)
    guard = fibers.Guard()
    guard.start()
    lock = threading.Lock()
    lock.acquire()
    with pytest.raises(fibers.WaitedError), guard:
        lock.acquire()
    assert guard.fired()
    assert not guard.fired()
    guard.end()
    assert not any(t.name.startswith("bnfix") for t in threading.enumerate())
