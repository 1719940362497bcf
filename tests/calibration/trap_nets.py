"""What the tests of traps share: a small net to be spoiled, data for several chunks, what is asked of each result."""

from __future__ import annotations

import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calib_nets import Forward, residual
from nets import bits, lived_in, same_bits
from torch import Tensor, nn

import bnfix
from bnfix.running import Call
from bnfix.types import Recalibration

EXACT = 1e-5  # standard deviations: activations of float32 differ with the batch size by some 1e-6
PLAIN = "plain passes"


class Two(nn.Module):
    """Two norms behind convolutions; subclasses do something beside them."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def first(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def second(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(x))

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x))


def images(count: int = 400, size: int = 16, seed: int = 3) -> list[Tensor]:
    """Batches of images (3, 6, 6), enough for three chunks and more; no two alike."""
    x = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return list((x * torch.linspace(0.5, 3, count).view(-1, 1, 1, 1) + 1).split(size))


def mixed_modes() -> Two:
    """In training mode, one norm frozen, a momentum of its own."""
    model = lived_in(Two())
    assert isinstance(model, Two)
    model.train()
    model.bn1.eval()
    model.bn2.momentum = 0.03
    return model


def vectors(count: int = 400, size: int = 16, channels: int = 4, seed: int = 5) -> list[Tensor]:
    """The same with vectors."""
    x = torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))
    return list((x * torch.linspace(0.5, 3, count)[:, None] + 1).split(size))


def as_is(model: nn.Module, batch: Any) -> Any:
    """As ``forward=``: batches that bnfix can neither join nor cut."""
    return model(batch)


def exact(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward | None = None,
    *,
    data: Iterable[Any] | None = None,
    **options: Any,
) -> Recalibration:
    """Recalibrate a lived-in ``model``; then plain forwards over ``batches`` have to find what it stores."""
    lived_in(model)
    report = bnfix.recalibrate(model, batches if data is None else data, forward=forward, **options)
    found = residual(model, batches, forward)
    assert max(found) <= EXACT, f"{found} in {report.engine}: {report.notes}"
    return report


def everything(model: nn.Module) -> dict[str, Any]:
    """What must be as before, of a model and of the process."""
    modules = list(model.modules())
    return {
        "identities": [id(t) for t in (*model.parameters(), *model.buffers())],
        "modes": [m.training for m in modules],
        "momenta": [getattr(m, "momentum", 0) for m in modules],
        "attributes": [sorted(vars(m)) for m in modules],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        "torch's generator": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "NumPy's generator": np.random.get_state()[1].tolist(),  # type: ignore[index, union-attr]
        "threads": [t.name for t in threading.enumerate() if t.name.startswith("bnfix")],
        **flags(),
    }


def flags() -> dict[str, Any]:
    """Switches of the process."""
    backends = torch.backends
    return {
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "mkldnn": backends.mkldnn.enabled,
        "cudnn": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "attention": (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
        ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "device": torch.get_default_device(),
        "warnings": id(warnings.filters),
        "stdout": id(sys.stdout),
    }


def fails(
    model: nn.Module, data: Iterable[Any], error: type[BaseException] | tuple[type[BaseException], ...], **options: Any
) -> str:
    """The message of a recalibration that fails, and leaves everything as it was."""
    before, rest = bits(model), everything(model)
    try:
        bnfix.recalibrate(model, data, **options)
    except error as caught:
        message = str(caught)
    else:
        raise AssertionError(f"no {error}")
    assert same_bits(model, before)
    now = everything(model)
    assert now == rest, [key for key in rest if now[key] != rest[key]]
    return message


def within(seconds: float, true: Callable[[], bool]) -> bool:
    """Whether that becomes true soon."""
    waited = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if true():
            return True
        waited.wait(0.05)
    return true()


def sizes_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples of each call of a model from now on, filled in as they are made."""
    ran: list[int] = []
    apply = Call.apply

    def counted(call: Call, model: nn.Module) -> object:
        ran.append(len(call.tensors()[0]))
        return apply(call, model)

    monkeypatch.setattr(Call, "apply", counted)
    return ran
