"""Every batch norm that a forward runs, caught where modules, functions and exported graphs all come by.

A TorchFunctionMode sees ``F.batch_norm`` whoever calls it; hooks on modules miss functional calls, and a patched
``F`` would be seen by the user's other threads. Modes belong to one thread: each thread enters its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import (
    BuiltinFunctionType,
    FunctionType,
    GetSetDescriptorType,
    MethodDescriptorType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.overrides import TorchFunctionMode

from bnfix.calibration.norms import Norm, Norms
from bnfix.calibration.patched import original
from bnfix.graph.per_call import StatisticsOfCall
from bnfix.running.written import keep, may_write

_aten, functorch = torch.ops.aten, torch._C._functorch
_LEGACY = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_BY_NAME = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_NAMES: Mapping[Any, tuple[str, ...]] = {
    F.batch_norm: _BY_NAME,
    torch.batch_norm: _LEGACY,
    torch.native_batch_norm: _LEGACY[:-1],
    _aten.batch_norm: _LEGACY,
    _aten.batch_norm.default: _LEGACY,
    _aten.native_batch_norm: _LEGACY[:-1],
    _aten.native_batch_norm.default: _LEGACY[:-1],
    _aten._native_batch_norm_legit_no_training: (*_LEGACY[:5], *_LEGACY[6:8]),
    _aten._native_batch_norm_legit_no_training.default: (*_LEGACY[:5], *_LEGACY[6:8]),
}
"""Functions that normalise with running statistics, and the names of their arguments by position."""

_FUNCTIONAL = vars(F)

_PLAIN = frozenset({F.batch_norm, torch.batch_norm, torch.native_batch_norm})
"""Those that are called from Python without an operator object in between."""

_READS = frozenset(
    {
        Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
        Tensor.__index__, Tensor.__contains__, Tensor.is_nonzero, Tensor.equal, Tensor.allclose, Tensor.nonzero,
        Tensor.masked_select, Tensor.unique, Tensor.unique_consecutive, torch.is_nonzero, torch.equal, torch.allclose,
        torch.nonzero, torch.masked_select, torch.unique, torch.unique_consecutive, torch.argwhere, Tensor.argwhere,
        torch.bincount, Tensor.bincount, Tensor.__dlpack__, Tensor.__repr__,
    }
)  # fmt: skip
"""Functions by which values, or how many there are, get to Python: what comes behind may depend on the data."""

_MAY_READ = frozenset({Tensor.__getitem__, torch.where, torch.tensor_split, Tensor.tensor_split})
"""Functions that do so with some arguments."""

_BY_VALUE = frozenset({"aten::_pack_padded_sequence", "aten::_nested_tensor_from_mask", "torchvision::nms"})
"""Operators that do so and say nothing of it in their tags."""

_ORDINARY: set[Any] = set()
"""Functions of torch that were heard of before and are none of these: most of what each chunk calls."""

Stats = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Seen:
    """One call of a norm in a forward: its input (R, C, *positions). ``bound``: by an operator that C++ runs."""

    norm: Norm
    x: Tensor
    bound: bool = False


Normaliser = Callable[[Seen], "Stats | None"]
"""Gets the input of a norm; returns the statistics to normalise with, or None for those that it has."""


class Listener(TorchFunctionMode):
    """Calls ``ask`` at every norm of ``norms`` that is to be re-estimated, and normalises with what it returns.

    A norm that works on the batch's own statistics in evaluation mode as well is let through, but never writes
    its running ones; ``mixing`` is set then. Statistics that are no buffers of the model are counted in ``norms.odd``.
    ``reads`` is set where the code looks at values, so that the way it takes may depend on them.
    ``watch`` is told what every other operation returns, and what it was given.
    """

    def __init__(self, norms: Norms, ask: Normaliser, watch: Callable[[Any, Any], None] | None = None) -> None:
        super().__init__()
        self.norms, self.ask, self.watch = norms, ask, watch
        self.mixing = self.reads = False
        self._failed: BaseException | None = None
        self._over = False

    def __enter__(self) -> Listener:
        """Hear from now on."""
        self._over = False
        return super().__enter__()  # type: ignore[no-untyped-call,no-any-return]

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """What ``ask`` raised comes out, also where the model's own code swallowed it."""
        self._over = True
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        failed, self._failed = self._failed, None
        if failed is not None and failed is not error:
            raise failed

    def heard(self, seen: Seen) -> Stats | None:
        """What to normalise with."""
        if self._failed is not None:  # swallowed: let the forward come to its end
            return None
        try:
            return self.ask(seen)
        except BaseException as error:
            self._failed = error
            raise

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let everything through but batch norms."""
        given = kwargs or {}
        # Compiling: the body of a torch.cond is traced here, nothing can be heard. Over: Ctrl-C left it on the stack.
        if self._over or is_dynamo_compiling():
            return func(*args, **given)
        try:
            ordinary = func in _ORDINARY and "out" not in given
        except TypeError:  # an unhashable callable
            ordinary = True
        result = func(*args, **given) if ordinary else self._special(func, types, args, given)
        if self.watch is not None:
            self.watch(result, (args, kwargs))
        return result

    def _special(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if type(func) is FunctionType and func.__globals__ is not _FUNCTIONAL:
            func = original(func, sys._getframe(2))
        if (names := _NAMES.get(func) or _names_of(func)) is not None:
            return self._norm(func, names, types, args, kwargs)
        if func in _READS or func in _MAY_READ:
            self.reads = self.reads or func in _READS or _finds(func, args)
        elif "out" in kwargs or may_write(func):
            keep(func, args, kwargs)
        elif _lasts(func):
            _ORDINARY.add(func)
        return func(*args, **kwargs)

    def _norm(
        self, func: Any, names: tuple[str, ...], types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        mean, var = given.get("running_mean"), given.get("running_var")
        if isinstance(mean, StatisticsOfCall):
            # Statistics of an un-shared function: its norm of this call asks F.batch_norm again, with real ones.
            super().__enter__()  # type: ignore[no-untyped-call]
            try:
                return mean.__torch_function__(func, types, args, kwargs)
            finally:
                super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if given.get("training", False) or mean is None:
            self.mixing = True
            if mean is not None:  # it normalises with the batch: its running statistics would only be written
                norm = self.norms.of(mean, var)
                if norm is not None and not norm.why:
                    norm.why = "normalises with the batch in evaluation mode too: nothing reads its running statistics"
                given |= {"running_mean": mean.clone(), "running_var": None if var is None else var.clone()}
            return func(**given) if type(func) is FunctionType else func(*(given[n] for n in names if n in given))
        norm = self.norms.of(mean, var)
        if norm is None:
            self.norms.odd.add(f"{tuple(given['input'].shape)}")
        elif not norm.why:
            found = self.heard(
                Seen(norm, physical(given["input"]), func not in _PLAIN and type(func) is not FunctionType)
            )
            if found is not None:
                given |= {"running_mean": found[0], "running_var": found[1]}
        if type(func) is FunctionType:
            return func(**given)
        positional = [given.pop(n) for n in names[: len(args)]]
        return func(*positional, **given)


def _names_of(func: Any) -> tuple[str, ...] | None:
    """Of ``F.batch_norm``, where somebody's wrapper has its name since before this was imported."""
    own = type(func) is FunctionType and func.__globals__ is _FUNCTIONAL and func.__name__ == "batch_norm"
    return _BY_NAME if own else None


