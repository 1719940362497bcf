"""What ``bnfix.watch`` costs a training step: ResNet18, CIFAR-like and at 224 pixels, with and without, side by side.

Run: ``python tests/benchmarks/bench_watch.py [--readme] [--rounds N]``. Process CPU time (user and system), one thread,
both ways in turn in one process, the least of all rounds; aim: at most 1 % of a step. A step here costs so much that a
hook of microseconds drowns in its noise, so the guard's own time is measured a second way as well: the same hooks in
front of norms that compute nothing (``guard alone``), a step of them with and without the watch.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import machine, publish, table

import bnfix

CASES = (("CIFAR-like", 32, 64), ("ImageNet-like", 224, 8))
FORWARDS = {"one forward a step": 1, "three forwards a step": 3}


def resnet18(pixels: int) -> nn.Module:
    """Torchvision's; for small images with the usual stem of one 3×3 convolution and no pooling."""
    from torchvision.models import resnet18 as make

    model = make(num_classes=10)
    if pixels <= 64:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


class Idle(nn.BatchNorm2d):
    """A norm that counts an update and computes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return x


class Loop:
    """A training loop that can run with and without a watch around it."""

    def __init__(self, model: nn.Module, x: Tensor, forwards: int) -> None:
        self.model, self.x, self.forwards = model.train(), x, forwards
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def steps(self, n: int) -> float:
        """CPU seconds of n steps."""
        start = time.process_time()
        for _ in range(n):
            self.optimizer.zero_grad()
            total = sum(self.model(self.x).square().mean() for _ in range(self.forwards))
            total.backward()  # type: ignore[union-attr]
            self.optimizer.step()
        return time.process_time() - start

    def both(self, steps: int, rounds: int, warm: int) -> tuple[float, float]:
        """The least CPU seconds of a step: plain, watched. ``warm`` steps get the watch past its first, dense ones."""
        plain = watched = float("inf")
        self.steps(1)
        for _ in range(rounds):
            plain = min(plain, self.steps(steps) / steps)
            with bnfix.watch(self.model, self.optimizer):
                self.steps(warm)
                watched = min(watched, self.steps(steps) / steps)
        return plain, watched


class Chain(nn.Module):
    """Norms with the widths of ResNet18's that compute nothing, in one sum."""

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

    def steps(self, n: int) -> float:
        start = time.process_time()
        for _ in range(n):
            for _ in range(self.forwards):
                self.model(self.x)
            self.optimizer.step()
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=16, help="steps a round; 16 have one that is measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for forwards_name, forwards in FORWARDS.items():
        torch.manual_seed(0)
        idle = Alone(Chain(), torch.zeros(1), forwards)
        plain, watched = idle.both(320, 9, 16)
        guard = watched - plain
        for name, pixels, batch in CASES:
            torch.manual_seed(0)
            loop = Loop(resnet18(pixels), torch.randn(batch, 3, pixels, pixels), forwards)
            if forwards == 1:
                step, with_watch = loop.both(options.steps, options.rounds, 0 if options.steps < 17 else 16)
                whole = f"{100 * (with_watch / step - 1):+.2f} %"
            else:
                step, whole = min(loop.steps(2) / 2 for _ in range(2)), "-"
            share = f"{100 * guard / step:.2f} %"
            rows.append((f"{name}, {pixels} px, batch {batch}", forwards_name, f"{1e3 * step:.0f} ms",
                         f"{1e6 * guard:.0f} µs", share, whole))  # fmt: skip
            print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
    head = ("training step of ResNet18", "", "step", "guard alone", "of a step", "step with watch against without")
    note = (
        f"Process CPU time, in turn in one process, least of {options.rounds} rounds; {machine()}. "
        "`python tests/benchmarks/bench_watch.py`"
    )
    publish("watch-overhead", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
