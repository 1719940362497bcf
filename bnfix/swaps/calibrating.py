"""New norms fitted to the outputs of the old ones, layer by layer in the order in which they are called.

For each layer y is the output of the OLD model's norm in evaluation mode, z the new norm without its affine on
the input that it has in the NEW model, whose layers in front are fitted already. All samples in one forward need few
passes: each norm of the new model is fitted as the forward comes by. Where samples can't be put together, there is a
pass over all calls for each norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import CalibrationError, PassError, one_line
from bnfix.running import FAILURES, Call
from bnfix.swaps.batches import joined
from bnfix.swaps.operating import Move
from bnfix.swaps.pairing import Init, Paired, grouped
from bnfix.swaps.survey import evaluating
from bnfix.swaps.target import Target

SETTLED = 1e-3
"""Relative change of the affines of norms with several call sites, at which they have settled."""
SWEEPS = 8
_CHUNK = 1 << 18
_ALIKE = 1e-3
Key = tuple[int, int]
"""The id of a site, and which of its calls in one forward."""


class UnfitError(Exception):
    """A norm that can't be fitted, and why: it is to be left as it is."""

    def __init__(self, site: int, reason: str) -> None:
        super().__init__(reason)
        self.site, self.reason = site, reason


class _Enough(BaseException):
    """Ends a forward that has shown what was wanted; no ``Exception``, so that a model does not take it for its own."""


