"""Facts without an input: what is seen is what the exported graph shows, what can't be seen is refused or opaque."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
import zoo
from nets import bits, lived_in, same_bits
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from bnfix.errors import TraceError
from bnfix.graph import copy_model, gather
from bnfix.graph.owners import Owners, find_owners
from bnfix.graph.sources.symbolic import trace
from bnfix.running import as_call
from bnfix.types import Op, Route

LAYERS = ("conv", "conv_transpose", "linear")


def traced(model: nn.Module) -> tuple[Route, dict[int, str]]:
    """The route, and the first name of each tensor by its key."""
    copy, _ = copy_model(lived_in(model))
    owners: Owners = find_owners(copy)
    keys = {tensor_id: i for i, tensor_id in enumerate(owners.tensors)}
    names = {keys[i]: owners.paths(t)[0] for i, t in owners.tensors.items()}
    return trace(copy, lambda t: keys.get(id(t))), names


def ops(model: nn.Module, kind: str) -> list[Op]:
    return [op for op in traced(model)[0].ops if op.kind == kind]


def pairs(route: Route, names: dict[int, str]) -> dict[str, tuple[str, int]]:
    """For each norm behind a layer: the layer's weight, and how many read the layer's output."""
    found = {}
    for op in route.ops:
        if op.kind == "norm" and "running_mean" in op.tensors and "input" in op.reads:
            source = route.ops[op.reads["input"]]
            if source.kind in LAYERS and "weight" in source.tensors:
                readers = len(route.users(source.index))
                found[f"{names[op.tensors['running_mean']]}@{op.site.call}"] = names[source.tensors["weight"]], readers
    return found


NETS: dict[str, Callable[[], nn.Module]] = {
    c.__name__: c
    for c in (nets.TwoConsumers, nets.ConvIsOutput, nets.SharedConv, nets.CalledTwice, nets.NormOnConvAndRelu,
              nets.NormOnTwoConvs, nets.TiedWeights, nets.WeightReadElsewhere, nets.RegisteredBackwards,
              nets.Functional, nets.Stashing, nets.DictOutput, nets.InAutocast, nets.conv_bn)
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_it_sees_what_the_exported_graph_shows(name: str) -> None:
    model = lived_in(NETS[name]())
    channels = 4 if name in ("CalledTwice", "NormOnConvAndRelu") else 3
    facts = gather(model, [as_call(torch.randn(2, channels, 9, 9))])
    expected = pairs(facts.routes[0], {k: t.owners[0] for k, t in facts.tensors.items()})
    route, names = traced(model)
    found = pairs(route, names)
    kept = {w.removesuffix(".weight") for w, _ in found.values()} & {
        op.site.path for op in route.ops if op.target.startswith("something that keeps")
    }
    assert {n: (w, r - (w.removesuffix(".weight") in kept)) for n, (w, r) in found.items()} == expected
    settings = ("stride", "padding", "dilation", "groups", "eps", "training", "momentum")
    mine, theirs = (
        [{k: v for k, v in op.attrs.items() if k in settings} for op in r.ops if op.kind in (*LAYERS, "norm")]
        for r in (route, facts.routes[0])
    )
    assert mine == theirs
    reads = [sorted(set(op.tensors.values())) for op in route.ops if op.kind in LAYERS]
    assert reads == [sorted(set(op.tensors.values())) for op in facts.routes[0].ops if op.kind in LAYERS]


ZOO = ("starnet_s050", "mobilenetv3_small_050", "efficientvit_m0", "tf_mixnet_s", "tv:resnet18", "mobilevitv2_050")


@pytest.mark.parametrize(
    "name",
    [n if n in ZOO else pytest.param(n, marks=pytest.mark.zoo) for n in zoo.NAMES if n not in zoo.UNTRACEABLE],
)
def test_architectures_trace_and_agree_with_the_exported_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "disturb", lambda model, x: None)
    model, x = zoo.build(name)
    route, names = traced(model)
    found = pairs(route, names)
    assert found
    facts = gather(model, [as_call(x[:1])])
    exported = pairs(facts.routes[0], {k: t.owners[0] for k, t in facts.tensors.items()})
    for norm, (weight, readers) in found.items():
        if readers == 1:  # what could be folded: there the exported graph says so too
            assert exported[norm] == (weight, 1)


@pytest.mark.parametrize("name", sorted(zoo.UNTRACEABLE))
def test_detection_models_are_refused_with_the_next_step(name: str) -> None:
    import torchvision

    model = torchvision.models.get_model(name[3:], weights=None, weights_backbone=None)
    with pytest.raises(TraceError, match="without an input") as caught:
        traced(model)
    assert "--input" in str(caught.value)


# ----------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("layer", "target", "attrs"),
    [
        (nn.Conv1d(3, 4, 3, stride=2), "aten.conv1d.default", {"stride": (2,), "groups": 1}),
        (nn.Conv2d(4, 4, 3, padding="same", groups=2), "aten.conv2d.padding", {"padding": "same", "groups": 2}),
        (nn.Conv3d(3, 4, 3, dilation=2), "aten.conv3d.default", {"dilation": (2, 2, 2)}),
        (nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), "aten.conv_transpose2d.input", {"output_padding": (1, 1)}),
        (nn.Linear(3, 4, bias=False), "aten.linear.default", {}),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_layers_with_their_settings(layer: nn.Module, target: str, attrs: dict[str, Any]) -> None:
    (op,) = [o for o in traced(nn.Sequential(layer))[0].ops if o.kind in LAYERS]
    assert op.target == target
    assert {k: op.attrs[k] for k in attrs} == attrs
    assert set(op.tensors) == {n for n, _ in layer.named_parameters()}
    assert op.reads == {"input": 0}


def test_functions_with_their_settings() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.ones(4, 3, 3, 3)), nn.Parameter(torch.ones(4))
            self.register_buffer("m", torch.zeros(4))
            self.register_buffer("v", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, bias=self.b, weight=self.w, stride=2)
            return F.batch_norm(y, self.m, self.v, eps=0.25)

    (conv,), (norm,) = ops(Functions(), "conv"), ops(Functions(), "norm")
    assert (conv.target, conv.attrs["stride"], set(conv.tensors)) == ("aten.conv2d.default", (2, 2), {"weight", "bias"})
    assert (norm.attrs["eps"], norm.attrs["training"]) == (0.25, False)
    assert set(norm.tensors) == {"running_mean", "running_var"}
    assert "rank" not in norm.attrs


def test_padding_that_repeats_values_is_an_operation_of_its_own() -> None:
    route, _ = traced(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")))
    assert [op.target for op in route.ops] == ["input", "function pad", "aten.conv2d.default", "output"]
    assert route.ops[1].attrs["mode"] == "circular"
    assert (route.ops[2].reads, route.ops[2].attrs["padding"]) == ({"input": 1}, (0, 0))


@pytest.mark.parametrize(
    ("norm", "rank"),
    [(nn.BatchNorm1d(4), None), (nn.BatchNorm2d(4), 4), (nn.BatchNorm3d(4), 5), (nn.SyncBatchNorm(4), None),
     (BatchNormAct2d(4), 4)],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)  # fmt: skip
def test_rank_is_known_where_the_code_guarantees_it(norm: nn.Module, rank: int | None) -> None:
    (op,) = ops(nn.Sequential(nn.Conv2d(3, 4, 3), norm), "norm")
    assert (op.attrs.get("rank"), op.attrs["channels"]) == (rank, 4)


def test_an_activation_inside_a_norm_is_seen() -> None:
    route, _ = traced(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU)))
    assert [op.target for op in route.ops[2:]] == [
        "aten.batch_norm.default",
        "SiLU_",
        "output",
    ]  # timm's works in place
    assert [str(op.site) for op in route.ops[2:4]] == ["1", "1.act"]


def test_training_and_missing_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4))
    lived_in(model)[2].train()
    copy, _ = copy_model(model)
    route = trace(copy, lambda t: 1)
    found = [op for op in route.ops if op.kind == "norm"]
    assert [op.attrs["training"] for op in found] == [False, True, True]
    assert ["running_mean" in op.tensors for op in found] == [True, False, True]


def test_what_does_nothing_is_no_operation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Dropout(0.5), nn.BatchNorm2d(4))
    assert [op.kind for op in traced(model)[0].ops] == ["input", "conv", "norm", "output"]
    model.eval()[2].train()
    copy, _ = copy_model(model)
    assert "Dropout" in [op.target for op in trace(copy, lambda t: None).ops]


def test_calls_are_counted_and_names_are_those_of_the_walk() -> None:
    assert [str(op.site) for op in ops(nets.CalledTwice(), "norm")] == ["bn", "bn@1"]
    assert [str(op.site) for op in ops(nets.InPlainList(), "norm")] == ["layers[1]"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_computed_weight_is_known_as_such(way: Callable[..., nn.Module]) -> None:
    (op,) = ops(nn.Sequential(way(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), "conv")
    assert op.attrs["computed"] == ("weight",)


def test_no_name_is_one_that_a_carrier_would_follow() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.cat([x, x + 1.0], 1).flatten(1).chunk(2, 1)[0]
            y = F.dropout(F.relu(y, inplace=True), 0.5, self.training)
            return y.add_(1).view(2, -1)

    found = [op.target for op in ops(Many(), "other")]
    assert [t.split()[0] for t in found if t.startswith(("function ", "method "))] == [t.split()[0] for t in found]
    assert [t for t in found if t.endswith("_")] == ["function relu_", "method add_"]


# --------------------------------------------------------------------------- nobody is overlooked


def readers(model: nn.Module) -> list[str]:
    """Who reads the output of the only convolution."""
    route, _ = traced(model)
    (conv,) = [op for op in route.ops if op.kind == "conv"]
    return [op.target for op in route.users(conv.index)]


def test_sizes_are_no_readers_and_numbers_are() -> None:
    class Asks(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            n = y.shape[0] * y.size(1)
            return self.bn(y).reshape(n, -1)

    class Takes(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) * y.detach().mean(dim=(0, 2, 3), keepdim=True)

    assert readers(Asks()) == ["aten.batch_norm.default"]
    assert readers(Takes()) == ["aten.batch_norm.default", "method detach"]


def test_an_output_kept_in_a_closure_has_a_reader() -> None:
    kept: list[Any] = []

    class Keeps(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            kept.append(y)
            return self.bn(y)

    assert "something that keeps it beyond the forward" in readers(Keeps())


def test_a_weight_that_is_read_before_any_input_comes_in_has_a_reader() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.weights = [self.conv.weight]  # a plain list: the tracer does not see it

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.weights[0].square().mean()

    route, names = traced(Early())
    reads = [op.target for op in route.ops if "conv.weight" in {names[k] for k in op.tensors.values()}]
    assert reads == ["square", "aten.conv2d.default"]


class _Opaque(nn.Module):
    """Decides on the size of its input, which nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) if y.shape[-1] > 8 else y


