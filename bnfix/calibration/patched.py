"""Functions of torch that somebody has replaced by wrappers of their own, as a mode hears of them.

``F.relu`` tells a mode of whatever goes by the name ``relu``. Where that is a wrapper that calls the original, the mode
is told of the wrapper by the original, in the middle of it: to call it would wrap what is wrapped already.
"""

from __future__ import annotations

from types import CodeType, FrameType, FunctionType
from typing import Any

from torch.overrides import handle_torch_function

_TELLS = handle_torch_function.__code__
_FUNCTIONS: dict[CodeType, FunctionType] = {}


def original(func: Any, teller: FrameType) -> Any:
    """``func``, or the function of torch that is running under its name.

    Args:
        func: what a mode was told of; a function.
        teller: the frame that called the mode.
    """
    running = teller.f_back
    if _of_torch(func.__globals__) or teller.f_code is not _TELLS or running is None:
        return func
    if running.f_code is func.__code__ or not _of_torch(running.f_globals):  # no wrapper, but one of their own
        return func
    return _function(running.f_code, running.f_globals)


def _of_torch(names: dict[str, Any]) -> bool:
    return str(names.get("__name__", "")).partition(".")[0] == "torch"


def _function(code: CodeType, names: dict[str, Any]) -> Any:
    """The function with this code. All of its arguments will be given: those of the call that is under way."""
    if code not in _FUNCTIONS:
        _FUNCTIONS[code] = FunctionType(code, names, code.co_name)
    return _FUNCTIONS[code]
