"""Ways to be silently wrong, or to touch what is the user's, that an adversary found. One test each."""

from __future__ import annotations

import collections
import contextlib
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import nets
import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from nets import PassesOn, lived_in, relative_error
from torch import Tensor, nn

import bnfix
from bnfix.errors import TraceError

IMAGE = (2, 3, 8, 8)


def reasons(result: bnfix.Result) -> str:
    return " | ".join(r.reason for r in result.refusals)


def fold(model: nn.Module, example: Any = None, **options: Any) -> bnfix.Result:
    """Fold without comparing outputs: the plan, the weights and the trace have to be right by themselves."""
    result = bnfix.fold(lived_in(model), torch.randn(IMAGE) if example is None else example, verify=False, **options)
    assert not any(r.defect for r in result.refusals), result.refusals
    return result


# ----------------------------------------------------------------------- who sees the layer's output


@pytest.mark.parametrize("container", [[], {}], ids=["list", "dict"])
def test_argument_that_the_forward_fills(container: Any) -> None:
    class Fills(nets.TwoConsumers):
        def forward(self, x: Tensor, feats: Any) -> Tensor:  # type: ignore[override]
            y = self.conv(x)
            feats.append(y) if isinstance(feats, list) else feats.update(y=y)
            return self.bn(y)

    result = fold(Fills(), (torch.randn(IMAGE), container))
    assert "keeps the output of conv" in reasons(result)
    assert len(container) == 0


def test_argument_filled_behind_a_forward_of_the_users() -> None:
    class Fills(nets.TwoConsumers):
        def forward(self, x: Tensor, feats: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            feats["y"] = self.conv(x)
            return self.bn(feats["y"])

    result = fold(Fills(), torch.randn(IMAGE), forward=lambda m, b: m(b, {}))
    assert "keeps the output of conv" in reasons(result)


def test_state_made_in_the_first_run_only() -> None:
    class Caches(nets.TwoConsumers):
        cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if self.cache is None:
                self.cache = y.mean().detach()
            return self.bn(y)

    result = fold(Caches())
    assert not result.edits
    assert "also used by aten.mean" in reasons(result)
    assert "writes cache" in result.notes[0]


def test_route_by_dice() -> None:
    class Dice(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) if random.random() < 2 else y

    before = random.getstate()
    result = fold(Dice())
    assert "random numbers" in reasons(result)
    assert random.getstate() == before


# ------------------------------------------------------------------------------ who reads the weight


def test_bias_none_used_by_two_layers_of_one_module() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.randn(4, 3, 1, 1))
            self.bias, self.bn = None, nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.bn(F.conv2d(x, self.w1, self.bias)), F.conv2d(x, self.w2, self.bias)

    result = fold(Two())
    assert not result.edits
    assert "no bias of its own" in reasons(result)


@pytest.mark.parametrize("kind", ["partial", "list", "tuple"])
def test_weight_read_through_another_name(kind: str) -> None:
    class Other(nets.TwoConsumers):
        def __init__(self) -> None:
            super().__init__()
            weight, bias = self.conv.weight, self.conv.bias
            self.f = partial(F.conv2d, weight=weight, bias=bias)
            self.ws: Any = [weight, bias] if kind == "list" else (weight, bias)

        def forward(self, x: Tensor) -> Tensor:
            y = self.f(x) if kind == "partial" else F.conv2d(x, self.ws[0], self.ws[1])
            return self.bn(y)

    model, x = lived_in(Other()), torch.randn(IMAGE)
    result = bnfix.fold(model, x, verify=False)
    assert result.model is not None
    assert relative_error(result.model(x), model(x)) < 1e-6


def test_weight_that_is_an_output() -> None:
    class Returns(nets.TwoConsumers):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return self.bn(self.conv(x)), self.conv.weight

    assert "conv.weight is also read by the model's output" in reasons(fold(Returns()))


def test_attributes_of_a_parameter_stay() -> None:
    class Special(nn.Parameter):
        pass

    model = nets.conv_bn()
    model[0].weight = Special(model[0].weight.data)
    model[0].weight._no_weight_decay = True  # type: ignore[attr-defined]
    result = fold(model)
    assert result.model is not None
    assert type(result.model[0].weight) is Special
    assert result.model[0].weight._no_weight_decay


# ------------------------------------------------------------------------------ what a norm does besides


def test_norm_whose_submodules_run_side_by_side() -> None:
    class Side(nn.BatchNorm2d):
        def __init__(self, c: int) -> None:
            super().__init__(c)
            self.f, self.g = nn.ReLU(), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.f(y)
            return self.g(y)

    result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), Side(4)))
    assert not result.edits
    assert "side by side" in reasons(result)


def test_plain_norm_called_by_its_parts() -> None:
    class Parts(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            bn = self.bn
            return F.batch_norm(self.conv(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)

    assert "functional call" in reasons(fold(Parts()))


def test_forward_that_asks_for_the_norms_weight() -> None:
    class Asks(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x.to(self.bn.weight.dtype) * 1))

    result = fold(Asks())
    assert not result.edits
    assert "the model needs it to be there" in reasons(result)
    assert "no attribute 'weight'" in reasons(result)


def test_many_such_forwards_do_not_take_for_ever() -> None:
    class Asks(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x.to(self.bn.weight.dtype)))

    layers = []
    for i in range(40):
        block = Asks()
        block.conv = nn.Conv2d(3 if i == 0 else 4, 4, 1)
        layers.append(block)
    said: list[str] = []
    result = fold(nn.Sequential(*layers), progress=said.append)
    assert len(result.refusals) == 40
    assert sum(s.startswith("folding") for s in said) < 70


