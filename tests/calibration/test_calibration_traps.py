"""Forwards that keep values where other chunks see them: isolated, or noticed and done in plain passes; never wrong.

Each net is run on joined batches and on batches kept as they are: the chunks have one shape, or several. An oracle of
plain forwards judges the result.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import types
from collections import deque
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from calib_nets import FIBERS, Forward
from nets import bits, lived_in
from torch import Tensor, nn
from trap_nets import PLAIN, Two, as_is, exact, images

import bnfix
from bnfix.calibration.ambient import Turn
from bnfix.calibration.chunks import Chunk
from bnfix.calibration.norms import find_norms
from bnfix.calibration.strands import RerunStrand

ways = pytest.mark.parametrize("forward", [None, as_is], ids=["joined", "as they are"])


# What a replica has of its own: threads are right.


class OnSelf(Two):
    """A U-Net's way: the encoder's output waits on self."""

    def forward(self, x: Tensor) -> Tensor:
        self.skip = self.conv1(x)
        y = self.second(F.relu(self.bn1(self.skip)))
        return self.bn2(self.conv2(y + self.skip))


class Three(Two):
    """A third norm, where what was kept comes in again."""

    def __init__(self) -> None:
        super().__init__()
        self.bn3 = nn.BatchNorm2d(4)


class InContainers(Three):
    """Values in a list, a dict and a deque on self."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        self.queue: deque[Tensor] = deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        self.stack.append(x)
        self.named["skip"] = x
        self.queue.append(x)
        y = self.second(F.relu(self.bn1(x)))
        return self.bn3(y + self.stack.pop() + self.named["skip"] * 2 + self.queue[-1])


class ByShape(Three):
    """A cache on self, keyed by shape, that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        self.cache[x.shape] = x
        return self.bn3(self.second(F.relu(self.bn1(x))) + self.cache[x.shape])


class Accumulating(Three):
    """A list and a tensor that grow with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.total = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        self.seen.append(x)
        self.total += x.mean((0, 2, 3))
        return self.bn3(self.second(F.relu(self.bn1(x))) + self.seen[-1])


