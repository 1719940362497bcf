"""What running a model leaves behind outside of it: lists and dicts that its code and its hooks write to.

A private copy runs the same functions as the original. What they keep in a closure, in a default argument, in
a global or on their class is the user's own; it is put back as it was.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from bnfix.graph.owners import closure_values, find_owners

_CONTAINERS = (list, dict, set, collections.defaultdict, collections.OrderedDict)
_LIBRARIES = ("torch", "builtins", "numpy", "collections", "functools", "typing", "abc")
_DEPTH = 3  # functions named by functions named by the model's own


@contextlib.contextmanager
def no_footprints(model: nn.Module, *functions: Callable[..., Any] | None) -> Iterator[None]:
    """Run copies of ``model`` and ``functions`` inside; the containers that their code can reach stay as they were.

    The containers themselves, and the containers in them one level down, get their entries back in place. An object
    that is no container is not looked into.
    """
    kept = [(container, copy.copy(container)) for container in _reachable(model, functions)]
    try:
        yield
    finally:
        for container, entries in kept:
            if not _same(container, entries):
                _restore(container, entries)


def _reachable(model: nn.Module, functions: tuple[Callable[..., Any] | None, ...]) -> list[Any]:
    owners = find_owners(model)
    found: dict[int, Any] = {}
    seen: set[int] = set()
    pending: list[tuple[Any, int]] = [(f, 0) for f in (*(f for _, f in owners.functions), *functions)]
    for cls in {c for m in owners.modules.values() for c in type(m).__mro__}:
        if cls.__module__.partition(".")[0] not in _LIBRARIES:
            pending += [(value, 0) for value in vars(cls).values()]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            if depth < _DEPTH and (value.__module__ or "").partition(".")[0] not in _LIBRARIES:
                pending += [(inner, depth + 1) for _, inner in closure_values(value)]
        elif type(value) in _CONTAINERS:
            found[id(value)] = value
            if len(value) < 1000:
                inner_values = list(value.values()) if isinstance(value, dict) else list(value)
                found.update({id(v): v for v in inner_values if type(v) in _CONTAINERS})
    return list(found.values())


def _same(container: Any, entries: Any) -> bool:
    if len(container) != len(entries):
        return False
    if isinstance(container, dict):
        return all(k in entries and container[k] is entries[k] for k in container)
    if isinstance(container, set):
        return bool(container == entries)
    return all(a is b for a, b in zip(container, entries, strict=True))


def _restore(container: Any, entries: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(entries)
    else:
        container.update(entries)  # a mapping or a set
