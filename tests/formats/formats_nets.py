"""Small networks whose norms have statistics that fresh ones have not, so that a lost tensor shows in the output."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in evaluation mode, every parameter and buffer drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else drawn)
            else:
                tensor.fill_(7)
    return model.eval()


class Net(nn.Module):
    """conv, norm, ReLU, conv, norm without affine, a linear head; ``classes`` to get the shapes wrong."""

    def __init__(self, classes: int = 5, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.conv = nn.Conv2d(width, width, 1, groups=2)
        self.bn = nn.BatchNorm2d(width, affine=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(self.stem(x))).mean((2, 3)))


class Tied(nn.Module):
    """One layer under two names, a view of a larger storage, a transposed parameter, and half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = self.a
        base = torch.arange(12.0)
        self.register_buffer("part", base[3:9])
        self.register_buffer("rest", base[6:])
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("fp16", torch.ones(2, dtype=torch.float16))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(self.a(x)) * self.part + self.rest) @ self.weight.repeat(2, 1) * self.fp16.float().sum()


def net() -> nn.Module:
    """A trained :class:`Net`."""
    return trained(Net())


IMAGE = torch.linspace(-2, 2, 2 * 3 * 7 * 7).reshape(2, 3, 7, 7)
VECTOR = torch.linspace(-1, 1, 18).reshape(3, 6)
