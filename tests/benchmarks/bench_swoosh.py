"""The story's table for the README: ``examples/siamese_swoosh.py`` as users run it, three seeds.

Run: ``python tests/benchmarks/bench_swoosh.py [--readme] [--seeds 3]``. With ``--readme`` its picture goes beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import machine, publish, table

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "siamese_swoosh.py"
CASES = {"cross_modal": "branches differ", "class_batches": "one class a batch"}


def mean_sd(values: list[float], digits: int) -> str:
    """``0.864 ± 0.041``."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}"


def rows_of(numbers: dict[str, dict[str, list[tuple[float, float]]]]) -> list[list[str]]:
    """A row for each repair of both cases: eval loss, and 5-NN accuracy in percent."""
    rows = []
    for key, case in CASES.items():
        for name, of_seeds in numbers[key].items():
            losses, accuracies = ([float(v) for v in values] for values in zip(*of_seeds, strict=True))
            rows.append([case, name, mean_sd(losses, 3), mean_sd([100 * a for a in accuracies], 1)])
            case = ""
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(EXAMPLE), "--out", folder, "--seeds", str(options.seeds)]
        subprocess.run(command, env=env, check=True)
        numbers = json.loads((Path(folder) / "numbers.json").read_text())
        if options.readme:
            shutil.copy(Path(folder) / "swoosh.png", EXAMPLE.with_suffix(".png"))
    step, in_train, in_eval = numbers["curve"][-1]
    note = (
        f"Triplet loss in evaluation mode (at 1 nothing is learned) and 5-NN accuracy in % on unseen digits, mean and "
        f"standard deviation of {options.seeds} seeds; seed 0 as trained: {in_train:.2f} in train(), {in_eval:.2f} in "
        f"eval() after {step} steps. Batchwise: each batch normalized by itself, as in training; with negatives of the "
        f"anchor's own class, where an honest loss is 1, it has {statistics.mean(numbers['same_class']):.2f}. "
        f"{machine()}. `python tests/benchmarks/bench_swoosh.py`"
    )
    head = ["case", "repair", "loss in eval()", "5-NN accuracy"]
    publish("swoosh", f"{table(head, rows_of(numbers))}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
