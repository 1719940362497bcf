"""A forward as its calls of modules: who called whom, on what, under which modes; and what it did besides computing."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnfix.errors import PassError, one_line
from bnfix.graph import copy_model, find_owners, norm_modules
from bnfix.graph.first_run import what_it_takes
from bnfix.running import FAILURES, Call

Modes = tuple[Any, ...]


@dataclass(eq=False)
class Frame:
    """One call of one module. ``modes`` are grad mode, autocast and the like as they were when it began.

    ``strange`` says under which other modes its own code works, ``inplace`` what that code changes in place;
    ``changed`` whether a tensor that it was given is another one after it.
    """

    path: str
    module: nn.Module
    parent: Frame | None
    call: Call
    modes: Modes
    output: Any = None
    strange: str = ""
    inplace: str = ""
    changed: bool = False
    children: list[Frame] = field(default_factory=list)

    def inside(self) -> Iterator[Frame]:
        """This call and all calls in it."""
        yield self
        for child in self.children:
            yield from child.inside()


@dataclass
class Watched:
    """One run. ``frames`` are the calls of the model itself; ``wrote`` the attributes and buffers that it left changed
    (by module), statistics of norms aside; ``draws`` whether it drew random numbers of torch's, ``dice`` of others.
    """

    signature: str
    training: bool
    frames: list[Frame]
    wrote: dict[str, str]
    draws: bool
    dice: bool

    @property
    def name(self) -> str:
        """For a reader."""
        return f"{self.signature}{' in training mode' if self.training else ''}"

    def all(self) -> Iterator[Frame]:
        """Every call in it."""
        for frame in self.frames:
            yield from frame.inside()


def watch(model: nn.Module, call: Call, *, training: bool) -> Watched:
    """Run a private copy of ``model`` with gradients on; in training mode the norms themselves stay in evaluation mode.

    Raises:
        PassError: the forward fails.
        TraceError: the model can't be copied.
    """
    copy, _ = copy_model(model)
    owners = find_owners(copy)
    norms = {id(n) for n in norm_modules(owners)}
    copy.train(training)
    for module in owners.modules.values():
        if id(module) in norms:
            module.eval()
    paths = {i: owners.paths(m)[0] for i, m in owners.modules.items()}
    state = {i: _state(m) for i, m in owners.modules.items()}
    torch.manual_seed(0)
    drawn, thrown = torch.get_rng_state(), _dice()
    watching = _Watching(owners.modules.values(), paths)
    try:
        with torch.enable_grad(), watching.hooked():
            call.run(copy)
    except FAILURES as error:
        said = f"the model's forward failed on {call.signature}: {one_line(error)}"
        raise PassError(said, hint=what_it_takes(copy)) from error
    wrote = {paths[i]: what for i, m in owners.modules.items() if (what := _changed(state[i], _state(m)))}
    return Watched(
        call.signature,
        training,
        watching.roots,
        wrote,
        not torch.equal(drawn, torch.get_rng_state()),
        thrown != _dice(),
    )


def modes() -> Modes:
    """What a forward works under, besides the modes of modules."""
    cast = tuple(
        (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")
    )
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), cast, top is not None and bool(top(True))


def difference(one: Modes, other: Modes) -> str:
    """What of ``other`` is not as in ``one``, for a reader; empty where nothing is."""
    names = (
        "no_grad" if one[0] else "enable_grad",
        "inference_mode",
        "autocast",
        "checkpointing or other saved-tensor hooks",
    )
    return next((name for name, a, b in zip(names, one, other, strict=True) if a != b), "")


class _Watching(TorchFunctionMode):
    def __init__(self, modules: Any, paths: Mapping[int, str]) -> None:
        super().__init__()
        self.roots: list[Frame] = []
        self._modules, self._paths = list(modules), paths
        self._stack: list[tuple[Frame, list[tuple[Tensor, int]]]] = []

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        with contextlib.ExitStack() as hooks:
            for module in self._modules:
                enter = module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
                hooks.callback(enter.remove)
                leave = module.register_forward_hook(self._leave, always_call=True)
                hooks.callback(leave.remove)
            with self:
                yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parent = self._stack[-1][0] if self._stack else None
        call = Call(tuple(args), dict(kwargs))
        frame = Frame(self._paths[id(module)], module, parent, call, modes())
        if parent is None:
            self.roots.append(frame)
        else:
            parent.children.append(frame)
            parent.strange = parent.strange or difference(parent.modes, frame.modes)
        self._stack.append((frame, [(t, t._version) for t in call.tensors() if not t.is_inference()]))

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        frame, versions = self._stack.pop()
        frame.output = output
        frame.changed = any(t._version != version for t, version in versions)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note what the code of the innermost module does by itself."""
        frame = self._stack[-1][0] if self._stack else None
        if frame is None:
            return func(*args, **(kwargs or {}))
        frame.strange = frame.strange or difference(frame.modes, modes())
        given = [(t, t._version) for t in Call(tuple(args), dict(kwargs or {})).tensors() if not t.is_inference()]
        out = func(*args, **(kwargs or {}))
        if not frame.inplace and any(t._version != version for t, version in given):
            frame.inplace = str(getattr(func, "__name__", func))
        return out


def _state(module: nn.Module) -> dict[str, Any]:
    """Attributes and buffers of a module by identity, size and version: what is another one afterwards was written."""
    state: dict[str, Any] = {}
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules") or name.startswith(("_forward_", "_backward_")):
            continue
        size = (
            len(value) if isinstance(value, (list, dict, set)) else value if isinstance(value, (int, float)) else None
        )
        state[name] = (value, size)
    for name, buffer in module._buffers.items():
        state[name] = (buffer, buffer._version if buffer is not None and not buffer.is_inference() else None)
    return state


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The first attribute or buffer that was written."""
    for name in (*before, *(n for n in after if n not in before)):
        if name not in before or name not in after:
            return name
        if before[name][0] is not after[name][0] or before[name][1] != after[name][1]:
            return name
    return ""


def _dice() -> Any:
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else (numpy.random.get_state()[1].tobytes(), numpy.random.get_state()[2])
    return random.getstate(), drawn
