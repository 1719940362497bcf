"""Self-supervised and semi-supervised training: teachers in training mode, views, crops. Odd to a guard, and meant."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from loop.loop_nets import conv_net, images, loader, sgd, step
from oddities.oddity import oddity
from torch import Tensor, nn

import bnfix
from bnfix.types import Diagnosis


def _with_momentum_copy() -> nn.ModuleDict:
    query = conv_net(8)
    both = nn.ModuleDict({"query": query, "key": copy.deepcopy(query)})
    both["key"].requires_grad_(False)
    return both


def _follow(both: nn.ModuleDict, rate: float = 0.01) -> None:
    with torch.no_grad():
        for q, k in zip(both["query"].parameters(), both["key"].parameters(), strict=True):
            k.lerp_(q, rate)


def view(x: Tensor, strength: float = 1.0) -> Tensor:
    """Contrast and brightness of each image anew."""
    n = len(x)
    return x * (1 + strength * (torch.rand(n, 1, 1, 1) - 0.5)) + 0.5 * strength * torch.randn(n, 1, 1, 1)


@oddity
def moco_with_a_momentum_encoder_in_training_mode() -> Diagnosis:
    """Keys come from an average of the encoder, in training mode under no_grad."""
    both, queue = _with_momentum_copy(), torch.randn(64, 8)
    optimizer = sgd(both["query"])
    with bnfix.watch(both, optimizer) as w:
        for _ in range(20):
            x = images()
            q = F.normalize(both["query"](view(x)))
            with torch.no_grad():
                _follow(both)
                k = F.normalize(both["key"](view(x)))
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ F.normalize(queue).T], 1) / 0.2
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.zeros(32, dtype=torch.long)).backward()
            optimizer.step()
            queue = torch.cat([k, queue])[:64]
    return w.report()


@oddity
def byol_with_two_kinds_of_augmentation() -> Diagnosis:
    """Both views go through the online network, each by itself; the second is solarised."""
    both = _with_momentum_copy()
    optimizer = sgd(both["query"])
    with bnfix.watch(both, optimizer) as w:
        for _ in range(20):
            x = images()
            one, other = view(x), view(x).abs() * 0.7
            with torch.no_grad():
                t1, t2 = both["key"](one), both["key"](other)
            step(optimizer, both["query"](one) - t2, both["query"](other) - t1)
            _follow(both)
    return w.report()


@oddity
def mean_teacher_that_is_evaluated() -> Diagnosis:
    both = _with_momentum_copy()
    optimizer = sgd(both["query"])
    with bnfix.watch(both, optimizer) as w:
        for _ in range(3):
            both.train()
            for x in loader(6):
                with torch.no_grad():
                    target = both["key"](view(x))
                step(optimizer, both["query"](view(x)) - target)
                _follow(both)
            both.eval()
            with torch.no_grad():
                for x in loader(2):
                    both["key"](x)
    return w.report()


@oddity
def dino_with_crops_of_two_sizes() -> Diagnosis:
    """The student sees large and small crops in forwards of their own, the teacher the large ones."""
    both = _with_momentum_copy()
    optimizer = sgd(both["query"])
    with bnfix.watch(both, optimizer) as w:
        for _ in range(20):
            x = images()
            small = F.interpolate(view(x)[..., 2:6, 2:6], size=6, mode="bilinear")
            with torch.no_grad():
                target = both["key"](view(x))
            step(optimizer, both["query"](view(x)) - target, both["query"](small) - target)
            _follow(both)
    return w.report()


@oddity
def swav_with_crops_of_two_sizes() -> Diagnosis:
    """The same without a teacher: resolutions are grouped, and each group is forwarded by itself."""
    model = conv_net(8)
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(20):
            x = images()
            small = F.interpolate(view(x)[..., 1:7, 1:7], size=6, mode="bilinear")
            large = model(torch.cat([view(x), view(x)]))
            step(optimizer, large[:32] - large[32:].detach(), model(small) - large[:32].detach())
    return w.report()


@oddity
def simsiam_with_a_stopped_gradient() -> Diagnosis:
    net = nn.Sequential(conv_net(8), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False))
    predictor = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 8))
    model = nn.Sequential(net, predictor)
    optimizer = sgd(model)
    with bnfix.watch(model, optimizer) as w:
        for _ in range(20):
            x = images()
            z1, z2 = net(view(x)), net(view(x))
            loss = F.cosine_similarity(predictor(z1), z2.detach()) + F.cosine_similarity(predictor(z2), z1.detach())
            optimizer.zero_grad()
            loss.mean().neg().backward()
            optimizer.step()
    return w.report()
