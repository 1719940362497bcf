"""Facts from a run: every operation noted as it happens, where ``torch.export`` can't trace a forward.

Numbers are real, so that a forward may do what it likes with them: ``if y.sum() > 0``, ``.item()``, NumPy. What is
noted is one way through the forward, the one that it took. ``decisions`` says what that depended on.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from bnfix.errors import TraceError, one_line
from bnfix.graph.owners import find_owners
from bnfix.graph.sources.decisions import Holding, Noting, Tape, watching
from bnfix.graph.sources.layout import TENSOR, KeyOf, Layout, described, name_of, named_arguments, operation
from bnfix.types import CallSite, Route

_LIFTED = ("lift_fresh", "lift_fresh_copy", "lift")  # a tensor that Python code wrote down: torch.tensor([1., 2.])


def trace(
    copy: nn.Module,
    call: Any,
    key_of: KeyOf,
    *,
    tape: Tape | None = None,
    turn: int | None = None,
    limit: int | None = None,
) -> tuple[Route, Tape]:
    """Run ``copy`` (a private one) once on ``call`` and note what it does, and what it decides on data.

    Args:
        key_of: the key of a parameter, buffer or constant of the copy, None for a tensor that is no part of the model.
        tape: hold the run to these decisions.
        turn: the number of a decision that Python code reads, to be taken the other way.
        limit: give up after so many operations: what was turned may be the end of a loop.

    Raises:
        TraceError: the forward fails while it is watched.
    """
    deciding: Noting | Holding = Noting(turn) if tape is None else Holding(tape.blank())
    call = call.private()
    recorder = _Recorder(key_of, deciding, limit)
    for i, tensor in enumerate(call.tensors()):
        recorder.give(tensor, kind="input", target=f"input_{i}")
    try:
        with torch.no_grad(), recorder.stacks(copy), watching(recorder.see):
            returned = call.apply(copy)
    except Exception as error:  # whatever the user's forward raises, or PyTorch where it lets nobody watch
        raise TraceError(f"a run on {call.signature} can't be recorded: {one_line(error, 200)}") from error
    outputs = [recorder.value_of(t) for t in tree_leaves(returned) if isinstance(t, Tensor)]
    ended = f"{call.signature}, one decision turned" if turn is not None else call.signature
    return Route(ended, recorder.layout.finish(outputs)), deciding.tape


class _Recorder:
    """Writes operations down, and knows which one each tensor comes from."""

    def __init__(self, key_of: KeyOf, deciding: Noting | Holding, limit: int | None = None) -> None:
        self.layout = Layout(key_of)
        self._limit = limit
        self._deciding = deciding
        self._stack: list[str] = []
        self._calls: dict[str, int] = {}
        # By identity; where a tensor is a new name of a known one (``y.data``), by what it has in common with it.
        self._known: dict[int, tuple[Any, Any]] = {}
        self._stored: dict[int, list[tuple[Any, Any]]] = {}
        self._storages: dict[int, StorageWeakRef] = {}  # no address is given out again while these live
        self._items: dict[tuple[int, int], int] = {}

    @contextlib.contextmanager
    def stacks(self, model: nn.Module) -> Iterator[None]:
        """Follow which modules are being called, those included that no parent has registered."""
        owners = find_owners(model)
        with contextlib.ExitStack() as hooks:
            for module in owners.modules.values():
                path = owners.paths(module)[0]
                enter = module.register_forward_pre_hook(lambda _m, _i, path=path: self._enter(path), prepend=True)
                leave = module.register_forward_hook(lambda _m, _i, _o: self._leave(), always_call=True)
                hooks.callback(enter.remove)
                hooks.callback(leave.remove)
            yield

    def _enter(self, path: str) -> None:
        number = self._calls.get(path, 0)
        self._calls[path] = number + 1
        self._stack.append(f"{path}@{number}" if number else path)

    def _leave(self) -> None:
        self._stack.pop()

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> Any:
        """Write one operation down; returns what it gives to the forward."""
        name = name_of(func)
        if name in _LIFTED and isinstance(args[0], Tensor) and self._find(args[0]) is None:
            self.give(args[0], kind="constant", target=f"constant_{len(self.layout.ops)}")
        arguments = named_arguments(func, args, kwargs)
        fields = operation(func, name, arguments, self.value_of, (Tensor,), tuple(self._stack))
        out = self._deciding.settle(func, args, kwargs, out)
        if fields["kind"] != "other" and isinstance(self._deciding, Noting):
            self._deciding.layer = tuple(sorted(fields["tensors"].items()))
        if self._limit is not None and len(self.layout.ops) > self._limit:
            raise RuntimeError(f"no end after {self._limit} operations")
        index = self.layout.add(**fields, **described(out))
        if isinstance(out, Tensor):
            self._bind(out, index, bool(func._schema.is_mutable))
        elif isinstance(out, (tuple, list)):
            for i, item in enumerate(out):
                if isinstance(item, Tensor):
                    self._bind(item, (index, i, described(item)), bool(func._schema.is_mutable))
        return out

    def give(self, tensor: Tensor, *, kind: str, target: str) -> int:
        """A tensor that no operation made."""
        index = self.layout.add(kind=kind, target=target, site=CallSite(""), **described(tensor))
        self._bind(tensor, index, True)
        return index

    def value_of(self, argument: Any) -> Any:
        """What an argument stands for, in the terms of :mod:`~bnfix.graph.sources.layout`."""
        if isinstance(argument, Tensor):
            found = self._find(argument)
            if found is None:  # from NumPy, from another thread, from an object among the inputs
                return self.give(argument, kind="input", target=f"unknown_{len(self.layout.ops)}")
            return found
        if isinstance(argument, (tuple, list)):
            return [self.value_of(a) for a in argument]
        return None

    def _find(self, tensor: Tensor) -> Any:
        reference, value = self._known.get(id(tensor), (None, None))
        if reference is not None and reference() is tensor:
            return self._index(value)
        key = self.layout.key_of(tensor)
        if key is not None:
            return (TENSOR, key)
        storage = _storage(tensor)
        entries = self._stored.get(storage.cdata, []) if storage is not None else []
        if not entries:
            return None
        alike = [v for geometry, v in entries if geometry == _geometry(tensor)]
        return self._index((alike or [v for _, v in entries])[-1])

    def _index(self, value: Any) -> int:
        """The operation of a value; one of several outputs gets an operation of its own when it is first read."""
        if isinstance(value, int):
            return value
        source, item, fields = value
        if (source, item) not in self._items:
            op = self.layout.ops[source]
            self._items[source, item] = self.layout.add(
                kind="other", target="getitem", site=op.site, inputs=(source,), reads={"#0": source},
                attrs={"#1": item}, stack=op.stack, **fields,
            )  # fmt: skip
        return self._items[source, item]

    def _bind(self, tensor: Tensor, value: Any, written: bool) -> None:
        if not written and self.layout.key_of(tensor) is not None:
            return  # a weight that comes back as it is stays that weight
        self._known[id(tensor)] = (weakref.ref(tensor), value)
        storage = _storage(tensor)
        if storage is not None:
            self._storages.setdefault(storage.cdata, storage)
            self._stored.setdefault(storage.cdata, []).append((_geometry(tensor), value))


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (RuntimeError, NotImplementedError):  # sparse tensors, and those inside vmap
        return None


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
