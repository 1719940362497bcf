"""The norms of a model as calibration sees them: pairs of running buffers, whoever holds and whoever uses them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnfix.errors import CalibrationError
from bnfix.graph import find_owners
from bnfix.graph.owners import Owners, storage_key
from bnfix.stats import SampleSums, sample_sums

Select = str | Iterable[str] | Callable[[str, nn.Module], bool] | None

FROZEN = "in evaluation mode while the model trains: frozen on purpose (include_frozen=True takes it along)"


@dataclass(eq=False)
class Norm:
    """Running statistics of one norm: known by the identity of its buffers.

    ``key`` and ``var_key`` are the places of its buffers in the model, the same on all ranks. ``why`` is empty for a
    norm to be re-estimated, else the reason why it stays; ``frozen`` marks one that the user froze.
    """

    key: int
    var_key: int
    path: str
    module: nn.Module
    mean: Tensor
    var: Tensor
    tracked: Tensor | None = None
    why: str = ""
    frozen: bool = False

    @property
    def channels(self) -> int:
        """How many channels it has."""
        return self.mean.numel()

    @property
    def eps(self) -> float:
        """What it adds to a variance; of a functional norm, whose module need not know, the usual 1e-5."""
        eps = getattr(self.module, "eps", None)
        return float(eps) if isinstance(eps, int | float) else 1e-5


@dataclass
class Norms:
    """All norms of one model, by the identity of their ``running_mean``; functional ones are found as they are seen.

    ``repeats`` holds, for a norm's key and the how-manieth of its calls, how often all samples come one after the other
    in the rows of its input, where that is more than once.
    """

    model: nn.Module
    known: dict[int, Norm] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    instance: tuple[str, ...] = ()
    odd: set[str] = field(default_factory=set)
    repeats: dict[tuple[int, int], int] = field(default_factory=dict)
    _tensors: dict[int, tuple[int, str, nn.Module, str]] = field(default_factory=dict)
    _decide: Callable[[str, nn.Module], tuple[str, bool]] = lambda _path, _module: ("", False)

    def of(self, mean: Tensor | None, var: Tensor | None) -> Norm | None:
        """The norm that these buffers belong to; None if they are no buffers of the model."""
        if mean is None or var is None:
            return None
        norm = self.known.get(id(mean))
        if norm is not None:
            return norm if norm.var is var else None
        home, other = self._tensors.get(id(mean)), self._tensors.get(id(var))
        if home is None or other is None:
            own = self._own(mean), self._own(var)  # buffer.detach(), buffer.data
            return None if own[0] is None or own[1] is None else self.of(*own)
        key, path, module, name = home  # functional: statistics that the model's own code hands to F.batch_norm
        site = path if name in ("running_mean", "") else f"{path}.{name}" if path else name
        why, frozen = self._decide(site, module)
        norm = Norm(key, other[0], site, module, mean, var, None, why, frozen)
        self.known[id(mean)] = norm
        return norm

    def _own(self, tensor: Tensor) -> Tensor | None:
        """The buffer that ``tensor`` is, or is another name of: the same memory in the same form."""
        if id(tensor) in self._tensors:
            return tensor
        form = storage_key(tensor)
        if form is None:
            return None
        held = (_held(place) for place in self._tensors.values())
        return next((t for t in held if t is not None and id(t) in self._tensors and storage_key(t) == form), None)

    def sums(self, place: tuple[int, int], x: Tensor, samples: int, mask: Tensor | None) -> SampleSums:
        """Per-sample sums of the input ``x`` of a norm, at one of its calls in the forward of so many samples."""
        return sample_sums(x, samples, mask, self.repeats.get(place, 1))

    def meet(self, key: int, var_key: int) -> None:
        """Know the norm with these buffers, also if only other ranks have come by it."""
        if all(norm.key != key for norm in self.known.values()):
            at = {place[0]: _held(place) for place in self._tensors.values() if place[0] in (key, var_key)}
            self.of(at.get(key), at.get(var_key))

    @property
    def some(self) -> str:
        """The first names, for a hint."""
        return ", ".join(n.path for n in list(self.known.values())[:5])

    @property
    def half(self) -> bool:
        """Whether the model computes in half precision, by its parameters or under autocast."""
        kinds = {p.dtype for p in self.model.parameters()}
        autocast = any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
        return autocast or bool(kinds & {torch.float16, torch.bfloat16})

    def __iter__(self) -> Iterator[Norm]:
        return iter(sorted(self.known.values(), key=lambda n: n.key))

    def by_key(self, key: int) -> Norm:
        """The norm with this key."""
        return next(norm for norm in self.known.values() if norm.key == key)


def norms_device(norms: Norms) -> torch.device:
    """Where the statistics live."""
    return next((n.mean.device for n in norms.known.values()), torch.device("cpu"))


def _held(place: tuple[int, str, nn.Module, str]) -> Tensor | None:
    found = getattr(place[2], place[3], None)
    return found if isinstance(found, Tensor) else None


def holds_statistics(module: nn.Module) -> bool:
    """Whether a ``running_mean`` is its own, and not another module's that it passes on."""
    return "running_mean" in module.__dict__ or "running_mean" in module._buffers


