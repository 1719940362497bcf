"""What a trained network knows after its norms were swapped, before and after a little training; and at batch size 2.

Run: ``python tests/benchmarks/bench_swap.py [--readme] [--seeds 3]``. A small ResNet with ten norms (the last one on
vectors) for the handwritten digits of scikit-learn. First table: trained with BatchNorm, swapped, tested, trained for
two epochs more. Second table: trained at batch size 2 from scratch, with BatchNorm, with the norms swapped that
``check`` calls fragile, with all of them swapped.

Opacus, if it is there. Its wheel brings a package ``benchmarks`` of its own, which would hide this folder: install with
``pip install --no-deps --target FOLDER opacus``, remove ``FOLDER/benchmarks``, put FOLDER on ``PYTHONPATH``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import machine, publish, table

import bnfix
from bnfix.errors import BnfixError

TRAIN = 1280
RATE, FINE = 1e-3, 2e-4
"""Of Adam: in training, and afterwards."""
OPACUS = "Opacus takes gcd(32, C) groups and a fresh affine: on the vectors of the head, two values a group. "
Way = Callable[[nn.Module, list[tuple[Tensor, Tensor]]], nn.Module]


class Block(nn.Module):
    """Two convolutions with their norms, and the input added; halves the image where the channels double."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        stride = out // inp
        self.conv1, self.bn1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Identity() if inp == out else nn.Conv2d(inp, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


class ResNet(nn.Module):
    """Ten norms: one in the stem, eight in four blocks, one on the vectors of the head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(width, width), Block(width, width), Block(width, 2 * width), Block(2 * width, 2 * width)
        )
        self.hidden = nn.Sequential(nn.Linear(2 * width, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(self.blocks(self.stem(x)).mean((2, 3))))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 1, 8, 8) and labels for training, and those of the test set."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN], order[TRAIN:]
    return images[train], labels[train], images[test], labels[test]


def train(
    model: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch: int = 32, rate: float = RATE
) -> nn.Module:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch):
            if len(index) == batch:
                optimizer.zero_grad()
                F.cross_entropy(model(images[index]), labels[index]).backward()
                optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).double().mean().item()


def by_bnfix(**options: object) -> Way:
    def way(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
        data = batches if options.get("init") not in ("copy", "fresh") else None
        swapped = bnfix.swap(model, data=data, example=batches[0][0], **options).model  # type: ignore[arg-type]
        assert swapped is not None
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in swapped.modules())
        return swapped

    return way


def by_opacus(model: nn.Module, _batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    from opacus.validators import ModuleValidator

    fixed: nn.Module = ModuleValidator.fix(copy.deepcopy(model).train())
    return fixed.eval()


WAYS: dict[str, Way] = {
    "bnfix, one group (moment)": by_bnfix(groups=1),
    "bnfix, eight groups (moment)": by_bnfix(groups=8),
    "bnfix, groups chosen": by_bnfix(),
    "bnfix, one group (least squares)": by_bnfix(groups=1, init="ls"),
    "bnfix, eight groups (least squares)": by_bnfix(groups=8, init="ls"),
    "the affine copied, one group": by_bnfix(groups=1, init="copy"),
    "the affine copied, eight groups": by_bnfix(groups=8, init="copy"),
    "a fresh affine, one group": by_bnfix(groups=1, init="fresh"),
    "Opacus ModuleValidator.fix": by_opacus,
}


def told(values: list[float]) -> str:
    """Mean and lowest of the seeds in percent."""
    return f"{statistics.mean(values):.1%} ({min(values):.1%})" if values else "not installed"


def of_trained(seeds: int, epochs: int) -> str:
    """The first table."""
    images, labels, test, test_labels = digits()
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    before: list[float] = []
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    seconds: list[float] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = train(ResNet(), images, labels, epochs)
        before.append(accuracy(model, test, test_labels))
        for name, way in WAYS.items():
            start = time.perf_counter()
            try:
                swapped = way(model, batches)
            except ImportError:
                continue
            seconds += [time.perf_counter() - start] if name == "bnfix, groups chosen" else []
            first = accuracy(swapped, test, test_labels)
            torch.manual_seed(100 + seed)
            found[name].append((first, accuracy(train(swapped, images, labels, 2, rate=FINE), test, test_labels)))
    rows = [[name, told([a for a, _ in pairs]), told([b for _, b in pairs])] for name, pairs in found.items()]
    note = (
        f"Accuracy on {len(test)} digits, mean of {seeds} seeds and the worst; with BatchNorm {told(before)}. All ten "
        f"norms swapped, then trained with Adam at {FINE:g} (before: {RATE:g}). bnfix fits them to 512 training images "
        f"in {statistics.mean(seconds):.1f} s. {OPACUS if found['Opacus ModuleValidator.fix'] else ''}{machine()}. "
        "`python tests/benchmarks/bench_swap.py`"
    )
    return f"{table(['swapped by', 'before any training', 'after two epochs'], rows)}\n\n{note}"


def at_two(seeds: int, epochs: int) -> str:
    """The second table."""
    images, labels, test, test_labels = digits()
    pairs = list(zip(images.split(2), labels.split(2), strict=True))
    found: dict[str, list[float]] = {"BatchNorm": [], 'only="fragile"': [], "all ten": []}
    swapped: list[str] = []
    for seed in range(seeds):
        for name in found:
            torch.manual_seed(seed)
            model: nn.Module | None = ResNet()
            if name != "BatchNorm":
                only = "fragile" if "fragile" in name else None
                try:
                    result = bnfix.swap(model, only=only, data=pairs, init="fresh")  # type: ignore[arg-type]
                except BnfixError as error:
                    swapped = [error.message]
                    continue
                model = result.model
                swapped = [e.site for e in result.edits] if only else swapped
            assert model is not None
            torch.manual_seed(100 + seed)
            found[name].append(accuracy(train(model, images, labels, epochs, 2, 5e-4), test, test_labels))
    rows = [[name, told(values) if values else "not measured"] for name, values in found.items()]
    note = (
        f"Trained from scratch at batch size 2, {epochs} epochs, accuracy on {len(test)} digits, mean of {seeds} seeds "
        f"and the worst. Fragile: {', '.join(swapped)}. {machine()}. `python tests/benchmarks/bench_swap.py`"
    )
    return f"{table(['norms swapped', 'accuracy'], rows)}\n\n{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write the tables into README.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--epochs-at-two", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    publish("swap-accuracy", of_trained(options.seeds, options.epochs), options.readme)
    publish("swap-batch-of-two", at_two(options.seeds, options.epochs_at_two), options.readme)


if __name__ == "__main__":
    main()
