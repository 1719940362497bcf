"""Computed weights become constants: bit for bit what the forward computes, or a reason why not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize as P
import torch.nn.utils.prune as prune
from nets import bits, lived_in, relative_error, same_bits
from timm.layers import ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bnfix
from bnfix.graph import Surgeon, gather
from bnfix.graph.baking import Baked, bake, transfer
from bnfix.graph.plain_layers import rebuild
from bnfix.running import as_call

pytestmark = pytest.mark.filterwarnings("ignore")  # torch deprecates the old weight_norm and spectral_norm
IMAGE = (2, 3, 8, 8)
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class Behind(nn.Module):
    """A layer under test, a norm behind it."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...] = IMAGE, channels: int = 4) -> None:
        super().__init__()
        self.layer, self.bn = layer, NORMS[len(shape)](channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.layer(x))  # type: ignore[no-any-return]


def disturbed(model: nn.Module) -> nn.Module:
    """No magnitude, direction or gain at the value that it starts with; one run, so that caches are filled."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("bn"):
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return lived_in(model)


def baked(model: nn.Module, *shapes: tuple[int, ...], only: Any = None) -> Baked:
    calls = [as_call(torch.randn(s)) for s in shapes or (IMAGE,)]
    return bake(model, gather(model, calls), calls, only)


def pruned() -> nn.Module:
    layer = nn.Conv2d(3, 4, 3)
    prune.l1_unstructured(layer, "weight", 0.5)  # type: ignore[no-untyped-call]
    prune.random_unstructured(layer, "bias", 0.5)  # type: ignore[no-untyped-call]
    return layer


class _Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2 - weight.mean()


def parametrized() -> nn.Module:
    layer = nn.Conv2d(3, 4, 3, stride=2)
    P.register_parametrization(layer, "weight", _Twice())
    P.register_parametrization(layer, "bias", _Twice())
    return layer


class Own(nn.Module):
    """Somebody's own layer, with its weight in a submodule and functions that nobody has named."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.temperature, self.groups = nn.Conv2d(4, 4, 3, bias=False), nn.Parameter(torch.ones(())), 2

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.softmax(self.inner.weight.flatten(1) / self.temperature, 1).view_as(self.inner.weight)[:, :2]
        return torch.conv2d(x, weight, None, (1, 2), (2, 1), groups=self.groups)


