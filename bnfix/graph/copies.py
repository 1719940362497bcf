"""Private copies: the only models that bnfix traces, runs with a new body, or operates on."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnfix.errors import TraceError, one_line
from bnfix.graph.owners import Owners, closure_values, find_owners

Memo = dict[int, Any]


def unwrap(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The user's own module inside ``torch.compile``, ``DataParallel`` and DDP wrappers, and what was taken off."""
    notes: list[str] = []
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module) and type(model).__name__ == "OptimizedModule":
            inner, name = model._orig_mod, "torch.compile"
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner, name = model.module, type(model).__name__
        else:
            return model, tuple(notes)
        assert isinstance(inner, nn.Module)
        model = inner
        notes.append(f"unwrapped {name}: the result is the plain module inside")


def copy_model(model: nn.Module, *, scripted: bool = False) -> tuple[nn.Module, Memo]:
    """A deep copy of ``model`` that shares nothing with it, and the memo ``id(original) → copy``.

    Non-leaf tensors (what old-style weight_norm and pruning leave behind) are detached; a copy of them is
    impossible otherwise. Functions (hooks among them) stay the user's own: run the copy inside ``no_footprints``.
    ``scripted`` lets ScriptModules inside the model pass, for those who only run them: their parts are not in the memo.

    Raises:
        TraceError: no faithful copy is possible; names the module or attribute.
    """
    owners = find_owners(model)
    _refuse_impossible(owners, scripted)
    memo: Memo = {}
    for key, tensor in owners.tensors.items():
        if not tensor.is_leaf:
            memo[key] = tensor.detach().clone()
    for plain in owners.plain:  # a vocabulary of a million words needs no million steps
        memo[id(plain)] = copy.copy(plain)
    try:
        duplicate = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a user's __deepcopy__ or __reduce__ raises
        raise TraceError(
            f"the model can't be copied: {_culprit(owners, error)}",
            hint="make that attribute copyable, or set it to None before calling bnfix",
        ) from error
    shared = _shared(owners, duplicate)
    if shared:
        raise TraceError(
            f"a deep copy of the model still shares {shared} with the original",
            hint="its class defines __deepcopy__ or __reduce__ so that tensors stay shared: bnfix can't operate on it",
        )
    return duplicate, memo


def _refuse_impossible(owners: Owners, scripted: bool) -> None:
    for module in owners.modules.values():
        name = (owners.paths(module) or ("",))[0] or "the model"
        if isinstance(module, torch.jit.ScriptModule):
            if scripted and module is not owners.root:
                continue
            raise TraceError(
                f"{name} is a ScriptModule: its operations can't be read or replaced",
                hint="pass the Python module that it was scripted from",
            )
        if type(module).__name__ == "OptimizedModule":
            raise TraceError(
                f"{name} is compiled by torch.compile inside the model",
                hint="pass the model as it was before that submodule was compiled",
            )
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and is_lazy(tensor):
                raise TraceError(
                    f"{name} is not initialised yet", hint="run the model once on an example, then call bnfix"
                )
    inside = set(owners.modules) | set(owners.tensors)
    for path, function in owners.functions:
        reached = _reaches(function, inside, set())
        if reached and path.rpartition(".")[2] == "forward":
            where = path.rpartition(".")[0] or "the model"
            raise TraceError(
                f"{where} has its own forward set on the instance ({function.__qualname__}), which runs the original's "
                f"layers ({reached}): so would a copy of it",
                hint="define forward in the class, or undo the patch first (del module.forward)",
            )
        if reached:
            raise TraceError(
                f"{path} holds the function {function.__qualname__}, whose closure reaches the model itself "
                f"({reached}): a copy of the model would run or write the original through it",
                hint="remove that hook or function first, or let it use the module that it is given",
            )


def _reaches(value: Any, inside: set[int], seen: set[int]) -> str | None:
    """The name under which a function's closure leads into the model, or None."""
    if isinstance(value, types.MethodType):
        return getattr(value, "__qualname__", "method") if id(value.__self__) in inside else None
    if isinstance(value, functools.partial):
        return next(
            (r for v in (value.func, *value.args, *value.keywords.values()) if (r := _reaches(v, inside, seen))), None
        )
    if isinstance(value, (list, tuple, set, frozenset)):
        return next((r for v in value if (r := _reaches(v, inside, seen))), None)
    if isinstance(value, dict):
        return next((r for v in value.values() if (r := _reaches(v, inside, seen))), None)
    if isinstance(value, (nn.Module, Tensor)):
        return type(value).__name__ if id(value) in inside else None
    if isinstance(value, types.FunctionType) and id(value) not in seen:
        seen.add(id(value))
        for name, inner in closure_values(value):
            if _reaches(inner, inside, seen):
                return name
    return None


def _culprit(owners: Owners, error: Exception) -> str:
    """Which attribute can't be copied: each attribute of each module is tried by itself."""
    for module in owners.modules.values():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters", "_buffers") or isinstance(value, (nn.Module, Tensor)):
                continue
            try:
                copy.deepcopy(value, dict(owners.modules) | dict(owners.tensors))
            except Exception as inner:  # noqa: BLE001  # as in copy_model
                path = (owners.paths(module) or ("",))[0]
                return f"{f'{path}.' if path else ''}{name} ({type(value).__name__}): {one_line(inner)}"
    return one_line(error)


def _shared(owners: Owners, duplicate: nn.Module) -> str | None:
    theirs = {
        t.untyped_storage().data_ptr(): key
        for key, t in owners.tensors.items()
        if t.layout is torch.strided and not t.is_meta and t.numel()
    }
    for tensor in find_owners(duplicate).tensors.values():
        if tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
            continue
        key = theirs.get(tensor.untyped_storage().data_ptr())
        if key is not None:
            return (owners.paths(owners.tensors[key]) or ("a tensor",))[0]
    return None
