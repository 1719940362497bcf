"""How long a fold takes, in multiples of what torch.export takes on the same model.

Run: ``python tests/benchmarks/bench_fold_time.py [--readme]``. Aim: at most 3 × without comparing outputs, 8 × with it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import zoo
from benchmarks.tables import cpu_seconds, machine, publish, table

import bnfix

MODELS = ("timm:resnet50", "tv:mobilenet_v2", "tv:resnet18")


def measure(name: str, repeats: int) -> tuple[float, float, float]:
    """CPU seconds of torch.export, of a fold without the comparison of outputs, and of a fold with all of its proof."""
    model, x = zoo.build(name.removeprefix("timm:"))
    x = x[:1]
    export = cpu_seconds(lambda: torch.export.export(model, (x,), strict=False), repeats)
    bare = cpu_seconds(lambda: bnfix.fold(model, x, verify=False), repeats)
    proven = cpu_seconds(lambda: bnfix.fold(model, x), repeats)
    return export, bare, proven


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        export, bare, proven = measure(name, options.repeats)
        rows.append((name, f"{export:.2f} s", f"{bare / export:.1f} ×", f"{proven / export:.1f} ×"))
    head = ("model, one image of 224 px", "torch.export", "fold, `verify=False`", "fold, proven")
    how = f"Process CPU time, least of {options.repeats} runs"
    note = f"{how}; {machine()}. `python tests/benchmarks/bench_fold_time.py`"
    publish("fold-time", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
