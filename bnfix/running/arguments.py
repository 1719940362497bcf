"""Whether a call fits the forward of a model: by the names of its parameters, then by a run."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfix.errors import PassError
from bnfix.running.call import Call, describe, reading
from bnfix.running.guess import accepts

_TYPES = re.compile(r"dtype|scalar type|\btype\b|\bLong|\bInt\b|\bint64\b|indices|not implemented for", re.IGNORECASE)
BYTES = 20.0
"""A value above it is none of an image that was scaled or normalised."""
_INDICES = re.compile(r"indices|\bLong|\bInt\b|\bint64\b|one_hot", re.IGNORECASE)


def check_arguments(call: Call, model: nn.Module, source: str) -> Call:
    """``call``, in which ``source`` names the arguments, as the forward of ``model`` takes it.

    A name may also be that of a positional-only parameter. With a ``forward`` of the user's own nothing is looked at.

    Raises:
        PassError: an argument is missing or unknown, or is given twice; says what the forward takes.
    """
    if call.forward is not None:
        return call
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature: it may take anything
        return call
    call = _placed(call, parameters)
    kinds = {kind: [p for p in parameters if p.kind is kind] for kind in inspect._ParameterKind}
    places = [*kinds[inspect.Parameter.POSITIONAL_ONLY], *kinds[inspect.Parameter.POSITIONAL_OR_KEYWORD]]
    named = {p.name for p in (*kinds[inspect.Parameter.POSITIONAL_OR_KEYWORD], *kinds[inspect.Parameter.KEYWORD_ONLY])}
    if len(call.args) > len(places) and not kinds[inspect.Parameter.VAR_POSITIONAL]:
        raise _misfit(source, f"has {len(call.args)} positional arguments", parameters, call)
    unknown = [name for name in call.kwargs if name not in named]
    if unknown and not kinds[inspect.Parameter.VAR_KEYWORD]:
        raise _misfit(source, f"has {', '.join(unknown)}, which the forward does not take", parameters, call)
    filled = {p.name for p in places[: len(call.args)]}
    twice = [name for name in call.kwargs if name in filled]
    if twice:
        raise _misfit(source, f"has {', '.join(twice)} by name and by position", parameters, call)
    required = [p.name for p in (*places, *kinds[inspect.Parameter.KEYWORD_ONLY]) if p.default is p.empty]
    missing = [name for name in required if name not in filled and name not in call.kwargs]
    if missing:
        raise _misfit(source, f"has no {' and no '.join(missing)}", parameters, call)
    return call


def check_accepted(call: Call, model: nn.Module, source: str) -> None:
    """Whether ``model`` runs on ``call``. It is left as it was found, but for what a forward keeps: hand in a copy.

    Raises:
        PassError: it does not; says what it said, and where a type may be the reason, which.
    """
    reason = accepts(model, call)
    if reason is None:
        return
    raise PassError(f"{source}: the model's forward failed on {call.signature}: {reason}", hint=_advice(call, reason))


def feeding(batch: Any, call: Call, model: nn.Module) -> str:
    """What may be wrong with ``batch``, bound as ``call``, where the forward failed; ends with a line that feeds it.

    Guessed from shape and type alone: channels at the end, a sample without a batch axis, bytes, one channel; and that
    what came with it was meant for an input that is None unless it is given (``forward(categories, numbers=None)``).
    """
    inputs = [*call.args, *call.kwargs.values()]
    form = "b[0]" if isinstance(batch, (tuple, list)) else f"b[{next(iter(call.kwargs))!r}]" if call.kwargs else "b"
    if len(inputs) == 1 and type(inputs[0]) is type(batch) is not Tensor and reading(batch) != "b":
        what = f"the model was called with {call.signature}: if it takes what is inside"
        return f"{what}, for example:\nforward=lambda m, b: m({reading(batch)})"
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        return f"the model was called with {call.signature}; another way:  forward=lambda m, b: m({form}, …)"
    given = inputs[0]
    if isinstance(batch, np.ndarray):
        form = "torch.from_numpy(b)"
    made = form
    if given.dim() == 4 and given.shape[-1] in (1, 3, 4) and given.shape[1] > 4:
        made += ".permute(0, 3, 1, 2)"
    elif given.dim() == 3 and given.shape[0] in (1, 3):
        made += "[None]"
    elif given.dim() == 4 and given.shape[1] == 1:
        made += ".expand(-1, 3, -1, -1)"
    likely = made == form and given.dtype != torch.uint8 and isinstance(batch, (tuple, list))
    if likely and (more := _may_take(model, call, batch)):
        return (
            f"the model was called with {call.signature}: if it is to have {' and '.join(more)} too\n"
            f"forward=lambda m, b: m({', '.join(f'b[{i}]' for i in range(1 + len(more)))})"
        )
    if not given.is_floating_point() and not given.is_complex():
        made += ".float() / 255" if given.dtype == torch.uint8 else ".float()"
    example = "" if made != form else ", for example"
    dense = given.layout is torch.strided and not given.is_nested
    bytes_like = dense and given.is_floating_point() and given.numel() and bool(given.detach().amax() > BYTES)
    made = made if made != form else f"{form}.float() / 255" if bytes_like else f"{form}[…]"
    return (
        f"the model was called with {call.signature}: if that is not its input, say how a batch becomes that{example}\n"
        f"forward=lambda m, b: m({made})"
    )


def _may_take(model: nn.Module, call: Call, batch: Any) -> list[str]:
    """The inputs after those of ``call`` that are None unless given, as far as ``batch`` has tensors for them."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return []
    names = []
    for parameter, value in zip(parameters[len(call.args) :], batch[len(call.args) :], strict=False):
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.default is not None:
            break
        if not isinstance(value, Tensor):
            break
        names.append(parameter.name)
    return names


