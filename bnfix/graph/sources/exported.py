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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfix.errors import TraceError, one_line
from bnfix.types import CallSite, Op, Route

KeyOf = Callable[[Tensor], "int | None"]

# The argument names that matter, by kind; torch's own schemas supply the rest.
_KINDS: dict[str, str] = {
    "conv1d": "conv",
    "conv2d": "conv",
    "conv3d": "conv",
    "convolution": "conv",
    "_convolution": "conv",
    "conv_transpose1d": "conv_transpose",
    "conv_transpose2d": "conv_transpose",
    "conv_transpose3d": "conv_transpose",
    "linear": "linear",
    "batch_norm": "norm",
    "native_batch_norm": "norm",
    "cudnn_batch_norm": "norm",
    "_native_batch_norm_legit": "norm",
    "_native_batch_norm_legit_no_training": "norm",
    "_batch_norm_impl_index": "norm",
    "instance_norm": "norm",
}
_INLINED = {"wrap_with_autocast": 4, "wrap_with_set_grad_enabled": 1}  # arguments before the subgraph
_FX_CONFIG, _LINES = getattr(fx, "config", None), "do_not_emit_stack_traces"
_STATE = ("weight", "bias", "running_mean", "running_var")


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


@dataclass
class _Layout:
    """The flat list under construction, and what each node of each graph stands for in it."""

    key_of: KeyOf
    ops: list[Op] = field(default_factory=list)

    def add(self, **fields: Any) -> int:
        self.ops.append(Op(index=len(self.ops), **fields))
        return len(self.ops) - 1


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
    layout = _Layout(key_of)
    env = _placeholders(program, layout)
    outputs = _lay_out(program.graph_module, env, layout, within=())
    returned = {f"output[{i}]": key for i, key in enumerate(_keys_in(outputs))}
    layout.add(kind="output", target="output", site=CallSite(""), inputs=tuple(_ops_in(outputs)), tensors=returned)
    return Route(call.signature, tuple(layout.ops))


# ------------------------------------------------------------------------------ values of nodes
# A node stands for: an int (index of an operation), ("tensor", key), or a tuple/list of such.

TENSOR = "tensor"


def _placeholders(program: torch.export.ExportedProgram, layout: _Layout) -> dict[fx.Node, Any]:
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


def _lay_out(graph_module: fx.GraphModule, env: dict[fx.Node, Any], layout: _Layout, within: tuple[str, ...]) -> Any:
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
    graph_module: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any], layout: _Layout, within: tuple[str, ...]
) -> Any:
    if node.target is operator.getitem:
        source = _resolve(node.args[0], env)
        if isinstance(source, (tuple, list)) and not _is_tensor(source) and isinstance(node.args[1], int):
            return source[node.args[1]]
    name = _name(node.target)
    graphs = [
        (i, _attribute(graph_module, str(a.target)))
        for i, a in enumerate(node.args)
        if isinstance(a, fx.Node) and a.op == "get_attr"
    ]
    graphs = [(i, g) for i, g in graphs if isinstance(g, fx.GraphModule)]
    if name in _INLINED and len(graphs) == 1 and graphs[0][0] == _INLINED[name]:
        place, inner = graphs[0]
        return _inline(inner, [_resolve(a, env) for a in node.args[place + 1 :]], layout, within)
    index = layout.add(**_operation(node, name, env), within=within, **_meta(node))
    for _, inner in graphs:  # torch.cond and its like: what runs inside is listed, and marked
        operands = [_resolve(a, env) for a in node.args if isinstance(a, (tuple, list))]
        flat = [v for group in operands for v in (group if isinstance(group, (tuple, list)) else [group])]
        _inline(inner, flat, layout, (*within, name))
    return index


def _inline(inner: fx.GraphModule, values: list[Any], layout: _Layout, within: tuple[str, ...]) -> Any:
    env: dict[fx.Node, Any] = {}
    places = [n for n in inner.graph.nodes if n.op == "placeholder"]
    for i, place in enumerate(places):
        env[place] = (
            values[i]
            if i < len(values)
            else layout.add(kind="input", target=place.name, site=CallSite(""), **_meta(place))
        )
    return _lay_out(inner, env, layout, within)


def _operation(node: fx.Node, name: str, env: dict[fx.Node, Any]) -> dict[str, Any]:
    """Kind, tensors, inputs and constants of one node, by the argument names of its schema."""
    arguments = _named_arguments(node)
    kind = _KINDS.get(name, "other")
    if kind == "conv" and arguments.get("transposed") is True:
        kind = "conv_transpose"
    tensors: dict[str, int] = {}
    attrs: dict[str, Any] = {}
    inputs: list[int] = []
    reads: dict[str, int] = {}
    computed: list[str] = []
    for role, argument in arguments.items():
        value = _resolve(argument, env)
        ops = _ops_in(value)
        inputs += ops
        if isinstance(value, int):
            reads[role] = value
        if _is_tensor(value):
            tensors[role] = value[1]
        elif ops:
            if kind != "other" and role in _STATE:
                computed.append(role)
        else:
            keys = _keys_in(value)
            for i, key in enumerate(keys):
                tensors[f"{role}[{i}]"] = key
            absent = argument is None and role in _STATE  # no bias is no setting
            if not keys and not absent and not isinstance(argument, (fx.Node, fx.GraphModule)):
                attrs[role] = _constant(argument)
    if kind == "norm":
        attrs["training"] = bool(attrs.pop("use_input_stats", attrs.get("training", attrs.get("train", False))))
    if computed:
        attrs["computed"] = tuple(computed)
    stack = _stack(node)
    return {
        "kind": kind,
        "target": str(node.target) if hasattr(node.target, "_schema") else name,
        "site": _site(stack),
        "inputs": tuple(inputs),
        "reads": reads,
        "tensors": tensors,
        "attrs": attrs,
        "stack": stack,
    }


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{f"#{i}": a for i, a in enumerate(node.args)}, **node.kwargs}
    named: dict[str, Any] = {}
    for i, parameter in enumerate(schema.arguments):
        if i < len(node.args):
            named[parameter.name] = node.args[i]
        elif parameter.name in node.kwargs:
            named[parameter.name] = node.kwargs[parameter.name]
        elif parameter.has_default_value():
            named[parameter.name] = parameter.default_value
    return named


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


def _is_tensor(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] == TENSOR


def _ops_in(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    if isinstance(value, (tuple, list)) and not _is_tensor(value):
        return [i for v in value for i in _ops_in(v)]
    return []


def _keys_in(value: Any) -> list[int]:
    if _is_tensor(value):
        return [value[1]]
    if isinstance(value, (tuple, list)):
        return [k for v in value for k in _keys_in(v)]
    return []


def _constant(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(_constant(a) for a in argument)
    return argument if isinstance(argument, (str, int, float, bool, type(None))) else str(argument)


def _meta(node: fx.Node) -> dict[str, Any]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return {}
    shape = tuple(int(s) if isinstance(s, int) else -1 for s in value.shape)
    return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}


def _name(target: Any) -> str:
    """``conv2d`` of ``aten.conv2d.default``, ``wrap_with_autocast`` of a higher-order operator."""
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return str(packet.__name__)
    return str(getattr(target, "__name__", target))


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


def _site(stack: tuple[str, ...]) -> CallSite:
    if not stack:
        return CallSite("")
    path, at, number = stack[-1].rpartition("@")
    return CallSite(path, int(number)) if at else CallSite(stack[-1])


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
