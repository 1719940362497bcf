"""Softmax attention: the rows of the weights P add up to 1, so P·(a·V + b) = a·(P·V) + b for each feature of V.

With dropout on the weights, or weights that are no softmax over what V is summed over, they add up to something else.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from bnfix.folding.carrier import Carrier, Ops, Pull, short
from bnfix.folding.fold import Example
from bnfix.types import Op

_SAME = ("dropout", "clone", "contiguous", "detach", "alias")


class _Attention(nn.Module):
    """One head over pixels: (N, C, H, W) → (N, L, C) → softmax(x·xᵀ)·V → norm over C; ``axis`` of the softmax."""

    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        self.value, self.norm, self.axis = nn.Linear(3, 5), nn.BatchNorm1d(5), axis

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        weights = (tokens @ tokens.transpose(1, 2)).softmax(self.axis)
        out: Tensor = self.norm((weights @ self.value(tokens)).transpose(1, 2))
        return out


class _Fused(_Attention):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(tokens, tokens, self.value(tokens))
        out: Tensor = self.norm(mixed.transpose(1, 2))
        return out


class Attending(Carrier):
    """``softmax(…, -1) @ V``, and PyTorch's fused attention."""

    targets: ClassVar[frozenset[str]] = frozenset({"matmul", "bmm", "scaled_dot_product_attention"})
    examples: ClassVar[tuple[Example, ...]] = (
        Example("attention", _Attention, (2, 3, 4, 5)),
        Example("softmax over the queries", lambda: _Attention(-2), (2, 3, 4, 5), 0),
        Example("fused attention", _Fused, (2, 3, 4, 5)),
    )

    def back(self, op: Op, labels: Tensor, ops: Ops) -> list[Pull] | str:
        """Each feature of V has one label, whatever the position."""
        value = _value(op, ops)
        if isinstance(value, str):
            return value
        if op.inputs.count(value) != 1:
            return f"{short(op)} takes it for queries or keys as well"
        shape, rows = ops(value).shape, labels.narrow(-2, 0, 1)
        if shape is None or labels.dim() != len(shape) or labels.shape[:-2] != shape[:-2]:
            return f"{short(op)} broadcasts"
        if not bool((labels == rows).all()):
            return f"{short(op)} mixes positions that are different channels of it"
        return [Pull(value, rows.expand(shape))]

    def ahead(self, op: Op, index: int, labels: Tensor, ops: Ops) -> Tensor | str:
        """The same the other way round."""
        value = _value(op, ops)
        if isinstance(value, str):
            return value
        rows = labels.narrow(-2, 0, 1)
        if value != index or op.inputs.count(index) != 1 or op.shape is None or labels.shape[:-2] != op.shape[:-2]:
            return f"{short(op)} takes it for more than the values"
        if not bool((labels == rows).all()):
            return f"{short(op)} mixes channels of it"
        return rows.expand(op.shape)


def _value(op: Op, ops: Ops) -> int | str:
    """Which input is V, or why the weights don't add up to 1."""
    if short(op) == "scaled_dot_product_attention":
        if op.attrs.get("dropout_p", 1.0) != 0.0 or "value" not in op.reads or op.attrs.get("enable_gqa"):
            return "scaled_dot_product_attention drops weights, or shares values between heads"
        if "attn_mask" in op.reads or "attn_mask" in op.tensors:
            return "scaled_dot_product_attention has a mask: where a whole row is masked the weights add up to 0"
        return op.reads["value"]
    left, right = op.reads.get("self"), op.reads.get("other", op.reads.get("mat2"))
    if left is None or right is None:
        return f"{short(op)} reads a tensor of the model's own"
    source = ops(left)
    while short(source) in _SAME and len(source.inputs) == 1 and source.attrs.get("train", False) is False:
        source = ops(source.inputs[0])
    rank = len(ops(left).shape or ())
    if short(source) not in ("softmax", "_softmax") or source.attrs.get("dim") not in (-1, rank - 1):
        return f"{short(op)} sums with weights that don't add up to 1"
    return right
