"""What a norm in evaluation mode is, without its statistics: one multiply-add per channel."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ChannelAffine(nn.Module):
    """x·weight + bias along axis 1, shapes (N, C, *positions) and (C,)."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, weight: Tensor, bias: Tensor, *, requires_grad: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=requires_grad)
        self.bias = nn.Parameter(bias, requires_grad=requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """One rounding in the dtype of ``x``, as a norm has it; what is stored in float32 for half precision stays."""
        shape = (1, -1, *(1,) * (x.dim() - 2))
        weight, bias = self.weight.reshape(shape), self.bias.reshape(shape)
        if weight.dtype == x.dtype:
            return torch.addcmul(bias, x, weight)
        return torch.addcmul(bias, x.to(weight.dtype), weight).to(x.dtype)

    def extra_repr(self) -> str:
        """Number of channels."""
        return str(self.weight.numel())


def affine_in_place_of(norm: nn.Module, after: Sequence[str], weight: Tensor, bias: Tensor) -> nn.Module:
    """What stands where ``norm`` was: the affine, and behind it its own submodules ``after``, under their names."""
    trained = any(p.requires_grad for p in norm.parameters(recurse=False))
    affine: nn.Module = ChannelAffine(weight, bias, requires_grad=trained)
    if after:
        name = "affine" if "affine" not in after else "affine_"
        affine = nn.Sequential(OrderedDict([(name, affine), *((a, norm.get_submodule(a)) for a in after)]))
    return affine.train(norm.training)
