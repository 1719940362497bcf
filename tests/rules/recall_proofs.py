"""What is true of a net with each fault of the benchmark of recall: the proof that it does what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.recall import in_training
from benchmarks.recall.faults import Case, feeders
from benchmarks.recall.healthy import Healthy, norms
from benchmarks.recall.in_values import is_stat, layers_of
from torch import Tensor, nn

Check = Callable[[Healthy, Case], None]
CHECKS: dict[str, Check] = {}


def proof(*names: str) -> Callable[[Check], Check]:
    """What is true of a net with these faults in their strong dose."""

    def known(check: Check) -> Check:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return known


def changed(net: Healthy, model: nn.Module) -> set[str]:
    """The entries of the state that are no longer those of the healthy net."""
    before, after = net.snaps[-1], model.state_dict()
    return {k for k in before if k not in after or not torch.equal(before[k], after[k])}


def stats_alone(net: Healthy, case: Case) -> None:
    """Weights are as they were; all means or variances are others."""
    keys = changed(net, case.model)
    assert keys
    assert all(is_stat(k) for k in keys)
    assert {k.rpartition(".")[0] for k in keys} == {n for n, m in case.model.named_modules() if m in norms(case.model)}


def pairs(net: Healthy, case: Case) -> list[tuple[Any, Any]]:
    """Norms as they were, and as they are."""
    return list(zip(norms(net.model()), norms(case.model), strict=True))


def first(case: Case) -> Any:
    """The first batch of a case's loader."""
    return next(iter(case.data))


@proof("statistics reset")
def _(net: Healthy, case: Case) -> None:
    stats_alone(net, case)
    assert all(bool((n.running_mean == 0).all() and (n.running_var == 1).all()) for n in norms(case.model))


@proof("means lost")
def _(net: Healthy, case: Case) -> None:
    assert all(torch.equal(a.running_var, b.running_var) and not b.running_mean.any() for a, b in pairs(net, case))


@proof("NaN in statistics")
def _(net: Healthy, case: Case) -> None:
    assert all(0.4 < n.running_var.isnan().float().mean() < 0.6 for n in norms(case.model))


@proof("negative variances")
def _(net: Healthy, case: Case) -> None:
    assert all(0.4 < (n.running_var < 0).float().mean() < 0.6 for n in norms(case.model))


@proof("statistics of another run")
def _(net: Healthy, case: Case) -> None:
    stats_alone(net, case)
    assert all(
        torch.equal(a.running_var, b.running_var)
        for a, b in zip(norms(net.other().model()), norms(case.model), strict=True)
    )


@proof("statistics in another channel order")
def _(net: Healthy, case: Case) -> None:
    stats_alone(net, case)
    assert all(torch.equal(a.running_mean.sort().values, b.running_mean.sort().values) for a, b in pairs(net, case))


@proof("statistics quantised")
def _(net: Healthy, case: Case) -> None:
    stats_alone(net, case)
    assert all(len(n.running_mean.unique()) <= 3 for n in norms(case.model))


@proof("deviations for variances")
def _(net: Healthy, case: Case) -> None:
    for a, b in pairs(net, case):
        torch.testing.assert_close(b.running_var.square(), a.running_var)
        assert torch.equal(a.running_mean, b.running_mean)


@proof("scale factor not divided by")
def _(net: Healthy, case: Case) -> None:
    for a, b in pairs(net, case):
        torch.testing.assert_close(b.running_var / 1000, a.running_var)
        torch.testing.assert_close(b.running_mean / 1000, a.running_mean)


@proof("eps of another framework")
def _(net: Healthy, case: Case) -> None:
    reference = case.how["against"]
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in case.model.state_dict().items())
    assert {n.eps for n in norms(case.model)} == {1e-3}
    assert {n.eps for n in norms(reference)} == {1e-5}
    x = net.arch.split[0][:64]
    for (a, b), (layer, _) in zip(pairs(net, case), feeders(case.model, x), strict=True):
        torch.testing.assert_close(b.running_var, 1e-4 * a.running_var)
        assert layer.weight.abs().max() < 0.02
    assert case.base is not None
    assert case.base > net.score - 0.1  # smaller weights with their statistics are the same net, but for eps


@proof("affine lost")
def _(net: Healthy, case: Case) -> None:
    assert all(k.endswith(("weight", "bias")) for k in changed(net, case.model))
    assert all(bool((n.weight == 1).all() and (n.bias == 0).all()) for n in norms(case.model))


