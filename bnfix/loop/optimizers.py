"""Steps of optimizers, and which of them holds whose parameters."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from bnfix.loop.hooks import Attached


def as_optimizers(given: Any) -> tuple[Optimizer, ...]:
    """The optimizers that a user gave: none, one or several, also inside the wrappers of training libraries.

    Raises:
        TypeError: something is no optimizer of torch.
    """
    if given is None:
        return ()
    several = given if isinstance(given, (list, tuple)) else [given]
    return tuple(_bare(o) for o in several)


def _bare(given: Any) -> Optimizer:
    for _ in range(8):
        if isinstance(given, Optimizer) and not isinstance(getattr(given, "optimizer", None), Optimizer):
            return given
        inner = getattr(given, "optimizer", None)
        if inner is None:
            break
        given = inner
    raise TypeError(f"optimizer is one or several torch.optim.Optimizer, not {type(given).__name__}")


class Held:
    """What one optimizer holds: the norms (by number) whose parameters are in it, and whether any of the model's."""

    __slots__ = ("any", "groups", "ids", "norms")

    def __init__(self, optimizer: Optimizer, own: dict[int, int], every: set[int]) -> None:
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.groups = sum(len(group["params"]) for group in optimizer.param_groups)
        self.norms = frozenset(own[i] for i in ids if i in own)
        self.ids = ids & every
        self.any = bool(self.ids)


class Steps:
    """Hears of every step that any optimizer takes while it is attached; holds them weakly."""

    def __init__(
        self, attached: Attached, model: nn.Module, own: dict[int, int], heard: Callable[[Held], None]
    ) -> None:
        self._own = own
        self._every = {id(p) for p in model.parameters()}
        self._held: weakref.WeakKeyDictionary[Optimizer, Held] = weakref.WeakKeyDictionary()
        self._heard = heard
        self._holders = 0
        self._ids: set[int] = set()
        attached.add(register_optimizer_step_post_hook(self._stepped))

    def _stepped(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._heard(self.of(optimizer))

    def of(self, optimizer: Optimizer) -> Held:
        """What it holds; looked up once, and again when parameters were added to it."""
        known = self._held.get(optimizer)
        if known is not None and known.groups == sum(len(group["params"]) for group in optimizer.param_groups):
            return known
        held = self._held[optimizer] = Held(optimizer, self._own, self._every)
        # Noted here: at the end the optimizer may be gone.
        self._holders += held.any and not (known is not None and known.any)
        self._ids |= held.ids
        return held

    def holding(self) -> int:
        """How many that were heard of hold parameters of the model."""
        return self._holders

    def ids(self) -> set[int]:
        """The ids of the model's parameters that are in any of them."""
        return self._ids
