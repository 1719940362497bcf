"""Replicas: module trees of their own over one and the same set of tensors.

Several calls of one model at a time need it: a forward keeps values on ``self``, in lists and dicts, in hook objects,
in closures, and calls that share these read each other's. A replica has all of them of its own. What no object of the
model holds cannot be isolated: globals, and attributes of classes.
"""

from __future__ import annotations

import functools
import gc
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bnfix.graph.kinds import IMMUTABLE, base_of
from bnfix.graph.replica_plan import Node, Part, Plan

Values = list[Any]  # one entry a node of the plan: the original at first, then what stands for it in this replica
_LOCK = type(threading.Lock())


@dataclass
class _Steps:
    """How to make all nodes again: bare objects first, then what is in them, so that cycles need no care."""

    originals: Values
    fresh: list[tuple[int, Callable[[], Any]]] = field(default_factory=list)
    shells: list[tuple[int, Callable[..., Any], Any]] = field(default_factory=list)
    made: list[tuple[int, Callable[[Values], Any]]] = field(default_factory=list)
    states: list[tuple[int, dict[str, Any], list[tuple[str, int]]]] = field(default_factory=list)
    entries: list[tuple[int, list[tuple[Any, int]]]] = field(default_factory=list)
    fills: list[tuple[int, Callable[[Any, Values], None]]] = field(default_factory=list)
    tables: list[tuple[int, Callable[[Any, Values], None]]] = field(
        default_factory=list
    )  # last: keys can be hashed now


class Replicator:
    """Makes replicas of a model as it was when this was made."""

    def __init__(self, steps: _Steps, shared: tuple[str, ...]) -> None:
        self._steps = steps
        self.shared = shared
        """``path (class)`` of what may hold state and is not rebuilt: files, iterators, handles of C code."""

    def __call__(self) -> nn.Module:
        """A new replica, in evaluation mode."""
        collecting = gc.isenabled()
        try:
            gc.disable()  # thousands of containers at once start collections of the whole heap, and leave no garbage
            return self._build()
        finally:
            if collecting:
                gc.enable()

    def _build(self) -> nn.Module:
        steps = self._steps
        values = steps.originals.copy()
        for i, new in steps.fresh:
            values[i] = new()
        for i, new_of, cls in steps.shells:
            values[i] = new_of(cls)
        for i, make in steps.made:
            values[i] = make(values)
        set_attribute = object.__setattr__
        for i, state, links in steps.states:
            own = state.copy()
            for name, j in links:
                own[name] = values[j]
            set_attribute(values[i], "__dict__", own)
        for i, entries in steps.entries:
            container = values[i]
            for key, j in entries:
                container[key] = values[j]
        for i, fill in (*steps.fills, *steps.tables):
            fill(values[i], values)
        replica = values[0]
        assert isinstance(replica, nn.Module)
        return replica


def replicator(model: nn.Module) -> Replicator:
    """A factory of replicas of ``model``, which is not touched.

    Each replica has module objects, ``__dict__``s, containers, hooks, closures, plain objects and locks of its own, and
    shares every parameter, buffer and other tensor with the model by identity. All its modules are in evaluation mode
    (the flag alone; ``train`` is not called). Containers of more than 1000 plain values, arrays over 1 MiB and random
    generators are shared.

    Raises:
        TraceError: part of the model is scripted or compiled, so that its run cannot be observed, or not initialised
            yet; names it.
    """
    plan = Plan(model)
    steps = _Steps([node.value for node in plan.nodes])
    functions: list[tuple[int, Callable[[Values], Any]]] = []
    for i, node in enumerate(plan.nodes):
        if not node.changed or node.kind in IMMUTABLE:
            continue
        if node.kind == "function":
            functions.append((i, functools.partial(_function, node)))
            steps.fills.append((i, functools.partial(_fill_function, node)))
        elif node.kind in ("module", "object"):
            steps.shells.append((i, object.__new__, type(node.value)))
        else:
            _container(steps, i, node)
        _state(steps, i, node)
    steps.made = functions
    for i in plan.order:
        node = plan.nodes[i]
        steps.made.append((i, functools.partial(_MAKE[node.kind], node)))
        _state(steps, i, node)
    return Replicator(steps, tuple(plan.shared))


def _state(steps: _Steps, i: int, node: Node) -> None:
    if node.state:
        if node.kind == "namespace":
            steps.fills.append((i, functools.partial(_fill_namespace, node)))
        else:
            steps.states.append((i, node.state, node.links))
    if node.slots:
        steps.fills.append((i, functools.partial(_fill_slots, node)))


