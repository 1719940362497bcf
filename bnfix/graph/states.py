"""The norms of a module tree as they stand: flags, and stored values widened to float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfix.graph.facts import _is_norm, _own
from bnfix.graph.owners import find_owners
from bnfix.types import NormState


def norm_states(model: nn.Module) -> tuple[NormState, ...]:
    """Every layer of the batch norm family in ``model``, aliases under one state, in the order of the module tree.

    Reads only; nothing is run. Layers that are not initialised yet (lazy ones) have no values.
    """
    owners = find_owners(model)
    return tuple(
        _state(module, owners.paths(module), model)
        for module in owners.modules.values()
        if isinstance(module, _NormBase) or _is_norm(module)
    )


def _state(module: Any, paths: tuple[str, ...], root: nn.Module) -> NormState:
    values = {role: _own(module, role) for role in ("running_mean", "running_var", "weight", "bias")}
    mean, var, weight, bias = (_array(values[role]) for role in ("running_mean", "running_var", "weight", "bias"))
    tracked = _own(module, "num_batches_tracked")
    own = [p for p in module._parameters.values() if p is not None]
    features = getattr(module, "num_features", None)
    stats = values["running_var"]
    base = isinstance(module, _NormBase)
    momentum = getattr(module, "momentum", None)
    return NormState(
        path=paths[0] if paths else "",
        paths=paths or ("",),
        cls=type(module).__name__,
        channels=int(features) if isinstance(features, int) else len(var) if var is not None else 0,
        mean=mean,
        var=var,
        weight=weight,
        bias=bias,
        tracked=int(tracked) if isinstance(tracked, Tensor) and tracked.device.type != "meta" else None,
        dtype=str(stats.dtype).removeprefix("torch.") if isinstance(stats, Tensor) else None,
        eps=_number(getattr(module, "eps", None)),
        momentum=_number(momentum),
        cumulative=base and momentum is None,
        tracks=bool(module.track_running_stats) if base else None,
        training=module.training,
        root_training=root.training,
        trainable=any(p.requires_grad for p in own) if own else None,
        instance=isinstance(module, _InstanceNorm),
        frozen_class=not base,
        ignore=_codes(getattr(module, "bnfix_ignore", ())),
    )


def _array(value: Any) -> Any:
    usable = isinstance(value, Tensor) and not torch.nn.parameter.is_lazy(value) and value.device.type != "meta"
    return value.detach().double().cpu().flatten().numpy() if usable else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _codes(value: Any) -> frozenset[str]:
    return frozenset([value] if isinstance(value, str) else value)
