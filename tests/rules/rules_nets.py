"""Models for the rules that look at one model: legitimate oddities, which must stay clean, and builders for faults."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nets import lived_in
from torch import Tensor, nn

import bnfix
from bnfix.types import Diagnosis, Finding

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(7))


def check(model: object, example: object = None, **options: object) -> Diagnosis:
    return bnfix.check(model, example, **options)  # type: ignore[arg-type]


def codes(said: Diagnosis, *severities: str) -> set[str]:
    """The codes found, of these severities or all."""
    return {f.code for f in said.findings if not severities or f.severity in severities}


def only(said: Diagnosis, code: str) -> Finding:
    """The one finding of a rule."""
    (finding,) = said.by_code(code)
    return finding


def small(**options: object) -> nn.Sequential:
    """Two convolutions with norms, lived in, in evaluation mode."""
    norm = lambda c: nn.BatchNorm2d(c, **options)  # type: ignore[arg-type]  # noqa: E731
    layers = (nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 6, 3), norm(6), nn.ReLU())
    model = nn.Sequential(*layers)
    lived_in(model)
    return model


class Residual(nn.Module):
    """A residual block whose last scale starts at 0."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Projector(nn.Module):
    """The head of SimSiam and BYOL: the last norm has no weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(12, 8), nn.BatchNorm1d(8)
        self.second, self.last = nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.second(F.relu(self.norm(self.first(x)))))
        return y


class Generator(nn.Module):
    """DCGAN: scales drawn from N(1, .02), shifts of 0, a Tanh at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4, bias=False), nn.BatchNorm2d(16), nn.ReLU(True),
            nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = self.main(z)
        return y


class Conditional(nn.Module):
    """Conditional batch norm: scale and shift come from a class embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.embed = nn.Embedding(5, 8)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        scale, shift = self.embed(label).chunk(2, 1)
        y: Tensor = scale[:, :, None, None] * self.norm(self.conv(x)) + shift[:, :, None, None]
        return y


class Auxiliary(nn.Module):
    """A head that runs in training alone, as in Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.aux = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> object:
        y = self.body(x)
        return (y, self.aux(y)) if self.training else y


class StandardisedConv(nn.Conv2d):
    """Weights standardised by F.batch_norm in training mode, as in timm: no norm of activations at all."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias)


class FunctionalNorm(nn.Module):
    """F.batch_norm on buffers of its own; ``training`` says which mode is written into the code."""

    def __init__(self, training: bool | None = None) -> None:
        super().__init__()
        self.conv, self.fixed = nn.Conv2d(3, 4, 1), training
        self.register_buffer("running_mean", torch.full((4,), 0.2))
        self.register_buffer("running_var", torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        training = self.training if self.fixed is None else self.fixed
        mean, var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        return F.batch_norm(self.conv(x), mean, var, training=training)


class Siamese(nn.Module):
    """One encoder, called for each of the two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
        self.encoder(IMAGES)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.encoder(a) - self.encoder(b)).square().sum(1)