def test_weights_standardised_with_batch_norm_are_no_norms() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
            return F.conv2d(x, w.reshape_as(self.weight), self.bias)

    result = fold(nn.Sequential(Scaled(3, 4, 3), nn.ReLU()))
    assert result.norms == 0


def test_wrapper_that_hands_attributes_through_is_no_norm() -> None:
    result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), PassesOn(nn.BatchNorm2d(4))))
    assert [e.site for e in result.edits] == ["1.inner"]
    assert not result.refusals


def test_own_norm_that_does_more_is_not_called_unreached() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(4))
            self.register_buffer("running_var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            shape = (1, -1, 1, 1)
            return F.relu((x - self.running_mean.view(shape)) * (self.running_var + 1).rsqrt().view(shape))

    assert "not recognised as a normalization" in reasons(fold(nn.Sequential(nn.Conv2d(3, 4, 1), Own())))


def test_one_norm_on_layers_of_two_kinds() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.a(x)) + self.bn(self.b(x))

    model, x = lived_in(Both()), torch.randn(IMAGE)
    result = bnfix.fold(model, x)
    assert result.edits[0].into == ("a", "b")
    assert result.model is not None
    assert relative_error(result.model(x), model(x)) < 1e-6


def test_nan_constant_is_the_same_constant() -> None:
    class Masks(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)).masked_fill(x[:, :1, 2:, 2:] > 100, float("nan"))

    assert len(fold(Masks()).edits) == 1


def test_inside_vmap() -> None:
    class Mapped(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda t: self.bn(self.conv(t[None]))[0])(x)

    with contextlib.suppress(TraceError):  # an older torch can't trace it; no PassError: nobody's forward is blamed
        assert bnfix.fold(lived_in(Mapped()), torch.randn(IMAGE)).norms == 1


def test_sparse_output() -> None:
    class Sparse(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)).relu().to_sparse()

    result = bnfix.fold(lived_in(Sparse()), torch.randn(IMAGE))
    assert result.parity is not None
    assert result.parity.passed


@pytest.mark.skipif(not hasattr(torch.utils.flop_counter._FlopCounterMode, "supports_higher_order_operators"),
                    reason="this torch runs torch.cond under no dispatch mode")  # fmt: skip
def test_cond_behind_the_norm() -> None:
    class Branches(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda v: v * 2, lambda v: v * 1.0, (self.bn(self.conv(x)),))

    result = bnfix.fold(lived_in(Branches()), torch.randn(IMAGE))
    assert len(result.edits) == 1


# --------------------------------------------------------------------------------- the user's things

SEEN: list[Tensor] = []
STORE: dict[str, list[Tensor]] = collections.defaultdict(list)


def _global_hook(module: nn.Module, args: Any, out: Tensor) -> None:
    SEEN.append(out)
    STORE["x"].append(out)


def test_lists_that_hooks_and_forwards_write_to_are_as_they_were() -> None:
    default: list[Tensor] = []
    nested: list[Tensor] = []
    own: list[Tensor] = []
    fed: list[Tensor] = []

    def save(t: Tensor) -> None:
        nested.append(t)

    class Writes(nn.Module):
        log: list[Tensor] = []  # noqa: RUF012  # on the class, on purpose

        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            own.append(x)
            self.log.append(x)
            return self.act(x)

    model = lived_in(nn.Sequential(*nets.conv_bn(), Writes()))
    act = model[2].act
    act.register_forward_hook(_global_hook)
    act.register_forward_hook(lambda m, i, o, kept=default: kept.append(o))
    act.register_forward_hook(lambda m, i, o: save(o))
    bnfix.fold(model, torch.randn(IMAGE), forward=lambda m, b: (fed.append(b), m(b))[1])
    assert [len(x) for x in (SEEN, STORE, default, nested, own, Writes.log, fed)] == [0] * 7


def test_large_plain_attributes_cost_next_to_nothing() -> None:
    model = lived_in(nets.conv_bn())
    model.vocabulary = {f"word{i}": i for i in range(200_000)}
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert result.model is not None
    assert result.model.vocabulary == model.vocabulary
    assert result.model.vocabulary is not model.vocabulary


# ----------------------------------------------------------------------------------------- errors


def test_lazy_module_is_asked_to_run_first() -> None:
    with pytest.raises(TraceError, match="0 is not initialised yet"):
        bnfix.fold(nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(IMAGE))


@pytest.mark.parametrize("model", ["timm:resnet18", {"w": torch.ones(1)}, None, lambda x: x], ids=str)
def test_what_is_no_module_is_a_type_error(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model is an nn\.Module"):
        bnfix.fold(model, torch.randn(IMAGE))


@pytest.mark.parametrize("k", [0, -1, float("nan"), float("inf")])
def test_k_is_a_positive_number(k: float) -> None:
    with pytest.raises(ValueError, match="k is a positive number"):
        bnfix.fold(lived_in(nets.conv_bn()), torch.randn(IMAGE), k=k)


def test_output_that_export_does_not_know_is_recorded_from_runs() -> None:
    @dataclass
    class Out:
        y: Tensor

    class Returns(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Out:  # type: ignore[override]
            return Out(self.bn(self.conv(x)))

    model = lived_in(Returns())
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert (result.source, len(result.edits)) == ("observed", 1)
    assert any("torch.export can't trace" in note for note in result.notes)
    assert result.model is not None
    x = torch.randn(IMAGE)
    assert relative_error(result.model(x).y, model(x).y) < 1e-6
    result = fold(Returns(), torch.randn(IMAGE), forward=lambda m, b: m(b).y)
    assert len(result.edits) == 1
