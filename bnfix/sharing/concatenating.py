"""Several calls of one network as one call, and its output as several again: along the first axis, never by a guess."""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnfix.running import Call, as_call

Check = Callable[[str, Tensor], None]
"""Looks at one tensor of an output, by its place in it; raises where its first axis is not that of the batch."""

_SAME_FOR_ALL = (type(None), bool, str, bytes, enum.Enum, torch.dtype, torch.device)


def as_calls(given: Sequence[Any]) -> list[Call]:
    """Each of ``given`` as a call: a tensor, a tuple of positional arguments, a dict of keyword arguments, a Call.

    Raises:
        ValueError: there is none; they are called in different ways.
        TypeError: one of them is nothing that a network is called with.
    """
    if not given:
        raise ValueError("joint(net)() needs the inputs of at least one call: joint(net)(a, p, n)")
    calls = [as_call(one) for one in given]
    if any(c.forward is not calls[0].forward for c in calls):
        raise ValueError("the calls differ in forward=: one joint call runs the network in one way")
    return calls


def concatenated(calls: Sequence[Call]) -> tuple[Call, tuple[int, ...]]:
    """One call with the samples of all ``calls`` one behind the other, and how many each has.

    Of each call, the first axis of its first tensor is the batch, and every tensor as long along its first axis is
    concatenated: shapes (B₁, …), (B₂, …) → (B₁ + B₂, …). A tensor that is no batch (a temperature, a table of
    positions) goes along as it is where all calls hold one and the same object. What is no tensor has to be equal in
    all calls.

    Raises:
        ValueError: the calls differ in their arguments, in what is no tensor, in trailing shape, dtype or device, or
            some of their tensors were made in inference mode; a tensor is neither a batch nor the same for all. Names
            the argument and the calls.
    """
    sizes = _sizes(calls)
    first = calls[0]
    for number, call in enumerate(calls[1:], 1):
        if len(call.args) != len(first.args) or call.kwargs.keys() != first.kwargs.keys():
            raise ValueError(
                f"calls 0 and {number} take different arguments: {first.signature} and {call.signature}; one forward "
                "takes the same arguments for all"
            )
    args = [_joined([c.args[i] for c in calls], f"argument {i}", sizes) for i in range(len(first.args))]
    kwargs = {k: _joined([c.kwargs[k] for c in calls], f"argument {k}", sizes) for k in first.kwargs}
    return replace(first, args=tuple(args), kwargs=kwargs), sizes


def parted(output: Any, sizes: Sequence[int], check: Check) -> tuple[Any, ...]:
    """``output`` of the concatenation as one output for each call: tensors are cut along their first axis, as views.

    Tuples, namedtuples, lists, mappings and dataclasses (``ModelOutput`` and its like) are taken apart and put together
    again. What is no number (None, a string, a flag) goes to each call.

    Raises:
        ValueError: a tensor's first axis is not the batch, or something in the output can't be divided among calls.
    """
    return tuple(_parts(output, sizes, "the output", check))


def _sizes(calls: Sequence[Call]) -> tuple[int, ...]:
    sizes = []
    per_call = [call.tensors() for call in calls]
    for number, tensors in enumerate(per_call):
        held = [{id(t) for t in other} for other in per_call]
        batches = [t for t in tensors if t.dim()]
        own = [t for t in batches if len(calls) == 1 or not all(id(t) in ids for ids in held)]
        if not batches:
            raise ValueError(f"call {number} holds no tensor with a batch: {calls[number].signature}")
        sizes.append((own or batches)[0].shape[0])
    return tuple(sizes)


def _joined(values: Sequence[Any], where: str, sizes: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, Tensor) and all(isinstance(v, Tensor) for v in values):
        return _cat(values, where, sizes)
    for number, value in enumerate(values[1:], 1):
        if type(value) is not type(first):
            raise ValueError(f"{where} is {_named(first)} in call 0 and {_named(value)} in call {number}")
    if isinstance(first, Mapping):
        for number, value in enumerate(values[1:], 1):
            if value.keys() != first.keys():
                raise ValueError(f"{where} has other keys in call {number} than in call 0")
        return _filled(first, {k: _joined([v[k] for v in values], f"{where}[{k!r}]", sizes) for k in first}, where)
    if isinstance(first, (tuple, list)) and _is_plain_sequence(first):
        for number, value in enumerate(values[1:], 1):
            if len(value) != len(first):
                raise ValueError(f"{where} has {len(first)} elements in call 0 and {len(value)} in call {number}")
        joined = [_joined([v[i] for v in values], f"{where}[{i}]", sizes) for i in range(len(first))]
        return _like(first, joined)
    if is_dataclass(first) and not isinstance(first, type):
        names = [f.name for f in fields(first)]
        return _filled(
            first, {n: _joined([getattr(v, n) for v in values], f"{where}.{n}", sizes) for n in names}, where
        )
    for number, value in enumerate(values[1:], 1):
        if value is not first and not _equal(first, value):
            raise ValueError(
                f"{where} differs between call 0 ({_named(first)}) and call {number} ({_named(value)}): "
                "one forward has one value for all"
            )
    return first


