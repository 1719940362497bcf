"""Calls of ``aten.conv2d`` and its like, with weights fetched by name, turned into calls of real layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

_CONVS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED: dict[int, type[nn.Module]] = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}
_NORMS: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_CONV_CALLS = {f"conv{d}d" for d in (1, 2, 3)}
_TRANSPOSED_CALLS = {f"conv_transpose{d}d" for d in (1, 2, 3)}
_STATELESS_NORM = "_native_batch_norm_legit_no_training"  # gives the output and two tensors for the backward
_COUNTER = "num_batches_tracked"


@dataclass
class Relayered:
    """What was done: under which new name a tensor lies that had another one in the program."""

    renamed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layer:
    """A layer that a call could be: how to build it, and the tensors that it holds by the names it has for them."""

    build: Callable[[], nn.Module]
    settings: tuple[Any, ...]
    tensors: Mapping[str, str]
    """Role → path; a role that the call leaves out is not in it."""
    roles: tuple[str, ...]
    input: str = "input"
    """What the call names that which the layer is called with."""


def relayer(module: fx.GraphModule) -> Relayered:
    """Change ``module`` in place: calls with fetched weights become calls of layers that hold them.

    Several calls with one weight become several calls of one layer if they do the same; else they stay as they are.
    """
    done = Relayered()
    groups: dict[str, list[tuple[fx.Node, _Layer]]] = {}
    for node in module.graph.nodes:
        layer = _layer(module, node)
        if layer is not None:
            groups.setdefault(layer.tensors[layer.roles[0]], []).append((node, layer))
    claimed: set[str] = set()
    for calls in groups.values():
        layer = calls[0][1]
        wanted = set(layer.tensors.values())
        same = all((c.settings, c.tensors, c.input) == (layer.settings, layer.tensors, layer.input) for _, c in calls)
        if not same or wanted & claimed or len(wanted) < len(layer.tensors):
            continue
        claimed |= wanted
        path = _install(module, layer, calls[0][0].name, done)
        for node, _ in calls:
            _call(module, node, path, layer.input)
    module.graph.eliminate_dead_code(is_impure_node=_stays)
    return done


def _stays(node: fx.Node) -> bool:
    turned = getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in ("permute", "t")
    return bool(node.users) or not (node.op == "get_attr" or turned)


def _layer(module: fx.GraphModule, node: fx.Node) -> _Layer | None:
    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet is None or getattr(node.target, "namespace", "") != "aten":
        return None
    arguments = _arguments(node)
    name = packet.__name__
    if name in _CONV_CALLS:
        return _conv(module, arguments, transposed=False)
    if name in _TRANSPOSED_CALLS:
        return _conv(module, arguments, transposed=True)
    if name == "convolution":
        return _conv(module, arguments, transposed=bool(arguments.get("transposed")))
    if name == "linear":
        return _linear(module, arguments)
    if name in ("addmm", "mm"):
        return _linear_taken_apart(module, arguments, name)
    if name == "batch_norm" or name == _STATELESS_NORM:
        return _norm(module, node, arguments)
    return None


def _arguments(node: fx.Node) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for i, parameter in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if i < len(node.args):
            named[parameter.name] = node.args[i]
        elif parameter.name in node.kwargs:
            named[parameter.name] = node.kwargs[parameter.name]
        elif parameter.has_default_value():
            named[parameter.name] = parameter.default_value
    return named


def _fetched(module: nn.Module, arguments: Mapping[str, Any], roles: tuple[str, ...]) -> dict[str, str] | None:
    """Role → path of the tensors that a call fetches; None where one is something else, a computed weight say."""
    found: dict[str, str] = {}
    for role in roles:
        value = arguments.get(role)
        if value is None:
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr" or not isinstance(_at(module, value), Tensor):
            return None
        found[role] = str(value.target)
    return found


def _at(module: nn.Module, node: fx.Node) -> Any:
    value: Any = module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def _tensor(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    assert isinstance(value, Tensor)
    return value


def _rank(argument: Any) -> int | None:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def _plain(value: Any) -> bool:
    """Whether a setting is a number, a word, or a list of numbers: not computed in the graph."""
    if isinstance(value, (list, tuple)):
        return all(_plain(v) for v in value)
    return isinstance(value, (int, float, str, bool)) and not isinstance(value, fx.Node)


def _conv(module: nn.Module, arguments: dict[str, Any], *, transposed: bool) -> _Layer | None:
    tensors = _fetched(module, arguments, ("weight", "bias"))
    if tensors is None or "weight" not in tensors:
        return None
    weight = _tensor(module, tensors["weight"])
    dims = weight.dim() - 2
    kind = (_TRANSPOSED if transposed else _CONVS).get(weight.dim())
    if kind is None or _rank(arguments["input"]) != weight.dim():
        return None
    names = ["stride", "padding", "dilation", "groups"] + (["output_padding"] if transposed else [])
    if not all(_plain(arguments.get(n)) for n in names):
        return None
    settings: dict[str, Any] = {n: _each(arguments[n], dims) for n in names if n != "groups"}
    groups = int(arguments["groups"])
    inner, outer = weight.shape[1] * groups, weight.shape[0]
    if transposed:
        inner, outer = weight.shape[0], weight.shape[1] * groups
    size = tuple(weight.shape[2:])

    def build() -> nn.Module:
        with torch.device("meta"):
            return kind(inner, outer, size, groups=groups, bias="bias" in tensors, **settings)

    return _Layer(build, (kind, groups, tuple(settings.items())), tensors, ("weight", "bias"))


def _each(value: Any, dims: int) -> Any:
    """A setting for each dimension; the words of ``padding`` as they are."""
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * dims if len(values) == 1 else values


def _linear(module: nn.Module, arguments: dict[str, Any]) -> _Layer | None:
    tensors = _fetched(module, arguments, ("weight", "bias"))
    if tensors is None or "weight" not in tensors or _tensor(module, tensors["weight"]).dim() != 2:
        return None
    outer, inner = _tensor(module, tensors["weight"]).shape

    def build() -> nn.Module:
        return nn.Linear(inner, outer, bias="bias" in tensors, device="meta")

    return _Layer(build, (nn.Linear,), tensors, ("weight", "bias"))


def _linear_taken_apart(module: nn.Module, arguments: dict[str, Any], name: str) -> _Layer | None:
    """``bias + input @ weight.T``, which torch's decompositions make of a linear layer."""
    turned = arguments["mat2"]
    how = getattr(getattr(turned, "target", None), "overloadpacket", None)
    if getattr(how, "__name__", "") not in ("permute", "t") or not isinstance(turned, fx.Node):
        return None
    if how.__name__ == "permute" and list(turned.args[1]) not in ([1, 0], [-1, -2]):  # type: ignore[union-attr, arg-type]
        return None
    given = {"weight": turned.args[0], "bias": arguments["self"] if name == "addmm" else None}
    if arguments.get("beta", 1) != 1 or arguments.get("alpha", 1) != 1:
        return None
    layer = _linear(module, given)
    if layer is None or ("bias" in layer.tensors and _tensor(module, layer.tensors["bias"]).dim() != 1):
        return None
    return replace(layer, input="mat1" if name == "addmm" else "self")


