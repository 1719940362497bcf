"""Models for tests of ``recalibrate``, and an oracle that shares no code with it: hooks, all inputs kept, float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FIBERS = "fibers" if sys.version_info >= (3, 11) else "threads"
"""How forwards park where nothing keeps them from it."""

Forward = Callable[[nn.Module, Any], Any]


class Distance(NamedTuple):
    """How far running statistics are from what the norms see, the worst over layers and channels."""

    mean: float
    var: float


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` that keep running statistics, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(getattr(m, "running_var", None), Tensor)}


def norm_inputs(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> dict[str, Tensor]:
    """What each norm module sees over plain eval forwards: float64, (C, values), several calls one after the other.

    Modes are put back. Norms that no forward reaches have no entry.
    """
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, args: kept.setdefault(name, []).append(args[0].double().transpose(0, 1).flatten(1))

    hooks = [m.register_forward_pre_hook(keep(name)) for name, m in norms(model).items()]
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                forward(model, batch) if forward else model(batch)
    finally:
        for m, training in modes:
            m.training = training
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts, dim=1) for name, parts in kept.items()}


def distances(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> dict[str, Distance]:
    """Of each norm: the worst |mean − running mean|/σ and |variance/running variance − 1|, unbiased, over channels.

    Channels without spread (variance below 1e-12 or the rounding of the mean) count with their absolute distance.
    """
    found = {}
    for name, x in norm_inputs(model, batches, forward).items():
        norm: Any = norms(model)[name]
        mean, var = norm.running_mean.double(), norm.running_var.double()
        flat = var <= torch.clamp((2.0**-23 * mean) ** 2, min=1e-12)
        off_mean = (x.mean(1) - mean).abs() / torch.where(flat, 1.0, var).sqrt()
        off_var = torch.where(flat, (x.var(1) - var).abs(), (x.var(1) / torch.where(flat, 1.0, var) - 1).abs())
        found[name] = Distance(off_mean.max().item(), off_var.max().item())
    return found


def residual(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> Distance:
    """The worst of ``distances`` over the layers: 0 at the fixed point of the data."""
    found = distances(model, batches, forward).values()
    return Distance(max(d.mean for d in found), max(d.var for d in found))


def rounding_ratio(model: nn.Module) -> float:
    """The largest |running mean|/σ: float32 activations are only as exact as 6e-8 times this, in units of σ."""
    ratios = [
        (n.running_mean.double().abs() / n.running_var.double().clamp(min=1e-12).sqrt()).max().item()
        for n in norms(model).values()
    ]
    return max(ratios, default=0.0)


def batched(x: Tensor, size: int) -> list[Tensor]:
    """``x`` in batches of ``size``; the last may be smaller."""
    return list(x.split(size))


def standardised(n: int, channels: int = 1, seed: int = 97) -> Tensor:
    """(n, channels) values with mean 0 and biased variance 1, in every channel, up to float32 rounding.

    The seed is not the one that tests start from: a dropout mask drawn from the same numbers is not independent.
    """
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((x - x.mean(0)) / x.std(0, unbiased=False)).float()


class Residual(nn.Module):
    """Convolution, norm, dropout, convolution, norm, and the input on top: a block of a wide ResNet."""

    def __init__(self, inp: int, out: int, stride: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.dropout = nn.Dropout(dropout)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.down = (
            nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or inp != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.dropout(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(y + self.down(x))


class DigitsResNet(nn.Sequential):
    """A ResNet18 for images of 8 px, with dropout in front of norms; the last ones see one pixel an image."""

    def __init__(self, width: int = 32, dropout: float = 0.3, classes: int = 10) -> None:
        blocks: list[nn.Module] = []
        inp = width
        for stage in range(4):
            for first in (True, False):
                out = width * 2**stage
                blocks.append(Residual(inp, out, 2 if first and stage else 1, dropout))
                inp = out
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inp, classes),
        )


class TwoSites(nn.Module):
    """One norm on the input and on the input moved by ``apart``: what matters is the pool of both."""

    def __init__(self, channels: int = 2, apart: float = 10.0) -> None:
        super().__init__()
        self.bn, self.apart = nn.BatchNorm1d(channels), apart

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(x), self.bn(x + self.apart)


class Unreached(nn.Module):
    """Two norms; only one is called."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.bn, self.spare = nn.BatchNorm1d(channels), nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)


class TwoInputs(nn.Module):
    """A model of an image and a vector, with a norm for each and one for both together."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn_image = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.lin, self.bn_vector = nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.bn_both = nn.BatchNorm1d(4)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        a = self.bn_image(self.conv(image)).mean((2, 3))
        return self.bn_both(a * self.bn_vector(self.lin(vector)))


def pairs(n: int, size: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of images (size, 3, 6, 6) and vectors (size, 5), n in all."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 6, 6, generator=generator) * 2 + 1
    vectors = torch.randn(n, 5, generator=generator) - 3
    return list(zip(images.split(size), vectors.split(size), strict=True))


def running(model: nn.Module) -> Sequence[tuple[Tensor, Tensor]]:
    """Running mean and variance of each norm, in order of registration."""
    return [(n.running_mean, n.running_var) for n in norms(model).values()]
