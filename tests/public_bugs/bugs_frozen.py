"""Public bugs about norms that were to be frozen, and were not."""

from __future__ import annotations

import torch
from loop.loop_nets import conv_net, images, loader, sgd, step, train
from public_bugs.bug import bug
from torch import Tensor, nn

import bnfix
from bnfix.types import Diagnosis


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def pretrained(out: int = 4) -> nn.Sequential:
    """A network that was trained elsewhere."""
    model = conv_net(out)
    train(model, sgd(model), 40)
    return model


class Classifier(nn.Module):
    """A pretrained backbone and a new head; ``keeps`` says whether the backbone stays in evaluation mode."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.backbone, self.head, self.keeps = pretrained(), nn.Linear(4, 3), keeps
        self.backbone.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        if self.keeps:
            self.backbone.eval()
        return self


@bug("BN403", "Lightning-AI/pytorch-lightning#2551")
def eval_of_a_frozen_backbone_is_undone_after_validation(fixed: bool) -> Diagnosis:
    """The evaluation loop ends with ``model.train()``, whatever had been in evaluation mode before."""
    model = Classifier(keeps=fixed)
    optimizer = sgd(model.head)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(3):
            train(model, optimizer, 4)
            model.eval()
            with torch.no_grad():
                for x in loader(2):
                    model(x)
            model.train()
    return w.report()


@bug("BN403", "pytorch/pytorch#86590")
def requires_grad_false_does_not_freeze_statistics(fixed: bool) -> Diagnosis:
    """Parameters are frozen once; each epoch says ``model.train()``."""
    model = nn.Sequential(pretrained(), nn.Linear(4, 3))
    for p in model[0].parameters():
        p.requires_grad = False
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(3):
            model.train()
            if fixed:
                model[0].eval()
            train(model, optimizer, 4)
    return w.report()


@bug("BN403", "vrvlive/knowlege-distillation#2")
def teacher_of_a_distillation_is_left_in_training_mode(fixed: bool) -> Diagnosis:
    """Under no_grad, so nobody thought of it: the teacher's statistics follow the student's data."""
    both = nn.ModuleDict({"teacher": pretrained(), "student": conv_net()})
    with torch.no_grad():  # the student begins elsewhere
        for p in both["student"].parameters():
            p.add_(0.1 * torch.randn_like(p))
    optimizer = sgd(both["student"])
    with bnfix.watch(both, optimizer) as w:
        both.train()
        if fixed:
            both["teacher"].eval()
        for _ in range(8):
            x = images()
            with torch.no_grad():
                target = both["teacher"](x)
            step(optimizer, both["student"](x) - target)
    return w.report()


class FeatureLoss(nn.Module):
    """Distance in the features of a network that is trained already."""

    def __init__(self) -> None:
        super().__init__()
        self.net = pretrained()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.net(a) - self.net(b)).square().mean()


class AutoEncoder(nn.Module):
    """Trained by the loss above, which sits inside it, as a training library wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
        self.loss = FeatureLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.net(x), x)


@bug("BN403", "Lightning-AI/pytorch-lightning#2824")
def train_reaches_the_network_inside_a_loss(fixed: bool) -> Diagnosis:
    """No optimizer holds the loss network's parameters, but they ask for gradients, and it runs in training mode."""
    model = AutoEncoder()
    optimizer = sgd(model.net)
    with bnfix.watch(model, optimizer) as w:
        model.train()
        if fixed:
            model.loss.eval()
        for _ in range(8):
            optimizer.zero_grad()
            model(images()).backward()
            optimizer.step()
    return w.report()


@bug("BN105", "Lightning-AI/pytorch-lightning#15063")
def freezing_by_the_flag(fixed: bool) -> Diagnosis:
    """``freeze(train_bn=False)`` sets ``track_running_stats = False`` on norms that have statistics."""
    model = pretrained()
    for norm in norms_of(model):
        norm.requires_grad_(False)
        if fixed:
            norm.eval()
        else:
            norm.track_running_stats = False
    return bnfix.check(model, images())
