"""The new model run beside the old one, before anybody gets it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import CalibrationError, PassError, one_line
from bnfix.running import FAILURES, Call, size, split
from bnfix.swaps.operating import Move
from bnfix.swaps.survey import NormCalls, evaluating
from bnfix.swaps.target import Target

_ROUNDING = 64  # of a dtype's eps: two ways to compute one output
_SAME, _NEARLY_ALL = 1e-2, 0.9


@dataclass
class Trial:
    """What came out: norms that must not be swapped after all, by the id of their site, and facts for the user."""

    bad: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def trial(
    old: nn.Module,
    new: nn.Module,
    moves: Sequence[Move],
    gone: Mapping[int, nn.Module],
    norms: Mapping[int, nn.Module],
    target: Target,
    calls: Sequence[Call],
) -> Trial:
    """Run both private copies on ``calls`` and compare.

    Args:
        gone: by the id of a site, the old norm that stood in ``new``: nothing may run it any more.
        norms: the new ones.

    Raises:
        PassError: the new model fails.
        CalibrationError: it gives NaN or Inf where the old one has numbers.
    """
    found = Trial()
    for call in calls:
        before = _outputs(_run(old, call, what="the forward"))
        watch = _Watch(moves, gone, norms, target)
        with watch.attached(), NormCalls(watch.heard):
            after = _outputs(_run(new, call, what="the forward of the swapped model"))
        found.bad.update(watch.verdicts())
        if found.bad:
            return found
        found.notes += _compared(before, after, call, exact=not target.calibrated)
    if target.calibrated:
        found.notes += _independent(new, calls)
    found.notes = list(dict.fromkeys(found.notes))
    return found


def _run(model: nn.Module, call: Call, what: str) -> Any:
    with evaluating(model):
        try:
            return call.run(model)
        except FAILURES as error:
            raise PassError(
                f"{what} failed on {call.signature}: {one_line(error)}",
                hint="its code asks something of a norm that another one has not: leave that norm out with only=",
            ) from error


@dataclass
class _Watch:
    """Hooks on the new norms of a running model: are they reached, and does their output still say something?"""

    moves: Sequence[Move]
    gone: Mapping[int, nn.Module]
    norms: Mapping[int, nn.Module]
    target: Target
    _seen: set[int] = field(default_factory=set)
    _bad: dict[int, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def attached(self) -> Any:
        by_site = {id(m.site): m for m in self.moves}
        handles = [n.register_forward_pre_hook(self._hook(by_site[s]), with_kwargs=True) for s, n in self.norms.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, move: Move) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._seen.add(id(move.site))
            x = next(iter((*args, *kwargs.values())), None)
            if not self.target.calibrated or not isinstance(x, Tensor) or id(move.site) in self._bad:
                return
            x = x.detach().double()
            with torch.autocast(x.device.type, enabled=False):
                z = self.target.unit(move.spec, x)(x)
            if not _says_little(x) and (said := _says_little(z)):
                self._bad[id(move.site)] = f"{said} would come out of it on the example, whatever goes in"

        return hook

    def heard(self, _x: Tensor, mean: Tensor | None) -> None:
        """A batch norm runs: one of those that are gone?"""
        for site, norm in self.gone.items():
            if mean is not None and mean is norm._buffers.get("running_mean") and not self._takes_over(site, mean):
                self._bad[site] = "something that bnfix can't reach still runs the old norm"

    def _takes_over(self, site: int, mean: Tensor) -> bool:
        return self.norms[site]._buffers.get("running_mean") is mean

    def verdicts(self) -> dict[int, str]:
        """The norms that must not be swapped."""
        for move in self.moves:
            if move.site.calls and id(move.site) not in self._seen:
                self._bad.setdefault(id(move.site), "it is called through a reference that bnfix can't replace")
        return self._bad


def _says_little(x: Tensor) -> str:
    """``0`` or ``±1`` where nearly all values are just that, up to a common factor: eps makes some a little less."""
    sizes = x.abs()
    most = float(sizes.max()) if x.numel() else 0.0
    if most < _SAME:
        return "0"
    return "±1" if float((sizes > (1 - _SAME) * most).double().mean()) > _NEARLY_ALL else ""


# ---------------------------------------------------------------------------------------- outputs


def _outputs(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [v.detach() for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]


def _compared(before: Sequence[Tensor], after: Sequence[Tensor], call: Call, *, exact: bool) -> list[str]:
    on = call.signature
    for a, b in zip(before, after, strict=False):
        if bool(a.isfinite().all()) and not bool(b.isfinite().all()):
            raise CalibrationError(f"the swapped model gives NaN or Inf on {on}, where the old one has numbers")
    if [t.shape for t in before] != [t.shape for t in after]:
        return [f"on {on} the outputs have other shapes than before: not compared"]
    if not any(t.numel() for t in before):
        return [f"on {on} the model returns no floating values: outputs not compared"]
    if exact:
        return [_same(before, after, on)]
    apart = max(_distance(a, b) for a, b in zip(before, after, strict=True))
    said = f"on {on} the outputs are {apart:.2g} standard deviations from the old ones"
    first, last = before[0], after[0]
    if first.dim() == 2 and first.shape[1] > 1 and len(before) == 1 and len(first) > 1:
        agree = float((first.argmax(1) == last.argmax(1)).double().mean())
        said += f", and the largest is the same for {agree:.0%}"
    notes = [said]
    for a, b in zip(before, after, strict=True):
        if a.dim() and len(a) > 1 and float((b - b[:1]).abs().max()) == 0 < float((a - a[:1]).abs().max()):
            notes.append(f"WARNING: on {on} an output is the same for every sample, and was not before")
    return notes


def _same(before: Sequence[Tensor], after: Sequence[Tensor], on: str) -> str:
    if all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)):
        return f"on {on} the outputs are the same to the bit in evaluation mode"
    apart = max(_distance(a, b) for a, b in zip(before, after, strict=True))
    unit = max(torch.finfo(a.dtype).eps for a in before)
    if apart > _ROUNDING * unit:
        raise CalibrationError(f"on {on} the outputs are {apart:.2g} standard deviations from the old ones: a defect")
    return f"on {on} the outputs are the same up to rounding in evaluation mode ({apart:.1g} standard deviations)"


def _distance(a: Tensor, b: Tensor) -> float:
    """rms(b − a)/std(a), in float64; of a constant the rms alone."""
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    rms = float((b - a).square().mean().sqrt()) if a.numel() else 0.0
    std = float(a.std(correction=0)) if a.numel() else 0.0
    return rms / std if std > 0 else rms


def _independent(new: nn.Module, calls: Sequence[Call]) -> list[str]:
    """Whether a sample gives the same alone as among others."""
    call = next((c for c in calls if (size(c) or 0) > 1), None)
    if call is None:
        return [
            "not checked: that samples don't depend on one another (no example of several that could be taken apart)"
        ]
    count = size(call) or 0
    alone = split(call, [1])[0]
    try:
        with evaluating(new):
            one, all_ = _outputs(alone.run(new)), _outputs(call.run(new))
    except FAILURES:
        return ["not checked: that samples don't depend on one another (the model does not take one alone)"]
    rows = [(a, b[:1]) for a, b in zip(one, all_, strict=False) if a.dim() and len(a) == 1 and len(b) == count]
    if not rows:
        return ["not checked: that samples don't depend on one another (no output has one row a sample)"]
    far = max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)) for a, b in rows)
    if far > max(1e-3, _ROUNDING * max(torch.finfo(a.dtype).eps for a, _ in rows)):
        return [
            f"samples still depend on one another ({far:.1g} relative): something else mixes them, see what was kept"
        ]
    return ["samples don't depend on one another"]