@proof("slimmed by scale")
def _(net: Healthy, case: Case) -> None:
    for a, b in pairs(net, case):
        off = b.weight == 0
        assert 0.5 < off.float().mean() < 0.7
        assert a.weight[off].abs().max() <= a.weight[~off].abs().min()


@proof("filters switched off")
def _(net: Healthy, case: Case) -> None:
    assert not any(is_stat(k) for k in changed(net, case.model))
    assert all(0.4 < (m.weight.flatten(1).norm(dim=1) == 0).float().mean() < 0.6 for m in layers_of(case.model))


@proof("weights pruned")
def _(net: Healthy, case: Case) -> None:
    assert not any(is_stat(k) for k in changed(net, case.model))
    assert all(0.84 < (m.weight == 0).float().mean() < 0.86 for m in layers_of(case.model))


@proof("weights quantised")
def _(net: Healthy, case: Case) -> None:
    assert not any(is_stat(k) for k in changed(net, case.model))
    assert all(len(m.weight.unique()) <= 3 for m in layers_of(case.model))


@proof("folded and kept")
def _(net: Healthy, case: Case) -> None:
    for (a, b), (layer, _), (was, _) in zip(
        pairs(net, case),
        feeders(case.model, net.arch.split[0][:2]),
        feeders(net.model(), net.arch.split[0][:2]),
        strict=True,
    ):
        assert torch.equal(a.running_var, b.running_var)
        scale = a.weight / (a.running_var + a.eps).sqrt()
        torch.testing.assert_close(layer.weight, was.weight * scale.reshape(-1, *(1,) * (was.weight.dim() - 1)))


@proof("trained on with statistics held", "tracking switched off in training")
def _(net: Healthy, case: Case) -> None:
    stats_alone(net, case)
    state = case.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in net.snaps[1].items() if is_stat(k))


@proof("exponential average without buffers")
def _(net: Healthy, case: Case) -> None:
    assert all(bool((n.running_var == 1).all()) for n in norms(case.model))
    far = [(net.average[k] - v).norm() / v.norm() for k, v in net.snaps[-1].items() if v.dim() > 1]
    assert 0 < max(far) < 0.5  # an average of the last steps, near the last one
    assert not changed(net, case.how["against"])


@proof("mean of weights without statistics")
def _(net: Healthy, case: Case) -> None:
    key = next(k for k, v in net.snaps[-1].items() if v.dim() > 1)
    taken = torch.stack([s[key] for s in net.snaps[2:]])
    torch.testing.assert_close(case.model.state_dict()[key], taken.mean(0))
    assert not any(is_stat(k) for k in changed(net, case.model))


@proof("momentum too small", "momentum of TensorFlow")
def _(net: Healthy, case: Case) -> None:
    stats_alone(net, case)
    assert {n.momentum for n in norms(case.model)} <= {0.002, 1.0}


@proof("momentum None, few steps")
def _(net: Healthy, case: Case) -> None:
    assert {n.momentum for n in norms(case.model)} == {None}
    assert {int(n.num_batches_tracked) for n in norms(case.model)} == {
        int(net.at(0.3)[k]) for k in net.at(0.3) if k.endswith("tracked")
    }


@proof("input normalisation forgotten")
def _(net: Healthy, case: Case) -> None:
    assert not changed(net, case.model)
    x = first(case)[0]
    assert x.min() > -1e-3
    assert 200 < x.max() < 256


@proof("contrast")
def _(net: Healthy, case: Case) -> None:
    assert not changed(net, case.model)
    x, own = first(case)[0], net.arch.split[0]
    assert (x.min(), x.max()) == (-own.max(), -own.min())


@proof("brightness")
def _(net: Healthy, case: Case) -> None:
    torch.testing.assert_close(first(case)[0].min(), net.arch.split[0].min() + 4)


@proof("another resolution")
def _(net: Healthy, case: Case) -> None:
    assert first(case)[0].shape[-1] == 2 * net.arch.split[0].shape[-1]


