"""Eight architectures of different kinds, in two halves, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import small_nets
from benchmarks.recall.tasks import Scale, Segment, Split, Task, Triplets, digits, mnist, scenes, strokes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

After = Callable[[nn.Module, int], None]


class NormAct(nn.BatchNorm2d):
    """A norm with its activation, as timm has it: the functional call stands in a forward of its own."""

    def __init__(self, channels: int, act: bool = True) -> None:
        super().__init__(channels)
        self.act: nn.Module = nn.ReLU6() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        on_batch = self.training or self.running_mean is None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        rate = self.momentum or 0.0
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, on_batch, rate, self.eps)
        return self.act(y)


class Inverted(nn.Module):
    """An inverted residual: wide, depthwise, narrow, and around it where shapes allow."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        wide, self.around = 4 * inp, stride == 1 and inp == out
        self.expand, self.norm1 = nn.Conv2d(inp, wide, 1, bias=False), NormAct(wide)
        self.depth, self.norm2 = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), NormAct(wide)
        self.project, self.norm3 = nn.Conv2d(wide, out, 1, bias=False), NormAct(out, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.depth(self.norm1(self.expand(x))))
        y = self.norm3(self.project(y))
        return x + y if self.around else y


def mobile(width: int = 12) -> nn.Module:
    """A stem and three inverted residuals with depthwise convolutions."""
    blocks = [Inverted(width, width, 1), Inverted(width, 2 * width, 2), Inverted(2 * width, 2 * width, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)]
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), NormAct(width), *blocks, *head)


class Sequence(nn.Module):
    """Convolutions over time, the mean over it, classes. Takes (N, 8, T)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [8, width, width, 2 * width]
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(b) for b in sizes[1:])
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean(2))


def _twice(inp: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in ((inp, out), (out, out)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Down twice and up again, with what was there before joined in. Takes (N, 1, H, W), gives (N, 11, H, W)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.one, self.two, self.deep = _twice(1, width), _twice(width, 2 * width), _twice(2 * width, 4 * width)
        self.back2, self.back1 = _twice(6 * width, 2 * width), _twice(3 * width, width)
        self.head = nn.Conv2d(width, 11, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        b = self.two(F.max_pool2d(a, 2))
        c = self.deep(F.max_pool2d(b, 2))
        b = self.back2(torch.cat([b, F.interpolate(c, b.shape[2:])], 1))
        return self.head(self.back1(torch.cat([a, F.interpolate(b, a.shape[2:])], 1)))


@dataclass(frozen=True)
class Arch:
    """An architecture, its data, and how it is trained: AdamW under a one-cycle schedule."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Split, Scale] | None] = digits
    task: Task = field(default_factory=Task)
    batch: int = 32
    epochs: int = 5
    lr: float = 3e-3

    @property
    def split(self) -> Split:
        """Inputs and targets to train and to test on."""
        found = self.data()
        assert found is not None, "this net's data is not installed: see usable()"
        return found[0]

    @property
    def scale(self) -> Scale:
        """What its inputs were standardised by."""
        found = self.data()
        assert found is not None, "this net's data is not installed: see usable()"
        return found[1]

    @property
    def siamese(self) -> bool:
        """Whether its batches are triplets."""
        return isinstance(self.task, Triplets)

    @property
    def spatial(self) -> bool:
        """Whether it takes inputs of any size."""
        return self.name not in FIXED_SIZE

    def score(self, model: nn.Module, **how: Any) -> float:
        """How well a model does on unseen data, from 0 to 1."""
        return self.task.score(model, self.split, **how)


FIXED_SIZE = ("mlp", "siamese")

ARCHS: dict[str, Arch] = {
    a.name: a
    for a in (
        Arch("mlp", small_nets.mlp, epochs=6),
        Arch("cnn", small_nets.cnn_with_head, data=mnist, batch=64, epochs=4),
        Arch("resnet", partial(small_nets.resnet, 12), data=mnist, batch=64, epochs=3),
        Arch("mobile", mobile, epochs=6),
        Arch("densenet", small_nets.densenet, epochs=6),
        Arch("sequence", Sequence, data=strokes, epochs=5),
        Arch("siamese", small_nets.encoder, task=Triplets(), batch=64, epochs=10),
        Arch("unet", UNet, data=scenes, task=Segment(), epochs=5),
    )
}
"""Chosen before any result was there: half A is every other one from the first on, half B are the others."""
HALVES = {name: "AB"[number % 2] for number, name in enumerate(ARCHS)}


def usable() -> list[str]:
    """The architectures whose data is installed."""
    return [name for name, arch in ARCHS.items() if arch.data() is not None]


def triplets(x: Tensor, y: Tensor, other: Callable[[Tensor], Tensor]) -> Dataset[Any]:
    """Anchor, positive and negative, the last two by way of ``other``."""
    return small_nets.Triplets(x, y, lambda t: other(t[None])[0])


def dataset(arch: Arch, x: Tensor | None = None, y: Tensor | None = None) -> Dataset[Any]:
    """What a loader of ``arch`` goes through, on its training data or on other."""
    x, y = (arch.split[0] if x is None else x), (arch.split[1] if y is None else y)
    return triplets(x, y, arch.task.other) if isinstance(arch.task, Triplets) else TensorDataset(x, y)


def loader(arch: Arch, data: Dataset[Any] | None = None, *, batch: int = 0, seed: int = 0, **how: Any) -> Any:
    """Shuffled batches of the usual size, the tail left out; ``how`` goes to torch's DataLoader."""
    rng = torch.Generator().manual_seed(seed)
    if not {"sampler", "batch_sampler"} & set(how):
        how = {"shuffle": True, "generator": rng, **how}
    if "batch_sampler" not in how:
        how = {"batch_size": batch or arch.batch, "drop_last": True, **how}
    return DataLoader(dataset(arch) if data is None else data, **how)


def fit(
    arch: Arch,
    model: nn.Module,
    batches: Any,
    *,
    steps: int | None = None,
    lr: float | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    after: After | None = None,
    every: int = 1,
    frozen: Iterable[nn.Parameter] = (),
) -> nn.Module:
    """Train ``model`` on a loader for so many optimizer steps (default: as many epochs as usual); in evaluation mode
    then.

    ``every``: backward passes a step. ``after`` is called with the model and the step's number. ``frozen`` are not
    trained.
    """
    held = {id(p) for p in frozen}
    count = arch.epochs * len(batches) // every if steps is None else steps
    optimizer = torch.optim.AdamW([p for p in model.parameters() if id(p) not in held], lr or arch.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * (lr or arch.lr), total_steps=count + 1)
    loss = arch.task.loss if loss is None else loss
    model.train()
    stream = _again(batches)
    for number in range(count):
        optimizer.zero_grad()
        for batch in islice(stream, every):
            (loss(model, batch) / every).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if after is not None:
            after(model, number)
    return model.eval()


def _again(batches: Any) -> Any:
    while True:
        yield from batches