def _cat(tensors: Sequence[Tensor], where: str, sizes: Sequence[int]) -> Tensor:
    first = tensors[0]
    batched = [t.dim() > 0 and t.shape[0] == size for t, size in zip(tensors, sizes, strict=True)]
    if not all(batched):
        if all(t is first for t in tensors):
            return first
        number = batched.index(False)
        raise ValueError(
            f"{where} of call {number} is {_shape(tensors[number])}, its batch has {sizes[number]} samples: along "
            "which axis should it be concatenated? What is the same for all calls has to be one and the same object"
        )
    for number, tensor in enumerate(tensors):
        if tensor.layout != torch.strided or tensor.is_nested:
            raise ValueError(f"{where} of call {number} is a sparse or nested tensor: it can't be concatenated")
        for what, mine, other in (
            ("shape behind the batch", tuple(first.shape[1:]), tuple(tensor.shape[1:])),
            ("dtype", first.dtype, tensor.dtype),
            ("device", first.device, tensor.device),
        ):
            if mine != other:
                raise ValueError(f"{where} has {what} {mine} in call 0 and {other} in call {number}")
    if not torch.compiler.is_compiling():
        modes = [t.is_inference() for t in tensors]
        if len(set(modes)) > 1:
            number = modes.index(not modes[0])
            raise ValueError(
                f"{where} was made under inference_mode in call {modes.index(True)} and not in call "
                f"{number if modes[number] is False else 0}: one forward has one grad mode"
            )
    return torch.cat(list(tensors))


def _parts(value: Any, sizes: Sequence[int], where: str, check: Check) -> list[Any]:
    if isinstance(value, Tensor):
        check(where, value)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [value.narrow(0, start, size) for start, size in zip(starts, sizes, strict=True)]
    if isinstance(value, _SAME_FOR_ALL):
        return [value for _ in sizes]
    if isinstance(value, Mapping):
        columns = {k: _parts(v, sizes, f"{where}[{k!r}]", check) for k, v in value.items()}
        return [_filled(value, {k: c[i] for k, c in columns.items()}, where) for i in range(len(sizes))]
    if isinstance(value, (tuple, list)) and _is_plain_sequence(value):
        listed = [_parts(v, sizes, f"{where}[{i}]", check) for i, v in enumerate(value)]
        return [_like(value, [c[i] for c in listed]) for i in range(len(sizes))]
    if is_dataclass(value) and not isinstance(value, type):
        columns = {f.name: _parts(getattr(value, f.name), sizes, f"{where}.{f.name}", check) for f in fields(value)}
        return [_filled(value, {k: c[i] for k, c in columns.items()}, where) for i in range(len(sizes))]
    raise ValueError(
        f"{where} is {_named(value)}: nobody can tell which of it belongs to which call. Leave it out of the output, "
        "or say how the output is divided: joint(net, split=lambda output, sizes: ...)"
    )


def _is_plain_sequence(value: Any) -> bool:
    """Whether its elements are all there is to it: a PackedSequence is a namedtuple with the batch elsewhere."""
    return not isinstance(value, (torch.nn.utils.rnn.PackedSequence, torch.Size))


def _like(sequence: Any, items: Sequence[Any]) -> Any:
    if hasattr(sequence, "_fields"):
        return type(sequence)(*items)
    return type(sequence)(items)


def _filled(value: Any, items: Mapping[Any, Any], where: str) -> Any:
    """A mapping or dataclass like ``value`` with other items; its class keeps what else it has."""
    if type(value) is dict:
        return dict(items)
    try:
        new = copy.copy(value)
        for key, item in items.items():
            if isinstance(new, Mapping):
                new[key] = item  # type: ignore[index]
            else:
                object.__setattr__(new, key, item)  # a frozen dataclass too
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{where} is {_named(value)}, of which no second one can be made: {error}") from error
    return new


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # arrays and objects whose comparison is no bool
        return False


def _named(value: Any) -> str:
    if isinstance(value, (bool, int, float, complex, str, type(None))):
        return repr(value) if len(repr(value)) < 40 else f"a {type(value).__name__}"
    return f"a {type(value).__name__}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
