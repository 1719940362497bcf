"""Norm → linear, directly, behind flatten (each channel's scale repeated for its pixels) or a global average."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import Sequential as net  # noqa: N813  # read as what it makes

from bnfix.folding.fold import Example, ForwardFold
from bnfix.types import Op


class BeforeLinear(ForwardFold):
    """Weight (O, I): scaled along its second axis."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    examples: ClassVar[tuple[Example, ...]] = (
        Example("linear behind", lambda: net(nn.BatchNorm1d(5), nn.Linear(5, 7, bias=False)), (4, 5)),
        Example("dropout", lambda: net(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 7)), (4, 5)),
        Example("flatten", lambda: net(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(60, 7)), (2, 3, 4, 5)),
        Example(
            "global average",
            lambda: net(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7)),
            (2, 3, 4, 5),
        ),
        Example("L equals C", lambda: net(nn.BatchNorm1d(5), nn.Linear(5, 7)), (4, 5, 5), 0),
        Example("relu between", lambda: net(nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 7)), (4, 5), 0),
    )

    def refuse(self, op: Op, weight_shape: tuple[int, ...]) -> str | None:
        """None by itself: that the norm's axis is the layer's is for :meth:`axis` to tell."""
        return None

    def axis(self, op: Op) -> int:
        """(…, features)."""
        return -1

    def channels(self, weight: Tensor, op: Op) -> Tensor:
        """(O, I) → (1, I, O)."""
        return weight.t().unsqueeze(0)
