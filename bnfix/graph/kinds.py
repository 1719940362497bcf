"""How an object is rebuilt in a replica, told by its class alone. Copy protocols are not asked.

What an instance of a Python class is made of is its ``__dict__`` and its slots, all of it. ``__deepcopy__`` and
``__getstate__`` leave things out, recompute or refuse (DDP does): a replica wants the very same state.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import functools
import logging
import numbers
import pathlib
import re
import sys
import threading
import types
import weakref
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Kind = Literal[
    "atom", "shared", "module", "object", "dict", "list", "set", "deque", "namespace", "tuple", "frozenset", "function",
    "cell", "method", "builtin", "partial", "cached", "compiled", "ref", "proxy", "id", "lock", "flat",
]  # fmt: skip
"""``atom`` stays itself and nobody needs to know; ``shared`` stays itself although it may hold state."""

IMMUTABLE = frozenset(
    {"tuple", "frozenset", "method", "builtin", "partial", "cached", "compiled", "ref", "proxy", "id"}
)
"""Kinds that stay as they are where their parts do, and cannot be filled later where they do not."""

_ATOMS = (
    Tensor, torch.Generator, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.UntypedStorage, torch.TypedStorage, torch.jit.ScriptFunction, type, types.ModuleType, types.CodeType,
    types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodDescriptorType, types.WrapperDescriptorType,
    property, staticmethod, classmethod, enum.Enum, str, bytes, numbers.Number, bool, type(None), type(Ellipsis),
    type(NotImplemented), range, slice, re.Pattern, np.generic, np.dtype, np.ufunc, decimal.Decimal,
    datetime.date, datetime.time, datetime.timedelta, datetime.tzinfo, pathlib.PurePath,
    threading.local, threading.Thread, logging.Logger, logging.Handler, logging.LoggerAdapter,
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
    ((weakref.ProxyType, weakref.CallableProxyType), "proxy"),
    ((np.ndarray, bytearray), "flat"),
)

# Objects of these describe graphs, processes and files; a forward reads them, and their identity can matter.
_SHARED_TORCH = (
    "torch.fx.graph", "torch.fx.node", "torch.export", "torch._", "torch.distributed", "torch.utils._", "torch.package",
    "torch.utils.data", "torch.optim", "torch.autograd", "torch.cuda", "torch.jit",
)  # fmt: skip
_STATEFUL_STDLIB = {"collections", "functools", "types", "argparse", "threading", "queue", "contextlib", "__main__"}


class Kinds(dict[type, Kind]):
    """The kind of the instances of a class, found when it is first asked for."""

    def __missing__(self, cls: type) -> Kind:
        kind = self[cls] = _kind_of(cls)
        return kind


def _kind_of(cls: type) -> Kind:
    if issubclass(cls, nn.Module):
        return "module"
    if issubclass(cls, _ATOMS):
        return "atom"
    for base, kind in _BUILTINS:
        if issubclass(cls, base):
            return kind
    if cls is weakref.ref:
        return "ref"
    for base, kind in _CONTAINERS:
        if issubclass(cls, base):
            return kind if _made_in_python(cls, base) else "shared"
    if not _made_in_python(cls, object):
        return "shared"
    package = cls.__module__ if isinstance(cls.__module__, str) else ""
    if package.startswith(_SHARED_TORCH):
        return "atom"
    top = package.partition(".")[0]
    return "shared" if top in sys.stdlib_module_names - _STATEFUL_STDLIB else "object"


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


def state_of(value: Any) -> dict[str, Any] | None:
    """The instance's ``__dict__``, or None if it has none."""
    try:
        state = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return state if isinstance(state, dict) else None


def is_global(function: types.FunctionType) -> bool:
    """Whether code can reach this very function by name: globals belong to everybody, and their identity counts."""
    module = sys.modules.get(function.__module__ or "")
    found: Any = module
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function or getattr(module, function.__name__, None) is function


def _made_in_python(cls: type, base: type) -> bool:
    # A class of an extension keeps state that no __dict__ shows: its instances are larger than what Python adds. The
    # same sum stands in CPython's object.__reduce_ex__ ("cannot pickle ... object").
    if cls is base:
        return base is not object
    pointer = object.__basicsize__ // 2
    known = base.__basicsize__ + pointer * len(slots_of(cls))
    known += pointer * ((cls.__dictoffset__ > 0) + (cls.__weakrefoffset__ > 0))
    return cls.__basicsize__ <= known and cls.__itemsize__ == base.__itemsize__
