"""The one form of an input: what a model is called with."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import FunctionType, GeneratorType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of one forward, and how the model is called with them.

    With ``forward`` the model is not called directly but as ``forward(model, *args)``: the user's
    own way of feeding a batch to it.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    forward: Forward | None = None

    def run(self, model: nn.Module) -> Any:
        """Call ``model`` with copies of these inputs: a forward that works in place does not change the user's.

        Objects are copied too, arrays and graphs with all that is in them. Mode and grad mode are as they are.
        """
        return self.private().apply(model)

    def private(self, copied: Callable[[Tensor], Tensor] | None = None) -> Call:
        """The same call with copies of all inputs; those of tensors are made by ``copied``."""
        copied = copied or _cloned
        return replace(
            self,
            args=map_tensors(self.args, copied, other=_copied),
            kwargs=map_tensors(dict(self.kwargs), copied, other=_copied),
        )

    def apply(self, model: nn.Module) -> Any:
        """Call ``model`` with these very inputs."""
        if self.forward is not None:
            found = self.forward(model, *self.args, **self.kwargs)
            return list(found) if isinstance(found, GeneratorType) else found  # it has not run a line yet
        return model(*self.args, **self.kwargs)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same call with every tensor in it replaced by ``change(tensor)``."""
        return replace(self, args=map_tensors(self.args, change), kwargs=map_tensors(dict(self.kwargs), change))

    def tensors(self) -> list[Tensor]:
        """Every tensor among the inputs, in order."""
        found: list[Tensor] = []
        self.map(lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors among the inputs."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @property
    def signature(self) -> str:
        """Shapes and types for a reader, such as ``2x3x224x224`` or ``(1x3x8x8, mask=1x8 bool)``."""
        parts = [describe(a) for a in self.args]
        parts += [f"{k}={describe(v)}" for k, v in self.kwargs.items()]
        return parts[0] if len(parts) == 1 and not self.kwargs else f"({', '.join(parts)})"


def as_call(example: Any, forward: Forward | None = None) -> Call:
    """``example`` as a Call: a tensor, a tuple of positional arguments, a dict of keyword arguments, or a Call.

    With ``forward`` the whole example is the one batch that ``forward(model, batch)`` receives.
    """
    if isinstance(example, Call):
        return example if forward is None else replace(example, forward=forward)
    if forward is not None:
        return Call((example,), forward=forward)
    if isinstance(example, Tensor):
        return Call((example,))
    if isinstance(example, tuple):
        return Call(tuple(example))
    if isinstance(example, Mapping):
        if not all(isinstance(k, str) for k in example):
            raise TypeError("an example given as a dict holds keyword arguments: its keys must be strings")
        return Call((), dict(example))
    raise TypeError(
        f"an example is a tensor, a tuple of positional arguments, a dict of keyword arguments or a bnfix.Call, "
        f"not {type(example).__name__}"
    )


def fit_call(call: Call, model: nn.Module) -> Call:
    """``call`` on the device of the model, floating tensors in float32 in the dtype of its parameters.

    Device and dtype are those of the first floating parameter in the order of registration (of the first buffer where
    there is none). In a model of mixed precision, half convolutions and float32 norms, this is the type of the layers
    that see the input first. Integers and other floating types keep theirs: a float64 input is somebody's intention.
    Objects with a ``to`` of their own are moved by it, a shallow copy of them, and keep their dtype.
    """
    like = home(model)
    if like is None:
        return call

    def fit(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype if tensor.dtype == torch.float32 else tensor.dtype)

    def move(value: Any) -> Any:
        copied = copy.copy(value)
        moved = copied.to(like.device)
        return copied if moved is None else moved  # some move themselves, and return nothing

    return replace(call, args=map_tensors(call.args, fit, move), kwargs=map_tensors(dict(call.kwargs), fit, move))


def home(model: nn.Module) -> Tensor | None:
    """The tensor that says on which device and in which floating dtype ``model`` works; None if it has none."""
    tensors = itertools.chain(model.parameters(), model.buffers())  # the first will do: not all are looked up
    return next((t for t in tensors if t.is_floating_point()), None)


def movable(value: Any) -> bool:
    """Whether ``value`` is an object of inputs that moves itself: a BatchEncoding, a graph, a PackedSequence."""
    return not isinstance(value, (Tensor, nn.Module, type)) and callable(getattr(value, "to", None))


def map_tensors(
    value: Any,
    change: Callable[[Tensor], Tensor],
    move: Callable[[Any], Any] | None = None,
    other: Callable[[Any], Any] | None = None,
) -> Any:
    """``value`` with every tensor in its nested tuples, lists, dicts and dataclasses replaced.

    Of a PackedSequence the data are replaced; its sizes are bookkeeping and have to stay on the CPU. Other objects
    with a ``to`` of their own (:func:`movable`) become ``move(object)`` where that is given, whatever is none of all
    this ``other(value)``.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedSequence):
        data = change(value.data)
        return value.to(device=data.device)._replace(data=data)  # type: ignore[call-arg]
    if move is not None and movable(value):
        return move(value)
    if isinstance(value, (tuple, list)):
        return _like_sequence(value, [map_tensors(v, change, move, other) for v in value])
    if isinstance(value, Mapping):
        return _like_mapping(value, {k: map_tensors(v, change, move, other) for k, v in value.items()})
    if is_dataclass(value) and not isinstance(value, type):
        return _with_values(value, lambda v: map_tensors(v, change, move, other))
    return value if other is None else other(value)


def _like_sequence(value: Any, items: list[Any]) -> Any:
    """``items`` in a sequence of the kind of ``value``, whatever its constructor takes."""
    kind = type(value)
    if kind is list:
        return items
    if isinstance(value, list):
        made = copy.copy(value)  # with what else it holds
        made[:] = items
        return made
    if hasattr(value, "_make"):
        return value._make(items)
    try:
        return kind(items)
    except TypeError:  # a constructor of its own
        return tuple.__new__(kind, items)


def _like_mapping(value: Any, items: dict[Any, Any]) -> Any:
    """``items`` in a mapping of the kind of ``value``; in a dict where its constructor takes something else."""
    if type(value) is dict:
        return items
    if hasattr(value, "batch_size"):  # a TensorDict would forget how many of its axes are samples
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return type(value)(items, batch_size=value.batch_size)
    try:
        return type(value)(value.default_factory, items) if isinstance(value, defaultdict) else type(value)(items)
    except TypeError:
        return items


def _with_values(value: Any, change: Callable[[Any], Any]) -> Any:
    """A shallow copy with ``change(attribute)`` for each attribute. No constructor runs: it would compute them anew."""
    made = copy.copy(value)
    slots = (f.name for f in fields(value)) if is_dataclass(value) else ()
    for name in dict.fromkeys((*slots, *getattr(value, "__dict__", ()))):
        if hasattr(value, name):
            object.__setattr__(made, name, change(getattr(value, name)))  # frozen ones too
    return made


def _cloned(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _copied(value: Any) -> Any:
    """A deep copy; of an object that can't be copied so (it holds a lock), one with copies of what it holds.

    The value itself where it is immutable, or can't be copied at all.
    """
    if isinstance(value, (str, bytes, int, float, complex, type(None), type, FunctionType, ModuleType, nn.Module)):
        return value
    inside = vars(value).values() if hasattr(value, "__dict__") else ()
    memo = {id(t): _cloned(t) for t in Call(tuple(inside)).tensors()}  # deepcopy would copy the whole storage of a view
    try:
        return copy.deepcopy(value, memo)
    except _UNCOPIED:
        pass
    try:
        return _with_values(value, lambda v: map_tensors(v, _cloned, other=_copied)) if inside else value
    except _UNCOPIED:
        return value


_UNCOPIED = (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError, copy.Error)


def reading(batch: Any) -> str:
    """How the input in ``batch`` is most likely read, in Python: ``b['image']``, ``b.pixels``, ``b[0]`` or ``b``.

    The first floating tensor or array that has a name, else the first name.
    """
    if isinstance(batch, Mapping):
        names = {f"b[{key!r}]": value for key, value in batch.items()}
    elif isinstance(batch, (tuple, list)):
        return "b[0]"
    else:
        fields = vars(batch) if hasattr(batch, "__dict__") and not isinstance(batch, (Tensor, type)) else {}
        names = {f"b.{key}": value for key, value in fields.items() if not key.startswith("_")}
    given = [name for name, v in names.items() if isinstance(v, Tensor) and v.is_floating_point()]
    given += [name for name, v in names.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
    return next(iter([*given, *names]), "b")


def describe(value: Any) -> str:
    """A value for a reader: ``2x3x224x224``, ``32 int64``, ``{boxes: 4x4}``."""
    if isinstance(value, Tensor):
        shape = "x".join(map(str, value.shape)) or "scalar"
        return shape if value.dtype == torch.float32 else f"{shape} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(describe(v) for v in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in value.items()) + "}"
    return repr(value) if len(repr(value)) < 24 else type(value).__name__
