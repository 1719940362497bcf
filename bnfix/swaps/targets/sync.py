"""SyncBatchNorm: statistics of the whole batch of all processes, in training."""

from __future__ import annotations

from typing import Any

from torch import nn

from bnfix.swaps.site import Site
from bnfix.swaps.target import Spec, Target

FROZEN = "it is frozen by its class: in its place a norm that learns would start to"


def settings_of(norm: nn.Module, channels: int, eps: float) -> dict[str, Any]:
    """What a batch norm is built with, ``track_running_stats`` by the buffers that are there."""
    weight, bias = (norm._parameters.get(name, norm._buffers.get(name)) for name in ("weight", "bias"))
    return {
        "num_features": channels,
        "eps": eps,
        "momentum": getattr(norm, "momentum", 0.1),
        "affine": weight is not None,
        "track_running_stats": norm._buffers.get("running_var") is not None,
        **({"bias": False} if weight is not None and bias is None else {}),  # torch 2.11 and newer have it
    }


class Sync(Target):
    """``to="sync"``: the same tensors, in a class whose processes share their statistics."""

    name = "sync"
    calibrated = False
    keeps_parameters = True

    def specs(self, site: Site, groups: int | None) -> list[Spec] | str:
        """The one, unless the norm is frozen."""
        if site.frozen:
            return FROZEN
        return [{"class": "SyncBatchNorm", "args": settings_of(site.module, site.channels, site.eps)}]

    def already(self, site: Site) -> bool:
        """A SyncBatchNorm."""
        return isinstance(site.module, nn.SyncBatchNorm)
