"""A plain convolution or linear layer from the settings of one call: for a layer whose weight has been computed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.graph.owners import find_owners
from bnfix.graph.surgery import Surgeon, all_or_nothing
from bnfix.types import Op

_CLASSES: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "conv_transpose": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
_SETTINGS = ("stride", "padding", "output_padding", "dilation")
_MODES = ("zeros", "reflect", "replicate", "circular")
MAX_NUMBERS = 1 << 31
"""Of a weight that a recipe may ask for."""


def settings_of(op: Op, weight: Tensor) -> dict[str, Any]:
    """What rebuilds the layer that ``op`` is a call of, with a weight like ``weight``: plain data, JSON can hold it."""
    found: dict[str, Any] = {"kind": op.kind, "shape": list(weight.shape), "bias": _has_bias(op)}
    if op.kind != "linear":
        rank = weight.dim() - 2
        found.update({name: _per_axis(op.attrs[name], rank) for name in _SETTINGS if name in op.attrs})
        found["groups"] = int(op.attrs.get("groups", 1))
        if op.kind == "conv":
            found.pop("output_padding", None)
    return found


def build(settings: Mapping[str, Any], weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer of these settings with these very tensors; a parameter stays the same object.

    Raises:
        ValueError: the settings are none of a layer, or the tensors do not fit them.
    """
    layer = _empty(settings)
    if tuple(weight.shape) != tuple(layer.get_parameter("weight").shape) or (bias is None) != (layer.bias is None):
        raise ValueError(f"a weight of {tuple(weight.shape)} does not fit {settings}")
    layer.weight = _as_parameter(weight)
    if bias is not None:
        layer.bias = _as_parameter(bias)
    return layer


def rebuild(model: nn.Module, entries: Iterable[Mapping[str, Any]]) -> None:
    """Put plain layers where ``model``, freshly built, computes weights in its forward. In place, all or nothing.

    The numbers come from the state_dict that is loaded afterwards; type and device are those of what stood there.
    The entries come from a file: nothing in them is believed.

    Raises:
        KeyError: the model has no module of a name in the entries, or has them under different names.
        ValueError: settings that no layer has.
    """
    owners = find_owners(model)
    with all_or_nothing(Surgeon()) as surgeon:
        for entry in entries:
            modules = [owners.module_at(path) for path in entry["module"]]
            before = modules[0] if modules else None
            if before is None or any(m is not before for m in modules) or before is model:
                raise KeyError(", ".join(map(str, entry["module"])))
            like = next((p for p in (*before.parameters(), *before.buffers()) if p.is_floating_point()), torch.empty(0))
            shape, bias = _shape(entry["settings"]), None
            with torch.no_grad():
                weight = torch.zeros(shape, dtype=like.dtype, device=like.device)
                if entry["settings"].get("bias"):
                    channels = _empty(entry["settings"]).get_parameter("bias").shape
                    bias = torch.zeros(channels, dtype=like.dtype, device=like.device)
            layer = build(entry["settings"], weight, bias)
            layer.requires_grad_(any(p.requires_grad for p in before.parameters()))
            layer.training = before.training
            for slot in owners.module_slots[id(before)]:
                surgeon.put(slot, layer)


def _empty(settings: Mapping[str, Any]) -> nn.Module:
    """The layer without numbers; nothing is initialised, no random number drawn."""
    shape, kind = _shape(settings), settings.get("kind")
    bias = bool(settings.get("bias"))
    if kind == "linear":
        if len(shape) != 2:
            raise ValueError(f"a linear layer has no weight of {shape}")
        return nn.Linear(shape[1], shape[0], bias=bias, device="meta")
    rank = len(shape) - 2
    if kind not in _CLASSES or not 1 <= rank <= 3:
        raise ValueError(f"no layer is called {kind!r} and has a weight of {shape}")
    groups = settings.get("groups", 1)
    options = {name: _checked(name, settings[name], rank) for name in _SETTINGS if name in settings}
    mode = settings.get("padding_mode", "zeros")
    if type(groups) is not int or groups < 1 or mode not in _MODES:
        raise ValueError(f"groups {groups!r}, padding_mode {mode!r}")
    cls: Any = _CLASSES[kind][rank - 1]
    inputs, outputs = (shape[1] * groups, shape[0]) if kind == "conv" else (shape[0], shape[1] * groups)
    layer: nn.Module = cls(
        inputs, outputs, shape[2:], groups=groups, bias=bias, padding_mode=mode, device="meta", **options
    )
    return layer


def _shape(settings: Mapping[str, Any]) -> tuple[int, ...]:
    shape = settings.get("shape")
    if not isinstance(shape, (list, tuple)) or not all(type(n) is int and n > 0 for n in shape) or len(shape) > 5:
        raise ValueError(f"no weight has the shape {shape!r}")
    numbers = 1
    for n in shape:
        numbers *= n
    if numbers > MAX_NUMBERS:
        raise ValueError(f"a weight of {numbers} numbers is not believed")
    return tuple(shape)


def _checked(name: str, value: Any, rank: int) -> Any:
    if name == "padding" and value in ("same", "valid"):
        return value
    if not isinstance(value, (list, tuple)) or len(value) != rank or not all(type(n) is int for n in value):
        raise ValueError(f"{name} {value!r} is none of {rank} axes")
    least = 1 if name in ("stride", "dilation") else 0
    if not all(least <= n < 1 << 24 for n in value):
        raise ValueError(f"{name} {value!r} is out of range")
    return tuple(value)


def _per_axis(value: Any, rank: int) -> Any:
    if isinstance(value, str):
        return value
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * rank if len(values) == 1 else values


def _has_bias(op: Op) -> bool:
    return "bias" in op.tensors or "bias" in op.reads


def _as_parameter(value: Tensor) -> nn.Parameter:
    if isinstance(value, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=False)
