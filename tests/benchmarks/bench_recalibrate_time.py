"""CPU time of ``recalibrate`` beside ``update_bn`` and a plain pass in evaluation mode, over the same loader.

Run: ``python tests/benchmarks/bench_recalibrate_time.py [--readme] [--models NAME@PIXELS …] [--batches N …]``.
User and system time of the process, one thread. All ways in turn in each round, the least of all rounds: what else the
machine does then matters least. And each way as the first and only work of a process of its own, as a user calls it:
there memory is fetched from the system, which takes each way another time. Aims (of the former): ≤ 1.00 × update_bn
on the ResNets, ≤ .85 × on mobilenetv2_100; ≤ 1.10 × a plain pass on the ResNets.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import update_bn
from benchmarks.tables import machine, publish, table
from calibration.calib_nets import batched

import bnfix

MODELS = ("resnet18@96", "resnet50@64", "resnet50@96", "mobilenetv2_100@96")
BATCHES = (2, 16, 64)
IMAGES = 512
TWICE = 2
"""Processes of each way that makes the first call: the lesser time counts."""


def plain(model: nn.Module, batches: list[Tensor]) -> None:
    """One pass in evaluation mode, nothing else."""
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)


def laid_out(images: Tensor) -> Tensor:
    """In the order that bnfix lets chunks run in."""
    return images.to(memory_format=torch.channels_last)


WAYS: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
    "plain pass": plain,
    "update_bn": update_bn,
    "channels last": lambda model, batches: update_bn(model, [laid_out(b) for b in batches]),
    "bnfix": lambda model, batches: bnfix.recalibrate(model, batches),
    "certify=full": lambda model, batches: bnfix.recalibrate(model, batches, certify="full"),
    "certify=None": lambda model, batches: bnfix.recalibrate(model, batches, certify=None),
}


ALONE = ("plain pass", "update_bn", "bnfix")


def prepared(name: str, size: int) -> tuple[nn.Module, list[Tensor]]:
    """A model that has run once, and the batches."""
    import timm

    architecture, _, pixels = name.partition("@")
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False).eval()
    batches = batched(torch.randn(IMAGES, 3, int(pixels), int(pixels)), size)
    plain(model, batches[:1])
    return model, batches


def timed(way: str, model: nn.Module, batches: list[Tensor]) -> float:
    """CPU seconds of one call."""
    model.train() if way != "plain pass" else model.eval()
    start = time.process_time()
    WAYS[way](model, batches)
    return time.process_time() - start


def measure(name: str, size: int, rounds: int) -> dict[str, float]:
    """Least CPU seconds of each way on one model and one loader."""
    model, batches = prepared(name, size)
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds):
        for way in WAYS:
            best[way] = min(best[way], timed(way, model, batches))
    return best


def alone(name: str, size: int, way: str) -> float:
    """CPU seconds of the first call in a process of its own: what pages cost differs by up to a second."""
    call = [sys.executable, __file__, "--models", name, "--batches", str(size), "--alone", way]
    return min(float(subprocess.run(call, check=True, capture_output=True, text=True).stdout) for _ in range(TWICE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME@PIXELS")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--alone", choices=ALONE, help="time one call of one way, and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        print(timed(options.alone, *prepared(options.models[0], options.batches[0])))
        return
    rows = []
    # First, while this process holds no memory that the others would have to get elsewhere.
    first = {
        (name, size): {way: alone(name, size, way) for way in ALONE}
        for name in options.models
        for size in options.batches
    }
    for name in options.models:
        for size in options.batches:
            t, once = measure(name, size, options.rounds), first[name, size]
            ours = t["bnfix"]
            rows.append(
                (
                    name.replace("@", ", ") + " px",
                    size,
                    f"{t['plain pass']:.2f} s",
                    f"{t['update_bn']:.2f} s",
                    f"{ours:.2f} s",
                    f"{ours / t['update_bn']:.2f} ×",
                    f"{ours / t['plain pass']:.2f} ×",
                    f"{ours / t['channels last']:.2f} ×",
                    f"{t['certify=None'] / t['update_bn']:.2f} ×",
                    f"{t['certify=full'] / t['update_bn']:.2f} ×",
                    f"{once['bnfix']:.2f} s",
                    f"{once['bnfix'] / once['update_bn']:.2f} ×",
                    f"{once['bnfix'] / once['plain pass']:.2f} ×",
                )
            )
            print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
    head = (
        "model",
        "loader's batch",
        "plain pass",
        "`update_bn`",
        "bnfix",
        "of `update_bn`",
        "of a plain pass",
        "of `update_bn` on channels-last images",
        "`certify=None` of `update_bn`",
        '`certify="full"` of `update_bn`',
        "first call in a process: bnfix",
        "of `update_bn`",
        "of a plain pass",
    )
    note = (
        f"Process CPU time (user and system), {IMAGES} images, in turn in one process, least of {options.rounds} "
        "rounds. The loader gives contiguous images, and bnfix runs them with their channels last; one column compares "
        "with `update_bn` on images that come so. In the last three columns each is the first work of a process of its "
        f"own (the lesser of {TWICE}), where its memory is fetched from the system; {machine()}. "
        "`python tests/benchmarks/bench_recalibrate_time.py`"
    )
    publish("recalibrate-time", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
