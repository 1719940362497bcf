"""Where in the user's own code something happened: read off the running stack, nothing of it kept alive."""

from __future__ import annotations

import linecache
import os
import site
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import islice
from types import CodeType, FrameType

import torch
from torch import nn

from bnfix.types import Line

_CALL = nn.Module._call_impl.__code__
_DEEPEST = 400
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_OWN = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

Spot = tuple[str, int, str]
"""File, line, function: what is kept of a frame. Its text is read when a report is made."""
WayIn = tuple[tuple[Spot, tuple[int | None, ...]], ...]
"""Lines from the model's own forward on inwards, each with the expression that is running."""


@cache
def _libraries() -> tuple[str, ...]:
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sysconfig.get_path("purelib")}
    paths |= {sysconfig.get_path("platlib"), *site.getsitepackages(), site.getusersitepackages()}
    return tuple(os.path.abspath(p) + os.sep for p in paths if p)


@cache
def _kind(filename: str) -> int:
    """0: the user's own code, 1: some library's, 2: torch, bnfix or no file at all."""
    path = os.path.abspath(filename)
    if path.startswith((_TORCH, _OWN)) or filename.startswith("<frozen"):
        return 2
    return 1 if path.startswith(_libraries()) else 0


@lru_cache(maxsize=4096)
def _source(code: CodeType, lasti: int) -> tuple[int | None, ...]:
    """Lines and columns of the expression that is running.

    Not the instruction itself: once the interpreter has specialised a call (``tuple(net(x) for x in xs)``, from the
    eighth time on), the same expression runs at another one.
    """
    if sys.version_info < (3, 11):  # which specialises nothing
        return (lasti,)
    found = next(islice(code.co_positions(), lasti // 2, None), (None,))
    return (lasti,) if None in found else found


def position(frame: FrameType | None, end: CodeType | None, root: CodeType | None) -> tuple[int, bool]:
    """One number for the way from ``frame`` up to the function ``end``: equal where every call on it is the same.

    And whether that way leads through ``root``, the forward of the whole model.
    """
    found, depth, inside = 0, 0, False
    while frame is not None and depth < _DEEPEST:
        code = frame.f_code
        found = hash((found, code, _source(code, frame.f_lasti)))
        if code is root:
            inside = True
        if code is end:
            break
        frame, depth = frame.f_back, depth + 1
    return found, inside


def user_spot(frame: FrameType | None) -> Spot | None:
    """The user's line that led to ``frame``: in the loop, outside of every module, else in the model.

    The nearest frame that calls a module from outside of all modules, of the user's own files where there is one.
    """
    within, around = _parts(frame)
    for part in (around, within):
        for wanted in (0, 1):
            for f in part:
                if _kind(f.f_code.co_filename) == wanted:
                    return _spot(f)
    return None


def way_in(frame: FrameType | None) -> WayIn:
    """The user's lines in the model that led to ``frame``, the outermost first; a library's where there are none."""
    within, _ = _parts(frame)
    for wanted in (0, 1):
        found = [f for f in reversed(within) if _kind(f.f_code.co_filename) == wanted]
        if found:
            return tuple((_spot(f), _source(f.f_code, f.f_lasti)) for f in found)
    return ()


def where_they_part(ways: Sequence[WayIn]) -> list[Spot | None]:
    """The line of each way at which they first are not the same; the innermost where they all are, as in a loop."""
    least = min(map(len, ways), default=0)
    level = next((i for i in range(least) if len({way[i] for way in ways}) > 1), least)
    return [way[min(level, len(way) - 1)][0] if way else None for way in ways]


def _parts(frame: FrameType | None) -> tuple[list[FrameType], list[FrameType]]:
    """The frames inside of the outermost module, and those around it; the nearest first."""
    frames: list[FrameType] = []
    outermost = 0
    while frame is not None and len(frames) < _DEEPEST:
        if frame.f_code is _CALL:
            outermost = len(frames)
        frames.append(frame)
        frame = frame.f_back
    return frames[:outermost], frames[outermost:]


def _spot(frame: FrameType) -> Spot:
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


def here(depth: int = 1) -> FrameType:
    """The caller's frame, or one further up."""
    return sys._getframe(depth + 1)


def line_of(spot: Spot | None) -> Line | None:
    """The line with its text."""
    if spot is None:
        return None
    file, number, function = spot
    text = linecache.getline(file, number).strip()
    relative = os.path.relpath(file) if os.path.isabs(file) else file
    return Line(file if relative.startswith("..") else relative, number, function, text)