def _norm(module: nn.Module, node: fx.Node, arguments: dict[str, Any]) -> _Layer | None:
    roles = ("running_mean", "running_var", "weight", "bias")
    tensors = _fetched(module, arguments, roles)
    kind = _NORMS.get(_rank(arguments["input"]) or 0)
    if tensors is None or kind is None or not {"running_mean", "running_var"} <= tensors.keys():
        return None
    if arguments.get("training", False) is not False:
        return None  # it normalizes by its batch, and whoever runs it counts on that
    if _name(node) == _STATELESS_NORM and not all(_first(user) for user in node.users):
        return None
    eps, momentum = arguments["eps"], arguments["momentum"]
    if not _plain(eps) or not _plain(momentum):
        return None
    channels = _tensor(module, tensors["running_mean"]).numel()

    def build() -> nn.Module:
        return kind(channels, eps=eps, momentum=momentum, device="meta")

    return _Layer(build, (kind, eps, momentum, _name(node)), tensors, roles)


def _name(node: fx.Node) -> str:
    return str(node.target.overloadpacket.__name__)  # type: ignore[union-attr]


def _first(user: fx.Node) -> bool:
    return getattr(user.target, "__name__", "") == "getitem" and bool(user.args[1] == 0)


# ---------------------------------------------------------------------------------------- changes


