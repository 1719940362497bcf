"""The float64 oracle: what a model computes when rounding does not matter, and how much it does matter.

Beside the oracle's outputs stand those of the model in its own precision, drawn several times (as it
is, inputs moved by one unit in the last place, other kernels): their distance from the oracle is the
model's own noise, the yardstick of everything that :mod:`bnfix.parity.compare` judges.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnfix.errors import PassError, one_line
from bnfix.graph import copy_model
from bnfix.parity.chance import differing, generators, other_numbers, where_drawn
from bnfix.parity.outputs import named_tensors
from bnfix.running import FAILURES, Call, preserved
from bnfix.running.call import map_tensors
from bnfix.types import CallSite

SITE_SAMPLE = 65_536
"""At most so many elements are kept of each output of a site."""

DRAWS = ("plain", "ulp", "kernels")
"""The draws of the noise, in order: the model as it is, inputs moved by 1 ulp, oneDNN switched off."""

FEW = 64
"""An output with fewer numbers says too little about its own noise: more draws are made, all calls are pooled."""

PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "linear")
"""Operations (their names without ``aten.``) whose type is the type that a model computes in."""


@dataclass(frozen=True)
class Recorded:
    """One run: its outputs by name, and per site (a module path) the outputs of its calls, subsampled.

    ``order`` holds what ran at the sites, call after call: ``bn``, ``relu``, ``bn@1`` (the second of ``bn``).
    ``drew`` names the generators that the run drew from: ``torch``, ``random``, ``numpy``.
    """

    outputs: Mapping[str, Tensor]
    sites: Mapping[str, list[Tensor]] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    drew: tuple[str, ...] = ()

    def by_site(self, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """What was recorded, by call: ``bn``, ``bn@1``. ``names`` leads from the name to show to the site's own."""
        shown = names if names is not None else {site: site for site in self.sites}
        return {site_call(name, i): t for name, site in shown.items() for i, t in enumerate(self.sites[site])}


@dataclass(frozen=True)
class Reference:
    """One call of the reference: the oracle's outputs and the model's own, drawn one or more times.

    ``draws[0]`` is the plain run; ``moved`` holds the indices of the draws with moved inputs.
    ``dtype`` is the lowest type that a convolution or matrix product of the plain run computed in.
    ``exact`` is False where the model can't run in float64: then ``oracle`` is its plain run, and
    nothing can be proven, only refuted; ``notes`` says why. ``again`` is a run with other random numbers,
    where the model draws any and they tell; then ``chance`` says where it draws them.
    """

    call: Call
    oracle: Recorded
    draws: tuple[Recorded, ...]
    dtype: torch.dtype
    moved: tuple[int, ...] = ()
    exact: bool = True
    notes: tuple[str, ...] = ()
    again: Recorded | None = None
    chance: str = ""


