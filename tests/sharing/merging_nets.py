"""Models that call one network several times, and how the tests merge them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from nets import bits, lived_in, relative_error, same_bits
from shared_nets import tensors
from torch import Tensor, nn

import bnfix

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
XS = (X, X[:3] * 2 + 1, X[:4] - 1)
ROUNDING = 2e-6  # as for joint: products summed in another order


def block(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), *more, nn.ReLU(), nn.Linear(6, 4))


class Siamese(nn.Module):
    """Three calls by the model's own code, and more around them."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or block()
        self.head = nn.Linear(4, 2)
        self.scale, self.temperature = nn.Parameter(torch.ones(4)), 0.5
        self.unused = nn.BatchNorm1d(2)

    def embed(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x) * self.scale, dim=1) / self.temperature

    def forward(self, a: Tensor, p: Tensor, n: Tensor | None = None) -> Any:
        out = {"a": self.embed(a), "p": self.head(self.embed(p))}
        if n is not None:
            out["n"] = self.embed(n)
        return out


def flat(value: Any) -> list[Tensor]:
    return tensors(list(value.values()) if isinstance(value, dict) else value)


def close(one: Any, other: Any) -> bool:
    return all(relative_error(a, b) < ROUNDING for a, b in zip(flat(one), flat(other), strict=True))


def merged(model: nn.Module, example: Any, **options: Any) -> Any:
    model = lived_in(model)
    before, classes = bits(model), [type(m) for m in model.modules()]
    result = bnfix.merge_calls(model, example, **options)
    assert same_bits(model, before)
    assert [type(m) for m in model.modules()] == classes
    return result


def refused(model: nn.Module, example: Any, **options: Any) -> str:
    result = merged(model, example, **options)
    assert not result.edits
    assert result.parity is None
    return " | ".join(r.reason for r in result.refusals)


class Made(nn.Module):
    """A forward given as a function, over a network and whatever else it needs."""

    def __init__(self, forward: Any, net: nn.Module | None = None, **more: Any) -> None:
        super().__init__()
        self.net = net or block()
        for name, value in more.items():
            setattr(self, name, value)
        self.function = (forward,)

    def forward(self, *xs: Tensor) -> Any:
        return self.function[0](self, *xs)
