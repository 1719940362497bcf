"""What most examples of rules are: a convolution, a batch norm, a ReLU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def conv_norm(**options: Any) -> tuple[nn.Sequential, nn.BatchNorm2d]:
    """The three layers, and the norm (4 channels, with ``options``) among them."""
    from torch import nn

    norm = nn.BatchNorm2d(4, **options)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU()), norm


def images() -> Tensor:
    """Four of 6 by 6, always the same."""
    import torch

    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Its running mean and variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var
