"""Faults that a net is trained with: what batches hold, what norms share, what stands in front of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from benchmarks.recall.faults import Case, fault, natural, some
from benchmarks.recall.healthy import Healthy, norms
from benchmarks.recall.in_use import replaced
from benchmarks.recall.nets import Arch, dataset, fit, loader
from benchmarks.recall.tasks import Segment, Task, Triplets, View, digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

STEPS = 300
"""Forwards with very small batches: a net that has learned for a fifth of its time goes on with them."""


# --------------------------------------------------------------------------------- small batches


def _small(net: Healthy, batch: int, every: int, lr: float) -> Case:
    """Trained on from an early state, and compared with the same where norms see 32 samples, of which as few count."""
    arch = net.arch
    data = loader(arch, batch=batch)
    steps = STEPS // every
    model = fit(arch, net.model(net.at(0.2)), data, steps=steps, lr=lr, every=every)
    torch.manual_seed(net.seed)

    def loss(model: nn.Module, seen: Any) -> Tensor:
        return arch.task.loss(model, seen, only=batch)

    control = fit(arch, net.model(net.at(0.2)), loader(arch, batch=32), steps=steps, lr=lr, every=every, loss=loss)
    return Case(model, arch.score(model), arch.score(control), data, natural(arch))


@fault("small batches", "BN301", doses=(4, 3, 2))
def small(net: Healthy, batch: int) -> Case:
    """So many samples a step."""
    return _small(net, batch, 1, 1e-3)


@fault("small batches, accumulated", "BN301", "BN405", doses=(4, 3, 2))
def accumulated(net: Healthy, batch: int) -> Case:
    """Five of them a step."""
    return _small(net, batch, 5, 2e-3)


# --------------------------------------------------------------------------- what belongs together


def labels_of(arch: Arch) -> Tensor:
    """The class of each training sample; of a scene, that of its digit."""
    y = arch.split[1]
    return digits()[0][1] if y.dim() > 1 else y


class Grouped:
    """Batches out of groups of so many classes each, in random order; a share of each batch may be of any class."""

    def __init__(self, labels: Tensor, batch: int, classes: int, seed: int) -> None:
        self.labels, self.batch, self.classes = labels, batch, classes
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        order = order[(self.labels[order] // self.classes).argsort(stable=True)]
        parts = list(order.split(self.batch))[: len(self)]
        for i in torch.randperm(len(parts), generator=self.generator).tolist():
            yield parts[i].tolist()

    def __len__(self) -> int:
        return len(self.labels) // self.batch


@fault("sorted by class", "BN304", doses=(4, 2, 1))
def sorted_batches(net: Healthy, classes: int) -> Case:
    """So many classes a batch, from the beginning."""
    arch = net.arch
    data = loader(arch, batch_sampler=Grouped(labels_of(arch), arch.batch, classes, net.seed))
    model = fit(arch, arch.build(), data)
    return Case(model, arch.score(model), None, data, natural(arch))


@fault("one rank's statistics", "BN204", "BN407", doses=(0.6, 0.8, 1))
def one_rank(net: Healthy, share: float) -> Case:
    """Two ranks, gradients averaged, statistics of the first saved: this share of its shard is of classes 0 to 4."""
    arch = net.arch
    labels = labels_of(arch)
    rng = torch.Generator().manual_seed(net.seed)
    own = (labels >= 5) ^ (torch.rand(len(labels), generator=rng) > share)
    shards = [torch.where(own == bool(r))[0] for r in (0, 1)]
    size = min(len(s) for s in shards)
    both = [loader(arch, torch.utils.data.Subset(dataset(arch), s[:size].tolist()), batch=arch.batch // 2)
            for s in shards]  # fmt: skip

    def loss(model: nn.Module, batch: Any) -> Tensor:
        total = arch.task.loss(model, batch[0])
        kept = [(n.running_mean.clone(), n.running_var.clone(), n.num_batches_tracked.clone()) for n in norms(model)]
        total = (total + arch.task.loss(model, batch[1])) / 2
        for norm, (mean, var, counted) in zip(norms(model), kept, strict=True):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, counted
        return total

    model = fit(arch, arch.build(), _Together(both), loss=loss)
    return Case(model, arch.score(model), None, loader(arch), natural(arch))


class _Together:
    def __init__(self, loaders: list[Any]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[Any]:
        return zip(*self.loaders, strict=False)

    def __len__(self) -> int:
        return min(map(len, self.loaders))


# ------------------------------------------------------------------------------------ call sites


class Both(Task):
    """Each batch twice, the second time as the other modality sees it; ``joint`` in one forward."""

    def __init__(self, inner: Task, other: View, joint: bool) -> None:
        self.inner, self.other, self.joint = inner, other, joint
        self.forward = lambda m, b: (m(b[0]), m(other(b[0])))

    def loss(self, model: nn.Module, batch: Any, only: int | None = None) -> Tensor:
        x, y = batch
        if self.joint:
            return self.inner.loss(model, (torch.cat([x, self.other(x)]), torch.cat([y, y])))
        return (self.inner.loss(model, batch) + self.inner.loss(model, (self.other(x), y))) / 2

    def score(self, model: nn.Module, split: Any, **how: Any) -> float:
        two = [self.inner.score(model, split, **how), self.inner.score(model, split, view=self.other)]
        return sum(two) / 2


@fault("modalities in forwards of their own", "BN303", doses=(0.7, 2, "negative"))
def modalities(net: Healthy, change: Any) -> Case:
    """Two, in each step: another brightness, at last negatives. Compared with one joint forward."""
    arch, scale = net.arch, net.arch.scale

    def other(x: Tensor) -> Tensor:
        return (1 - 2 * scale.mean) / scale.std - x if change == "negative" else x + change

    found = {}
    for joint in (False, True):
        task: Task = Triplets(other, joint=joint) if arch.siamese else Both(arch.task, other, joint)
        mine = replace(arch, task=task, epochs=max(2, arch.epochs * 2 // 3))
        torch.manual_seed(net.seed)
        data = loader(mine, seed=net.seed)
        model = fit(mine, mine.build(), data)
        found[joint] = model, mine.score(model), data, task.forward
    model, score, data, forward = found[False]
    return Case(model, score, found[True][1], data, {"forward": forward, "max_samples": 640})  # whole batches, slow


@fault("one norm for several layers", "BN303", "BN102", doses=(0, 0.5, 1))
def aliased(net: Healthy, share: float) -> Case | None:
    """Layers of one width share a norm: one of them, half, all."""
    model = net.arch.build()
    groups: dict[Any, list[Any]] = defaultdict(list)
    for norm in norms(model):
        groups[type(norm), norm.num_features, isinstance(getattr(norm, "act", None), nn.Identity)].append(norm)
    pairs = [(group[0], norm) for group in groups.values() for norm in group[1:]]
    if not pairs:
        return None
    for first, norm in some(pairs, share):
        replaced(model, norm, lambda _, first=first: first)
    data = loader(net.arch, seed=net.seed)
    fit(net.arch, model, data)
    return Case(model, net.arch.score(model), None, data, natural(net.arch))


# ----------------------------------------------------------------------------------- other things


@fault("padding in statistics", "BN305", "BN204", doses=(0.25, 0.5, 0.75))
def padding(net: Healthy, share: float) -> Case | None:
    """Images (sequences) of several sizes padded with zeros to the largest; evaluated one by one, unpadded."""
    arch = net.arch
    if not arch.spatial or isinstance(arch.task, Segment):
        return None
    x, y = arch.split[:2]
    more = round(x.shape[-1] * share / (1 - share))
    black = -arch.scale.mean / arch.scale.std
    wide = torch.cat([x, x.new_full((*x.shape[:-1], more), black)], -1)
    mask = torch.zeros(len(x), *wide.shape[2:], dtype=torch.bool)
    mask[..., : x.shape[-1]] = True
    data = loader(arch, TensorDataset(wide, y, mask), seed=net.seed)
    model = fit(arch, arch.build(), data)
    how = {"forward": lambda m, b: m(b[0]), "mask": lambda b: b[2]}
    return Case(model, arch.score(model), None, data, how)


@fault("dropout in front of norms", "BN109", "BN204", doses=(0.2, 0.4, 0.6))
def dropout(net: Healthy, rate: float) -> Case:
    """In front of every second norm but the first, and of the last."""
    model = net.arch.build()
    for norm in norms(model)[:0:-2]:
        replaced(model, norm, lambda n: nn.Sequential(nn.Dropout(rate), n))
    data = loader(net.arch, seed=net.seed)
    fit(net.arch, model, data)
    return Case(model, net.arch.score(model), None, data, natural(net.arch))
