"""What two processes do; each function runs in both, gloo between them, and returns its log and its report."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from loop_nets import conv_net, images, loader, sgd, step
from torch import nn
from torch.nn.parallel import DistributedDataParallel

Seen = tuple[Any, Any]


def wrapped(**how: Any) -> DistributedDataParallel:
    model = DistributedDataParallel(conv_net(), **how)
    torch.manual_seed(dist.get_rank())
    return model


def one_forward(watch: Any) -> Seen:
    model = wrapped()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(20):
            step(optimizer, model(images(64)))
    return w.log, w.report()


def two_forwards(watch: Any) -> Seen:
    """Under one backward pass, of batches that differ."""
    model = wrapped()
    optimizer = sgd(model)
    w = watch(model, optimizer)
    with contextlib.suppress(RuntimeError), w:  # torch 2.7 fails in the first backward pass
        for _ in range(20):
            step(optimizer, model(images(64)), model(images(64, shift=3.0)))
    return w.log, w.report()


def two_forwards_and_an_end(watch: Any) -> Seen:
    """The backward pass over both fails, as it does in torch 2.7."""
    model = wrapped()
    w = watch(model, sgd(model))
    with contextlib.suppress(RuntimeError), w:
        model(images(64))
        model(images(64))
        raise RuntimeError("one of the variables needed for gradient computation has been modified")
    return w.log, w.report()


def two_forwards_no_broadcast(watch: Any) -> Seen:
    model = wrapped(broadcast_buffers=False)
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(6):
            step(optimizer, model(images(64)), model(images(64)))
    return w.log, w.report()


def accumulated(watch: Any) -> Seen:
    """Each forward with a backward pass of its own, all but the last inside no_sync()."""
    model = wrapped()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(6):
            optimizer.zero_grad()
            for i, x in enumerate(loader(3, 64)):
                with contextlib.nullcontext() if i == 2 else model.no_sync():
                    model(x).square().mean().backward()
            optimizer.step()
    return w.log, w.report()


def different_shards(watch: Any) -> Seen:
    """Broadcasting hides it from the buffers; what each rank is fed tells."""
    model = wrapped()
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(20):
            step(optimizer, model(images(64, shift=2.0 * dist.get_rank())))
    return w.log, w.report()


def unwrapped_given(watch: Any) -> Seen:
    model = wrapped()
    optimizer = sgd(model)
    w = watch(model.module, optimizer)
    with contextlib.suppress(RuntimeError), w:  # torch 2.7 fails in the first backward pass
        for _ in range(6):
            step(optimizer, model(images(64)), model(images(64)))
    return w.log, w.report()


def uneven(watch: Any) -> Seen:
    """One rank stops early by an exception; the other must not wait for it."""
    model = conv_net()
    optimizer = sgd(model)
    w = watch(model, optimizer)
    with contextlib.suppress(RuntimeError), w:
        for i in range(24):
            step(optimizer, model(images(64)))
            if dist.get_rank() == 1 and i == 18:
                raise RuntimeError("this rank is gone")
    return w.log, w.report()


def never_comes(watch: Any) -> Seen:
    """Only rank 0 watches at all."""
    model = conv_net()
    optimizer = sgd(model)
    if dist.get_rank() == 1:
        return None, None
    with watch(model, optimizer) as w:
        for _ in range(6):
            step(optimizer, model(images(64)))
    return w.log, w.report()


def small_batches(watch: Any) -> Seen:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    optimizer = sgd(model)
    with watch(model, optimizer) as w:
        for _ in range(4):
            step(optimizer, model(torch.randn(4, 8)))
    return w.log, w.report()