def _private_copy(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with ``model``, and whose hooks write nothing into the user's objects.

    Raises:
        TraceError: the model can't be copied.
    """
    return copy_model(model)[0]


def record(model: nn.Module, call: Call, sites: Sequence[str] = ()) -> Recorded:
    """Run ``model`` once in the modes it is in, without gradients; it is left as it was found.

    Of each call of each site at most 65,536 elements are kept, taken at a fixed stride that has no
    factor in common with the tensor's size, so that no channel is passed over. They are cloned: an
    in-place activation behind the site would change them.

    Raises:
        PassError: the model's own forward failed.
        ValueError: a site is no module of the model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [s for s in sites if s not in modules]
    if unknown:
        raise ValueError(f"{unknown[0]}: no module of this {type(model).__name__}")
    kept: dict[str, list[Tensor]] = {}
    order: list[str] = []

    def keep(site: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in named_tensors(output).values():
                if _is_wrapped(tensor):
                    continue
                values = kept.setdefault(site, [])
                order.append(site_call(site, len(values)))
                values.append(subsample(tensor))

        return hook

    with preserved(model), torch.no_grad(), contextlib.ExitStack() as stack:
        for site in sites:
            stack.callback(modules[site].register_forward_hook(keep(site)).remove)
        before = generators()
        outputs = named_tensors(_run(model, call))
        outputs = {name: _dense(t).detach().clone() for name, t in outputs.items()}
        drew = tuple(name for name, state in generators().items() if before.get(name, state) != state)
    return Recorded(outputs, kept | {site: [] for site in sites if site not in kept}, tuple(order), drew)


def site_call(site: str, call: int) -> str:
    """One of the calls of a site by the name that reports give it: ``bn``, ``bn@1``."""
    return str(CallSite(site, call))


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _is_wrapped(tensor: Tensor) -> bool:
    """Inside vmap and its like a tensor has no values to look at."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def subsample(tensor: Tensor) -> Tensor:
    """At most :data:`SITE_SAMPLE` elements of ``tensor``, flat, cloned, the same ones for the same shape."""
    flat = tensor.detach().reshape(-1)
    stride = max(1, math.ceil(flat.numel() / SITE_SAMPLE))
    while flat.numel() and math.gcd(stride, flat.numel()) > 1:
        stride += 1
    return flat[::stride].clone()


def references(
    model: nn.Module, calls: Sequence[Call], *, sites: Sequence[str] = (), draws: Sequence[str] = DRAWS
) -> list[Reference]:
    """The oracle and the noise of ``model`` on each of ``calls``; the model is left as it was found.

    One run in float64 and one plain run a call; the further ``draws`` are made on the first call
    of each signature without its batch (compare pools them). Modes are not changed: give a model in eval mode.

    Raises:
        PassError: the model fails in its own precision.
        TraceError: the model can't be copied.
    """
    if not draws or draws[0] != "plain" or set(draws) - set(DRAWS):
        raise ValueError(f"draws start with 'plain' and are out of {DRAWS}, not {tuple(draws)}")
    wide = double_copy(model)
    found: list[Reference] = []
    drawn: set[tuple[Any, ...]] = set()
    for call in calls:
        with _Precision() as seen:
            plain = record(model, call, sites)
        oracle, notes, random = _oracle(wide, call, sites)
        if seen.dtype == torch.float64:
            notes = (*notes, "the model computes in float64: the oracle is no more exact than the model itself")
        kind = tuple(tuple(t.shape[1:]) for t in call.tensors())
        runs = [plain]
        moved: tuple[int, ...] = ()
        again, chance = None, ""
        if kind not in drawn and (random or seen.random or plain.drew):
            with preserved(model), other_numbers():
                again = record(model, call, sites)
            if differing(plain.outputs, again.outputs) or differing(plain.by_site(), again.by_site()):
                chance = where_drawn(random or seen.random, plain.drew)
        if kind not in drawn or oracle is None or seen.dtype == torch.float64:  # then the plain run shows no noise
            drawn.add(kind)
            extra, moved = _extra_draws(model, call, sites, draws[1:], few=_few(plain))
            runs += extra
        exact = oracle is not None
        again = again if chance else None
        found.append(Reference(call, oracle or plain, tuple(runs), seen.dtype, moved, exact, notes, again, chance))
    return found


def double_copy(model: nn.Module) -> nn.Module:
    """A private copy of ``model`` in float64, tensors kept as plain attributes included.

    Raises:
        TraceError: the model can't be copied.
    """
    wide = _private_copy(model).double()
    done: dict[int, Tensor] = {}
    for module in wide.modules():
        for key, value in list(vars(module).items()):
            if not key.startswith("_") or isinstance(value, Tensor):
                changed = map_tensors(value, lambda t: done.setdefault(id(t), _widened(t)))
                if any(a is not b for a, b in zip(tree_leaves(changed), tree_leaves(value), strict=True)):
                    module.__dict__[key] = changed
    return wide


def _oracle(
    wide: nn.Module, call: Call, sites: Sequence[str]
) -> tuple[Recorded | None, tuple[str, ...], dict[str, str]]:
    """The float64 run, or None with the reason where the model has none; and where it drew random numbers."""
    wide_call = call.map(_widened)
    with _paths(wide) as path, _Precision(path) as seen:
        try:
            recorded = record(wide, wide_call, sites)
        except PassError as error:
            return None, (f"no float64 oracle, the model doesn't run in float64: {error.message}",), {}
    if not seen.below:
        return recorded, (), seen.random
    shown = "; ".join(f"{where or '(root)'} ({op})" for where, op in list(seen.below.items())[:3])
    more = f" and {len(seen.below) - 3} more" if len(seen.below) > 3 else ""
    return recorded, (f"oracle contaminated at {shown}{more}: computed below float64 there",), seen.random


def _extra_draws(
    model: nn.Module, call: Call, sites: Sequence[str], names: Sequence[str], *, few: bool
) -> tuple[list[Recorded], tuple[int, ...]]:
    runs: list[Recorded] = []
    moved: list[int] = []
    if "ulp" in names:
        for seed in range(4 if few else 1):
            shifted = _moved(call, seed)
            if shifted is not None:
                moved.append(1 + len(runs))
                runs.append(record(model, shifted, sites))
    if "kernels" in names and not _on_gpu(model):
        onednn: Any = torch.backends.mkldnn
        enabled = onednn.enabled
        onednn.enabled = False
        try:
            runs.append(record(model, call, sites))
        finally:
            onednn.enabled = enabled
    return runs, tuple(moved)


def _few(run: Recorded) -> bool:
    return any(0 < t.numel() < FEW and t.is_floating_point() for t in run.outputs.values())


def _on_gpu(model: nn.Module) -> bool:
    return any(p.is_cuda for p in model.parameters())


def _moved(call: Call, seed: int = 0) -> Call | None:
    """``call`` with each floating input moved by about one ulp; None where no input can be moved.

    Tensors of whole numbers stay: a mask or an index kept as float would mean something else.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = 0

    def move(t: Tensor) -> Tensor:
        nonlocal changed
        if not t.is_floating_point() or bool((t == t.round()).all()):
            return t
        changed += 1
        sign = torch.randint(0, 2, t.shape, generator=generator).to(t.device) * 2 - 1
        return (t.double() * (1 + sign * torch.finfo(t.dtype).eps)).to(t.dtype)

    shifted = call.map(move)
    return shifted if changed else None


def _widened(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() and t.dtype != torch.float64 else t


def _run(model: nn.Module, call: Call) -> Any:
    try:
        return call.run(model)
    except FAILURES as error:
        raise PassError(f"the forward failed on {call.signature}: {one_line(error)}") from error


@contextlib.contextmanager
def _paths(model: nn.Module) -> Iterator[list[str]]:
    """The path of the module that runs right now, on top of a stack."""
    stack: list[str] = [""]
    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():
            if not path:
                continue
            enter = module.register_forward_pre_hook(lambda _m, _i, path=path: stack.append(path))
            leave = module.register_forward_hook(lambda _m, _i, _o: (stack.pop(), None)[1], always_call=True)
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        yield stack


class _Precision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which types a run computes in: ``dtype``, the lowest of its products; ``below`` float64: where, by module.

    ``random`` holds the operations that draw random numbers, by module likewise.
    """

    supports_higher_order_operators = True

    def __init__(self, path: list[str] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._path = path
        self._products: set[torch.dtype] = set()
        self._all: set[torch.dtype] = set()
        self.below: dict[str, str] = {}
        self.random: dict[str, str] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The lowest type of the products, of everything where there was none, float32 where nothing was floating."""
        return max(self._products or self._all, key=lambda d: torch.finfo(d).eps, default=torch.float32)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(func, torch._ops.OpOverload):  # torch.cond and its like: what runs inside comes by itself
            return out
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random.setdefault(self._path[-1] if self._path else "", str(func._schema.name).replace("::", "."))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if not (isinstance(t, Tensor) and t.is_floating_point()):
                continue
            name = func._schema.name.removeprefix("aten::")
            self._all.add(t.dtype)
            if name.startswith(PRODUCTS):
                self._products.add(t.dtype)
            if self._path is not None and t.dtype != torch.float64 and _reads_floats(args, kwargs):
                self.below.setdefault(self._path[-1], f"{name} in {str(t.dtype).removeprefix('torch.')}")
        return out


def _reads_floats(args: Any, kwargs: Any) -> bool:
    """Constants made from nothing (zeros, arange) are exact; only what is computed from floats can lose digits."""
    return any(isinstance(t, Tensor) and t.is_floating_point() for t in tree_leaves((args, kwargs or {})))
