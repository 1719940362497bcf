"""Faults of a training loop, which ``watch`` looks at: a healthy net is trained on for some steps."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.recall.faults import Case, fault, natural
from benchmarks.recall.healthy import Healthy, norms
from benchmarks.recall.in_values import is_stat
from benchmarks.recall.nets import Arch, dataset, loader
from benchmarks.recall.tasks import Triplets, View
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnfix

ROUNDS, STEPS = 3, 8
OTHER = (0.5, 1.5, "negative")
"""What other data looks like: brighter by so many standard deviations, at last the negative."""


def view_of(arch: Arch, what: Any) -> View:
    """Inputs as another source has them."""
    if what == "negative":
        top = (1 - 2 * arch.scale.mean) / arch.scale.std
        return lambda x: top - x
    return lambda x: x + what


def inputs(arch: Arch, batch: Any) -> list[Tensor]:
    """What the model is called with, one after the other."""
    return list(batch) if isinstance(arch.task, Triplets) else [batch[0]]


class Loop:
    """A net with an optimizer, its batches, and those of another source."""

    def __init__(self, net: Healthy, model: nn.Module, what: Any = 0.0, lr: float = 1e-4, **how: Any) -> None:
        self.net, self.arch, self.model = net, net.arch, model
        x, y = self.arch.split[:2]
        view = view_of(self.arch, what)
        self.own = iter(self._again(loader(self.arch, seed=net.seed + 1)))
        self.other = iter(self._again(loader(self.arch, dataset(self.arch, view(x), y), seed=net.seed + 2)))
        self.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, **how)
        self.watch = bnfix.watch(model, self.optimizer)

    def _again(self, batches: Any) -> Any:
        while True:
            yield from batches

    def step(self, batch: Any, loss: Any = None) -> None:
        self.optimizer.zero_grad()
        (self.arch.task.loss(self.model, batch) if loss is None else loss).backward()
        self.optimizer.step()

    def look(self, batch: Any) -> None:
        """Forwards without gradient."""
        with torch.no_grad():
            for x in inputs(self.arch, batch):
                self.model(x)

    def done(self) -> Case:
        self.model.eval()
        score = self.arch.score(self.model)
        return Case(
            self.model, score, self.net.score, loader(self.arch), natural(self.arch), watched=self.watch.report()
        )


@fault("eval() forgotten in validation", "BN402", "BN204", doses=OTHER)
def validated(net: Healthy, what: Any) -> Case:
    """On other data, after each round of training, in training mode."""
    loop = Loop(net, net.model().train(), what)
    with loop.watch:
        for _ in range(ROUNDS):
            for _ in range(STEPS):
                loop.step(next(loop.own))
            for _ in range(STEPS):
                loop.look(next(loop.other))
    return loop.done()


@fault("pseudo labels in training mode", "BN402", "BN204", doses=OTHER)
def pseudo_labels(net: Healthy, what: Any) -> Case:
    """In every step a forward without gradient on other data."""
    loop = Loop(net, net.model().train(), what)
    with loop.watch:
        for _ in range(ROUNDS * STEPS):
            loop.step(next(loop.own))
            loop.look(next(loop.other))
    return loop.done()


@fault("frozen, and in training mode", "BN403", "BN204", doses=OTHER)
def frozen(net: Healthy, what: Any) -> Case:
    """A backbone with frozen weights under a new head for other data; the old head is what is judged."""
    model = net.model()
    for parameter in list(model.parameters())[:-2]:
        parameter.requires_grad = False
    kept = [p.detach().clone() for p in list(model.parameters())[-2:]]
    loop = Loop(net, model.train(), what)
    with loop.watch:
        for _ in range(ROUNDS * STEPS):
            loop.step(next(loop.other))
    with torch.no_grad():
        for parameter, value in zip(list(model.parameters())[-2:], kept, strict=True):
            parameter.copy_(value)
    return loop.done()


@fault("weights loaded without statistics", "BN406", "BN202", "BN203", "BN204", doses=(20, 5, 0))
def not_loaded(net: Healthy, steps: int) -> Case:
    """``strict=False`` with a state of parameters alone; so many steps of training after."""
    loop = Loop(net, net.arch.build().train())
    with loop.watch:
        loop.model.load_state_dict({k: v for k, v in net.snaps[-1].items() if not is_stat(k)}, strict=False)
        for _ in range(steps):
            loop.step(next(loop.own))
    return loop.done()


@fault("forwards recomputed", "BN404", "BN204", doses=(0.1, 0.3, 0.6))
def recomputed(net: Healthy, momentum: float) -> Case:
    """Activation checkpointing: each batch is taken in twice."""
    model = net.model().train()
    for norm in norms(model):
        norm.momentum = momentum
    loop = Loop(net, model)
    again = _Checkpointed(model)
    with loop.watch:
        for _ in range(ROUNDS * STEPS):
            batch = next(loop.own)
            loop.step(batch, loop.arch.task.loss(again, batch))
    return loop.done()


class _Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)
