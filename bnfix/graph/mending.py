"""Fixes of ``check`` that need nothing but the model: attributes, float32 statistics, statistics registered anew."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.graph.owners import Owners, find_owners
from bnfix.types import Edit, Fix

VERBS = frozenset({"set", "float", "reset"})
"""What :func:`mend` can do."""

_ATTRIBUTES = frozenset({"momentum", "eps", "track_running_stats"})
_HALF = (torch.float16, torch.bfloat16)
_ABSENT = object()


def mend(model: nn.Module, fix: Fix) -> tuple[Edit, ...]:
    """Apply ``fix`` to ``model``: changes it in place, all sites or (whatever goes wrong, Ctrl-C included) none.

    ``set`` gives the attributes in ``fix.options`` to every site. ``float`` makes weights and statistics of a norm
    float32; its parameters stay the objects that an optimizer holds. ``reset`` registers statistics that are not there
    (mean 0, variance 1, counter 0) and lets the norm track them: it needs recalibration afterwards. Sites that are as
    they should be already stay untouched.

    Returns:
        One edit for each site that changed.

    Raises:
        ValueError: a verb or attribute that is none of these, or a site that is no norm of ``model``.
    """
    if fix.verb not in VERBS:
        raise ValueError(f"{fix.verb} is none of {', '.join(sorted(VERBS))}: another verb of bnfix does it")
    unknown = sorted(set(fix.options) - _ATTRIBUTES) if fix.verb == "set" else []
    if unknown:
        raise ValueError(f"{unknown[0]} is no attribute that may be set; those are {', '.join(sorted(_ATTRIBUTES))}")
    owners = find_owners(model)
    norms = [_norm_at(owners, site) for site in fix.sites]
    edits: list[Edit] = []
    with _undoing() as undo:
        done: set[int] = set()
        for site, norm in zip(fix.sites, norms, strict=True):
            if id(norm) in done:  # another of its names
                continue
            done.add(id(norm))
            before = _shown(norm, fix)
            if fix.verb == "set":
                changed = _set(norm, fix.options, undo)
            elif fix.verb == "float":
                changed = _float(norm, undo)
            else:
                own = (p for p in norm._parameters.values() if p is not None)
                changed = _reset(norm, next(own, next(model.parameters(), None)), undo)
            if changed:
                edits.append(Edit(fix.verb, site, before, _shown(norm, fix)))
    return tuple(edits)


Undo = list[Callable[[], None]]


@contextlib.contextmanager
def _undoing() -> Iterator[Undo]:
    steps: Undo = []
    try:
        yield steps
    except BaseException:
        for step in reversed(steps):
            step()
        raise


def _norm_at(owners: Owners, site: str) -> Any:
    path = site.partition("@")[0]
    module = owners.module_at("" if path == "(root)" else path)
    if module is None or "running_var" not in module._buffers:
        raise ValueError(f"{site} is no norm with running statistics in this model")
    return module


def _set(norm: Any, options: Mapping[str, Any], undo: Undo) -> bool:
    wanted = {k: v for k, v in options.items() if vars(norm).get(k, _ABSENT) != v}
    for name, value in wanted.items():
        _put(vars(norm), name, value, undo)
    return bool(wanted)


def _float(norm: Any, undo: Undo) -> bool:
    halves = [t for t in (*norm._parameters.values(), *norm._buffers.values()) if t is not None and t.dtype in _HALF]
    for tensor in (*halves, *(t.grad for t in halves if t.grad is not None)):
        # In place, as nn.Module.float() does with parameters: tied buffers stay tied, an optimizer keeps what it holds.
        undo.append(lambda tensor=tensor, data=tensor.data: setattr(tensor, "data", data))  # type: ignore[misc]
        tensor.data = tensor.data.float()
    return bool(halves)


def _reset(norm: Any, home: Tensor | None, undo: Undo) -> bool:
    like: dict[str, Any] = {"device": home.device, "dtype": home.dtype} if home is not None else {}
    fresh: dict[str, Callable[[], Tensor]] = {
        "running_mean": lambda: torch.zeros(norm.num_features, **like),
        "running_var": lambda: torch.ones(norm.num_features, **like),
        "num_batches_tracked": lambda: torch.zeros((), **{**like, "dtype": torch.long}),
    }
    absent = [name for name in fresh if norm._buffers.get(name) is None]
    for name in absent:
        _put(norm._buffers, name, fresh[name](), undo)
    changed = bool(absent) or not vars(norm).get("track_running_stats", True)
    if "track_running_stats" in vars(norm):
        _put(vars(norm), "track_running_stats", True, undo)
    return changed


def _put(table: Any, key: str, value: Any, undo: Undo) -> None:
    before = table.get(key, _ABSENT)
    undo.append((lambda: table.pop(key, None)) if before is _ABSENT else (lambda: table.update({key: before})))
    table[key] = value


def _shown(norm: Any, fix: Fix) -> str:
    if fix.verb == "set":
        return ", ".join(f"{name}={getattr(norm, name, None)}" for name in fix.options)
    if fix.verb == "float":
        return str(next((t.dtype for t in norm._buffers.values() if t is not None and t.is_floating_point()), "none"))
    return "running statistics" if norm._buffers.get("running_var") is not None else "no running statistics"
