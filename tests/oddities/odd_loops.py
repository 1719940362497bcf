"""Ways to train that look odd to a guard of the loop, and are meant."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from loop.loop_nets import conv_net, images, loader, sgd, step, train
from oddities.odd_teachers import view
from oddities.oddity import oddity
from public_bugs.bugs_frozen import norms_of, pretrained
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import bnfix
from bnfix.types import Diagnosis


@oddity
def schedule_free_warm_up() -> Diagnosis:
    """``model.train(); optimizer.eval()``, fifty batches without gradient, then ``model.eval()`` and validation."""
    model = conv_net()
    optimizer = sgd(model, lr=0.2)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(3):
            model.train()
            train(model, optimizer, 6)
            with torch.no_grad():
                kept = [p.clone() for p in model.parameters()]
                for p in model.parameters():
                    p.mul_(0.8)
                for x in loader(6):
                    model(x)
                model.eval()
                for x in loader(2):
                    model(x)
                for p, k in zip(model.parameters(), kept, strict=True):
                    p.copy_(k)
    return w.report()


@oddity
def update_bn_behind_an_average_of_weights() -> Diagnosis:
    model = conv_net()
    optimizer, average = sgd(model), AveragedModel(model)
    both = nn.ModuleDict({"model": model, "average": average})
    with bnfix.watch(both, optimizer) as w:
        for _ in range(4):
            train(model, optimizer, 5)
            average.update_parameters(model)
            update_bn(loader(3), average)
            average.eval()
            average(images())
    return w.report()


@oddity
def adabn_in_front_of_an_evaluation() -> Diagnosis:
    model = conv_net()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(2):
            model.train()
            train(model, optimizer, 8)
            with torch.no_grad():
                for x in loader(6, shift=3.0):
                    model(x)
                model.eval()
                model(images(shift=3.0))
    return w.report()


@oddity
def gan_with_separate_batches() -> Diagnosis:
    """Real and generated images apart; while the generator learns, the discriminator's statistics move too."""
    g = nn.Sequential(nn.Linear(8, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 192), nn.Unflatten(1, (3, 8, 8)))
    d = conv_net(1)
    opt_g, opt_d = sgd(g), sgd(d)
    with bnfix.watch(nn.ModuleDict({"g": g, "d": d}), [opt_g, opt_d]) as w:
        for i in range(24):
            opt_d.zero_grad()
            d(images(shift=2.0)).sub(1).square().mean().backward()
            fake = g(torch.randn(32, 8))
            d(fake.detach()).square().mean().backward()
            opt_d.step()
            opt_g.zero_grad()
            d(fake).sub(1).square().mean().backward()
            opt_g.step()
            if i % 6 == 5:
                with torch.no_grad():
                    g(torch.randn(16, 8))
    return w.report()


