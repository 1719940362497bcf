"""Models for tests. A fresh BatchNorm hides every error, so each model here gets statistics that mean something."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = (nn.modules.batchnorm._NormBase,)


def lived_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in eval mode with statistics and affine weights as training leaves them, none at its initial value."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(var, Tensor):
                mean.copy_(draw(mean) * 0.5)
                var.copy_(torch.exp(draw(var) * 0.7))
                for name, centre in (("weight", 1.0), ("bias", 0.0)):
                    value = getattr(module, name, None)
                    if isinstance(value, Tensor):
                        value.copy_(centre + draw(value) * 0.4)
    return model.eval()


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the model, to compare to the bit."""
    return copy.deepcopy({**dict(model.named_parameters()), **dict(model.named_buffers())})


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Whether the model's tensors are what they were."""
    now = bits(model)
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in before)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def norms_left(model: nn.Module) -> int:
    """Modules with running statistics that are still there."""
    return sum(isinstance(getattr(m, "running_var", None), Tensor) for m in model.modules())


def conv_bn(channels: int = 4, **conv: object) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, channels, 3, **conv), nn.BatchNorm2d(channels))  # type: ignore[arg-type]


class TwoConsumers(nn.Module):
    """A convolution whose output is normalised and used as it is as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


class ConvIsOutput(TwoConsumers):
    """The convolution's output is an output of the model too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.conv(x)
        return self.bn(y), y


class SharedConv(nn.Module):
    """One convolution, two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.conv(x)) + self.two(self.conv(x * 2))


class CalledTwice(nn.Module):
    """The same convolution and norm, one after the other, twice: the fold serves both calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(F.relu(self.bn(self.conv(x)))))


class NormOnConvAndRelu(nn.Module):
    """One norm, once behind a convolution and once behind something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.bn(F.relu(x))


class NormOnTwoConvs(nn.Module):
    """One norm behind two convolutions: it goes into both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) * self.bn(self.b(x))


class TiedWeights(nn.Module):
    """Two convolutions with one weight; only one of them is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + self.b(x)


class WeightReadElsewhere(TwoConsumers):
    """The forward uses the convolution's weight for something else too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.conv.weight.square().mean()


class RegisteredBackwards(nn.Module):
    """Registration order is not call order."""

    def __init__(self) -> None:
        super().__init__()
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Functional(nn.Module):
    """F.batch_norm on buffers of the model's own."""

    def __init__(self, training: bool = False) -> None:
        super().__init__()
        self.conv, self.on_batch = nn.Conv2d(3, 4, 3), training
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.running_mean, self.running_var, training=self.on_batch)


class NormWithActivation(nn.BatchNorm2d):
    """A subclass that does more in its own forward, without a submodule for it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class ShapeRoute(nn.Module):
    """What becomes of the convolution's output depends on the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.bn(y) if x.shape[-1] > 8 else self.bn(y)


class Stashing(TwoConsumers):
    """Keeps the convolution's output on itself, for whoever asks later."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.bn(self.last)


class InPlainList(nn.Module):
    """Layers in a Python list, which torch does not register."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)]
        lived_in(self.layers[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class DataDependent(nn.Module):
    """Control flow that depends on values: torch.export refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return y * 2 if y.sum() > 0 else y


class DictOutput(TwoConsumers):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        y = self.bn(self.conv(x))
        return {"features": y, "logits": y.mean((2, 3))}


class InAutocast(TwoConsumers):
    """Convolution and norm inside autocast and no_grad: export puts them into subgraphs."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.bn(self.conv(x))
        return y.float()


class PassesOn(nn.Module):
    """A wrapper that hands on whatever it is asked for, as adapters do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found
