"""Tensors by name, without a model around them, as evidence: what their names and values alone tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnfix.graph.owners import storage_key
from bnfix.types import Evidence, NormState

MEAN, VAR = "running_mean", "running_var"


def of_weights(state: Mapping[str, Any], notes: tuple[str, ...] = ()) -> Evidence:
    """The norms of a state_dict, known by the keys ``*.running_mean`` and ``*.running_var``; nothing is copied or run.

    What a state_dict does not hold (momentum, eps, classes, modes, what feeds what) is None, and the rules that need
    it say so. Norms without running statistics can't be told from other layers there. Two names for the same memory
    are one norm with two paths. ``feeder`` is read off the order of the names: the weight that stands right in front
    of a norm's first tensor, if it has that many output channels.
    """
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    owners = [k.removesuffix(VAR) for k in tensors if k.rpartition(".")[2] == VAR]
    places: dict[Any, list[str]] = {}
    for owner in owners:
        if f"{owner}{MEAN}" in tensors:
            place = storage_key(tensors[f"{owner}{VAR}"]) or owner
            places.setdefault(place, []).append(owner)
    order = list(tensors)
    return Evidence(norms=tuple(_state(tensors, names, order) for names in places.values()), notes=notes)


def _state(tensors: Mapping[str, Tensor], names: list[str], order: list[str]) -> NormState:
    owner = names[0]
    var = tensors[f"{owner}{VAR}"]
    tracked = tensors.get(f"{owner}num_batches_tracked")
    paths = tuple(name.removesuffix(".") for name in names)
    return NormState(
        path=paths[0],
        paths=paths,
        cls="norm",
        channels=var.numel(),
        mean=_array(tensors[f"{owner}{MEAN}"], var.numel()),
        var=_array(var, var.numel()),
        weight=_array(tensors.get(f"{owner}weight"), var.numel()),
        bias=_array(tensors.get(f"{owner}bias"), var.numel()),
        tracked=int(tracked) if tracked is not None and tracked.numel() == 1 and not tracked.is_meta else None,
        dtype=str(var.dtype).removeprefix("torch."),
        module=False,
        feeder=_feeder(tensors, owner, order),
    )


def _feeder(tensors: Mapping[str, Tensor], owner: str, order: list[str]) -> Any:
    first = next(i for i, k in enumerate(order) if k.startswith(owner) and "." not in k.removeprefix(owner))
    before = [k for k in order[max(0, first - 2) : first] if k.rpartition(".")[2] == "weight"]
    weight = tensors[before[-1]] if before else None
    channels = tensors[f"{owner}{VAR}"].numel()
    if weight is None or weight.dim() < 2 or weight.shape[0] != channels or not _readable(weight):
        return None
    return weight.detach().double().flatten(1).norm(dim=1).cpu().numpy()


def _array(tensor: Tensor | None, size: int) -> Any:
    if tensor is None or tensor.numel() != size or not _readable(tensor):
        return None
    return tensor.detach().double().flatten().cpu().numpy()


def _readable(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    return plain and tensor.is_floating_point()
