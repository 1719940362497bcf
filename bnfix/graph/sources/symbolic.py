"""Facts without any input: ``torch.fx`` runs the forward on names instead of numbers.

Nothing is known of shapes here. Layers and plain norms of ``torch.nn`` are operations of their own; every other module
is gone through, and one that can't be (it looks at sizes or values) is a single operation ``other`` that reads all its
tensors: what feeds it and what it feeds is known, what it does is not. A forward that decides on its input where no
submodule can be cut out can't be traced.

A norm's ``rank`` is among its attributes where the code guarantees the rank of its input: by the class (BatchNorm2d
takes 4 axes and nothing else, BatchNorm1d 2 or 3), or by an assertion in the forward; so are its ``channels``.
"""

from __future__ import annotations

import builtins
import gc
import inspect
import math
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bnfix.errors import TraceError, one_line
from bnfix.graph.owners import find_owners, hooks_of
from bnfix.graph.sources.layout import KeyOf
from bnfix.graph.sources.symbolic_ops import RANK, STACK, STASHED, TENSOR_OF, Lowering
from bnfix.types import Route

_METADATA = frozenset({
    "shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad", "is_floating_point", "is_complex", "size",
    "dim", "numel", "nelement", "stride", "is_contiguous", "element_size", "ndimension", "get_device", "is_quantized",
    "is_sparse", "is_mps",
})  # fmt: skip
_HINT = "give an example: --input 1x3x224x224 on the command line, bnfix.fold(model, torch.randn(...)) in Python"
_CONTAINERS = ("torch.nn.modules.container",)


def trace(copy: nn.Module, key_of: KeyOf) -> Route:
    """Trace ``copy`` (a private one: names may be left on it) on no input at all.

    Raises:
        TraceError: its forward looks at its input; says how an input is given.
    """
    before = _attributes(copy)
    route = _trace_once(copy, key_of)
    if _attributes(copy) != before and _trace_once(copy, key_of) != route:
        raise TraceError(
            "the model can't be traced without an input: its forward writes on it, and goes another way the next time",
            hint=_HINT,
        )
    return route


def _trace_once(copy: nn.Module, key_of: KeyOf) -> Route:
    required, defaults = _signature(copy)
    tracer = _Tracer(copy)
    eager = _EagerReads(key_of)
    try:
        with torch.no_grad(), eager:
            graph = tracer.trace(copy, concrete_args=defaults)
    except Exception as error:  # the user's own forward may raise anything when it is given names
        raise TraceError(f"the model can't be traced without an input: {_first_line(error)}", hint=_HINT) from error
    _note_ranks(graph)
    _drop_checks(graph)
    ops = Lowering(key_of, tracer.named).run(graph, _metadata(graph), eager.found, tracer.held())
    return Route(f"any input ({', '.join(required)})", ops)


