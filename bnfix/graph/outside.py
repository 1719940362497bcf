"""What the code of a model can rebind outside of it: globals, attributes of modules and classes, closures, settings.

Forwards that wait for one another in the middle leave such things in another order than they came to them: where
``mock.patch.object(F, "relu", …)`` is entered by one and then by a second, the first to leave takes the patch from the
second, and the second leaves that of the first behind. A forward that runs alone puts back what it found.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable, Iterator, Set
from operator import is_
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from bnfix.graph.footprints import CONTAINERS, LIBRARIES, restore, same
from bnfix.graph.owners import Owners

_DEPTH = 3  # functions named by functions named by the model's own
_LARGE = 1000
_LIBRARIES = frozenset(LIBRARIES) | sys.stdlib_module_names - {"__main__"}
_OF_TURN = ("sys", "warnings")  # what matters of them, each forward gets at its turn as it left it
_OF_PYTHON = ("__annotations__", "__annotations_cache__", "__annotate_func__", "__abstractmethods__", "__doc__")
_GONE = object()
Values = dict[str, Any]


class _Holder:
    """Something with entries by name."""

    label = ""

    def now(self) -> Values:
        """The entries at this moment."""
        raise NotImplementedError

    def untouched(self, before: Values) -> bool:
        """Whether nothing has changed, told quickly; False where that takes a closer look."""
        return False

    def write(self, name: str, value: Any) -> None:
        """Make an entry what it was; ``_GONE`` takes it away."""
        raise NotImplementedError


class _Table(_Holder):
    """A dict of names, of a module or of an object's attributes; those in ``names`` count, with None all."""

    def __init__(self, table: dict[str, Any], label: str, names: Set[str] | None) -> None:
        self.table, self.label, self.names = table, label, names
        self.size = len(table)

    def now(self) -> Values:
        table = self.table
        return table.copy() if self.names is None else {n: table[n] for n in self.names if n in table}

    def untouched(self, before: Values) -> bool:
        table = self.table
        current = table.values() if self.names is None else map(table.get, before)
        return len(table) == self.size and all(map(is_, current, before.values()))

    def write(self, name: str, value: Any) -> None:
        if value is _GONE:
            self.table.pop(name, None)
        else:
            self.table[name] = value


class _Class(_Holder):
    def __init__(self, cls: type) -> None:
        self.cls, self.label = cls, cls.__qualname__

    def now(self) -> Values:
        return dict(vars(self.cls))

    def untouched(self, before: Values) -> bool:
        return len(vars(self.cls)) == len(before) and all(map(is_, vars(self.cls).values(), before.values()))

    def write(self, name: str, value: Any) -> None:
        if value is _GONE:
            delattr(self.cls, name)
        else:
            setattr(self.cls, name, value)


class _Cell(_Holder):
    """A variable of a closure."""

    def __init__(self, cell: types.CellType, name: str) -> None:
        self.cell, self.name = cell, name

    def now(self) -> Values:
        try:
            return {self.name: self.cell.cell_contents}
        except ValueError:  # empty
            return {}

    def write(self, name: str, value: Any) -> None:
        if value is _GONE:
            del self.cell.cell_contents
        else:
            self.cell.cell_contents = value


class _Container(_Holder):
    """A list, a dict or a set, as a whole."""

    def __init__(self, container: Any, name: str) -> None:
        self.container, self.name = container, name

    def now(self) -> Values:
        return {self.name: _Entries(self.container)}

    def write(self, name: str, value: Any) -> None:
        restore(self.container, value.entries)


class _Entries:
    """What is in a container; equal where the same objects are."""

    def __init__(self, container: Any) -> None:
        self.entries = container.copy()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Entries) and same(self.entries, other.entries)

    __hash__ = None  # type: ignore[assignment]