def _container(steps: _Steps, i: int, node: Node) -> None:
    """Steps for a container, a cell, a lock or an array: a copy at once where nothing in it is a node."""
    value, kind, cls = node.value, node.kind, type(node.value)
    linked = [(n, j) for n, (_, j) in enumerate(node.parts) if j is not None]
    if kind == "lock":
        steps.fresh.append((i, threading.Lock if cls is _LOCK else threading.RLock))
    elif kind == "flat":
        steps.fresh.append((i, value.copy().copy))
    elif kind == "cell":
        steps.fresh.append((i, types.CellType))
        if node.parts:
            steps.fills.append((i, functools.partial(_fill_cell, node)))
    elif cls in (dict, OrderedDict, list, set) and not linked:
        steps.fresh.append((i, value.copy().copy if value else cls))
    elif cls in (dict, OrderedDict) and all(n % 2 for n, _ in linked):
        steps.fresh.append((i, value.copy().copy))
        steps.entries.append((i, [(node.parts[n - 1][0], j) for n, j in linked]))
    elif cls is list:
        steps.fresh.append((i, value.copy().copy))
        steps.entries.append((i, linked))
    else:
        steps.shells.append((i, base_of(cls).__new__, cls))
        if kind != "namespace":
            fills = steps.tables if kind in ("dict", "set") else steps.fills
            fills.append((i, functools.partial(_FILL[kind], node)))


def _picked(parts: list[Part], values: Values) -> list[Any]:
    return [value if j is None else values[j] for value, j in parts]


def _fill_cell(node: Node, cell: Any, values: Values) -> None:
    (cell.cell_contents,) = _picked(node.parts, values)


def _fill_dict(node: Node, new: Any, values: Values) -> None:
    base: Any = base_of(type(new))
    parts = _picked(node.parts, values)
    if isinstance(new, defaultdict):
        new.default_factory = parts.pop(0)
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        base.__setitem__(new, key, value)


def _fill_list(node: Node, new: Any, values: Values) -> None:
    list.extend(new, _picked(node.parts, values))


def _fill_set(node: Node, new: Any, values: Values) -> None:
    set.update(new, _picked(node.parts, values))


def _fill_deque(node: Node, new: Any, values: Values) -> None:
    deque.__init__(new, _picked(node.parts, values), node.value.maxlen)


def _fill_namespace(node: Node, new: Any, values: Values) -> None:
    vars(new).update(node.state or {}, **{name: values[j] for name, j in node.links})


def _fill_slots(node: Node, new: Any, values: Values) -> None:
    for slot, (value, j) in node.slots:
        slot.__set__(new, value if j is None else values[j])


def _function(node: Node, values: Values) -> types.FunctionType:
    old = node.value
    cells = tuple(_picked(node.parts[: len(old.__closure__ or ())], values))
    return types.FunctionType(old.__code__, old.__globals__, old.__name__, None, cells)


def _fill_function(node: Node, new: Any, values: Values) -> None:
    old = node.value
    parts = iter(_picked(node.parts[len(old.__closure__ or ()) :], values))
    if old.__defaults__ is not None:
        new.__defaults__ = tuple(next(parts) for _ in old.__defaults__)
    if old.__kwdefaults__ is not None:
        new.__kwdefaults__ = {name: next(parts) for name in old.__kwdefaults__}
    vars(new).update({name: next(parts) for name in vars(old)})
    for name in ("__qualname__", "__module__", "__doc__"):
        setattr(new, name, getattr(old, name))


def _tuple(node: Node, values: Values) -> Any:
    return base_of(type(node.value)).__new__(type(node.value), _picked(node.parts, values))  # type: ignore[call-arg]


def _method(node: Node, values: Values) -> types.MethodType:
    return types.MethodType(*_picked(node.parts, values))


def _builtin(node: Node, values: Values) -> Any:
    (holder,) = _picked(node.parts, values)
    return getattr(holder, node.value.__name__)  # list.append of the replica's list


def _partial(node: Node, values: Values) -> Any:
    old = node.value
    func, *rest = _picked(node.parts, values)
    count = len(old.args)
    keywords = dict(zip(old.keywords, rest[count:], strict=False))
    own = dict(zip(vars(old), rest[count + len(keywords) :], strict=True))
    new = functools.partial.__new__(type(old), func)
    new.__setstate__((func, tuple(rest[:count]), keywords, own))
    return new


def _cached(node: Node, values: Values) -> Any:
    (wrapped,) = _picked(node.parts, values)
    return functools.lru_cache(**node.value.cache_parameters())(wrapped)


def _view(node: Node, values: Values) -> Any:
    (mapping,) = _picked(node.parts, values)
    return getattr(mapping, type(node.value).__name__.rpartition("_")[2])()  # dict_keys, odict_values


def _ref(node: Node, values: Values) -> Any:
    old = node.value
    referent, *callback = _picked(node.parts, values)
    if isinstance(old, weakref.WeakMethod):
        method = old()
        return type(old)(types.MethodType(method.__func__, referent)) if method is not None else old
    key = (old.key,) if isinstance(old, weakref.KeyedRef) else ()
    return type(old)(referent, *callback, *key)


def _proxy(node: Node, values: Values) -> Any:
    return weakref.proxy(*_picked(node.parts, values))


def _id(node: Node, values: Values) -> int:
    return id(*_picked(node.parts, values))


_FILL = {"dict": _fill_dict, "list": _fill_list, "set": _fill_set, "deque": _fill_deque}
_MAKE: dict[str, Callable[[Node, Values], Any]] = {
    "tuple": _tuple, "frozenset": _tuple, "method": _method, "builtin": _builtin, "partial": _partial,
    "cached": _cached, "view": _view, "ref": _ref, "proxy": _proxy, "id": _id,
}  # fmt: skip