def _lasts(func: Any) -> bool:
    """Whether it is a function of torch's own, which is there as long as torch is."""
    kind = type(func)
    if kind is FunctionType:
        return func.__globals__ is _FUNCTIONAL
    if kind is MethodWrapperType:  # Tensor.shape.__get__
        return isinstance(func.__self__, GetSetDescriptorType)
    if kind is BuiltinFunctionType:  # torch.conv2d and its like have no self
        return isinstance(func.__self__, type | ModuleType) or getattr(torch, func.__name__, None) is func
    return kind is MethodDescriptorType or kind is WrapperDescriptorType


def tells_values(operator: Any) -> bool:
    """Whether values, or how many there are, get out of tensors by it: where C++ takes a number or a size from one
    (``x[:, :t]``, ``torch.arange(t)``, TorchScript), no function of torch that Python calls shows it.
    """
    tags = getattr(operator, "tags", ())
    told = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    return told or getattr(getattr(operator, "_schema", None), "name", "") in _BY_VALUE


def physical(x: Tensor) -> Tensor:
    """The values that a tensor inside ``torch.func`` transforms stands for: mapped axes become part of the first."""
    while functorch.is_functorch_wrapped_tensor(x):
        mapped = functorch.maybe_get_bdim(x) if functorch.is_batchedtensor(x) else -1
        inner = functorch.get_unwrapped(x)
        x = inner if mapped < 0 else physical(inner.movedim(mapped, 0)).flatten(0, 1)
    return x


def _finds(func: Any, args: tuple[Any, ...]) -> bool:
    """``x[mask]``, ``torch.where(condition)``: as many values as hold; ``x.tensor_split(t)``: where ``t`` says."""
    if func is torch.where:
        return len(args) == 1
    return _is_mask(args[1]) if func is Tensor.__getitem__ else any(isinstance(a, Tensor) for a in args[1:])


def _is_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(p, Tensor) and p.dtype == torch.bool for p in parts)
