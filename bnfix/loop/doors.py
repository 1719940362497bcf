"""DDP wrappers: forwards that send the buffers of rank 0 to all, and how many of them one backward pass covers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C import _current_graph_task_id as running_backward

from bnfix.loop.frames import here
from bnfix.loop.tally import Run

if TYPE_CHECKING:
    from bnfix.loop.session import Session


class Door:
    """One DistributedDataParallel wrapper."""

    def __init__(self, wrapper: nn.parallel.DistributedDataParallel, session: Session) -> None:
        self._session = session
        self._n = 0
        self._mark: tuple[int, int] | None = None
        self.several = Run()
        self.broadcast = sends_buffers(wrapper)
        self._most = 0

    def called(self, module: Any, _args: object) -> None:
        """In front of a forward of the wrapper."""
        if not (module.training and torch.is_grad_enabled()) or running_backward() >= 0:
            return
        if self._session.stepped:
            self._session.turn()
        mark = _mark(module)
        if self._n and mark is not None and mark != self._mark:
            self._n = 0  # a backward pass lies in between
        self._mark = mark
        self._n += sends_buffers(module)
        self._most = max(self._most, self._n)
        if self._n > 1 and self.several.looks < 2:
            self.several.look(here(1))

    def fold(self, step: int) -> None:
        """A step is over."""
        if self._most > 1:
            self.several.add(step, self._most)
        self._n = self._most = 0


def sends_buffers(wrapper: Any) -> bool:
    """Whether a forward of this wrapper would bring the buffers of rank 0 now."""
    return bool(wrapper.will_sync_module_buffers())


def _mark(module: nn.Module) -> tuple[int, int] | None:
    probe = next((p for p in module.parameters() if p.requires_grad), None)
    grad = probe.grad if probe is not None else None
    return (id(grad), grad._version) if grad is not None else None
