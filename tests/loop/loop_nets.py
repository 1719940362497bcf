"""Small networks and loops that the tests of watch share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import bnfix
from bnfix.types import Diagnosis


def conv_net(out: int = 4) -> nn.Sequential:
    """Two convolutions with norms, a head with one more; for (N, 3, 8, 8)."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, out),
    )  # fmt: skip


def images(n: int = 32, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Noise with some likeness between neighbouring pixels, (n, 3, 8, 8)."""
    return torch.randn(n, 3, 8, 8) * scale + torch.randn(n, 3, 1, 1) * scale + shift


def sgd(*modules: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    """One optimizer for all of them."""
    return torch.optim.SGD([p for m in modules for p in m.parameters() if p.requires_grad], lr)


def step(optimizer: torch.optim.Optimizer, *outputs: Tensor) -> None:
    """One step on some loss of these outputs."""
    optimizer.zero_grad()
    torch.stack([o.square().mean() for o in outputs]).sum().backward()
    optimizer.step()


def train(model: Callable[..., Tensor], optimizer: torch.optim.Optimizer, steps: int, n: int = 32) -> None:
    """Plain training."""
    for _ in range(steps):
        step(optimizer, model(images(n)))


def loader(batches: int, n: int = 32, **how: float) -> Iterator[Tensor]:
    """So many batches."""
    return (images(n, **how) for _ in range(batches))


def codes(report: Diagnosis, *severities: str) -> set[str]:
    """The codes of findings of these severities; of all without any."""
    return {f.code for f in report.findings if not severities or f.severity in severities}


def bad(report: Diagnosis) -> set[str]:
    """The codes of errors and warnings."""
    return codes(report, "error", "warning")


watch = bnfix.watch
