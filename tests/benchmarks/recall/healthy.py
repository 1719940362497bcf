"""A net trained without a fault, with what a fault needs of its training: kept on disk, so that it is trained once.

How a net is trained does not depend on what its norms store. So one training tells the statistics that any other
momentum would have left, exactly: they are kept beside the real ones.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.recall.nets import ARCHS, Arch, fit, loader
from torch import Tensor, nn

State = dict[str, Tensor]
Stats = list[tuple[Tensor, Tensor]]

SNAPS = 10
"""States that are kept of a training, evenly spaced; the first one is from before it."""
DECAY = 0.95
"""Of the exponential average of the parameters; the nets train for some 150 to 450 steps."""
MOMENTA: tuple[float | None, ...] = (0.03, 0.01, 0.002, 0.9, 0.99, 1.0, None)


def norms(model: nn.Module) -> list[Any]:
    """Modules with running statistics, in the order of the tree."""
    return [m for m in model.modules() if getattr(m, "running_var", None) is not None]


@dataclass(frozen=True)
class Healthy:
    """A training: states along the way up to the final one, the average of its parameters (buffers as at first), the
    statistics that other momenta would have left, and those of momentum None at each of the states; how well it does.
    """

    arch: Arch
    seed: int
    snaps: list[State]
    average: State
    shadows: dict[float | None, Stats]
    cumulative: list[Stats]
    score: float
    store: Store

    def other(self) -> Healthy:
        """Another run of the same training."""
        return self.store.get(self.arch.name, self.seed + 1)

    def model(self, state: State | None = None) -> nn.Module:
        """A net of its own with the final state, or another, in evaluation mode."""
        found = self.arch.build()
        found.load_state_dict(self.snaps[-1] if state is None else state)
        return found.eval()

    def index(self, part: float) -> int:
        """Which of the states is that after this part of the training, from 0 to 1."""
        return round(part * (len(self.snaps) - 1))

    def at(self, part: float) -> State:
        """That state."""
        return self.snaps[self.index(part)]


class _Trace:
    """Listens to a training: a state now and then, averages, and statistics by other momenta."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.steps = steps
        self.snaps = [_copied(model)]
        self.average = _copied(model)
        self.last = [_stats(n) for n in norms(model)]
        self.shadows = {rate: [tuple(t.clone() for t in pair) for pair in self.last] for rate in MOMENTA}
        self.cumulative = [[(m.float(), v.float()) for m, v in self.last]]

    def __call__(self, model: nn.Module, number: int) -> None:
        for name, value in model.named_parameters():
            self.average[name].lerp_(value.detach(), 1 - DECAY)
        for i, norm in enumerate(norms(model)):
            now = _stats(norm)
            # A siamese step updates three times: what these come to together is taken in three times then.
            times = norm.num_batches_tracked.item() // (number + 1)
            moved = 1 - (1 - norm.momentum) ** times
            seen = [old + (new - old) / moved for old, new in zip(self.last[i], now, strict=True)]
            for rate, pairs in self.shadows.items():
                part = 1 / (number + 1) if rate is None else 1 - (1 - rate) ** times
                for kept, value in zip(pairs[i], seen, strict=True):
                    kept.lerp_(value, part)
            self.last[i] = now
        if (number + 1) * SNAPS // self.steps > number * SNAPS // self.steps:
            self.snaps.append(_copied(model))
            self.cumulative.append([(m.float(), v.float()) for m, v in self.shadows[None]])


def _stats(norm: Any) -> tuple[Tensor, Tensor]:
    return norm.running_mean.double().clone(), norm.running_var.double().clone()


def _copied(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _trained(arch: Arch, seed: int) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, batches = arch.build(), loader(arch, seed=seed)
        trace = _Trace(model, arch.epochs * len(batches))
        fit(arch, model, batches, after=trace)
    shadows = {rate: [(m.float(), v.float()) for m, v in pairs] for rate, pairs in trace.shadows.items()}
    held = {"snaps": trace.snaps, "average": trace.average, "shadows": shadows, "cumulative": trace.cumulative}
    return {**held, "score": arch.score(model)}


class Store:
    """Healthy nets, on disk where a folder is given; another version of what trains them gets files of its own.

    The same seed gives the same bits on one machine.
    """

    def __init__(self, folder: Path | None) -> None:
        here = Path(__file__).parent
        text = "".join((here / f).read_text(encoding="utf-8") for f in ("nets.py", "tasks.py", "healthy.py"))
        self.version = hashlib.sha256(text.encode()).hexdigest()[:8]
        self.folder = folder
        self._here: dict[tuple[str, int], Healthy] = {}

    def get(self, name: str, seed: int) -> Healthy:
        """The net ``name`` that was trained with this seed."""
        if (name, seed) not in self._here:
            held = self._held(ARCHS[name], seed)
            self._here[name, seed] = Healthy(ARCHS[name], seed, **held, store=self)
        return self._here[name, seed]

    def _held(self, arch: Arch, seed: int) -> dict[str, Any]:
        if self.folder is None:
            return _trained(arch, seed)
        path = self.folder / f"{arch.name}-{seed}-{self.version}.pt"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            torch.save(_trained(arch, seed), path)
        found: dict[str, Any] = torch.load(path)
        return found