@dataclass
class Calibration:
    """Both models (private copies), their norms by the id of their site, and what is to be fitted."""

    old: nn.Module
    new: nn.Module
    moves: Mapping[int, Move]
    old_norms: Mapping[int, nn.Module]
    new_norms: Mapping[int, nn.Module]
    target: Target
    init: Init
    budget: int
    say: Callable[[str], None]
    notes: list[str] = field(default_factory=list)
    _fitted: set[int] = field(default_factory=set)
    _fixed: set[int] = field(default_factory=set)

    def run(self, calls: Sequence[Call]) -> None:
        """Fit every norm, in the moves and in the new model.

        Raises:
            UnfitError: one can't be.
            CalibrationError: activations are not finite.
            PassError: a forward fails.
        """
        calls = self._together(calls)
        self._sweep(calls)
        shared = {s for s, m in self.moves.items() if m.site.calls > 1}
        if shared:
            self._settle(calls, shared)
        for site, move in self.moves.items():
            if site not in self._fitted:
                raise UnfitError(site, "no batch of the data reaches it")
            move.specs = move.specs[:1]

    def _together(self, calls: Sequence[Call]) -> list[Call]:
        """All samples in one call, if each gives there what it gives in its own batch."""
        one = joined(list(calls))
        if one is None or len(calls) == 1:
            return list(calls)
        if any(m.site.affine is None for m in self.moves.values()):
            return list(calls)  # a norm that takes the statistics of its batch
        alone, all_ = (self._last_input(call) for call in (calls[0], one))
        if alone is None or all_ is None or alone.shape[1:] != all_.shape[1:] or len(alone) > len(all_):
            return list(calls)
        part = all_[: len(alone)].double()
        far = (part - alone.double()).norm() <= _ALIKE * alone.double().norm()
        return [one] if bool(far) else list(calls)

    def _last_input(self, call: Call) -> Tensor | None:
        found: list[Tensor] = []

        def keep(_key: Key, x: Tensor) -> None:
            found[:] = [x.detach()]

        self._forward(self.old, self.old_norms, call, keep)
        return found[0] if found else None

    # ------------------------------------------------------------------------------------ one norm after the other

    def _sweep(self, calls: Sequence[Call]) -> None:
        while True:
            before = len(self._fitted)
            finished = self._through(calls[0]) if len(calls) == 1 else self._next(calls)
            if finished:
                return
            assert len(self._fitted) > before

    def _through(self, call: Call) -> bool:
        """One forward of each model: fits the norms whose old inputs fit into memory. True once the end is reached."""
        inputs: dict[Key, Tensor] = {}
        size = 0

        def record(key: Key, x: Tensor) -> None:
            nonlocal size
            if key[0] in self._fitted or key[1]:
                return
            size += x.numel() * x.element_size()
            if inputs and size > self.budget // 2:
                raise _Enough
            inputs[key] = x.detach().clone()

        complete = self._forward(self.old, self.old_norms, call, record)

        def fit(key: Key, x: Tensor) -> None:
            if key[0] in self._fitted:
                return
            if key not in inputs:
                if complete:
                    raise UnfitError(
                        key[0], "the new model comes by it, and the old one does not: its way depends on values"
                    )
                raise _Enough
            self._fit(key[0], self._pairs(key[0], inputs.pop(key), x))

        return self._forward(self.new, self.new_norms, call, fit)

    def _next(self, calls: Sequence[Call]) -> bool:
        """Fit the norm that comes next, on all calls that come to it. True if there was none."""
        found: dict[int, list[Paired]] = {}
        chosen: int | None = None
        empty: int | None = None
        for call in calls:
            stop: list[tuple[Key, Tensor]] = []

            def halt(key: Key, x: Tensor, stop: list[tuple[Key, Tensor]] = stop) -> None:
                if key[0] not in self._fitted:
                    stop[:] = [(key, x.detach().clone())]
                    raise _Enough

            if self._forward(self.new, self.new_norms, call, halt):
                continue
            key, x = stop[0]
            if not x.numel():  # nothing of this batch comes by
                empty = key[0]
                continue
            chosen = key[0] if chosen is None else chosen
            if key[0] != chosen:
                continue
            old = self._old_input(call, key)
            if old is None:
                raise UnfitError(
                    key[0], "the new model comes by it, and the old one does not: its way depends on values"
                )
            pairs = self._pairs(key[0], old, x)
            have = found.get(chosen)
            found[chosen] = pairs if have is None else [a.merge(b) for a, b in zip(have, pairs, strict=True)]
        if chosen is None and empty is not None:
            raise UnfitError(empty, "its input is empty on every batch")
        if chosen is None:
            return True
        self._fit(chosen, found[chosen])
        return False

    def _old_input(self, call: Call, key: Key) -> Tensor | None:
        found: list[Tensor] = []

        def keep(this: Key, x: Tensor) -> None:
            if this == key:
                found.append(x.detach().clone())
                raise _Enough

        self._forward(self.old, self.old_norms, call, keep)
        return found[0] if found else None

    # ------------------------------------------------------------------------------------ several call sites

    def _settle(self, calls: Sequence[Call], shared: set[int]) -> None:
        """Fit norms with several call sites on all of them together.

        What the later sites see depends on the affine, which depends on what they see: sweep after sweep with the
        affine of the sweep before, until it stays.
        """
        change = float("inf")
        for number in range(SWEEPS):
            self.say(f"norms with several call sites, round {number + 1}")
            pooled = self._pooled(calls, shared)
            change = 0.0
            for site, pairs in pooled.items():
                move = self.moves[site]
                before = torch.cat([move.weight, move.bias])  # type: ignore[list-item]
                self._fit(site, pairs)
                after = torch.cat([move.weight, move.bias])  # type: ignore[list-item]
                change = max(change, float((after - before).norm() / after.norm().clamp(min=1e-12)))
                move.specs = move.specs[:1]
            if change <= SETTLED:
                return
            self._fixed = set(pooled)
            self._fitted = set(self._fixed)
            self._sweep(calls)
        names = ", ".join(self.moves[s].site.path for s in shared)
        self.notes.append(f"{names}: fitted to all call sites together, and not settled (last change {change:.1g})")

    def _pooled(self, calls: Sequence[Call], shared: set[int]) -> dict[int, list[Paired]]:
        found: dict[int, list[Paired]] = {}
        for call in calls:
            inputs: dict[Key, Tensor] = {}

            def record(key: Key, x: Tensor, inputs: dict[Key, Tensor] = inputs) -> None:
                if key[0] in shared:
                    inputs[key] = x.detach().clone()

            def pair(key: Key, x: Tensor, inputs: dict[Key, Tensor] = inputs) -> None:
                if key in inputs:
                    pairs = self._pairs(key[0], inputs.pop(key), x)
                    have = found.get(key[0])
                    found[key[0]] = pairs if have is None else [a.merge(b) for a, b in zip(have, pairs, strict=True)]

            self._forward(self.old, self.old_norms, call, record)
            self._forward(self.new, self.new_norms, call, pair)
        return found

    # ------------------------------------------------------------------------------------ the algebra

    def _pairs(self, site: int, old: Tensor, x: Tensor) -> list[Paired]:
        """(y, z) of one call for each of the settings to choose from; inputs (N, C, *positions) of both models."""
        move = self.moves[site]
        if old.shape != x.shape:
            raise UnfitError(
                site, f"its input is {tuple(old.shape)} in the old model and {tuple(x.shape)} in the new one"
            )
        y_of = self._output(move, old)
        found: list[Paired] | None = None
        step = max(1, _CHUNK // max(1, x[:1].numel()))
        with torch.autocast(x.device.type, enabled=False):
            groups = [g for spec in move.specs if (g := self.target.groups(spec)) is not None]
            closed = len(groups) == len(move.specs)
            units = [] if closed else [self.target.unit(spec, x) for spec in move.specs]
            for start in range(0, len(x), step):
                part = x[start : start + step].detach().double()
                y = y_of(old[start : start + step].double())
                pairs = grouped(y, part, groups, move.site.eps) if closed else [Paired.of(y, u(part)) for u in units]
                found = pairs if found is None else [a.merge(b) for a, b in zip(found, pairs, strict=True)]
        if found is None:
            raise UnfitError(site, "its input is empty")
        return found

    def _output(self, move: Move, x: Tensor) -> Callable[[Tensor], Tensor]:
        """What the old norm makes of its input, in float64."""
        shape = (1, -1, *(1,) * (x.dim() - 2))
        affine = move.site.affine
        if affine is not None:
            scale, shift = affine.scale.to(x.device).reshape(shape), affine.shift.to(x.device).reshape(shape)
        else:  # the statistics of this batch
            axes = [0, *range(2, x.dim())]
            var, mean = torch.var_mean(x.double(), axes, correction=0, keepdim=True)
            scale = torch.rsqrt(var + move.site.eps)
            weight, bias = move.site.tensor("weight"), move.site.tensor("bias")
            scale = scale if weight is None else scale * weight.detach().double().to(x.device).reshape(shape)
            shift = -mean * scale
            shift = shift if bias is None else shift + bias.detach().double().to(x.device).reshape(shape)
        return lambda part: part * scale + shift

    def _fit(self, site: int, pairs: list[Paired]) -> None:
        """Choose the setting that explains most, fit it, and put it into the new model."""
        move, norm = self.moves[site], self.new_norms[site]
        best = max(range(len(pairs)), key=lambda i: pairs[i].r2)
        weight, bias = pairs[best].fit(self.init)
        if not bool(weight.isfinite().all() and bias.isfinite().all()):
            raise CalibrationError(f"{move.site.path or 'the model'}: activations there are NaN or Inf")
        move.specs.insert(0, move.specs.pop(best))
        move.weight, move.bias, move.r2 = weight.cpu(), bias.cpu(), pairs[best].r2
        self._fitted.add(site)
        self._configure(site)
        with torch.no_grad():
            norm.get_parameter("weight").copy_(weight)
            norm.get_parameter("bias").copy_(bias)
        if site not in self._fixed:
            self.say(f"norm {len(self._fitted)} of {len(self.moves)}: {move.site.path or '(root)'}")

    def _configure(self, site: int) -> None:
        """Settings other than the affine, such as the number of groups."""
        args = self.moves[site].spec["args"]
        for name, value in args.items():
            if name in vars(self.new_norms[site]):
                setattr(self.new_norms[site], name, value)

    # ------------------------------------------------------------------------------------ running

    def _forward(
        self, model: nn.Module, norms: Mapping[int, nn.Module], call: Call, see: Callable[[Key, Tensor], None]
    ) -> bool:
        """One forward in evaluation mode, in which ``see`` gets the input of each norm. False if it was broken off."""
        counts: dict[int, int] = {}
        failed: list[BaseException] = []

        def watch(site: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if failed:
                    raise failed[0]
                key = (site, counts.get(site, 0))
                counts[site] = key[1] + 1
                try:
                    see(key, next(v for v in (*args, *kwargs.values())))
                except BaseException as error:
                    failed.append(error)
                    raise

            return hook

        with _hooked(norms, watch), evaluating(model):
            try:
                call.run(model)
            except (_Enough, UnfitError, CalibrationError):
                pass
            except FAILURES as error:
                if not failed:
                    raise self._broken(model, call, error) from error
        if model is self.new:
            for site in self._fitted:  # what was set while the model ran was taken back with its other attributes
                self._configure(site)
        if failed and not isinstance(failed[0], _Enough):
            raise failed[0]
        return not failed

    def _broken(self, model: nn.Module, call: Call, error: Exception) -> PassError:
        if model is self.old:
            return PassError(f"the forward failed on {call.signature}: {one_line(error)}")
        return PassError(
            f"with the new norms in place the forward fails on {call.signature}: {one_line(error)}",
            hint="its code asks something of a norm that another one has not: leave that norm out with only=",
        )


@contextlib.contextmanager
def _hooked(norms: Mapping[int, nn.Module], watch: Callable[[int], Callable[..., None]]) -> Iterator[None]:
    """Hooks behind the user's own pre-hooks on each of ``norms``."""
    handles = [m.register_forward_pre_hook(watch(site), with_kwargs=True) for site, m in norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
