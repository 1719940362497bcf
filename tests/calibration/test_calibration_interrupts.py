"""Ctrl-C at the places where Python looks for it and where it hurt: it ends the call, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from types import FrameType
from typing import Any

import pytest
import torch
from calib_nets import FIBERS
from nets import bits, lived_in, same_bits
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from trap_nets import Two, exact, images

import bnfix
from bnfix.calibration.footing import Footing
from bnfix.running.written import Kept

LEFT = {
    f"{kind.__name__}.{name}": getattr(kind, name).__code__
    for kind, name in (
        (contextlib._GeneratorContextManager, "__exit__"),
        (contextlib.ExitStack, "__exit__"),
        (contextlib.ExitStack, "close"),
        (Footing, "__exit__"),
        (Kept, "__enter__"),
    )
}


def interrupted_at(function: str, nth: int) -> bool:
    """Recalibrate with Ctrl-C at the ``nth`` entry of a function; False where it is not entered as often."""
    entered = 0

    def trace(frame: FrameType, event: str, _arg: Any) -> None:
        nonlocal entered
        if event == "call" and frame.f_code.co_name == function.rpartition(".")[2] and _is_of(frame, function):
            entered += 1
            if entered == nth:
                raise KeyboardInterrupt

    model = lived_in(Two())
    before = bits(model)
    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        bnfix.recalibrate(model, images())
    except KeyboardInterrupt:
        assert same_bits(model, before)
        assert all(module.training == model.training for module in model.modules())
        return True
    finally:
        sys.settrace(outer)
    return False


def _is_of(frame: FrameType, function: str) -> bool:
    if function in LEFT:  # not by what the frame holds: to look at that would keep it
        return frame.f_code is LEFT[function]
    cls = function.rpartition(".")[0]
    own = frame.f_locals.get("self")
    return not cls or any(kind.__name__ == cls for kind in type(own).__mro__)


def untouched() -> tuple[Any, ...]:
    return (
        len(_get_current_function_mode_stack()),  # type: ignore[no-untyped-call]
        len(_get_current_dispatch_mode_stack()),  # type: ignore[no-untyped-call]
        torch.is_grad_enabled(),
        signal.getsignal(signal.SIGURG),
        [t.name for t in threading.enumerate() if t.name.startswith("bnfix")],
        sys.getprofile(),
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("nth", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "function", ["ParkedStrand._forward", "Listener.__exit__", "Guard.end", "Guard.start", "Run._advance", "put"]
)
def test_ctrl_c_leaves_nothing(function: str, nth: int) -> None:
    before = untouched()
    reached = interrupted_at(function, nth)
    assert untouched() == before
    assert reached or nth > 1 or FIBERS == "threads"
    assert exact(Two(), images()).engine == FIBERS


@pytest.mark.timeout(300)
@pytest.mark.parametrize("function", LEFT)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="frames of Python 3.10 hold on to what they were leaving")
def test_ctrl_c_as_something_is_left(function: str) -> None:
    """It had not begun to put back then: flags came late, the guard and the profiler stayed."""
    before, nth = untouched(), 1
    while interrupted_at(function, nth):
        assert untouched() == before, nth
        nth += 1
    assert nth > 1
    assert exact(Two(), images()).engine == FIBERS


def test_a_training_that_ctrl_c_stopped_may_be_recalibrated_right_there() -> None:
    """Any error inside has that Ctrl-C behind it, by Python's book-keeping alone."""

    class Viewed(Two):
        def forward(self, x: Any) -> Any:
            x.view(len(x), -1)  # fails in the other memory order, which is tried first
            return super().forward(x)

    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        exact(Viewed(), images())


def test_what_ctrl_c_broke_is_not_taken_for_the_models_failure() -> None:
    """It comes while torch puts a mode back: an error of torch's follows, and no other attempt is made."""

    class Broken(Two):
        def forward(self, x: Any) -> Any:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise RuntimeError("trying to pop from empty mode stack")  # noqa: B904

    model = lived_in(Broken())
    with pytest.raises(KeyboardInterrupt):
        bnfix.recalibrate(model, images())
