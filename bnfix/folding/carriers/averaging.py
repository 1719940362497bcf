"""Averages over the positions of a channel: their weights add up to 1, so avg(a·x + b) = a·avg(x) + b.

With zeros from padding among what is averaged, the weights of the channel's own values add up to less: refused.
Interpolation is an average of neighbours as well.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import Sequential as net  # noqa: N813  # read as what it makes

from bnfix.folding.carrier import Carrier, Ops, Pull, short
from bnfix.folding.fold import Example
from bnfix.types import Op

_POOLS = "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
_RESIZED = "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"


class Averaging(Carrier):
    """Pooling and interpolation over the axes behind the channels, and means over any axes."""

    targets: ClassVar[frozenset[str]] = frozenset(f"{_POOLS} _{_POOLS.split()[4]} {_RESIZED} mean".split())
    examples: ClassVar[tuple[Example, ...]] = (
        Example("pool", lambda: net(nn.Conv2d(3, 6, 3), nn.AvgPool2d(2), nn.BatchNorm2d(6)), (2, 3, 8, 8)),
        Example(
            "padded, not counted",
            lambda: net(nn.Conv2d(3, 6, 3), nn.AvgPool2d(3, padding=1, count_include_pad=False), nn.BatchNorm2d(6)),
            (2, 3, 8, 8),
        ),
        Example(
            "padded, counted",
            lambda: net(nn.Conv2d(3, 6, 3), nn.AvgPool2d(3, padding=1), nn.BatchNorm2d(6)),
            (2, 3, 8, 8),
            0,
        ),
        Example(
            "pool to one",
            lambda: net(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6)),
            (2, 3, 8, 8),
        ),
        Example("largest", lambda: net(nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.BatchNorm2d(6)), (2, 3, 8, 8), 0),
        Example(
            "interpolation",
            lambda: net(nn.Conv2d(3, 6, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.BatchNorm2d(6)),
            (2, 3, 8, 8),
        ),
    )

    def back(self, op: Op, labels: Tensor, ops: Ops) -> list[Pull] | str:
        """All positions of the input that go into one average get its label."""
        source = op.inputs[0]
        shape = ops(source).shape
        reason = _refused(op)
        if reason or shape is None:
            return reason or f"the input of {short(op)} has no shape"
        axes = _axes(op, len(shape))
        if short(op) == "mean":
            for axis in axes if not op.attrs.get("keepdim") else ():
                labels = labels.unsqueeze(axis)
            return [Pull(source, labels.expand(shape))]
        kept = _uniform(labels, axes)
        if kept is None:
            return f"{short(op)} mixes positions that are different channels of it"
        return [Pull(source, kept.expand(shape))]

    def ahead(self, op: Op, index: int, labels: Tensor, ops: Ops) -> Tensor | str:
        """One label for each average."""
        reason = _refused(op)
        if reason or op.shape is None:
            return reason or f"{short(op)} gives no one value"
        axes = _axes(op, labels.dim())
        kept = _uniform(labels, axes)
        if kept is None:
            return f"{short(op)} mixes channels of it"
        if short(op) == "mean" and not op.attrs.get("keepdim"):
            for axis in reversed(axes):
                kept = kept.squeeze(axis)
        return kept.expand(op.shape)


def _refused(op: Op) -> str:
    padded = any(int(p) > 0 for p in _numbers(op.attrs.get("padding", 0)))
    if padded and op.attrs.get("count_include_pad", True):
        return f"{short(op)} counts the zeros of its padding"
    if op.attrs.get("divisor_override") is not None:
        return f"{short(op)} divides by a number of its own"
    if op.tensors or len(set(op.inputs)) != 1:
        return f"{short(op)} reads several values"
    return ""


def _axes(op: Op, dims: int) -> list[int]:
    """The axes averaged over, counted from the front."""
    name = short(op)
    if name == "mean":
        given = _numbers(op.attrs.get("dim"))
        return sorted(int(d) % dims for d in given) if given else list(range(dims))
    last = int(name[-2])  # avg_pool2d
    return list(range(dims - last, dims))


def _uniform(labels: Tensor, axes: list[int]) -> Tensor | None:
    """``labels`` with size 1 along ``axes``; None where they are not the same all along."""
    first = labels
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    return first if bool((labels == first).all()) else None


def _numbers(value: object) -> tuple[int, ...]:
    if isinstance(value, (tuple, list)):
        return tuple(value)
    return (value,) if isinstance(value, int) else ()
