"""The swoosh: a Siamese network that is perfect in train() and lost in eval(); found, repaired and shipped.

It takes about a minute on two cores, downloads nothing, and needs scikit-learn (for its digits) and matplotlib (for
the pictures). The same seeds give the same numbers::

    python examples/siamese_swoosh.py --out siamese-swoosh

The network learns that a digit (the anchor) is nearer to another of its class (the positive) than to one of another
class (the negative). Anchors are images as they are, positives and negatives are inverted ones: two modalities. The
three go through one encoder one after the other. In training each batch norm normalises each of them by itself; in
evaluation it has one set of running statistics for all three, which fits none. That is the swoosh.

The second case is a warning: where a batch gives the answer away, the best loss belongs to the worst network. So each
repair is judged twice, by the loss and by whether the five nearest neighbours of a digit know its class (5-NN).
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

import bnfix
from bnfix.errors import MissingDependencyError
from bnfix.render import to_concise

Triplet = tuple[Tensor, Tensor, Tensor]
Score = tuple[float, float]  # eval loss, 5-NN accuracy
Curve = list[tuple[int, float, float]]  # step, loss in train mode, loss in eval mode
EVERY = 10  # steps between two points of a curve
BROKEN, PARTED, BATCHWISE = "as trained", "unshare + recalibrate", "unshare + recalibrate, batchwise"


class Siamese(nn.Module):
    """Encoder, projection and prediction; its forward calls each norm three times."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> None:
        super().__init__()
        encoder = [nn.Linear(64, 128), norm(128), nn.ReLU(), nn.Linear(128, 64), norm(64), nn.ReLU()]
        projection = [nn.Linear(64, 64), norm(64), nn.ReLU(), nn.Linear(64, 64)]
        prediction = [nn.Linear(64, 32), norm(32), nn.ReLU(), nn.Linear(32, 32)]
        self.net = nn.Sequential(*encoder, *projection, *prediction)

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Triplet:
        return self.net(a), self.net(p), self.net(n)


class Joint(Siamese):
    """The same with one forward: the three are concatenated, and so normalised together."""

    def forward(self, a: Tensor, p: Tensor, n: Tensor) -> Triplet:
        return bnfix.joint(self.net)(a, p, n)


def group_norm(width: int) -> nn.Module:
    """A norm that looks at one sample at a time: train() and eval() are the same."""
    return nn.GroupNorm(8, width)


class Digits:
    """1,200 digits to train on, 597 to test on, and triplets of them."""

    def __init__(self, seed: int, class_batches: bool = False) -> None:
        x, y = load_digits(return_X_y=True)
        self.x, self.y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
        self.draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.x), generator=self.draw)
        self.train, self.test = (part[self.y[part].argsort(stable=True)] for part in (order[:1200], order[1200:]))
        self.class_batches = class_batches
        self.unseen = self._triplets(self.test, 1000)
        self.absurd = self._triplets(self.test, 1000, same=True)  # negatives of the anchor's class: nothing to learn

    def batch(self, size: int = 64) -> Triplet:
        return self._triplets(self.train, size, one_class=self.class_batches)

    def _triplets(self, of: Tensor, count: int, one_class: bool = False, same: bool = False) -> Triplet:
        """Cross-modal; with ``class_batches`` in one modality, but anchors and positives of one class a batch."""
        c = torch.randint(10, (1 if one_class else count,), generator=self.draw).expand(count)
        other = c if same else (c + torch.randint(1, 10, (count,), generator=self.draw)) % 10
        a, p, n = (self.x[self._members(of, classes)] for classes in (c, c, other))
        return (a, p, n) if self.class_batches else (a, 1 - p, 1 - n)

    def _members(self, of: Tensor, classes: Tensor) -> Tensor:
        """A sample of each class, drawn at random: ``of`` is sorted by class, each has its stretch."""
        sizes = self.y[of].bincount(minlength=10)
        place = (torch.rand(len(classes), generator=self.draw) * sizes[classes]).long()
        return of[(sizes.cumsum(0) - sizes)[classes] + place]


