"""Linear → norm, where the features are the axis that the norm normalises.

On (N, features) they are. On (N, L, features) BatchNorm1d normalises axis 1, which is L: another
quantity, also where L happens to equal the number of features (fx, torchao and Brevitas fold it, and are
silently wrong).
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import Sequential as net  # noqa: N813  # read as what it makes

from bnfix.folding.fold import Example, Fold
from bnfix.types import Op


class LinearFold(Fold):
    """Weight (O, I): scaled along its first axis."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    examples: ClassVar[tuple[Example, ...]] = (
        Example("linear", lambda: net(nn.Linear(5, 7), nn.BatchNorm1d(7)), (4, 5)),
        Example(
            "no bias, no affine",
            lambda: net(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7, affine=False)),
            (4, 5),
        ),
        Example("L equals C", lambda: net(nn.Linear(5, 6), nn.BatchNorm1d(6)), (4, 6, 5), 0),
    )

    def refuse(self, op: Op, weight_shape: tuple[int, ...]) -> str | None:
        """None by itself: that the norm's axis is the layer's is for :meth:`axis` to tell."""
        return None

    def axis(self, op: Op) -> int:
        """(…, features)."""
        return -1

    def channels(self, weight: Tensor, op: Op) -> Tensor:
        """(O, I) in one group."""
        return weight.unsqueeze(0)
