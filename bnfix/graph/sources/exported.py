"""Facts from ``torch.export``: however it was written, a convolution is ``aten.conv*`` and a norm ``aten.batch_norm``.

The graph of a forward and of every subgraph in it (``autocast`` and ``no_grad`` inside a forward put
theirs in one of their own) is laid out as one flat list of operations.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfix.errors import TraceError, one_line
from bnfix.graph.sources.layout import (
    TENSOR,
    KeyOf,
    Layout,
    described,
    is_tensor,
    name_of,
    named_arguments,
    operation,
)
from bnfix.types import CallSite, Route

_INLINED = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}  # arguments before the subgraph
_FX_CONFIG, _LINES = getattr(fx, "config", None), "do_not_emit_stack_traces"


class _Root(nn.Module):
    """One level above the model, so that every way of calling it is traced alike."""

    def __init__(self, model: nn.Module, call: Any) -> None:
        super().__init__()
        self.model = model
        self.__dict__["_call"] = call
        self.training = model.training

    def forward(self, args: Any, kwargs: Any) -> Any:
        call: Any = self.__dict__["_call"]
        return replace(call, args=tuple(args), kwargs=kwargs).apply(self.model)


def trace(copy: nn.Module, call: Any, key_of: KeyOf) -> Route:
    """Trace ``copy`` (a private one: export may leave fake tensors on it) on ``call``.

    ``key_of`` gives the key of a parameter, buffer or constant of the copy, None for a tensor that is
    no part of the model.

    Raises:
        TraceError: torch.export refuses; the message holds its first line.
    """
    root = _Root(copy, call)
    call = call.map(lambda t: t.detach().clone())  # export may leave marks on a tensor
    try:
        with torch.no_grad(), quiet_export():
            program = torch.export.export(root, (call.args, dict(call.kwargs)), strict=False)
    except Exception as error:  # export raises whatever torch or the user's forward raises
        raise TraceError(
            f"torch.export can't trace this model on {call.signature}: {one_line(error, 200)}",
            hint=_hint(copy, error),
        ) from error
    layout = Layout(key_of)
    env = _placeholders(program, layout)
    outputs = _lay_out(program.graph_module, env, layout, within=())
    return Route(call.signature, layout.finish(outputs))


# ------------------------------------------------------------------------------ values of nodes
# In ``env`` a node is what :mod:`~bnfix.graph.sources.layout` says an argument stands for.


def _placeholders(program: torch.export.ExportedProgram, layout: Layout) -> dict[fx.Node, Any]:
    state = {**program.state_dict, **program.constants}
    spec = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        target = spec[node.name].target if node.name in spec else None
        tensor = state.get(target) if target is not None else None
        key = layout.key_of(tensor) if isinstance(tensor, Tensor) else None
        if key is not None:
            env[node] = (TENSOR, key)
        else:
            kind = "input" if target is None else "constant"
            env[node] = layout.add(kind=kind, target=node.name, site=CallSite(""), **_meta(node))
    return env


def _lay_out(graph_module: fx.GraphModule, env: dict[fx.Node, Any], layout: Layout, within: tuple[str, ...]) -> Any:
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(graph_module, str(node.target))
            if isinstance(value, Tensor):
                key = layout.key_of(value)
                env[node] = (
                    (TENSOR, key)
                    if key is not None
                    else layout.add(kind="constant", target=str(node.target), site=CallSite(""), **_meta(node))
                )
        elif node.op == "output":
            return _resolve(node.args[0], env)
        elif node.op == "call_function":
            env[node] = _call(graph_module, node, env, layout, within)
    return ()


def _call(
    graph_module: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any], layout: Layout, within: tuple[str, ...]
) -> Any:
    if node.target is operator.getitem:
        source = _resolve(node.args[0], env)
        if isinstance(source, (tuple, list)) and not is_tensor(source) and isinstance(node.args[1], int):
            return source[node.args[1]]
    name = name_of(node.target)
    graphs = [
        (i, _attribute(graph_module, str(a.target)))
        for i, a in enumerate(node.args)
        if isinstance(a, fx.Node) and a.op == "get_attr"
    ]
    graphs = [(i, g) for i, g in graphs if isinstance(g, fx.GraphModule)]
    if name in _INLINED and len(graphs) == 1 and graphs[0][0] == _INLINED[name]:
        place, inner = graphs[0]
        return _inline(inner, [_resolve(a, env) for a in node.args[place + 1 :]], layout, within)
    arguments = named_arguments(node.target, node.args, node.kwargs)
    fields = operation(
        node.target, name, arguments, lambda a: _resolve(a, env), (fx.Node, fx.GraphModule), _stack(node)
    )
    index = layout.add(**fields, within=within, **_meta(node))
    for _, inner in graphs:  # torch.cond and its like: what runs inside is listed, and marked
        operands = [_resolve(a, env) for a in node.args if isinstance(a, (tuple, list))]
        flat = [v for group in operands for v in (group if isinstance(group, (tuple, list)) else [group])]
        _inline(inner, flat, layout, (*within, name))
    return index


def _inline(inner: fx.GraphModule, values: list[Any], layout: Layout, within: tuple[str, ...]) -> Any:
    env: dict[fx.Node, Any] = {}
    places = [n for n in inner.graph.nodes if n.op == "placeholder"]
    for i, place in enumerate(places):
        env[place] = (
            values[i]
            if i < len(values)
            else layout.add(kind="input", target=place.name, site=CallSite(""), **_meta(place))
        )
    return _lay_out(inner, env, layout, within)


def _resolve(argument: Any, env: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return env.get(argument, ())
    if isinstance(argument, (tuple, list)):
        return [_resolve(a, env) for a in argument]
    if isinstance(argument, dict):
        return [_resolve(a, env) for a in argument.values()]
    if isinstance(argument, slice):
        return [_resolve(a, env) for a in (argument.start, argument.stop, argument.step)]
    return None


def _meta(node: fx.Node) -> dict[str, Any]:
    return described(node.meta.get("val"))


def _stack(node: fx.Node) -> tuple[str, ...]:
    """Module calls around the node, as ``path`` or ``path@1``, below the wrapper; the root is ``""``."""
    found = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        path = str(path)
        if path != "model" and not path.startswith("model."):
            continue
        _, at, number = str(key).rpartition("@")
        inner = path.removeprefix("model").removeprefix(".")
        found.append(f"{inner}@{number}" if at and number.isdigit() and number != "0" else inner)
    return tuple(found)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _hint(model: nn.Module, error: BaseException) -> str:
    text = f"{type(error).__name__} {error}"
    if any(word in text for word in ("DataDependent", "data-dependent", "u0", "item()", "numpy")):
        return (
            "the forward depends on the data it is given (`if y.sum() > 0`, `.item()`, numpy); "
            "pass the part of the model without that, or make it depend on shapes only"
        )
    if any(m.training for m in model.modules()):
        return "the model is in training mode: call model.eval() first"
    return "fold the part of the model that can be traced, or say with forward= how it is called and what it returns"


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """torch's exporters without their commentary: nothing is printed, warned or logged inside; errors still are errors.

    Nor do they note the source lines of each node, which takes a third of the time.
    """
    level = logging.root.manager.disable
    lines = getattr(_FX_CONFIG, _LINES, None)  # newer versions of torch have it
    logging.disable(logging.CRITICAL)
    if lines is not None:
        setattr(_FX_CONFIG, _LINES, True)
    silent = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if lines is not None:
            setattr(_FX_CONFIG, _LINES, lines)
