"""The only place that changes a module tree: tensors into slots, norms out, and a recipe replayed."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import TraceError
from bnfix.graph.channel_affine import affine_in_place_of
from bnfix.graph.copies import Memo
from bnfix.graph.owners import Slot, find_owners

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


def replay(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Bring ``model``, freshly built, into the form that a folded state_dict fits. In place, all or nothing.

    Norms become placeholders or affines, layers that gained a bias get one of zeros; the numbers come from the
    state_dict that is loaded afterwards.

    Raises:
        KeyError: the model has no module of a name in the recipe.
    """
    owners = find_owners(model)
    with all_or_nothing(Surgeon()) as surgeon:
        for edit in recipe.get("edits", ()):
            norm = owners.module_at(edit["norm"][0])
            if norm is None:
                raise KeyError(edit["norm"][0])
            stand_in = _replayed(norm, edit)
            for slot in owners.module_slots[id(norm)]:
                surgeon.put(slot, stand_in)
            for into in edit["into"]:
                layer = owners.module_at(into["module"])
                if layer is None:
                    raise KeyError(into["module"])
                if into.get("bias") and getattr(layer, "bias", None) is None:
                    weight = layer.get_parameter(into.get("weight", "weight"))
                    zeros = torch.zeros(into["channels"], dtype=weight.dtype, device=weight.device)
                    bias = nn.Parameter(zeros, weight.requires_grad)
                    surgeon.register(Slot(layer, "bias", f"{into['module']}.bias"), bias)


def _replayed(norm: nn.Module, edit: Mapping[str, Any]) -> nn.Module:
    """What a recipe puts where a norm was."""
    after, channels = edit.get("keep", ()), edit.get("affine")
    if channels is None:
        return placeholder(norm, after)
    like = getattr(norm, "running_var", None)
    like = like if isinstance(like, Tensor) else next(norm.parameters(), torch.zeros(()))
    return affine_in_place_of(norm, after, like.new_ones(channels), like.new_zeros(channels))


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