def triplet_loss(model: nn.Module, triplets: Triplet) -> Tensor:
    """On the sphere with margin 1, so 1.0 means that positives are no nearer than negatives."""
    return F.triplet_margin_loss(*(F.normalize(out, dim=1) for out in model(*triplets)), margin=1.0)


def train(model: nn.Module, digits: Digits, steps: int, history: list[dict[str, Tensor]] | None = None) -> nn.Module:
    """A plain loop; what ``history`` gets are the weights and statistics before it and after every 10 steps."""
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, fused=True)
    model.train()
    for step in range(steps + 1):
        if history is not None and step % EVERY == 0:
            history.append({name: value.clone() for name, value in model.state_dict().items()})
        if step < steps:
            loss = triplet_loss(model, digits.batch())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def swoosh(history: list[dict[str, Tensor]], digits: Digits) -> Curve:
    """The loss on the same unseen triplets in both modes, of each state that training went through."""
    curve, probe = [], Siamese()
    for i, state in enumerate(history):
        losses = []
        for mode in (True, False):
            probe.load_state_dict(state)  # a forward in train mode changes the statistics
            losses.append(triplet_loss(probe.train(mode), digits.unseen).item())
        curve.append((i * EVERY, losses[0], losses[1]))
    return curve


def anchor_encoder(model: nn.Module) -> nn.Sequential:
    """What is shipped: the layers that anchors go through, with their own norms where ``unshare`` made several."""
    return nn.Sequential(*(m[0] if isinstance(m, bnfix.NormPerCall) else m for m in copy.deepcopy(model).net)).eval()


@torch.no_grad()
def score(model: nn.Module, digits: Digits) -> Score:
    """In eval mode on unseen digits: the loss, and whether an embedding's 5 nearest know its class."""
    loss = triplet_loss(model.eval(), digits.unseen).item()
    out = F.normalize(anchor_encoder(model)(digits.x), dim=1).numpy()
    neighbours = KNeighborsClassifier(5).fit(out[digits.train], digits.y[digits.train])
    return loss, float(neighbours.score(out[digits.test], digits.y[digits.test]))


def unshared(model: nn.Module, loader: list[Triplet], method: Any = "auto") -> nn.Module:
    """One norm for each call, then the statistics of what that call sees; no training."""
    apart = bnfix.unshare(model, loader[0]).model
    bnfix.recalibrate(apart, loader, method=method)
    return apart


def cross_modal(seed: int, steps: int) -> tuple[dict[str, nn.Module], Digits, bnfix.Diagnosis, Curve]:
    """The story, for one seed: trained under ``watch``, and repaired in all ways."""
    torch.manual_seed(seed)
    digits, broken, history = Digits(seed), Siamese(), []
    with bnfix.watch(broken) as w:
        train(broken, digits, steps, history)
    loader = [digits.batch(128) for _ in range(10)]
    pooled = copy.deepcopy(broken)
    bnfix.recalibrate(pooled, loader)  # one set of statistics, as good as one can be
    models = {
        BROKEN: broken,
        "recalibrate (pooled)": pooled,
        PARTED: unshared(broken, loader),
        "joint forward, from scratch": train(Joint(), digits, steps),
        "GroupNorm, from scratch": train(Siamese(group_norm), digits, steps),
    }
    return models, digits, w.report(), swoosh(history, digits)


def class_batches(seed: int, steps: int) -> tuple[dict[str, nn.Module], Digits]:
    """The case in which a loss lies: a batch's anchors and positives are of one class, its negatives of others."""
    torch.manual_seed(seed)
    digits = Digits(seed, class_batches=True)
    broken = train(Siamese(), digits, steps)
    loader = [digits.batch(128) for _ in range(30)]
    models = {
        BROKEN: broken,
        PARTED: unshared(broken, loader),
        BATCHWISE: unshared(broken, loader, method="population"),  # each batch normalised by itself, as in training
        "GroupNorm, from scratch": train(Siamese(group_norm), digits, steps),
    }
    return models, digits


