"""An input by what an ONNX file says of its own: the file's sizes and types, the model's parameters."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import PassError
from bnfix.parity.sessions import OnnxModel, Slot, spelling
from bnfix.parity.verify import named_inputs
from bnfix.running import Call
from bnfix.running.guess import accepts

SIZES = (224, 64, 32, 299, 128, 16, 1)
"""Tried, in order, for a size that the file leaves open (other than the batch)."""


def file_call(model: nn.Module, path: str | os.PathLike[str], *, batch: int = 2, seed: int = 0) -> Call | None:
    """Random inputs of the sizes and types that the ONNX file at ``path`` takes; None where ``model`` takes none such.

    Fixed sizes are as they are, an open first one is ``batch``; for other open sizes some usual ones are tried.
    Inputs go to forward's parameters by name, those of other names in their order to what is left. The file is opened,
    not run.

    Raises:
        LoadError: ONNX Runtime can't open the file.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    file = OnnxModel(path)
    places = _places(model, file.inputs)
    if places is None:
        return None
    open_sizes = any(s is None for slot in file.inputs for s in (slot.shape or ())[1:])
    if any(slot.shape is None for slot in file.inputs):
        return None
    for size in SIZES if open_sizes else SIZES[:1]:
        generator = torch.Generator().manual_seed(seed)
        values = {name: _drawn(slot, model, batch, size, file.inputs, generator) for name, slot in places.items()}
        call = _call(model, values)
        if accepts(model, call) is None and _fits(file, model, call):
            return call
    return None


def _places(model: nn.Module, slots: Sequence[Slot]) -> dict[str, Slot] | None:
    """The file's inputs by the parameter of forward that each goes to; None where there are not enough of them."""
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p for p in inspect.signature(model.forward).parameters.values() if p.kind in named]
    found = {p.name: s for p in parameters for s in slots if spelling(s.name) == p.name}
    rest = [s for s in slots if s not in found.values()]
    free = [p.name for p in parameters if p.name not in found]
    if len(rest) > len(free):
        return None
    found.update(zip(free, rest, strict=False))
    return found


def _call(model: nn.Module, values: dict[str, Tensor]) -> Call:
    """By position as long as no parameter is left out, by name behind."""
    args: list[Tensor] = []
    kwargs: dict[str, Any] = {}
    for i, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.name not in values:
            continue
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and len(args) == i:
            args.append(values[parameter.name])
        else:
            kwargs[parameter.name] = values[parameter.name]
    return Call(tuple(args), kwargs)


def _drawn(
    slot: Slot, model: nn.Module, batch: int, size: int, slots: Sequence[Slot], generator: torch.Generator
) -> Tensor:
    """Standard normal floats that the file's type holds exactly, integers 0 and 1, masks of ones."""
    batches = {s.dims[0] for s in slots if s.dims and s.dims[0]}
    shape = [
        s if s is not None else batch if axis == 0 or slot.dims[axis] in batches else size
        for axis, s in enumerate(slot.shape or ())
    ]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty((), dtype=slot.dtype))
    if slot.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(slot.dtype).to(like.device, like.dtype)
    if slot.dtype == torch.bool or "mask" in slot.name:
        return torch.ones(shape, dtype=slot.dtype, device=like.device)
    return torch.randint(0, 2, shape, generator=generator).to(like.device, slot.dtype)


def _fits(file: OnnxModel, model: nn.Module, call: Call) -> bool:
    try:
        named = named_inputs(model, call)
        return not file.misfit(named, file.order(named))
    except PassError:
        return False