class Sets(nn.Module):
    """Sets the weight of its layer in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.raw = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(4, 3, 3, 3))
        del self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight = torch.tanh(self.raw)
        return self.inner(x)  # type: ignore[no-any-return]


IMAGES: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
    "old weight_norm": lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3, bias=False)),
    "weight_norm over all": lambda: nn.utils.weight_norm(nn.Conv2d(3, 4, 3), dim=None),  # type: ignore[arg-type]
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
    "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Conv2d(3, 4, 3, padding="same")),
    "pruned": pruned,
    "parametrized": parametrized,
    "StdConv2d": lambda: StdConv2d(3, 4, 3, stride=2),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(3, 4, 3, dilation=2),
    "static same padding": lambda: StdConv2dSame(3, 4, 3),
    "circular": lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="circular")),
    "reflect": lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect")),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: parametrizations.weight_norm(nn.Linear(5, 4)), (3, 5), 4),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(5, 4, bias=False)), (3, 5), 4),
    "conv1d": (lambda: nn.utils.weight_norm(nn.Conv1d(4, 4, 3, groups=2, dilation=2)), (2, 4, 9), 4),
    "conv3d": (lambda: parametrizations.spectral_norm(nn.Conv3d(2, 4, 2)), (2, 2, 4, 4, 4), 4),
    "transposed": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, dilation=2)), (2, 4, 5, 5), 6
    ),
    "own": (Own, (2, 4, 8, 8), 4),
    "set by its parent": (Sets, IMAGE, 4),
}  # fmt: skip
CASES = {**{n: (b, IMAGE, 4) for n, b in IMAGES.items()}, **OTHERS}


@pytest.mark.parametrize("name", CASES)
def test_baking_changes_no_bit_of_any_output(name: str) -> None:
    build, shape, channels = CASES[name]
    model = disturbed(Behind(build(), shape, channels))
    before = bits(model)
    result = baked(model, shape, (shape[0] + 1, *shape[1:]))
    assert result.refusals == {}
    assert [e.site for e in result.edits] == ["layer"]
    plain = result.model.layer
    assert type(plain).__module__.startswith("torch.nn.modules.")
    keys = ["layer.weight"] + (["layer.bias"] if plain.bias is not None else [])
    assert [k for k in result.model.state_dict() if k.startswith("layer")] == keys
    x = torch.randn(shape) * 2
    assert torch.equal(result.model(x), model(x))
    assert same_bits(model, before)
    assert not {p.data_ptr() for p in result.model.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("name", CASES)
def test_what_was_baked_can_be_folded(name: str) -> None:
    build, shape, channels = CASES[name]
    model = disturbed(Behind(build(), shape, channels))
    result = bnfix.fold(baked(model, shape).model, torch.randn(shape))
    assert [e.site for e in result.edits] == ["bn"]
    assert result.model is not None
    x = torch.randn(shape)
    assert relative_error(result.model(x), model(x)) < 1e-6  # two roundings of weights of order one, tenfold


def test_weight_norm_by_its_own_formula() -> None:
    model = disturbed(Behind(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))))
    g, v = (p.detach().double() for p in model.layer.parametrizations.weight.parameters())  # type: ignore[union-attr]
    expected = g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = baked(model).model.layer.weight
    assert relative_error(found, expected) < 2e-7  # float32: two roundings and a norm of 27 numbers


def test_spectral_norm_by_its_own_formula() -> None:
    model = disturbed(Behind(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))))
    step = model.layer.parametrizations.weight[0]  # type: ignore[union-attr,index]
    weight = model.layer.parametrizations.weight.original.detach().double()  # type: ignore[union-attr]
    sigma = step._u.double() @ weight.flatten(1) @ step._v.double()
    assert relative_error(baked(model).model.layer.weight, weight / sigma) < 4e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_type_of_the_weight_stays(dtype: torch.dtype) -> None:
    model = disturbed(Behind(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))).to(dtype)
    x = torch.randn(IMAGE, dtype=dtype)
    calls = [as_call(x)]
    result = bake(model, gather(model, calls), calls)
    assert result.model.layer.weight.dtype == dtype
    assert torch.equal(result.model(x), model(x))


def test_flags_settings_and_aliases_stay() -> None:
    layer = ScaledStdConv2d(3, 4, 3)
    model = disturbed(Behind(layer).requires_grad_(False))
    model.alias, model.registry = layer, {"first": [layer]}
    layer.training, layer.lr_mult = True, 0.5
    result = baked(model)
    plain = result.model.layer
    assert result.layers[0].paths == ("layer", "alias", "registry['first'][0]")
    assert result.model.alias is plain
    assert result.model.registry["first"][0] is plain
    assert not any(p.requires_grad for p in plain.parameters())
    assert plain.training
    assert (plain.lr_mult, plain.eps) == (0.5, layer.eps)
    other = baked(disturbed(Behind(StdConv2d(3, 4, 3)))).model.layer
    assert all(p.requires_grad for p in other.parameters())
    assert not other.training


def test_a_bias_that_is_the_layers_own_stays_the_same_object() -> None:
    model = disturbed(Behind(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))))
    model.tied = model.layer.bias
    result = baked(model)
    assert result.model.layer.bias is result.model.tied


def test_a_layer_called_twice_is_one_layer() -> None:
    class Twice(Behind):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.layer(torch.relu(self.layer(x))))  # type: ignore[no-any-return]

    model = disturbed(Twice(nn.utils.weight_norm(nn.Conv2d(4, 4, 3))))
    result = baked(model, (2, 4, 9, 9), (1, 4, 12, 12))
    x = torch.randn(1, 4, 10, 10)
    assert len(result.layers) == 1
    assert torch.equal(result.model(x), model(x))


def test_only_those_that_are_asked_for() -> None:
    model = nn.Sequential(*(nn.utils.weight_norm(nn.Conv2d(3, 3, 1)) for _ in range(3)))
    result = baked(model, only={"1"})
    assert [e.site for e in result.edits] == ["1"]
    assert result.refusals == {}
    assert [hasattr(m, "weight_g") for m in result.model.children()] == [True, False, True]


@pytest.mark.parametrize("path", ["layer", "layer.inner"])
def test_a_call_site_is_as_good_as_the_layers_name(path: str) -> None:
    assert [e.site for e in baked(disturbed(Behind(Sets())), only={path}).edits] == ["layer"]


# ----------------------------------------------------------------------------------------- refusals


def why(model: nn.Module, *shapes: tuple[int, ...]) -> str:
    """The reason why nothing was baked; the copy then is the model as it was."""
    state = copy.deepcopy(model.state_dict())
    result = baked(model, *shapes)
    assert result.layers == ()
    assert list(result.model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, state[key]) for key, value in result.model.state_dict().items())
    return " | ".join(result.refusals.values())


@pytest.mark.parametrize("way", [parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_power_iteration_that_still_moves_is_refused(way: Callable[..., nn.Module]) -> None:
    model = disturbed(Behind(way(nn.Conv2d(3, 4, 3))))
    model.layer.train()
    assert "another one in each call" in why(model)


def test_padding_that_depends_on_the_size_is_refused() -> None:
    assert "pads its input itself" in why(disturbed(Behind(StdConv2dSame(3, 4, 3, stride=2))))


def test_weight_that_depends_on_the_input_is_refused() -> None:
    class Attends(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * x.mean().sigmoid(), self.bias)

    assert "depends on the model's input" in why(disturbed(Behind(Attends(3, 4, 3))))


def test_random_weights_are_refused() -> None:
    class Noisy(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight + 0.1 * torch.randn(self.weight.shape), self.bias)

    assert "another one in each call" in why(disturbed(Behind(Noisy(3, 4, 3))))


class _Bits(nn.Conv2d):
    """Rounds its weight to as many steps as somebody outside tells it to."""

    steps = 4

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.round(self.weight * self.steps) / self.steps, self.bias)


@pytest.mark.parametrize("steps", [(4, 8), (8, 8)], ids=["another in each call", "not what it is by itself"])
def test_a_weight_that_is_told_from_outside_is_refused(steps: tuple[int, int]) -> None:
    class Switches(Behind):
        def forward(self, x: Tensor) -> Tensor:
            out = []
            for self.layer.steps in steps:
                out.append(self.layer(x))
            del self.layer.steps
            return self.bn(out[0]) + out[1]  # type: ignore[no-any-return]

    reason = why(disturbed(Switches(_Bits(3, 4, 3))))
    assert ("another one in each call" if steps == (4, 8) else "not the same by itself") in reason


def test_different_settings_are_refused() -> None:
    class Dilates(_Bits):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, torch.round(self.weight * 4) / 4, self.bias, dilation=2 if x.shape[-1] > 8 else 1)

    assert "different settings" in why(disturbed(Behind(Dilates(3, 4, 3))), IMAGE, (2, 3, 12, 12))


def test_a_computed_weight_that_is_used_outside_is_refused() -> None:
    class Gives(_Bits):
        def forward(self, x: Tensor) -> Any:
            weight = torch.round(self.weight * 4) / 4
            return F.conv2d(x, weight, self.bias), weight

    class Takes(Behind):
        def forward(self, x: Tensor) -> Tensor:
            y, weight = self.layer(x)
            return self.bn(y) * weight.mean()  # type: ignore[no-any-return]

    assert "also used outside" in why(disturbed(Takes(Gives(3, 4, 3))))


@pytest.mark.parametrize("what", ["weight", "original"])
def test_what_the_weight_is_computed_from_is_read_elsewhere(what: str) -> None:
    class Reads(Behind):
        def forward(self, x: Tensor) -> Tensor:
            read = self.layer.weight if what == "weight" else self.layer.parametrizations.weight.original1
            return super().forward(x) * read.mean()

    assert "is also read by" in why(disturbed(Reads(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))))


def test_weights_tied_to_another_layer_are_refused() -> None:
    class Ties(Behind):
        def __init__(self) -> None:
            super().__init__(nn.utils.weight_norm(nn.Conv2d(3, 4, 3)))
            self.other = nn.Conv2d(3, 4, 3)
            self.other.weight = self.layer.weight_v

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.other(x)  # type: ignore[no-any-return]

    assert "layer.weight_v, which its weight is computed from, is also read by aten.conv2d" in why(disturbed(Ties()))


@pytest.mark.parametrize("where", ["layer", "inside"])
def test_other_hooks_are_refused(where: str) -> None:
    model = disturbed(Behind(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))))
    module = model.layer if where == "layer" else model.layer.parametrizations.weight  # type: ignore[union-attr]
    module.register_forward_hook(_looks)  # type: ignore[union-attr]
    assert "it has a hook (_looks)" in why(model)


def _looks(module: nn.Module, args: Any, out: Any) -> None:
    pass


def test_a_forward_that_does_more_is_refused() -> None:
    class Activates(StdConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    assert "also does aten.relu" in why(disturbed(Behind(Activates(3, 4, 3))))


def test_a_weight_made_in_the_models_own_forward_is_refused() -> None:
    class Inline(Behind):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.conv2d(x, self.layer.weight * 2))  # type: ignore[no-any-return]

    assert "in another module's forward" in why(disturbed(Inline(nn.Conv2d(3, 4, 3))))


def test_under_autocast_it_is_refused() -> None:
    class Casts(Behind):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.layer(x)
            return self.bn(y.float())  # type: ignore[no-any-return]

    assert "autocast" in why(disturbed(Casts(parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)))))


@pytest.mark.parametrize(("pad", "reason"), [((1, 1, 0, 0), "gives"), ((0, 2, 2, 0), "computes something else")])
def test_padding_that_was_changed_behind_the_back_is_refused(pad: tuple[int, ...], reason: str) -> None:
    layer = nn.utils.weight_norm(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"))
    layer._reversed_padding_repeated_twice = list(pad)
    assert f"as a plain layer {'it gives' if reason == 'gives' else 'with the same weight it ' + reason}" in why(
        disturbed(Behind(layer))
    )


def test_a_weight_that_is_not_finite_is_refused() -> None:
    model = disturbed(Behind(nn.utils.weight_norm(nn.Conv2d(3, 4, 3))))
    with torch.no_grad():
        model.layer.weight_v[1].zero_()  # 0/0
    assert "not finite" in why(model)


class _Asks(Behind):
    """Asks for what only the computed form has, or for its class."""

    def __init__(self, how: str) -> None:
        super().__init__(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
        self.how, self.other = how, nn.utils.weight_norm(nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(super().forward(x))
        if self.how == "class":
            return y if P.is_parametrized(self.layer) else 2 * y
        return y * self.layer.parametrizations.weight.original0.shape[0]  # type: ignore[no-any-return,union-attr]


@pytest.mark.parametrize("how", ["attribute", "class"])
def test_what_the_model_needs_to_be_there_stays_and_the_rest_goes(how: str) -> None:
    model = disturbed(_Asks(how))
    result = baked(model)
    assert [e.site for e in result.edits] == ["other"]
    assert ("needs it to be there" if how == "attribute" else "something else without it") in result.refusals["layer"]
    x = torch.randn(IMAGE)
    assert torch.equal(result.model(x), model(x))


def test_where_it_cannot_be_put_it_is_refused() -> None:
    model = disturbed(Behind(nn.utils.weight_norm(nn.Conv2d(3, 4, 3))))
    model.pair = (model.layer, 1)
    assert "can't be changed" in why(model)


# ------------------------------------------------------------------------- the original, and a file


def test_transfer_to_the_original_and_back() -> None:
    model = disturbed(Behind(nn.utils.weight_norm(nn.Conv2d(3, 4, 3))))
    layer, x = model.layer, torch.randn(IMAGE)
    expected, result = model(x), baked(model)
    surgeon = Surgeon()
    back = transfer(model, result, surgeon)
    assert type(model.layer) is nn.Conv2d
    assert torch.equal(model(x), expected)
    assert back[id(result.model.bn)] is model.bn
    assert back[id(result.model.layer)] is model.layer
    surgeon.undo()
    assert model.layer is layer
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_model_is_rebuilt_and_loads_what_was_baked(name: str) -> None:
    build, shape, channels = CASES[name]
    model = disturbed(Behind(build(), shape, channels))
    result = baked(model, shape)
    fresh = Behind(build(), shape, channels).eval()
    rebuild(fresh, [layer.entry for layer in result.layers])
    fresh.load_state_dict(result.model.state_dict())
    x = torch.randn(shape)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    "change",
    [{"kind": "lstm"}, {"shape": [4, 3]}, {"shape": [1 << 20, 1 << 20, 3, 3]}, {"shape": [4, 3, -3, 3]},
     {"stride": [0, 1]}, {"stride": ["1", 1]}, {"padding": "everything"}, {"groups": 0}, {"groups": 3},
     {"padding_mode": "x"}],
    ids=str,
)  # fmt: skip
def test_settings_from_a_file_are_not_believed(change: dict[str, Any]) -> None:
    entry = baked(disturbed(Behind(pruned()))).layers[0].entry
    fresh = Behind(pruned())
    before, layer = bits(fresh), fresh.layer
    with pytest.raises(ValueError, match=r"."):
        rebuild(fresh, [{**entry, "settings": {**entry["settings"], **change}}])
    assert fresh.layer is layer
    assert same_bits(fresh, before)
    with pytest.raises(KeyError):
        rebuild(fresh, [{**entry, "module": ["nowhere"]}])
