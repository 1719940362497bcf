"""Legitimate practice that must stay silent: accumulation, closures, pseudo labels, adversaries, freezing."""

from __future__ import annotations

import pytest
import torch
from loop_nets import conv_net, images, loader, sgd, step, train, watch
from torch import Tensor, nn

from bnfix.types import Diagnosis


def test_pseudo_labels_on_the_same_data() -> None:
    """Forwards without gradient that belong to every step, on data like those of training: MixMatch, UDA, VAT."""
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(24):
            with torch.no_grad():
                target = model(images())
            step(optimizer, model(images()) - target)
    assert not w.report().findings


def test_gradcache() -> None:
    """All chunks once without gradient, then all once more with it."""
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(20):
            chunks = list(loader(4, 64))
            with torch.no_grad():
                for x in chunks:
                    model(x)
            optimizer.zero_grad()
            for x in chunks:
                model(x).square().mean().backward()
            optimizer.step()
    assert not w.report().findings


def test_a_forward_to_see_the_shapes_before_training() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        with torch.no_grad():
            model(images(2))
        train(model, optimizer, 6)
    assert not w.report().findings


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradient_accumulation(set_to_none: bool) -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(20):
            optimizer.zero_grad(set_to_none)
            for x in loader(4, 64):
                (model(x).square().mean() / 4).backward()
            optimizer.step()
    assert not w.report().findings
    pattern = w.log.norms[0].patterns[0]
    assert (len(pattern.sites), pattern.backwards) == (4, 4)


def test_lbfgs_shows_one_batch_again_and_again() -> None:
    model = conv_net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)
    with watch(model, optimizer) as w:
        for _ in range(12):
            x = images()

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
    assert not w.report().findings


def test_sam_looks_twice_at_one_batch() -> None:
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(20):
            x = images()
            model(x).square().mean().backward()
            with torch.no_grad():
                moved = [(p, 0.05 * p.grad / (p.grad.norm() + 1e-12)) for p in model.parameters() if p.grad is not None]
                for p, e in moved:
                    p.add_(e)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            with torch.no_grad():
                for p, e in moved:
                    p.sub_(e)
            optimizer.step()
            optimizer.zero_grad()
    assert not w.report().findings


def gan(whole: bool, draws: bool, critics: int = 1) -> Diagnosis:
    """A DCGAN's loop: real and generated images apart; now and then images are drawn, in training mode."""
    torch.manual_seed(0)
    g = nn.Sequential(nn.Linear(8, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 192), nn.Unflatten(1, (3, 8, 8)))
    d = conv_net(1)
    both = nn.ModuleDict({"g": g, "d": d})
    opt_g, opt_d = sgd(g), sgd(d)
    fixed = torch.randn(32, 8)
    with watch(both if whole else d, [opt_g, opt_d] if whole else opt_d) as w:
        for i in range(24):
            for _ in range(critics):
                opt_d.zero_grad()
                d(images(shift=2.0)).sub(1).square().mean().backward()
                fake = g(torch.randn(32, 8))
                d(fake.detach()).square().mean().backward()
                opt_d.step()
            opt_g.zero_grad()
            d(fake).sub(1).square().mean().backward()
            opt_g.step()
            if draws and i % 6 == 5:
                with torch.no_grad():
                    g(fixed)
    return w.report()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("critics", [1, 3])
def test_gan_gets_information_at_most(whole: bool, critics: int) -> None:
    report = gan(whole, draws=True, critics=critics)
    assert report.clean
    (found,) = report.by_code("BN401")
    assert "recommended practice" in found.message
    assert all(not s.startswith("g.") for s in found.sites)


def test_gan_with_switched_off_parameters_is_not_frozen() -> None:
    """pix2pix and Lightning switch the discriminator's parameters off while the generator learns."""
    torch.manual_seed(0)
    g, d = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    opt_g, opt_d = sgd(g), sgd(d)
    with watch(d, [opt_g, opt_d]) as w:
        for _ in range(12):
            d.requires_grad_(False)
            step(opt_g, d(g(torch.randn(32, 8))))
            d.requires_grad_(True)
            step(opt_d, d(g(torch.randn(32, 8)).detach()))
    assert w.report().clean


def test_bn_frozen_in_evaluation_mode_stays_silent() -> None:
    """The usual way to fine-tune: norms in evaluation mode after every train()."""
    model = conv_net()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(3):
            model.train()
            for m in model.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
            train(model, optimizer, 4)
    report = w.report()
    assert not report.findings
    assert w.log.steps == 12


def test_unfreezing_on_purpose() -> None:
    """Weights and statistics are frozen first and set free together."""
    model = conv_net()
    backbone = model[:6]
    backbone.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with watch(model, optimizer) as w:
        for epoch in range(3):
            model.train()
            if epoch == 0:
                backbone.eval()
            else:
                backbone.requires_grad_(True)
            train(model, optimizer, 4)
    assert not w.report().findings


def test_a_backbone_that_came_in_evaluation_mode_is_trained() -> None:
    """``torch.hub.load(...).eval()`` inside a new model: train() undoes nothing that anybody wanted."""
    backbone = conv_net().eval()
    model = nn.Sequential(backbone, nn.Linear(4, 2))
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        model.train()
        train(model, optimizer, 6)
    assert not w.report().findings
