"""Frozen by leaving it out of the optimizer: parameters ask for gradients, nobody takes them, statistics learn."""

from __future__ import annotations

import pytest
import torch
from loop_nets import bad, codes, conv_net, images, loader, sgd, step, train, watch
from torch import Tensor, nn


class Probe(nn.Module):
    """A network with a stem of its own, blocks and a head, as a ResNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.bn1(self.conv1(x)).relu()).relu().mean((2, 3)))


def probe(model: Probe, optimizer: torch.optim.Optimizer, steps: int = 8) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()


def test_linear_probe_whose_backbone_is_in_training_mode() -> None:
    model = Probe()
    optimizer = sgd(model.fc)
    with watch(model, optimizer) as w:
        probe(model.train(), optimizer)
    report = w.report()
    assert bad(report) == codes(report) == {"BN403"}
    (found,) = report.findings
    assert found.sites == ("bn1", "layer1.1")
    assert found.measured == {"updates": 8, "steps": 8}


def test_linear_probe_in_evaluation_mode() -> None:
    model = Probe().eval()
    optimizer = sgd(model.fc)
    with watch(model, optimizer) as w:
        probe(model, optimizer)
    assert not w.report().findings


def test_scale_and_shift_alone_are_left_out() -> None:
    """The layers in front are trained: statistics have to follow them."""
    model = conv_net()
    optimizer = sgd(*[m for m in model if not isinstance(m, nn.modules.batchnorm._BatchNorm)])
    with watch(model, optimizer) as w:
        train(model, optimizer, 8)
    assert not w.report().findings


@pytest.mark.parametrize("added", ["group", "optimizer"])
def test_left_out_at_first(added: str) -> None:
    """The head first, everything later: gradual unfreezing."""
    model = Probe()
    optimizer = sgd(model.fc)
    with watch(model, optimizer) as w:
        probe(model, optimizer, 6)
        assert bad(w.report()) == {"BN403"}
        rest = [p for n, p in model.named_parameters() if not n.startswith("fc")]
        if added == "group":
            optimizer.add_param_group({"params": rest})
        else:
            optimizer = sgd(model)
        probe(model, optimizer, 6)
    assert not w.report().findings


def test_master_weights_are_held_under_another_name() -> None:
    """apex, ZeRO: the optimizer holds copies, and writes them back."""
    model = conv_net()
    head = nn.Linear(4, 2)
    copies = [p.detach().clone().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.SGD([*copies, *head.parameters()], 0.05)
    with watch(nn.Sequential(model, head), optimizer) as w:
        for x in loader(8):
            optimizer.zero_grad()
            head(model(x)).square().mean().backward()
            for c, p in zip(copies, model.parameters(), strict=True):
                c.grad, p.grad = p.grad, None
            optimizer.step()
            with torch.no_grad():
                for c, p in zip(copies, model.parameters(), strict=True):
                    p.copy_(c)
    assert not w.report().findings


def test_discriminator_that_is_trained_beside_the_watch() -> None:
    """Only the generator is watched with its loss; its discriminator steps too, and is heard."""
    g, d = conv_net(8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    both = nn.ModuleDict({"g": g, "d": d})
    opt_g, opt_d = sgd(g), sgd(d)
    with watch(both, opt_g) as w:
        for _ in range(12):
            step(opt_d, d(g(images()).detach()))
            step(opt_g, d(g(images())))
    assert w.report().clean
