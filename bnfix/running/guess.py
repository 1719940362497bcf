"""An input for a model that came without one: deduced from its layers, tried, and said aloud."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from bnfix.errors import PassError, one_line
from bnfix.running.call import Call
from bnfix.running.preserved import preserved

FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What a forward raises on an input that it does not fit (NotImplementedError is a RuntimeError)."""

_SIZES = {1: ((128,), (1024,)), 2: ((224, 224), (32, 32), (299, 299)), 3: ((8, 64, 64), (16, 112, 112))}


def accepts(model: nn.Module, call: Call) -> str | None:
    """None if ``model`` runs on ``call``; else what it raised, in one line. The model is left as it was found."""
    try:
        with preserved(model), torch.no_grad():
            call.run(model)
    except FAILURES as error:
        return one_line(error, 160)
    return None


def guess_call(model: nn.Module, *, batch: int = 1, seed: int = 0) -> Call:
    """A random input that ``model`` accepts, by what its first layers take.

    Raises:
        PassError: none of those tried is accepted; names them.
    """
    tried: list[str] = []
    for shape in _candidates(model):
        call = random_call(((batch, *shape),), model, seed=seed)
        reason = accepts(model, call)
        if reason is None:
            return call
        tried.append(f"{call.signature} ({reason})")
    raise PassError(
        "no example input was given, and none could be deduced" + (f"; tried {tried[0]}" if tried else ""),
        hint=input_hint(model),
    )


def input_hint(model: nn.Module) -> str:
    """How an input for this model is given, with the names that its forward has for them."""
    parameters = inspect.signature(model.forward).parameters.values()
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(required) > 1:
        named = ",".join(f"{name}=1x8" for name in required)
        example = f"in Python:  ({', '.join(required)}) as the example, a tuple of tensors"
        return f"its forward takes ({', '.join(required)}); give a shape for each:  --input {named}\n{example}"
    shape = (1, *next(iter(_candidates(model)), (3, 224, 224)))
    return f"give one:  --input {'x'.join(map(str, shape))}\nin Python:  bnfix.fold(model, torch.randn{shape})"


def random_call(shapes: tuple[tuple[int, ...], ...], model: nn.Module, *, seed: int = 0) -> Call:
    """Standard normal tensors of these shapes, in the dtype and on the device of the model's parameters."""
    generator = torch.Generator().manual_seed(seed)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    return Call(tuple(torch.randn(s, generator=generator).to(like.device, like.dtype) for s in shapes))


def variations(model: nn.Module, call: Call) -> tuple[list[Call], list[str]]:
    """``call`` with another batch size and another spatial size, where ``model`` accepts them, and what it refused.

    Facts hold for the signatures they were gathered on; these make more of them.
    """
    found: list[Call] = []
    refused: list[str] = []
    tensors = call.tensors()
    if not tensors or any(t.dim() == 0 for t in tensors):
        return found, refused
    batch = tensors[0].shape[0]
    if all(t.shape[0] == batch for t in tensors):
        other = batch + 1
        resized = call.map(lambda t: _resized(t, (other, *t.shape[1:])))
        _try(model, resized, "another batch size", found, refused)
    spatial = [t for t in tensors if t.dim() >= 3 and t.is_floating_point()]
    if spatial:
        grown = call.map(lambda t: _resized(t, _grown(t)) if t.dim() >= 3 and t.is_floating_point() else t)
        _try(model, grown, "another size", found, refused)
    return found, refused


def _try(model: nn.Module, call: Call, what: str, found: list[Call], refused: list[str]) -> None:
    if accepts(model, call) is None:
        found.append(call)
    else:
        refused.append(f"{what} ({call.signature}) is not accepted by the model: nothing is known of it")


def _grown(tensor: Tensor) -> tuple[int, ...]:
    """Spatial sizes: by 32 from 64 on (most networks halve five times), doubled below; time and depth stay."""
    sizes = tensor.shape[2:]
    last = min(2, len(sizes))
    kept, spatial = sizes[: len(sizes) - last], sizes[len(sizes) - last :]
    return (*tensor.shape[:2], *kept, *(s + 32 if s >= 64 else 2 * s for s in spatial))


def _resized(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same values, repeated or cut: the same distribution for floats, valid indices for integers."""
    out = tensor
    for axis, size in enumerate(shape):
        if out.shape[axis] < size:
            times = -(-size // out.shape[axis])
            out = torch.cat([out.roll(i, 0) if axis == 0 else out for i in range(times)], axis)
        out = out.narrow(axis, 0, size)
    if tensor.is_floating_point() and shape[0] != tensor.shape[0]:
        generator = torch.Generator().manual_seed(shape[0])
        noise = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
        out = out + noise * (tensor.std() if tensor.numel() > 1 else 1.0) * 0.5
    return out.contiguous()


def _candidates(model: nn.Module) -> list[tuple[int, ...]]:
    """Shapes without the batch, from the first layers that say what they take."""
    found: list[tuple[int, ...]] = []
    for module in model.modules():
        shapes: tuple[tuple[int, ...], ...] = ()
        if isinstance(module, nn.modules.conv._ConvNd):
            rank = len(module.kernel_size)
            shapes = tuple((module.in_channels, *size) for size in _SIZES[rank])
        elif isinstance(module, nn.Linear):
            shapes = ((module.in_features,), (16, module.in_features))
        found += [s for s in shapes if s not in found]
        if len(found) >= 4:
            break
    return found
