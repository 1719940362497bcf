"""An unpickler for files that a person trusts, which still imports nothing that no model needs.

``danger`` judges names as they are spelled; here each is judged again by the object that the import gave: a
friendly module may hold somebody else's ``system``. This module stands in for ``pickle`` in ``torch.load``. It is a
second lock and no sandbox: the classes of a trusted file run their own code.
"""

from __future__ import annotations

import pickle
from types import ModuleType
from typing import Any, BinaryIO

from bnfix.errors import UntrustedModelError
from bnfix.formats.pickles.danger import judge


class Unpickler(pickle.Unpickler):
    """``pickle.Unpickler`` that raises :class:`UntrustedModelError` instead of importing a dangerous name."""

    def find_class(self, module: str, name: str) -> Any:
        if judge(module, name) == "dangerous":
            raise refusal(f"{module}.{name}")
        found = super().find_class(module, name)
        if isinstance(found, ModuleType):
            raise refusal(f"{module}.{name}")
        home, real = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
        if isinstance(home, str) and isinstance(real, str) and callable(found):
            named_otherwise = (home, real) != (module, name) and "<" not in real
            if named_otherwise and judge(home, real) == "dangerous":
                raise refusal(f"{module}.{name}, which is {home}.{real}")
        return found


def load(file: BinaryIO, **options: Any) -> Any:
    """``pickle.load`` by way of the guarded :class:`Unpickler`."""
    return Unpickler(file, **options).load()


def refusal(names: str) -> UntrustedModelError:
    """The error for names that no flag admits."""
    return UntrustedModelError(
        f"the file names {names}: no model needs that, and loading would run it. It is not loaded, whatever the flags"
    )