def _install(module: fx.GraphModule, layer: _Layer, name: str, done: Relayered) -> str:
    """Put the layer into the tree, under the name of its weights if these have the names that the layer gives them."""
    owners = {path.rpartition(".")[0] for path in layer.tensors.values()}
    path = next(iter(owners))
    made = layer.build()
    for table in (made._parameters, made._buffers):
        table.clear()
    if len(owners) == 1 and path and _fits(module.get_submodule(path), layer):
        _replace(module, path, made)
    else:
        path = _beside(module, layer, made, name, done)
    for role in (*layer.roles, *([_COUNTER] if "running_mean" in layer.roles else [])):
        if getattr(made, role, None) is None:
            (made.register_buffer if role == _COUNTER else made.register_parameter)(role, None)
    return path


def _fits(owner: nn.Module, layer: _Layer) -> bool:
    if type(owner) is not nn.Module:
        return False
    if any(path.rpartition(".")[2] != role for role, path in layer.tensors.items()):
        return False
    return all(getattr(owner, role, None) is None for role in layer.roles if role not in layer.tensors)


def _replace(module: nn.Module, path: str, made: nn.Module) -> None:
    owner = module.get_submodule(path)
    made._parameters.update(owner._parameters)
    made._buffers.update(owner._buffers)
    made._non_persistent_buffers_set |= owner._non_persistent_buffers_set
    made._modules.update(owner._modules)
    own = vars(nn.Module())
    for key, value in vars(owner).items():
        if key not in own:
            vars(made)[key] = value
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if child is owner:
                parent._modules[key] = made


def _beside(module: fx.GraphModule, layer: _Layer, made: nn.Module, name: str, done: Relayered) -> str:
    """Put the layer beside its weights, and these into it; whoever else fetches them finds them there."""
    home = layer.tensors[layer.roles[0]].rpartition(".")[0]
    parent = module.get_submodule(home)
    while hasattr(parent, name):
        name += "_"
    path = f"{home}.{name}" if home else name
    parent.add_module(name, made)
    for role, old in layer.tensors.items():
        owner_path, _, key = old.rpartition(".")
        owner = module.get_submodule(owner_path)
        if key in owner._parameters:
            made.register_parameter(role, owner._parameters.pop(key))
        elif key in owner._buffers:
            lasting = key not in owner._non_persistent_buffers_set
            made.register_buffer(role, owner._buffers.pop(key), persistent=lasting)
            owner._non_persistent_buffers_set.discard(key)
        else:
            vars(made)[role] = vars(owner).pop(key)
        done.renamed[f"{path}.{role}"] = old
        for node in module.graph.nodes:
            if node.op == "get_attr" and node.target == old:
                node.target = f"{path}.{role}"
    return path


def _call(module: fx.GraphModule, node: fx.Node, path: str, given: str) -> None:
    graph = module.graph
    with graph.inserting_before(node):
        call = graph.call_module(path, (_arguments(node)[given],))
    call.meta = dict(node.meta)
    if _name(node) == _STATELESS_NORM:
        for user in list(node.users):
            user.replace_all_uses_with(call)
            graph.erase_node(user)
    else:
        node.replace_all_uses_with(call)
    graph.erase_node(node)