def _placed(call: Call, parameters: list[inspect.Parameter]) -> Call:
    """``call`` with what is named like a positional-only parameter in its place, names in the order of the forward."""
    args, kwargs = list(call.args), dict(call.kwargs)
    for parameter in parameters[len(args) :]:
        if parameter.kind is not inspect.Parameter.POSITIONAL_ONLY or parameter.name not in kwargs:
            break
        args.append(kwargs.pop(parameter.name))
    order = {p.name: i for i, p in enumerate(parameters)}  # as one would write the call: a file sorts by name
    return Call(tuple(args), dict(sorted(kwargs.items(), key=lambda item: order.get(item[0], len(order)))))


def _misfit(source: str, what: str, parameters: list[inspect.Parameter], call: Call) -> PassError:
    names = [*(f"arr_{i}" for i in range(len(call.args))), *call.kwargs]
    lines = [f"it takes ({shown(parameters)}), and in the file are {', '.join(names)}"]
    if len(parameters) == 1:  # it may want the dict or the tuple itself
        lines.append("if it takes them together:  --forward 'lambda m, b: m(b)'")
    return PassError(f"{source} {what}", hint="\n".join(lines))


def shown(parameters: list[inspect.Parameter]) -> str:
    """Parameters as one writes them, without annotations: ``image, mask=None, **more``."""
    stars: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    defaults = ["" if p.default is p.empty else f"={describe(p.default)}" for p in parameters]
    return ", ".join(f"{stars.get(p.kind, '')}{p.name}{d}" for p, d in zip(parameters, defaults, strict=True))


def _advice(call: Call, reason: str) -> str:
    """What may be wrong: a type where ``reason`` speaks of types, else a shape."""
    given = {**{f"arr_{i}": v for i, v in enumerate(call.args)}, **call.kwargs}
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    typed = ", ".join(f"{n} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for n, t in tensors.items())
    lines = [f"in the file: {typed}"] if tensors else []
    if _TYPES.search(reason):
        floats = [n for n, t in tensors.items() if t.is_floating_point()]
        whole = [n for n, t in tensors.items() if not t.is_floating_point()]
        pixels = [n for n in whole if tensors[n].dtype == torch.uint8]
        wanted, names = ("int64", floats) if _INDICES.search(reason) and floats else ("float32", pixels or whole)
        if len(names) == 1:
            lines.append(f"wrong type? save it as {wanted}:  {names[0]}={names[0]}.astype('{wanted}')")
        elif names:
            lines.append(f"wrong type? one of {', '.join(names)} may have to be {wanted}:  .astype('{wanted}')")
    return "\n".join(lines)
