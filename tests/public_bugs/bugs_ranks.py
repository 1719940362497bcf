"""Public bugs that take several processes: two ranks in one gloo group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from loop.loop_nets import conv_net, images, sgd, step
from public_bugs.bug import bug
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnfix.rules.loop_cases import on_ranks
from bnfix.types import Diagnosis


def _discriminator(watch: Any, joint: bool) -> Diagnosis:
    model = DistributedDataParallel(conv_net(1))
    optimizer = sgd(model)
    torch.manual_seed(dist.get_rank())
    with watch(model, optimizer) as w:
        for _ in range(8):
            real, fake = images(64), images(64)
            step(optimizer, *(model(torch.cat([real, fake])).chunk(2) if joint else (model(real), model(fake))))
    return w.report()


def discriminator(watch: Any) -> Diagnosis:
    return _discriminator(watch, joint=False)


def joint_discriminator(watch: Any) -> Diagnosis:
    return _discriminator(watch, joint=True)


@bug("BN409", "pytorch/pytorch#175024")
def two_forwards_of_a_wrapped_discriminator(fixed: bool) -> Diagnosis:
    """Real and generated images, one backward pass: buffers are written over in between."""
    return on_ranks(joint_discriminator if fixed else discriminator)[0]


def _segmentation(watch: Any, norm: nn.Module) -> Diagnosis:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), norm)
    model = DistributedDataParallel(nn.Sequential(body, nn.ReLU(), nn.Conv2d(8, 4, 1)))
    optimizer = sgd(model)
    torch.manual_seed(dist.get_rank())
    with watch(model, optimizer) as w:
        for _ in range(8):
            step(optimizer, model(images(4)))
    return w.report()


def batch_norm(watch: Any) -> Diagnosis:
    return _segmentation(watch, nn.BatchNorm2d(8))


def group_norm(watch: Any) -> Diagnosis:
    return _segmentation(watch, nn.GroupNorm(4, 8))


@bug("BN408", "pytorch/pytorch#2584")
def few_images_on_each_rank(fixed: bool) -> Diagnosis:
    """Segmentation: few images fit on a device, and each rank normalises by itself. Without SyncBN: a group norm."""
    return on_ranks(group_norm if fixed else batch_norm)[0]


def _shards(watch: Any, shuffled: bool) -> Diagnosis:
    model = DistributedDataParallel(conv_net(), broadcast_buffers=False)  # as apex's wrapper is by default
    optimizer = sgd(model)
    torch.manual_seed(dist.get_rank())
    with watch(model, optimizer) as w:
        for _ in range(20):
            step(optimizer, model(images(64, shift=0.0 if shuffled else 2.0 * dist.get_rank())))
    return w.report()


def cut_shards(watch: Any) -> Diagnosis:
    return _shards(watch, shuffled=False)


def shuffled_shards(watch: Any) -> Diagnosis:
    return _shards(watch, shuffled=True)


@bug("BN407", "huggingface/pytorch-image-models#110")
def statistics_of_each_rank_are_its_own(fixed: bool) -> Diagnosis:
    """Without ``--dist-bn`` each rank evaluates with what its shard taught it, and rank 0 is saved."""
    return on_ranks(shuffled_shards if fixed else cut_shards)[0]
