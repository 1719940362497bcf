"""Every kind of norm, and every way to have one: recalibrated, or left and named; weights of other kinds stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calib_nets import Forward, distances, norms, residual
from nets import bits, lived_in, same_bits
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from trap_nets import EXACT, Two, as_is, exact, images, vectors

import bnfix
from bnfix.errors import CalibrationError, TraceError

ways = pytest.mark.parametrize("forward", [None, as_is], ids=["joined", "as they are"])


def net(norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


# Recalibrated.


class WithActivation(nn.BatchNorm2d):
    """A subclass that does more in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.1)


class Aten(nn.Module):
    """Own buffers, and one of the functions that normalise with them."""

    def __init__(self, how: Callable[..., Any]) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("running_var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.running_mean, self.running_var)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[..., nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "momentum None": lambda c: nn.BatchNorm2d(c, momentum=None),
    "without affine": lambda c: nn.BatchNorm2d(c, affine=False),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "lazy": lambda c: nn.LazyBatchNorm2d(),
    "with an activation": WithActivation,
    "F.batch_norm": lambda c: Aten(F.batch_norm),
    "F.batch_norm by name": lambda c: Aten(lambda x, m, v: F.batch_norm(running_var=v, running_mean=m, input=x)),
    "torch.batch_norm": lambda c: Aten(lambda x, m, v: torch.batch_norm(x, None, None, m, v, False, 0.1, 1e-5, False)),
    "torch.native_batch_norm": lambda c: Aten(
        lambda x, m, v: torch.native_batch_norm(x, None, None, m, v, False, 0.1, 1e-5)[0]
    ),
    "aten.batch_norm": lambda c: Aten(
        lambda x, m, v: torch.ops.aten.batch_norm.default(x, None, None, m, v, False, 0.1, 1e-5, False)
    ),
    "without training": lambda c: Aten(
        lambda x, m, v: torch.ops.aten._native_batch_norm_legit_no_training(x, None, None, m, v, 0.1, 1e-5)[0]
    ),
}


@ways
@pytest.mark.parametrize("way", list(WAYS))
def test_ways_to_normalise(way: str, forward: Forward | None) -> None:
    model = net(WAYS[way])
    if way == "lazy":
        with pytest.raises(CalibrationError, match="1 is not initialised yet"):
            bnfix.recalibrate(model, images())
        model(images()[0])
    report = exact(model, images(), forward)
    assert len(report.layers) == 2
    if norms(model)["1"].__class__ is Aten:  # the oracle hooks modules: it sees the same input there
        assert report.layers[0].site == "1"


@pytest.mark.parametrize(("dims", "kind"), [(0, nn.BatchNorm1d), (1, nn.BatchNorm1d), (3, nn.BatchNorm3d)])
def test_other_numbers_of_axes(dims: int, kind: Callable[..., nn.Module]) -> None:
    x = torch.randn(400, 4, *(3, 2, 5)[:dims]) * 2 + 1
    exact(nn.Sequential(kind(4), nn.Tanh(), kind(4)), list(x.split(16)))


def test_a_norm_of_timm_keeps_its_activation() -> None:
    timm = pytest.importorskip("timm")
    kind = timm.layers.BatchNormAct2d
    model = net(kind)
    exact(model, images())
    assert type(model[1]) is kind
    seen: list[Tensor] = []
    model[3].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    model.eval()(images()[0])
    assert seen[0].min().item() == 0  # ReLU of its own


def test_a_graph_module_and_an_exported_program() -> None:
    model = lived_in(net())
    for graph in (torch.fx.symbolic_trace(copy.deepcopy(model)), _exported(copy.deepcopy(model))):
        report = bnfix.recalibrate(graph, images())
        assert len(report.layers) == 2
        fresh = net()
        fresh.load_state_dict(graph.state_dict())
        assert max(residual(fresh, images())) <= EXACT


def _exported(model: nn.Module) -> nn.Module:
    example = torch.cat(images(32))[:5]
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    model = lived_in(net().to(dtype))
    batches = [b.to(dtype) for b in images()]
    bnfix.recalibrate(model, batches, forward=as_is)
    eps = torch.finfo(dtype).eps
    found = distances(model, batches)
    means = [
        (n.running_mean.double().abs() / n.running_var.double().sqrt()).max().item() for n in norms(model).values()
    ]  # type: ignore[operator, union-attr]
    # Half a unit in the last place of a mean and of a variance, in units of σ and relative.
    assert max(d.mean for d in found.values()) <= 0.5 * eps * max(1.0, *means)
    assert max(d.var for d in found.values()) <= 0.5 * eps


