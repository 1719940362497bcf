"""Where norms are called in a forward, how often, and by whom: seen in runs of a private copy."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnfix.errors import PassError, one_line
from bnfix.graph import copy_model, find_owners, norm_modules
from bnfix.graph.first_run import what_it_takes
from bnfix.graph.owners import Owners
from bnfix.graph.per_call import arguments_of
from bnfix.running import FAILURES, Call


@dataclass(frozen=True)
class Function:
    """A batch norm that code runs by itself: the names of the tensors handed to it; None where they are no tensors
    that the model holds. ``inside`` is the norm module in whose call it ran.
    """

    mean: str
    var: str | None
    weight: str | None
    bias: str | None
    inside: str | None


@dataclass
class Forward:
    """What one run of the model showed. ``calls`` counts those of each norm module by its path."""

    signature: str
    training: bool
    calls: Counter[str] = field(default_factory=Counter)
    functions: list[Function] = field(default_factory=list)
    roots: int = 0
    """How often the model itself was called: once, unless the user's own ``forward=`` does it otherwise."""
    outside: set[str] = field(default_factory=set)
    """Norms that were called while the model was not."""

    @property
    def name(self) -> str:
        """For a reader."""
        return f"{self.signature}{' in training mode' if self.training else ''}"


def forwards(model: nn.Module, calls: Sequence[Call]) -> tuple[list[Forward], tuple[str, ...]]:
    """What each call runs, in evaluation mode and in training mode, and what could not be seen.

    In training mode the norms themselves are in evaluation mode: what counts is the way that the forward takes.

    Raises:
        PassError: the forward fails in evaluation mode.
        TraceError: the model can't be copied.
    """
    seen: list[Forward] = []
    notes: list[str] = []
    for training in (False, True):
        copy, _ = copy_model(model)
        owners = find_owners(copy)
        norms = norm_modules(owners)
        copy.train(training)
        for norm in norms:
            norm.eval()
        for call in calls:
            run = _Run(owners, norms, Forward(call.signature, training))
            try:
                with torch.no_grad(), run.watching(copy):
                    call.run(copy)
            except FAILURES as error:
                if not training:
                    said = f"the model's forward failed on {call.signature}: {one_line(error)}"
                    raise PassError(said, hint=what_it_takes(copy)) from error
                notes.append(
                    f"in training mode the forward fails on {call.signature} ({one_line(error, 100)}): whether it "
                    "calls its norms as often there is not known"
                )
                continue
            seen.append(run.seen)
    return seen, tuple(notes)


class _Run(TorchFunctionMode):
    def __init__(self, owners: Owners, norms: Sequence[nn.Module], seen: Forward) -> None:
        super().__init__()
        self.seen = seen
        self._owners, self._norms = owners, norms
        self._inside: list[str] = []
        self._active = 0
        self._names = {i: owners.paths(t)[0] for i, t in owners.tensors.items()}
        self._storages = {
            t.untyped_storage().data_ptr(): self._names[i]
            for i, t in owners.tensors.items()
            if t.layout == torch.strided and not t.is_meta and t.numel()
        }

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count inside; hooks of ours are gone afterwards."""
        with contextlib.ExitStack() as hooks:
            for module, enter, leave in (
                (model, self._begin, self._end),
                *((n, self._enter(self._owners.paths(n)[0]), self._leave) for n in self._norms),
            ):
                before = module.register_forward_pre_hook(enter, prepend=True)
                hooks.callback(before.remove)
                behind = module.register_forward_hook(leave, always_call=True)
                hooks.callback(behind.remove)
            with self:
                yield

    def _begin(self, *_: Any) -> None:
        self.seen.roots += 1
        self._active += 1

    def _end(self, *_: Any) -> None:
        self._active -= 1

    def _enter(self, path: str) -> Any:
        def enter(*_: Any) -> None:
            self.seen.calls[path] += 1
            self._inside.append(path)
            if not self._active:
                self.seen.outside.add(path)

        return enter

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note every batch norm whose statistics the model holds."""
        given = arguments_of(func, args, kwargs)
        mean = self._held(given.get("running_mean")) if given is not None else None
        if given is not None and mean is not None:
            inside = self._inside[-1] if self._inside else None
            var, weight, bias = (self._name(given.get(r)) for r in ("running_var", "weight", "bias"))
            self.seen.functions.append(Function(mean, var, weight, bias, inside))
            if not self._active:
                self.seen.outside.add(mean)
        return func(*args, **(kwargs or {}))

    def _name(self, tensor: Any) -> str | None:
        return self._names.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def _held(self, tensor: Any) -> str | None:
        """The name of a tensor of the model; ``part of …`` for a view of one."""
        name = self._name(tensor)
        if name is None and isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.numel():
            whole = self._storages.get(tensor.untyped_storage().data_ptr())
            return f"part of {whole}" if whole is not None else None
        return name
