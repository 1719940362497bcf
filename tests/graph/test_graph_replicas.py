"""Two forwards of one model at a time, each on its own replica: neither sees what the other keeps."""

from __future__ import annotations

import copy
import gc

import hooked  # noqa: F401  # adds to STYLES
import pytest
import torch
from interleaving import alone, interleaved, reaches
from stashes import STYLES
from torch import nn

from bnfix.graph import replicator

X, Y = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8), torch.linspace(2, -3, 192).reshape(1, 3, 8, 8).sin()


class Cut:
    """What can be seen of a model from outside: objects, order of names, flags."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = self._look()

    def _look(self) -> list[object]:
        seen: list[object] = []
        for module in self.model.modules():
            seen += [id(module), module.training, *((k, id(v)) for k, v in vars(module).items() if k != "training")]
            for table in (module._parameters, module._buffers, module._modules, module._forward_hooks):
                seen += [(k, id(v)) for k, v in table.items()]
        return seen

    def same(self) -> bool:
        return self._look() == self.seen


def tensors(model: nn.Module) -> list[tuple[str, int]]:
    parameters = model.named_parameters(remove_duplicate=False)
    return [(n, id(t)) for n, t in (*parameters, *model.named_buffers(remove_duplicate=False))]


@pytest.mark.parametrize("style", sorted(STYLES))
def test_interleaved_forwards_do_not_see_each_others_values(style: str) -> None:
    model = STYLES[style]()
    x, y = alone(model, X), alone(model, Y)
    replicate = replicator(model)
    assert replicate.shared == ()
    cut = Cut(model)
    for _ in range(2):
        found, other = interleaved(replicate(), replicate(), X, Y)
        assert torch.equal(found, x)
        assert torch.equal(other, y)
    assert cut.same()
    gc.collect()  # ends of replicas take nothing of the model with them
    assert torch.equal(alone(model, X), x)


@pytest.mark.parametrize("style", sorted(set(STYLES) - {"HeldLock"}))
def test_on_one_model_they_do_see_them(style: str) -> None:
    """The control of the test above."""
    model = STYLES[style]()
    x = alone(model, X)
    try:
        found, _ = interleaved(model, model, X, Y)
    except (IndexError, KeyError, ValueError):  # taken away by the other
        return
    assert not torch.equal(found, x)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_a_forward_of_a_replica_leaves_the_model_untouched(style: str) -> None:
    model = STYLES[style]()
    model.bn.train()
    expected = alone(STYLES[style]().eval(), X).shape
    cut, names = Cut(model), tensors(model)
    replica = replicator(model)()
    assert alone(replica, X).shape == expected
    assert type(replica) is type(model)
    assert tensors(replica) == names
    assert not any(m.training for m in replica.modules())
    assert not {id(m) for m in replica.modules()} & {id(m) for m in model.modules()}
    assert reaches(replica, model.modules()) == []
    assert reaches(copy.copy(model), model.modules()) != []
    assert cut.same()
    assert model.bn.training
