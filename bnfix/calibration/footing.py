"""Where a forward may be left in the middle, so that another goes on in the same thread.

What is on the C stack of the one stays there while the other runs. Functions bound by pybind11 keep a list of their
calls in the thread and end the process where they return in another order than they were called in; so does torch with
modes and dispatch keys, if not as harshly. So a forward is left only where a first run was watched: at the same
instructions of the same functions, with no such call around them, and nothing of the thread changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from bnfix.calibration.ambient import surroundings
from bnfix.calibration.listening import Listener, Seen
from bnfix.running import Call

Way = tuple[Any, ...]
"""The functions on the way from a forward's start to one of its norms, each with the instruction that it is at."""
_CALLS = nn.Module._call_impl.__code__.co_filename
_OF_PYTHON = frozenset({"call", "return"})
_FROM, _TO = Listener.heard.__code__, Call.apply.__code__


def way_here() -> Way | None:
    """The way of the norm that is being asked about; None where it does not lead back to the start of the forward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _FROM:
        frame = frame.f_back
    found: list[CodeType | int] = []
    while frame is not None:
        if frame.f_code is _TO:
            return tuple(found)
        if frame.f_code.co_filename != _CALLS:  # a module with hooks is called in another way than one without
            found += (frame.f_code, frame.f_lasti)
        frame = frame.f_back
    return None


class Footing:
    """Watches one forward: ``ways`` are those of its norms, ``sound`` whether it could have been left at each of them.

    Args:
        device: where the model is.
        listener: the mode that hears of the norms, entered already; it is not on the stack when it hears of one.
    """

    def __init__(self, device: torch.device, listener: Listener) -> None:
        self.ways: set[Way] = set()
        self.sound = sys.getprofile() is None  # somebody else's would be lost
        self._device, self._active = device, False
        self._bound: list[Any] = []
        self.aside = _Aside(self._note)
        modes, *others = surroundings(device)
        self._around = (tuple(m for m in modes if m != id(listener)), *others)

    def __enter__(self) -> None:
        if self.sound:
            self._active = True
            sys.setprofile(self._note)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Watch no more; a second time does nothing."""
        if self._active and sys.getprofile() == self._note:
            sys.setprofile(None)

    def step(self, seen: Seen) -> None:
        """At a norm."""
        if not self.sound:
            return
        way, watched = way_here(), sys.getprofile() == self._note  # a forward may have set a profiler of its own
        if way is None or not watched or self._bound or seen.bound or surroundings(self._device) != self._around:
            self.sound = False
        else:
            self.ways.add(way)

    def _note(self, _frame: FrameType, event: str, function: Any) -> None:
        if event in _OF_PYTHON or not _is_record(type(getattr(function, "__self__", None)).__name__):
            return
        if event == "c_call":
            self._bound.append(function)
        elif self._bound and self._bound[-1] is function:  # Python 3.12 tells of some returns twice
            self._bound.pop()


class _Aside:
    """Calls inside are not the forward's: to watch them as well takes as long as all others together."""

    def __init__(self, note: Callable[[FrameType, str, Any], None]) -> None:
        self._note, self._paused = note, False

    def __enter__(self) -> None:
        self._paused = sys.getprofile() == self._note  # a method is another object each time
        if self._paused:
            sys.setprofile(None)

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._paused:
            sys.setprofile(self._note)


@cache
def _is_record(kind: str) -> bool:
    """Whether it is of functions that pybind11 made: what they are methods of is a record of its own."""
    return kind == "PyCapsule" or kind.startswith("pybind11")
