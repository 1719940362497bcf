"""Faults in how a finished model is used: its inputs, its mode, its type, its export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.recall.faults import Case, fault, natural, seen_as, some, stored
from benchmarks.recall.healthy import Healthy, norms
from benchmarks.recall.in_values import LAYERS
from benchmarks.recall.nets import Arch, NormAct, dataset, fit, loader
from benchmarks.recall.tasks import Segment, View, same
from torch import Tensor, nn

TOGETHER = 8
"""Samples that are asked for together where what a model answers depends on it."""


# --------------------------------------------------------------------------------------- inputs


def unscaled(arch: Arch, what: str) -> View:
    """Standardised inputs as they come where the normalisation, or a part of it, was forgotten."""
    mean, std = arch.scale.mean, arch.scale.std
    views: dict[str, View] = {
        "std": lambda x: x * std,
        "mean and std": lambda x: x * std + mean,
        "and not to [0, 1]": lambda x: 255 * (x * std + mean),
    }
    return views[what]


@fault("input normalisation forgotten", "BN204", doses=("std", "mean and std", "and not to [0, 1]"))
def not_normalised(net: Healthy, what: str) -> Case:
    """Trained on standardised inputs."""
    return seen_as(net, unscaled(net.arch, what))


@fault("contrast", "BN204", doses=(0.5, 0.2, -1))
def contrast(net: Healthy, factor: float) -> Case:
    """Another camera; at last the negative."""
    return seen_as(net, lambda x: factor * x)


@fault("brightness", "BN204", doses=(0.5, 1.5, 4))
def brightness(net: Healthy, shift: float) -> Case:
    """An offset, in standard deviations."""
    return seen_as(net, lambda x: x + shift)


@fault("another resolution", "BN204", doses=(1.25, 1.5, 2))
def resolution(net: Healthy, factor: float) -> Case | None:
    """Larger images than in training."""
    if not net.arch.spatial or isinstance(net.arch.task, Segment):
        return None
    mode = "linear" if net.arch.split[0].dim() == 3 else "bilinear"
    return seen_as(net, lambda x: F.interpolate(x, scale_factor=factor, mode=mode))


# -------------------------------------------------------------------------- what it is made into


@fault("16 bits", "BN107", doses=("float16", "bfloat16", "bfloat16 in training"))
def half(net: Healthy, how: str) -> Case:
    """All of the model, statistics included; at last while it trains on with a momentum of .01."""
    dtype = torch.float16 if how == "float16" else torch.bfloat16
    model = net.model().to(dtype)
    if how.endswith("in training"):
        for norm in norms(model):
            norm.reset_running_stats()
            norm.momentum = 0.01
        x, y = net.arch.split[:2]
        fit(net.arch, model, loader(net.arch, dataset(net.arch, x.to(dtype), y)), lr=1e-5, steps=60)
    score = net.arch.score(model, view=lambda x: x.to(dtype))
    return Case(model, score, net.score, loader(net.arch), natural(net.arch))


@fault("no running statistics", "BN104", doses=LAYERS)
def untracked(net: Healthy, share: float) -> Case:
    """The popular remedy, ``track_running_stats=False``; answers come in groups of eight."""
    model = net.model()
    for norm in some(norms(model), share):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return stored(net, model, batch=TOGETHER)


class OnBatch(nn.Module):
    """A functional call whose ``training=True`` was left in."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.act = norm.act if isinstance(norm, NormAct) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        return self.act(y)


def replaced(model: nn.Module, norm: nn.Module, make: Callable[[Any], nn.Module]) -> None:
    """Put another module in the place of a norm."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is norm:
                setattr(parent, name, make(norm))


@fault("functional call left in training mode", "BN104", doses=LAYERS)
def functional(net: Healthy, share: float) -> Case:
    """``F.batch_norm(..., training=True)``; answers come in groups of eight."""
    model = net.model()
    for norm in some(norms(model), share):
        replaced(model, norm, OnBatch)
    return stored(net, model.eval(), batch=TOGETHER)


@fault("exported in training mode", "BN501", doses=(32, 8, 2))
def exported(net: Healthy, together: int) -> Case:
    """A program asked for so many answers at a time."""
    model = net.model().train()
    score = net.arch.score(net.model().train(), batch=together)
    example = net.arch.split[0][:together].clone()
    return Case(torch.export.export(model, (example,), strict=False), score, net.score)


# --------------------------------------------------------------------------------------- the end


@fault("single-sample tail", "BN302", doses=(64, 32, 16))
def tail(net: Healthy, batch: int) -> Case:
    """The last batch of an epoch is one sample: training stops there, or statistics take it in."""
    x, y = net.arch.split[:2]
    count = len(x) // batch * batch + 1
    if count > len(x):
        count -= batch
    data = loader(net.arch, dataset(net.arch, x[:count], y[:count]), batch=batch, drop_last=False)
    model = net.model().train()
    try:
        with torch.no_grad():
            for _ in range(3 if net.arch.siamese else 1):
                model(x[count - 1 : count])
    except ValueError:  # expected more than 1 value per channel: there is no model then
        return Case(net.model(), 0.0, net.score, data, natural(net.arch))
    return Case(model.eval(), net.arch.score(model, view=same), net.score, data, natural(net.arch))
