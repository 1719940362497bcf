"""Public bugs that a model alone shows: its settings, its stored values, its graph."""

from __future__ import annotations

import copy

import torch
from loop.loop_nets import conv_net, images, sgd, step, train
from public_bugs.bug import bug
from public_bugs.bugs_frozen import norms_of, pretrained
from torch import Tensor, nn

import bnfix
from bnfix.types import Diagnosis


def _long_trained(**norm: float | bool) -> nn.Sequential:
    """Trained for so many steps that statistics have settled; norms with these options."""
    model = conv_net()
    for i, old in enumerate(model):
        if isinstance(old, nn.modules.batchnorm._BatchNorm):
            model[i] = type(old)(8, **norm)  # type: ignore[arg-type]
    train(model, sgd(model), 40)
    return model


@bug("BN106", "kazuto1011/deeplab-pytorch#79")
def momentum_of_another_convention(fixed: bool) -> Diagnosis:
    """Caffe's .999 is torch's .001."""
    model = pretrained()
    for norm in norms_of(model):
        norm.momentum = 0.001 if fixed else 0.999
    return bnfix.check(model, images())


@bug("BN106", "eriklindernoren/PyTorch-YOLOv3#230")
def momentum_that_keeps_a_tenth(fixed: bool) -> Diagnosis:
    """Darknet's .9, in a detector written for torch."""
    return bnfix.check(_long_trained(momentum=0.1 if fixed else 0.9), images())


@bug("BN106", "Cadene/pretrained-models.pytorch#5")
def momentum_zero_in_a_model_that_is_fine_tuned(fixed: bool) -> Diagnosis:
    """Inception was ported with momentum=0: fine for inference, and fine-tuning never moves the statistics."""
    model = pretrained()
    for norm in norms_of(model):
        norm.eps, norm.momentum = 0.001, 0.1 if fixed else 0.0
    train(model.train(), sgd(model), 4)
    return bnfix.check(model, images())


@bug("BN104", "xu-ji/IIC#49")
def no_statistics_so_that_results_depend_on_the_batch(fixed: bool) -> Diagnosis:
    """``batchnorm_track=False``: test batches have to look like training batches."""
    return bnfix.check(_long_trained(track_running_stats=fixed).eval(), images())


@bug("BN109", "luigibonati/mlcolvar#205")
def dropout_in_front_of_the_norm(fixed: bool) -> Diagnosis:
    """A feed-forward block in the order linear, activation, dropout, norm."""

    def block(inp: int, out: int) -> nn.Sequential:
        dropout, norm = nn.Dropout(0.3), nn.BatchNorm1d(out)
        return nn.Sequential(nn.Linear(inp, out), nn.ReLU(), *((norm, dropout) if fixed else (dropout, norm)))

    model = nn.Sequential(block(8, 16), block(16, 16), nn.Linear(16, 2))
    optimizer = sgd(model)
    for _ in range(40):
        step(optimizer, model(torch.randn(64, 8)))
    return bnfix.check(model.eval(), torch.randn(64, 8))


class Segmenter(nn.Module):
    """Unsupervised segmentation: ``self.bn0`` behind each of the inner convolutions, or a norm for each."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.bn0 = nn.BatchNorm2d(8)
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2 if own else 0))
        self.last, self.bn1 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.first(x).relu())
        for i, conv in enumerate(self.convs):
            x = (self.bns[i] if self.own else self.bn0)(conv(x).relu())
        return self.bn1(self.last(x))


@bug("BN102", "kanezaki/pytorch-unsupervised-segmentation#1")
def one_norm_behind_each_of_several_layers(fixed: bool) -> Diagnosis:
    model = Segmenter(own=fixed)
    train(model, sgd(model), 40)
    return bnfix.check(model.eval(), images())


@bug("BN107", "NVIDIA/apex#144")
def network_to_half_with_its_norms(fixed: bool) -> Diagnosis:
    """Statistics that are gathered in 16 bits lose small updates; ``FP16Model`` leaves norms as they are."""
    model = _long_trained().half()
    if fixed:
        for norm in norms_of(model):
            norm.float()
    return bnfix.check(model, images().half())


@bug("BN208", "gzuidhof/nn-transfer#3")
def weights_of_keras_with_the_eps_of_torch(fixed: bool) -> Diagnosis:
    """Keras divides by √(v + .001). In a network with small variances that makes a difference in each layer."""
    keras = _long_trained(eps=1e-3)
    with torch.no_grad():
        keras[0].weight.mul_(0.01)  # activations of a size that makes the two differ
    train(keras, torch.optim.SGD(keras.parameters(), 0.0), 60)
    moved = copy.deepcopy(keras)
    for norm in norms_of(moved) if not fixed else []:
        norm.eps = 1e-5
    return bnfix.check(moved.eval(), against=keras.eval())


def _ema(model: nn.Sequential, steps: int, buffers: bool) -> nn.Sequential:
    """Trains ``model`` and returns the average of its weights, as ``update_ema_variables`` makes it."""
    ema = copy.deepcopy(model)
    optimizer = sgd(model)
    for number in range(steps):
        step(optimizer, model(images()))
        alpha = min(1 - 1 / (number + 1), 0.9)
        with torch.no_grad():
            for mean, p in zip(ema.parameters(), model.parameters(), strict=True):
                mean.mul_(alpha).add_(p, alpha=1 - alpha)
            for kept, b in zip(ema.buffers(), model.buffers(), strict=True):
                if buffers:
                    kept.copy_(b)
    return ema


@bug("BN202", "CuriousAI/mean-teacher#9")
def average_of_the_parameters_alone(fixed: bool) -> Diagnosis:
    """``zip(ema.parameters(), model.parameters())`` leaves the statistics at 0 and 1."""
    model = conv_net()
    ema = _ema(model, 40, buffers=fixed)
    return bnfix.check(ema.eval(), images(), against=model)


@bug("BN202", "DLR-RM/stable-baselines3#996")
def target_network_without_statistics(fixed: bool) -> Diagnosis:
    """Polyak averaging goes over parameters; in evaluation mode the target never learns statistics of its own."""
    q_net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    target = copy.deepcopy(q_net).eval()
    optimizer = sgd(q_net)
    for _ in range(40):
        step(optimizer, q_net(torch.randn(64, 8)) - target(torch.randn(64, 8)).detach())
        with torch.no_grad():
            for slow, p in zip(target.parameters(), q_net.parameters(), strict=True):
                slow.lerp_(p, 0.05)
            if fixed:
                for kept, b in zip(target.buffers(), q_net.buffers(), strict=True):
                    kept.copy_(b)
    return bnfix.check(target.state_dict(), against=q_net.state_dict())


@bug("BN201", "pytorch/pytorch#88474")
def overflow_under_autocast(fixed: bool) -> Diagnosis:
    """The scaler skips the step whose gradients are NaN; the statistics have taken the batch in already."""
    model = conv_net()
    optimizer = sgd(model)
    for number in range(40):
        x = images() * (1e5 if number == 20 and not fixed else 1.0)
        y = model[0](x)
        y = y.half().float()  # what comes out of a convolution under autocast
        loss = model[1:](y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if all(torch.isfinite(p.grad).all() for p in model.parameters()):
            optimizer.step()
    return bnfix.check(model.eval(), images())
