"""The norms of a module tree as they stand: flags, and stored values widened to float64."""

from __future__ import annotations

import inspect
from types import FunctionType
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

    Reads only; nothing is run. Layers that are not initialised yet (lazy ones) or lie on ``meta`` have no values.
    ``paths`` are the names under which modules hold it; those in lists and objects of the user's only where there are
    no others: they are no places in the model.
    """
    owners = find_owners(model)
    states = []
    for module in owners.modules.values():
        if isinstance(module, _NormBase) or _is_norm(module):
            paths = owners.paths(module)
            registered = tuple(dict.fromkeys(p for p in paths if _is_registered(model, p)))
            states.append(_state(module, registered or paths, model))
    return tuple(states)


def _is_registered(root: nn.Module, path: str) -> bool:
    """Whether ``path`` leads from module to module by registered names alone."""
    module: Any = root
    for name in path.split(".") if path else ():
        module = dict(module._modules.items()).get(name)  # of a ScriptModule it is a mapping without ``get``
        if module is None:
            return False
    return True


def _state(module: Any, paths: tuple[str, ...], root: nn.Module) -> NormState:
    mean, var = (_array(_own(module, role)) for role in ("running_mean", "running_var"))
    stats = _own(module, "running_var")
    features = getattr(module, "num_features", None)
    channels = int(features) if isinstance(features, int) else len(var) if var is not None else 0
    weight, bias = (_array(_own(module, role), channels) for role in ("weight", "bias"))
    tracked = _own(module, "num_batches_tracked")
    own = [p for p in module._parameters.values() if p is not None]
    momentum = getattr(module, "momentum", None)
    cls = _class_of(module)
    base = issubclass(cls, _NormBase)
    return NormState(
        path=paths[0] if paths else "",
        paths=paths or ("",),
        cls=cls.__name__,
        channels=channels,
        mean=mean,
        var=var,
        weight=weight,
        bias=bias,
        tracked=int(tracked) if isinstance(tracked, Tensor) and _has_values(tracked) else None,
        dtype=str(stats.dtype).removeprefix("torch.") if isinstance(stats, Tensor) else None,
        eps=_number(getattr(module, "eps", None)),
        momentum=_number(momentum),
        cumulative=base and momentum is None,
        tracks=bool(module.track_running_stats) if base else None,
        training=module.training,
        root_training=root.training,
        trainable=any(p.requires_grad for p in own) if own else None,
        instance=issubclass(cls, _InstanceNorm),
        frozen_class=not base and _never_learns(cls),
        ignore=_codes(getattr(module, "bnfix_ignore", ())),
    )


def _class_of(module: nn.Module) -> type:
    """The class; of a scripted layer of torch's the one that it was scripted from."""
    name = getattr(module, "original_name", None) if isinstance(module, torch.jit.ScriptModule) else None
    found = getattr(nn, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) else type(module)


def _never_learns(cls: type) -> bool:
    """Whether a class that is no norm of torch's normalises with its statistics and never updates them.

    The frozen norms of torchvision, timm and detectron2 are written in arithmetic or say so in their name; a class
    whose code calls ``batch_norm`` may update what it is given.
    """
    if "frozen" in cls.__name__.lower():
        return True
    functions = [inspect.unwrap(f) for c in cls.__mro__ if c not in (nn.Module, object) for f in vars(c).values()
                 if isinstance(f, FunctionType)]  # fmt: skip
    return not any("batch_norm" in name for f in functions for name in getattr(f, "__code__", _NO_CODE).co_names)


_NO_CODE = (lambda: None).__code__


def _has_values(tensor: Tensor) -> bool:
    return not torch.nn.parameter.is_lazy(tensor) and tensor.device.type != "meta" and not tensor.is_sparse


def _array(value: Any, size: int | None = None) -> Any:
    """``value`` as float64; None where it is none, has no values, or has not one number for each of ``size`` channels.

    A class that convolves and normalises in one has a ``weight`` that is no scale.
    """
    if not isinstance(value, Tensor) or not _has_values(value) or (size is not None and value.numel() != size):
        return None
    return value.detach().double().cpu().flatten().numpy()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _codes(value: Any) -> frozenset[str]:
    return frozenset([value] if isinstance(value, str) else value)
