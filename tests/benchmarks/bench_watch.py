"""What ``bnfix.watch`` costs a training step: ResNet18, CIFAR-like and at 224 pixels, with and without, side by side.

Run: ``python tests/benchmarks/bench_watch.py [--readme] [--rounds N] [--device cuda]``. Process CPU time (user and
system; on a GPU wall-clock time to the end of all kernels), one thread, both ways in turn in one process, the least of
all rounds; aim: at most 1 % of a step. On a CPU a step takes so long
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
        """Seconds of a step, over n of them."""
        start = self._now()
        for _ in range(n):
            self.step()
        return (self._now() - start) / n

    def _now(self) -> float:
        if self.x.is_cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

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
        self.widths = widths
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs = self.inputs or [torch.zeros(4, w, 2, 2, device=x.device) for w in self.widths]
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
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    # A GPU needs batches as large as are usual there, and so many steps that the dense ones at the start fade.
    cases = CASES if device.type == "cpu" else tuple((name, pixels, 32 * batch) for name, pixels, batch in CASES)
    many, warm = (2, 1) if device.type == "cpu" else (64, 32)
    rows = []
    for forwards in FORWARDS:
        torch.manual_seed(0)
        idle = Alone(Chain().to(device), torch.zeros(1, device=device), forwards)
        plain, watched = idle.both(160, 3 * options.rounds, 32)
        guard = watched - plain
        for name, pixels, batch in cases:
            torch.manual_seed(0)
            x = torch.randn(batch, 3, pixels, pixels, device=device)
            loop = Loop(resnet18(pixels).to(device), x, forwards)
            step, with_watch = loop.both(many, options.rounds if forwards == 1 else 3, warm)
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
        "with watch" if device.type != "cpu" else "with watch, its first steps (all measured)",
        "guard alone, later",
        "of the step",
        "1 % of a step of",
    )
    note = (
        f"{'Process CPU' if device.type == 'cpu' else 'Wall-clock'} time, in turn in one process, least of "
        f"{options.rounds} rounds; {machine()}. "
        "`python tests/benchmarks/bench_watch.py`"
    )
    publish("watch-overhead", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
