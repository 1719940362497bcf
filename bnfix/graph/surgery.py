"""The only place that changes a module tree: tensors into slots, norms out."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import TraceError
from bnfix.graph.copies import Memo
from bnfix.graph.owners import Slot

# What forward code may ask of a norm besides its output; the numbers themselves are gone with the norm.
_KEPT_ATTRIBUTES = ("num_features", "eps", "momentum", "affine", "track_running_stats")


@dataclass
class Surgeon:
    """Changes one model, slot by slot, and can take everything back.

    ``memo`` leads from the objects that the slots were found on to those of the model operated on; None
    where it is the same model.
    """

    memo: Memo | None = None
    _undo: list[tuple[Any, Any, Any]] = field(default_factory=list)

    def put(self, slot: Slot, value: Any) -> None:
        """Put ``value`` (a parameter, tensor or module) into ``slot``.

        Raises:
            TraceError: the slot is of a kind that can't be written, an element of a tuple say.
        """
        holder = slot.container if self.memo is None else self.memo.get(id(slot.container))
        if holder is None:
            raise TraceError(f"{slot.path} is held where it can't be replaced ({type(slot.container).__name__})")
        table = _table(holder, slot.key)
        if table is None:
            raise TraceError(f"{slot.path} is an element of a {type(holder).__name__}, which can't be changed")
        self._undo.append((table, slot.key, table[slot.key] if _has(table, slot.key) else _ABSENT))
        table[slot.key] = value

    def register(self, slot: Slot, parameter: nn.Parameter) -> None:
        """Give a module the parameter it doesn't have yet, also where a plain attribute None stands in its place."""
        holder = slot.container if self.memo is None else self.memo[id(slot.container)]
        for table, value in ((vars(holder), _ABSENT), (holder._parameters, parameter)):
            self._undo.append((table, slot.key, table.get(slot.key, _ABSENT)))
            if value is _ABSENT:
                table.pop(slot.key, None)
            else:
                table[slot.key] = value

    def shadow(self, holder: nn.Module, name: str, value: Any) -> None:
        """Let ``holder`` have the plain attribute ``value`` in place of its buffer ``name``."""
        attributes = vars(holder)
        self._undo.append((attributes, "_buffers", holder._buffers))  # as a whole: its order is that of state_dict
        self._undo.append((attributes, name, attributes.get(name, _ABSENT)))
        attributes["_buffers"] = {k: v for k, v in holder._buffers.items() if k != name}
        attributes[name] = value

    def add_module(self, holder: nn.Module, name: str, module: nn.Module) -> None:
        """Give ``holder`` one more submodule.

        Raises:
            ValueError: it has something of that name.
        """
        if hasattr(holder, name):
            raise ValueError(f"{type(holder).__name__} has a {name} already")
        self._undo.append((holder._modules, name, _ABSENT))
        holder._modules[name] = module

    def undo(self) -> None:
        """Take every change back, the last one first."""
        while self._undo:
            table, key, before = self._undo.pop()
            if before is _ABSENT:
                table.pop(key, None)
            else:
                table[key] = before


_ABSENT = object()


@contextlib.contextmanager
def all_or_nothing(surgeon: Surgeon) -> Iterator[Surgeon]:
    """Whatever leaves this block early, Ctrl-C included, leaves the model as it was."""
    try:
        yield surgeon
    except BaseException:
        surgeon.undo()
        raise


def placeholder(norm: nn.Module, after: Sequence[str]) -> nn.Module:
    """What stands where ``norm`` was: nothing but its own submodules ``after``, under their own names.

    A plain ``nn.Identity`` or ``nn.Sequential``, so that a model saved whole loads without bnfix. The
    settings of the norm stay readable on it; its weights and statistics don't exist any more.
    """
    children = OrderedDict((name, norm.get_submodule(name)) for name in after)
    stand_in: nn.Module = nn.Sequential(children) if children else nn.Identity()
    for name in _KEPT_ATTRIBUTES:
        value = getattr(norm, name, None)
        if isinstance(value, (int, float, bool)):
            setattr(stand_in, name, value)
    stand_in.training = norm.training
    return stand_in


def as_parameter(value: Tensor, like: Tensor) -> Tensor:
    """``value`` as what ``like`` is: parameter or plain tensor, its device and layout in memory. The dtype stays."""
    with torch.no_grad():
        made = (
            torch.empty_like(like, dtype=value.dtype)
            if like.shape == value.shape
            else like.new_empty(value.shape, dtype=value.dtype)
        )
        made.copy_(value)
    if not isinstance(like, nn.Parameter):
        return made
    parameter = torch.Tensor._make_subclass(type(like), made, like.requires_grad)
    vars(parameter).update(vars(like))  # what people hang on parameters: _no_weight_decay and its like
    return parameter


def _table(holder: Any, key: Any) -> Any:
    """The dict or list in which ``key`` of ``holder`` really lies."""
    if isinstance(holder, nn.Module):
        for table in (holder._parameters, holder._buffers, holder._modules):
            if key in table:
                return table
        return vars(holder)
    if isinstance(holder, (list, dict)):
        return holder
    return vars(holder) if hasattr(holder, "__dict__") and isinstance(key, str) else None


def _has(table: Any, key: Any) -> bool:
    return key in table if isinstance(table, dict) else isinstance(key, int) and key < len(table)
