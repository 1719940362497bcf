"""Norms made from settings, and put where another norm stood: hooks, mode and what forward code may ask stay."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from bnfix.graph.facts import _is_norm
from bnfix.graph.owners import Owners

MAX_CHANNELS = 1 << 24
"""Of a norm that a recipe may ask for."""
_BARE = vars(nn.Module())
_OF_MODULES = frozenset({"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})
_OF_BATCH_NORMS = frozenset({"momentum", "track_running_stats", "process_group"})


class FrozenBatchNorm(nn.Module):
    """A batch norm in evaluation mode, whatever mode the model is in; nothing in it is a parameter.

    Of any rank, (N, C, *positions). Its output is that of ``nn.BatchNorm`` in evaluation mode to the bit, and its
    ``state_dict`` has the names of torchvision's ``FrozenBatchNorm2d``: ``num_batches_tracked`` is not among
    them, and is passed over where it is loaded.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.affine = num_features, eps, affine
        one = torch.ones(num_features, device=device, dtype=dtype)
        self.register_buffer("weight", one if affine else None)
        self.register_buffer("bias", torch.zeros_like(one) if affine else None)
        self.register_buffer("running_mean", torch.zeros_like(one))
        self.register_buffer("running_var", torch.ones_like(one))

    def forward(self, x: Tensor) -> Tensor:
        """(x − running_mean)/√(running_var + eps)·weight + bias."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Settings, as torch's norms show them."""
        return f"{self.num_features}, eps={self.eps}" + ("" if self.affine else ", affine=False")


_CLASSES: Mapping[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.BatchNorm1d,
        nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.RMSNorm, FrozenBatchNorm,
    )
}  # fmt: skip
"""The norms that a recipe may name."""


def build_norm(spec: Mapping[str, Any], like: Tensor) -> nn.Module:
    """The norm of ``spec``, ``{"class": "GroupNorm", "args": {"num_groups": 8, …}}``, placed and typed as ``like``.

    A spec may come from a file: nothing in it is believed. No random number is drawn.

    Raises:
        ValueError: it names no norm, or settings that this norm has not.
    """
    cls, args = _CLASSES.get(str(spec.get("class"))), spec.get("args")
    if cls is None or not isinstance(args, Mapping):
        raise ValueError(f"no norm is called {spec.get('class')!r}")
    known = inspect.signature(cls).parameters.keys() - {"device", "dtype", "process_group"}
    for name, value in args.items():
        listed = isinstance(value, list)
        plain = all(type(v) is int and v > 0 for v in value) if listed else isinstance(value, (int, float))
        size = math.prod(value) if listed and plain else value
        if name not in known or not (plain or (value is None and name == "momentum")):
            raise ValueError(f"{spec['class']} has no setting {name}={value!r}")
        if isinstance(size, int) and not 0 <= size <= MAX_CHANNELS:
            raise ValueError(f"{spec['class']}: {name}={value!r}")
    dtype = like.dtype if like.is_floating_point() else None
    try:
        return cls(**args, device=like.device, dtype=dtype)
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{spec['class']}: {error}") from error


def describe_norm(norm: nn.Module) -> str:
    """A norm for a reader: ``GroupNorm(8, 64, eps=1e-05)``; what is as usual is left out."""
    said = [str(norm.num_groups)] if isinstance(norm, nn.GroupNorm) else []
    shape = getattr(norm, "normalized_shape", None)
    channels = getattr(norm, "num_channels", getattr(norm, "num_features", shape and shape[0]))
    mean, eps = getattr(norm, "running_mean", None), getattr(norm, "eps", None)
    if not isinstance(channels, int) and isinstance(mean, Tensor):
        channels = mean.numel()
    said += [str(channels)] if isinstance(channels, int) else []
    said += [f"eps={eps:g}"] if isinstance(eps, float) else []
    said += ["affine=False"] if getattr(norm, "affine", True) is False else []
    statless = isinstance(norm, _BatchNorm) and norm.running_mean is None
    said += ["track_running_stats=False"] if statless else []
    return f"{type(norm).__name__}({', '.join(said)})"


def norm_modules(owners: Owners) -> list[nn.Module]:
    """Every layer of the batch norm family: torch's classes (instance norms too), and whatever has such statistics."""
    return [m for m in owners.modules.values() if isinstance(m, _NormBase) or _is_norm(m)]


def type_of(norm: nn.Module, fallback: Tensor) -> Tensor:
    """A tensor with the dtype and device that a norm in the place of ``norm`` has; ``fallback`` if it has none."""
    own = (*norm._parameters.values(), *norm._buffers.values())
    return next((t for t in own if t is not None and t.is_floating_point()), fallback)


def stand_in(norm: nn.Module, new: nn.Module, after: Sequence[str] = ()) -> nn.Module:
    """``new`` as it stands where ``norm`` was: with its mode, its hooks and its other attributes.

    ``after`` are the submodules of ``norm`` that it runs behind the normalization (a fused activation). They stay,
    under their own names, in a plain ``nn.Sequential`` with ``new`` in front, called ``norm``. Hook tables are taken
    over as the same objects, so that handles that the user has go on working. ``norm`` is not changed.
    """
    new.training = norm.training
    outer = new
    if after:
        name = inner_name(after)
        outer = nn.Sequential(OrderedDict([(name, new), *((a, norm.get_submodule(a)) for a in after)]))
        outer.training = norm.training
    for key, value in vars(norm).items():
        if key in _BARE and key not in _OF_MODULES:
            vars(outer)[key] = _rebound(value, outer) if key == "_load_state_dict_pre_hooks" else value
        elif key not in vars(outer) and key not in _OF_MODULES | _OF_BATCH_NORMS:
            vars(outer)[key] = value
    return outer


def inner_name(after: Sequence[str]) -> str:
    """What the norm is called in front of the submodules ``after``."""
    return "norm" if "norm" not in after else "norm_"


def _rebound(hooks: Any, module: nn.Module) -> Any:
    """Load hooks hold on to the module that they were registered on, weakly: here they are those of ``module``."""
    if not any(getattr(h, "with_module", False) for h in hooks.values()):
        return hooks
    made = type(hooks)()
    for key, hook in hooks.items():
        bound = getattr(hook, "with_module", False)
        made[key] = type(hook)(hook.hook, module) if bound else hook
    return made
