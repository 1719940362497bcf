"""Small models that a fold must get right or leave alone: what has been seen to go wrong in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import torch
import torch.nn.functional as F
from nets import lived_in
from torch import Tensor, nn

Pattern = tuple[Callable[[], nn.Module], tuple[int, ...]]


class _NormAcrossLength(nn.Module):
    """BatchNorm1d on (N, L, C) normalises L, and here L = C."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x))  # type: ignore[no-any-return]


class _MixedPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3).half(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x.half()))  # type: ignore[no-any-return]


class _TwoOnTwo(nn.Module):
    """Two convolutions in a row, each with its norm, the second one registered in between: only the order differs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))  # type: ignore[no-any-return]


def _bn_act() -> nn.Module:
    from timm.layers import BatchNormAct2d

    return nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4))


def _without_variance() -> nn.Module:
    model = lived_in(nets.conv_bn())
    model.get_submodule("1").running_var[::2] = 0.0  # type: ignore[index, operator]
    return model


def _hooked() -> nn.Module:
    model = lived_in(nets.conv_bn())
    model.get_submodule("0").register_forward_hook(lambda module, args, out: out * 2)
    return model


def _seen() -> nn.Module:
    model = lived_in(nets.conv_bn())
    model.get_submodule("1").register_forward_pre_hook(lambda module, args: (args[0].clamp(max=0.1),))
    return model


IMAGE, MAP = (1, 3, 8, 8), (1, 4, 8, 8)
PATTERNS: dict[str, Pattern] = {
    "conv with two consumers": (nets.TwoConsumers, IMAGE),
    "conv output is also an output": (nets.ConvIsOutput, IMAGE),
    "conv shared by two norms": (nets.SharedConv, IMAGE),
    "tied weights": (nets.TiedWeights, IMAGE),
    "weight read elsewhere": (nets.WeightReadElsewhere, IMAGE),
    "conv + BN called twice": (nets.CalledTwice, MAP),
    "one BN on a conv and on a ReLU": (nets.NormOnConvAndRelu, MAP),
    "registration order ≠ call order": (nets.RegisteredBackwards, IMAGE),
    "convs first, norms after them": (_TwoOnTwo, IMAGE),
    "BN on (N, L, C), L = C": (_NormAcrossLength, (2, 4, 4)),
    "grouped ConvTranspose": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)),
        MAP,
    ),
    "depthwise ConvTranspose": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
        MAP,
    ),
    "BatchNormAct2d (its activation)": (_bn_act, IMAGE),
    "subclass with an activation": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nets.NormWithActivation(4)), IMAGE),
    "conv → BN → BN": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), IMAGE),
    "affine=False": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), IMAGE),
    "no running statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
    ),
    "F.batch_norm": (nets.Functional, IMAGE),
    "F.batch_norm(training=True)": (lambda: nets.Functional(training=True), IMAGE),
    "fp16 conv, fp32 BN": (_MixedPrecision, IMAGE),
    "eps .1": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.1)), IMAGE),
    "variance 0": (_without_variance, IMAGE),
    "hook that doubles, on the conv": (_hooked, IMAGE),
    "hook that clamps, before the BN": (_seen, IMAGE),
    "control flow on values": (nets.DataDependent, IMAGE),
}
"""By name: how to build it, and the shape of its input."""


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]:
    """The model with statistics that mean something, what it is folded with, and what it is judged by."""
    torch.manual_seed(0)
    make, shape = PATTERNS[name]
    model = make()
    special = any(isinstance(b, Tensor) and (b == 0).any() for n, b in model.named_buffers() if n.endswith("var"))
    model = model.eval() if special else lived_in(model)
    return model, (torch.randn(shape),), (torch.randn(shape) * 1.5,)
