"""What the sources of facts share: how one ATen call becomes one :class:`~bnfix.types.Op`, whoever saw it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bnfix.types import CallSite, Op

KeyOf = Callable[[Tensor], "int | None"]

# The argument names that matter, by kind; torch's own schemas supply the rest.
KINDS: dict[str, str] = {
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
_STATE = ("weight", "bias", "running_mean", "running_var")

# What an argument stands for: an int (index of an operation), (TENSOR, key) for one of the model's own tensors, or a
# tuple/list of such.
TENSOR = "tensor"


@dataclass
class Layout:
    """The flat list of operations under construction."""

    key_of: KeyOf
    ops: list[Op] = field(default_factory=list)

    def add(self, **fields: Any) -> int:
        """Append an operation; returns its index."""
        self.ops.append(Op(index=len(self.ops), **fields))
        return len(self.ops) - 1

    def finish(self, outputs: Any) -> tuple[Op, ...]:
        """The list, closed by what the model returns."""
        returned = {f"output[{i}]": key for i, key in enumerate(keys_in(outputs))}
        self.add(kind="output", target="output", site=CallSite(""), inputs=tuple(ops_in(outputs)), tensors=returned)
        return tuple(self.ops)


def operation(
    target: Any,
    name: str,
    arguments: Mapping[str, Any],
    resolve: Callable[[Any], Any],
    opaque: tuple[type, ...],
    stack: tuple[str, ...],
) -> dict[str, Any]:
    """The fields of one operation but for its shape: kind, tensors, inputs and constants, by argument name.

    ``resolve`` says what an argument stands for; an argument of a type in ``opaque`` is no constant.
    """
    kind = KINDS.get(name, "other")
    if kind == "conv" and arguments.get("transposed") is True:
        kind = "conv_transpose"
    tensors: dict[str, int] = {}
    attrs: dict[str, Any] = {}
    inputs: list[int] = []
    reads: dict[str, int] = {}
    computed: list[str] = []
    for role, argument in arguments.items():
        value = resolve(argument)
        ops = ops_in(value)
        inputs += ops
        if isinstance(value, int):
            reads[role] = value
        if is_tensor(value):
            tensors[role] = value[1]
        elif ops:
            if kind != "other" and role in _STATE:
                computed.append(role)
        else:
            keys = keys_in(value)
            for i, key in enumerate(keys):
                tensors[f"{role}[{i}]"] = key
            absent = argument is None and role in _STATE  # no bias is no setting
            if not keys and not absent and not isinstance(argument, opaque):
                attrs[role] = _constant(argument)
    if kind == "norm":
        attrs["training"] = bool(attrs.pop("use_input_stats", attrs.get("training", attrs.get("train", False))))
    if computed:
        attrs["computed"] = tuple(computed)
    return {
        "kind": kind,
        "target": str(target) if hasattr(target, "_schema") else name,
        "site": site_of(stack),
        "inputs": tuple(inputs),
        "reads": reads,
        "tensors": tensors,
        "attrs": attrs,
        "stack": stack,
    }


def named_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the operator's schema, defaults filled in."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return {**{f"#{i}": a for i, a in enumerate(args)}, **kwargs}
    named: dict[str, Any] = {}
    for i, parameter in enumerate(schema.arguments):
        if i < len(args):
            named[parameter.name] = args[i]
        elif parameter.name in kwargs:
            named[parameter.name] = kwargs[parameter.name]
        elif parameter.has_default_value():
            named[parameter.name] = parameter.default_value
    return named


def name_of(target: Any) -> str:
    """``conv2d`` of ``aten.conv2d.default``, ``wrap_with_autocast`` of a higher-order operator."""
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return str(packet.__name__)
    return str(getattr(target, "__name__", target))


def described(value: Any) -> dict[str, Any]:
    """Shape and type of a tensor as fields of its operation; nothing for what is none."""
    if not isinstance(value, Tensor):
        return {}
    shape = tuple(int(s) if isinstance(s, int) else -1 for s in value.shape)
    return {"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")}


def is_tensor(value: Any) -> bool:
    """Whether this stands for one of the model's own tensors."""
    return isinstance(value, tuple) and len(value) == 2 and value[0] == TENSOR


def ops_in(value: Any) -> list[int]:
    """All operations that a value stands for."""
    if isinstance(value, int):
        return [value]
    if isinstance(value, (tuple, list)) and not is_tensor(value):
        return [i for v in value for i in ops_in(v)]
    return []


def keys_in(value: Any) -> list[int]:
    """All of the model's own tensors that a value stands for."""
    if is_tensor(value):
        return [value[1]]
    if isinstance(value, (tuple, list)):
        return [k for v in value for k in keys_in(v)]
    return []


def site_of(stack: tuple[str, ...]) -> CallSite:
    """The innermost call of a module."""
    if not stack:
        return CallSite("")
    path, at, number = stack[-1].rpartition("@")
    return CallSite(path, int(number)) if at else CallSite(stack[-1])


def _constant(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return tuple(_constant(a) for a in argument)
    return argument if isinstance(argument, (str, int, float, bool, type(None))) else str(argument)
