"""The rules that read data, on small nets trained for real: healthy ones, and ones with a fault put in.

Run: ``python tests/benchmarks/bench_check_data.py [--seeds 3] [--nets mlp,resnet]``. For each net and fault: the
accuracy in evaluation mode beside that of the healthy net, the codes that were found, and the figures that the rules
went by. A fault counts as harmful where accuracy falls by more than two points.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.small_nets import RECIPES, Trained, available, train

from bnfix.evidence import of_model
from bnfix.rules import judge
from bnfix.rules.measured import apart
from bnfix.types import DataEvidence, Diagnosis, Evidence

Fault = Callable[[str, int], "Trained | None"]


def norms(model: nn.Module) -> list[Any]:
    """Modules with running statistics."""
    return [m for m in model.modules() if getattr(m, "running_var", None) is not None]


def with_momentum(value: float) -> Fault:
    """Trained with another momentum."""

    def tune(model: nn.Module) -> None:
        for norm in norms(model):
            norm.momentum = value

    return lambda name, seed: train(name, seed, tune=tune)


def reset(name: str, seed: int) -> Trained:
    """Statistics as a new layer has them."""
    found = train(name, seed)
    for norm in norms(found.model):
        norm.reset_running_stats()
    return found


def averaged_without_buffers(decay: float) -> Fault:
    """An exponential average of the parameters alone."""

    def make(name: str, seed: int) -> Trained:
        average: list[nn.Module] = []

        def step(model: nn.Module, _number: int) -> None:
            if not average:
                average.append(copy.deepcopy(model))
            for a, b in zip(average[0].parameters(), model.parameters(), strict=True):
                a.data.lerp_(b.data, 1 - decay)

        return replace(train(name, seed, step=step), model=average[0].eval())

    return make


def in_order(name: str, seed: int) -> Trained | None:
    """Trained on batches of one class, or two."""

    def by_class(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        order = labels.argsort(stable=True)
        size = RECIPES[name].batch
        batches = [b for b in order.split(size) if len(b) == size]
        mixed = torch.cat(
            [batches[i] for i in torch.randperm(len(batches), generator=torch.Generator().manual_seed(0))]
        )
        return images[mixed], labels[mixed]

    return None if RECIPES[name].siamese else train(name, seed, train_on=by_class, shuffle=False)


def tiny_batches(size: int) -> Fault:
    """Trained with so small batches that norms on vectors have too few values."""
    return lambda name, seed: (
        train(name, seed, batch=size, epochs=2, lr=1e-3)
        if any(isinstance(n, nn.BatchNorm1d) for n in norms(RECIPES[name].build()))
        else None
    )


def inverted(name: str, seed: int) -> Trained | None:
    """The loader gives negatives: another polarity than in training."""
    found = train(name, seed)
    if RECIPES[name].siamese:
        return None
    x, y = found.train.dataset.tensors  # type: ignore[attr-defined]
    loader = DataLoader(TensorDataset(1 - x, y), RECIPES[name].batch, shuffle=True, drop_last=True)
    split = found.val.dataset.tensors  # type: ignore[attr-defined]

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return (model(1 - split[0]).argmax(1) == split[1]).double().mean().item()

    return replace(found, train=loader, accuracy=accuracy)


def modalities(name: str, seed: int) -> Trained | None:
    """Anchors as they are, the others as negatives, each forwarded by itself."""
    return train(name, seed, change=lambda x: 1 - x) if RECIPES[name].siamese else None


FAULTS: dict[str, tuple[str, Fault]] = {
    "momentum .001": ("BN204", with_momentum(0.001)),
    "momentum .01": ("BN204", with_momentum(0.01)),
    "momentum .03": ("BN204", with_momentum(0.03)),
    "statistics reset": ("BN204", reset),
    "average without buffers": ("BN204", averaged_without_buffers(0.95)),
    "inverted inputs": ("BN204", inverted),
    "sorted loader": ("BN304", in_order),
    "batch size 2": ("BN301", tiny_batches(2)),
    "batch size 4": ("BN301", tiny_batches(4)),
    "two modalities": ("BN303", modalities),
}


def evidence_of(found: Trained) -> Evidence:
    """A net and its training loader, as ``check`` sees them."""
    return of_model(found.model, data=found.train, forward=found.forward)


def diagnosed(found: Trained) -> Diagnosis:
    """What ``check`` says of them."""
    return judge(evidence_of(found))


def figures(evidence: Evidence) -> dict[str, float]:
    """What the rules go by: e and e0 of BN204, F of BN304, d and l of BN303, the fewest values of BN301."""
    data = evidence.data
    assert data is not None
    assert data.drift is not None
    sites = apart(evidence, data)
    return {
        "e": data.drift.change or 0.0,
        "e0": data.drift.null or 0.0,
        "F": _ratio(data),
        "d": max((a.means for a in sites), default=0.0),
        "l": max((a.spreads for a in sites), default=0.0),
    }


def _ratio(data: DataEvidence) -> float:
    first = data.sites[0]
    live = first.sample_var > 1e-12 * (1 + first.mean**2)
    between = first.batch_mean[:, live].var(0, ddof=1)
    return float(numpy.median(numpy.median(first.batch_samples) * between / first.sample_var[live]))


def alarms(found: Diagnosis) -> list[str]:
    """Codes of errors (E) and warnings (W)."""
    return [f"{f.code}{f.severity[0].upper()}" for f in found.findings if f.severity != "info"]


def rows(names: list[str], seeds: int) -> Iterator[tuple[str, str, float, float, dict[str, float], list[str], bool]]:
    """Net, fault, accuracy of the healthy net and with the fault, figures, alarms, whether the fault was found."""
    for name in names:
        healthy = train(name)
        usual = healthy.accuracy(healthy.model)
        for seed in range(seeds):
            found = train(name, seed)
            evidence = evidence_of(found)
            here = alarms(judge(evidence))
            yield name, f"none, seed {seed}", usual, found.accuracy(found.model), figures(evidence), here, not here
        for fault, (code, make) in FAULTS.items():
            broken = make(name, 0)
            if broken is not None:
                evidence = evidence_of(broken)
                here, accuracy = alarms(judge(evidence)), broken.accuracy(broken.model)
                yield name, fault, usual, accuracy, figures(evidence), here, any(a.startswith(code) for a in here)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--nets", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [n for n in available() if not options.nets or n in options.nets.split(",")]
    clean = found = harmful = 0
    false: list[str] = []
    most: dict[str, float] = {}
    for name, fault, usual, accuracy, seen, said, right in rows(names, options.seeds):
        shown = "  ".join(f"{k} {v:.3f}" for k, v in seen.items() if v)
        print(f"{name:14} {fault:24} {usual:.3f} -> {accuracy:.3f}  {' '.join(said) or '-':20} {shown}", flush=True)
        if fault.startswith("none"):
            clean += 1
            false += said
            most = {k: max(v, most.get(k, 0.0)) for k, v in seen.items()}
        elif usual - accuracy > 0.02:
            harmful += 1
            found += right
    errors = sum(a.endswith("E") for a in false)
    print(
        f"\n{clean} healthy nets: {errors} errors, {len(false) - errors} warnings; at most "
        + ", ".join(f"{k} {v:.2g}" for k, v in most.items())
    )
    print(f"{harmful} harmful faults: {found} found")


if __name__ == "__main__":
    main()
