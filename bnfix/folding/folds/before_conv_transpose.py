"""Norm → transposed convolution with a kernel of one pixel: each output sees one input.

With larger kernels or strides some outputs see parts of the kernel only, at the borders at least: the shift would have
to differ from place to place.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import Sequential as net  # noqa: N813  # read as what it makes

from bnfix.folding.fold import Example, ForwardFold, unbatched
from bnfix.types import Op


class BeforeConvTranspose(ForwardFold):
    """Weight (I, O/groups, 1, …): scaled along its first axis."""

    kinds: ClassVar[frozenset[str]] = frozenset({"conv_transpose"})
    examples: ClassVar[tuple[Example, ...]] = (
        Example("one pixel", lambda: net(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2)), (2, 4, 4, 5)),
        Example("larger", lambda: net(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 2, stride=2)), (2, 4, 4, 5), 0),
        Example("strided", lambda: net(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, stride=2)), (2, 4, 4, 5), 0),
    )

    def refuse(self, op: Op, weight_shape: tuple[int, ...]) -> str | None:
        """Kernel 1, stride 1, nothing added and nothing cut off."""
        zero = [*_numbers(op.attrs.get("padding", 0)), *_numbers(op.attrs.get("output_padding", 0))]
        if (
            any(s != 1 for s in weight_shape[2:])
            or any(s != 1 for s in _numbers(op.attrs.get("stride", 1)))
            or any(zero)
        ):
            return f"{op.site} has outputs that don't see the whole of its kernel"
        return unbatched(op, weight_shape)

    def axis(self, op: Op) -> int:
        """(N, C, *positions)."""
        return 1

    def channels(self, weight: Tensor, op: Op) -> Tensor:
        """(I, O/g, …) → (g, I/g, O/g, …)."""
        groups = int(op.attrs.get("groups", 1))
        return weight.view(groups, -1, *weight.shape[1:])


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple) else (int(value),) if isinstance(value, int) else (1,)
