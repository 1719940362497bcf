"""Operations that move values and change none: the labels go through the operation itself.

Backward, every element of the inputs gets a number, the operation moves the numbers, and what stands at a place of
the output tells where it came from. An element that comes to stand in two channels of the norm has no one label.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Sequential as net  # noqa: N813  # read as what it makes

from bnfix.folding.carrier import NONE, Carrier, Ops, Pull, short
from bnfix.folding.fold import Example
from bnfix.types import Op

_VIEWS = (
    "view reshape _unsafe_view view_as reshape_as flatten ravel unflatten contiguous clone alias detach detach_ "
    "lift_fresh"
)
_AXES = "transpose permute t mT numpy_T movedim moveaxis swapaxes swapdims squeeze unsqueeze"
_PARTS = "slice select narrow chunk split split_with_sizes unsafe_split unsafe_chunk tensor_split unbind getitem"
_ORDER = "cat concat concatenate stack hstack vstack flip roll rot90 expand expand_as repeat repeat_interleave unfold"
_IMAGES = (
    "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle reflection_pad1d reflection_pad2d "
    "reflection_pad3d replication_pad1d replication_pad2d replication_pad3d _pad_circular upsample_nearest1d "
    "upsample_nearest2d upsample_nearest3d"
)
_DROPOUT = "dropout dropout_ feature_dropout alpha_dropout feature_alpha_dropout"
_PADS = "pad constant_pad_nd"
_SETTINGS = ("memory_format", "dtype", "layout", "device", "pin_memory", "non_blocking", "copy", "implicit")
SPLITS = frozenset(["chunk", "split", "split_with_sizes", "unsafe_split", "unsafe_chunk", "tensor_split", "unbind"])
"""Those that return several values."""


class _Unknown(Exception):  # noqa: N818  # not an error: the reason that is handed on
    """Why an operation can't be run on labels."""


class Moving(Carrier):
    """Views, transpositions, slices, concatenations, shuffles, padding that repeats values, dropout that is off."""

    targets: ClassVar[frozenset[str]] = frozenset(
        f"{_VIEWS} {_AXES} {_PARTS} {_ORDER} {_IMAGES} {_DROPOUT} {_PADS} to".split()
    )
    examples: ClassVar[tuple[Example, ...]] = (
        Example("dropout", lambda: net(nn.Conv2d(3, 6, 3), nn.Dropout(0.3), nn.BatchNorm2d(6)), (2, 3, 7, 6)),
        Example("flatten", lambda: net(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.BatchNorm1d(6)), (2, 3, 3, 3)),
        Example(
            "flatten of pixels", lambda: net(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.BatchNorm1d(24)), (2, 3, 4, 4), 0
        ),
        Example(
            "reflection",
            lambda: net(nn.Conv2d(3, 6, 3), nn.ReflectionPad2d(1), nn.BatchNorm2d(6)),
            (2, 3, 7, 6),
        ),
        Example("zeros", lambda: net(nn.Conv2d(3, 6, 3), nn.ZeroPad2d(1), nn.BatchNorm2d(6)), (2, 3, 7, 6), 0),
        Example(
            "shuffle",
            lambda: net(nn.Conv2d(3, 8, 3), nn.ChannelShuffle(2), nn.BatchNorm2d(8)),
            (2, 3, 7, 6),
        ),
        Example(
            "pixels from channels",
            lambda: net(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.BatchNorm2d(2)),
            (2, 3, 7, 6),
        ),
    )

    def back(self, op: Op, labels: Tensor, ops: Ops) -> list[Pull] | str:
        """Number the elements of all inputs, and see where each element of the output came from."""
        sources = origins(op, ops)
        offset = 0
        numbers: dict[int, Tensor] = {}
        spans: list[tuple[int, int, tuple[int, ...]]] = []
        for index in dict.fromkeys(sources):
            shape = ops(index).shape
            if shape is None or ops(index).dtype != op.dtype:
                return (
                    f"{short(op)} changes the dtype" if shape is not None else f"the input of {short(op)} has no shape"
                )
            count = _numel(shape)
            numbers[index] = torch.arange(offset, offset + count).reshape(shape)
            spans.append((index, offset, shape))
            offset += count
        try:
            moved = move(op, lambda i: numbers[i], ops)
        except _Unknown as reason:
            return str(reason)
        if moved.shape != labels.shape:
            return f"{short(op)} gives another shape than it was traced with"
        found = torch.full((offset,), NONE, dtype=labels.dtype)
        meant = labels >= 0
        found[moved[meant]] = labels[meant]
        if not torch.equal(found[moved[meant]], labels[meant]):
            return f"{short(op)} lets the same values stand in different channels of it"
        pulls = [Pull(i, found[at : at + _numel(shape)].reshape(shape)) for i, at, shape in spans]
        return [p for p in pulls if bool((p.labels >= 0).any())]

    def ahead(self, op: Op, index: int, labels: Tensor, ops: Ops) -> Tensor | str:
        """The labels themselves go through the operation."""
        if ops(index).dtype != op.dtype and op.shape is not None:
            return f"{short(op)} changes the dtype"

        def value(i: int) -> Tensor:
            if i == index:
                return labels
            shape = ops(i).shape
            if shape is None:
                raise _Unknown(f"the input of {short(op)} has no shape")
            return torch.full((1,), NONE, dtype=labels.dtype).expand(shape)

        try:
            return move(op, value, ops)
        except _Unknown as reason:
            return str(reason)


