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
    documentation and its tests: ``folds=0`` shows what it must refuse. ``forward`` says that the norm stands before
    the layer, not behind it.
    """

    kinds: ClassVar[frozenset[str]]
    examples: ClassVar[tuple[Example, ...]]
    forward: ClassVar[bool] = False

    @abstractmethod
    def refuse(self, op: Op, weight_shape: tuple[int, ...]) -> str | None:
        """Why a scale and a shift per channel can't go into this layer; None where they can."""

    @abstractmethod
    def axis(self, op: Op) -> int:
        """The axis of the layer's output (of its input, if ``forward``) that its channels lie along."""

    @abstractmethod
    def channels(self, weight: Tensor, op: Op) -> Tensor:
        """A view of ``weight`` with the channels that the norm scales in front: shape (groups, C/groups, …).

        The channels lie in the order in which :meth:`axis` counts them.
        """

    def weight(self, weight: Tensor, affine: Affine, op: Op) -> Tensor:
        """The weight with its channels scaled: same shape and layout as ``weight``, float64."""
        scaled = weight.clone(memory_format=torch.preserve_format)
        seen = self.channels(scaled, op)
        seen.mul_(affine.scale.reshape(*seen.shape[:2], *(1,) * (seen.dim() - 2)))
        return scaled

    def bias(self, bias: Tensor | None, weight: Tensor, affine: Affine, op: Op) -> Tensor:
        """The bias that goes with it, by the ``weight`` before: scale·bias + shift, shape (C,), float64."""
        return affine.shift if bias is None else affine.scale * bias + affine.shift


class ForwardFold(Fold):
    """A norm in front of a layer: W∗(a·x + b) = (W·a)∗x + Σ W·b, where each output sees the whole of the kernel."""

    forward: ClassVar[bool] = True

    def bias(self, bias: Tensor | None, weight: Tensor, affine: Affine, op: Op) -> Tensor:
        """bias + Σ over the inputs and the kernel of weight·shift.

        :meth:`channels` puts the output channels of a group third: (groups, C/groups, O/groups, …).
        """
        seen = self.channels(weight, op)
        kernels = seen.flatten(3).sum(3) if seen.dim() > 3 else seen
        added = (kernels * affine.shift.reshape(*seen.shape[:2], 1)).sum(1).reshape(-1)
        return added if bias is None else bias + added


def unbatched(op: Op, weight_shape: tuple[int, ...]) -> str | None:
    """A reason where a convolution runs on one sample without a batch axis."""
    if op.shape is None or len(op.shape) != len(weight_shape):
        return f"{op.site} runs without a batch dimension: the norm's channels are not its channels"
    return None
