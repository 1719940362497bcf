"""Faults in what a finished model has stored: lost, mixed up, rounded, taken over from elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.recall.faults import Case, fault, feeders, some, stored
from benchmarks.recall.healthy import Healthy, State, norms
from benchmarks.recall.nets import loader
from torch import Tensor, nn

STATS = ("running_mean", "running_var", "num_batches_tracked")
LAYERS = (0, 0.5, 1)
"""The one in the middle, every other one, all."""


def is_stat(key: str) -> bool:
    """Whether an entry of a state belongs to the statistics."""
    return key.endswith(STATS)


def mixed(weights: State, statistics: State) -> State:
    """The parameters of one state with the statistics of another."""
    return {k: (statistics if is_stat(k) else weights)[k] for k in weights}


def layers_of(model: nn.Module) -> list[Any]:
    """Convolutions and linear layers, but for the last: the classifier."""
    return [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear))][:-1]


def rounded(x: Tensor, bits: int) -> Tensor:
    """Rounded to the levels of an integer with one scale for the whole tensor."""
    scale = x.abs().max().clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return (x / scale).round() * scale


# ------------------------------------------------------------------------------- lost or broken


@fault("statistics reset", "BN202", "BN204", doses=LAYERS)
def reset(net: Healthy, share: float) -> Case:
    """As new layers have them: a part of a checkpoint was not there."""
    model = net.model()
    for norm in some(norms(model), share):
        norm.reset_running_stats()
    return stored(net, model)


@fault("means lost", "BN204", doses=(0.25, 0.5, 1))
def means_lost(net: Healthy, share: float) -> Case:
    """A conversion that took over variances, and zeros for the means of a share of the channels."""
    model = net.model()
    for norm in norms(model):
        norm.running_mean[: max(1, round(share * len(norm.running_mean)))] = 0
    return stored(net, model)


@fault("NaN in statistics", "BN201", doses=(0, 0.05, 0.5))
def not_a_number(net: Healthy, share: float) -> Case:
    """One bad batch: a channel of one norm, of every norm, half of the channels."""
    model = net.model()
    for norm in norms(model) if share else some(norms(model), 0):
        count = max(1, round(share * len(norm.running_var)))
        norm.running_mean[:count] = norm.running_var[:count] = float("nan")
    return stored(net, model)


@fault("negative variances", "BN201", doses=(0, 0.05, 0.5))
def negative(net: Healthy, share: float) -> Case:
    """E[x²] − E[x]² in low precision, by a tool that merged statistics."""
    model = net.model()
    for norm in norms(model) if share else some(norms(model), 0):
        norm.running_var[: max(1, round(share * len(norm.running_var)))] = -1e-3
    return stored(net, model)


@fault("statistics of another run", "BN204", doses=LAYERS)
def of_another_run(net: Healthy, share: float) -> Case:
    """A checkpoint put together of two."""
    model = net.model()
    theirs = norms(net.other().model())
    for norm, other in some(list(zip(norms(model), theirs, strict=True)), share):
        norm.running_mean.copy_(other.running_mean)
        norm.running_var.copy_(other.running_var)
    return stored(net, model)


@fault("statistics in another channel order", "BN204", doses=LAYERS)
def permuted(net: Healthy, share: float) -> Case:
    """Channels were sorted for a kernel, and the statistics forgotten."""
    model = net.model()
    for norm in some(norms(model), share):
        norm.running_mean.copy_(norm.running_mean.flip(0).clone())
        norm.running_var.copy_(norm.running_var.flip(0).clone())
    return stored(net, model)


@fault("statistics quantised", "BN204", doses=(6, 4, 2))
def quantised_statistics(net: Healthy, bits: int) -> Case:
    """Stored in few bits, with one scale a tensor."""
    model = net.model()
    for norm in norms(model):
        norm.running_mean.copy_(rounded(norm.running_mean, bits))
        norm.running_var.copy_(rounded(norm.running_var, bits))
    return stored(net, model)


# ---------------------------------------------------------------------------- another framework


@fault("deviations for variances", "BN204", doses=LAYERS)
def deviations(net: Healthy, share: float) -> Case:
    """A framework that stores σ, read as σ²."""
    model = net.model()
    for norm in some(norms(model), share):
        norm.running_var.sqrt_()
    return stored(net, model)


@fault("scale factor not divided by", "BN204", doses=(1.5, 5, 1000))
def scale_factor(net: Healthy, factor: float) -> Case:
    """Caffe stores sums, and what to divide them by."""
    model = net.model()
    for norm in norms(model):
        norm.running_mean.mul_(factor)
        norm.running_var.mul_(factor)
    return stored(net, model)


@fault("eps of another framework", "BN208", doses=(0.1, 0.03, 0.01))
def eps_of_another(net: Healthy, size: float) -> Case | None:
    """.001 instead of .00001, beside layers whose weights are so small (weight decay) that it counts."""
    reference = net.model()
    pairs = feeders(reference, net.arch.split[0][:2])
    if not pairs:
        return None
    with torch.no_grad():
        for layer, norm in pairs:
            for tensor in (layer.weight, layer.bias):
                if tensor is not None:
                    tensor.mul_(size)
            norm.running_mean.mul_(size)
            norm.running_var.mul_(size * size)
    model = net.arch.build()
    model.load_state_dict(reference.state_dict())
    for norm in norms(model.eval()):
        norm.eps = 1e-3
    found = stored(net, model, against=reference)
    return Case(found.model, found.score, net.arch.score(reference), found.data, found.how)


# ------------------------------------------------------- weights that moved, statistics that did not


@fault("affine lost", "BN204", doses=LAYERS)
def affine_lost(net: Healthy, share: float) -> Case:
    """Scale and shift under names that a loader did not know (gamma, beta)."""
    model = net.model()
    for norm in some(norms(model), share):
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    return stored(net, model)


@fault("slimmed by scale", "BN204", "BN206", doses=(0.2, 0.4, 0.6))
def slimmed(net: Healthy, share: float) -> Case:
    """Channels with the smallest scales switched off, no statistics taken after."""
    model = net.model()
    with torch.no_grad():
        for norm in norms(model):
            off = norm.weight.abs().argsort()[: round(share * len(norm.weight))]
            norm.weight[off] = norm.bias[off] = 0
    return stored(net, model)


@fault("filters switched off", "BN204", "BN205", doses=(0.1, 0.25, 0.5))
def filters_off(net: Healthy, share: float) -> Case:
    """Pruned by masks: the smallest filters of each layer are zero, the norms behind know nothing of it."""
    model = net.model()
    with torch.no_grad():
        for layer in layers_of(model):
            size = layer.weight.flatten(1).norm(dim=1)
            layer.weight[size.argsort()[: round(share * len(size))]] = 0
    return stored(net, model)


@fault("weights pruned", "BN204", doses=(0.5, 0.7, 0.85))
def pruned(net: Healthy, share: float) -> Case:
    """The smallest weights of each layer are zero."""
    model = net.model()
    with torch.no_grad():
        for layer in layers_of(model):
            limit = layer.weight.abs().flatten().kthvalue(max(1, round(share * layer.weight.numel()))).values
            layer.weight[layer.weight.abs() <= limit] = 0
    return stored(net, model)


@fault("weights quantised", "BN204", doses=(4, 3, 2))
def quantised_weights(net: Healthy, bits: int) -> Case:
    """In few bits, one scale a layer."""
    model = net.model()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.weight.copy_(rounded(layer.weight, bits))
    return stored(net, model)


@fault("folded and kept", "BN204", doses=LAYERS)
def folded_and_kept(net: Healthy, share: float) -> Case | None:
    """Scales went into the weights, and the norm stayed where it was."""
    model = net.model()
    pairs = feeders(model, net.arch.split[0][:2])
    if not pairs:
        return None
    with torch.no_grad():
        for layer, norm in some(pairs, share):
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            layer.weight.mul_(scale.reshape(-1, *(1,) * (layer.weight.dim() - 1)))
    return stored(net, model)


@fault("trained on with statistics held", "BN204", "BN203", doses=(0.7, 0.3, 0.1))
def held(net: Healthy, part: float) -> Case:
    """Weights of the end, statistics of an earlier time."""
    return stored(net, net.model(mixed(net.snaps[-1], net.at(part))))


@fault("tracking switched off in training", "BN105", "BN204", doses=(0.7, 0.3, 0.1))
def flag_off(net: Healthy, part: float) -> Case:
    """``track_running_stats = False`` on norms that have statistics: they stay where they are."""
    model = net.model(mixed(net.snaps[-1], net.at(part)))
    for norm in norms(model):
        norm.track_running_stats = False
    return stored(net, model)


@fault("exponential average without buffers", "BN207", "BN202", "BN203", "BN204", doses=(0.6, 0.2, 0))
def averaged(net: Healthy, since: float) -> Case:
    """An average of the parameters, with the buffers as they were when it was made."""
    return stored(net, net.model(mixed(net.average, net.at(since))), against=net.model())


@fault("mean of weights without statistics", "BN204", "BN207", doses=(0.7, 0.4, 0.2))
def swa(net: Healthy, since: float) -> Case:
    """Stochastic weight averaging since then, ``update_bn`` forgotten."""
    last = net.snaps[-1]
    taken = net.snaps[net.index(since) :]
    mean = {k: v if is_stat(k) else torch.stack([s[k] for s in taken]).mean(0) for k, v in last.items()}
    return stored(net, net.model(mean), against=net.model())


# ------------------------------------------------------------------------------------- momentum


def _with_momentum(net: Healthy, rate: float) -> Case:
    model = net.model()
    for norm, (mean, var) in zip(norms(model), net.shadows[rate], strict=True):
        norm.momentum = rate
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return stored(net, model)


@fault("momentum too small", "BN203", "BN204", doses=(0.03, 0.01, 0.002))
def momentum_small(net: Healthy, rate: float) -> Case:
    """For so few steps."""
    return _with_momentum(net, rate)


@fault("momentum of TensorFlow", "BN106", "BN204", doses=(0.9, 0.99, 1.0))
def momentum_large(net: Healthy, rate: float) -> Case:
    """The share of the old value taken for that of the new."""
    return _with_momentum(net, rate)


@fault("momentum None, few steps", "BN204", doses=(1, 0.6, 0.3))
def momentum_none(net: Healthy, part: float) -> Case:
    """An average over all batches, those of early training among them; stopped after this part."""
    i = net.index(part)
    model = net.model(net.snaps[i])
    usual = net.arch.score(model)
    for norm, (mean, var) in zip(norms(model), net.cumulative[i], strict=True):
        norm.momentum = None if type(norm).forward is nn.BatchNorm2d.forward else norm.momentum
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return Case(model, net.arch.score(model), usual, loader(net.arch), stored(net, model).how)
