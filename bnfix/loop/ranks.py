"""Several processes: what each one's statistics look like to the others. No collective call is made, nobody waits long.

Each rank leaves its numbers in the store that ``torch.distributed`` has anyway, under keys that name the step; whoever
writes a report reads what is there. A rank that stops early, or never comes, hangs nobody.
"""

from __future__ import annotations

import io
import itertools
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.distributed as dist
from torch import Tensor, nn

from bnfix.types import RankDistance

if TYPE_CHECKING:
    from bnfix.loop.tally import Tally

_CHANNELS = 65536
_NORMS = 4
_STEPS = 16
_PATIENCE = 5.0
"""Seconds that a report waits for other ranks to come to their end."""
_numbers = itertools.count()


def world() -> tuple[int, int]:
    """(processes, this one's number); (1, 0) where there is no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(), dist.get_rank()


class Ranks:
    """What this rank tells the others, and what it reads of them."""

    def __init__(self, tallies: Sequence[Tally]) -> None:
        self.world, self.rank = world()
        self._tallies = tallies
        self._run = next(_numbers)
        self._batches: dict[int, deque[tuple[int, Any, Any]]] = {}
        self._published: list[int] = []
        self.unseen = ""

    def due(self, step: int) -> bool:
        """Whether all ranks leave their numbers at this step: 16, 64, 256 …"""
        return self.world > 1 and step >= 16 and step & (step - 1) == 0 and step.bit_length() % 2 == 1

    def note(self, tally: Tally, window: int, mean: Any, var: Any) -> None:
        """The batch of one norm in one step; kept of the first few norms that are called, for the last few steps."""
        if tally.index not in self._batches:
            if len(self._batches) >= _NORMS:
                return
            self._batches[tally.index] = deque(maxlen=_STEPS)
        self._batches[tally.index].append((window, mean, var))

    def publish(self, step: int) -> None:
        """Leave this rank's numbers in the store."""
        if self.world < 2 or step in self._published:
            return
        arrays: dict[str, Any] = {}
        room = _CHANNELS
        for tally in self._tallies:
            module = tally.module()
            mean, var = (
                module._buffers.get(n) if module is not None else None for n in ("running_mean", "running_var")
            )
            if not isinstance(mean, Tensor) or not isinstance(var, Tensor) or mean.is_meta or mean.numel() > room:
                continue
            room -= mean.numel()
            arrays[f"s{tally.index}"] = np.stack([t.detach().float().cpu().numpy() for t in (mean, var)])
        for index, kept in self._batches.items():
            arrays[f"w{index}"] = np.array([w for w, _, _ in kept])
            arrays[f"b{index}"] = np.stack([np.stack([m, v]) for _, m, v in kept]).astype(np.float32)
        packed = io.BytesIO()
        np.savez(packed, **arrays)
        try:
            _store().set(self._key(step, self.rank), packed.getvalue())
            self._published.append(step)
        except (RuntimeError, ValueError, AttributeError) as error:  # a store that is gone, or of another kind
            self.unseen = f"the store of torch.distributed can't be used: {error}"

    def compare(self, final: bool) -> tuple[RankDistance, ...]:
        """The worst pair of ranks for each norm, at the last step that all have told of."""
        if self.world < 2 or not self._published:
            return ()
        told: dict[int, dict[str, Any]] = {}
        try:
            end = time.monotonic() + (_PATIENCE if final else 0.0)
            for step in reversed(self._published):
                told = self._read(step, end)
                if len(told) == self.world:
                    break
        except (RuntimeError, ValueError, AttributeError) as error:
            self.unseen = f"the store of torch.distributed can't be used: {error}"
            return ()
        missing = self.world - len(told)
        self.unseen = f"{missing} of {self.world} ranks have told nothing of a common step" if missing else ""
        return tuple(d for t in self._tallies if (d := _worst(t, told, step)) is not None)

    def _read(self, step: int, end: float) -> dict[int, dict[str, Any]]:
        store, found = _store(), {}
        for rank in range(self.world):
            key = self._key(step, rank)
            while not store.check([key]):
                if time.monotonic() >= end:
                    break
                time.sleep(0.02)
            else:
                with np.load(io.BytesIO(store.get(key)), allow_pickle=False) as packed:
                    found[rank] = dict(packed)
        return found

    def _key(self, step: int, rank: int) -> str:
        return f"bnfix.watch/{self._run}/{step}/{rank}"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _worst(tally: Tally, told: dict[int, dict[str, Any]], step: int) -> RankDistance | None:
    module = tally.module()
    eps = float(getattr(module, "eps", 1e-5)) if isinstance(module, nn.Module) else 1e-5
    key = f"s{tally.index}"
    found = []
    for a, b in itertools.combinations(sorted(r for r in told if key in told[r]), 2):
        (mean_a, var_a), (mean_b, var_b) = told[a][key], told[b][key]
        stored = float(np.median(abs(mean_a - mean_b) / np.sqrt((var_a + var_b) / 2 + eps)))
        batch, error, n = _batches(tally.index, told[a], told[b], eps)
        found.append(RankDistance(tally.path, a, b, step, stored, batch, error, n))
    return max(found, key=lambda d: max(d.stored, d.batch or 0.0)) if found else None


def _batches(index: int, a: dict[str, Any], b: dict[str, Any], eps: float) -> tuple[float | None, float, int]:
    if f"w{index}" not in a or f"w{index}" not in b:
        return None, 0.0, 0
    at = {int(w): i for i, w in enumerate(b[f"w{index}"])}
    both = [(i, at[int(w)]) for i, w in enumerate(a[f"w{index}"]) if int(w) in at]
    if len(both) < 2:
        return None, 0.0, len(both)
    left, right = a[f"b{index}"][[i for i, _ in both]], b[f"b{index}"][[j for _, j in both]]
    apart = (left[:, 0] - right[:, 0]) / np.sqrt((left[:, 1] + right[:, 1]) / 2 + eps)
    error = float(np.median(apart.std(0, ddof=1))) / math.sqrt(len(both))
    return float(np.median(abs(apart.mean(0)))), error, len(both)
