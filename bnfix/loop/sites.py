"""Call sites of a norm in a step, compared over many steps, in units of the standard deviation within a forward.

Differences are taken within a step, where the weights are the same for all sites, and only then averaged: what training
does to the statistics from step to step cancels.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfix.types import LoopSite, SitePair, StepPattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Moments = tuple[Array, Array]

_PAIRS = 12
_NEAR = 8
"""Steps so close to one another that the weights are nearly the same."""


class Sums:
    """Sums over steps of a (k, C) array and of its squares."""

    def __init__(self) -> None:
        self.n = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def add(self, value: Array) -> None:
        """One more step."""
        self.n += 1
        self.total = self.total + value
        self.squares = self.squares + value * value

    @property
    def mean(self) -> Array:
        """Of all steps."""
        return np.asarray(self.total / self.n)

    @property
    def spread(self) -> Array:
        """The standard deviation between steps."""
        left = np.maximum(self.squares - self.n * self.mean**2, 0.0)
        return np.asarray(np.sqrt(left / max(self.n - 1, 1)))


class Pattern:
    """Steps that called a norm from the same places in the same order."""

    def __init__(self, own: bool) -> None:
        self.own = own
        self.steps = 0
        self.backwards = 1
        self.values: list[int] = []
        self.samples: list[int] = []
        self.calls: list[int] = []
        self.groups: list[int] = []
        self.places: list[tuple[int, int]] = []
        self._shift = Sums()
        self._ratio = Sums()
        self._last: tuple[int, Array, Array] | None = None
        self._within = Sums()
        self._between = Sums()

    def add(self, window: int, batch: list[Moments], eps: float) -> None:
        """The moments of each site's batch in one step."""
        mean = np.stack([m for m, _ in batch])
        var = np.stack([v for _, v in batch])
        sigma = np.sqrt(var.mean(0) + eps)
        shift = (mean - mean.mean(0)) / sigma
        log = 0.5 * np.log(var + eps)
        self._shift.add(shift)
        self._ratio.add(log - log.mean(0))
        k = len(batch)
        if k > 1:
            self._within.add((shift**2).sum(0) / (k - 1))
        if self._last is not None and window - self._last[0] <= _NEAR:
            self._between.add((((mean - self._last[1]) / sigma) ** 2).mean(0) / 2)
        self._last = window, mean, sigma

    def pairs(self, names: list[str]) -> tuple[SitePair, ...]:
        """Distances between the sites, the worst first."""
        k, n = len(names), self._shift.n
        if k < 2 or n < 2:
            return ()
        found = []
        for i, j in combinations(range(k), 2):
            shift, shift_error = _distance(self._shift, i, j)
            ratio, ratio_error = _distance(self._ratio, i, j)
            values = min(self.values[i], self.values[j])
            found.append(SitePair(names[i], names[j], n, values, shift, ratio, shift_error, ratio_error))
        by_shift = sorted(found, key=lambda p: -p.shift)[:_PAIRS]
        by_ratio = sorted(found, key=lambda p: -p.ratio)[:_PAIRS]
        return tuple(dict.fromkeys([*by_shift, *by_ratio]))

    def alike(self) -> float | None:
        """Scatter between the sites over scatter between steps that follow one another; needs 4 of each."""
        if self._within.n < 4 or self._between.n < 4:
            return None
        between = float(np.median(self._between.mean))
        return float(np.median(self._within.mean)) / between if between > 0 else None

    def log(self, sites: tuple[LoopSite, ...]) -> StepPattern:
        """As plain data."""
        pairs = self.pairs([s.name for s in sites])
        return StepPattern(sites, self.steps, self.own, self.backwards, pairs, self.alike())


class Gradless:
    """Forwards without gradient beside forwards with gradient of the same step."""

    def __init__(self) -> None:
        self._shift = Sums()
        self._ratio = Sums()
        self.values = 0

    def add(self, with_grad: list[Moments], without: list[Moments], values: int, eps: float) -> None:
        """One step."""
        mean1, var1 = _average(with_grad)
        mean0, var0 = _average(without)
        self._shift.add(((mean0 - mean1) / np.sqrt((var0 + var1) / 2 + eps))[None])
        self._ratio.add((0.5 * np.log((var0 + eps) / (var1 + eps)))[None])
        self.values = min(self.values, values) if self.values else values

    def pair(self, path: str) -> SitePair | None:
        """Their distance."""
        n = self._shift.n
        if n < 2:
            return None
        shift, ratio = (float(np.median(abs(s.mean[0]))) for s in (self._shift, self._ratio))
        errors = [float(np.median(s.spread[0])) / math.sqrt(n) for s in (self._shift, self._ratio)]
        return SitePair(path, f"{path} without gradient", n, self.values, shift, ratio, *errors)


def _average(batch: list[Moments]) -> Moments:
    return np.mean([m for m, _ in batch], axis=0), np.mean([v for _, v in batch], axis=0)


def _distance(sums: Sums, i: int, j: int) -> tuple[float, float]:
    mean, spread = sums.mean, sums.spread
    # The sum of both is the most that the spread of a difference can be; exact for two sites, which mirror each other.
    error = np.median(spread[i] + spread[j]) / math.sqrt(sums.n)
    return float(np.median(abs(mean[i] - mean[j]))), float(error)
