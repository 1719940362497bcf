"""Whose values a norm's weights are: trained, a copy of another part, or written by somebody's hand."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bnfix.loop.tally import Tally

_VALUES = 256
_NEIGHBOURS = 4


class Origins:
    """The first values of each norm's weights, and of those beside it, when the watch began."""

    def __init__(self) -> None:
        self._first: dict[int, list[tuple[weakref.ref[nn.Parameter], Tensor]]] = {}
        self._prints: dict[int, frozenset[bytes]] = {}
        self._printed: dict[int, frozenset[int]] = {}
        self._around: dict[int, list[weakref.ref[nn.Parameter]]] = {}

    def note(self, tally: Tally, module: nn.Module, parent: nn.Module | None) -> None:
        """Remember the values around one norm. Reads from the device."""
        own = [p for p in module._parameters.values() if p is not None]
        beside = _beside(module, parent)
        self._around[tally.index] = [weakref.ref(p) for p in [*own, *_next_to(module, parent)]] if own else []
        known = [p for p in [*own, *beside] if _readable(p)]
        self._first[tally.index] = [(weakref.ref(p), _some(p)) for p in known]
        self._printed[tally.index] = frozenset(map(id, beside))
        # Weights of norms begin at 1 and 0 everywhere: only others tell a copy from a coincidence.
        self._prints[tally.index] = frozenset(
            s.numpy().tobytes() + str(tuple(p.shape)).encode()
            for p in beside
            if _readable(p) and _varied(s := _some(p))
        )

    def written(self, tally: Tally, held: set[int]) -> bool:
        """Whether values changed that no optimizer holds."""
        for reference, before in self._first.get(tally.index, ()):
            parameter = reference()
            if parameter is not None and id(parameter) not in held and _readable(parameter):
                now = _some(parameter)
                if now.shape != before.shape or not torch.equal(now, before):
                    return True
        return False

    def left_out(self, tally: Tally, held: set[int]) -> bool:
        """Whether no optimizer holds its parameters, nor those of the layer next to it. A norm without any: no."""
        known = [p for r in self._around.get(tally.index, ()) if (p := r()) is not None]
        return bool(known) and bool(held) and not any(id(p) in held for p in known)

    def twin(self, tally: Tally, others: Sequence[Tally]) -> bool:
        """Whether it began with the same values as a part that has been trained."""
        mine = self._prints.get(tally.index)
        if not mine:
            return False
        # Norms that are beside each other have the same neighbours, and are no copies for that.
        trained = (o for o in others if o.updates and o.trained and o is not tally)
        apart = (o for o in trained if self._printed[o.index].isdisjoint(self._printed[tally.index]))
        return any(mine == self._prints.get(o.index) for o in apart)


def _beside(module: nn.Module, parent: nn.Module | None) -> list[nn.Parameter]:
    if parent is None:
        return []
    found: list[nn.Parameter] = []
    for child in parent._modules.values():
        if child is not None and child is not module:
            found += [p for p in child._parameters.values() if p is not None and _readable(p) and p.dim() > 1]
    return found[:_NEIGHBOURS]


def _next_to(module: nn.Module, parent: nn.Module | None) -> list[nn.Parameter]:
    """The parameters of the nearest layer with any in front of a norm, or else behind it, as the parent lists them."""
    children = [c for c in parent._modules.values() if c is not None] if parent is not None else []
    at = next((i for i, c in enumerate(children) if c is module), 0)
    for child in [*reversed(children[:at]), *children[at + 1 :]]:
        found = list(child.parameters())
        if found:
            return found
    return []


def _readable(parameter: Tensor) -> bool:
    if type(parameter) is not nn.Parameter:  # lazy ones, and subclasses that may be anything
        return False
    return parameter.layout is torch.strided and not parameter.is_meta and not parameter.is_quantized


def _some(parameter: Tensor) -> Tensor:
    with torch.no_grad():
        return parameter.detach().reshape(-1)[:_VALUES].double().cpu().clone()


def _varied(values: Tensor) -> bool:
    return values.numel() > 1 and bool((values != values[0]).any())
