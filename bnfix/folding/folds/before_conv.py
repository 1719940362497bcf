"""Norm → convolution: the scale goes into the filters by input channel, the shift into the bias.

W∗(a·x + b) = (W·a)∗x + Σ W·b holds where the whole kernel lies on values that the norm gave: without padding, or with
padding that repeats values (reflect, replicate, circular), which is an operation of its own in the graph. Zeros beside
the values would have to become −b/a.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import Sequential as net  # noqa: N813  # read as what it makes

from bnfix.folding.fold import Example, ForwardFold, unbatched
from bnfix.types import Op


class BeforeConv(ForwardFold):
    """Weight (O, I/groups, *kernel): scaled along its second axis, group by group."""

    kinds: ClassVar[frozenset[str]] = frozenset({"conv"})
    examples: ClassVar[tuple[Example, ...]] = (
        Example("conv1d behind", lambda: net(nn.BatchNorm1d(3), nn.Conv1d(3, 6, 3)), (2, 3, 9)),
        Example("conv2d behind", lambda: net(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, bias=False)), (2, 3, 7, 6)),
        Example("grouped behind", lambda: net(nn.BatchNorm2d(6), nn.Conv2d(6, 9, 3, groups=3)), (2, 6, 5, 5)),
        Example("depthwise behind", lambda: net(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4)), (2, 4, 5, 5)),
        Example(
            "circular behind",
            lambda: net(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
            (2, 3, 6, 6),
        ),
        Example("zeros behind", lambda: net(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), (2, 3, 6, 6), 0),
        Example("'same' behind", lambda: net(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding="same")), (2, 3, 6, 6), 0),
        Example(
            "'same' of one pixel", lambda: net(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1, padding="same")), (2, 3, 6, 6)
        ),
    )

    def refuse(self, op: Op, weight_shape: tuple[int, ...]) -> str | None:
        """Only without zeros beside the values."""
        padding = op.attrs.get("padding", 0)
        if padding == "same":
            zeros = any(size > 1 for size in weight_shape[2:])
        else:
            zeros = padding != "valid" and any(
                int(p) > 0 for p in (padding if isinstance(padding, tuple) else (padding,))
            )
        if zeros:
            return f"{op.site} pads its input with zeros, which the norm has not shifted"
        return unbatched(op, weight_shape)

    def axis(self, op: Op) -> int:
        """(N, C, *positions)."""
        return 1

    def channels(self, weight: Tensor, op: Op) -> Tensor:
        """(O, I/g, *kernel) → (g, I/g, O/g, *kernel): input channel i is (group, place in the group)."""
        groups = int(op.attrs.get("groups", 1))
        return weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