class Kept:
    """fastai's Hook: an object that keeps a layer's output."""

    def __init__(self, module: nn.Module) -> None:
        self.stored: Tensor | None = None
        module.register_forward_hook(self.keep)

    def keep(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.stored = output


class HookObjects(Three):
    """fastai's DynamicUnet: the decoder reads from Hook objects on the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks = [Kept(self.conv1), Kept(self.bn1)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        return self.bn3(y + self.hooks[0].stored + self.hooks[1].stored)


class InAnObject(Three):
    """A plain object with attributes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = types.SimpleNamespace()

    def forward(self, x: Tensor) -> Tensor:
        self.notes.skip = self.conv1(x)
        return self.bn3(self.second(F.relu(self.bn1(self.notes.skip))) + self.notes.skip)


@ways
@pytest.mark.parametrize("net", [OnSelf, InContainers, ByShape, Accumulating, HookObjects, InAnObject])
def test_what_a_model_keeps_stays_with_its_chunk(net: type[nn.Module], forward: Forward | None) -> None:
    report = exact(net(), images(), forward)
    assert report.engine == FIBERS
    assert report.replay is not None
    assert report.replay < 1e-5


@ways
def test_a_hook_that_keeps_values_in_its_closure(forward: Forward | None) -> None:
    model = Three()
    store: dict[str, Tensor] = {}
    model.conv1.register_forward_hook(lambda _m, _i, out: store.__setitem__("skip", out))

    def run(self: Three, x: Tensor) -> Tensor:
        return self.bn3(self.second(self.first(x)) + store["skip"])

    model.forward = types.MethodType(run, model)  # type: ignore[method-assign]
    assert exact(model, images(), forward).engine == FIBERS


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_features_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = lived_in(timm.create_model(name, features_only=True))
    batches = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    report = bnfix.recalibrate(model, batches, forward=as_is, certify="full")
    assert report.engine == FIBERS
    assert report.residual is not None
    assert max(report.residual.mean, report.residual.var) < 1e-5


def test_what_the_model_keeps_is_as_before() -> None:
    for net in (InContainers, ByShape, Accumulating, HookObjects, InAnObject):
        model = lived_in(net())
        model(images()[0])
        own = {k: v for k, v in vars(model).items() if isinstance(v, (list, dict, deque)) and not k.startswith("_")}
        shown = repr(own)
        total = model.total.clone() if isinstance(model, Accumulating) else None
        bnfix.recalibrate(model, images())
        assert repr(own) == shown
        assert total is None or torch.equal(model.total, total)  # type: ignore[arg-type]


# What no object of the model's holds: noticed.

SKIP: Any = None
MEMO: Any = None
CACHE: dict[Any, Tensor] = {}
STACK: list[Tensor] = []


class InGlobal(Three):
    """A module-level variable."""

    def forward(self, x: Tensor) -> Tensor:
        global SKIP
        SKIP = self.conv1(x)
        return self.bn3(self.second(F.relu(self.bn1(SKIP))) + SKIP)


class OnClass(Three):
    """An attribute of the class."""

    skip: ClassVar[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        OnClass.skip = self.conv1(x)
        return self.bn3(self.second(F.relu(self.bn1(OnClass.skip))) + OnClass.skip)


class InGlobalCache(Three):
    """A module-level cache, keyed by shape."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        CACHE[x.shape] = x
        return self.bn3(self.second(F.relu(self.bn1(x))) + CACHE[x.shape])


class OnGlobalStack(Three):
    """A module-level stack: pushed by the encoder, popped by the decoder."""

    def forward(self, x: Tensor) -> Tensor:
        STACK.append(self.conv1(x))
        y = self.second(F.relu(self.bn1(STACK[-1])))
        return self.bn3(y + STACK.pop())


class FirstOneWins(Three):
    """A memo for one forward, forgotten at its end: here the first chunk is right and all others are wrong."""

    def forward(self, x: Tensor) -> Tensor:
        global MEMO
        x = self.conv1(x)
        if MEMO is None:
            MEMO = x.mean((0, 2, 3), keepdim=True)
        y = self.bn3(self.second(F.relu(self.bn1(x))) * (2 + MEMO))
        MEMO = None
        return y


@functools.lru_cache(maxsize=8)
def scratch(shape: torch.Size) -> Tensor:
    return torch.empty(shape)


class InScratch(Three):
    """A scratch tensor from an lru_cache, written and read."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        scratch(x.shape).copy_(x)
        return self.bn3(self.second(F.relu(self.bn1(x))) + scratch(x.shape))


class Patience(threading.local):
    """Of each thread: what the user set in one is not there in another."""

    scale = 1.0


OF_THREAD = Patience()


class PerThread(Three):
    """A setting of the caller's thread."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.bn3(self.second(y) * y**OF_THREAD.scale)


@ways
@pytest.mark.parametrize("net", [InGlobal, OnClass, InGlobalCache, OnGlobalStack, FirstOneWins, InScratch])
def test_what_is_kept_outside_the_model_is_noticed(net: type[nn.Module], forward: Forward | None, parked: str) -> None:
    assert exact(net(), images(), forward).engine == PLAIN


@pytest.mark.parametrize("count", [40, 400])
def test_a_setting_of_the_callers_thread(count: int, parked: str) -> None:
    OF_THREAD.scale = 3.0
    try:
        one = "one chunk" if count == 40 else FIBERS
        assert exact(PerThread(), images(count)).engine == (PLAIN if parked == "threads" else one)
    finally:
        del OF_THREAD.scale


def test_a_cache_by_shape_whose_first_chunk_has_a_shape_of_its_own() -> None:
    x = torch.cat(images(200))
    batches = [x[:10], x[10:58], x[58:106], x[106:154], x[154:]]
    assert exact(InGlobalCache(), batches, as_is).engine == PLAIN


def test_a_cache_by_shape_with_two_chunks() -> None:
    batches = images(32)
    assert exact(InGlobalCache(), batches, as_is).engine == PLAIN
    assert exact(FirstOneWins(), batches, as_is).engine == PLAIN


def test_hooks_that_write_where_the_users_forward_reads() -> None:
    model = Three()
    store: dict[str, Tensor] = {}
    model.conv1.register_forward_hook(lambda _m, _i, out: store.__setitem__("skip", out))

    def features(m: Any, batch: Tensor) -> Tensor:
        return m.bn3(m(batch) + store["skip"])

    assert exact(model, images(), features).engine == PLAIN
    lived_in(model)(images()[0])  # now there is a stale value to be read
    assert exact(model, images(), features).engine == PLAIN


CALLS = itertools.count()


class TakesTurns(Three):
    """Another norm at each call."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.bn2(self.conv2(y)) if next(CALLS) % 2 else self.bn3(self.conv2(y))


def test_a_forward_that_takes_another_way_each_time_is_an_error() -> None:
    model, batch = lived_in(TakesTurns()), images()[0]
    chunk = Chunk(bnfix.Call((batch,)), len(batch), (0,) * len(batch))
    turn = Turn.now(torch.device("cpu"))
    strand = RerunStrand(chunk, model, find_norms(model), turn, lambda _: contextlib.nullcontext())
    for _ in range(3):  # to the first norm, to the second, and past it: that is another one by now
        assert strand.error is None
        strand.resume(None)
    assert "the forward takes another way each time it runs" in str(strand.error)


# Values of running statistics that the model's own code reads.


class ReadsBehind(Three):
    """What comes behind depends on the buffers of a norm before."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.bn3(self.second(y) * self.bn1.running_var.sqrt().view(1, -1, 1, 1))  # type: ignore[union-attr]


class ReadsBefore(Three):
    """What a norm sees depends on its own buffers, as in a convolution that is folded as it runs."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x) * self.bn1.running_var.rsqrt().view(1, -1, 1, 1)  # type: ignore[union-attr]
        return self.bn3(self.second(F.relu(self.bn1(y))))


@pytest.mark.parametrize("count", [40, 400])
@pytest.mark.parametrize("net", [ReadsBehind, ReadsBefore])
def test_running_statistics_read_by_hand(net: type[nn.Module], count: int) -> None:
    assert exact(net(), images(count)).engine == PLAIN


class ReadsRound(Three):
    """Running statistics that have no fixed point: a step up where the variance is low, and down where it is high."""

    def forward(self, x: Tensor) -> Tensor:
        low = self.bn1.running_var.view(1, -1, 1, 1) < 4  # type: ignore[union-attr]
        y = self.conv1(x)
        y = y / y.std((0, 2, 3), keepdim=True) * torch.where(low, 3.0, 1.0)
        return self.bn3(self.second(F.relu(self.bn1(y))))


def test_statistics_that_never_settle_are_an_error() -> None:
    model = lived_in(ReadsRound())
    before = bits(model)
    with pytest.raises(bnfix.errors.CalibrationError, match="bn1: its statistics do not settle"):
        bnfix.recalibrate(model, images())
    assert all(torch.equal(now, before[name]) for name, now in bits(model).items())
