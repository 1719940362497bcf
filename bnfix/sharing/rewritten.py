"""A forward rewritten: the user's module with another body, which runs only what it was proven for.

The class is made on the fly from the module's own, so that everything else about the module stays: its name, methods,
attributes, submodules, ``state_dict``. A deep copy and a pickle make it anew.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.running import Call
from bnfix.sharing.concatenating import concatenated, parted
from bnfix.sharing.joint import check_first


@dataclass(frozen=True)
class Leaf:
    """Stands for a tensor in a structure: the how-manieth it is."""

    index: int


@dataclass(frozen=True)
class Body:
    """A forward for one kind of call: generated source, and what of the inputs and attributes it holds for.

    ``inputs`` are the values of the forward's parameters, ``output`` what it returns, both with a :class:`Leaf` for
    each tensor. ``attributes`` are settings of the module that the code read when it was traced.
    """

    imports: str
    source: str
    inputs: Mapping[str, Any]
    output: Any
    attributes: Mapping[str, Any]


Bodies = Mapping[bool, Body]
"""By the training flag of the module."""


def call_together(net: nn.Module, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Any, ...]:
    """``net`` once for all ``calls``, each a pair of arguments; one output for each."""
    whole, sizes = concatenated([Call(args, kwargs) for args, kwargs in calls])
    count = sum(sizes)
    return parted(whole.apply(net), sizes, lambda where, tensor: check_first(where, tensor, count))


def rewrite(module: nn.Module, bodies: Bodies) -> None:
    """Give ``module`` another forward: in place, by a class of its own that is derived from the one it has.

    Raises:
        TypeError: the class of the module can't be derived from, or assigned.
    """
    module.__class__ = _class(type(module), bodies)


def is_rewritten(module: nn.Module) -> bool:
    """Whether a module has a forward made by :func:`rewrite`."""
    return isinstance(getattr(type(module), "_bnfix_bodies", None), Mapping)


def flat(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` with a :class:`Leaf` for each tensor, which goes to the list.

    Raises:
        TypeError: something in it is neither a tensor, a plain value, nor a tuple, list or dict of these.
    """
    if isinstance(value, (Tensor, torch.fx.Proxy)):
        tensors.append(value)  # type: ignore[arg-type]
        return Leaf(len(tensors) - 1)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(flat(v, tensors) for v in value))
    if type(value) in (tuple, list):
        return type(value)(flat(v, tensors) for v in value)
    if type(value) is dict:
        return {k: flat(v, tensors) for k, v in value.items()}
    raise TypeError(f"a {type(value).__name__}")


def filled(template: Any, tensors: Sequence[Any]) -> Any:
    """The structure ``template`` with a tensor in place of each :class:`Leaf`."""
    if isinstance(template, Leaf):
        return tensors[template.index]
    if isinstance(template, tuple) and hasattr(template, "_fields"):
        return type(template)(*(filled(v, tensors) for v in template))
    if isinstance(template, (tuple, list)):
        return type(template)(filled(v, tensors) for v in template)
    if isinstance(template, dict):
        return {k: filled(v, tensors) for k, v in template.items()}
    return template


def bound(forward: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a forward's parameters in a call, defaults included."""
    given = inspect.signature(forward).bind(*args, **kwargs)
    given.apply_defaults()
    return {k: dict(v) if isinstance(v, Mapping) and type(v) is not dict else v for k, v in given.arguments.items()}


def settings(module: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """The attributes ``names`` of a module, as far as they can be told from others later on."""
    own = vars(module)
    return {name: _plain(own[name], 3) for name in names if name in own}


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return value
    if depth and isinstance(value, (list, tuple, set, frozenset)) and len(value) <= 100:
        return type(value).__name__, [_plain(v, depth - 1) for v in value]
    if depth and isinstance(value, dict) and len(value) <= 100:
        return {str(k): _plain(v, depth - 1) for k, v in value.items()}
    if (
        depth
        and hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type))
        and not callable(value)
    ):
        return {k: _plain(v, depth - 1) for k, v in vars(value).items()}
    return type(value).__qualname__


def _class(base: type[nn.Module], bodies: Bodies) -> type[nn.Module]:
    functions = {mode: _compiled(body) for mode, body in bodies.items()}
    own = base.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        body = bodies.get(self.training)
        if body is None:
            raise RuntimeError(f"{base.__name__}: its calls were merged for another mode than training={self.training}")
        tensors: list[Tensor] = []
        given = bound(own, (self, *args), kwargs)
        given.pop(next(iter(given)))
        try:
            same = _same(flat(given, tensors), body.inputs)
        except TypeError:
            same = False
        if not same:
            raise RuntimeError(
                f"{base.__name__}: its calls were merged for a forward on {_told(body.inputs)}, and this is another "
                "one; merge the calls of the original model again, with an example of it"
            )
        now = {name: _plain(getattr(self, name, None), 3) for name in body.attributes}
        if not _same(now, body.attributes):
            raise RuntimeError(
                f"{base.__name__}: {', '.join(body.attributes)} was read when its calls were merged, and has changed "
                "since; merge the calls of the original model again"
            )
        return filled(body.output, functions[self.training](self, *tensors))

    def reduced(self: nn.Module, _protocol: Any) -> Any:
        return revive, (base, dict(bodies)), vars(self)

    metaclass: Any = type(base)  # a class with a metaclass of its own gets a sister of the same kind
    made: type[nn.Module] = metaclass(
        base.__name__,
        (base,),
        {
            "forward": forward,
            "__reduce_ex__": reduced,
            "_bnfix_bodies": bodies,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        },
    )
    return made


def revive(base: type[nn.Module], bodies: Bodies) -> nn.Module:
    """An empty module of the class that :func:`rewrite` makes: for copies and pickles, which fill it."""
    cls = _class(base, bodies)
    return cls.__new__(cls)


def _compiled(body: Body) -> Any:
    space: dict[str, Any] = {"call_together": call_together}
    exec(compile(f"{body.imports}\n{body.source}", "<merged by bnfix>", "exec"), space)  # written by torch.fx
    return space["forward"]


def _same(one: Any, other: Any) -> bool:
    """``one == other``, spelt out: Dynamo of torch 2.7 can't compare dicts."""
    if isinstance(one, dict) and isinstance(other, dict):
        return len(one) == len(other) and all(key in other and _same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        alike = isinstance(one, list) == isinstance(other, list) and len(one) == len(other)
        return alike and all(_same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, Leaf) or isinstance(other, Leaf):
        return isinstance(one, Leaf) and isinstance(other, Leaf) and one.index == other.index
    return bool(one == other)


def _told(inputs: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={'a tensor' if isinstance(v, Leaf) else _short(v)}" for k, v in inputs.items()) or "nothing"


def _short(value: Any) -> str:
    if isinstance(value, Leaf):
        return "a tensor"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_short, value))}]"
    return repr(value)
