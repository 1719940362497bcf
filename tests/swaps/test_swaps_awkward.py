"""Awkward models: what the run of a model can hide from a tool, and what it must not."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from nets import DataDependent, InAutocast, ShapeRoute, Stashing, bits, lived_in, relative_error, same_bits
from swaps.swap_nets import Small, batches, fitted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnfix

DATA = batches(8, 3, 8, 8)


class Clipping(nn.BatchNorm2d):
    """Does something that no ordinary input shows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-20, 20)


class Rectified(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def conv(norm: nn.Module) -> nn.Module:
    return lived_in(nn.Sequential(nn.Conv2d(3, 16, 3), norm))


@pytest.mark.parametrize("norm", [Clipping, Rectified])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_a_subclass_does_is_not_missed(norm: type[nn.Module], dtype: torch.dtype) -> None:
    """In half precision a lost activation is only some roundings away; far from the mean a clip shows."""
    model = conv(norm(16)).to(dtype)
    data = [x.to(dtype) for x in DATA]
    result = bnfix.swap(model, data=data)
    assert not result.edits
    assert "does more in its forward" in result.refusals[0].reason
    with torch.no_grad():  # where every output is positive, the activation does nothing on the data
        model[1].bias.fill_(30.0)
    assert not bnfix.swap(model, data=data).edits


def test_a_norm_inside_a_transform_is_refused() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.rest = nn.BatchNorm2d(16), conv(nn.BatchNorm2d(16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.bn)(self.rest(x)[None])[0]

    model = lived_in(Mapped())
    result = bnfix.swap(model, data=DATA)
    assert [e.site for e in result.edits] == ["rest.1"]
    assert "transform of torch.func" in result.refusals[0].reason


class ByName(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn1(input=self.c1(x))).mean((2, 3)))


class Checkpointed(Small):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Inferring(Small):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().forward(x)


class InPlace(Small):
    """Changes what a norm was given, and what it gave."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.c1(x)
        y = self.bn1(x).relu_()
        x.mul_(0.5).add_(y)
        y = self.bn2(self.c2(x))
        y += x
        return self.head(self.bn3(self.c3(y.relu_())).relu_().mean((2, 3)))


class Switching(Small):
    """Has its own ``train``, which does more than set flags."""

    def train(self, mode: bool = True) -> Any:
        if not mode:
            with torch.no_grad():
                for p in self.parameters():
                    p.mul_(1.0)
            self.switched = getattr(self, "switched", 0) + 1
        return super().train(mode)


@pytest.mark.parametrize("net", [ByName, Checkpointed, Inferring, InPlace, Switching])
def test_it_is_fitted_all_the_same(net: type[nn.Module]) -> None:
    model = fitted(net(), DATA)
    values, attributes = bits(model), dict(vars(model))
    result = bnfix.swap(model, "group", groups=1, data=DATA)
    assert len(result.edits) == (1 if net is ByName else 3)
    assert same_bits(model, values)
    assert vars(model) == attributes
    with torch.no_grad():
        near = relative_error(result.model(DATA[0]), model(DATA[0]))
        fresh = bnfix.swap(model, "group", groups=1, data=DATA, init="fresh").model
        assert near < 0.7 * relative_error(fresh(DATA[0]), model(DATA[0]))
    assert all(p.requires_grad and not p.is_inference() for p in result.model.parameters() if p is not None)


def test_in_place_arithmetic_is_fitted_to_what_the_norms_saw() -> None:
    """The input of a norm is overwritten behind it: it is kept as it was when the norm was called."""
    data = batches(8, 3, 8, 8, dtype=torch.float64)
    model = fitted(InPlace().double(), data)
    found = bnfix.swap(model, groups=1, data=data).model
    with torch.no_grad():
        x = model.c1(torch.cat(data))
        z = F.group_norm(x, 1)
        y = model.bn1(x)
        axes = (0, 2, 3)
        scale = (y.var(axes, correction=0) / z.var(axes, correction=0)).sqrt() * torch.sign(model.bn1.weight)
    torch.testing.assert_close(found.bn1.weight.detach(), scale, rtol=1e-9, atol=1e-12)


def test_inside_inference_mode_the_new_parameters_can_learn() -> None:
    model = fitted(Small(), DATA)
    with torch.inference_mode():
        result = bnfix.swap(model, data=DATA)
    result.model.train()(DATA[0]).sum().backward()
    assert result.model.bn1.weight.grad is not None


def test_a_norm_in_a_list_is_in_evaluation_mode_too() -> None:
    """``eval()`` of the model does not reach it; fitted to the statistics of a batch it would be something else."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Conv2d(3, 16, 3), lived_in(nn.BatchNorm2d(16)).train()]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    model = Held().eval()
    before = {k: v.clone() for k, v in model.layers[1].state_dict().items()}
    result = bnfix.swap(model, data=DATA)
    assert all(torch.equal(before[k], v) for k, v in model.layers[1].state_dict().items())
    assert model.layers[1].training
    assert result.model.layers[1].training
    model.layers[1].eval()
    again = bnfix.swap(model, data=DATA)
    assert torch.equal(again.model.layers[1].weight, result.model.layers[1].weight)


@pytest.mark.parametrize("net", [DataDependent, InAutocast, ShapeRoute, Stashing])
def test_awkward_forwards(net: type[nn.Module]) -> None:
    model = lived_in(net())
    values = bits(model)
    result = bnfix.swap(model, data=DATA)
    assert len(result.edits) == 1
    assert same_bits(model, values)
    assert result.edits[0].r2 > 0.5


def test_a_batch_of_several_inputs_and_forwards() -> None:
    """Triplets: the norms are called three times in one call of the loader's, and pooled."""
    model = fitted(Small(), DATA)
    data = [(a, b, a + 1) for a, b in zip(DATA, DATA[::-1], strict=True)]
    result = bnfix.swap(model, data=data, forward=lambda m, b: [m(x) for x in b])
    assert result.edits[0].calls == ("bn3", "bn3@1", "bn3@2")
    assert all(e.r2 > 0.5 for e in result.edits)
    parts = bnfix.swap(model, groups=1, data=[x for b in data for x in b]).model
    pooled = bnfix.swap(model, groups=1, data=data, forward=lambda m, b: [m(x) for x in b]).model
    for path in ("bn1", "bn2", "bn3"):  # the same samples: settled to 1e-3 a round
        assert relative_error(pooled.get_submodule(path).weight, parts.get_submodule(path).weight) < 5e-3


def test_a_network_of_timm_with_fused_activations() -> None:
    torch.manual_seed(0)
    data = batches(8, 3, 64, 64)
    model = timm.create_model("efficientnet_lite0", num_classes=7).train()
    with torch.no_grad():
        for x in data:
            model(x)
    model.eval()
    result = bnfix.swap(model, "group", data=data)
    assert not result.refusals
    assert len(result.edits) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in result.model.modules())
    activations = [type(m) for m in model.modules() if isinstance(m, nn.ReLU6)]
    assert [type(m) for m in result.model.modules() if isinstance(m, nn.ReLU6)] == activations
    assert result.model(data[0]).shape == (8, 7)
