"""What a model consists of, object by object, and which of them a replica needs for itself."""

from __future__ import annotations

import contextlib
import dis
import gc
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from bnfix.errors import TraceError
from bnfix.graph.kinds import (
    IMMUTABLE,
    ByClass,
    Kind,
    base_of,
    filled_slots,
    is_frozen,
    is_global,
    is_sentinel,
    kind_of,
    made_in_python,
    slots_of,
    state_of,
)

_LARGE = 1000
_LARGE_ARRAY = 1 << 20
_WITH_STATE = frozenset({"module", "object", "dict", "list", "set", "deque", "namespace", "tuple"})
_BARE = frozenset({dict, list, set, tuple, deque})  # no __dict__, no slots
_COMPILED = (
    "is compiled by torch.compile: its run cannot be observed",
    "pass the model as it was before that was compiled",
)

Part = tuple[Any, "int | None"]


@dataclass(slots=True)
class Node:
    """One object of the model's. ``parts`` is what it holds: a value, and the number of its node if it has one."""

    value: Any
    kind: Kind
    parent: int
    name: str | None
    parts: list[Part] = field(default_factory=list)
    state: dict[str, Any] | None = None
    links: list[tuple[str, int]] = field(default_factory=list)
    slots: list[tuple[Any, Part]] = field(default_factory=list)
    changed: bool | None = True  # False: a replica can use the original; None: as its parts decide

    def nodes(self) -> list[int]:
        """The nodes that it leads to."""
        parts = [*self.parts, *(p for _, p in self.slots)]
        return [j for _, j in parts if j is not None] + [j for _, j in self.links]


