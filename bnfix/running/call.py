"""The one form of an input: what a model is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import PassError

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

        Its mode and the grad mode are as they are.
        """
        return self.map(lambda t: t.detach().clone()).apply(model)

    def apply(self, model: nn.Module) -> Any:
        """Call ``model`` with these very inputs."""
        if self.forward is not None:
            return self.forward(model, *self.args, **self.kwargs)
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
    def signature(self) -> str:
        """Shapes and types for a reader, such as ``2x3x224x224`` or ``(1x3x8x8, mask=1x8 bool)``."""
        parts = [_describe(a) for a in self.args]
        parts += [f"{k}={_describe(v)}" for k, v in self.kwargs.items()]
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


def batch_call(batch: Any, model: nn.Module, forward: Forward | None = None) -> Call:
    """What a training loop would call ``model`` with, given one ``batch`` of its loader.

    A tensor goes to the first parameter of the forward; of a tuple or list, as many elements as there
    are required positional parameters; of a dict, the keys that the signature names. A batch that
    could be meant in several ways is refused.

    Raises:
        PassError: the batch is ambiguous or does not fit; the message holds the lines that resolve it.
    """
    if forward is not None or isinstance(batch, Call):
        return as_call(batch, forward)
    if isinstance(batch, Tensor):
        return Call((batch,))
    params = [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if isinstance(batch, Mapping):
        kwargs = {p.name: batch[p.name] for p in params if p.name in batch}
        if not kwargs:
            wanted = ", ".join(p.name for p in params)
            raise PassError(
                f"the batch has the keys {sorted(map(str, batch))}, and forward({wanted}) names none of them",
                hint="say how a batch is fed:  forward=lambda m, b: m(b['image'])",
            )
        return Call((), kwargs)
    if isinstance(batch, (tuple, list)):
        required = [p for p in params if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]
        taken, rest = batch[: len(required)], batch[len(required) :]
        if len(taken) < len(required) or not taken:
            raise PassError(
                f"the batch has {len(batch)} elements, and the forward requires {len(required)}",
                hint="say how a batch is fed:  forward=lambda m, b: m(b[0])",
            )
        nested = any(isinstance(t, (list, tuple)) for t in taken)
        first = next((t for t in taken if isinstance(t, Tensor)), None)
        twins = first is not None and any(
            isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1 and t.shape[1:] == first.shape[1:]
            for t in rest
        )
        if nested or twins:
            raise PassError(
                "the batch holds several inputs that the model could be called with, one by one or together",
                hint="separate:  forward=lambda m, b: [m(v) for v in b[0]]\n"
                "joint:     forward=lambda m, b: m(torch.cat(b[0]))",
            )
        return Call(tuple(taken))
    raise PassError(
        f"a batch of type {type(batch).__name__} can't be bound to the forward",
        hint="say how a batch is fed:  forward=lambda m, b: m(b.pixels)",
    )


def fit_call(call: Call, model: nn.Module) -> Call:
    """``call`` on the device of the model, floating tensors in float32 in the dtype of its parameters."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return call
    return call.map(lambda t: t.to(like.device, like.dtype if t.dtype == torch.float32 else t.dtype))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in its nested tuples, lists, dicts and dataclasses replaced."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, change) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, change) for v in value)
    if isinstance(value, Mapping):
        changed = {k: map_tensors(v, change) for k, v in value.items()}
        if type(value) is dict:
            return changed
        try:
            return type(value)(changed)  # type: ignore[call-arg]
        except TypeError:  # a mapping with a constructor of its own
            return changed
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{k: map_tensors(v, change) for k, v in vars(value).items()})
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        shape = "x".join(map(str, value.shape)) or "scalar"
        return shape if value.dtype == torch.float32 else f"{shape} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_describe(v) for v in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in value.items()) + "}"
    return repr(value) if len(repr(value)) < 24 else type(value).__name__
