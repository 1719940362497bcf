"""Forwards that rebind something outside of the model around a norm: right, and put back, however they are parked."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calib_nets import residual
from nets import bits, lived_in, same_bits
from torch import Tensor, nn
from trap_nets import EXACT, PLAIN, Two, as_is, exact, images

import bnfix
from bnfix.errors import CalibrationError

Context = Callable[[], AbstractContextManager[Any]]
SLOPE = 0.0
SETTINGS: dict[str, float] = {"slope": 0.0}
SLOPES: list[float] = []
settings = types.ModuleType("bnfix_test_settings")
settings.slope = 0.0  # type: ignore[attr-defined]
sys.modules[settings.__name__] = settings


class Config:
    """A singleton of settings, and a class with a setting."""

    common: ClassVar[float] = 0.0

    def __init__(self) -> None:
        self.slope = 0.0


CONFIG = Config()


@contextlib.contextmanager
def rebound(holder: Any, name: str) -> Iterator[None]:
    old = getattr(holder, name)
    setattr(holder, name, old + 0.5)
    try:
        yield
    finally:
        setattr(holder, name, old)


@contextlib.contextmanager
def rebound_global() -> Iterator[None]:
    global SLOPE
    old, SLOPE = SLOPE, SLOPE + 0.5
    try:
        yield
    finally:
        SLOPE = old


@contextlib.contextmanager
def rebound_entry() -> Iterator[None]:
    old = SETTINGS["slope"]
    SETTINGS["slope"] = old + 0.5
    try:
        yield
    finally:
        SETTINGS["slope"] = old


@contextlib.contextmanager
def on_a_list() -> Iterator[None]:
    SLOPES.append(0.5)
    try:
        yield
    finally:
        SLOPES[:] = SLOPES[: len(SLOPES) - 1] if len(SLOPES) == 1 else [0.25, *SLOPES]  # out of order: it stays


@contextlib.contextmanager
def without_a_finally() -> Iterator[None]:
    old = F.relu
    F.relu = F.silu  # type: ignore[assignment]
    yield
    F.relu = old


def in_a_closure() -> tuple[Context, Callable[[], float]]:
    slope = 0.0

    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        nonlocal slope
        old, slope = slope, slope + 0.5
        try:
            yield
        finally:
            slope = old

    return inside, lambda: slope


CLOSURE, IN_CLOSURE = in_a_closure()

PATCHES: dict[str, tuple[Context, Callable[[], Any], Callable[[Tensor], Tensor]]] = {
    "function of torch": (lambda: mock.patch.object(F, "relu", F.silu), lambda: F.relu, lambda y: F.relu(y)),
    "operator of torch": (
        lambda: mock.patch.object(torch, "erf", torch.cos), lambda: torch.erf, lambda y: torch.erf(y)
    ),
    "method of a tensor": (
        lambda: mock.patch.object(Tensor, "erf", Tensor.cos), lambda: Tensor.erf, lambda y: y.erf()
    ),
    "function of a library": (lambda: mock.patch("math.tau", -1.0), lambda: math.tau, lambda y: y.cos() * math.tau),
    "by its full name": (
        lambda: mock.patch("bnfix_test_settings.slope", 0.5),
        lambda: settings.slope,
        lambda y: F.leaky_relu(y, settings.slope),
    ),
    "module": (lambda: rebound(settings, "slope"), lambda: settings.slope, lambda y: F.leaky_relu(y, settings.slope)),
    "global": (rebound_global, lambda: SLOPE, lambda y: F.leaky_relu(y, SLOPE)),
    "class": (lambda: rebound(Config, "common"), lambda: Config.common, lambda y: F.leaky_relu(y, Config.common)),
    "object": (lambda: rebound(CONFIG, "slope"), lambda: CONFIG.slope, lambda y: F.leaky_relu(y, CONFIG.slope)),
    "entry of a dict": (rebound_entry, lambda: dict(SETTINGS), lambda y: F.leaky_relu(y, SETTINGS["slope"])),
    "list": (on_a_list, lambda: list(SLOPES), lambda y: F.leaky_relu(y, sum(SLOPES))),
    "closure": (CLOSURE, IN_CLOSURE, lambda y: F.leaky_relu(y, IN_CLOSURE())),
    "environment": (
        lambda: mock.patch.dict(os.environ, {"BNFIX_TEST_SLOPE": "0.5"}),
        lambda: os.environ.get("BNFIX_TEST_SLOPE"),
        lambda y: F.leaky_relu(y, float(os.environ.get("BNFIX_TEST_SLOPE", "0"))),
    ),
    "not in a finally": (without_a_finally, lambda: F.relu, lambda y: F.relu(y)),
}  # fmt: skip


class Patched(Two):
    """Enters a context around its first norm; what it is set to matters inside and behind."""

    def __init__(self, context: Context, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.context, self.act = context, act

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            y = self.act(self.bn1(self.conv1(x)))
        return self.bn2(self.act(self.conv2(y)))


class PatchedAll(Patched):
    """The same around all of it: with each norm the values are right, and what is left behind is not."""

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            return super().forward(x)


def patched(what: str, kind: type[Patched] = Patched) -> tuple[nn.Module, Callable[[], Any]]:
    context, now, act = PATCHES[what]
    return kind(context, act), now


@pytest.mark.parametrize("what", list(PATCHES))
def test_what_is_patched_around_a_norm_is_put_back(what: str, parked: str) -> None:
    model, now = patched(what)
    before = now()
    report = exact(model, images())
    assert now() == before
    assert report.engine == PLAIN
    assert any("overwrite" in note or "not when it runs alone" in note for note in report.notes)


@pytest.mark.parametrize("what", ["function of torch", "global", "not in a finally"])
def test_one_chunk_may_patch_what_it_likes(what: str) -> None:
    model, now = patched(what)
    before = now()
    for certify in ("replay", None):
        assert exact(model, images(40), certify=certify).engine == "one chunk"
        assert now() == before


def test_a_patch_that_makes_no_difference_costs_nothing(parked: str) -> None:
    before = np.geterr(), F.silu, torch.get_num_threads()
    assert exact(Patched(lambda: mock.patch.object(F, "silu", F.gelu), F.relu), images()).engine == parked
    assert exact(Patched(lambda: np.errstate(all="raise"), F.relu), images()).engine == parked
    assert (np.geterr(), F.silu, torch.get_num_threads()) == before


def test_a_patch_where_no_certificate_is_asked_for(parked: str) -> None:
    model, now = patched("function of torch")
    before = now()
    report = exact(model, images(), certify=None)
    assert now() is before
    assert report.engine == PLAIN
    assert any("in plain passes over the data" in note for note in report.notes)


def test_a_patch_is_put_back_when_a_forward_fails(parked: str) -> None:
    context, now, _ = PATCHES["not in a finally"]
    before, data = now(), images()
    model = lived_in(Patched(context, lambda y: y / (y.abs() > 1e-4 * (len(y) > 2))))
    stored = bits(model)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        bnfix.recalibrate(model, data)
    assert now() is before
    assert same_bits(model, stored)


def test_what_a_forward_sets_for_good_stays_set(parked: str) -> None:
    global LAST
    LAST = None
    exact(SetsForGood(), images())
    assert isinstance(LAST, torch.Size)  # as after any forward


LAST: Any = None


class SetsForGood(Two):
    """Notes something in a global, at each forward."""

    def forward(self, x: Tensor) -> Any:
        global LAST
        LAST = x.shape
        return super().forward(x)


def test_nothing_outside_keeps_activations_alive() -> None:
    import weakref

    kept: list[weakref.ref[Tensor]] = []

    class Keeps(Two):
        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            kept_here.append(weakref.ref(y))
            with rebound(CONFIG, "slope"):
                return self.second(y)

    kept_here = _Unknown(kept)
    bnfix.recalibrate(lived_in(Keeps()), images(), forward=as_is)
    gc.collect()
    assert len(kept) > 20
    assert not any(ref() is not None for ref in kept)


class _Unknown:
    """Hands on to a list that is not put back."""

    def __init__(self, to: list[Any]) -> None:
        self.append = to.append


def test_a_check_puts_back_as_well(parked: str) -> None:
    model, now = patched("function of torch")
    before = now()
    bnfix.check(lived_in(model), data=images())
    assert now() is before
    assert max(residual(model, images())) > EXACT