class Plan:
    """Every object that a model holds on to, and in what order they are made again."""

    def __init__(self, model: nn.Module) -> None:
        self.nodes: list[Node] = []
        self.order: list[int] = []  # the immutable ones that a replica needs for itself: parts before wholes
        self.shared: list[str] = []
        self._kinds = ByClass(kind_of)
        self._bases, self._slots = ByClass(base_of), ByClass(slots_of)
        self._whole = ByClass(lambda cls: made_in_python(cls, object))
        self._index: dict[int, int] = {}
        self._add(model, 0, "")
        explored = 0
        while explored < len(self.nodes):
            self._open(explored)
            explored += 1
        self._complete()
        self._settle()
        self._sort()

    def _path(self, i: int) -> str:
        names: list[str] = []
        while i:
            names.append(self.nodes[i].name or "")
            i = self.nodes[i].parent
        return "".join(reversed(names)).removeprefix(".")

    def _note(self, value: Any, i: int) -> None:
        self.shared.append(f"{self._path(i) or 'the model'} ({type(value).__qualname__})")

    def _refuse(self, i: int, why: str, hint: str) -> TraceError:
        return TraceError(f"{self._path(i) or 'the model'} {why}", hint=hint)

    def _add(self, value: Any, parent: int, name: str | None) -> int | None:
        """The number of the node that ``value`` is; None where a replica uses the value itself."""
        cls = type(value)
        kind = self._kinds[cls]
        if kind == "atom":
            return None
        known = self._index.get(id(value))
        if known is not None:
            return known
        if kind == "tuple" and cls is tuple and all(self._kinds[type(v)] == "atom" for v in value):
            return None
        if kind == "object" and is_sentinel(value):
            return None
        if kind == "function" and _is_compiled(value):
            kind = "compiled"
        i = self._index[id(value)] = len(self.nodes)
        node = Node(value, kind, parent, name)
        self.nodes.append(node)
        if kind == "shared" or (kind == "flat" and not _copyable(value)):
            node.changed = False
            self._note(value, i)
        elif kind == "compiled":
            node.changed = False
        elif self._is_large(value, kind):
            node.kind, node.changed = "shared", False
        elif kind in IMMUTABLE or kind in ("function", "cell") or (kind == "object" and is_frozen(cls)):
            node.changed = None
        return i

    def _is_large(self, value: Any, kind: Kind) -> bool:
        if kind == "flat":
            return isinstance(value, np.ndarray) and value.nbytes > _LARGE_ARRAY
        if kind not in ("dict", "list", "set", "deque", "tuple"):
            return False
        count: int = self._bases[type(value)].__len__(value)  # type: ignore[attr-defined]
        return count > _LARGE and _inert(value, self._kinds)

    def _part(self, value: Any, parent: int, name: str | None) -> Part:
        return value, self._add(value, parent, name)

    def _open(self, i: int) -> None:
        """Look into a node: what it holds becomes nodes too."""
        node = self.nodes[i]
        value = node.value
        if type(value) is OrderedDict and not value and not vars(value):  # a dozen of each module
            return
        match node.kind:
            case "module":
                self._check_module(i, value)
            case "dict":
                items = list(self._bases[type(value)].items(value))  # type: ignore[attr-defined]
                if isinstance(value, defaultdict):
                    node.parts.append(self._part(value.default_factory, i, ".default_factory"))
                for k, v in items:
                    text = f".{k}" if node.name is None else f"[{k!r}]"
                    node.parts += [self._part(k, i, text), self._part(v, i, text)]
            case "list" | "tuple" | "deque":
                base = self._bases[type(value)]
                node.parts = [self._part(v, i, f"[{n}]") for n, v in enumerate(base.__iter__(value))]  # type: ignore[attr-defined]
            case "set" | "frozenset":
                node.parts = [self._part(v, i, "[…]") for v in self._bases[type(value)].__iter__(value)]  # type: ignore[attr-defined]
            case "function":
                own = not is_global(value)
                rebound = _rebound(value.__code__) if value.__closure__ and not own else set()
                for variable, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                    node.parts.append(self._part(cell, i, f".<{variable}>"))
                    j = self._index.get(id(cell))
                    if j is not None and (own or variable in rebound):
                        self.nodes[j].changed = True
                node.parts += [self._part(v, i, ".<default>") for v in value.__defaults__ or ()]
                node.parts += [self._part(v, i, f".<{k}>") for k, v in (value.__kwdefaults__ or {}).items()]
                node.parts += [self._part(v, i, f".{k}") for k, v in vars(value).items()]
            case "cell":
                with contextlib.suppress(ValueError):  # empty
                    node.parts = [self._part(value.cell_contents, i, "")]
            case "method":
                node.parts = [self._part(value.__func__, i, ""), self._part(value.__self__, i, ".__self__")]
            case "builtin":
                node.parts = [self._part(value.__self__, i, ".__self__")]
            case "partial":
                parts = (value.func, *value.args, *value.keywords.values(), *vars(value).values())
                node.parts = [self._part(v, i, f"({n})") for n, v in enumerate(parts)]
            case "cached":
                node.parts = [self._part(value.__wrapped__, i, "")]
            case "compiled":
                node.parts = [self._part(value._torchdynamo_orig_callable, i, "")]
            case "view":
                node.parts = [self._part(gc.get_referents(value)[0], i, "")]
            case "ref":
                if not isinstance(value, weakref.WeakMethod):  # that one's callback is its own affair
                    node.parts = [self._part(value.__callback__, i, ".__callback__")]
        if node.kind in _WITH_STATE and type(value) not in _BARE:
            self._open_state(i, node)

    def _open_state(self, i: int, node: Node) -> None:
        state = state_of(node.value)
        if state:
            node.state = dict(state)
            for key, value in state.items():
                j = self._add(value, i, None if key == "_modules" and node.kind == "module" else f".{key}")
                if j is not None:
                    node.links.append((key, j))
            if node.kind == "module" and "training" in state:
                node.state["training"] = False
        node.slots = [
            (slot, self._part(value, i, f".{slot.__name__}"))
            for slot, value in filled_slots(node.value, self._slots[type(node.value)])
        ]

    def _check_module(self, i: int, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise self._refuse(
                i, "is a ScriptModule: its run cannot be observed", "pass the Python module that it was scripted from"
            )
        if type(module).__name__ == "OptimizedModule" or vars(module).get("_compiled_call_impl") is not None:
            raise self._refuse(i, *_COMPILED)
        if not self._whole[type(module)]:
            raise self._refuse(
                i,
                f"is of a class made outside Python ({type(module).__qualname__}): there is no second one of it",
                "derive the module from torch.nn.Module alone, and let it hold the other object",
            )
        for table in ("_parameters", "_buffers"):
            if any(tensor is not None and is_lazy(tensor) for tensor in vars(module).get(table, {}).values()):
                raise self._refuse(i, "is not initialised yet", "run the model once on an example, then call bnfix")

    def _complete(self) -> None:
        """What can be told only when everything is known."""
        for node in self.nodes:
            if node.kind in ("ref", "proxy"):
                self._find_referent(node)
        for i, node in enumerate(self.nodes):
            if node.kind == "compiled" and self._leads_to_model(i):
                raise self._refuse(i, *_COMPILED)
            if node.kind == "object" and hasattr(type(node.value), "__del__") and not self._may_end(i):
                node.changed = False
                if node.nodes():
                    self._note(node.value, i)
        for node in [n for n in self.nodes if n.kind == "dict" and n.changed]:
            self._find_ids(node)

    def _find_referent(self, node: Node) -> None:
        """The node that a weak reference refers to, if the model holds that object by other ways too."""
        if node.kind == "ref":
            j = self._index.get(id(weakref.ref.__call__(node.value)))
        else:
            j = next((n for n, o in enumerate(self.nodes) if _has_proxy(o.value, node.value)), None)
        if j is None:
            node.changed = False
        else:
            node.parts.insert(0, (None, j))

    def _find_ids(self, node: Node) -> None:
        """``{id(module): ...}`` is a table of modules: its keys are to be those of the replica's."""
        for n in range(len(node.parts) % 2, len(node.parts), 2):
            key = node.parts[n][0]
            j = self._index.get(key) if type(key) is int else None
            if j is not None and self.nodes[j].kind == "module":
                self.nodes.append(Node(key, "id", j, "", [(None, j)], changed=None))
                node.parts[n] = (key, len(self.nodes) - 1)

    def _may_end(self, i: int) -> bool:
        """Whether a second object of this class can come to its end while the first goes on.

        One that removes hooks can: it has hooks of its own. One that closes something takes it from the original too.
        """
        return self._leads_to_model(i) and all(self.nodes[j].kind != "shared" for j in self.nodes[i].nodes())

    def _leads_to_model(self, i: int) -> bool:
        seen, pending = {i}, [i]
        while pending:
            node = self.nodes[pending.pop()]
            if node.kind == "module" or isinstance(node.value, RemovableHandle):
                return True
            new = [j for j in node.nodes() if j not in seen]
            seen.update(new)
            pending += new
        return False

    def _settle(self) -> None:
        """What leads to something that a replica has of its own is its own too."""
        holders: dict[int, list[int]] = {}
        for i, node in enumerate(self.nodes):
            if node.changed is None:
                for j in node.nodes():
                    holders.setdefault(j, []).append(i)
        pending = [i for i, node in enumerate(self.nodes) if node.changed]
        while pending:
            for i in holders.pop(pending.pop(), ()):
                if self.nodes[i].changed is None:
                    self.nodes[i].changed = True
                    pending.append(i)

    def _sort(self) -> None:
        seen: set[int] = set()
        pending = [(i, False) for i in range(len(self.nodes))]
        while pending:
            i, parts_done = pending.pop()
            node = self.nodes[i]
            if parts_done:
                self.order.append(i)
            elif node.kind in IMMUTABLE and node.changed and i not in seen:
                seen.add(i)
                pending.append((i, True))
                pending += [(j, False) for j in node.nodes()]


def _inert(value: Any, kinds: ByClass[Kind], depth: int = 3) -> bool:
    """Whether there is nothing in it but plain values: no tensor, no module, no object with a state of its own."""
    if kinds[type(value)] == "atom":
        return not isinstance(value, Tensor)
    if depth == 0:
        return False
    if isinstance(value, dict):
        value = (*value, *value.values())
    elif type(value) not in (list, tuple, set, frozenset, deque):
        return False
    return all(_inert(v, kinds, depth - 1) for v in value)


def _has_proxy(value: Any, proxy: Any) -> bool:
    return any(reference is proxy for reference in weakref.getweakrefs(value))


def _is_compiled(function: types.FunctionType) -> bool:
    marks = vars(function)
    return "_torchdynamo_orig_callable" in marks and not marks.get("_torchdynamo_disable")


def _copyable(value: Any) -> bool:
    return isinstance(value, bytearray) or (type(value) is np.ndarray and not value.dtype.hasobject)


def _rebound(code: types.CodeType) -> set[str]:
    """The free variables that a function, or one inside it, assigns (``nonlocal``)."""
    stored = {str(step.argval) for step in dis.get_instructions(code) if step.opname in ("STORE_DEREF", "DELETE_DEREF")}
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            stored |= _rebound(inner)
    return stored & set(code.co_freevars)
