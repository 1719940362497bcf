"""What ranks say at the beginning of each exchange, in 75 integers whatever it is."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnfix.errors import BnfixError, one_line

_NUMBERS = 8
_TEXT = 512
"""Bytes of a failure's text."""


class Kind(enum.IntEnum):
    """What a rank is about to exchange; FAILED: nothing any more."""

    FAILED = 0
    JOIN = 1
    NUMBERS = 2
    MOMENTS = 3
    OBJECT = 4
    AGREE = 5
    CLOSE = 6


@dataclass(frozen=True)
class Head:
    """``size`` bytes follow it, ``values`` are at most eight integers, ``text`` says what failed."""

    kind: Kind
    size: int = 0
    values: Sequence[int] = ()
    text: str = ""

    @staticmethod
    def of(error: BaseException) -> Head:
        """That this rank has failed."""
        return Head(Kind.FAILED, text=error.message if isinstance(error, BnfixError) else one_line(error))

    def packed(self) -> Tensor:
        """As integers, shape (75,); a long text is cut."""
        text = self.text.encode()[:_TEXT].decode(errors="ignore").encode().ljust(_TEXT, b"\0")
        count = len(self.values)
        numbers = [self.kind, self.size, count, *self.values, *(0 for _ in range(_NUMBERS - count))]
        return torch.cat((torch.tensor(numbers), torch.frombuffer(bytearray(text), dtype=torch.int64)))

    @staticmethod
    def unpack(said: Tensor) -> Head:
        """What ``packed`` packed."""
        kind, size, count, *values = said[: 3 + _NUMBERS].tolist()
        text = said[3 + _NUMBERS :].contiguous().numpy().tobytes() if kind == Kind.FAILED else b""
        return Head(Kind(kind), size, tuple(values[:count]), text.rstrip(b"\0").decode(errors="replace"))
