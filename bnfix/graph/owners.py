"""Who holds which tensor and which module: a walk over a model's objects, by identity, never by name.

``named_parameters`` hides aliases and knows nothing of a module in a plain list. This walk sees every
name of every tensor and module, and functions whose closure leads back into the model.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, type, types.ModuleType)
_DEPTH = 6  # of containers and plain objects below a module's attribute; modules themselves nest without limit
_LARGE = 1000
_PRIVATE = frozenset({"_parameters", "_buffers", "_modules", "training", "_non_persistent_buffers_set"})


@dataclass(frozen=True)
class Slot:
    """One place that holds a tensor or a module: ``container[key]``, or the attribute ``key`` of ``container``."""

    container: Any
    key: Any
    path: str

    @property
    def registered(self) -> bool:
        """Whether this is a module's own attribute, which assignment can replace."""
        return isinstance(self.container, nn.Module)


@dataclass
class Owners:
    """Every slot of every tensor and module reachable from one root."""

    root: nn.Module
    tensors: dict[int, Tensor] = field(default_factory=dict)
    tensor_slots: dict[int, list[Slot]] = field(default_factory=dict)
    modules: dict[int, nn.Module] = field(default_factory=dict)
    module_slots: dict[int, list[Slot]] = field(default_factory=dict)
    functions: list[tuple[str, types.FunctionType]] = field(default_factory=list)
    plain: list[Any] = field(default_factory=list)
    """Large containers with nothing in them that could hold a tensor, a module or a function."""

    def paths(self, obj: Any) -> tuple[str, ...]:
        """All names of a tensor or module, in the order of the walk: registered names first."""
        slots = self.tensor_slots.get(id(obj)) or self.module_slots.get(id(obj)) or []
        return tuple(s.path for s in sorted(slots, key=lambda s: not s.registered))

    def module_at(self, path: str) -> nn.Module | None:
        """The module called ``path``, whichever of its names that is."""
        if path == "":
            return self.root
        for module_id, slots in self.module_slots.items():
            if any(s.path == path for s in slots):
                return self.modules[module_id]
        return None


def find_owners(root: nn.Module) -> Owners:
    """Walk every object that ``root`` holds on to."""
    owners = Owners(root)
    owners.modules[id(root)] = root
    owners.module_slots[id(root)] = [Slot(None, None, "")]
    _visit_module(owners, root, "", set(), frozenset())
    return owners


def storage_key(tensor: Tensor) -> tuple[Any, ...] | None:
    """What two tensors share if they are the same numbers at the same place; None where there are none."""
    try:
        pointer = tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, quantized and wrapper tensors have no storage
        return None
    if not pointer or tensor.is_meta:
        return None
    return (pointer, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def hooks_of(module: nn.Module) -> tuple[str, ...]:
    """The names of forward hooks and pre-hooks on ``module`` itself, but for those of ``bnfix.watch``."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return tuple(getattr(h, "__qualname__", type(h).__name__) for h in hooks if not getattr(h, "only_watches", False))


def _visit_module(owners: Owners, module: nn.Module, path: str, seen: set[int], above: frozenset[int]) -> None:
    # A module under two names is walked under both (its tensors have that many names), a cycle once.
    above = above | {id(module)}
    dot = f"{path}." if path else ""
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                _add_tensor(owners, tensor, Slot(module, name, dot + name))
    for name, child in module._modules.items():
        if child is not None:
            _add_module(owners, child, Slot(module, name, dot + name), seen, above)
    for name, value in vars(module).items():
        if name in _PRIVATE or (name.startswith("_") and name.endswith("_hooks") and not value):
            continue
        _visit(owners, value, Slot(module, name, dot + name), seen, above, _DEPTH)


def _visit(owners: Owners, value: Any, slot: Slot, seen: set[int], above: frozenset[int], depth: int) -> None:
    if isinstance(value, _ATOMS) or depth == 0:
        return
    if isinstance(value, (list, dict, set)) and len(value) > _LARGE and _only_atoms(value):
        owners.plain.append(value)
        return
    if isinstance(value, Tensor):
        _add_tensor(owners, value, slot)
    elif isinstance(value, nn.Module):
        _add_module(owners, value, slot, seen, above)
    elif isinstance(value, types.FunctionType):
        owners.functions.append((slot.path, value))
    elif isinstance(value, types.MethodType):
        _visit(owners, value.__func__, slot, seen, above, depth - 1)
    elif isinstance(value, functools.partial):
        _visit(owners, value.func, slot, seen, above, depth - 1)
        for i, v in enumerate((*value.args, *value.keywords.values())):
            _visit(owners, v, Slot(value, i, f"{slot.path}({i})"), seen, above, depth - 1)
    elif isinstance(value, Mapping):
        for k, v in list(value.items()):
            _visit(owners, v, Slot(value, k, f"{slot.path}[{k!r}]"), seen, above, depth - 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for i, v in enumerate(value):
            _visit(owners, v, Slot(value, i, f"{slot.path}[{i}]"), seen, above, depth - 1)
    elif _is_plain_object(value) and id(value) not in seen:
        seen.add(id(value))
        for k, v in list(vars(value).items()):
            _visit(owners, v, Slot(value, k, f"{slot.path}.{k}"), seen, above, depth - 1)


def _only_atoms(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(v, _ATOMS) for v in value.values()) and all(isinstance(k, _ATOMS) for k in value)
    return all(isinstance(v, _ATOMS) for v in value)


def _is_plain_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not type(value).__module__.startswith(("torch.", "numpy"))


def _add_tensor(owners: Owners, tensor: Tensor, slot: Slot) -> None:
    owners.tensors[id(tensor)] = tensor
    owners.tensor_slots.setdefault(id(tensor), []).append(slot)


def _add_module(owners: Owners, module: nn.Module, slot: Slot, seen: set[int], above: frozenset[int]) -> None:
    slots = owners.module_slots.setdefault(id(module), [])
    owners.modules[id(module)] = module
    slots.append(slot)
    if id(module) not in above and len(slots) < 64:  # a module under very many names adds no knowledge
        _visit_module(owners, module, slot.path, seen, above)


def closure_values(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function carries with it: closure cells, default values, the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # an empty cell
            continue
    for i, value in enumerate(function.__defaults__ or ()):
        yield f"default {i}", value
    for name, value in (function.__kwdefaults__ or {}).items():
        yield name, value
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]
    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        yield "__wrapped__", wrapped
