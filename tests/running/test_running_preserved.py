"""A model that is run leaves as it came, whatever its forward does to it."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from bnfix.running import preserved


class ActNorm(nn.Module):
    """Sets itself up by its first batch, in any mode, as layers of normalizing flows do."""

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.shift, self.scale = nn.Parameter(torch.zeros(1, 3, 1, 1)), nn.Parameter(torch.ones(1, 3, 1, 1))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
            if self.replaces:
                self.shift.data, self.scale.data = -mean, 1 / std
            else:
                self.shift.data.copy_(-mean)
                self.scale.data.copy_(1 / std)
            self.ready.fill_(True)
        return (x + self.shift) * self.scale


@pytest.mark.parametrize("replaces", [True, False])
def test_a_layer_that_sets_itself_up_by_its_first_batch(replaces: bool) -> None:
    model = nn.Sequential(ActNorm(replaces), nn.BatchNorm2d(3)).eval()
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with preserved(model):
        model(torch.randn(8, 3, 5, 5) * 3 + 1)
        assert model[0].ready
        assert not torch.equal(model[0].scale, before["0.scale"][2])  # it does write
    for name, p in model.named_parameters():
        kept, memory, value = before[name]
        assert p is kept
        assert p.data_ptr() == memory
        assert torch.equal(p, value)
    assert not model[0].ready


def test_modes_of_scripted_parts() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), nn.BatchNorm2d(4))
    model[0].eval()
    modes = [m.training for m in model.modules()]
    assert len(set(modes)) == 2
    values = [b.clone() for b in model.buffers()]
    with preserved(model):
        model.train()
        model(torch.randn(4, 3, 5, 5))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(values, model.buffers(), strict=True))


@pytest.mark.parametrize("hit", ["_changed", "_set_rng_state"])
def test_an_interrupt_in_the_midst_of_putting_back(monkeypatch: pytest.MonkeyPatch, hit: str) -> None:
    """A second Ctrl-C, or the signal of a loader whose worker was killed: it left a part as the forward had made it."""
    module = sys.modules["bnfix.running.preserved"]
    does = getattr(module, hit)
    times = 0

    def interrupted(*args: object) -> object:
        nonlocal times
        times += 1
        if times == 1:
            raise KeyboardInterrupt
        return does(*args)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    values = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    monkeypatch.setattr(module, hit, interrupted)

    def run() -> None:
        with preserved(model):
            model.train()
            model[1].added = torch.randn(3)
            model(torch.randn(4, 3, 5, 5))

    with pytest.raises(KeyboardInterrupt):
        run()
    assert times > 1
    assert not any(m.training for m in model.modules())
    assert not hasattr(model[1], "added")
    assert all(torch.equal(a, b) for a, b in zip(values, model.buffers(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
