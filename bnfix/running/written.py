"""Weights that a forward writes to: kept in the moment before, since copies of all would cost as much as the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnfix.graph.writing import Saved

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

_IN_PLACE = frozenset(
    f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "ior",
                               "iand", "ixor", "ilshift", "irshift")
)  # fmt: skip
_LOOKS_UP = frozenset({F.embedding, F.embedding_bag})
"""Functions that scale rows of the weight they look up, where ``max_norm`` is given."""


class Kept:
    """Values of ``tensors``, each copied when something is first about to write to its memory.

    Written through NumPy or by code that PyTorch does not see, they are not.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._whole: dict[int, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            self._whole[_memory(tensor)].append(tensor)
        self.values: list[Saved] = []

    def before(self, written: Tensor) -> None:
        """Something writes to this tensor next."""
        for tensor in self._whole.pop(_memory(written), ()):
            self.values.append(Saved.of(tensor))

    def __enter__(self) -> Kept:
        _ACTIVE.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Keep no more; a second time does nothing."""
        if self in _ACTIVE:
            _ACTIVE.remove(self)


_ACTIVE: list[Kept] = []


def may_write(func: Any) -> bool:
    """Whether a function of torch's may write to what it is given (but for ``out=``)."""
    name = getattr(func, "__name__", "")
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return in_place or func in _LOOKS_UP or _mutable(func)


def keep(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """To be called before ``func(*args, **kwargs)`` of a function that :func:`may_write`, or with an ``out``."""
    if _ACTIVE:
        for tensor in _written(func, args, kwargs):
            for kept in _ACTIVE:
                kept.before(tensor)


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    if func in _LOOKS_UP:
        yield from _tensors(args[1:2] or (kwargs.get("weight"),))
    elif _mutable(func):  # its schema says more than is worth reading: a copy too many does no harm
        yield from _tensors((*args, *kwargs.values()))
    elif may_write(func):
        yield from _tensors(args[:1] or tuple(kwargs.values()))
    yield from _tensors((kwargs.get("out"),))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and value.layout is torch.strided and not _is_wrapped(value):
            yield value


def _mutable(func: Any) -> bool:
    if isinstance(func, torch._ops.OpOverloadPacket):
        return any(_mutable(getattr(func, name)) for name in func.overloads())  # type: ignore[no-untyped-call]
    return isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
