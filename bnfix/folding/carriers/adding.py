"""A sum of values: a·(x + y) + b = (a·x + b) + a·y, the scale goes to each term and the shift to one of them."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from bnfix.folding.carrier import Carrier, Ops, Pull, short
from bnfix.folding.fold import Example
from bnfix.types import Op


class _Branches(nn.Module):
    """Two layers, added, then normalised; ``shared`` calls the first twice."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = self.one if shared else nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.one(x) + self.two(x.relu()))
        return out


class Adding(Carrier):
    """``x + y`` of one shape."""

    targets: ClassVar[frozenset[str]] = frozenset({"add", "add_"})
    examples: ClassVar[tuple[Example, ...]] = (
        Example("two branches", lambda: _Branches(shared=False), (2, 3, 6, 6)),
        Example("one layer twice", lambda: _Branches(shared=True), (2, 3, 6, 6), 0),
    )

    def back(self, op: Op, labels: Tensor, ops: Ops) -> list[Pull] | str:
        """The shift goes to the first term."""
        terms = [op.reads.get("self"), op.reads.get("other")]
        if None in terms or op.tensors or op.attrs.get("alpha", 1) != 1 or terms[0] == terms[1]:
            return f"{short(op)} adds something else than two values"
        found = [t for t in terms if t is not None]
        if any(ops(t).shape != op.shape or ops(t).dtype != op.dtype for t in found):
            return f"{short(op)} adds values of different shapes or dtypes"
        return [Pull(t, labels, shift=number == 0) for number, t in enumerate(found)]