@dataclass
class Told:
    """What came out with one seed."""

    cross_modal: dict[str, Score]
    class_batches: dict[str, Score]
    same_class: float
    curve: Curve
    encoder: nn.Module
    named: dict[str, list[str]] = field(default_factory=dict)


def one_seed(seed: int, steps: int) -> Told:
    """Both cases, trained, repaired and judged; with seed 0 also what watch and check say."""
    torch.set_num_threads(1)  # the nets are small: more threads are slower
    began = time.monotonic()
    models, digits, watched, curve = cross_modal(seed, steps)
    others, of_class = class_batches(seed, steps)
    told = Told(
        {name: score(model, digits) for name, model in models.items()},
        {name: score(model, of_class) for name, model in others.items()},
        triplet_loss(others[BATCHWISE], of_class.absurd).item(),
        curve,
        anchor_encoder(models[PARTED]),
    )
    if seed == 0:
        checked = bnfix.check(models[BROKEN], data=[digits.batch(128) for _ in range(10)])
        again = bnfix.check(others[BROKEN], data=[of_class.batch(128) for _ in range(30)])
        reports = {"watch, around the training": watched, "check, with data": checked, "check, class batches": again}
        told.named = {who: errors_and_warnings(report) for who, report in reports.items()}
    print(f"seed {seed}: trained, repaired and judged in {time.monotonic() - began:.0f} s", file=sys.stderr)
    return told


def errors_and_warnings(diagnosis: bnfix.Diagnosis) -> list[str]:
    found = (*diagnosis.of("error"), *diagnosis.of("warning"))
    return [f"{f.code} {f.severity}: {f.message}" for f in found]


def by_name(scores: Sequence[dict[str, Score]]) -> dict[str, list[Score]]:
    return {name: [of_seed[name] for of_seed in scores] for name in scores[0]}


def table(title: str, scores: dict[str, list[Score]]) -> None:
    print(f"\n{title:<36}{'eval loss':>16}{'5-NN accuracy':>18}")
    for name, of_seeds in scores.items():
        loss, accuracy = (mean_sd(values) for values in zip(*of_seeds, strict=True))
        print(f"  {name:<34}{loss[0]:>8.3f} ± {loss[1]:.3f}{accuracy[0]:>10.3f} ± {accuracy[1]:.3f}")


