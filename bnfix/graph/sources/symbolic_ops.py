"""The graph of ``torch.fx`` as operations: a layer by the settings of its module, a function by its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfix.errors import TraceError
from bnfix.graph.sources.layout import KINDS, TENSOR, KeyOf, Layout, operation, site_of
from bnfix.types import Op

STACK, TENSOR_OF, RANK, STASHED = "bnfix_stack", "bnfix_tensor", "bnfix_rank", "bnfix_stashed"
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
}
_DEFAULTS = {
    "stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1, "training": False,
    "use_input_stats": True, "momentum": 0.1, "eps": 1e-5, "weight": None, "bias": None, "running_mean": None,
    "running_var": None,
}  # fmt: skip
_PER_AXIS = ("stride", "padding", "output_padding", "dilation")
_RANKS = {nn.BatchNorm2d._check_input_dim: 4, nn.BatchNorm3d._check_input_dim: 5}
_FUNCTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear, F.batch_norm,
    F.instance_norm, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d,
}  # fmt: skip


class Lowering:
    """Lays a graph out as one flat list. ``named`` holds the modules that were called, by path."""

    def __init__(self, key_of: KeyOf, named: Mapping[str, nn.Module]) -> None:
        self._layout = Layout(key_of)
        self._named = named
        self._env: dict[fx.Node, Any] = {}

    def run(
        self, graph: fx.Graph, metadata: set[fx.Node], eager: Iterable[tuple[str, int]], held: Iterable[fx.Node]
    ) -> tuple[Op, ...]:
        """All operations in order. ``metadata`` are nodes that read no numbers, ``eager`` (function, key) that read a
        tensor of the model before any input comes in, ``held`` the values that something keeps.

        Raises:
            TraceError: an operation reads what was thrown away.
        """
        for name, key in eager:
            self._other(name, (), {"#0": key})
        for node in graph.nodes:
            if node in metadata:
                self._env[node] = ()
            elif node.op == "output":
                for kept in held:
                    if isinstance(self._env.get(kept), int):
                        self._other("something that keeps it beyond the forward", kept.meta[STACK], {}, (kept,))
                return self._layout.finish(self._resolve(node.args[0]))
            else:
                self._env[node] = self._value(node)
        raise TraceError("the graph of the model has no output")

    def _value(self, node: fx.Node) -> Any:
        stack = node.meta.get(STACK, ("",))
        if node.op == "placeholder":
            return self._layout.add(kind="input", target=str(node.target), site=site_of(()))
        if node.op == "get_attr":
            return self._resolve(node.meta[TENSOR_OF])
        if node.op == "call_module":
            return self._module(node, self._named[str(node.target)], stack)
        target: Any = node.target
        if node.op == "call_function" and target in _FUNCTIONS:
            arguments = _bound(target.__name__, node.args, node.kwargs)
            if arguments is not None:
                return self._layer(target.__name__, arguments, node, stack)
        arguments = _arguments(target, node)
        if target is F.dropout and arguments.get("training") is False:
            return self._resolve(arguments["input"])
        name = str(getattr(target, "__name__", target))
        in_place = arguments.get("inplace") is True and not name.endswith("_")
        fields = operation(name, name, arguments, self._resolve, (fx.Node, Tensor), stack)
        # Not the name that the operation has in ATen: without shapes nobody can follow what it does.
        called = f"{node.op.removeprefix('call_')} {name}{'_' if in_place else ''}"
        return self._layout.add(**{**fields, "kind": "other", "target": called})

    # ------------------------------------------------------------------------------- modules

    def _module(self, node: fx.Node, module: nn.Module, stack: tuple[str, ...]) -> Any:
        plain = len(node.args) == 1 and not node.kwargs and type(module).__module__.startswith("torch.nn.modules.")
        if plain and (isinstance(module, nn.Identity) or (isinstance(module, _DropoutNd) and not module.training)):
            return self._resolve(node.args[0])
        source = node.args[0] if plain else None
        if isinstance(module, _ConvNd) and plain:
            return self._conv(node, module, source, stack)
        if type(module) is nn.Linear and plain:
            settings = {"input": source, "weight": module.weight, "bias": module.bias}
            return self._layer("linear", settings, node, stack)
        if isinstance(module, (_BatchNorm, _InstanceNorm)) and plain:
            return self._norm(node, module, source, stack)
        return self._opaque(node, module, stack)

    def _conv(self, node: fx.Node, module: _ConvNd, source: Any, stack: tuple[str, ...]) -> int:
        names = _TRANSPOSED if isinstance(module, _ConvTransposeNd) else _CONV
        settings = {name: getattr(module, name) for name in names[1:]}
        settings["input"] = source
        rank = len(module.kernel_size)
        if isinstance(module, _ConvTransposeNd):
            return self._layer(f"conv_transpose{rank}d", settings, node, stack)
        if module.padding_mode != "zeros":
            pad = tuple(module._reversed_padding_repeated_twice)
            given = {"self": source, "pad": pad, "mode": module.padding_mode}
            fields = {**operation("", "", given, self._resolve, (fx.Node,), stack), "target": "function pad"}
            settings["input"], settings["padding"] = _Known(self._layout.add(**fields)), (0,) * rank
        return self._layer(f"conv{rank}d", settings, node, stack)

    def _norm(self, node: fx.Node, module: Any, source: Any, stack: tuple[str, ...]) -> int:
        settings = {name: getattr(module, name) for name in ("running_mean", "running_var", "weight", "bias", "eps")}
        settings.update(input=source, momentum=module.momentum)
        if isinstance(module, _InstanceNorm):
            settings["use_input_stats"] = module.training or not module.track_running_stats
            return self._layer("instance_norm", settings, node, stack)
        has_none = module.running_mean is None and module.running_var is None
        settings["training"] = module.training or has_none
        if module.training and not module.track_running_stats:
            settings["running_mean"] = settings["running_var"] = None
        return self._layer("batch_norm", settings, node, stack, _RANKS.get(type(module)._check_input_dim))

    def _layer(
        self, name: str, arguments: Mapping[str, Any], node: fx.Node, stack: tuple[str, ...], rank: int | None = None
    ) -> int:
        given = dict(arguments)
        axes = int(name[-2]) if name.startswith("conv") else 0
        for setting in _PER_AXIS:
            if axes and isinstance(given.get(setting), int):
                given[setting] = (given[setting],) * axes
        overload = "padding" if isinstance(given.get("padding"), str) else "default"
        overload = "input" if "transpose" in name else overload
        fields = operation(name, name, given, self._resolve, (fx.Node, Tensor, _Known), stack)
        if fields["kind"] == "norm":
            source = given["input"]
            rank = rank or (source.meta.get(RANK) if isinstance(source, fx.Node) else None)
            if rank is not None:
                fields["attrs"]["rank"] = rank
            mean = given["running_mean"]
            mean = mean.meta.get(TENSOR_OF) if isinstance(mean, fx.Node) else mean
            if isinstance(mean, Tensor):
                fields["attrs"]["channels"] = mean.numel()
        return self._layout.add(**{**fields, "target": f"aten.{name}.{overload}"})

    def _opaque(self, node: fx.Node, module: nn.Module, stack: tuple[str, ...]) -> int:
        """A module that nobody looks into: it reads what it is given, and every tensor that it has."""
        name = type(module).__name__ + ("_" if getattr(module, "inplace", False) is True else "")
        tensors: dict[str, int] = {}
        for path, tensor in (*module.named_parameters(), *module.named_buffers()):
            key = self._layout.key_of(tensor)
            if key is not None:
                tensors[path] = key
        return self._other(name, stack, tensors, (node.args, node.kwargs, node.meta.get(STASHED, ())))

    def _other(self, name: str, stack: tuple[str, ...], tensors: Mapping[str, int], arguments: Any = ()) -> int:
        named = {f"#{i}": a for i, a in enumerate(arguments)}
        fields = operation(name, "", named, self._resolve, (fx.Node, tuple, list, dict), stack)
        fields.update(target=name, kind="other", tensors={**tensors, **fields["tensors"]})
        return self._layout.add(**fields)

    # -------------------------------------------------------------------------------- values

    def _resolve(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value not in self._env:
                raise TraceError(f"the model reads {value}, which a failed part of its forward made")
            return self._env[value]
        if isinstance(value, _Known):
            return value.index
        if isinstance(value, Tensor):
            key = self._layout.key_of(value)
            return (TENSOR, key) if key is not None else self._constant()
        if isinstance(value, (tuple, list)):
            return [self._resolve(v) for v in value]
        if isinstance(value, dict):
            return [self._resolve(v) for v in value.values()]
        if isinstance(value, slice):
            return [self._resolve(v) for v in (value.start, value.stop, value.step)]
        return None

    def _constant(self) -> int:
        return self._layout.add(kind="constant", target="constant", site=site_of(()))


class _Known:
    """An operation that is laid out already, as an argument."""

    def __init__(self, index: int) -> None:
        self.index = index


def _bound(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a layer's function by name, defaults filled in; None where a setting is computed."""
    names = _ARGUMENTS[name]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if len(args) > len(names) or set(given) - set(names):
        return None
    filled = {n: given.get(n, _DEFAULTS.get(n)) for n in names}
    tensors = ("input", "weight", "bias", "running_mean", "running_var")
    if any(isinstance(leaf, fx.Node) for n, v in filled.items() if n not in tensors for leaf in _leaves(v)):
        return None
    assert name in KINDS
    return filled


def _leaves(value: Any) -> Iterable[Any]:
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, (tuple, list)) else [value]


def _arguments(target: Any, node: fx.Node) -> dict[str, Any]:
    """By the names of a Python function's signature, by position otherwise."""
    if node.op == "call_function":
        try:
            bound = inspect.signature(target).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):  # a built-in without a signature
            pass
        else:
            bound.apply_defaults()
            return dict(bound.arguments)
    return {**{f"#{i}": a for i, a in enumerate(node.args)}, **node.kwargs}
