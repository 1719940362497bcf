"""What ``recalibrate`` returns: per layer what was stored, measured and written, and how good it is."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bnfix.types.values import NOT_IN_JSON, Value


@dataclass(frozen=True)
class Residual(Value):
    """How far a model is from the fixed point of some data: over all layers and channels, the worst.

    Run in evaluation mode over the data, ``mean`` is |measured mean − running mean| in standard deviations (of the
    running variance), ``var`` is |measured variance / running variance − 1|. Channels without any spread (variance
    below 1e-12, or not above the rounding of their mean) count with their absolute distance.
    """

    mean: float
    var: float


@dataclass(frozen=True)
class LayerStats(Value):
    """One norm at one call site: its statistics before and after, and how sure they are.

    All sequences have one number a channel, computed in float64. ``n`` counts values a channel (all samples and
    positions, masked ones left out), ``samples`` the independent ones. ``mean_before`` and ``var_before`` were
    stored in the model, ``mean`` and ``var`` (unbiased) were measured at this call site, ``mean_after`` and
    ``var_after`` are what the norm has now, or would have (``changed`` is False): with one call site the same as
    measured, with several those of all of them pooled.

    ``se_mean`` and ``se_var`` are standard errors of ``mean`` and ``var`` with the sample as the unit (the pixels of
    one image are not independent), in the units of the mean and of the variance; NaN with fewer than two samples.
    ``z`` is (mean − mean_before)/se_mean, ``kl`` the divergence
    KL(measured ‖ stored) = ½(v1/v0 − 1 − ln(v1/v0) + (μ1 − μ0)²/v0) of normal distributions, in nats.
    After a dry run ``mean_after`` and ``var_after`` are what the norm would have.

    The properties sum a layer up by its worst channel. A channel has no spread where its new variance is not above
    1e-12 + 1e-4·eps + (2⁻²³·mean)² (:func:`no_spread`): it is the rounding of a constant, or drowned by the eps that
    the norm adds to it. What is said of one is defined at each property. NaN channels are passed over; a property is
    NaN where no channel is left.
    """

    site: str
    call: int
    n: int
    samples: int
    # Thousands of numbers: in JSON, not in a repr that a prompt may print unasked.
    mean_before: tuple[float, ...] = field(repr=False)
    var_before: tuple[float, ...] = field(repr=False)
    mean: tuple[float, ...] = field(repr=False)
    var: tuple[float, ...] = field(repr=False)
    mean_after: tuple[float, ...] = field(repr=False)
    var_after: tuple[float, ...] = field(repr=False)
    se_mean: tuple[float, ...] = field(repr=False)
    se_var: tuple[float, ...] = field(repr=False)
    z: tuple[float, ...] = field(repr=False)
    kl: tuple[float, ...] = field(repr=False)
    eps: float = field(default=0.0, repr=False, kw_only=True)

    @property
    def name(self) -> str:
        """``b.bn@1`` for the second call of ``b.bn`` in one forward."""
        return f"{self.site or '(root)'}@{self.call}" if self.call else self.site or "(root)"

    @property
    def channels(self) -> int:
        """How many channels the norm has."""
        return len(self.mean_after)

    @cached_property
    def mean_shift(self) -> float:
        """The largest |mean_after − mean_before| over the channels, in standard deviations of the new variance.

        A channel without spread counts with the distance itself.
        """
        pairs = zip(self.mean_after, self.mean_before, self.var_after, strict=True)
        return math.sqrt(_largest((a - b) * (a - b) / (v if v > self._floor(a) else 1.0) for a, b, v in pairs))

    @cached_property
    def var_ratio(self) -> float:
        """var_after / var_before of the channel where it is furthest from 1 (0.5 is as far as 2).

        Variances below those of a channel without spread count as just that: between two such the ratio is 1.
        """
        pairs = zip(self.var_after, self.var_before, map(self._floor, self.mean_after), strict=True)
        ratios = [(a if a > f else f) / (b if b > f else f) for a, b, f in pairs if a == a and b == b and f == f]
        top, low = max(ratios, default=math.nan), min(ratios, default=math.nan)
        return low if top * low < 1 else top

    @cached_property
    def se(self) -> float:
        """The largest standard error of a mean in this layer, in standard deviations; channels without spread not."""
        pairs = zip(self.se_mean, self.var, self.mean, strict=True)
        return math.sqrt(_largest(s * s / v for s, v, m in pairs if v > self._floor(m)))

    @cached_property
    def var_se(self) -> float:
        """The largest standard error of a variance in this layer, relative to it; channels without spread not."""
        pairs = zip(self.se_var, self.var, self.mean, strict=True)
        return _largest(s / v for s, v, m in pairs if v > self._floor(m))

    @property
    def still(self) -> bool:
        """Whether no channel has any spread, over two samples or more: there is no error to speak of."""
        return self.samples > 1 and all(v <= self._floor(m) for v, m in zip(self.var, self.mean, strict=True))

    @cached_property
    def worst_kl(self) -> float:
        """The largest divergence of a channel, in nats; inf where a channel came alive or died.

        A channel without spread before and now counts ½·(its distance)²: its stored variance decays for ever, and
        the divergence of 1e-30 from 1e-20 says nothing.
        """
        return _largest(self._divergences())

    @cached_property
    def worst_channel(self) -> int | None:
        """The channel that :attr:`worst_kl` is of, the first such; None where none is known."""
        return None if math.isnan(self.worst_kl) else self._divergences().index(self.worst_kl)

    def _floor(self, mean: float) -> float:
        return float(no_spread(mean, self.eps))

    def _divergences(self) -> list[float]:
        columns = zip(self.kl, self.mean, self.mean_before, self.var, self.var_before, strict=True)
        return [0.5 * (m - b) * (m - b) if v <= (f := self._floor(m)) and w <= f else k for k, m, b, v, w in columns]


@dataclass(frozen=True)
class Recalibration(Value):
    """What was done to the statistics of a model, why in this way, and how good the result is.

    ``method`` is ``staged``, ``population`` or ``online``; ``why`` says in one sentence why, ``engine`` how the model
    was run (``fibers``, ``threads``, ``one chunk``, ``plain passes``, ``stream``). ``n`` counts samples, ``batches``
    what the loader gave, ``passes`` how often the loader was gone through, ``forwards`` (over all samples) how often
    the model was run over them. ``changed`` is False after a dry run, or where ``when="needed"`` found no need.

    ``residual`` was measured by plain forwards over the very same tensors (``certify="full"``, else None; for iterated
    norms see ``notes``), ``residual_fresh`` on a new draw of a loader that draws at random (of a stream: in one more
    pass over any loader), ``residual_before`` with the statistics as they were. ``replay`` is the largest distance
    between what one chunk contributed and what it contributes alone (0.0: nothing leaked between chunks; None: nothing
    to check). ``output_change`` is rms(outputs before − after)/std(after) on ``probe`` samples, ``output_null`` the
    same between recalibrations on two halves of the data: a change below a few times that is noise.

    ``needed`` says whether that is large and more than chance (None: only asked with ``when="needed"``).

    ``frozen``, ``left`` (not selected) and ``never_called`` name norms that stay as they were; ``left_why`` has the
    reasons. ``used`` says which elements of a batch went where. ``seconds`` are process CPU time, ``total`` and of each
    step. ``advice`` is what to do beside or instead, one thing a string; where it holds three spaces, the words
    before them are the label of a line to paste.
    """

    layers: tuple[LayerStats, ...]
    method: str
    why: str
    n: int
    batches: int = 0
    passes: int = 1
    forwards: float = 1.0
    engine: str = "fibers"
    changed: bool = True
    dry_run: bool = False
    residual_before: Residual | None = None
    residual: Residual | None = None
    residual_fresh: Residual | None = None
    replay: float | None = None
    iterations: int = 1
    output_change: float | None = None
    output_null: float | None = None
    probe: int = 0
    frozen: tuple[str, ...] = ()
    never_called: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    left_why: Mapping[str, str] = field(default_factory=dict)
    used: str = ""
    ranks: int = 1
    needed: bool | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    handle: Any = field(default=None, repr=False, compare=False, metadata=NOT_IN_JSON)

    def worst(self, k: int = 5) -> tuple[LayerStats, ...]:
        """The ``k`` call sites that drifted most, by the largest divergence of a channel; the worst first."""
        known = sorted(self.layers, key=lambda s: -s.worst_kl if not math.isnan(s.worst_kl) else math.inf)
        return tuple(known[:k])

    def needed_samples(self, tol: float = 0.01) -> int:
        """How many more samples bring every standard error down to ``tol``; 0 if none are needed.

        Of means in standard deviations, of variances relative: N·((SE/tol)² − 1), the worst over layers and channels.

        Raises:
            ValueError: ``tol`` is not positive, or no standard error is known (fewer than two samples).
        """
        if not tol > 0:
            raise ValueError(f"tol is a positive number, not {tol}")
        errors = [(s.samples, max(s.se, s.var_se)) for s in self.layers]
        known = [n * ((se / tol) ** 2 - 1) for n, se in errors if not math.isnan(se)]
        if not known and any(s.still for s in self.layers):
            return 0
        if not known:
            raise ValueError("no standard error is known: it takes at least two samples")
        return max(0, math.ceil(max(known)))

    def undo(self) -> None:
        """Give the model the statistics back that it had, to the bit.

        Raises:
            CalibrationError: nothing was changed, it was undone already, or the statistics have moved since.
        """
        self.handle.undo()

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A matplotlib figure: drift and standard error of each layer; written to ``path`` if one is given.

        pyplot does not know the figure: a notebook shows it, a script gives a path (png, svg or pdf by its suffix).

        Raises:
            MissingDependencyError: matplotlib is not installed (the extra ``report``).
            ValueError: another suffix.
            BnfixError: ``path`` can't be written.
        """
        import importlib

        return importlib.import_module("bnfix.render").plot(self, path)


def no_spread(mean: Any, eps: float) -> Any:
    """The variance up to which a channel of this mean, a number or a tensor, has no spread.

    That is what rounding makes of a constant, or so little beside ``eps`` that the norm gives it out with a standard
    deviation of .01 or less, where others have 1.
    """
    return 1e-12 + 1e-4 * eps + mean * mean * 2.0**-46


def _largest(values: Iterable[float]) -> float:
    return max([v for v in values if v == v], default=math.nan)  # v == v: not NaN
