"""Models that share norms, each in a way of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from nets import lived_in
from torch import Tensor, nn


class Encoder(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.linear, self.bn2 = nn.Linear(4, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.linear(self.bn(self.conv(x)).relu().mean((2, 3))))
        return y


class Triplet(nn.Module):
    """The network of the story: anchor, positive and negative one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Encoder()
        self.calls = 3

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.net(x) for x in xs[: self.calls])


class PyramidHead(nn.Module):
    """A head of RetinaNet's kind: the same tower over every level."""

    def __init__(self, levels: int = 4) -> None:
        super().__init__()
        self.levels = levels
        self.tower = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.score = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [F.max_pool2d(x, 2**i) for i in range(self.levels)]
        return [self.score(self.tower(m)) for m in maps]


class TwoNames(nn.Module):
    """One norm under two names, each called once."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.bn1 = self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.one(x)) + self.bn2(self.two(x * 2)).relu()


class NameAndList(nn.Module):
    """One norm under a registered name and in a Python list, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.layers = [self.bn]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.bn(x.relu())


class TiedBuffers(nn.Module):
    """Two norms with the same running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.b.running_mean, self.b.running_var = self.a.running_mean, self.a.running_var

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Functional(nn.Module):
    """F.batch_norm on buffers of its own, ``times`` in a forward, each on something else."""

    def __init__(self, times: int = 2, native: bool = False) -> None:
        super().__init__()
        self.conv, self.times, self.native = nn.Conv2d(3, 4, 3), times, native
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def norm(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.native:
            return torch.batch_norm(x, self.weight, self.bias, mean, var, self.training, 0.1, 1e-5, False)
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([self.norm(y * (i + 1) + i) for i in range(self.times)], 1)


class OwnNorm(nn.Module):
    """Somebody's own batch norm: a module around F.batch_norm and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


class Frozen(nn.Module):
    """A norm written out, as torchvision's FrozenBatchNorm2d is."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((3,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class WithPReLU(nn.BatchNorm2d):
    """A norm with an activation that has a weight of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(x))
        return y


class Twice(nn.Module):
    """Any norm of three channels, called twice on different inputs."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x) + self.norm(x.relu() * 3 + 1)
        return y


IMAGE = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))
IMAGES = tuple(IMAGE * (i + 1) + i for i in range(3))


def triplet() -> Any:
    """The same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lived_in(Triplet())


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors(v)]
