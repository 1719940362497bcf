"""What the norms of a model do, seen in a run of a copy: where they are called, and what their forward does besides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from bnfix.errors import PassError, one_line
from bnfix.graph.owners import Owners, find_owners
from bnfix.running import FAILURES, Call, preserved
from bnfix.swaps.site import Site
from bnfix.types import Refusal

_aten, functorch = torch.ops.aten, torch._C._functorch
_LEGACY = ("input", "weight", "bias", "running_mean", "running_var")
_NAMES: Mapping[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    torch.batch_norm: _LEGACY,
    torch.native_batch_norm: _LEGACY,
    _aten.batch_norm: _LEGACY,
    _aten.batch_norm.default: _LEGACY,
    _aten.native_batch_norm: _LEGACY,
    _aten.native_batch_norm.default: _LEGACY,
}
"""Functions that normalise with running statistics, and the names of their first arguments by position."""

ROUNDINGS, OF_HALVES = 32, 4
"""In units of the output's eps and of the largest terms: how far two ways to compute one norm may be apart."""

_FEW, _FAR, _MOST = 8, 10.0, 1e4
"""Of a probe: samples, standard deviations (what clips or activates shows there), and the largest value."""


class NormCalls(TorchFunctionMode):
    """Tells ``heard`` the input and ``running_mean`` of every batch norm that is called, by modules or by functions."""

    def __init__(self, heard: Callable[[Tensor, Tensor | None], None]) -> None:
        super().__init__()
        self.heard = heard

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Let everything through."""
        try:
            names = None if torch.compiler.is_dynamo_compiling() else _NAMES.get(func)
        except TypeError:  # an unhashable callable
            names = None
        if names is not None:
            given = dict(zip(names, args, strict=False)) | dict(kwargs or {})
            self.heard(given["input"], given.get("running_mean"))
        return func(*args, **(kwargs or {}))


@dataclass
class Survey:
    """What was seen: for each site that can't be swapped the reason, and norms that no module is."""

    refused: dict[int, str] = field(default_factory=dict)
    functional: list[Refusal] = field(default_factory=list)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a private copy inside, all of it in evaluation mode and without gradients; it is left as it was.

    Flags are set one by one: ``eval()`` may be the user's own, and do more than that. It does not reach modules in
    Python lists, and this does.
    """
    flags = [(m, m.training) for m in find_owners(model).modules.values()]
    with preserved(model, weights=False), torch.no_grad():  # norms are fitted as the forward comes by
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training


def look(copy: nn.Module, copies: Mapping[int, nn.Module], sites: Sequence[Site], calls: Sequence[Call]) -> Survey:
    """Run ``copy`` on each of ``calls`` and fill in what the ``sites`` do.

    Args:
        copies: for the id of each site its module in ``copy``.

    Raises:
        PassError: the forward fails.
    """
    owners = find_owners(copy)
    watcher = _Watcher(owners, {id(copies[id(s)]): s for s in sites if id(s) in copies})
    for call in calls:
        watcher.counts.clear()
        with watcher.attached(), evaluating(copy), NormCalls(watcher.heard):
            try:
                call.run(copy)
            except FAILURES as error:
                raise PassError(f"the forward failed on {call.signature}: {one_line(error)}") from error
        for site in sites:
            site.calls = max(site.calls, watcher.counts.get(id(site), 0))
    with evaluating(copy):
        watcher.probe()
    return watcher.survey


@dataclass
class _Entered:
    """A module whose forward is running: its input, and which of its own children it has called, in order."""

    module: nn.Module
    x: Tensor | None = None
    wrong: str = ""
    heard: bool = False
    children: list[str] = field(default_factory=list)


class _Watcher:
    """Hooks on all modules of a copy: what each norm of ``sites`` does beyond its normalization, and who else does."""

    def __init__(self, owners: Owners, sites: Mapping[int, Site]) -> None:
        self.owners, self.sites = owners, sites
        self.survey = Survey()
        self.counts: dict[int, int] = {}
        self._stack: list[_Entered] = []
        self._asking = False
        self._inputs: dict[int, tuple[Site, nn.Module, Tensor]] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks that see inputs behind the user's own pre-hooks, and outputs in front of the user's own hooks."""
        handles = []
        try:
            for module in self.owners.modules.values():
                if not isinstance(module, torch.jit.ScriptModule):
                    handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leave, prepend=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._stack.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._asking:
            return
        if self._stack and id(self._stack[-1].module) in self.sites:
            above = self._stack[-1]
            above.children += [name for name, child in above.module._modules.items() if child is module][:1]
        entered = _Entered(module)
        site = self.sites.get(id(module))
        if site is not None:
            self.counts[id(site)] = self.counts.get(id(site), 0) + 1
            given = [*args, *kwargs.values()]
            if len(given) != 1 or not isinstance(given[0], Tensor):
                entered.wrong = "it is called with more than its input"
            elif functorch.is_functorch_wrapped_tensor(given[0]):
                entered.wrong = "it is called inside a transform of torch.func"
            elif given[0].dim() < 2 or given[0].shape[1] != site.channels:
                entered.wrong = (
                    f"its input {tuple(given[0].shape)} has no axis of {site.channels} channels in second place"
                )
            else:
                site.shapes.append(tuple(given[0].shape))
                entered.x = given[0] if site.plain else given[0].detach().clone()
        self._stack.append(entered)

    def _leave(self, module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
        if self._asking:
            return
        while self._stack:
            entered = self._stack.pop()
            if entered.module is module:
                break
        site = self.sites.get(id(module))
        if site is None:
            return
        why = entered.wrong
        if not why and not site.plain and entered.x is not None:
            why = self._beyond(site, module, entered, out)
        if why and entered.heard and not isinstance(module, _NormBase):
            by = f"the code of {type(module).__name__}"
            why = f"F.batch_norm is called by {by}, among other things: make it an nn.BatchNorm"
        if why:
            self.survey.refused.setdefault(id(site), why)

    def heard(self, x: Tensor, mean: Tensor | None) -> None:
        """A batch norm was called: by one of the norms, or by other code, which can't be swapped."""
        if self._asking:
            return
        if self._stack and id(self._stack[-1].module) in self.sites:
            self._stack[-1].heard = True
            return
        caller = self._stack[-1].module if self._stack else self.owners.root
        path = next(iter(self.owners.paths(caller)), "")
        by = f"the code of {type(caller).__name__}"
        slots = self.owners.tensor_slots.get(id(mean), ()) if mean is not None else ()
        for slot in slots:
            site = self.sites.get(id(slot.container))
            if site is not None:
                self.survey.refused[id(site)] = f"{by} hands its statistics to F.batch_norm itself"
                return
        where = next((s.path for s in slots if s.registered), "")
        of = f" with {where}" if where else " without running statistics" if mean is None else ""
        refusal = Refusal(
            path,
            f"F.batch_norm is called by {by}{of}, and no module is there to be swapped: make it an nn.BatchNorm",
            before=f"F.batch_norm({x.shape[1]})",
        )
        if refusal not in self.survey.functional:
            self.survey.functional.append(refusal)

    # ------------------------------------------------------------------------------------ what a subclass does

    def _beyond(self, site: Site, module: nn.Module, entered: _Entered, out: Any) -> str:
        """Why ``module`` is more than a norm and some of its own submodules behind it; sets ``site.after``."""
        assert entered.x is not None
        kind = type(module).__name__
        if not isinstance(out, Tensor) or out.shape != entered.x.shape:
            return f"{kind} returns more than a normalised input"
        after = tuple(entered.children)
        if id(site) in self._inputs and after != site.after:
            return f"{kind} does different things in different calls"
        site.after = after
        if len(set(after)) != len(after):
            return f"{kind} calls one of its submodules twice"
        amplitude, expected = _normalised(site, module, entered.x, on_batch=site.affine is None)
        if not _close(out, self._behind(module, after, expected.to(out.dtype)), amplitude):
            then = f" and {', '.join(after)} behind that" if after else ""
            return f"{kind} does more in its forward than normalise{then}: bnfix does not know what to keep of it"
        self._inputs.setdefault(id(site), (site, module, entered.x[:_FEW].clone()))
        return ""

    def _behind(self, module: nn.Module, after: Sequence[str], x: Tensor) -> Tensor:
        self._asking = True
        try:
            for name in after:
                x = module.get_submodule(name)(x)
        finally:
            self._asking = False
        return x

    def probe(self) -> None:
        """Once the hooks are off: the same far from the mean, and in training mode, with the batch or frozen."""
        for key, (site, module, x) in self._inputs.items():
            if key in self.survey.refused:
                continue
            why = self._far_away(site, module, x) or self._in_training(site, module, x)
            if why:
                self.survey.refused[key] = why

    def _far_away(self, site: Site, module: nn.Module, like: Tensor) -> str:
        affine = site.affine
        if affine is None:
            return ""
        shape = (1, -1, *(1,) * (like.dim() - 2))
        noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        scale = torch.where(affine.scale == 0, torch.ones_like(affine.scale), affine.scale)
        z = noise.to(like.device) * _FAR - affine.shift.reshape(shape)
        x = (z / scale.reshape(shape)).clamp(-_MOST, _MOST).to(like.dtype)
        try:
            out = module.forward(x.clone())
        except FAILURES:  # it runs on what the model gives it
            return ""
        amplitude, expected = _normalised(site, module, x, on_batch=False)
        if _close(out, self._behind(module, site.after, expected.to(out.dtype)), amplitude):
            return ""
        return f"{type(module).__name__} does more in its forward than normalise, seen on inputs far from the mean"

    def _in_training(self, site: Site, module: nn.Module, x: Tensor) -> str:
        buffers = [(b, b.clone()) for b in module._buffers.values() if b is not None]
        flags = [(m, m.training) for m in module.modules()]
        try:
            for part, _ in flags:
                part.training = True
            torch.manual_seed(0)
            try:
                out = module.forward(x.clone())
            except FAILURES:  # one value a channel, say: nothing can be seen
                return ""
            for on_batch in (True, False) if site.affine is not None else (True,):
                amplitude, expected = _normalised(site, module, x, on_batch=on_batch)
                torch.manual_seed(0)  # dropout behind it draws what it drew before
                if _close(out, self._behind(module, site.after, expected.to(out.dtype)), amplitude):
                    site.frozen = not on_batch
                    return ""
        finally:
            for part, training in flags:
                part.training = training
            for buffer, value in buffers:
                buffer.copy_(value)
        return f"{type(module).__name__} does more in training mode than normalise with the batch"


def _normalised(site: Site, module: nn.Module, x: Tensor, *, on_batch: bool) -> tuple[Tensor, Tensor]:
    """The largest terms by channel, shape (1, C, 1 …), and ``x`` normalised, both in float64."""
    shape = (1, -1, *(1,) * (x.dim() - 2))
    wide = x.detach().double()
    if on_batch:
        axes = [0, *range(2, x.dim())]
        weight, bias = site.tensor("weight"), site.tensor("bias")
        var, mean = torch.var_mean(wide, axes, correction=0)
        scale = torch.rsqrt(var + site.eps) * (1.0 if weight is None else weight.detach().double())
        shift = (0.0 if bias is None else bias.detach().double()) - mean * scale
    else:
        affine = site.affine
        assert affine is not None
        scale, shift = affine.scale, affine.shift
    scale, shift = scale.to(x.device).reshape(shape), shift.to(x.device).reshape(shape)
    most = wide.abs().amax([0, *range(2, x.dim())], keepdim=True) if wide.numel() else torch.zeros_like(scale)
    return most * scale.abs() + shift.abs(), wide * scale + shift


def _close(found: Tensor, expected: Tensor, amplitude: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    unit = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
    unit *= ROUNDINGS if unit < 1e-5 else OF_HALVES
    distance = (found.double() - expected.double()).abs()
    same = distance <= unit * (amplitude + expected.double().abs())
    return bool((same | (found.isnan() & expected.isnan())).all())