def _attributes(model: nn.Module) -> list[tuple[int, str, int]]:
    """What each module holds beside its tables, by identity: what a forward writes is another object."""
    return [
        (id(module), name, id(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if name not in ("_parameters", "_buffers", "_modules")
    ]


class _Value(fx.Proxy):
    """A name that says of itself that it is a tensor, as what it stands for would: forwards ask ``isinstance``."""

    @property
    def __class__(self) -> Any:
        return type(self.__dict__["_own"]) if "_own" in self.__dict__ else Tensor

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("the class of a traced value can't be changed")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):  # y.data = z would change the numbers, and nobody would see it
            raise AttributeError(f"{name} of a traced value can't be set")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if not hasattr(Tensor, name):  # so that hasattr tells what it tells of a tensor
            raise AttributeError(f"'Tensor' object has no attribute '{name}'")
        return super().__getattr__(name)


class _OwnValue(_Value):
    """A parameter or buffer of the model. Its numbers are traced, its size is known."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.__dict__["_own"] = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_own"], name) if name in _METADATA else super().__getattr__(name)

    def __len__(self) -> int:
        return len(self.__dict__["_own"])


class _Tracer(fx.Tracer):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace_asserts = True
        self.named: dict[str, nn.Module] = {}
        self._owners = find_owners(model)
        self._calls: list[str] = [""]
        self._counts: dict[str, int] = {}
        self._values: list[tuple[fx.Node, weakref.ref[Any]]] = []
        self._own: dict[int, _OwnValue] = {}
        self._made: list[fx.Node] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = _Value(node, self)
        self._values.append((node, weakref.ref(value)))
        return value

    def held(self) -> list[fx.Node]:
        """Values that outlive the forward: something keeps them, an attribute or a list in a closure."""
        if any(ref() is not None for _, ref in self._values):
            gc.collect()
        return [node for node, ref in self._values if ref() is not None and node.op.startswith("call")]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[STACK] = tuple(self._calls)
        self._made.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            node = self.create_node("get_attr", "tensor", (), {})
            node.meta[TENSOR_OF] = a
            return node
        if isinstance(a, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return a
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """What a forward gets for ``self.weight``: a name, so that what it computes from it is seen."""
        if not isinstance(attr_val, Tensor) or issubclass(type(attr_val), fx.Proxy):
            return attr_val
        if id(attr_val) not in self._own:
            self._own[id(attr_val)] = _OwnValue(self.create_arg(attr_val), self, attr_val)
        return self._own[id(attr_val)]

    def path_of_module(self, mod: nn.Module) -> str:
        paths = self._owners.paths(mod)
        if not paths:
            raise NameError(f"{type(mod).__name__} is made in the forward")
        return paths[0]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        home = type(m).__module__
        plain = home.startswith("torch.nn.modules.") and home not in _CONTAINERS and "forward" not in vars(m)
        return plain and not hooks_of(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.path_of_module(m)
        count = self._counts.get(path, 0)
        self._counts[path] = count + 1
        self.named[path] = m
        self._calls.append(f"{path}@{count}" if count else path)
        mark = len(self._made)
        state = dict(vars(m))
        try:
            if self.is_leaf_module(m, path):
                return self.create_proxy("call_module", path, args, kwargs)
            try:
                return forward(*args, **kwargs)
            except Exception:  # noqa: BLE001  # as in trace: then it is one operation that nobody looks into
                stashed = self._stashed()
                self._take_back(mark)
                vars(m).clear()
                vars(m).update(state)
                whole = self.create_proxy("call_module", path, args, kwargs)
                whole.node.meta[STASHED] = [node for node in stashed if node in set(self._made)]
                return whole
        finally:
            self._calls.pop()

    def _stashed(self) -> list[fx.Node]:
        """Values that lie on the model at this moment: what nobody looks into may read them there."""
        found: list[Any] = list(find_owners(self._owners.root).tensors.values())
        return [value.node for value in found if type(value) is _Value]

    def _take_back(self, mark: int) -> None:
        for node in reversed(self._made[mark:]):
            if node.op != "get_attr":  # the tracer hands out parameters again
                self.graph.erase_node(node)
        self._made[mark:] = [node for node in self._made[mark:] if node.op == "get_attr"]


class _EagerReads(TorchFunctionMode):
    """Tensors of the model that its forward computes with before any input comes in: constants, in the graph."""

    def __init__(self, key_of: KeyOf) -> None:
        self.found: list[tuple[str, int]] = []
        self._key_of = key_of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        name = getattr(func, "__name__", str(func))
        asks = name in _METADATA or (name == "__get__" and not isinstance(out, Tensor))
        if not asks and not any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
            keys = {self._key_of(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
            self.found += [(name, key) for key in keys if key is not None]
        return out


def _signature(model: nn.Module) -> tuple[list[str], dict[str, Any]]:
    """The names of the inputs, and the defaults of what needs none."""
    parameters = inspect.signature(model.forward).parameters.values()
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in starred]
    return required, {p.name: p.default for p in parameters if p.default is not p.empty}


def _first_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, fx.proxy.TraceError) or "Proxy" in text:
        return f"its forward decides on its input, or computes with its size ({one_line(error, 120)})"
    return one_line(error, 160)


# ----------------------------------------------------------------------- what is no operation at all


def _asks(node: fx.Node) -> bool:
    """Whether this reads the size or the type of a tensor, and none of its numbers."""
    if node.op == "call_method":
        return node.target in _METADATA
    return node.op == "call_function" and node.target is builtins.getattr and node.args[1] in _METADATA


def _metadata(graph: fx.Graph) -> set[fx.Node]:
    """Sizes and types of tensors, and what Python computes from these alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        python = node.op == "call_function" and getattr(node.target, "__module__", "") in (
            operator.__name__, "_operator", "builtins", math.__name__,
        )  # fmt: skip
        inputs = node.all_input_nodes
        if _asks(node) or (python and inputs and all(n in found for n in inputs)):
            found.add(node)
    return found


def _note_ranks(graph: fx.Graph) -> None:
    """``assert x.ndim == 4`` in a forward: then it has."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not torch._assert:
            continue
        claim = node.args[0] if node.args else node.kwargs.get("condition")
        if not isinstance(claim, fx.Node) or claim.target is not operator.eq:
            continue
        asked, rank = claim.args
        if isinstance(asked, fx.Node) and isinstance(rank, int) and _asks(asked):
            which = asked.target if asked.op == "call_method" else asked.args[1]
            if which in ("ndim", "dim", "ndimension") and isinstance(asked.args[0], fx.Node):
                asked.args[0].meta[RANK] = rank


def _drop_checks(graph: fx.Graph) -> None:
    """Assertions, and what is asked for them alone."""
    checks = (torch._assert, getattr(fx._symbolic_trace, "_assert_is_none", None))
    asked = _metadata(graph)
    for node in reversed(list(graph.nodes)):
        check = node.op == "call_function" and node.target in checks
        if not node.users and (check or node in asked or _is_default(node)):
            graph.erase_node(node)


def _is_default(node: fx.Node) -> bool:
    """A comparison with the default of an argument, which the tracer writes down, or such an argument itself."""
    if node.op == "call_function" and node.target is operator.eq:
        return all(n.op == "placeholder" for n in node.all_input_nodes)
    return node.op == "get_attr"