def origins(op: Op, ops: Ops) -> tuple[int, ...]:
    """The values that an operation moves: of one part of a split those that were split."""
    if op.target == "getitem":
        return ops(op.inputs[0]).inputs
    return (op.reads["self"],) if "other" in op.reads and "self" in op.reads else op.inputs


def move(op: Op, value: Callable[[int], Tensor], ops: Ops) -> Tensor:
    """Run the operation on other values of the same shapes.

    Raises:
        _Unknown: it does more than moving, or what it was called with isn't known.
    """
    if op.target == "getitem":
        parts = _run(ops(op.inputs[0]), value)
        return _tensor(parts[int(op.attrs["#1"])], op)
    return _tensor(_run(op, value), op)


def _tensor(value: Any, op: Op) -> Tensor:
    if not isinstance(value, Tensor):
        raise _Unknown(f"{short(op)} gives several values")
    return value


def _run(op: Op, value: Callable[[int], Tensor]) -> Any:
    name = short(op)
    if name not in Moving.targets:  # sorting, say, of which a part is taken
        raise _Unknown(f"{name} does more than moving values")
    if name.endswith("_as") and op.shape is not None:  # the other value lends its shape alone
        moved = value(op.reads["self"])
        return moved.expand(op.shape) if name == "expand_as" else moved.reshape(op.shape)
    if name in _DROPOUT.split():
        if op.attrs.get("train", True):
            raise _Unknown(f"{name} is active")
        return value(op.inputs[0])
    if name == "to":
        return value(op.inputs[0])
    zeros = name == "constant_pad_nd" or (name == "pad" and op.attrs.get("mode") == "constant")
    if zeros and any(int(p) > 0 for p in op.attrs.get("pad", (1,))):
        beside = op.attrs.get("value") or 0
        raise _Unknown(f"{name} puts {beside:g} beside the values, which the norm then normalises")
    if op.tensors or not op.target.startswith("aten."):
        raise _Unknown(f"{name} reads a tensor of the model's own")
    function = getattr(getattr(torch.ops.aten, name), op.target.split(".")[2])
    arguments: dict[str, Any] = {}
    for parameter in function._schema.arguments:
        kind = str(parameter.type)
        if kind == "Tensor":
            if parameter.name not in op.reads or op.inputs != (op.reads[parameter.name],):
                raise _Unknown(f"{name} reads something else than one value")
            arguments[parameter.name] = value(op.reads[parameter.name])
        elif kind == "List[Tensor]":
            arguments[parameter.name] = [value(i) for i in op.inputs]
        elif "Tensor" in kind and parameter.name in op.reads:
            raise _Unknown(f"{name} reads something else than one value")
        elif parameter.name in _SETTINGS:
            continue
        elif parameter.name in op.attrs:
            given = op.attrs[parameter.name]
            arguments[parameter.name] = list(given) if isinstance(given, tuple) else given
        elif not parameter.has_default_value():
            raise _Unknown(f"{name} is given a {parameter.name} that is computed in the forward")
    if any(isinstance(v, str) and p != "mode" for p, v in arguments.items()):
        raise _Unknown(f"{name} is given something that is computed in the forward")
    first = next(p.name for p in function._schema.arguments)
    try:
        return function(arguments.pop(first), **arguments)
    except NotImplementedError:  # padding is written for floating-point numbers alone; float64 holds the labels exactly
        pass
    except RuntimeError as error:
        if "not implemented for" not in str(error):
            raise _Unknown(f"{name} can't be followed: {error}") from error
    result = function(value(op.inputs[0]).double(), **arguments)
    return _tensor(result, op).to(torch.int64)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
