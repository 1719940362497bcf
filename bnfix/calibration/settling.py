"""The next guess for norms with several call sites, whose statistics have to agree with what they themselves cause.

Taking over what was measured (a fixed-point iteration) swings or runs away where a norm comes behind itself, as in
recurrent nets. Anderson's acceleration takes from the last few guesses the mixture that would have moved least: it
settles in some 15 to 40 rounds where plain iteration needs hundreds, and where it never does.

Where no norm comes behind itself (one that is called for each part of a batch in turn, a net that is run step by step
in time), plain iteration settles one norm more with each round, in the order of their use, and exactly; all that come
later move as far as ever until it is their turn. A mixture would only move those that stand already.
Source: D. G. Anderson, Iterative procedures for nonlinear integral equations, J. ACM 12 (1965); type II, as in
H. F. Walker and P. Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49 (2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bnfix.calibration.listening import Stats
from bnfix.stats import round_once

DEPTH = 10
"""Guesses that are mixed."""
FAST = 0.5
"""Share of the last movement up to which plain iteration is left to itself: feed-forward nets settle by it exactly."""
LEAST_STEP = 0.3
STANDS = 1e-6
"""Standard deviations, and parts of a variance, up to which a norm counts as one that no longer moves."""
FAR = 4.0
"""Standard deviations, and factors of a variance, beyond which a mixture is not believed."""


class Settling:
    """Guesses so far, one :meth:`next` a round.

    ``same`` gives all ranks the numbers of the first: they solve for the mixture alike, but not always to the bit.
    """

    def __init__(self, same: Callable[[list[float]], list[float]] = lambda numbers: numbers) -> None:
        self._same = same
        self.gained = 0
        """Rounds in which one norm more than ever before stood, with all that are used before it."""
        self._standing = 0
        self._keys: list[int] = []
        self._scale: Tensor | None = None
        self._guesses: list[Tensor] = []
        self._moves: list[Tensor] = []
        self._last, self._step = math.inf, 1.0

    def next(self, used: Mapping[int, Stats], found: Mapping[int, Stats], far: float) -> dict[int, Stats]:
        """What to use next, after ``used`` led to ``found``, which is ``far`` from it (standard deviations).

        ``found`` has the norms in the order in which they are used.
        """
        keys = sorted(found)
        if keys != self._keys or any(key not in used for key in keys):
            self._keys, self._scale, self._standing = keys, None, 0
            return self._plainly(found, far)
        standing = _standing(used, found)
        if standing > self._standing:
            self._standing, self.gained = standing, self.gained + 1
            return self._plainly(found, far)
        guess, measured = _flat([used[k] for k in keys]), _flat([found[k] for k in keys])
        if self._scale is None:
            self._scale = _scale([found[k] for k in keys])
        guess, measured = guess / self._scale, measured / self._scale
        self._guesses = [*self._guesses, guess][-DEPTH - 1 :]
        self._moves = [*self._moves, measured - guess][-DEPTH - 1 :]
        fast, worse = far <= FAST * self._last, far > self._last
        self._last = far
        if fast or len(self._moves) < 2:
            return dict(found)
        if worse:
            self._step = max(LEAST_STEP, self._step / 2)
        return self._apart(self._mixture() * self._scale, used, found)

    def _plainly(self, found: Mapping[int, Stats], far: float) -> dict[int, Stats]:
        """What was measured; guesses so far are of no more use."""
        self._guesses, self._moves, self._last = [], [], far
        return dict(found)

    def _mixture(self) -> Tensor:
        guesses, moves = torch.stack(self._guesses), torch.stack(self._moves)
        d_guess, d_move = guesses.diff(dim=0), moves.diff(dim=0)
        lengths = d_move.norm(dim=1).clamp(min=1e-300)
        d_guess, d_move = d_guess / lengths[:, None], d_move / lengths[:, None]
        gram = (d_move @ d_move.T).cpu()
        gram += 1e-10 * torch.eye(len(gram), dtype=gram.dtype)  # guesses in float32 are no more exact than that
        share = torch.linalg.solve(gram, (d_move @ moves[-1]).cpu())
        share = torch.tensor(self._same(share.tolist()), dtype=guesses.dtype, device=guesses.device)
        mixed: Tensor = guesses[-1] + self._step * moves[-1] - share @ (d_guess + self._step * d_move)
        return mixed

    def _apart(self, mixed: Tensor, used: Mapping[int, Stats], found: Mapping[int, Stats]) -> dict[int, Stats]:
        """The mixture as statistics; a small plain step where it is nowhere near what was used and measured."""
        out: dict[int, Stats] = {}
        start = 0
        for key in self._keys:
            count = found[key][0].numel()
            m, v = mixed[start : start + count], mixed[start + count : start + 2 * count]
            start += 2 * count
            (m0, v0), (m1, v1) = ([t.double().flatten() for t in stats[key]] for stats in (used, found))
            low, high = torch.minimum(v0, v1), torch.maximum(v0, v1)
            room = FAR * high.sqrt()
            near = (v > low / FAR) & (v < high * FAR)
            near &= (m >= torch.minimum(m0, m1) - room) & (m <= torch.maximum(m0, m1) + room)
            m = torch.where(near, m, torch.lerp(m0, m1, LEAST_STEP))
            v = torch.where(near, v, torch.lerp(v0, v1, LEAST_STEP))
            mean, var = found[key]
            out[key] = round_once(m, mean.dtype).reshape(mean.shape), round_once(v, var.dtype).reshape(var.shape)
        return out


def _standing(used: Mapping[int, Stats], found: Mapping[int, Stats]) -> int:
    """How many norms, from the first in use on, were found to be as they were used."""
    count = 0
    for key, (mean, var) in found.items():
        m, v, m0, v0 = (t.double() for t in (mean, var, *used[key]))
        if not bool(((m - m0).abs() <= STANDS * v.sqrt()).all() and ((v - v0).abs() <= STANDS * v).all()):
            break
        count += 1
    return count


def _flat(stats: list[Stats]) -> Tensor:
    return torch.cat([t.double().flatten() for pair in stats for t in pair])


def _scale(stats: list[Stats]) -> Tensor:
    """The unit of each number: standard deviations for means, the variance itself for variances."""
    parts: list[Tensor] = []
    for _, var in stats:
        v = var.double().flatten()
        v = torch.where(v > 0, v, torch.ones_like(v))
        parts += [v.sqrt(), v]
    return torch.cat(parts)
