"""What a loader gives, bound to the forward of a model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfix.errors import PassError
from bnfix.running.call import Call, Forward, as_call, describe, fit_call, home, movable, reading

_SEVERAL = "the batch holds several inputs that the model could be called with, one by one or together"
_LIST = re.compile(r"(typing\.|collections\.abc\.|t\.)?(list|tuple|sequence|iterable)\b", re.IGNORECASE)
_FEED = "say how a batch is fed:  forward=lambda m, b: "


@dataclass(frozen=True)
class Bound:
    """A batch as a call on the device and in the dtype of the model, and what of the batch went into it.

    ``used`` is for the reader: ``element 0 of 2 (element 1, 32 int64, was left out)``.
    """

    call: Call
    used: str


def bind(batch: Any, model: nn.Module, forward: Forward | None = None) -> Bound:
    """What a training loop would call ``model`` with, given one ``batch`` of its loader.

    A tensor goes to the first parameter of the forward; of a tuple or list, as many elements as there are required
    positional parameters, one at least; of a mapping, the keys that the signature names (all of them where it is
    ``**kwargs`` alone), and so of a named tuple whose fields have the names of all required parameters. An object with
    a ``to`` of its own goes whole to a forward that requires one input. Where inputs are left over that look like the
    one taken (floating, same shape behind the first axis), or the one taken is a list of tensors, guessing would
    silently calibrate on a part of what the model sees: that is refused.

    NumPy arrays become tensors, floating ones in the dtype of the model: float64 is NumPy's default, seldom meant, and
    a DataLoader collates it to float64 tensors. So floating inputs become it too where all are of one other type, and
    all parameters of one: a layer could only fail on them. ``used`` says so. Several types keep theirs: they are meant.

    With ``forward`` the batch is handed whole to ``forward(model, batch)``; the tensors inside move to the model's
    device, float32 to its dtype (see :func:`~bnfix.running.call.fit_call`), everything else stays as it was loaded.

    Raises:
        PassError: the batch is ambiguous or does not fit; the hint holds the lines that resolve it.
    """
    if isinstance(batch, Call):
        return Bound(fit_call(as_call(batch, forward), model), "the call as it was given")
    if forward is not None:
        return Bound(fit_call(Call((batch,), forward=forward), model), "the whole batch, by forward=")
    batch, read = _as_tensors(batch, model)
    call, used = _bind(batch, _Signature.of(model))
    call, cast = _in_one_type(call, model)
    return Bound(fit_call(call, model), ", ".join(filter(None, (used, read, cast))))


def batch_call(batch: Any, model: nn.Module, forward: Forward | None = None) -> Call:
    """The call of :func:`bind`."""
    return bind(batch, model, forward).call


@dataclass(frozen=True)
class _Signature:
    """What a forward takes: names by kind."""

    shown: str
    required: tuple[str, ...]
    by_position: tuple[str, ...]
    by_name: tuple[str, ...]
    required_by_name: tuple[str, ...]
    all_args: bool
    all_kwargs: bool
    lists: frozenset[str] = frozenset()
    """Names of which the annotations say that they are lists."""

    @property
    def names(self) -> tuple[str, ...]:
        return *self.by_position, *self.by_name

    @property
    def needed(self) -> tuple[str, ...]:
        return *self.required, *self.required_by_name

    @classmethod
    def of(cls, model: nn.Module) -> _Signature:
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())
        except (TypeError, ValueError):  # a builtin without a signature: it may take anything
            parameters = []

        def of(*kinds: Any) -> list[inspect.Parameter]:
            return [p for p in parameters if p.kind in kinds]

        placed, named = of(inspect.Parameter.POSITIONAL_ONLY), of(inspect.Parameter.KEYWORD_ONLY)
        either = of(inspect.Parameter.POSITIONAL_OR_KEYWORD)
        stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        return cls(
            ", ".join(f"{stars.get(p.kind, '')}{p.name}" for p in parameters),
            tuple(p.name for p in (*placed, *either) if p.default is p.empty),
            tuple(p.name for p in placed),
            tuple(p.name for p in (*either, *named)),
            tuple(p.name for p in named if p.default is p.empty),
            bool(of(inspect.Parameter.VAR_POSITIONAL)) or not parameters,
            bool(of(inspect.Parameter.VAR_KEYWORD)) or not parameters,
            frozenset(p.name for p in parameters if _LIST.match(_annotation(p))),
        )


def _bind(batch: Any, signature: _Signature) -> tuple[Call, str]:
    if isinstance(batch, Mapping) and (found := _by_name(batch, signature)) is not None:
        return found
    if isinstance(batch, Tensor) or movable(batch):
        _check_count(1, signature, alone=True)
        return Call((batch,)), "the batch" if isinstance(batch, Tensor) else f"the batch, a {type(batch).__name__}"
    if isinstance(batch, Mapping):
        raise PassError(
            f"the batch has the keys {sorted(map(str, batch.keys()))}, and forward({signature.shown}) names none of "
            "them",
            hint=_fed(reading(batch), signature),
        )
    if isinstance(batch, (tuple, list)):
        fields = batch._asdict() if hasattr(batch, "_asdict") else {}
        named = fields.keys() & {*signature.names}
        if named and named >= {*signature.needed}:
            found = _by_name(fields, signature, "fields", "b.{}".format)
            if found is not None:
                return found
        return _by_position(batch, signature)
    form = reading(batch)
    raise PassError(
        f"a batch of type {type(batch).__name__} can't be bound to the forward",
        hint=_fed("b.pixels" if form == "b" else form, signature),
    )


def _fed(form: str, signature: _Signature) -> str:
    """The line that feeds a part of the batch, and the one for all of it to a forward that may take it apart itself."""
    whole = "or whole, as it comes:   forward=lambda m, b: m(b)"
    return f"{_FEED}m({form})" + (f"\n{whole}" if len(signature.required) == 1 else "")


def _by_position(batch: Sequence[Any], signature: _Signature) -> tuple[Call, str]:
    count = max(1, len(signature.required))
    _check_count(len(batch), signature)
    taken, rest = batch[:count], batch[count:]
    for i, value in enumerate(taken):
        if _is_nested(value) and signature.required[i : i + 1] not in [(name,) for name in signature.lists]:
            parts = count > 1 and len(value) == count
            third, only = (
                ("its parts:", f"*b[{i}]") if parts else ("as a list:", ", ".join(f"b[{k}]" for k in range(count)))
            )
            raise _several(f"b[{i}]", third, only, single=count == 1)
    twins = [i for i, value in enumerate(rest, count) if _is_twin(value, taken)]
    if twins:
        many = _picked(batch, [*range(count), *twins])
        raise _several(many, "only one: ", ", ".join(f"b[{k}]" for k in range(count)), single=count == 1)
    if signature.all_args and not signature.required and any(_floating(v) for v in rest):
        raise PassError(
            f"the batch has {len(batch)} elements, and forward({signature.shown}) takes any number of them",
            hint="all:       forward=lambda m, b: m(*b)\nonly one:  forward=lambda m, b: m(b[0])",
        )
    if isinstance(taken[0], Mapping) and count == 1 and (found := _by_name(taken[0], signature)) is not None:
        call, used = found
        return call, f"{used} of {_left_out(batch, 1)}"
    return Call(tuple(taken)), _left_out(batch, count)


def _by_name(
    batch: Mapping[Any, Any],
    signature: _Signature,
    kind: str = "keys",
    form: Callable[[Any], str] = "b[{!r}]".format,
) -> tuple[Call, str] | None:
    """The elements that the signature names; None where it names none. ``form``: how one is read, in Python."""
    given = list(batch.keys())  # going through a TensorDict gives its samples
    keys = [name for name in signature.names if name in given]
    if not keys and signature.all_kwargs and not signature.required:
        keys = [key for key in given if isinstance(key, str)]
    if not keys:
        return None
    missing = [name for name in signature.needed if name not in keys]
    if missing:
        raise PassError(
            f"the batch has the {kind} {sorted(map(str, given))}, and forward({signature.shown}) requires "
            f"{', '.join(missing)} too",
            hint=f"{_FEED}m({', '.join(map(form, keys))}, …)",
        )
    taken = [batch[key] for key in keys]
    nested = [key for key in keys if _is_nested(batch[key]) and key not in signature.lists]
    only = ", ".join(f"{key}={form(key)}" if key in signature.by_name else form(key) for key in keys)
    for key in nested:
        raise _several(form(key), "as a list:", only, single=len(keys) == 1)
    twins = [key for key in given if key not in keys and _is_twin(batch[key], taken)]
    if twins:
        many = ", ".join(map(form, (*keys, *twins)))
        raise _several(f"({many})", "only one: ", only, single=len(keys) == 1)
    args = tuple(batch[key] for key in keys if key in signature.by_position)
    kwargs = {key: batch[key] for key in keys if key not in signature.by_position}
    return Call(args, kwargs), f"{kind} {', '.join(keys)} of {', '.join(map(str, given))}"


def _check_count(count: int, signature: _Signature, *, alone: bool = False) -> None:
    """Whether ``count`` positional inputs (``alone``: the batch itself) are enough, and none is needed by name."""
    if signature.required_by_name:
        needed = signature.needed
        forms = ["b"] if alone and len(needed) == 1 else [f"b[{i}]" for i in range(len(needed))]
        inputs = [f if name in signature.required else f"{name}={f}" for name, f in zip(needed, forms, strict=True)]
        raise PassError(
            f"forward({signature.shown}) requires {', '.join(signature.required_by_name)} by name, and the batch "
            "has no names",
            hint=f"{_FEED}m({', '.join(inputs)})",
        )
    if count < max(1, len(signature.required)):
        several = ", ".join(signature.required)
        raise PassError(
            f"the batch has {count} element{'' if count == 1 else 's'}, and the forward requires "
            f"{max(1, len(signature.required))}" + (f": {several}" if len(signature.required) > 1 else ""),
            hint=f"give batches that hold them all: tuples ({several}), or dicts (or an .npz file) with these names\n"
            f"{_FEED}m({', '.join(['b[0]', *(f'{name}=…' for name in signature.required[1:])])})"
            if len(signature.required) > 1
            else f"{_FEED}m(b[0])",
        )


def _several(many: str, third: str, only: str, *, single: bool) -> PassError:
    """The refusal of a batch that could be meant in several ways, with the line for each."""
    lines = [f"{third} forward=lambda m, b: m({only})"]
    if single:  # of a model with several inputs nobody knows which belong together
        lines = [
            f"separate:  forward=lambda m, b: [m(v) for v in {many}]",
            f"joint:     forward=lambda m, b: m(torch.cat({many}))",
            *lines,
        ]
    return PassError(_SEVERAL, hint="\n".join(lines))


def _picked(batch: Sequence[Any], indices: list[int]) -> str:
    """The elements ``indices`` of ``b`` as one sequence of tensors, in Python."""
    if not any(_is_nested(batch[i]) for i in indices):
        if len(indices) == len(batch):
            return "b"
        if indices == list(range(len(indices))):
            return f"b[:{len(indices)}]"
    return f"({', '.join(f'*b[{i}]' if _is_nested(batch[i]) else f'b[{i}]' for i in indices)})"


def _left_out(batch: Sequence[Any], count: int) -> str:
    """Which elements were taken, and what the others are."""
    numbers = " and ".join(map(str, range(count))) if count < 3 else f"0 to {count - 1}"
    taken = f"element{'s' if count > 1 else ''} {numbers} of {len(batch)}"
    rest = [f"element {i}, {_shown(value)}," for i, value in enumerate(batch[count:], count)]
    if not rest:
        return taken
    return f"{taken} ({' and '.join(rest)} {'was' if len(rest) == 1 else 'were'} left out)"


def _shown(value: Any) -> str:
    """As :func:`describe`, but a shape is never alone: ``2`` for a tensor would read as a number."""
    plain = isinstance(value, Tensor) and value.dtype == torch.float32
    return f"{describe(value)} float32" if plain else describe(value)


def _annotation(parameter: inspect.Parameter) -> str:
    """``list[Tensor]`` as it would be written, wherever annotations are kept as text or not."""
    kind = parameter.annotation
    return kind.__name__ if kind in (list, tuple) else str(kind)


def _is_nested(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and not movable(value) and bool(Call(tuple(value)).tensors())


def _floating(value: Any) -> bool:
    return any(t.is_floating_point() for t in Call((value,)).tensors())


def _is_twin(value: Any, taken: Sequence[Any]) -> bool:
    """Whether ``value`` is, or holds, a floating tensor shaped like a floating one in ``taken``, batch axis apart."""
    shapes = {t.shape[1:] for t in taken if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1}
    return any(t.is_floating_point() and t.dim() > 1 and t.shape[1:] in shapes for t in Call((value,)).tensors())


def _in_one_type(call: Call, model: nn.Module) -> tuple[Call, str]:
    """``call`` with floating tensors in the dtype of the model where both have but one, and a line that says so."""
    given = {t.dtype for t in call.tensors() if t.is_floating_point()}
    if len(given) != 1 or given <= {torch.float32}:  # float32 is what fit_call brings to the model's
        return call, ""
    wanted = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(wanted) != 1 or wanted == given:
        return call, ""
    (old,), (new,) = given, wanted
    shown = " as ".join(str(dtype).removeprefix("torch.") for dtype in (old, new))
    return call.map(lambda t: t.to(new) if t.is_floating_point() else t), shown


def _as_tensors(batch: Any, model: nn.Module) -> tuple[Any, str]:
    """``batch`` with the NumPy arrays among its elements as tensors (copies), and a line that says so."""
    like = home(model)
    wide = torch.get_default_dtype() if like is None else like.dtype
    read: dict[str, None] = {}

    def convert(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        try:
            tensor = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
        except TypeError as error:
            raise PassError(
                f"the batch holds an array of type {value.dtype}, which torch has not", hint=f"{_FEED}m(b[0])"
            ) from error
        kept = tensor.to(wide) if tensor.is_floating_point() else tensor
        changed = "" if kept.dtype == tensor.dtype else f" as {str(kept.dtype).removeprefix('torch.')}"
        read[f"{value.dtype.name}{changed}"] = None
        return kept

    if isinstance(batch, np.ndarray):
        batch = convert(batch)
    elif isinstance(batch, Mapping) and any(isinstance(v, np.ndarray) for v in batch.values()):
        batch = {k: convert(v) for k, v in batch.items()}
    elif isinstance(batch, (tuple, list)) and any(isinstance(v, np.ndarray) for v in batch):
        batch = tuple(convert(v) for v in batch)
    return batch, f"read from NumPy arrays ({', '.join(read)})" if read else ""
