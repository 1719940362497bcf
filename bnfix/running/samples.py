"""The samples of a batch: counted, cut, put together, looked at; and whether a loader gives them twice."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bnfix.running.call import Call, movable


def size(call: Call) -> int | None:
    """How many samples ``call`` holds along the first axis of its tensors; None where it can't be cut into samples.

    That takes a call without ``forward=`` whose arguments are tensors with one common first dimension, beside values
    that hold no tensors. A list of images has none: there the first axis is the channel. Nor have opaque
    objects. Whether the model treats samples alike and apart is not known here (an adjacency matrix and its nodes
    share their first axis as well).
    """
    values = [*call.args, *call.kwargs.values()]
    tensors = [v for v in values if isinstance(v, Tensor)]
    if call.forward is not None or not tensors or len(tensors) != len(call.tensors()):
        return None
    if any(movable(v) for v in values) or any(t.is_nested or t.layout != torch.strided or not t.dim() for t in tensors):
        return None
    counts = {t.shape[0] for t in tensors}
    return counts.pop() if len(counts) == 1 else None


def count(call: Call) -> int:
    """How many samples ``call`` holds, as far as that can be told where it can't be cut into them; 1 at least of what
    holds no tensors.

    A list of images (C, H, W), or of records that hold tensors, is as many as it has elements; of anything else it is
    the first axis of the first tensor. With ``forward=`` the argument is a whole batch, which may hold such a list.
    """
    exact = size(call)
    if exact is not None:
        return exact
    values = [*call.args, *call.kwargs.values()]
    if call.forward is not None and len(values) == 1:
        (batch,) = values
        if isinstance(batch, (list, tuple)) and not (len(batch) > 1 and _are_images(batch)):
            values = list(batch)
        elif isinstance(batch, Mapping):
            values = list(batch.values())
    for value in values:
        tensors = Call((value,)).tensors()
        if not tensors:
            continue
        if isinstance(value, (list, tuple)) and (_are_records(value) or all(_is_image(v) for v in value)):
            return len(value)
        first = next((t for t in tensors if t.dim()), None)
        if first is not None:
            return first.shape[0]
    return 1


def _are_records(values: Sequence[Any]) -> bool:
    return all(isinstance(v, Mapping) for v in values)


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and not value.is_nested


def _are_images(values: Sequence[Any]) -> bool:
    """Whether a flat sequence of tensors is a list of images, not a batch of several inputs (N, T, F): by channels."""
    return all(_is_image(v) for v in values) and len({v.shape[0] for v in values} | {1, 3, 4}) == 3


def split(call: Call, at: Sequence[int]) -> list[Call]:
    """``call`` cut before the samples ``at``, ``[32, 64]`` into three: views, nothing is copied.

    Raises:
        ValueError: it can't be cut (:func:`size` is None), or ``at`` does not rise between 0 and its size.
    """
    count = size(call)
    if count is None:
        raise ValueError(f"a call {call.signature} has no samples to cut between")
    edges = [0, *at, count]
    if any(a >= b for a, b in itertools.pairwise(edges)):
        raise ValueError(f"{count} samples can't be cut at {list(at)}")
    return [call.map(lambda t, a=a, b=b: t.narrow(0, a, b - a)) for a, b in itertools.pairwise(edges)]  # type: ignore[misc]


def join(calls: Sequence[Call]) -> Call | None:
    """The samples of all ``calls`` in one; None where they differ in anything but the number of samples."""
    if not calls or any(size(call) is None for call in calls):
        return None
    first, *others = calls
    if not others:
        return first
    if any(len(c.args) != len(first.args) or c.kwargs.keys() != first.kwargs.keys() for c in others):
        return None
    args = [_joined([c.args[i] for c in calls]) for i in range(len(first.args))]
    kwargs = {k: _joined([c.kwargs[k] for c in calls]) for k in first.kwargs}
    if any(v is _APART for v in (*args, *kwargs.values())):
        return None
    return replace(first, args=tuple(args), kwargs=kwargs)


_APART = object()
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def _joined(values: Sequence[Any]) -> Any:
    first, *others = values
    if isinstance(first, Tensor):
        kinds = {(t.dtype, t.device, t.shape[1:]) if isinstance(t, Tensor) else None for t in values}
        return torch.cat(list(values)) if len(kinds) == 1 else _APART
    same = all(v is first or (isinstance(first, _PLAIN) and type(v) is type(first) and v == first) for v in others)
    return first if same else _APART


def check_finite(call: Call) -> str | None:
    """The name of the first floating tensor of ``call`` that holds NaN or Inf: ``input 0``, ``input mask``; else None.

    A tensor of 0 and −inf alone is an additive mask, and meant so. One sum a tensor, since NaN and Inf survive it;
    only where that is not finite (it may have overflowed), element by element.
    """
    named = [*((str(i), v) for i, v in enumerate(call.args)), *call.kwargs.items()]
    for name, value in named:
        for tensor in Call((value,)).tensors():
            if tensor.is_floating_point() and any(_is_broken(part) for part in _parts(tensor)):
                return f"input {name}"
    return None


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    if tensor.is_nested:
        return tensor.unbind()
    if tensor.layout == torch.sparse_coo:
        return (tensor._values(),)
    return (tensor,) if tensor.layout == torch.strided else (tensor.to_dense(),)


def _is_broken(tensor: Tensor) -> bool:
    tensor = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()  # 8 bits: no sum
    if tensor.sum().isfinite():
        return False
    finite = tensor.isfinite()
    return not bool(finite.all()) and not bool(((tensor == 0) | (tensor == -torch.inf)).all())


def replayable(data: Iterable[Any]) -> bool:
    """Whether going through ``data`` a second time starts anew: lists and loaders, not iterators and generators.

    Nothing is started to find out: what has a ``__next__`` is its own iterator. A DataLoader is what its dataset is. An
    object that hands out one and the same iterator each time can't be told from outside: its second pass is empty.
    """
    if isinstance(data, torch.utils.data.DataLoader):
        return not isinstance(data.dataset, torch.utils.data.IterableDataset) or replayable(data.dataset)
    return not hasattr(data, "__next__")
