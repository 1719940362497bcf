"""Convolution → norm, 1d to 3d, grouped and depthwise, every padding mode.

y_o = a_o·(Σ W_o∗x + bias_o) + b_o: each output channel's filter and bias are scaled, the shift joins the
bias. Padding acts on x before W, groups only choose which x a filter sees: neither matters to the algebra.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal, get_args

from torch import Tensor, nn
from torch.nn import Sequential as net  # noqa: N813  # read as what it makes

from bnfix.folding.fold import Example, Fold, unbatched
from bnfix.types import Op

_Mode = Literal["zeros", "reflect", "replicate", "circular"]


def _padded(mode: _Mode) -> nn.Module:
    return net(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4))


class ConvFold(Fold):
    """Weight (O, I/groups, *kernel): scaled along its first axis."""

    kinds: ClassVar[frozenset[str]] = frozenset({"conv"})
    examples: ClassVar[tuple[Example, ...]] = (
        Example("conv1d", lambda: net(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), (2, 3, 9)),
        Example("conv2d", lambda: net(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)), (2, 3, 7, 6)),
        Example("conv3d", lambda: net(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (1, 2, 4, 5, 4)),
        Example("grouped", lambda: net(nn.Conv2d(6, 9, 3, groups=3), nn.BatchNorm2d(9)), (2, 6, 5, 5)),
        Example("depthwise", lambda: net(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (2, 4, 5, 5)),
        *(Example(f"padding {mode}", partial(_padded, mode), (2, 3, 6, 6)) for mode in get_args(_Mode)),
        Example("padding 'same'", lambda: net(nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4)), (2, 3, 6, 6)),
        Example(
            "two norms",
            lambda: net(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
            (2, 3, 4, 4),
            2,
        ),
        Example("relu between", lambda: net(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), (2, 3, 6, 6), 0),
    )

    def refuse(self, op: Op, weight_shape: tuple[int, ...]) -> str | None:
        """A convolution's channels are axis 1 of a batched output; an unbatched one has them on axis 0."""
        return unbatched(op, weight_shape)

    def axis(self, op: Op) -> int:
        """(N, C, *positions)."""
        return 1

    def channels(self, weight: Tensor, op: Op) -> Tensor:
        """(O, I/groups, *kernel) in one group, whatever the groups of the input."""
        return weight.unsqueeze(0)