def mean_sd(values: tuple[float, ...]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def draw_swoosh(curve: Curve, path: Path) -> None:
    from matplotlib.figure import Figure

    steps, in_train, in_eval = zip(*curve, strict=True)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for values, mode, color in ((in_eval, "eval()", "#c0392b"), (in_train, "train()", "#2471a3")):
        axes.plot(steps, values, color=color, linewidth=2)
        axes.annotate(f" {mode}\n {values[-1]:.2f}", (steps[-1], values[-1]), color=color, va="center", fontsize=11)
    axes.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
    axes.text(steps[-1], 1.01, "nothing learned", color="0.45", va="bottom", ha="right", fontsize=9)
    axes.set_title("Same weights, same unseen triplets: fine in train(), lost in eval()", loc="left")
    axes.set(xlabel="optimizer step", ylabel="triplet loss (margin 1)", ylim=(0, None), xlim=(0, steps[-1] * 1.1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_repairs(cases: dict[str, dict[str, list[Score]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08)
    rows = figure.subplots(len(cases), 2, height_ratios=[len(scores) for scores in cases.values()])
    for (title, scores), row in zip(cases.items(), rows, strict=True):
        for axes, which, label in zip(row, (0, 1), ("eval loss (less is better)", "5-NN accuracy"), strict=True):
            points = [mean_sd(tuple(s[which] for s in of_seeds)) for of_seeds in scores.values()]
            colors = ["#c0392b" if n == BROKEN else "#e08e0b" if n == BATCHWISE else "#2471a3" for n in scores]
            means = [mean for mean, _ in points]
            axes.barh(range(len(points)), means, xerr=[sd for _, sd in points], color=colors, ecolor="0.3", height=0.65)
            for y, (mean, sd) in enumerate(points):
                axes.text(mean + sd, y, f" {mean:.3f}", va="center", fontsize=9)
            axes.set(xlabel=label, xlim=(0, 1.15), xticks=[0, 0.25, 0.5, 0.75, 1])
            axes.set_yticks(range(len(points)), list(scores) if which == 0 else [""] * len(points))
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_title(title, loc="left", fontsize=11, pad=10)
    figure.savefig(path, dpi=120)


def ship(net: nn.Module, out: Path) -> Path | None:
    """Fold the repaired encoder, write it as ONNX, and compare the file with the encoder as it was repaired."""
    digits = Digits(0)
    example = digits.x[digits.test][:8]
    folded = bnfix.fold(net, example)
    print(f"\nThe encoder of the anchors, un-shared and recalibrated:\n  {summary(folded)}")
    path = out / "encoder.onnx"
    try:
        print(f"  {summary(bnfix.export(folded.model, path, example))}")
        print(f"  the file against the unfolded encoder: {summary(bnfix.verify(net, path, [example]))}")
    except MissingDependencyError as error:
        print(f"  export left out: {error}")
        return None
    return path


def summary(result: Any) -> str:
    """The verdict of a report: its last line in the form made for ``grep``."""
    return to_concise(result).splitlines()[-1]


def tell_the_cheat(scores: dict[str, list[Score]], same_class: float) -> None:
    """What the second table means; said of the numbers as they came out."""
    (before, knew), (after, knows) = (
        [statistics.mean(values) for values in zip(*scores[name], strict=True)] for name in (BROKEN, BATCHWISE)
    )
    if not (after < before and knows < knew):
        print("\nNo cheat with these seeds: the loss and 5-NN agree.")
        return
    print(
        f"""
A perfect loss that is a cheat: un-shared and normalised batch by batch, the loss falls from {before:.3f} to
{after:.3f}, and 5-NN falls with it, from {knew:.3f} to {knows:.3f}. Anchors and positives of a batch are of one class,
and what a batch has in common gives them away. The proof: negatives of the anchor's own class can't be told from
positives, so the loss of whoever looks at the digits is 1. Here it is {same_class:.3f}."""
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path("siamese-swoosh"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as two_cores:
        told = list(two_cores.map(partial(one_seed, steps=options.steps), range(options.seeds)))
    crossed, classed = by_name([t.cross_modal for t in told]), by_name([t.class_batches for t in told])
    step, in_train, in_eval = told[0].curve[-1]
    print(f"Seed 0 after {step} steps, same weights, same triplets: {in_train:.3f} in train(), {in_eval:.3f} in eval()")
    for who, findings in told[0].named.items():
        print(f"\n{who}:", *findings, sep="\n  ")
    table("Modalities differ", crossed)
    table("Class batches", classed)
    tell_the_cheat(classed, statistics.mean(t.same_class for t in told))
    pictures = (options.out / "swoosh.png", options.out / "repairs.png")
    draw_swoosh(told[0].curve, pictures[0])
    healed = "Modalities differ: one norm for each call repairs without training"
    cheated = "Class batches: a low loss can be a cheat (orange), its 5-NN tells"
    draw_repairs({healed: crossed, cheated: classed}, pictures[1])
    file = ship(told[0].encoder, options.out)
    numbers = {"named": told[0].named, "curve": told[0].curve, "cross_modal": crossed, "class_batches": classed}
    numbers |= {"same_class": [t.same_class for t in told]}
    (options.out / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    written = (*pictures, options.out / "numbers.json", file)
    print("\nwritten:", *(str(p) for p in written if p is not None), sep="\n  ")


if __name__ == "__main__":
    main()
