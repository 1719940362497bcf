"""What running a model leaves behind outside of it: lists and dicts that its code and its hooks write to.

A private copy runs the same functions as the original. What they keep in a closure, in a default argument, in
a global or on their class is the user's own; it is put back as it was.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import random
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from bnfix.graph.owners import Owners, closure_values, find_owners
from bnfix.graph.writing import Saved, put_back, surely

CONTAINERS = (list, dict, set, collections.defaultdict, collections.OrderedDict, collections.deque)
LIBRARIES = ("torch", "builtins", "numpy", "collections", "functools", "typing", "abc")
_SIMPLE = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    torch.Tensor,
    nn.Module,
    type,
    types.FunctionType,
    types.ModuleType,
)
_BARE = nn.Module()
_OTHERS = ("_parameters", "_buffers", "_modules")
_TABLES = [name for name, v in vars(_BARE).items() if isinstance(v, CONTAINERS) and name not in _OTHERS]
LARGE = 1000
"""Entries of a container from which on it is a table, not a state."""
_DEPTH = 3  # functions named by functions named by the model's own


@contextlib.contextmanager
def no_footprints(
    model: nn.Module, *functions: Callable[..., Any] | None, owners: Owners | None = None
) -> Iterator[Owners]:
    """Run ``model``, copies of it and ``functions`` inside; the containers that their code can reach stay as they were.

    What the model itself holds is looked through: lists, dicts and sets, the attributes of plain objects, tensors that
    are no parameters or buffers, random generators. Of what its code holds (closures, defaults, globals, classes), the
    containers, and the containers in them one level down, get their entries back in place. Gives what it found out: who
    holds what, if nobody knew (``owners``).
    """
    owners = owners or find_owners(model)
    own, tensors, generators = _holdings(owners)
    containers = {id(c): c for c in (*own, *_reachable(owners, functions))}.values()
    kept = [(container, copy.copy(container)) for container in containers]
    values = [Saved.of(tensor) for tensor in tensors]
    states = [(generator, _state(generator)) for generator in generators]

    def again() -> None:
        for generator, state in states:
            _set_state(generator, state)
        put_back(values)
        for container, entries in kept:
            if not same(container, entries):
                restore(container, entries)

    try:
        yield owners
    finally:
        surely(again)


def _is_generator(value: Any) -> bool:
    """Of random numbers: torch's, Python's, NumPy's old and new."""
    kind = type(value)
    numpy = kind.__module__.startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState")
    return numpy or (isinstance(value, torch.Generator | random.Random) and not isinstance(value, random.SystemRandom))


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _holdings(owners: Owners) -> tuple[list[Any], list[torch.Tensor], list[Any]]:
    """Containers and attributes of plain objects, tensors beside parameters and buffers, generators.

    Of objects, those of the packages that the modules are of: not a trainer, and all that it leads to.
    """
    packages = {_package(m) for m in owners.modules.values()}.difference(LIBRARIES)
    containers: list[Any] = []
    generators: list[Any] = []
    registered = {
        id(t) for m in owners.modules.values() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
    }
    seen: set[int] = set()
    pending = [v for m in owners.modules.values() for v in own_attributes(m).values()]
    while pending:
        value = pending.pop()
        if isinstance(value, _SIMPLE) or id(value) in seen:
            continue
        seen.add(id(value))
        if _is_generator(value):
            generators.append(value)
        elif isinstance(value, tuple):
            pending += tuple.__iter__(value)  # a class of somebody's own may have no length, or another
        elif type(value) in CONTAINERS:
            containers.append(value)
            if len(value) <= LARGE:
                pending += value.values() if isinstance(value, dict) else value
        elif _package(value) in packages and hasattr(value, "__dict__"):
            containers.append(vars(value))
            pending += vars(value).values()
    loose = [t for t in owners.tensors.values() if id(t) not in registered and not t.is_meta]
    return containers, [t for t in loose if t.layout == torch.strided and not t.is_nested], generators


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that are not those of every module."""
    return {k: v for k, v in vars(module).items() if k != "training" and not (k[:1] == "_" and hasattr(_BARE, k))}


class Tables:
    """The containers that every module has beside its parameters, buffers and children: hooks, above all."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        tables = [table for m in modules for name in _TABLES if (table := vars(m).get(name)) is not None]
        self._empty = [table for table in tables if not table]  # nearly all of them
        self._kept = [(table, copy.copy(table)) for table in tables if table]

    def put_back(self) -> None:
        """Make them what they were, in place."""
        for table in self._empty:
            if table:
                table.clear()
        for table, entries in self._kept:
            if not same(table, entries):
                restore(table, entries)


def _package(value: Any) -> str:
    return str(type(value).__module__).partition(".")[0]


def _reachable(owners: Owners, functions: tuple[Callable[..., Any] | None, ...]) -> list[Any]:
    found: dict[int, Any] = {}
    seen: set[int] = set()
    pending: list[tuple[Any, int]] = [(f, 0) for f in (*(f for _, f in owners.functions), *functions)]
    for cls in {c for m in owners.modules.values() for c in type(m).__mro__}:
        if cls.__module__.partition(".")[0] not in LIBRARIES:
            pending += [(value, 0) for value in vars(cls).values()]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, (staticmethod, classmethod, types.MethodType)):
            value = value.__func__
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            if depth < _DEPTH and (value.__module__ or "").partition(".")[0] not in LIBRARIES:
                pending += [(inner, depth + 1) for _, inner in closure_values(value)]
        elif type(value) in CONTAINERS:
            found[id(value)] = value
            if len(value) < LARGE:
                inner_values = list(value.values()) if isinstance(value, dict) else list(value)
                found.update({id(v): v for v in inner_values if type(v) in CONTAINERS})
    return list(found.values())


def same(container: Any, entries: Any) -> bool:
    """Whether a container holds the objects that are in ``entries``."""
    if len(container) != len(entries):
        return False
    if isinstance(container, dict):
        return all(k in entries and container[k] is entries[k] for k in container)
    if isinstance(container, set):
        return bool(container == entries)
    return all(a is b for a, b in zip(container, entries, strict=True))


def restore(container: Any, entries: Any) -> None:
    """Make ``entries`` what a container holds, in place."""
    container.clear()
    if isinstance(container, (list, collections.deque)):
        container.extend(entries)
    else:
        container.update(entries)  # a mapping or a set