def find_norms(
    model: nn.Module, select: Select = None, include_frozen: bool = False, owners: Owners | None = None
) -> Norms:
    """Every norm with running statistics in ``model``, and what is to be done with it; ``owners`` as it has them.

    Raises:
        CalibrationError: a norm is not initialised yet; a name in ``select`` fits no norm.
    """
    owners = owners or find_owners(model)
    if select is not None and not isinstance(select, str) and not callable(select):
        select = tuple(select)
    decide = _decider(model, select, include_frozen)
    places: dict[int, tuple[int, str, nn.Module, str]] = {}
    for position, key in enumerate(owners.tensors):
        slot = next((s for s in owners.tensor_slots[key] if s.registered), None)
        if slot is not None:
            path = slot.path.rpartition(".")[0]
            places[key] = (position, path, slot.container, str(slot.key))
    norms = Norms(model, _tensors=places, _decide=decide)
    without, instance = [], []
    by_memory: dict[int, Norm] = {}
    # A wrapper that passes on what a norm holds comes behind it: it is no other norm.
    for module in sorted(owners.modules.values(), key=holds_statistics, reverse=True):
        path = (owners.paths(module) or ("",))[0]
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):
            if isinstance(mean, Tensor):
                instance.append(path)
            continue
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            if is_lazy(mean) or is_lazy(var):
                raise CalibrationError(
                    f"{path or 'the model'} is not initialised yet",
                    hint="run the model once on an example, then call bnfix",
                )
            if id(mean) not in places:
                continue
            twin = norms.known.get(id(mean))
            if twin is not None and twin.var is var:
                continue
            if mean.is_meta or var.is_meta:
                raise CalibrationError(
                    f"{path or 'the model'} is on the meta device: it has no values",
                    hint="model.to_empty(device='cpu'), and load its weights",
                )
            _refuse_half_shared(
                path, mean, var, twin or by_memory.get(mean.data_ptr()) or by_memory.get(var.data_ptr())
            )
            tracked = getattr(module, "num_batches_tracked", None)
            why, frozen = decide(path, module)
            norms.known[id(mean)] = Norm(
                places[id(mean)][0], places.get(id(var), (-1,))[0], path, module, mean, var,
                tracked if isinstance(tracked, Tensor) else None, why, frozen,
            )  # fmt: skip
            by_memory |= {t.data_ptr(): norms.known[id(mean)] for t in (mean, var) if t.numel()}
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            without.append(path)
    norms.without, norms.instance = tuple(without), tuple(instance)
    if isinstance(select, tuple):
        paths = {p for m in owners.modules.values() for p in owners.paths(m)}
        sites = {f"{p}.{name}" if p else name for _, p, _, name in places.values()}
        unknown = sorted(map(str, set(select) - paths - sites))
        if unknown:
            raise CalibrationError(
                f"select names {unknown[0]!r}, and the model has no such layer",
                hint=f"its norms:  {norms.some} …",
            )
    if isinstance(select, str | tuple) and all(n.why and not n.frozen for n in norms.known.values()):
        raise CalibrationError(f"select={select!r} fits no norm of the model", hint=f"its norms:  {norms.some} …")
    return norms


def _refuse_half_shared(path: str, mean: Tensor, var: Tensor, other: Norm | None) -> None:
    """Two norms that have one buffer in common, or the memory of one, but not both buffers as they are.

    Raises:
        CalibrationError: they would write over one another's statistics.
    """
    if other is None:
        return
    name = "running_mean" if mean.data_ptr() in (other.mean.data_ptr(), other.var.data_ptr()) else "running_var"
    raise CalibrationError(
        f"{path}.{name} and a buffer of {other.path} are different tensors in one place of memory, or the one is "
        "shared and the other not: what is written to one norm would change the other",
        hint="share both:  b.running_mean, b.running_var = a.running_mean, a.running_var\n"
        "or neither:  b.running_mean = a.running_mean.clone(), and the same for running_var",
    )


def _decider(model: nn.Module, select: Select, include_frozen: bool) -> Callable[[str, nn.Module], tuple[str, bool]]:
    chosen = _chooser(select)

    def decide(path: str, module: nn.Module) -> tuple[str, bool]:
        if not chosen(path, module):
            return "not selected", False
        if include_frozen:
            return "", False
        if model.training and not module.training:
            return FROZEN, True
        if "frozen" in type(module).__name__.lower() and not isinstance(module, nn.modules.batchnorm._NormBase):
            return f"a {type(module).__name__} is frozen by its class (include_frozen=True takes it along)", True
        return "", False

    return decide


def _chooser(select: Select) -> Callable[[str, nn.Module], bool]:
    if select is None:
        return lambda _path, _module: True
    if callable(select):
        return select
    if isinstance(select, str):
        try:
            pattern = re.compile(select)
        except re.error as error:
            raise ValueError(f"select={select!r} is no regular expression: {error}") from error
        return lambda path, _module: pattern.search(path) is not None
    names = frozenset(select)
    return lambda path, _module: path in names or any(path.startswith(f"{n}.") for n in names)
