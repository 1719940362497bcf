"""What every operation in ``carriers/`` is: something between a norm and a layer that a per-channel map passes through.

Which norm channel belongs to which element of a value is told by its *labels*: an integer tensor of the value's
shape, -1 where no channel of the norm is. So no operation needs rules about axes: what only moves values is run on
the labels themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bnfix.folding.fold import Example
from bnfix.types import Op

NONE = -1
"""The label of an element that no channel of the norm is applied to."""

Ops = Callable[[int], Op]
"""The operations of the route, by index."""


@dataclass(frozen=True)
class Pull:
    """What a map applied to an operation's output amounts to on one of its inputs: ``labels`` of the value ``index``.

    ``shift`` is False where the scale is to be applied and the shift comes in by way of another input.
    """

    index: int
    labels: Tensor
    shift: bool = True


class Carrier(ABC):
    """One kind of operation. ``targets`` are its names in ATen, without overload.

    ``examples`` are its documentation and its tests, as those of a :class:`~bnfix.folding.fold.Fold`.
    """

    targets: ClassVar[frozenset[str]]
    examples: ClassVar[tuple[Example, ...]]

    @abstractmethod
    def back(self, op: Op, labels: Tensor, ops: Ops) -> list[Pull] | str:
        """``labels`` of the output → of each input that the map has to be applied to instead; or why there are none."""

    def ahead(self, op: Op, index: int, labels: Tensor, ops: Ops) -> Tensor | str:
        """``labels`` of the input ``index`` → of the output, where the map has already been applied to that input.

        A reason where applying the map to the output instead gives something else.
        """
        return f"{short(op)} doesn't let a scale and a shift through"


def short(op: Op) -> str:
    """``max_pool2d`` for ``aten.max_pool2d.default``."""
    parts = op.target.split(".")
    return parts[1] if len(parts) > 1 else parts[0]