@oddity
def gan_in_one_step_with_one_optimizer_each_and_a_penalty() -> Diagnosis:
    """WGAN-GP: three forwards of the critic a step, the third on what lies between; five steps to one."""
    g = nn.Sequential(nn.Linear(8, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 192), nn.Unflatten(1, (3, 8, 8)))
    d = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(288, 1))
    opt_g, opt_d = sgd(g), sgd(d)
    with bnfix.watch(nn.ModuleDict({"g": g, "d": d}), [opt_g, opt_d]) as w:
        for i in range(30):
            real, fake = images(shift=1.5), g(torch.randn(32, 8)).detach()
            between = torch.lerp(real, fake, torch.rand(32, 1, 1, 1)).requires_grad_()
            (slope,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
            loss = d(fake).mean() - d(real).mean() + 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
            opt_d.zero_grad()
            loss.backward()
            opt_d.step()
            if i % 5 == 4:
                opt_g.zero_grad()
                d(g(torch.randn(32, 8))).mean().neg().backward()
                opt_g.step()
    return w.report()


@oddity
def attack_in_training_mode() -> Diagnosis:
    """Madry's CIFAR-10 challenge: adversarial examples are made with the network as it trains."""
    model = conv_net()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(20):
            x, y = images(), torch.randint(4, (32,))
            noise = torch.zeros_like(x)
            for _ in range(3):
                noise.requires_grad_()
                (slope,) = torch.autograd.grad(F.cross_entropy(model(x + noise), y), noise)
                noise = (noise + 0.02 * slope.sign()).detach().clamp(-0.05, 0.05)
            optimizer.zero_grad()
            F.cross_entropy(model(x + noise), y).backward()
            optimizer.step()
    return w.report()


@oddity
def pseudo_labels_in_training_mode() -> Diagnosis:
    """MixMatch guesses labels under no_grad with the network as it trains, on data like the rest."""
    model = conv_net()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(24):
            x, u = images(), images()
            with torch.no_grad():
                guess = (model(view(u)).softmax(1) + model(view(u)).softmax(1)) / 2
            out = model(torch.cat([x, view(u)]))
            optimizer.zero_grad()
            loss = F.cross_entropy(out[:32], torch.randint(4, (32,)))
            (loss + (out[32:].softmax(1) - guess).square().mean()).backward()
            optimizer.step()
    return w.report()


@oddity
def fixmatch_concatenates() -> Diagnosis:
    model = conv_net()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(20):
            x, u = images(), images(96)
            out = model(torch.cat([x, view(u, 0.3), view(u, 2.0)]))
            weak = out[32:128].detach().softmax(1)
            optimizer.zero_grad()
            F.cross_entropy(out[128:], weak).add(F.cross_entropy(out[:32], torch.randint(4, (32,)))).backward()
            optimizer.step()
    return w.report()


@oddity
def sam_without_statistics_in_its_second_look() -> Diagnosis:
    """``disable_running_stats`` sets the momentum of all norms to 0, and back."""
    model = conv_net()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(20):
            x = images()
            model(x).square().mean().backward()
            with torch.no_grad():
                moved = [(p, 0.05 * p.grad / (p.grad.norm() + 1e-12)) for p in model.parameters()]
                for p, e in moved:
                    p.add_(e)
            optimizer.zero_grad()
            for norm in norms_of(model):
                norm.backup, norm.momentum = norm.momentum, 0
            model(x).square().mean().backward()
            for norm in norms_of(model):
                norm.momentum = norm.backup
            with torch.no_grad():
                for p, e in moved:
                    p.sub_(e)
            optimizer.step()
            optimizer.zero_grad()
    return w.report()


@oddity
def accumulation_over_large_batches() -> Diagnosis:
    model = conv_net()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(12):
            optimizer.zero_grad()
            for x in loader(4, 64):
                (model(x).square().mean() / 4).backward()
            optimizer.step()
    return w.report()


@oddity
def lbfgs() -> Diagnosis:
    model = conv_net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(12):
            x = images()

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
    return w.report()


@oddity
def frozen_backbone_by_the_book() -> Diagnosis:
    model = nn.Sequential(pretrained(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(3):
            model.train()
            model[0].eval()
            train(model, optimizer, 5)
            model.eval()
            model(images())
    return w.report()


@oddity
def statistics_frozen_late_in_the_training() -> Diagnosis:
    """Quantisation-aware training: the last epochs train weights with fixed statistics."""
    model = conv_net()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for epoch in range(4):
            model.train()
            if epoch >= 2:
                for norm in norms_of(model):
                    norm.eval()
            train(model, optimizer, 6)
            model.eval()
            model(images())
    return w.report()


@oddity
def layers_set_free_one_after_the_other() -> Diagnosis:
    model = pretrained()
    model[:6].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with bnfix.watch(model, optimizer) as w:
        for epoch in range(3):
            model.train()
            if epoch == 0:
                model[:6].eval()
            elif epoch == 1:
                model[:3].eval()
                model[3:6].requires_grad_(True)
            else:
                model.requires_grad_(True)
            train(model, optimizer, 5)
    return w.report()


@oddity
def advprop_with_norms_of_their_own() -> Diagnosis:
    """Clean and adversarial batches, each through its own norms."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
            self.clean, self.adversarial = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x: Tensor, adversarial: bool = False) -> Tensor:
            norm = self.adversarial if adversarial else self.clean
            return self.out(norm(self.conv(x)).relu().mean((2, 3)))

    model = Split()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(20):
            x = images()
            step(optimizer, model(x), model(x + 1.0, adversarial=True))
    return w.report()


@oddity
def maml_without_statistics() -> Diagnosis:
    """Inner steps on a copy of the weights; norms use each task's own batch."""
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, track_running_stats=False), nn.ReLU(), nn.Linear(16, 1))
    optimizer = sgd(model)
    names = [n for n, _ in model.named_parameters()]
    with bnfix.watch(model, optimizer) as w:
        for _ in range(12):
            optimizer.zero_grad()
            for _ in range(4):
                x, y = torch.randn(20, 8), torch.randn(20, 1)
                loss = (model(x) - y).square().mean()
                grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
                fast = {n: p - 0.1 * g for n, p, g in zip(names, model.parameters(), grads, strict=True)}
                (torch.func.functional_call(model, fast, (x,)) - y).square().mean().backward()
            optimizer.step()
    return w.report()


@oddity
def momentum_that_is_lowered_as_it_trains() -> Diagnosis:
    """PointNet."""
    model = conv_net()
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for epoch in range(6):
            for norm in norms_of(model):
                norm.momentum = max(0.5 * math.pow(0.7, epoch), 0.01)
            model.train()
            train(model, optimizer, 5)
            model.eval()
            model(images())
    return w.report()


@oddity
def reinforcement_learning_that_acts_in_evaluation_mode() -> Diagnosis:
    """DQN: a forward for each action, in evaluation mode, between the training steps; the target is copied."""
    q = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    both = nn.ModuleDict({"q": q, "target": copy.deepcopy(q)})
    both["target"].eval()
    optimizer = sgd(q)
    with bnfix.watch(both, optimizer) as w:
        for i in range(30):
            q.eval()
            with torch.no_grad():
                q(torch.randn(1, 8)).argmax(1)
            q.train()
            with torch.no_grad():
                target = both["target"](torch.randn(64, 8)).max(1).values
            optimizer.zero_grad()
            (q(torch.randn(64, 8)).max(1).values - target).square().mean().backward()
            optimizer.step()
            if i % 10 == 9:
                both["target"].load_state_dict(q.state_dict())
    return w.report()
