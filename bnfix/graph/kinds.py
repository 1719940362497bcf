"""How an object is rebuilt in a replica, told by its class alone. Copy protocols are not asked.

What an instance of a Python class is made of is its ``__dict__`` and its slots, all of it. ``__deepcopy__`` and
``__getstate__`` leave things out, recompute or refuse (DDP does): a replica wants the very same state.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import datetime
import enum
import functools
import re
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")
Kind = Literal[
    "atom", "shared", "module", "object", "dict", "list", "set", "deque", "namespace", "tuple", "frozenset", "function",
    "cell", "method", "builtin", "partial", "cached", "compiled", "view", "ref", "proxy", "id", "lock", "flat",
]  # fmt: skip
"""``atom`` stays itself and nobody needs to know; ``shared`` stays itself although it may hold state."""

IMMUTABLE = frozenset({"tuple", "frozenset", "method", "builtin", "partial", "cached", "view", "ref", "proxy", "id"})
"""Kinds that stay as they are where their parts do, and cannot be filled later where they do not."""

_ATOMS = (
    Tensor, torch.Generator, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.UntypedStorage, torch.TypedStorage, torch.jit.ScriptFunction, type, types.ModuleType, types.CodeType,
    types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodDescriptorType, types.WrapperDescriptorType,
    types.MappingProxyType, types.GenericAlias, types.UnionType, property, staticmethod, classmethod, enum.Enum, str,
    bytes, int, float, complex, type(None), type(Ellipsis), type(NotImplemented), range, slice, re.Pattern, np.generic,
    np.dtype, np.ufunc, datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, threading.local,
    threading.Thread, contextvars.ContextVar,
)  # fmt: skip

_CONTAINERS: tuple[tuple[type, Kind], ...] = (
    (collections.OrderedDict, "dict"),
    (collections.defaultdict, "dict"),
    (dict, "dict"),
    (list, "list"),
    (set, "set"),
    (collections.deque, "deque"),
    (types.SimpleNamespace, "namespace"),
    (tuple, "tuple"),
    (frozenset, "frozenset"),
)

_BUILTINS: tuple[tuple[type | tuple[type, ...], Kind], ...] = (
    (types.FunctionType, "function"),
    (types.CellType, "cell"),
    (types.MethodType, "method"),
    (functools.partial, "partial"),
    (type(functools.lru_cache(int)), "cached"),
    ((types.BuiltinMethodType, types.MethodWrapperType), "builtin"),
    ((type(threading.Lock()), type(threading.RLock())), "lock"),
    ((weakref.ref, weakref.KeyedRef, weakref.WeakMethod), "ref"),
    ((weakref.ProxyType, weakref.CallableProxyType), "proxy"),
    ((type({}.keys()), type({}.values()), type({}.items())), "view"),
    ((weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary), "object"),
    ((np.ndarray, bytearray), "flat"),
)

# Graphs, processes, streams, data sets: a forward reads them, and their identity can matter.
_SHARED_TORCH = (
    "torch.fx.graph", "torch.fx.node", "torch.export", "torch._", "torch.distributed", "torch.utils._", "torch.package",
    "torch.utils.data", "torch.optim", "torch.autograd", "torch.cuda", "torch.jit",
)  # fmt: skip
# Of the standard library, what a forward may keep values in; and what holds none that a call could leave behind.
_STATEFUL = frozenset({"collections", "functools", "types", "argparse", "threading", "queue", "contextlib", "__main__"})
_STATELESS = frozenset({
    "typing", "operator", "_operator", "inspect", "uuid", "fractions", "decimal", "string", "logging", "pathlib", "ast",
    "zoneinfo", "dataclasses", "_contextvars", "ipaddress", "importlib", "_frozen_importlib_external", "types", "abc",
})  # fmt: skip


class ByClass(dict[type, T]):
    """What holds for all instances of a class, found when it is first asked for.

    One a plan, none for good: a class may hold on to a model.
    """

    def __init__(self, find: Callable[[type], T]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, cls: type) -> T:
        found = self[cls] = self._find(cls)
        return found


def kind_of(cls: type) -> Kind:
    if issubclass(cls, nn.Module):
        return "module"
    if issubclass(cls, _ATOMS) or cls is object:
        return "atom"
    for base, kind in _BUILTINS:
        if issubclass(cls, base):
            return kind
    for base, kind in _CONTAINERS:
        if issubclass(cls, base):
            return kind if made_in_python(cls, base) else "shared"
    package = cls.__module__ if isinstance(cls.__module__, str) else ""
    if package.startswith(_SHARED_TORCH):
        return "atom"
    top = package.partition(".")[0]
    if top in sys.stdlib_module_names - _STATEFUL or not made_in_python(cls, object):
        return "atom" if top in _STATELESS else "shared"
    return "object"


def base_of(cls: type) -> type:
    """The built-in class that makes instances of ``cls``: ``base.__new__(cls)`` runs no code of the user's."""
    return next((base for base, _ in _CONTAINERS if issubclass(cls, base)), object)


def slots_of(cls: type) -> tuple[Any, ...]:
    """The descriptors of all slots; reading through them passes by ``__getattr__`` and ``__setattr__``."""
    skip = base_of(cls).__mro__
    return tuple(
        value
        for c in cls.__mro__
        if c not in skip
        for value in vars(c).values()
        if isinstance(value, types.MemberDescriptorType)
    )


def filled_slots(value: Any, slots: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """Those of ``slots``, all of its class, that are set in ``value``, and what is in them."""
    found = []
    for slot in slots:
        with contextlib.suppress(AttributeError):
            found.append((slot, slot.__get__(value)))
    return found


def state_of(value: Any) -> dict[str, Any] | None:
    """The instance's ``__dict__``, or None if it has none."""
    try:
        state = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return state if isinstance(state, dict) else None


def is_frozen(cls: type) -> bool:
    """Whether ``cls`` is a frozen dataclass: a value, like a tuple."""
    parameters = getattr(cls, "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)


def is_global(function: types.FunctionType) -> bool:
    """Whether this is a function that code reaches by name: then its identity may count (``self.act is F.gelu``)."""
    module = sys.modules.get(function.__module__ or "")
    return module is not None and vars(module).get(function.__name__) is function


def is_sentinel(value: Any) -> bool:
    """Whether this is a mark like ``MISSING = _Missing()``: nothing in it, and known by its identity."""
    module = sys.modules.get(type(value).__module__)
    if module is None or state_of(value) or filled_slots(value, slots_of(type(value))):
        return False
    return any(v is value for v in vars(module).values())


def made_in_python(cls: type, base: type) -> bool:
    """Whether instances of ``cls`` are a ``base``, a ``__dict__`` and slots, and nothing else."""
    # A class of an extension keeps state that no __dict__ shows: its instances are larger than what Python adds. The
    # same sum stands in CPython's object.__reduce_ex__ ("cannot pickle ... object").
    if cls is base:
        return base is not object
    pointer = object.__basicsize__ // 2
    known = base.__basicsize__ + pointer * len(slots_of(cls))
    # -1: in front of the object (Python 3.11 and newer); another negative number: behind the items of a tuple.
    known += pointer * ((cls.__dictoffset__ not in (0, -1)) + (cls.__weakrefoffset__ > 0))
    return cls.__basicsize__ <= known and cls.__itemsize__ == base.__itemsize__