def test_float64_is_exact() -> None:
    model = lived_in(net().double())
    batches = [b.double() for b in images()]
    bnfix.recalibrate(model, images())
    assert max(residual(model, batches)) <= 1e-12


# Shared, tied, sliced.


@pytest.mark.parametrize("what", ["memory", "mean"])
def test_norms_that_share_by_half_are_refused(what: str) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    one, two = model[1], model[3]
    if what == "memory":
        two.running_mean.set_(one.running_mean)
        two.running_var.set_(one.running_var)
    else:
        two.running_mean = one.running_mean
    before = bits(model)
    with pytest.raises(CalibrationError, match=r"3\.running_mean and a buffer of 1"):
        bnfix.recalibrate(model, images())
    assert same_bits(model, before)
    two.running_mean, two.running_var = one.running_mean, one.running_var
    both = bnfix.recalibrate(model, images(), certify="full").residual
    assert both is not None
    assert max(both.mean, both.var) <= EXACT
    flat = torch.rand(16)  # neighbours in one piece of memory are nothing to speak of
    one.running_mean, one.running_var, two.running_mean, two.running_var = flat.split(4)
    bnfix.recalibrate(model, images())
    assert max(residual(model, images())) <= EXACT


class Renamed(Two):
    """Its own buffers under other names."""

    def __init__(self, other: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.other = other

    def first(self, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(self.conv1(x), self.other(self.bn1.running_mean), self.other(self.bn1.running_var)))


@pytest.mark.parametrize("other", [Tensor.detach, lambda t: t.data, lambda t: t.view(-1)])
def test_buffers_under_another_name(other: Callable[[Tensor], Tensor]) -> None:
    model = lived_in(Renamed(other))
    report = bnfix.recalibrate(model, images())
    assert [s.name for s in report.layers] == ["bn1", "bn2"]
    with torch.no_grad():
        x = model.conv1(torch.cat(images())).double().transpose(0, 1).flatten(1)
    assert ((x.mean(1) - model.bn1.running_mean).abs() / x.std(1)).max() <= EXACT
    assert (x.var(1) / model.bn1.running_var - 1).abs().max() <= EXACT
    assert distances(model, images())["bn2"].var <= EXACT
    copied = bnfix.recalibrate(lived_in(Renamed(torch.clone)), images())
    assert "may be copies" in copied.left_why["bn1"]
    assert not copied.never_called


def test_a_name_that_is_none_of_the_model() -> None:
    model = lived_in(Two())
    with pytest.raises(CalibrationError, match="select names 'bn3', and the model has no such layer"):
        bnfix.recalibrate(model, images(), select=["bn1", "bn3"])
    assert bnfix.recalibrate(model, images(), select=["bn1", "conv1"]).left == ("bn2",)


def test_a_model_without_values() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(CalibrationError, match=r"0\.weight is on the meta device"):
        bnfix.recalibrate(model, images())


def test_one_norm_under_two_names() -> None:
    model = Two()
    model.alias = model.bn1
    report = exact(model, images())
    assert [s.site for s in report.layers] == ["bn1", "bn2"]


def test_weights_that_norms_share() -> None:
    model = Two()
    lived_in(model)
    model.bn2.weight, model.bn2.bias = model.bn1.weight, model.bn1.bias
    bnfix.recalibrate(model, images())
    assert max(residual(model, images())) <= EXACT


class Slimmable(nn.Module):
    """A switchable norm: a slice of the buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.BatchNorm1d(4), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.wide.running_mean[:2], self.wide.running_var[:2]  # type: ignore[index]
        return self.out(F.batch_norm(x[:, :2], mean, var))


def test_sliced_buffers_are_left_and_named() -> None:
    model = lived_in(Slimmable())
    before = bits(model.wide)
    report = bnfix.recalibrate(model, vectors())
    assert same_bits(model.wide, before)
    assert "wide" in (*report.never_called, *report.left)
    assert any("no buffers of the model" in note for note in report.notes)
    assert max(distances(model, vectors())["out"]) <= EXACT


# Left, and named.


class ByHand(nn.BatchNorm2d):
    """A subclass with arithmetic of its own."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean.view(1, -1, 1, 1), self.running_var.view(1, -1, 1, 1)  # type: ignore[union-attr]
        return (x - mean) * (var + self.eps).rsqrt()


def _frozen(channels: int) -> nn.Module:
    return pytest.importorskip("torchvision").ops.FrozenBatchNorm2d(channels)  # type: ignore[no-any-return]


LEFT: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "arithmetic of its own": (ByHand, "ByHand normalises by itself"),
    "InstanceNorm": (lambda c: nn.InstanceNorm2d(c, track_running_stats=True), "InstanceNorm averages"),
    "no running statistics": (lambda c: nn.BatchNorm2d(c, track_running_stats=False), "keeps no running statistics"),
    "the batch's own": (
        lambda c: Aten(lambda x, m, v: F.batch_norm(x, m, v, training=True)),
        "normalises with the batch",
    ),
}


