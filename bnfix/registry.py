"""Plug-ins are found by walking their package: one file is one plug-in, and there is no list to forget."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from types import GenericAlias
from typing import TypeVar

T = TypeVar("T")


@cache
def _modules(package: str) -> tuple[str, ...]:
    found = importlib.import_module(package)
    return tuple(sorted(m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_")))


def plugins(package: str, base: type[T]) -> Iterator[T]:
    """Yield one instance of each concrete subclass of ``base`` defined in a module of ``package``.

    Modules are walked in alphabetical order, so the order is the same everywhere. Only classes
    defined in the module itself count, not the ones that it imports.
    """
    for name in _modules(package):
        module = importlib.import_module(f"{package}.{name}")
        for value in list(vars(module).values()):
            if (
                isinstance(value, type)
                and not isinstance(value, GenericAlias)  # in Python 3.10 list[int] passes for a class
                and issubclass(value, base)
                and value.__module__ == module.__name__
                and not getattr(value, "__abstractmethods__", None)
            ):
                yield value()
