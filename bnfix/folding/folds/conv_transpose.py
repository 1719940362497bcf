"""Transposed convolution → norm, 1d to 3d, with groups.

The weight is (I, O/g, *kernel): output channel o = (group, place in the group), so the scale runs along
axis 1 and changes from one block of I/g input channels to the next. (torch's own
``fuse_conv_bn_weights(transpose=True)`` ignores the groups.)
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import Sequential as net  # noqa: N813  # read as what it makes

from bnfix.folding.fold import Example, Fold, unbatched
from bnfix.types import Op


class ConvTransposeFold(Fold):
    """Weight (I, O/groups, *kernel), seen as (groups, I/groups, O/groups, *kernel)."""

    kinds: ClassVar[frozenset[str]] = frozenset({"conv_transpose"})
    examples: ClassVar[tuple[Example, ...]] = (
        Example("1d", lambda: net(nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6)), (2, 4, 5)),
        Example(
            "2d",
            lambda: net(nn.ConvTranspose2d(4, 6, 3, output_padding=1, stride=2), nn.BatchNorm2d(6)),
            (2, 4, 4, 5),
        ),
        Example("3d", lambda: net(nn.ConvTranspose3d(2, 4, 2, bias=False), nn.BatchNorm3d(4)), (1, 2, 3, 3, 3)),
        Example("grouped", lambda: net(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4)), (2, 6, 4, 4)),
        Example("depthwise", lambda: net(nn.ConvTranspose2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (2, 4, 4, 4)),
        Example(
            "relu between",
            lambda: net(nn.ConvTranspose1d(3, 4, 2), nn.ReLU(), nn.BatchNorm1d(4)),
            (2, 3, 4),
            0,
        ),
    )

    def refuse(self, op: Op, weight_shape: tuple[int, ...]) -> str | None:
        """As for a convolution: axis 1 of a batched output."""
        return unbatched(op, weight_shape)

    def axis(self, op: Op) -> int:
        """(N, C, *positions)."""
        return 1

    def channels(self, weight: Tensor, op: Op) -> Tensor:
        """(I, O/g, *kernel) → (g, O/g, I/g, *kernel): output channel o is (group, place in the group)."""
        groups = int(op.attrs.get("groups", 1))
        return weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