def test_a_module_that_decides_on_sizes_is_one_operation_that_reads_all_its_tensors() -> None:
    route, names = traced(nn.Sequential(nn.Conv2d(3, 4, 3), _Opaque(), nn.BatchNorm2d(4)))
    assert [op.target for op in route.ops] == [
        "input", "aten.conv2d.default", "_Opaque", "aten.batch_norm.default", "output"
    ]  # fmt: skip
    opaque = route.ops[2]
    assert opaque.inputs == (1,)
    assert {names[k] for k in opaque.tensors.values()} >= {"1.conv.weight", "1.bn.running_mean"}


def test_what_lies_on_the_model_is_read_by_what_nobody_looks_into() -> None:
    class Peeks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.box[0] if x.shape[-1] > 8 else x - self.box[0]  # type: ignore[index,operator]

    class Passes(nets.TwoConsumers):
        def __init__(self) -> None:
            super().__init__()
            self.peeks, self.box = Peeks(), [None]
            self.peeks.box = self.box  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            self.box[0] = y  # type: ignore[call-overload]
            z = self.peeks(self.bn(y))
            self.box[0] = None
            return z  # type: ignore[no-any-return]

    assert "Peeks" in readers(Passes())


@pytest.mark.parametrize("how", ["data", "item", "class"])
def test_numbers_that_are_changed_behind_the_graph_are_refused(how: str) -> None:
    class Changes(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if how == "data":
                y.data = x.data
            elif how == "item":
                y[0] = 1.0
            else:
                y.__class__ = nn.Parameter
            return self.bn(y)

    with pytest.raises(TraceError, match="without an input"):
        traced(Changes())


def test_isinstance_and_hasattr_tell_what_they_tell_of_a_tensor() -> None:
    class Asks(nets.TwoConsumers):
        def forward(self, x: Any) -> Any:
            x = x.tensors if hasattr(x, "tensors") else x
            y = self.conv(x)
            return self.bn(y) if isinstance(y, Tensor) and not isinstance(y, (nn.Parameter, list)) else y

    assert readers(Asks()) == ["aten.batch_norm.default"]


def test_arguments_with_defaults_are_what_they_are_by_default() -> None:
    class Optional(nets.TwoConsumers):
        def forward(self, x: Tensor, mask: Tensor | None = None, aux: bool = False) -> Any:  # type: ignore[override]
            y = self.conv(x)
            if mask is not None:
                y = y * mask
            return (self.bn(y), y) if aux else self.bn(y)

    assert readers(Optional()) == ["aten.batch_norm.default"]
    assert traced(Optional())[0].signature == "any input (x)"


@pytest.mark.parametrize("build", [nets.ShapeRoute, nets.DataDependent])
def test_a_model_that_decides_on_its_input_is_refused(build: Callable[[], nn.Module]) -> None:
    model = lived_in(build())
    before = bits(model)
    with pytest.raises(TraceError, match="decides on its input") as caught:
        traced(model)
    assert "--input" in str(caught.value)
    assert same_bits(model, before)


def test_a_forward_that_goes_another_way_the_next_time_is_refused() -> None:
    class Alternates(nets.TwoConsumers):
        seen = 0

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            y = self.conv(x)
            return self.bn(y) + y if self.seen % 2 == 0 else self.bn(y)

    with pytest.raises(TraceError, match="another way the next time"):
        traced(Alternates())


def test_nothing_of_a_trace_lasts() -> None:
    call, attribute = nn.Module.__call__, nn.Module.__getattr__
    with pytest.raises(TraceError):
        traced(nets.DataDependent())
    traced(nets.conv_bn())
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is attribute
