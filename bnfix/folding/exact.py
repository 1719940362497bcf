"""What a layer's numbers have to be after a chain of folds, by another way than the algebra that is to be checked.

torch's own float64 kernels do it: ``batch_norm`` on the weights laid out as values, and the layer itself on a constant
input for what a norm in front of it adds to the bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bnfix.folding.planner import PlannedFold, Target
from bnfix.graph import Binding

Link = tuple[PlannedFold, Target]
"""One norm, and how the layer takes it up."""


def exact(binding: Binding, chain: Sequence[Link]) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of a layer after all norms of ``chain``, float64, and the slack of the bias, shape (C,).

    The slack is the kernels' own rounding, a few units of 2⁻⁵³ of the terms that are added: a bias that nearly cancels
    is to be judged by what it is, not by these digits.
    """
    layer = chain[0][1]
    weight = binding.tensors[layer.weight].detach().double().cpu()
    given = None if layer.bias is None else binding.tensors[layer.bias].detach().double().cpu().reshape(-1)
    bias, slack = given, torch.zeros(())
    for planned, target in chain:
        state = _State(binding, planned, target)
        if target.fold.forward:
            shift = state.applied(torch.zeros(1, len(target.lanes), 1, dtype=torch.float64)).reshape(-1)
            added = _constant(weight, shift, target)
            terms = weight.numel() / max(len(added), 1)
            slack = slack + _constant(weight.abs(), state.terms(torch.zeros(())), target) * terms**0.5 + added.abs()
            bias = added if bias is None else bias + added
            weight = _scaled(weight, state, target)
        else:
            weight = _scaled(weight, state, target)
            before = torch.zeros(len(target.lanes), dtype=torch.float64) if bias is None else bias
            slack = slack * state.scale().abs() + state.terms(before)
            bias = state.applied(before.reshape(1, -1, 1)).reshape(-1)
    assert bias is not None
    return weight, bias, slack * (8 * torch.finfo(torch.float64).eps / 2)


class _State:
    """The statistics of one norm on the channels of one layer, float64."""

    def __init__(self, binding: Binding, planned: PlannedFold, target: Target) -> None:
        lanes = torch.tensor(target.lanes)
        self.mine, self.eps = lanes >= 0, planned.op.attrs["eps"]
        kept = lanes[self.mine]
        tensors = {r: binding.tensors[k].detach().double().cpu().reshape(-1) for r, k in planned.norm.tensors.items()}
        self.var, self.gamma = tensors["running_var"][kept], None
        self.mean = tensors["running_mean"][kept] if target.shift else torch.zeros_like(self.var)
        self.beta = tensors["bias"][kept] if target.shift and "bias" in tensors else None
        if "weight" in tensors:
            self.gamma = tensors["weight"][kept]

    def applied(self, values: Tensor, *, shifted: bool = True) -> Tensor:
        """The norm, or its scale alone, on values (1, C, positions)."""
        mean, beta = (self.mean, self.beta) if shifted else (torch.zeros_like(self.mean), None)
        out = values.clone()
        out[:, self.mine] = F.batch_norm(values[:, self.mine], mean, self.var, self.gamma, beta, False, 0.0, self.eps)
        return out

    def scale(self) -> Tensor:
        """One number for each channel of the layer."""
        ones = torch.ones(1, len(self.mine), 1, dtype=torch.float64)
        return self.applied(ones, shifted=False).reshape(-1)

    def terms(self, value: Tensor) -> Tensor:
        """The absolute terms that the norm adds up where its input is ``value``."""
        scale = self.scale()
        terms = (scale * value).abs()
        terms[self.mine] += (scale[self.mine] * self.mean).abs() + (0 if self.beta is None else self.beta.abs())
        return terms


def _scaled(weight: Tensor, state: _State, target: Target) -> Tensor:
    """The weight with the channels of one side in front, normalised, and laid out again as it was."""
    if (target.op.kind == "conv_transpose") == target.fold.forward:  # these channels are its first axis
        flat = weight.reshape(1, weight.shape[0], -1)
        return state.applied(flat, shifted=False).reshape(weight.shape)
    groups = int(target.op.attrs.get("groups", 1))
    blocks = [b.movedim(1, 0) for b in weight.chunk(groups)]
    flat = torch.cat([b.reshape(b.shape[0], -1) for b in blocks]).unsqueeze(0)
    parts = state.applied(flat, shifted=False)[0].chunk(groups)
    return torch.cat([p.reshape(b.shape).movedim(0, 1) for p, b in zip(parts, blocks, strict=True)])


def _constant(weight: Tensor, value: Tensor, target: Target) -> Tensor:
    """What the layer gives for an input that is ``value`` everywhere, by channel."""
    if target.op.kind == "linear":
        return F.linear(value, weight)
    groups = int(target.op.attrs.get("groups", 1))
    image = value.reshape(1, -1, *(1,) * (weight.dim() - 2)).expand(1, -1, *weight.shape[2:])
    transposed = target.op.kind == "conv_transpose"
    out: Tensor = torch.ops.aten.convolution(image, weight, None, [1], [0], [1], transposed, [0], groups)
    return out.reshape(-1)
