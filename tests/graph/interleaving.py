"""One forward stopped half-way while another runs: what a model keeps between two lines of its forward shows."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_here = threading.local()


def pause() -> None:
    """Where a forward stops, if it is the one to be stopped. A second call in the same forward goes through."""
    stop: Callable[[], None] | None = _here.__dict__.pop("stop", None)
    if stop is not None:
        stop()


def interleaved(first: nn.Module, second: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``first(x)`` as far as its ``pause``, all of ``second(y)``, the rest of ``first(x)``."""
    found: list[Tensor] = []
    failed: list[BaseException] = []
    stopped, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        stopped.set()
        assert go_on.wait(60)

    def run() -> None:
        _here.stop = stop
        try:
            with torch.no_grad():
                found.append(first(x))
        except BaseException as error:  # noqa: BLE001  # raised again below
            failed.append(error)
        finally:
            stopped.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert stopped.wait(60)
    assert failed or not found, "the forward has no pause"
    try:
        with torch.no_grad():
            other = second(y)
    finally:
        go_on.set()
        thread.join(60)
    if failed:
        raise failed[0]
    return found[0], other


def alone(model: nn.Module, x: Tensor) -> Tensor:
    """What the model says in evaluation mode."""
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def reaches(root: Any, forbidden: Iterable[Any]) -> list[str]:
    """Which of ``forbidden`` can be reached from ``root``, as the garbage collector sees it: by any object at all.

    Classes, files of code and tensors are not looked into: they are common to all.
    """
    wanted = {id(o) for o in forbidden}
    seen, pending, found = {id(root)}, [root], []
    while pending:
        for held in gc.get_referents(pending.pop()):
            if id(held) in wanted:
                found.append(type(held).__name__)
            if id(held) not in seen and not isinstance(held, (type, type(gc), Tensor)) and not _is_globals(held):
                seen.add(id(held))
                pending.append(held)
    return found


def _is_globals(value: Any) -> bool:
    return isinstance(value, dict) and "__name__" in value and "__builtins__" in value
