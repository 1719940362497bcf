"""The fixed point as a property: random nets, random data, any way of dealing it out, and an oracle of its own.

The tolerance is 1e-5 standard deviations. Activations of float32 differ with the batch size by some 1e-7 of their
magnitude, so where a norm's input has a mean of many standard deviations the tolerance grows with that ratio.
"""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from calib_nets import norm_inputs, norms, residual, rounding_ratio
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from nets import bits, lived_in
from torch import Tensor, nn

import bnfix

TOL = 1e-5
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "leaky": nn.LeakyReLU, "none": nn.Identity}
CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, Any] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
DROPOUTS: dict[int, Any] = {0: nn.Dropout, 1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}

some = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


class Added(nn.Module):
    """A branch whose result is added to its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@st.composite
def norm_layers(draw: st.DrawFn, dims: int, channels: int) -> nn.Module:
    norm: nn.Module = NORMS[dims](
        channels,
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.1])),
        momentum=draw(st.sampled_from([0.1, None, 1.0, 0.003])),
        affine=draw(st.booleans()),
    )
    norm.num_batches_tracked.fill_(draw(st.sampled_from([1, 77])))  # type: ignore[operator]
    return norm


@st.composite
def blocks(draw: st.DrawFn, dims: int, inp: int, out: int) -> nn.Module:
    """A layer of weights, a norm behind it, an activation and maybe dropout, in one of several orders."""
    layer: nn.Module = CONVS[dims](inp, out, 3, padding=1, bias=draw(st.booleans())) if dims else nn.Linear(inp, out)
    parts = [layer, draw(norm_layers(dims, out)), ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]()]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, 3)), DROPOUTS[dims](draw(st.sampled_from([0.2, 0.7]))))
    if draw(st.booleans()):
        parts.insert(0, draw(norm_layers(dims, inp)))
    block = nn.Sequential(*parts)
    return Added(block) if inp == out and draw(st.booleans()) else block


@st.composite
def nets(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A net with lived-in statistics, in either mode, and its data: 20 to 60 samples off 0 and scaled."""
    dims, channels = draw(st.sampled_from([0, 1, 2, 3])), draw(st.integers(2, 4))
    shape = (channels,) + (draw(st.integers(2, 5)),) * dims
    torch.manual_seed(draw(st.integers(0, 10_000)))
    parts: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([channels, channels + 1]))
        parts.append(draw(blocks(dims, channels, out)))
        channels = out
    if dims:
        parts += [nn.Flatten(2), Averaged(), draw(blocks(0, channels, 3))]
    model = lived_in(nn.Sequential(*parts), seed=draw(st.integers(0, 100)))
    model.train(draw(st.booleans()))
    x = torch.randn(draw(st.integers(20, 60)), *shape)
    return model, x * draw(st.sampled_from([0.05, 1.0, 30.0])) + draw(st.sampled_from([0.0, -3.0, 20.0]))


class Averaged(nn.Module):
    """Mean over the positions: a BatchNorm1d behind it sees one value a sample."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


@st.composite
def deals(draw: st.DrawFn, n: int) -> list[list[int]]:
    """The indices 0 … n − 1 in some order, in batches of 1 to 40, no two alike of necessity."""
    order = list(range(n))
    if draw(st.booleans()):
        random.Random(draw(st.integers(0, 1000))).shuffle(order)
    sizes: list[int] = []
    fixed = draw(st.sampled_from([0, 1, 2, 7, 40]))
    while sum(sizes) < n:
        sizes.append(min(fixed or draw(st.integers(1, 40)), n - sum(sizes)))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def tolerance(model: nn.Module) -> float:
    return TOL * max(1.0, rounding_ratio(model) / 10)


@some
@given(st.data())
def test_the_fixed_point(data: st.DataObject) -> None:
    model, x = data.draw(nets())
    deal = data.draw(deals(len(x)))
    note(f"{model}, {tuple(x.shape)} in {[len(d) for d in deal]}")
    report = bnfix.recalibrate(model, [x[d] for d in deal])
    found = residual(model, [x[:31], x[31:]])
    assert max(found) <= tolerance(model), found
    assert report.n == len(x)
    for layer, seen in zip(report.layers, norm_inputs(model, [x]).values(), strict=True):
        assert layer.n == seen.shape[1]
        assert layer.samples == len(x)


@some
@given(st.data())
def test_equal_deals_give_equal_bits(data: st.DataObject) -> None:
    model, x = data.draw(nets())
    batches = [x[d] for d in data.draw(deals(len(x)))]
    twin = lived_in(copy.deepcopy(model), seed=5)  # what was stored before has no say
    for norm, other in zip(norms(model).values(), norms(twin).values(), strict=True):
        other.load_state_dict({k: v for k, v in norm.state_dict().items() if "running" not in k}, strict=False)
    bnfix.recalibrate(model, batches)
    bnfix.recalibrate(twin, batches)
    for norm, other in zip(norms(model).values(), norms(twin).values(), strict=True):
        assert torch.equal(norm.running_mean, other.running_mean)  # type: ignore[arg-type]
        assert torch.equal(norm.running_var, other.running_var)  # type: ignore[arg-type]


@some
@given(st.data())
def test_batch_size_and_order_have_no_say(data: st.DataObject) -> None:
    model, x = data.draw(nets())
    twin = copy.deepcopy(model)
    for one in (model, twin):
        bnfix.recalibrate(one, [x[d] for d in data.draw(deals(len(x)))])
    for norm, other in zip(norms(model).values(), norms(twin).values(), strict=True):
        a: Any = norm
        b: Any = other
        sigma = a.running_var.clamp(min=1e-12).sqrt()
        assert ((a.running_mean - b.running_mean).abs() / sigma).max() <= tolerance(model)
        assert ((a.running_var - b.running_var).abs() / sigma**2).max() <= tolerance(model)


@some
@given(st.data())
def test_nothing_else_changes(data: st.DataObject) -> None:
    model, x = data.draw(nets())
    batches = [x[d] for d in data.draw(deals(len(x)))]
    for m in model.modules():  # a mixture of modes, norms excepted: those would be frozen
        if isinstance(m, (nn.Dropout, nn.Linear)):
            m.train(data.draw(st.booleans()))
    before, given_data = bits(model), [b.clone() for b in batches]
    modes = [m.training for m in model.modules()]
    kept = [sorted(vars(m)) for m in model.modules()]
    momenta = [getattr(m, "momentum", 0) for m in model.modules()]
    torch.manual_seed(3)
    random_state = torch.get_rng_state()
    bnfix.recalibrate(model, batches)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes
    assert [sorted(vars(m)) for m in model.modules()] == kept
    assert [getattr(m, "momentum", 0) for m in model.modules()] == momenta
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    after = bits(model)
    assert before.keys() == after.keys()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    counters = {k for k in changed if k.endswith("num_batches_tracked")}
    assert changed - counters <= {f"{name}.{k}" for name in norms(model) for k in ("running_mean", "running_var")}
    for name, norm in norms(model).items():  # a counter that would say that initial values are left says so no more
        key, rate = f"{name}.num_batches_tracked", norm.momentum
        told = rate is not None and (1 - rate) ** int(before[key]) > 0.01  # type: ignore[operator]
        assert (key in counters) is told
        assert after[key] >= before[key]
    assert {k for k in changed if k.endswith("mean")} == {f"{name}.running_mean" for name in norms(model)}
    assert all(torch.equal(a, b) for a, b in zip(given_data, batches, strict=True))
    assert all(p.grad is None for p in model.parameters())
