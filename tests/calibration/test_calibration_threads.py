"""Chunks that park, in fibers or threads: what belongs to process or thread, what they wait for, what stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import io
import os
import queue
import signal
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calib_nets import FIBERS, residual
from nets import bits, lived_in, same_bits
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trap_nets import EXACT, PLAIN, Two, as_is, exact, flags, images, within

import bnfix
from bnfix.calibration import patience
from bnfix.errors import CalibrationError

Context = Callable[[], AbstractContextManager[Any]]


class Inside(Two):
    """The norms run inside of a context that the forward enters."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.context = context

    def forward(self, x: Tensor) -> Any:
        with self.context():
            y = self.first(x)
            return self.second(y).float()


# Switches of the process: entered by one chunk, they are not on for the others, nor left on.


@contextlib.contextmanager
def switched(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    old = read()
    write(value)
    try:
        yield
    finally:
        write(old)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


SWITCHES: dict[str, Context] = {
    "mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "cudnn": lambda: torch.backends.cudnn.flags(enabled=False, deterministic=True),
    "attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "deterministic": lambda: switched(
        torch.are_deterministic_algorithms_enabled,
        lambda on: torch.use_deterministic_algorithms(on, warn_only=True),
        True,
    ),
    "precision": lambda: switched(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "default dtype": lambda: switched(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "generators": torch.random.fork_rng,
    "warnings": quiet,
    "standard output": lambda: contextlib.redirect_stdout(io.StringIO()),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("switch", list(SWITCHES))
def test_a_switch_around_norms(switch: str, parked: str) -> None:
    before = flags()
    report = exact(Inside(SWITCHES[switch]), images(), as_is)
    of_a_thread = switch in ("autocast", "gradients", "inference")
    assert report.engine == ("threads" if of_a_thread else parked)
    assert report.replay == 0
    assert {k: v for k, v in flags().items() if v != before[k]} == {}


def test_a_switch_that_one_chunk_turns_is_not_turned_for_the_others() -> None:
    seen: list[bool] = []

    class Looks(Two):
        def forward(self, x: Tensor) -> Any:
            on = torch.backends.mkldnn.enabled
            with torch.backends.mkldnn.flags(enabled=False):
                y = self.first(x)
            seen_here.seen.append(on and torch.backends.mkldnn.enabled)
            return self.second(y)

    seen_here = types.SimpleNamespace(seen=_Kept(seen))
    exact(Looks(), images(), as_is)
    assert len(seen) > 50
    assert all(seen)


class _Kept:
    """Hands on to a list: an object that is none of the containers that are put back."""

    def __init__(self, to: list[Any]) -> None:
        self.put, self.count = to.append, 0

    def append(self, value: Any) -> None:
        self.put(value)
        self.count += 1


# What the caller's thread has.


def test_a_device_and_modes_of_the_callers() -> None:
    devices: list[str] = []

    class Makes(Two):
        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            told.append(str(torch.zeros(2).device))
            return self.second(F.relu(y))

    told = _Kept(devices)

    class Doubles(TorchFunctionMode):
        def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            return out * 2 if func is F.relu else out

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    for context in (torch.device("meta"), Doubles(), Counts()):
        model, data = Makes(), images()
        for options in ({"certify": "full"}, {"method": "population"}, {"when": "needed"}, {}):
            lived_in(model)
            with context:
                report = bnfix.recalibrate(model, data, forward=as_is, **options)  # type: ignore[arg-type]
        assert report.engine == FIBERS
        if isinstance(context, torch.device):
            assert set(devices) == {"meta"}
            continue
        with context:
            assert max(residual(model, data)) <= EXACT


SCALE = contextvars.ContextVar("SCALE", default=1.0)


def test_context_variables_of_the_callers() -> None:
    class Scaled(Two):
        def forward(self, x: Tensor) -> Any:
            return self.second(self.first(x) ** SCALE.get())

    token = SCALE.set(3.0)
    try:
        assert exact(Scaled(), images(), as_is).engine == FIBERS
    finally:
        SCALE.reset(token)


def test_an_event_loop_that_only_the_callers_thread_has(parked: str) -> None:
    class Loops(Two):
        def forward(self, x: Tensor) -> Any:
            asyncio.get_event_loop()
            return super().forward(x)

    asyncio.set_event_loop(loop := asyncio.new_event_loop())
    try:
        assert exact(Loops(), images(), as_is).engine == (PLAIN if parked == "threads" else FIBERS)
    finally:
        asyncio.set_event_loop(None)
        loop.close()


# Waiting for one another.

LOCK, REENTRANT, PLACES = threading.Lock(), threading.RLock(), threading.BoundedSemaphore(2)
CONDITION, SLOT = threading.Condition(), queue.Queue[Tensor](maxsize=1)


@contextlib.contextmanager
def careless() -> Iterator[None]:
    LOCK.acquire()
    yield
    LOCK.release()  # not in a finally


@contextlib.contextmanager
def through_a_queue() -> Iterator[None]:
    SLOT.put(torch.zeros(1))
    yield
    SLOT.get()


WAITS: dict[str, Context] = {
    "lock": lambda: LOCK,
    "reentrant": lambda: REENTRANT,
    "semaphore": lambda: PLACES,
    "condition": lambda: CONDITION,
    "careless": careless,
    "queue": through_a_queue,
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.6)
    monkeypatch.setattr(patience, "MORE_PATIENCE", 1.5)


def no_threads() -> bool:
    return not any(t.name.startswith("bnfix") for t in threading.enumerate())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("what", list(WAITS))
def test_something_held_across_a_norm(what: str, parked: str) -> None:
    report = exact(Inside(WAITS[what]), images(80), as_is)
    if parked == "fibers" and what in ("reentrant", "condition"):  # one thread may take them as often as it likes
        assert report.engine == FIBERS
    else:
        assert report.engine == PLAIN
        assert any("waited for another one" in note for note in report.notes)
    assert not LOCK.locked()
    assert SLOT.empty()
    assert within(5, no_threads)


@pytest.mark.usefixtures("impatient")
def test_a_lock_held_across_a_norm_while_other_threads_work(parked: str) -> None:
    stop = threading.Event()
    worker = threading.Thread(target=lambda: [sum(range(5000)) for _ in iter(stop.is_set, True)])
    worker.start()
    try:
        assert exact(Inside(lambda: LOCK), images(80), as_is).engine == PLAIN
    finally:
        stop.set()
        worker.join()


def test_a_lock_on_self_is_each_chunks_own() -> None:
    class Locked(Two):
        def __init__(self) -> None:
            super().__init__()
            self.lock, self.slot = threading.Lock(), queue.Queue[Tensor](maxsize=1)

        def forward(self, x: Tensor) -> Any:
            with self.lock:
                self.slot.put(y := self.first(x))
                return self.second(y) + self.slot.get()

    assert exact(Locked(), images(), as_is).engine == FIBERS


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("again", [False, True], ids=["once", "until it works"])
@pytest.mark.parametrize("context", [contextlib.nullcontext, WAITS["lock"]], ids=["threads", "plain passes"])
def test_a_forward_that_swallows_everything(context: Context, again: bool) -> None:
    class Swallows(Two):
        def forward(self, x: Tensor) -> Any:
            with context():
                for _ in range(1000 if again else 1):
                    try:
                        x = self.second(self.first(x))
                        break
                    except BaseException:  # noqa: BLE001
                        continue
                return x

    exact(Swallows(), images(80), as_is)
    assert within(5, no_threads)


# Ctrl-C, and what stays behind.


class Slow(Two):
    """Takes its time between its norms."""

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        for _ in range(20):
            time.sleep(0.005)
        return self.second(y)


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("wait", [0.05, 0.4])
def test_ctrl_c_while_chunks_are_parked(wait: float, times: int) -> None:
    model = lived_in(Slow())
    before = bits(model)
    bnfix.recalibrate(lived_in(Two()), images(32))  # what is imported on first use is there
    awake = True

    def interrupt(*_: object) -> None:
        if awake:
            raise KeyboardInterrupt

    timers = [threading.Timer(wait + 0.03 * i, os.kill, (os.getpid(), signal.SIGINT)) for i in range(times)]
    handler = signal.signal(signal.SIGINT, interrupt)
    try:
        for timer in timers:
            timer.start()
        bnfix.recalibrate(model, images(800), forward=as_is)
    except KeyboardInterrupt:
        awake = False  # what comes later would hit pytest
        for timer in timers:
            timer.join()
    else:
        pytest.fail("no interrupt came through")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert same_bits(model, before)
    assert within(10, no_threads)


@pytest.mark.parametrize("fails", [False, True])
def test_no_activation_stays_alive(fails: bool) -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Cycles(Two):
        def forward(self, x: Tensor) -> Any:
            self.skip = self.conv1(x)
            self.me = types.SimpleNamespace(model=self, skip=self.skip)
            told.append(weakref.ref(self.skip))
            y = self.second(F.relu(self.bn1(self.skip)))
            if fails and told.count > 30:
                raise ValueError("enough")
            return y

    told = _Kept(alive)
    model = lived_in(Cycles())
    with contextlib.suppress(CalibrationError):
        bnfix.recalibrate(model, images(), forward=as_is)
    gc.collect()
    assert len(alive) > 25
    assert sum(ref() is not None for ref in alive) == 0
    assert within(5, no_threads)
