"""What a forward keeps in the model itself from one call to the next: a membrane, a hidden state, a count, a cache."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.graph.footprints import CONTAINERS, LARGE, Tables, own_attributes, restore, same
from bnfix.graph.writing import Saved, put_back

_NUMBERS = (int, float, bool)
_GONE = object()
_HEAVY = 1 << 20
"""Values of a tensor from which on it is not copied."""


@dataclass
class _Kept:
    """A module's attributes, its table of buffers and the entries of its containers, as they were."""

    module: nn.Module
    attributes: dict[str, Any]
    buffers: dict[str, Tensor | None]
    containers: dict[str, Any]


class OwnState:
    """The attributes, buffers and containers of all modules of ``model``, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            _Kept(m, own, dict(m._buffers), {k: copy.copy(v) for k, v in own.items() if _is_container(v)})
            for m in model.modules()
            for own in [own_attributes(m)]
        ]
        loose = {
            id(t): t
            for kept in self._kept
            for value in (*kept.attributes.values(), *kept.containers.values())
            for t in _tensors(value)
        }
        self._values = [Saved.of(t) for t in loose.values()]
        self._tables = Tables(model.modules())

    def changed(self, ran: nn.Module) -> list[str]:
        """Which attributes of ``ran``, the model or a replica of it, are no longer what they were, as ``Class.name``.

        Tensors that are others or hold other values, numbers, and those in containers; not what else a forward sets.
        """
        found = []
        for kept, module in zip(self._kept, ran.modules(), strict=False):
            before: Mapping[str, Any] = {**kept.attributes, **kept.containers, **kept.buffers}
            now = {**own_attributes(module), **module._buffers}
            names = [name for name in now if _moved(before.get(name, _GONE), now[name])]
            found += [f"{type(module).__name__}.{name}" for name in names]
        if not found and any(saved.changed for saved in self._values):
            found.append("a tensor among its attributes")
        return found

    def rewind(self) -> None:
        """Give the model back what it kept."""
        for kept in self._kept:
            own = kept.module.__dict__
            for name in own_attributes(kept.module).keys() - kept.attributes.keys():
                del own[name]
            own.update(kept.attributes)
            table = kept.module._buffers
            if not same(table, kept.buffers):
                restore(table, kept.buffers)
            for name, entries in kept.containers.items():
                container = kept.attributes[name]
                if not same(container, entries):
                    restore(container, entries)
        self._tables.put_back()
        put_back(self._values)


def _is_container(value: Any) -> bool:
    return type(value) in CONTAINERS and len(value) <= LARGE


def _tensors(value: Any) -> list[Tensor]:
    """Tensors, alone or in a container, that can be compared and copied."""
    values = _entries(value).values() if _is_container(value) else (value,)
    return [t for t in values if type(t) is Tensor and _light(t)]


def _light(t: Tensor) -> bool:
    return t.layout == torch.strided and not (t.is_meta or t.is_nested) and t.numel() <= _HEAVY


def _entries(container: Any) -> Mapping[Any, Any]:
    if isinstance(container, dict):
        return container
    return {} if isinstance(container, set) else dict(enumerate(container))


def _moved(before: Any, now: Any) -> bool:
    """Whether a tensor or a number came, went, or is another."""
    if _is_container(now):
        if type(before) is not type(now):
            return any(_moved(_GONE, v) for v in _entries(now).values())
        old, new = _entries(before), _entries(now)
        return any(_moved(old.get(k, _GONE), new.get(k, _GONE)) for k in (*new, *(k for k in old if k not in new)))
    if type(now) in _NUMBERS and type(before) in _NUMBERS:
        return bool(now != before)
    state = any(isinstance(v, Tensor) or type(v) in _NUMBERS for v in (before, now))
    return state and now is not before