def test_frozen_batch_norm_of_torchvision_stays() -> None:
    model = lived_in(net(_frozen))
    before = bits(model[1])
    report = bnfix.recalibrate(model, images())
    assert report.frozen == ("1",)
    assert [s.site for s in report.layers] == ["4"]
    assert same_bits(model[1], before)


@pytest.mark.parametrize("kind", list(LEFT))
def test_norms_that_are_left_are_named(kind: str) -> None:
    make, why = LEFT[kind]
    model = lived_in(net(make))
    before = bits(model[1])
    report = bnfix.recalibrate(model, images())
    assert why in report.left_why["1"]
    assert [s.site for s in report.layers] == ["4"]
    assert same_bits(model[1], before)
    found = distances(model, images())
    model[1].load_state_dict(
        before, strict=False
    )  # a norm that works on the batch writes them in the oracle's forwards
    assert max(found["4"]) <= EXACT


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_norms_that_are_left(training: bool) -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 1), ByHand(4))).train(training)
    with pytest.raises(CalibrationError, match="1 ByHand normalises by itself"):
        bnfix.recalibrate(model, images())


def test_scripted_and_compiled_parts_are_refused_by_name() -> None:
    scripted = nn.Sequential(net(), torch.jit.script(nn.BatchNorm2d(4).eval())).eval()
    with pytest.raises(TraceError, match="1 is a ScriptModule"):
        bnfix.recalibrate(scripted, images())
    compiled = nn.Sequential(torch.compile(nn.BatchNorm2d(3), backend="eager"), net()[0])
    with pytest.raises(TraceError, match="0 is compiled"):
        bnfix.recalibrate(compiled, images())


def test_compiled_models_are_looked_through() -> None:
    model = lived_in(net())
    bnfix.recalibrate(torch.compile(model, backend="eager"), images())
    assert max(residual(model, images())) <= EXACT
    model = lived_in(net())
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    bnfix.recalibrate(model, images())
    assert model._compiled_call_impl is compiled
    model._compiled_call_impl = None
    assert max(residual(model, images())) <= EXACT


# Weights that are computed: they stay, power iterations too.

COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
}


@ways
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", list(COMPUTED))
def test_computed_weights(how: str, forward: Forward | None) -> None:
    model = net()
    model[0] = COMPUTED[how](model[0])
    lived_in(model)
    before = bits(model[0])
    exact(model, images(), forward)
    assert same_bits(model[0], before)


# Attributes of classes of somebody's own.


class Terms(tuple):  # type: ignore[type-arg]
    """A tuple whose length is nobody's business, as of irreducible representations."""

    def __len__(self) -> int:
        raise NotImplementedError


@pytest.mark.parametrize("count", [40, 400])
def test_a_tuple_that_does_not_tell_its_length(count: int) -> None:
    model = net()
    model.terms = Terms((1, [2]))  # type: ignore[assignment]
    exact(model, images(count))
    assert isinstance(model.terms, Terms)


class FrozenBatchNorm(nn.Module):
    """As detectors have it: buffers, and arithmetic of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.ones(3))
        self.register_buffer("running_var", torch.ones(3) * 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.running_var.rsqrt()[:, None, None]
        return x * scale - self.running_mean[:, None, None] * scale


def test_norms_that_are_frozen_by_their_class_are_not_said_to_be_by_their_mode() -> None:
    with pytest.raises(CalibrationError, match="all 1 norms are frozen: a FrozenBatchNorm is frozen by its class"):
        bnfix.recalibrate(nn.Sequential(FrozenBatchNorm()).eval(), [torch.randn(4, 3, 5, 5)])
