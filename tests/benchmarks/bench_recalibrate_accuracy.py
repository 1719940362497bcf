"""How far running statistics are from what the norms see, after bnfix and after the others, by batch size.

Run: ``python tests/benchmarks/bench_recalibrate_accuracy.py [--readme]``. A ResNet18 for the handwritten digits of
scikit-learn, with dropout in front of norms, trained for a few epochs. Judged by one more pass in evaluation mode over
the same data, with hooks, in float64 (``tests/calibration/calib_nets.py``, no code of bnfix). Aim: at most 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers import PEERS, absent, present
from benchmarks.tables import machine, publish, table
from calibration.calib_nets import DigitsResNet, Distance, batched, residual

import bnfix

BATCHES = (2, 7, 32, 256)
CALIBRATION = 1280  # no batch size leaves a last batch of one, which the others refuse


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 1, 8, 8) and labels for calibration and training, and those of the test set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:CALIBRATION], order[CALIBRATION:]
    return images[train], labels[train], images[test], labels[test]


def trained(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """The net after some epochs of Adam in batches of 32, in eval mode."""
    torch.manual_seed(0)
    model = DigitsResNet()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).double().mean().item()


def apart(found: Distance) -> str:
    return f"{found.mean:.1g} / {found.var:.1g}"


def by_bnfix(model: nn.Module, batches: list[Any]) -> None:
    bnfix.recalibrate(model, batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, train_labels, test, test_labels = digits()
    model = trained(train, train_labels, options.epochs)

    ways: dict[str, Callable[[nn.Module, list[Any]], None]] = {"bnfix": by_bnfix, **present()}
    head = ["loader's batch", "bnfix", *PEERS]
    rows = []
    accuracies: dict[str, list[float]] = {name: [] for name in head[1:]}
    for size in BATCHES:
        row: list[object] = [size]
        for name in head[1:]:
            if name not in ways:
                row.append("–")
                continue
            torch.manual_seed(1)
            mine = copy.deepcopy(model).train()
            ways[name](mine, batched(train, size))
            row.append(apart(residual(mine, batched(train, 256))))
            accuracies[name].append(accuracy(mine, test, test_labels))
        rows.append(row)
    spans = [f"{name} {min(found):.1%} to {max(found):.1%}" for name, found in accuracies.items() if found]
    note = (
        f"Worst \\|Δmean\\|/σ / worst \\|variance ratio − 1\\| over layers and channels, measured by one more pass in "
        f"evaluation mode; as trained {apart(residual(model, batched(train, 256)))}. ResNet18 with dropout in front of "
        f"norms, {CALIBRATION} digits. Accuracy on {len(test)} others: as trained "
        f"{accuracy(model, test, test_labels):.1%}, {', '.join(spans)}. {absent()}{machine()}. "
        "`python tests/benchmarks/bench_recalibrate_accuracy.py`"
    )
    publish("recalibrate-accuracy", f"{table(head, rows)}\n\n{note}", options.readme)


if __name__ == "__main__":
    main()
