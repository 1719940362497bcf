"""The weight that a layer hands to its convolution: seen in runs of the model, and in runs of the layer by itself."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bnfix.errors import PassError, TraceError, one_line
from bnfix.graph.copies import copy_model
from bnfix.graph.first_run import _PRODUCERS
from bnfix.graph.owners import find_owners
from bnfix.types import Op

_SAME_LAYER = 1e-4
"""Of equal weights and equal settings the outputs differ by an order of summation at most, of others by all of it."""

_RANDOM = "it keeps a state, or draws random numbers"


class Refused(Exception):  # noqa: N818  # not an error: the reason that is handed on
    """Carries the reason."""


@dataclass
class Recorded:
    """What one module handed to its convolution in its first call, and whether that was the same in every other one."""

    weight: Tensor
    bias: Tensor | None
    steady: bool = True


class _Recorder(TorchFunctionMode):
    """Notes what the last convolution or linear function was given, and what it gave."""

    def __init__(self) -> None:
        self.last: tuple[Any, Tensor, Tensor | None] | None = None  # of all of them it would keep every activation

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        out = func(*args, **given)
        if func in _PRODUCERS and not torch.compiler.is_compiling():
            weight = args[1] if len(args) > 1 else given.get("weight")
            bias = args[2] if len(args) > 2 else given.get("bias")
            self.last = (out, weight, bias) if isinstance(weight, Tensor) else None
        return out

    def given_for(self, out: Any) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the call that made ``out``, where that was the last one."""
        return self.last[1:] if self.last is not None and self.last[0] is out else None


def record(model: nn.Module, modules: Iterable[nn.Module], calls: Sequence[Any]) -> dict[int, Recorded]:
    """What each of ``modules`` hands to its layer when a copy of ``model`` runs twice on each of ``calls``, by ``id``.

    Those that nothing could be seen of are left out.

    Raises:
        TraceError: the model can't be copied.
        PassError: its forward fails.
    """
    seen: dict[int, Recorded] = {}
    blind: set[int] = set()
    for call in calls:
        copy, memo = copy_model(model)
        recorder = _Recorder()

        def note(module_id: int, _module: Any, _args: Any, out: Any, recorder: _Recorder = recorder) -> None:
            given = recorder.given_for(out)
            if given is None:
                blind.add(module_id)
            elif module_id not in seen:
                weight, bias = given
                seen[module_id] = Recorded(weight.detach().clone(), None if bias is None else bias.detach().clone())
            elif not _equal(given, seen[module_id]):
                seen[module_id].steady = False

        for module in modules:
            memo[id(module)].register_forward_hook(functools.partial(note, id(module)))
        for _ in range(2):
            try:
                with torch.no_grad(), recorder:
                    call.run(copy)
            except Exception as error:  # the user's own forward may raise anything
                raise PassError(f"the model's forward failed on {call.signature}: {one_line(error)}") from error
            recorder.last = None
    return {key: found for key, found in seen.items() if key not in blind}


def differs(model: nn.Module, other: nn.Module, calls: Sequence[Any]) -> str:
    """Empty where copies of both give the same on each of ``calls``; else what ``other`` does instead."""
    for call in calls:
        expected = _outputs(model, call)
        try:
            found = _outputs(other, call)
        except Exception as error:  # noqa: BLE001  # the user's own forward may ask for what is gone, in any way
            return f"the model needs it to be there: {one_line(error, 160)}"
        if len(found) != len(expected) or not all(_close(f, e) for f, e in zip(found, expected, strict=True)):
            return f"the model gives something else without it on {call.signature}"
    return ""


def _outputs(model: nn.Module, call: Any) -> list[Tensor]:
    copy, _ = copy_model(model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # type: ignore[no-untyped-call]
        return [leaf for leaf in tree_leaves(call.run(copy)) if isinstance(leaf, Tensor)]


def _close(found: Tensor, expected: Tensor) -> bool:
    """The same bits, or on devices that add in any order the same but for that."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if torch.equal(found, expected):
        return True
    if not expected.is_floating_point():
        return False
    wanted, got = expected.double().nan_to_num(), found.double().nan_to_num()
    limit = max(_SAME_LAYER, 16 * torch.finfo(expected.dtype).eps)
    return bool((got - wanted).norm() <= limit * wanted.norm())


class Scratch:
    """A copy of one module, run by itself: it has to hand on what it did in the model, whatever its input."""

    def __init__(self, module: nn.Module, seen: Recorded) -> None:
        if not seen.steady:
            raise Refused(f"its weight is another one in each call ({_RANDOM})")
        try:
            self.module, memo = copy_model(module)
        except TraceError as error:
            raise Refused(f"it can't be copied by itself: {error.message}") from error
        owners = find_owners(module)
        self.original = {id(memo[i]): t for i, t in owners.tensors.items() if i in memo}
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._seen = seen
        self._runs: list[tuple[Tensor, Tensor]] = []

    def tensors(self, source: Op, layer: Op) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the forward computes them: a parameter where it hands on its own.

        Raises:
            Refused: they are not always the same.
        """
        self._runs.clear()
        for seed in (0, 1):
            weight, bias = self._run(source, layer, seed)
            if not _equal((weight, bias), self._seen):
                raise Refused(f"its weight is not the same by itself as in the model ({_RANDOM})")
            if self.weight is None:
                self.weight, self.bias = _kept(weight), None if bias is None else _kept(bias)
        assert self.weight is not None
        return self.weight, self.bias

    def compare(self, plain: nn.Module) -> None:
        """The plain layer gives what the module gave in the last runs.

        Raises:
            Refused: it gives something else.
        """
        for x, expected in self._runs:
            with torch.no_grad():
                found = plain(x)
            if found.shape != expected.shape or found.dtype != expected.dtype:
                raise Refused(f"as a plain layer it gives {tuple(found.shape)} instead of {tuple(expected.shape)}")
            if not _close(found, expected):
                raise Refused("as a plain layer with the same weight it computes something else")

    def _run(self, source: Op, layer: Op, seed: int) -> tuple[Tensor, Tensor | None]:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        like = next((t for t in tensors if t.is_floating_point()), None)
        dtype = getattr(torch, source.dtype or "", None)
        if like is None or source.shape is None or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise Refused("nothing is known of its input's shape and type")
        x = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)).to(like.device, dtype)
        versions = [t._version for t in tensors]
        recorder = _Recorder()
        try:
            with torch.no_grad(), recorder:
                out = self.module(x.clone())
        except Exception as error:  # the user's own forward may raise anything
            raise Refused(f"it can't be run by itself: {one_line(error, 160)}") from error
        if [t._version for t in tensors] != versions:
            raise Refused("its forward changes its own weights or buffers, as in training mode")
        given = recorder.given_for(out)
        if given is None or out.dtype is not getattr(torch, layer.dtype or "", None) or tuple(out.shape) != layer.shape:
            raise Refused("by itself it does something else than in the model (autocast, or more arguments)")
        self._runs.append((x, out))
        for what, value in zip(("weight", "bias"), given, strict=True):
            if value is not None and not bool(torch.isfinite(value).all()):
                raise Refused(f"its {what} is not finite")
        return given


def _kept(value: Tensor) -> Tensor:
    """As it is where the module owns it; a copy in the same layout where it was computed."""
    return value if isinstance(value, nn.Parameter) else value.detach().clone()


def _equal(given: tuple[Tensor, Tensor | None], seen: Recorded) -> bool:
    return _same(given[0], seen.weight) and _same(given[1], seen.bias)


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return (
        left.shape == right.shape and left.dtype == right.dtype and torch.equal(left.nan_to_num(), right.nan_to_num())
    )
