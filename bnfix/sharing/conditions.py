"""When the calls of a network may become one: every condition that runs show, with its reason in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bnfix.errors import one_line
from bnfix.graph import NormPerCall, copy_model, find_owners, norm_modules
from bnfix.running import FAILURES, Call
from bnfix.sharing.concatenating import concatenated, parted
from bnfix.sharing.joint import check_first
from bnfix.sharing.rewritten import call_together
from bnfix.sharing.watching import Frame, Watched, difference
from bnfix.types import CallSite


class UnfitError(Exception):
    """A condition that does not hold, in words."""


@dataclass(frozen=True)
class Candidate:
    """One network, ``site``, that the forward of one module, ``caller``, calls ``count`` times."""

    caller: str
    site: str
    count: int
    network: nn.Module = field(compare=False, repr=False)

    @property
    def calls(self) -> tuple[str, ...]:
        """Its call sites."""
        return tuple(str(CallSite(self.site, i)) for i in range(self.count))

    @property
    def told(self) -> str:
        """For a reader."""
        return f"{type(self.network).__name__}, {self.count} calls"


def candidates(runs: Sequence[Watched]) -> list[Candidate]:
    """The networks with norms in them that the code of one module calls several times in one of its own calls."""
    found: dict[tuple[str, str], Candidate] = {}
    for run in runs:
        for frame in run.all():
            groups: dict[str, list[Frame]] = {}
            for child in frame.children:
                groups.setdefault(child.path, []).append(child)
            for path, group in groups.items():
                known = found.get((frame.path, path))
                if len(group) > max(1, known.count if known else 0) and norms_in(group[0].module):
                    found[frame.path, path] = Candidate(frame.path, path, len(group), group[0].module)
    return list(found.values())


def norms_in(module: nn.Module) -> list[nn.Module]:
    """The norms of a network."""
    return norm_modules(find_owners(module))


def calls_of(run: Watched, one: Candidate) -> list[tuple[Frame, list[Frame]]]:
    """The calls of the caller in one run, each with the calls of the network in it."""
    return [(f, [c for c in f.children if c.path == one.site]) for f in run.all() if f.path == one.caller]


def check(model: nn.Module, one: Candidate, runs: Sequence[Watched]) -> None:
    """Every condition that runs show.

    Raises:
        UnfitError: one that does not hold.
    """
    registered = dict(model.named_modules(remove_duplicate=False))
    if one.site not in registered or one.caller not in registered:
        raise UnfitError("no registered name leads to it: it is held in a list or another object")
    module = registered[one.site]
    _check_module(module, one)
    for run in runs:
        _check_inner(run, one)
        for frame, group in calls_of(run, one):
            if len(group) != one.count:
                raise UnfitError(f"how often it is called changes: {one.count} times, and {len(group)} on {run.name}")
            _check_modes(frame, group)
            _check_code(frame, run)
            for written in (p for p in run.wrote if p == one.site or p.startswith(f"{one.site}.")):
                raise UnfitError(f"it keeps something from call to call: {written} writes {run.wrote[written]}")
            for number, call in enumerate(group):
                if call.changed:
                    raise UnfitError(f"call {number} changes its input in place")
            _check_apart(module, [c.call for c in group], [c.output for c in group], run.training)


def _check_module(module: nn.Module, one: Candidate) -> None:
    for name, inner in module.named_modules():
        path = f"{one.site}.{name}".rstrip(".")
        hooks = (*inner._forward_hooks.values(), *inner._forward_pre_hooks.values(), *inner._backward_hooks.values())
        if hooks and not all(type(h).__module__.startswith("torch.nn.utils.") for h in hooks):  # weight_norm, prune
            raise UnfitError(f"{path} has a hook, which would see all calls as one")
        if isinstance(inner, NormPerCall):
            raise UnfitError(f"{path} has a norm for each of the calls (it was un-shared)")
        if isinstance(inner, nn.modules.batchnorm._BatchNorm) and inner.running_mean is None:
            raise UnfitError(
                f"{path} keeps no running statistics: in evaluation mode too it mixes the samples of a call"
            )


def _check_inner(run: Watched, one: Candidate) -> None:
    """Its norms are called inside of these calls alone: else their updates would not be as many times fewer."""
    mine = [f for f in run.all() if f.path == one.site]
    callers = {f.parent.path if f.parent is not None else "" for f in mine}
    if len(callers) > 1:
        raise UnfitError(f"it is called by different modules: {', '.join(sorted(c or 'the model' for c in callers))}")
    inside = {id(f) for frame in mine for f in frame.inside()}
    norms = {id(n) for frame in mine for n in norms_in(frame.module)}
    for frame in run.all():
        if id(frame.module) in norms and id(frame) not in inside:
            raise UnfitError(f"{frame.path} in it is called elsewhere as well")


def _check_modes(frame: Frame, group: Sequence[Frame]) -> None:
    for number, call in enumerate(group):
        other = difference(frame.modes, call.modes)
        if other:
            raise UnfitError(f"call {number} is made under {other}: one call has one grad mode and one autocast")
    if frame.strange:
        raise UnfitError(f"the forward works under {frame.strange} in places, which a rewritten one would lose")


def _check_code(frame: Frame, run: Watched) -> None:
    where = frame.path or "the model"
    if frame.inplace:
        raise UnfitError(
            f"the forward of {where} changes a tensor in place ({frame.inplace}), which calls can't pass by"
        )
    if frame.path in run.wrote:
        raise UnfitError(f"the forward of {where} writes {run.wrote[frame.path]}, which a rewritten one would not")
    for child in frame.children:
        if child.changed:
            raise UnfitError(f"{child.path} changes its input in place, which calls can't pass by")
    if run.dice:
        raise UnfitError("the forward draws Python's or NumPy's random numbers: it may go another way each time")


def _check_apart(module: nn.Module, calls: Sequence[Call], outputs: Sequence[object], training: bool) -> None:
    """The calls go into one, and a sample's output is the same beside other samples; norms in evaluation mode.

    In float64 where the network runs so: what rounding explains is below 1e-9 there.
    """
    try:
        _, sizes = concatenated(calls)
        for output, size in zip(outputs, sizes, strict=True):
            parted(output, (size,), lambda where, t, size=size: check_first(where, t, size))  # type: ignore[misc]
    except ValueError as error:
        raise UnfitError(str(error)) from error
    for dtype, limit in ((torch.float64, 1e-9), (None, 1e-3)):
        copy, _ = copy_model(module)
        copy.train(training)
        for inner in copy.modules():
            if isinstance(inner, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase, nn.RReLU)):
                inner.training = False  # what differs in training mode by right
        try:
            worst = _apart(copy if dtype is None else copy.to(dtype), [c.map(cast(dtype)) for c in calls], training)
        except FAILURES as error:
            if dtype is None:
                raise UnfitError(f"alone, on the inputs of its calls, it fails: {one_line(error, 160)}") from error
            continue
        if not worst <= limit:
            raise UnfitError(
                f"its outputs are others beside the samples of another call ({worst:.2g} of their size): something in "
                "it mixes samples"
            )
        return


def cast(dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """A floating tensor in ``dtype``, any other as it is; without its history."""
    return lambda t: t.detach().to(dtype) if dtype is not None and t.is_floating_point() else t.detach()


def _apart(net: nn.Module, calls: Sequence[Call], training: bool) -> float:
    """How far the outputs of one joint call are from those of separate ones, relative to the largest value.

    0 where the network draws random numbers in training mode: then they differ by right.
    """
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.no_grad():
        separate = [c.run(net) for c in calls]
        if training and not torch.equal(state, torch.get_rng_state()):
            return 0.0
        joint = call_together(net, *((c.args, dict(c.kwargs)) for c in calls))
    worst = 0.0
    for one, other in zip(separate, joint, strict=True):
        for a, b in zip(Call((one,)).tensors(), Call((other,)).tensors(), strict=True):
            if a.is_floating_point() and a.numel():
                size = a.abs().max().item() or 1.0
                worst = max(worst, ((a - b).abs().max() / size).item())
            elif not torch.equal(a, b):
                worst = float("inf")
    return worst
