"""Models whose statistics are not those of a fresh norm (mean 0, variance 1 would hide every error)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in eval mode, every batch norm with its own means, variances, scales and shifts."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.copy_(draw(module.running_mean, -0.3, 0.3))
                module.running_var.copy_(draw(module.running_var, 0.5, 2.0))
                if module.affine:
                    module.weight.copy_(draw(module.weight, 0.6, 1.4))
                    module.bias.copy_(draw(module.bias, -0.2, 0.2))
    return model.eval()


def small(channels: int = 8, classes: int = 5, seed: int = 0) -> nn.Sequential:
    """conv → BN → relu → conv → BN → relu → mean → linear."""
    torch.manual_seed(seed)
    return perturbed(
        nn.Sequential(
            nn.Conv2d(3, channels, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, classes),
        ),
        seed,
    )  # type: ignore[return-value]


class Named(nn.Module):
    """Several inputs (one unused), nested outputs under names, integers among them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.first = nn.BatchNorm2d(3)
        self.head = nn.Linear(8, 4)
        perturbed(self)

    def forward(self, x: Tensor, unused: Tensor | None = None, mask: Tensor | None = None, flag: bool = True):
        y = self.drop(self.bn(self.conv(self.first(x).relu())))
        z = y.mean((2, 3))
        if mask is not None:
            z = z * mask
        logits = self.head(z)
        return {"logits": logits, "feat": (y,), "top": logits.argmax(1)}


class FrozenBatch(nn.Module):
    """The forward writes the batch down as a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, -1) * 1.5


def folded(conv: nn.Conv2d | nn.Linear, bn: nn.modules.batchnorm._BatchNorm) -> nn.Module:
    """``conv`` with ``bn`` in it: in float64, rounded once."""
    factor = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    shift = bn.bias.double() - bn.running_mean.double() * factor
    like = conv.weight
    torch.manual_seed(0)
    new = (
        type(conv)(conv.in_channels, conv.out_channels, conv.kernel_size)
        if isinstance(conv, nn.Conv2d)
        else type(conv)(conv.in_features, conv.out_features)
    )
    with torch.no_grad():
        new.to(like.dtype)
        new.weight.copy_((like.double() * factor.reshape(-1, *[1] * (like.dim() - 1))).to(like.dtype))
        bias = conv.bias.double() * factor if conv.bias is not None else 0.0
        new.bias.copy_((bias + shift).to(like.dtype))
    return new.eval()


def isclose(a: float, b: float, rel: float) -> bool:
    return math.isclose(a, b, rel_tol=rel)
