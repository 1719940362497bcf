"""What every pattern in ``folds/`` is: the algebra of one way to take a norm into a layer, and when not to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bnfix.stats import Affine
from bnfix.types import Op


@dataclass(frozen=True)
class Example:
    """A model that shows the pattern, and the shape of an input for it. ``folds``: how many norms must go."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    folds: int = 1


class Fold(ABC):
    """One pattern. It sees weights as float64 tensors and knows nothing of graphs or modules.

    ``kinds`` are the kinds of :class:`~bnfix.types.Op` it takes a norm into. ``examples`` are both its
    documentation and its tests: ``folds=0`` shows what it must refuse.
    """

    kinds: ClassVar[frozenset[str]]
    examples: ClassVar[tuple[Example, ...]]

    @abstractmethod
    def refuse(self, producer: Op, norm: Op, weight_shape: tuple[int, ...]) -> str | None:
        """Why this norm can't go into this producer; None where it can.

        Decided by rank and axis, never by sizes that happen to be equal.
        """

    @abstractmethod
    def channels(self, weight: Tensor, producer: Op) -> Tensor:
        """A view of ``weight`` with the channels that the norm scales in front: shape (groups, C/groups, …).

        The channels lie in the order in which the norm counts them.
        """

    def weight(self, weight: Tensor, affine: Affine, producer: Op) -> Tensor:
        """The weight that computes scale·(W∗x): same shape and layout as ``weight``, float64."""
        scaled = weight.clone(memory_format=torch.preserve_format)
        seen = self.channels(scaled, producer)
        seen.mul_(affine.scale.reshape(*seen.shape[:2], *(1,) * (seen.dim() - 2)))
        return scaled

    def bias(self, bias: Tensor | None, affine: Affine) -> Tensor:
        """The bias that goes with it: scale·bias + shift, shape (C,), float64."""
        return affine.shift if bias is None else affine.scale * bias + affine.shift
