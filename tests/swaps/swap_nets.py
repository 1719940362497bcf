"""Models whose norms are to be swapped, data for them, and what a calibrated swap has to come to, the plain way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from nets import lived_in
from torch import Tensor, nn


def batches(*shape: int, count: int = 4, seed: int = 1, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Any:
    """``count`` batches of samples with a mean and a contrast of their own, as images have."""
    g = torch.Generator().manual_seed(seed)
    each = (shape[0], *(1,) * (len(shape) - 1))
    found = []
    for _ in range(count):
        x = torch.randn(shape, generator=g) * torch.exp(0.4 * torch.randn(each, generator=g))
        found.append(((x + torch.randn(each, generator=g)) * scale).to(dtype))
    return found


def fitted(model: nn.Module, data: list[Tensor], norms: int = 20) -> nn.Module:
    """``model`` with the statistics of its inputs and an affine as training leaves it, in eval mode."""
    lived_in(model, norms)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        for x in data:
            model(x)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.1
    return model.eval()


class Small(nn.Module):
    """Three norms, one of them in a residual branch; registered against the order of the calls."""

    def __init__(self, channels: int = 16, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.head = nn.Linear(channels, 5)
        self.bn3, self.bn2, self.bn1 = norm(channels), norm(channels), norm(channels)
        self.c1, self.c2 = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)
        self.c3 = nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.c1(x)))
        x = F.relu(x + self.bn2(self.c2(x)))
        return self.head(F.relu(self.bn3(self.c3(x))).mean((2, 3)))


class Head(nn.Module):
    """A convolution with its norm, and a norm on vectors."""

    def __init__(self, features: int = 32) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.fc, self.top = nn.Linear(16, features), nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3))))


class Ghost(nn.BatchNorm2d):
    """In training each half of the batch by itself."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return torch.cat([super(Ghost, self).forward(half) for half in x.chunk(2)])
        return super().forward(x)


class Noisy(nn.BatchNorm2d):
    """Adds noise in training, which no run in evaluation mode shows."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class Activated(nn.BatchNorm2d):
    """Runs a submodule of its own behind the normalization, with a parameter."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Renamed(nn.BatchNorm2d):
    """A subclass that does nothing else."""


class AlwaysFrozen(nn.BatchNorm2d):
    """Never in training mode, whatever the model is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class OwnArithmetic(nn.Module):
    """A norm written out by hand, which learns."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / torch.sqrt(var + self.eps).view(shape)
        return x * self.weight.view(shape) + self.bias.view(shape)


def affine_by_hand(y: Tensor, z: Tensor, init: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """γ', β', Σ cov²/var z and Σ var y by channel, as the formulas say; float64."""
    axes = [0, *range(2, y.dim())]
    y, z = y.double(), z.double()
    my, mz = y.mean(axes, keepdim=True), z.mean(axes, keepdim=True)
    vy, vz, cov = ((y - my) ** 2).mean(axes), ((z - mz) ** 2).mean(axes), ((y - my) * (z - mz)).mean(axes)
    scale = cov / vz if init == "ls" else cov.sign() * (vy / vz).sqrt()
    return scale, my.flatten() - scale * mz.flatten(), (cov**2 / vz).sum(), vy.sum()


def swapped_by_hand(model: nn.Module, order: list[str], x: Tensor, groups: int, init: str = "moment") -> nn.Module:
    """A copy of ``model`` with GroupNorms, each fitted on all of ``x`` with a forward a layer; no code of bnfix."""
    old, new = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    for path in order:
        before = new.get_submodule(path)
        norm = nn.GroupNorm(groups, before.num_features, before.eps, dtype=before.weight.dtype)
        parent, _, name = path.rpartition(".")
        setattr(new.get_submodule(parent), name, norm)
        seen: dict[str, Tensor] = {}
        hooks = [
            old.get_submodule(path).register_forward_hook(lambda _m, _i, out, s=seen: s.setdefault("y", out.clone())),
            norm.register_forward_pre_hook(lambda _m, args, s=seen: s.update(x=args[0].clone())),
        ]
        with torch.no_grad():
            old(x)
            new(x)
            z = F.group_norm(seen["x"].double(), groups, eps=norm.eps)
            scale, shift, _, _ = affine_by_hand(seen["y"], z, init)
            norm.weight.copy_(scale)
            norm.bias.copy_(shift)
        for hook in hooks:
            hook.remove()
    return new
