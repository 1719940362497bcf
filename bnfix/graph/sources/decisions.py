"""What a forward decides on data: read, noted, taken the other way for once, or held as it was the first time.

A decision is an operation that makes something discrete of real numbers: a number or truth that Python code reads
(``if y.sum() > 0``, ``.item()``), a comparison, an index (``topk``, ``nonzero``, non-maximum suppression), a rounding.
Between its decisions a forward is a continuous function of its weights. So two models that differ by rounding alone
are compared on the decisions of one of them: else a box that lies at a threshold would look like an error.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnfix.graph.sources.layout import name_of, named_arguments

See = Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any], Any]

_STEPS = {"floor", "ceil", "round", "trunc", "sign", "floor_divide", "heaviside", "fix", "sgn"}
_OVERWRITING = {"copy", "fill", "index_put", "masked_fill", "scatter", "index_copy", "index_fill"}
_SHAPED = {"expand_as", "view_as", "reshape_as"}  # they ask a tensor for its shape, not for its numbers
_FRAMES = 4
_CLOSE = 1e-2


@dataclass(frozen=True)
class Decision:
    """One decision: the operation, what came out, and for what Python reads where that was.

    ``where`` is the lines of code that read it, the layer that was called last before, and which way it went: between
    two decisions that agree in all of this nothing happened that a turn of the second could show and the first not.
    """

    name: str
    value: Any
    where: tuple[Any, ...] = ()
    turned: bool = False

    @property
    def read(self) -> bool:
        """Whether Python code read a number or a truth."""
        return isinstance(self.value, (bool, int, float))


@dataclass
class Tape:
    """The decisions of one run, in order.

    ``lost`` says where a run that was held to them went another way all the same; ``differs`` counts the elements that
    it would have decided otherwise, of ``total``.
    """

    decisions: list[Decision] = field(default_factory=list)
    lost: str = ""
    differs: int = 0
    total: int = 0

    def blank(self) -> Tape:
        """The same decisions, for another run to be held to."""
        return Tape(self.decisions)


class Noting:
    """Writes each decision of a run on a tape; the ``turn``-th that Python reads is taken the other way."""

    def __init__(self, turn: int | None = None) -> None:
        self.tape = Tape()
        self.layer: Any = None
        """The layer that was called last; who watches the run keeps it up to date."""
        self._turn = turn

    def settle(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        """What the operation gives to the forward."""
        if not _decides(func, args, kwargs, out):
            return out
        turned = False
        where: tuple[Any, ...] = ()
        if isinstance(out, (bool, int, float)):
            where = (_lines(), self.layer, out if isinstance(out, bool) else None)
            turned = len(self.tape.decisions) == self._turn
            out = _turned(out) if turned else out
        self.tape.decisions.append(Decision(str(func), _kept(func, out), where, turned))
        return out


class Holding:
    """Gives a run the decisions of ``tape`` in place of its own; where it goes another way, it is left alone."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._next = 0

    def settle(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        """What the operation gives to the forward."""
        if self.tape.lost or not _decides(func, args, kwargs, out):
            return out
        if self._next >= len(self.tape.decisions):
            self.tape.lost = f"{func} comes after the last decision"
            return out
        decision = self.tape.decisions[self._next]
        self._next += 1
        if decision.name != str(func):
            self.tape.lost = f"{func} comes where {decision.name} came before"
            return out
        return decision.value if decision.turned else self._imposed(func, args, kwargs, out, decision.value)

    def _imposed(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, value: Any) -> Any:
        if isinstance(out, Tensor):
            self._count(out, value)
            changed = value.to(out.device, out.dtype)
            if not func._schema.is_mutable:
                return changed.clone()
            return out.copy_(changed) if out.shape == changed.shape else out
        if isinstance(out, (tuple, list)):
            given = [
                self._imposed(func, args, kwargs, o, v) if v is not None else o
                for o, v in zip(out, value, strict=False)
            ]
            chosen = _picked(func, args, kwargs, given) if not func._schema.is_mutable else None
            return type(out)(chosen or given)
        if isinstance(out, float):  # a number, not yet a decision: rounding is taken off, an error is not
            return value if math.isclose(out, value, rel_tol=_CLOSE) else out
        self.tape.total += 1
        self.tape.differs += out != value
        return value

    def _count(self, out: Tensor, value: Tensor) -> None:
        self.tape.total += value.numel()
        same = out.shape == value.shape
        self.tape.differs += (
            int((out != value.to(out.device, out.dtype)).sum()) if same else max(out.numel(), value.numel())
        )


def reads(tape: Tape) -> Iterator[tuple[int, Decision]]:
    """The decisions of ``tape`` that Python code read, and their numbers."""
    return ((i, d) for i, d in enumerate(tape.decisions) if d.read)


@contextlib.contextmanager
def held(tape: Tape) -> Iterator[None]:
    """Run a model inside: it decides as on ``tape``."""
    holding = Holding(tape)
    with watching(holding.settle):
        yield


@contextlib.contextmanager
def watching(see: See) -> Iterator[None]:
    """``see(operation, args, kwargs, out)`` gets every operation as Python code asks for it; what it returns counts."""
    from torch._dispatch.python import enable_python_dispatcher

    with enable_python_dispatcher(), _mode_class()(see):
        yield


@functools.cache
def _mode_class() -> Any:
    """The mode, made when it is first needed: what it derives from takes half a second to import."""
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode

    # Before dispatch, so that a linear layer is still one operation. PyTorch lets no other class stand there; nothing
    # is taken over from this one.
    class Watching(ProxyTorchDispatchMode):
        __enter__ = TorchDispatchMode.__enter__
        __exit__ = TorchDispatchMode.__exit__

        def __init__(self, see: See) -> None:
            TorchDispatchMode.__init__(self, _dispatch_key=torch._C.DispatchKey.PreDispatch)  # type: ignore[attr-defined, no-untyped-call]
            self._mode_key = torch._C._TorchDispatchModeKey.PROXY
            self._see = see

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C._DisablePythonDispatcher():  # type: ignore[attr-defined]  # the kernels that run elsewhere
                out = func(*args, **(kwargs or {}))
                return self._see(func, args, kwargs or {}, out)

    return Watching


def _decides(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> bool:
    if isinstance(out, (bool, int, float)):
        return True
    name = name_of(func)
    if name.rstrip("_") in _STEPS:
        return not torch._C._functorch.is_functorch_wrapped_tensor(out)
    if name.rstrip("_") in _OVERWRITING and not isinstance(out, (tuple, list)):
        return _is_discrete(out) and any(_is_real(t) for t in tree_leaves((args[1:], dict(kwargs))))
    if name in _SHAPED or name.endswith("_like") or name.startswith("new_"):
        return False
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    return any(_is_discrete(t) for t in outputs) and any(_is_real(t) for t in tree_leaves((args, dict(kwargs))))


def _is_discrete(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(value)  # inside vmap: nothing that outlives it


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _kept(func: Any, out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.detach().clone()
    if isinstance(out, (tuple, list)):
        step = name_of(func).rstrip("_") in _STEPS
        return [o.detach().clone() if step or _is_discrete(o) else None for o in out]
    return out


def _picked(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: list[Any]) -> list[Any] | None:
    """(values, indices) with the values at these indices; None where the operation is none that picks along an axis."""
    named = named_arguments(func, args, kwargs)
    source, dim = named.get("self"), named.get("dim")
    if len(out) != 2 or not (isinstance(source, Tensor) and isinstance(dim, int) and _is_discrete(out[1])):
        return None
    values, indices = out
    if not isinstance(values, Tensor) or indices.dtype != torch.int64 or not source.dim():
        return None
    gone = indices.dim() < source.dim()
    picked = source.gather(dim, indices.unsqueeze(dim) if gone else indices)
    return [picked.squeeze(dim) if gone else picked, indices]


def _turned(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 0 if value else 1
    return -value if value else 1.0


def _lines() -> tuple[tuple[str, int], ...]:
    """The innermost lines of code outside of PyTorch and of this package."""
    found: list[tuple[str, int]] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < _FRAMES:
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in ("torch", "bnfix", "contextlib", "functools"):
            found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found)
