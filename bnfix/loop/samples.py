"""The moments of a batch, read off the running statistics: no pass over activations.

A forward in training mode sets r ← (1 − α)·r + α·batch, so batch = r_old + (r_new − r_old)/α: C numbers a norm, exact
but for rounding, which stands in :func:`moments`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Stands = dict[int, "tuple[Array, Array, int | None]"]
"""Mean, variance and count by the identity of their :class:`Stand`."""

_BLUR = 0.02
"""The most rounding in a batch mean that is let pass, in standard deviations, for half of the channels."""


class Stand:
    """Running statistics at one moment: copies, still on their device."""

    __slots__ = ("mean", "mean_version", "tracked", "tracked_version", "var")

    def __init__(self, module: nn.Module, count: bool) -> None:
        buffers = module._buffers
        mean, var, tracked = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
        assert mean is not None
        assert var is not None
        self.mean = mean.detach().clone()
        self.var = var.detach().clone()
        self.mean_version = (id(mean), mean._version)
        self.tracked_version = tracked._version if tracked is not None else 0
        self.tracked = tracked.clone() if count and tracked is not None else None

    def still(self, module: nn.Module) -> bool:
        """Whether nothing has been written since, as far as counters tell."""
        mean, tracked = module._buffers["running_mean"], module._buffers["num_batches_tracked"]
        if mean is None or tracked is None:
            return False
        return (id(mean), mean._version) == self.mean_version and tracked._version == self.tracked_version


class Forward:
    """One forward of one norm in a step that is measured."""

    __slots__ = (
        "abandoned", "after", "before", "call", "grad", "input", "inside", "mark", "momentum", "place", "samples",
        "turn", "values",
    )  # fmt: skip

    def __init__(self, grad: bool, samples: int, values: int, call: int) -> None:
        self.grad, self.samples, self.values, self.call = grad, samples, values, call
        self.place = 0
        self.inside = False
        """Whether it is part of a forward of the whole model; ``call`` says of which."""
        self.turn = 0
        """Which of several forwards from the same place in one step."""
        self.mark: tuple[int, int] | None = None
        self.momentum: float | None = None
        self.before: Stand | None = None
        self.after: Stand | None = None
        self.abandoned = False
        self.input: weakref.ref[Tensor] | None = None


class Record:
    """The forwards of one norm in one step that is measured. ``own`` and ``carried`` are known when it is over."""

    __slots__ = ("carried", "forwards", "open", "own", "places", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.forwards: list[Forward] = []
        self.places: dict[int, int] = {}
        self.open: Forward | None = None
        self.own = True
        self.carried = 0

    def begin(self, forward: Forward, module: nn.Module) -> None:
        """Note the statistics in front of this forward."""
        if not _legible(module):
            return
        momentum = module.momentum
        previous = self.forwards[-2].after if len(self.forwards) > 1 else None
        forward.momentum = momentum  # type: ignore[assignment]
        # The state behind the last forward is that in front of this one, unless there was another update in between.
        fresh = previous is not None and momentum is not None and previous.still(module)
        forward.before = previous if fresh else Stand(module, momentum is None)
        forward.turn = self.places.get(forward.place, 0)
        self.places[forward.place] = forward.turn + 1
        self.open = forward

    def close(self, module: nn.Module | None, same_forward: bool = True) -> None:
        """Note the statistics behind the open forward, before anything else can have changed them."""
        forward, self.open = self.open, None
        if forward is None or module is None or forward.before is None or not same_forward:
            return
        after = Stand(module, forward.momentum is None)
        before = forward.before
        # Anything but exactly one update in between was somebody else's hand.
        if after.mean_version == before.mean_version and after.tracked_version == before.tracked_version + 1:
            forward.after = after


def _legible(module: nn.Module) -> bool:
    mean, tracked = module._buffers.get("running_mean"), module._buffers.get("num_batches_tracked")
    if mean is None or tracked is None or module._buffers.get("running_var") is None:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(mean):  # must not outlive its transform
        return False
    plain = type(mean) is Tensor and mean.dtype in (torch.float32, torch.float64) and not mean.is_meta
    return plain and not torch.is_inference(mean)


def fetched(forwards: Iterable[Forward]) -> Stands:
    """All statistics of these forwards in float64, by the identity of their :class:`Stand`: one wait for a device."""
    stands = {id(s): s for f in forwards for s in (f.before, f.after) if s is not None}
    groups: dict[Any, list[tuple[int, Stand]]] = {}
    for key, stand in stands.items():
        groups.setdefault((stand.mean.device, stand.mean.dtype), []).append((key, stand))
    found: Stands = {}
    with torch.no_grad():
        for group in groups.values():
            flat = torch.cat([t for _, s in group for t in (s.mean, s.var)]).cpu().double().numpy()
            at = 0
            for key, stand in group:
                c = stand.mean.numel()
                count = int(stand.tracked) if stand.tracked is not None else None
                found[key] = flat[at : at + c], flat[at + c : at + 2 * c], count
                at += 2 * c
    return found


def moments(forward: Forward, stands: Stands, eps: float) -> tuple[Array, Array] | None:
    """Mean and (unbiased) variance of a forward's batch, (C,) each; None where they can't be told.

    Rounding r_new to 24 bits leaves an error of ½ ulp(r)/α in the batch mean; where that is more than .02 σ (momentum
    too small, means far from 0) nothing is said.
    """
    if forward.before is None or forward.after is None:
        return None
    mean0, var0, _ = stands[id(forward.before)]
    mean1, var1, count = stands[id(forward.after)]
    alpha = forward.momentum if forward.momentum is not None else (1.0 / count if count else 0.0)
    if not 0.0 < alpha <= 1.0:
        return None
    mean = mean0 + (mean1 - mean0) / alpha
    var = np.maximum(var0 + (var1 - var0) / alpha, 0.0)
    if not np.isfinite(mean.sum() + var.sum()):
        return None
    bits = 2.0**-24 if forward.before.mean.dtype is torch.float32 else 2.0**-53
    largest = np.maximum(abs(mean0), abs(mean1))
    most = var + eps
    blurred = np.count_nonzero(largest * (bits / alpha) > _BLUR * np.sqrt(most))
    unsure = np.count_nonzero(np.maximum(var0, var1) * (bits / alpha) > _BLUR * most)
    return (mean, var) if 2 * max(blurred, unsure) <= len(mean) else None


def version_of(module: nn.Module | None, name: str) -> int:
    """How often a buffer was written to in a way that autograd counts; F.batch_norm's own updates are not."""
    buffer = module._buffers.get(name) if module is not None else None
    if buffer is None or is_lazy(buffer) or torch.is_inference(buffer):
        return -1
    return buffer._version


def count_of(module: nn.Module | None) -> int | None:
    """``num_batches_tracked`` as a number."""
    buffer = module._buffers.get("num_batches_tracked") if module is not None else None
    return int(buffer) if buffer is not None and not buffer.is_meta else None
