"""What a fault is, and the list of them. A new one is a function with ``@fault`` in one of the modules beside this.

It gets a healthy net and a dose, and gives what an engineer would have at hand then: the model, the loader, and what
else is natural for that fault; or None where the fault makes no sense with that net.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.recall.healthy import Healthy, norms
from benchmarks.recall.nets import Arch, dataset, loader
from benchmarks.recall.tasks import View
from torch import Tensor, nn

from bnfix.types import Diagnosis

DOSES = ("weak", "medium", "strong")


@dataclass(frozen=True)
class Case:
    """A net with a fault in it, and how well it does in evaluation mode.

    ``base`` is what it would do without the fault; None: what healthy nets do on average. ``how`` goes to ``check``,
    ``watched`` is what ``watch`` said of the loop.
    """

    model: Any
    score: float
    base: float | None = None
    data: Any = None
    how: Mapping[str, Any] = field(default_factory=dict)
    watched: Diagnosis | None = None


Make = Callable[[Healthy, Any], "Case | None"]


@dataclass(frozen=True)
class Fault:
    """``codes`` are those that say it, the one it is listed under first; ``doses`` from weak to strong."""

    name: str
    codes: tuple[str, ...]
    doses: tuple[Any, ...]
    make: Make

    def case(self, net: Healthy, dose: int) -> Case | None:
        """The net with the fault; reproducible."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 + net.seed)
            return self.make(net, self.doses[dose])


FAULTS: dict[str, Fault] = {}


def fault(name: str, *codes: str, doses: Sequence[Any]) -> Callable[[Make], Make]:
    """Put a function on the list."""

    def known(make: Make) -> Make:
        assert name not in FAULTS
        assert len(doses) == len(DOSES)
        FAULTS[name] = Fault(name, codes, tuple(doses), make)
        return make

    return known


def natural(arch: Arch) -> dict[str, Any]:
    """What ``check`` is told of each net of this architecture."""
    return {} if arch.task.forward is None else {"forward": arch.task.forward}


def stored(net: Healthy, model: nn.Module, *, batch: int | None = None, **how: Any) -> Case:
    """A net that was changed after its training: to be compared with itself, on its training loader."""
    score = net.arch.score(model, batch=batch)
    return Case(model, score, net.score, loader(net.arch), {**natural(net.arch), **how})


def seen_as(net: Healthy, view: View) -> Case:
    """A net as it is, with inputs that come in another way than in its training."""
    x, y = net.arch.split[:2]
    model = net.model()
    data = loader(net.arch, dataset(net.arch, view(x), y))
    return Case(model, net.arch.score(model, view=view), net.score, data, natural(net.arch))


def some(found: Sequence[Any], share: float) -> list[Any]:
    """This share of them, evenly spread; for 0 the one in the middle."""
    if share == 0:
        return [found[len(found) // 2]]
    count = max(1, round(share * len(found)))
    return [found[i * len(found) // count] for i in range(count)]


def feeders(model: nn.Module, example: Tensor) -> list[tuple[Any, Any]]:
    """The norms of a model with the convolution or linear layer whose output comes into each directly."""
    made: dict[int, nn.Module] = {}
    kept: list[Tensor] = []
    found: list[tuple[Any, Any]] = []

    def give(module: nn.Module, _args: Any, output: Tensor) -> None:
        made[id(output)] = module
        kept.append(output)

    def take(module: nn.Module, args: Any) -> None:
        if id(args[0]) in made:
            found.append((made[id(args[0])], module))

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))]
    handles = [m.register_forward_hook(give) for m in layers]
    handles += [m.register_forward_pre_hook(take) for m in norms(model)]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    return found
