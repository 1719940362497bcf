"""Small models and loaders for the examples of rules on data. They stand for trained ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

STEPS = 500
"""What ``num_batches_tracked`` says: training was long enough for the statistics to have settled."""


def conv_net(channels: int = 6) -> nn.Module:
    """Scores (N, 5) for images (N, 3, 6, 6)."""
    from torch import nn

    layers = [nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Flatten()]
    return trained(nn.Sequential(*layers, nn.Linear(16 * channels, 5)))


def head_net() -> nn.Module:
    """The same with a hidden linear layer whose norm sees one position a sample."""
    from torch import nn

    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    head = [nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)]
    return trained(nn.Sequential(*layers, *head))


def trained(model: nn.Module) -> nn.Module:
    """``model`` in evaluation mode with weights that training might have left."""
    import torch

    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                scale = name == "weight" and hasattr(module, "running_var")
                drawn = torch.randn(parameter.shape, generator=rng) * 0.3
                parameter.copy_(1 + drawn if scale else drawn)
    return model.eval()


def images(count: int = 384, *, seed: int = 0) -> Tensor:
    """Images (count, 3, 6, 6) about 3, each with a brightness of its own."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    level = torch.randn(count, 1, 1, 1, generator=rng)
    return 3 + level + 2 * torch.randn(count, 3, 6, 6, generator=rng)


def batches(x: Tensor, size: int = 16) -> list[Tensor]:
    """``x`` in batches."""
    import torch

    return list(torch.split(x, size))


def norms_of(model: nn.Module) -> list[Any]:
    """Modules with running statistics."""
    return [m for m in model.modules() if getattr(m, "running_var", None) is not None]


def inputs_of(norm: Any, run: Callable[[], Any]) -> Tensor:
    """What ``norm`` sees while ``run()`` runs, (C, values)."""
    import torch

    kept: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _module, args: kept.append(args[0].transpose(0, 1).flatten(1)))
    with torch.no_grad():
        run()
    handle.remove()
    return torch.cat(kept, 1)


def store(norm: Any, mean: Tensor, var: Tensor) -> None:
    """Give ``norm`` these statistics, as if it had learned them in many steps."""
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(var)
    norm.num_batches_tracked.fill_(STEPS)


def fit(model: nn.Module, data: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None) -> nn.Module:
    """Give every norm of ``model`` the statistics of its inputs in evaluation mode, one after the other."""
    for norm in norms_of(model):
        seen = inputs_of(norm, lambda: [model(b) if forward is None else forward(model, b) for b in data])
        store(norm, seen.mean(1), seen.var(1))
    return model