@proof("16 bits")
def _(net: Healthy, case: Case) -> None:
    assert {t.dtype for t in case.model.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert {int(n.num_batches_tracked) for n in norms(case.model)} == {60}


@proof("no running statistics", "functional call left in training mode")
def _(net: Healthy, case: Case) -> None:
    x = net.arch.split[2][:8]
    with torch.no_grad():
        assert not torch.allclose(case.model(x)[:4], case.model(x[:4]), atol=1e-3)  # what comes along counts
        assert torch.allclose(net.model()(x)[:4], net.model()(x[:4]), atol=1e-4)


@proof("exported in training mode")
def _(net: Healthy, case: Case) -> None:
    module = case.model.module()
    x = net.arch.split[2][:2]
    before = [b.clone() for n, b in module.named_buffers() if n.endswith("running_var")]
    module(x)
    after = [b for n, b in module.named_buffers() if n.endswith("running_var")]
    assert before
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@proof("single-sample tail")
def _(net: Healthy, case: Case) -> None:
    assert len(case.data.dataset) % case.data.batch_size == 1
    assert not case.data.drop_last


@proof("small batches", "small batches, accumulated")
def _(net: Healthy, case: Case) -> None:
    assert len(first(case)[0]) == 2
    begun = int(next(v for k, v in net.at(0.2).items() if k.endswith("tracked")))
    count = {int(n.num_batches_tracked) - begun for n in norms(case.model)}
    assert count == {in_training.STEPS}
    assert case.base is not None


@proof("sorted by class")
def _(net: Healthy, case: Case) -> None:
    seen = [y for _, y in case.data]
    pure = [bool((y == y[0]).all()) for y in seen]
    assert sum(pure) > 0.7 * len(pure)
    assert len(torch.cat(seen).unique()) == 10


@proof("one rank's statistics")
def _(net: Healthy, case: Case) -> None:
    x, y = net.arch.split[:2]
    stored = norms(case.model)[0].running_mean.clone()

    def seen(part: Tensor) -> Tensor:
        again = net.arch.build()
        again.load_state_dict(case.model.state_dict())
        norm = norms(again)[0]
        norm.momentum = 1.0
        norm.train()
        with torch.no_grad():
            again(part)
        return norm.running_mean

    far = [(seen(part) - stored).norm() for part in (x[y < 5], x, x[y >= 5])]
    assert far[0] < 0.7 * far[1] < far[2]  # the first norm stores what its own shard gives


@proof("modalities in forwards of their own")
def _(net: Healthy, case: Case) -> None:
    batch = first(case)
    with torch.no_grad():
        outputs = case.how["forward"](case.model, batch)
    assert len(outputs) == 2
    assert case.base is not None
    top = (1 - 2 * net.arch.scale.mean) / net.arch.scale.std
    with torch.no_grad():
        assert torch.equal(outputs[1], case.model(top - batch[0]))


@proof("one norm for several layers")
def _(net: Healthy, case: Case) -> None:
    assert len(norms(case.model)) < len(norms(net.model()))
    names = {n for n, _ in case.model.named_modules(remove_duplicate=False)}
    assert {n for n, _ in net.model().named_modules()} == names


@proof("padding in statistics")
def _(net: Healthy, case: Case) -> None:
    x, _, mask = first(case)
    assert x.shape[-1] == 4 * net.arch.split[0].shape[-1]
    assert mask.float().mean() == 0.25
    rest = x[..., net.arch.split[0].shape[-1] :]
    assert rest.min() == rest.max()  # black


@proof("dropout in front of norms")
def _(net: Healthy, case: Case) -> None:
    assert [m.p for m in case.model.modules() if isinstance(m, nn.Dropout)] == [0.6] * (len(norms(case.model)) // 2)


@proof("eval() forgotten in validation", "pseudo labels in training mode")
def _(net: Healthy, case: Case) -> None:
    assert case.watched is not None
    moved = [(b.running_mean - a.running_mean).abs().mean() / a.running_var.sqrt().mean() for a, b in pairs(net, case)]
    assert max(moved) > 0.3  # statistics went to the other data, weights hardly
    far = [(v - net.snaps[-1][k]).norm() / v.norm() for k, v in case.model.state_dict().items() if v.dim() > 1]
    assert max(far) < 0.01


@proof("frozen, and in training mode")
def _(net: Healthy, case: Case) -> None:
    stats_alone(net, case)


@proof("weights loaded without statistics")
def _(net: Healthy, case: Case) -> None:
    stats_alone(net, case)
    assert all(bool((n.running_var == 1).all()) for n in norms(case.model))
    assert case.watched is not None
    assert "BN406" in {f.code for f in case.watched.findings}


@proof("forwards recomputed")
def _(net: Healthy, case: Case) -> None:
    counted = {int(b.num_batches_tracked - a.num_batches_tracked) for a, b in pairs(net, case)}
    assert counted == {2 * 24}
    assert {n.momentum for n in norms(case.model)} == {0.6}
