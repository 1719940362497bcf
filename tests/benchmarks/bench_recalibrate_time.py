"""CPU time of ``recalibrate`` beside ``update_bn`` and a plain pass in evaluation mode, over the same loader.

Run: ``python tests/benchmarks/bench_recalibrate_time.py [--readme] [--models NAME@PIXELS …] [--batches N …]``.
User and system time of the process, one thread, all ways in turn in each round, the least of all rounds: what else the
machine does then matters least. Aims: ≤ 1.00 × update_bn on the ResNets, ≤ .85 × on mobilenetv2_100; ≤ 1.10 × a plain
pass on the ResNets.
"""

from __future__ import annotations

import argparse
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

MODELS = ("resnet18@96", "resnet50@64", "mobilenetv2_100@96")
BATCHES = (2, 16, 64)
IMAGES = 512


def plain(model: nn.Module, batches: list[Tensor]) -> None:
    """One pass in evaluation mode, nothing else."""
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)


WAYS: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
    "plain pass": plain,
    "update_bn": update_bn,
    "bnfix": lambda model, batches: bnfix.recalibrate(model, batches),
    "certify=full": lambda model, batches: bnfix.recalibrate(model, batches, certify="full"),
    "certify=None": lambda model, batches: bnfix.recalibrate(model, batches, certify=None),
}


def measure(name: str, size: int, rounds: int) -> dict[str, float]:
    """Least CPU seconds of each way on one model and one loader."""
    import timm

    architecture, _, pixels = name.partition("@")
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False).eval()
    batches = batched(torch.randn(IMAGES, 3, int(pixels), int(pixels)), size)
    plain(model, batches[:1])
    best = dict.fromkeys(WAYS, float("inf"))
    for _ in range(rounds):
        for way, run in WAYS.items():
            model.train() if way != "plain pass" else model.eval()
            start = time.process_time()
            run(model, batches)
            best[way] = min(best[way], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME@PIXELS")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.models:
        for size in options.batches:
            t = measure(name, size, options.rounds)
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
                    f"{t['certify=None'] / t['update_bn']:.2f} ×",
                    f"{t['certify=full'] / t['update_bn']:.2f} ×",
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
        "`certify=None` of `update_bn`",
        '`certify="full"` of `update_bn`',
    )
    note = (
        f"Process CPU time (user and system), {IMAGES} images, in turn in one process, least of {options.rounds} "
        f"rounds; {machine()}. `python tests/benchmarks/bench_recalibrate_time.py`"
    )
    publish("recalibrate-time", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
