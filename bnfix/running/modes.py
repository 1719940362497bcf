"""The modes of torch functions and of operators that a thread is in: Ctrl-C may come just as one is left."""

from __future__ import annotations

import traceback
from typing import Any

from torch import overrides
from torch.overrides import _get_current_function_mode_stack
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Modes = tuple[list[Any], list[Any]]


def modes_of_thread() -> Modes:
    """Those of torch functions and those of operators, outermost first."""
    return list(_get_current_function_mode_stack()), list(_get_current_dispatch_mode_stack())  # type: ignore[no-untyped-call]


def let_go(error: BaseException) -> None:
    """Let go of what the frames behind an error hold: a mode that torch was about to put back comes only then."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        one = pending.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            pending += [one.__cause__, one.__context__]


def set_modes(kept: Modes) -> None:
    """Leave those that are not among ``kept``, and enter those that are missing."""
    functions, operators = kept
    pairs = (
        (functions, _get_current_function_mode_stack, overrides._pop_mode, overrides._push_mode),
        (operators, _get_current_dispatch_mode_stack, _python_dispatch._pop_mode, _python_dispatch._push_mode),
    )
    for wanted, current, pop, push in pairs:
        while (now := list(current())) != wanted[: len(now)]:  # type: ignore[no-untyped-call]
            pop()  # type: ignore[no-untyped-call]
        for mode in wanted[len(now) :]:
            push(mode)  # type: ignore[no-untyped-call]