class _Setting(_Holder):
    """Something with a getter and a setter."""

    def __init__(self, name: str, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        self.name, self.get, self.put = name, get, put

    def now(self) -> Values:
        return {self.name: self.get()}

    def write(self, name: str, value: Any) -> None:
        self.put(value)


class Outside:
    """What code of a model (by its ``owners``) and of ``functions`` can reach outside of the model, as it is now.

    Of modules and objects the names that the code mentions; of ``torch``, ``torch.nn.functional`` and the classes of
    the model's modules all of them; the environment, NumPy's error state, the number of threads.
    """

    def __init__(self, owners: Owners, *functions: Callable[..., Any] | None) -> None:
        self._holders: dict[int, _Holder] = {}
        self._keep: list[Any] = []  # what is known by its id must live
        self._names: set[str] = set()
        for module in (torch, F):
            self._add(vars(module), _Table(vars(module), module.__name__, None))
        classes = {c for m in owners.modules.values() for c in type(m).__mro__ if c is not object}
        for cls in (*classes, torch.Tensor):
            self._add(cls, _Class(cls))
        self._walk(
            [
                *(value for cls in classes if not _of_library(cls) for value in vars(cls).values()),
                *(f for _, f in owners.functions),
                *functions,
            ]
        )
        for setting in _settings():
            self._add(setting, setting)
        self._before = {key: holder.now() for key, holder in self._holders.items()}
        self._own: set[tuple[int, str]] = set()

    def settle(self) -> list[str]:
        """What has changed so far was changed by forwards that ran alone, and is theirs; says what."""
        changed = self._changed()
        self._own |= changed.keys()
        return [self._told(*place) for place in changed]

    def changed(self) -> list[str]:
        """What has changed since, but for what is a lone forward's own."""
        return [self._told(*place) for place in self._changed()]

    def put_back(self) -> list[str]:
        """Give it the values that it had; says what."""
        changed = self._changed()
        for (key, name), value in changed.items():
            self._holders[key].write(name, value)
        return [self._told(*place) for place in changed]

    def rewind(self) -> None:
        """Give what forwards count in, numbers and containers, the values that it came with.

        Not what they keep once they have it (a handle, a flag that something is set up): it may not be done twice.
        """
        own, self._own = self._own, set()
        try:
            for (key, name), value in self._changed().items():
                if (key, name) in own and type(value) in (int, float, _Entries):
                    self._holders[key].write(name, value)
        finally:
            self._own = own

    def _told(self, key: int, name: str) -> str:
        return f"{self._holders[key].label}.{name}".strip(".")

    def _changed(self) -> dict[tuple[int, str], Any]:
        """What it was, by holder and name."""
        found: dict[tuple[int, str], Any] = {}
        for key, holder in self._holders.items():
            before = self._before[key]
            if holder.untouched(before):
                continue
            now = holder.now()
            for name in (*before, *(n for n in now if n not in before)):
                old, new = before.get(name, _GONE), now.get(name, _GONE)
                imported = old is _GONE and _is_module(new)  # once, and there for all from then on
                if not (_alike(old, new) or imported or name in _OF_PYTHON or (key, name) in self._own):
                    found[key, name] = old
        return found

    def _add(self, thing: Any, holder: _Holder) -> None:
        if id(thing) not in self._holders:
            self._holders[id(thing)] = holder
            self._keep.append(thing)

    def _add_table(self, table: dict[str, Any], label: str) -> None:
        self._add(table, _Table(table, label, self._names))  # the names are all there once the walk is over

    def _walk(self, values: list[Any]) -> None:
        seen: set[int] = set()
        pending: list[tuple[str, Any, int]] = [("", value, 0) for value in values]
        while pending:
            name, value, depth = pending.pop()
            if id(value) in seen or depth > _DEPTH:
                continue
            seen.add(id(value))
            self._keep.append(value)
            kind = type(value)  # not isinstance: a proxy would answer for what it stands for
            if kind is types.FunctionType:
                if not _of_library(value):
                    pending += [(n, v, depth + 1) for n, v in self._function(value)]
            elif kind in (types.MethodType, staticmethod, classmethod):
                pending.append((name, value.__func__, depth))
            elif issubclass(kind, functools.partial):
                pending += [(name, value.func, depth), *((name, v, depth) for v in value.args)]
            elif issubclass(kind, property):
                pending.append((name, value.fget, depth))
            elif kind is tuple or kind in CONTAINERS:
                if len(value) <= _LARGE:
                    if kind is not tuple:
                        self._add(value, _Container(value, name))
                    pending += [(name, v, depth + 1) for v in (value.values() if hasattr(value, "values") else value)]
            elif issubclass(kind, type):
                if not _of_library(value):
                    self._add(value, _Class(value))
                    pending += [(n, v, depth + 1) for n, v in vars(value).items()]
            elif not issubclass(kind, (nn.Module, types.ModuleType)) and (own := _own_attributes(value)) is not None:
                self._add_table(own, name)
                pending += [(n, v, depth + 1) for n, v in own.items()]

    def _function(self, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        """All that a function names, and what stands behind these names."""
        codes = [function.__code__]
        for code in codes:
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        mentioned = {n for code in codes for n in (*code.co_names, *_words(code.co_consts))}
        self._names |= mentioned
        known = function.__globals__
        self._add_table(known, function.__module__ or "")
        for name in mentioned:
            value = known.get(name) if name in known else sys.modules.get(name)
            if not _is_module(value):
                yield name, value
            elif name not in _OF_TURN:
                self._add_table(vars(value), value.__name__)
                if not _of_library(value):
                    yield from ((n, vars(value)[n]) for n in mentioned & vars(value).keys())
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            holder = _Cell(cell, name)
            self._add(cell, holder)
            yield from holder.now().items()
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            yield "", value
        if hasattr(function, "__wrapped__"):
            yield "", function.__wrapped__


def _words(constants: tuple[Any, ...]) -> Iterator[str]:
    """What may be names of attributes and modules: of ``"package.module.name"`` each part, and the module."""
    for text in constants:
        if isinstance(text, str) and all(part.isidentifier() for part in text.split(".")):
            yield from text.split(".")
            yield text.rpartition(".")[0]


def _of_library(value: Any) -> bool:
    """Whether it is code of Python or of PyTorch: it is not looked into."""
    module = value.__name__ if _is_module(value) else getattr(value, "__module__", None)
    return (module or "").partition(".")[0] in _LIBRARIES


def _is_module(value: Any) -> TypeGuard[types.ModuleType]:
    return issubclass(type(value), types.ModuleType)


def _own_attributes(value: Any) -> dict[str, Any] | None:
    kind = type(value)
    if not kind.__dictoffset__ or (kind is not types.SimpleNamespace and _of_library(kind)):
        return None
    own = object.__getattribute__(value, "__dict__")
    return own if type(own) is dict else None


def _alike(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and type(a) in (int, float, str, dict, _Entries) and bool(a == b))


def _settings() -> Iterator[_Setting]:
    yield _Setting("torch.get_num_threads()", torch.get_num_threads, torch.set_num_threads)
    yield _Setting("os.environ", lambda: dict(os.environ), _put_environment)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield _Setting("numpy.geterr()", numpy.geterr, lambda errors: numpy.seterr(**errors))


def _put_environment(values: dict[str, str]) -> None:
    for name in [n for n in os.environ if n not in values]:
        del os.environ[name]
    for name, value in values.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
