"""What is hung onto the user's modules, and how it comes off again, copies of them included."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.compiler import is_compiling

_TABLES = ("_forward_pre_hooks", "_load_state_dict_pre_hooks")

Modules = list["weakref.ref[nn.Module]"]
"""Not a WeakSet: modules may be equal without being the same."""

# What stands for a hook in a pickle: functions of Python's own that do nothing there, so the file needs no bnfix.
# {}.get(module, args) gives args back, which a pre-hook may; "".format takes whatever it gets.
FORWARD: tuple[Any, str] = ({}, "get")
LOAD: tuple[Any, str] = ("", "format")


class Hook:
    """Something that hangs on one module. Copies of a module carry its hooks with them, and so do pickles.

    A deep copy of a hook is :class:`Spent`, which does nothing and is taken off at the end of the watch.
    """

    only_watches = True
    """For the rest of bnfix: nothing that passes by is changed or kept, so a norm with this hook is as good as bare."""

    __slots__ = ("__weakref__", "_copies", "_module", "_stand_in")

    def __init__(self, module: nn.Module, copies: Modules, stand_in: tuple[Any, str]) -> None:
        self._module = weakref.ref(module)
        self._copies = copies
        self._stand_in = stand_in

    def __deepcopy__(self, memo: dict[int, Any]) -> Spent:
        original = self._module()
        # The copy of the module itself is in the memo by now: a module is rebuilt first and filled after.
        copied = memo.get(id(original)) if original is not None else None
        if not isinstance(copied, nn.Module):  # copied without its module: by a protocol of the user's own
            return Spent(nn.Identity(), self._copies, self._stand_in)
        self._copies.append(weakref.ref(copied))
        return Spent(copied, self._copies, self._stand_in)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self._stand_in


class Call(Hook):
    """Calls ``seen(module, …)``; a graph that is being compiled does not see it at all."""

    __slots__ = ("_seen",)

    def __init__(
        self,
        module: nn.Module,
        copies: Modules,
        stand_in: tuple[Any, str],
        seen: Callable[..., None],
    ) -> None:
        super().__init__(module, copies, stand_in)
        self._seen = seen

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if not is_compiling():
            self._seen(module, *args)


class Spent(Hook):
    """A hook on a copy: does nothing."""

    __slots__ = ()

    def __call__(self, *args: Any) -> None:
        return None


class Attached:
    """All hooks of one watch. They are found again on the modules themselves, also after an interrupt half-way."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._hung: Modules = []
        self.copies: Modules = []

    def forward(self, module: nn.Module, hook: Hook) -> None:
        """``hook(module, args)`` in front of each forward of ``module``."""
        self._hung.append(weakref.ref(module))
        module.register_forward_pre_hook(hook)  # type: ignore[arg-type]

    def load(self, module: nn.Module, seen: Callable[..., None]) -> None:
        """``seen(module, state_dict, prefix, …)`` in front of each load of ``module``'s own tensors."""
        self._hung.append(weakref.ref(module))
        hook = Call(module, self.copies, LOAD, seen)
        module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]

    def add(self, handle: Any) -> None:
        """Something else with a ``remove``."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Take everything off, also from copies."""
        for reference in [*self._hung, *self.copies]:
            module = reference()
            if module is not None:
                _clean(module, self.copies)
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()
        self._hung.clear()
        self.copies.clear()


def _clean(module: nn.Module, copies: Modules) -> None:
    """Take the hooks of one watch off a module."""
    for table in _TABLES:
        hooks = getattr(module, table)
        for key in [k for k, h in hooks.items() if getattr(getattr(h, "hook", h), "_copies", None) is copies]:
            del hooks[key]


def hung_on(modules: Iterable[nn.Module]) -> list[Any]:
    """Hooks of bnfix that are on ``modules``."""
    found = []
    for module in modules:
        for table in _TABLES:
            found += [h for h in getattr(module, table).values() if isinstance(getattr(h, "hook", h), Hook)]
    return found
