"""What in a model makes its output depend on more than its input: training mode, and statistics of the batch."""

from __future__ import annotations

import inspect
from types import FunctionType

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from bnfix.types import Refusal

NOT_FORWARD = {"__init__", "train", "eval", "extra_repr"}


def training_modules(model: nn.Module) -> tuple[Refusal, ...]:
    """Modules in training mode that behave differently there: norms, dropout, classes whose code reads ``training``.

    A wrapper that is in training mode by itself and never looks is not named: its output does not depend on it.
    """
    return tuple(
        Refusal(path or "(root)", f"{type(module).__name__} in training mode")
        for path, module in model.named_modules()
        if module.training and _cares(module)
    )


def norms_without_statistics(model: nn.Module) -> tuple[Refusal, ...]:
    """Batch norms that have no running statistics: in eval mode too they use those of the batch at hand."""
    return tuple(
        Refusal(
            path or "(root)",
            f"{type(module).__name__} without running statistics (track_running_stats=False): "
            "each output depends on the other samples of its batch",
        )
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    )


def _cares(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, _InstanceNorm):
        return bool(module.track_running_stats)
    if isinstance(module, _NormBase):
        return True
    return any(
        "training" in function.__code__.co_names
        for base in type(module).__mro__
        if base not in (nn.Module, object)
        for name, member in vars(base).items()
        if name not in NOT_FORWARD and isinstance(function := inspect.unwrap(member), FunctionType)
    )
