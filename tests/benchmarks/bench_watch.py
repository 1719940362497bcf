"""What ``bnfix.watch`` costs a training step: ResNet18, CIFAR-like and at 224 pixels, with and without, side by side.

Run: ``python tests/benchmarks/bench_watch.py [--readme] [--rounds N]``. Process CPU time (user and system), one thread,
both ways in turn in one process, the least of all rounds; aim: at most 1 % of a step. On a CPU a step takes so long
that microseconds drown in its noise: so the guard's own time is measured a second way, on a chain of norms with
ResNet18's widths that compute nothing but their counter (the guard alone), over steps of which one in 16 is measured.
That figure holds beside any step: the last column is the step time at which it would be 1 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import machine, publish, table

import bnfix

CASES = (("CIFAR-like", 32, 16), ("ImageNet-like", 224, 4))
FORWARDS = (1, 3)


def resnet18(pixels: int) -> nn.Module:
    """Torchvision's; for small images with the usual stem of one 3×3 convolution and no pooling."""
    from torchvision.models import resnet18 as make

    model = make(num_classes=10)
    if pixels <= 64:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


class Loop:
    """A training loop that can run with and without a watch around it."""

    def __init__(self, model: nn.Module, x: Tensor, forwards: int) -> None:
        self.model, self.x, self.forwards = model.train(), x, forwards
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def step(self) -> None:
        """One optimizer step."""
        self.optimizer.zero_grad()
        total: Any = sum(self.model(self.x).square().mean() for _ in range(self.forwards))
        total.backward()
        self.optimizer.step()

    def seconds(self, n: int) -> float:
        """CPU seconds of a step, over n of them."""
        start = time.process_time()
        for _ in range(n):
            self.step()
        return (time.process_time() - start) / n

    def both(self, steps: int, rounds: int, warm: int) -> tuple[float, float]:
        """The least of each: plain, watched. ``warm`` steps bring the watch past its first, dense ones."""
        plain = watched = float("inf")
        self.seconds(2)
        for _ in range(rounds):
            plain = min(plain, self.seconds(steps))
            with bnfix.watch(self.model, self.optimizer):
                self.seconds(max(warm, 1))
                watched = min(watched, self.seconds(steps))
        return plain, watched


class Idle(nn.BatchNorm2d):
    """A norm that counts an update and computes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return x


class Chain(nn.Module):
    """Idle norms with the widths of ResNet18's."""

    def __init__(self) -> None:
        super().__init__()
        widths = [m.num_features for m in resnet18(32).modules() if isinstance(m, nn.BatchNorm2d)]
        self.norms = nn.ModuleList(Idle(w) for w in widths)
        self.inputs = [torch.zeros(4, w, 2, 2) for w in widths]

    def forward(self, x: Tensor) -> Tensor:
        for norm, given in zip(self.norms, self.inputs, strict=True):
            norm(given)
        return x


class Alone(Loop):
    """Forward passes of the idle norms, and a step of the optimizer; no gradients."""

    def step(self) -> None:
        for _ in range(self.forwards):
            self.model(self.x)
        self.optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for forwards in FORWARDS:
        torch.manual_seed(0)
        plain, watched = Alone(Chain(), torch.zeros(1), forwards).both(160, 3 * options.rounds, 32)
        guard = watched - plain
        for name, pixels, batch in CASES:
            torch.manual_seed(0)
            loop = Loop(resnet18(pixels), torch.randn(batch, 3, pixels, pixels), forwards)
            step, with_watch = loop.both(2, options.rounds if forwards == 1 else 3, 1)
            rows.append(
                (
                    f"{name}, {pixels} px, batch {batch}",
                    forwards,
                    f"{1e3 * step:.0f} ms",
                    f"{100 * (with_watch / step - 1):+.2f} %",
                    f"{1e6 * guard:.0f} µs",
                    f"{100 * guard / step:.3f} %",
                    f"{1e5 * guard:.1f} ms",
                )
            )
            print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
    head = (
        "training step of ResNet18",
        "forwards a step",
        "step",
        "with watch, its first steps (all measured)",
        "guard alone, later",
        "of the step",
        "1 % of a step of",
    )
    note = (
        f"Process CPU time, in turn in one process, least of {options.rounds} rounds; {machine()}. "
        "`python tests/benchmarks/bench_watch.py`"
    )
    publish("watch-overhead", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
