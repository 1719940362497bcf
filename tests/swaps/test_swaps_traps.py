"""What others get wrong (Opacus fix, SyncBN convert, timm freeze and split, torch.func, MONAI): one test each."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from nets import Functional, InPlainList, NormWithActivation, bits, lived_in, relative_error, same_bits
from swaps.swap_nets import (
    Activated,
    AlwaysFrozen,
    Ghost,
    Head,
    Noisy,
    OwnArithmetic,
    Renamed,
    Small,
    batches,
    fitted,
)
from timm.layers.norm_act import FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import bnfix
from bnfix.types import Result

DATA = batches(8, 3, 8, 8)
ALL = ("group", "layer", "instance", "frozen", "sync")


def conv(norm: nn.Module) -> nn.Module:
    return lived_in(nn.Sequential(nn.Conv2d(3, 16, 3), norm))


def only_refusal(result: Result, site: str = "1") -> str:
    assert not result.edits
    assert [r.site for r in result.refusals] == [site]
    return result.refusals[0].reason


def test_trained_affine_is_not_dropped() -> None:
    """Opacus, MONAI and Composer start anew; init="copy" takes it over, a fit takes in what it does."""
    model = conv(nn.BatchNorm2d(16))
    copied = bnfix.swap(model, example=DATA[0], init="copy").model
    assert torch.equal(copied[1].weight, model[1].weight)
    assert torch.equal(copied[1].bias, model[1].bias)
    x = torch.cat(DATA)
    fit = bnfix.swap(model, data=DATA).model
    with torch.no_grad():
        assert relative_error(fit(x), model(x)) < 0.5 * relative_error(copied(x), model(x))


@pytest.mark.parametrize("to", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept_and_the_forward_runs(to: str, dtype: torch.dtype) -> None:
    """float64 lost, the forward crashes (Opacus, MONAI)."""
    model = conv(nn.BatchNorm2d(16)).to(dtype)
    swapped = bnfix.swap(model, to, data=[x.to(dtype) for x in DATA]).model
    assert {t.dtype for t in swapped.state_dict().values() if t.is_floating_point()} == {dtype}
    assert swapped(DATA[0].to(dtype)).dtype == dtype


@pytest.mark.parametrize("to", ALL)
def test_each_training_flag_is_kept(to: str) -> None:
    """The eval flag is lost by all but torch.func."""
    model = fitted(Small(), DATA).train()
    model.bn2.eval()
    before = {k: m.training for k, m in model.named_modules()}
    swapped = bnfix.swap(model, to, data=DATA).model
    assert {k: m.training for k, m in swapped.named_modules()} == before
    assert {k: m.training for k, m in model.named_modules()} == before


@pytest.mark.parametrize("norm", [torchvision.ops.FrozenBatchNorm2d, FrozenBatchNormAct2d, AlwaysFrozen])
def test_a_frozen_norm_is_swapped_and_stays_frozen(norm: type[nn.Module]) -> None:
    """Skipped by some, trainable afterwards with others."""
    model = conv(norm(16))
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    result = bnfix.swap(model, data=DATA)
    assert any(isinstance(m, nn.GroupNorm) for m in result.model[1].modules())
    assert not any(p.requires_grad for p in result.model[1].parameters())
    assert result.edits[0].r2 > 0.8
    assert "frozen by its class" in only_refusal(bnfix.swap(model, "sync", data=DATA))
    again = bnfix.swap(model, "frozen", data=DATA)
    assert not again.edits
    assert not again.refusals
    assert any("already" in note for note in again.notes)


def test_a_norm_frozen_by_its_flags_stays_so() -> None:
    model = conv(nn.BatchNorm2d(16)).train()
    model[1].eval().requires_grad_(False)
    swapped = bnfix.swap(model, data=DATA).model
    assert not swapped[1].training
    assert [p.requires_grad for p in swapped[1].parameters()] == [False, False]


def test_affine_false_is_not_skipped() -> None:
    """Its constants have to go somewhere: an affine that does not train, or none if nothing is fitted."""
    model = conv(nn.BatchNorm2d(16, affine=False))
    swapped = bnfix.swap(model, data=DATA)
    assert isinstance(swapped.model[1], nn.GroupNorm)
    assert [p.requires_grad for p in swapped.model[1].parameters()] == [False, False]
    assert swapped.edits[0].gains == ("1.weight", "1.bias")
    with torch.no_grad():
        fresh = bnfix.swap(model, data=DATA, init="fresh").model(DATA[0])
        assert relative_error(swapped.model(DATA[0]), model(DATA[0])) < 0.5 * relative_error(fresh, model(DATA[0]))
    assert not list(bnfix.swap(model, data=DATA, init="fresh").model[1].parameters())
    for to in ("frozen", "sync"):
        assert not list(bnfix.swap(model, to, data=DATA).model[1].parameters())


@pytest.mark.parametrize("to", ALL)
@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_are_kept(to: str, inplace: bool) -> None:
    model = conv(timm.layers.BatchNormAct2d(16)) if to == "group" else conv(nn.BatchNorm2d(16))
    seen: list[str] = []
    model[1].register_forward_pre_hook(lambda _m, _a: seen.append("pre"))
    handle = model[1].register_forward_hook(lambda _m, _a, out: seen.append("post") or out * 2)
    model[1].register_full_backward_hook(lambda *_: seen.append("backward") and None)
    with torch.no_grad():
        before = model(DATA[0])
    swapped = bnfix.swap(model, to, data=DATA, inplace=inplace).model
    seen.clear()
    out = swapped(DATA[0])
    assert seen == ["pre", "post"]
    assert relative_error(out, before) < 0.7  # doubled by the hook, as before
    out.sum().backward()
    assert seen == ["pre", "post", "backward"]
    if inplace:
        handle.remove()
        assert relative_error(swapped(DATA[0]), before / 2) < 0.7


class Shared(nn.Module):
    """One norm under four names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 16, 3)
        self.bn = self.alias = nn.BatchNorm2d(16)
        self.block = nn.Sequential(self.bn)
        self.held = [self.bn, {"deep": self.bn}]

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.a(x)) + self.block(self.b(x)) + self.alias(self.a(-x)) + self.held[1]["deep"](self.b(-x))


@pytest.mark.parametrize("to", ALL)
@pytest.mark.parametrize("inplace", [False, True])
def test_of_a_shared_norm_every_alias_goes(to: str, inplace: bool) -> None:
    """One alias stays a BatchNorm with five of seven tools."""
    model = fitted(Shared(), DATA)
    result = bnfix.swap(model, to, data=DATA, inplace=inplace)
    new = result.model.bn
    assert not isinstance(new, nn.BatchNorm2d)
    assert new is result.model.alias is result.model.block[0] is result.model.held[0] is result.model.held[1]["deep"]
    assert len(result.edits) == 1
    assert result.edits[0].calls == ("bn", "bn@1", "bn@2", "bn@3")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in (*result.model.modules(), result.model.held[0]))


@pytest.mark.parametrize("to", ALL)
def test_a_subclass_keeps_its_activation(to: str) -> None:
    """Skipped, or the activation lost (SyncBN convert: pytorch#187298)."""
    for norm in (timm.layers.BatchNormAct2d(16), Activated(16)):
        model = conv(norm)
        result = bnfix.swap(model, to, data=DATA)
        new = result.model[1]
        assert isinstance(new, nn.Sequential)
        assert type(new.act) is type(norm.act)
        assert new.act is not norm.act
        with torch.no_grad():
            assert relative_error(result.model(DATA[0]), model(DATA[0])) < 0.6
        if isinstance(norm, Activated):
            assert torch.equal(new.act.weight, norm.act.weight)
            assert "1.act.weight" not in (*result.edits[0].gains, *result.edits[0].loses)
        assert "1.norm.weight" in result.edits[0].gains
        assert set(result.model.state_dict()) == (set(model.state_dict()) - set(result.edits[0].loses)) | set(
            result.edits[0].gains
        )


def test_a_subclass_that_only_has_another_name_is_swapped() -> None:
    assert bnfix.swap(conv(Renamed(16)), data=DATA).edits
    assert bnfix.swap(conv(timm.layers.BatchNormAct2d(16, apply_act=False)), data=DATA).edits[0].gains == ()


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (NormWithActivation(16), "NormWithActivation does more in its forward than normalise"),
        (Ghost(16), "Ghost does more in training mode"),
        (Noisy(16), "Noisy does more in training mode"),
    ],
)
@pytest.mark.parametrize("to", ALL)
def test_a_subclass_that_does_more_is_refused_by_name(norm: nn.Module, why: str, to: str) -> None:
    model = conv(norm)
    before = bits(model)
    assert why in only_refusal(bnfix.swap(model, to, data=DATA))
    assert same_bits(model, before)


def test_a_norm_written_by_hand_is_swapped() -> None:
    model = conv(OwnArithmetic(16))
    result = bnfix.swap(model, data=DATA)
    assert result.edits[0].after.endswith("eps=0.001)")
    assert all(p.requires_grad for p in result.model[1].parameters())


def test_linear_and_batchnorm1d_become_no_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GroupNorm with one or two values a group: identically 0, or ±1 only (opacus#567)."""
    data = batches(32, 6)
    small = lived_in(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)))
    assert "8 values; at least 16 are needed" in only_refusal(bnfix.swap(small, data=data))
    assert "8 values; at least 16 are needed" in only_refusal(bnfix.swap(small, "layer", data=data))
    wide = lived_in(nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64)))
    assert bnfix.swap(wide, data=data).model[1].num_groups == 1
    assert "±1 for every input" in only_refusal(bnfix.swap(wide, groups=32, data=data))
    assert "0 for every input" in only_refusal(bnfix.swap(wide, groups=64, data=data))
    assert "0 for every input" in only_refusal(bnfix.swap(wide, "instance", data=data))
    from bnfix.swaps.targets import group

    monkeypatch.setattr(group, "FEWEST", 1)  # and if the plan let it through, the run does not
    assert "±1 would come out of it" in only_refusal(bnfix.swap(wide, groups=32, data=data))
    assert "0 would come out of it" in only_refusal(bnfix.swap(wide, groups=64, data=data))


def test_a_head_is_refused_and_the_rest_is_swapped() -> None:
    model = fitted(Head(8), DATA)
    result = bnfix.swap(model, data=DATA)
    assert [e.site for e in result.edits] == ["bn"]
    assert [r.site for r in result.refusals] == ["top"]
    assert type(result.model.top) is nn.BatchNorm1d


def test_a_root_that_is_itself_a_norm() -> None:
    """'Swapped 1', and it is not."""
    model = lived_in(nn.BatchNorm2d(16))
    x = batches(8, 16, 6, 6)
    result = bnfix.swap(model, data=x)
    assert isinstance(result.model, nn.GroupNorm)
    assert [e.site for e in result.edits] == [""]
    before = bits(model)
    kept = bnfix.swap(model, data=x, inplace=True)
    assert kept.model is model
    assert same_bits(model, before)
    assert "the model is itself the norm" in only_refusal(kept, "")


def test_functional_norms_are_reported() -> None:
    """Silently left by all."""
    for training in (False, True):
        assert "F.batch_norm is called by the code of Functional" in only_refusal(
            bnfix.swap(lived_in(Functional(training)), data=DATA), ""
        )

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stats = nn.ParameterDict({"mean": torch.zeros(16), "var": torch.ones(16)})
            self.conv, self.bn = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.bn(self.conv(x)), self.stats["mean"], self.stats["var"])

    result = bnfix.swap(lived_in(nn.Sequential(Inner())), data=DATA)
    assert [e.site for e in result.edits] == ["0.bn"]
    assert [r.site for r in result.refusals] == ["0"]
    assert "0.stats.mean" in result.refusals[0].reason

    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)

    assert "hands its statistics to F.batch_norm" in only_refusal(bnfix.swap(lived_in(Borrowing()), data=DATA), "bn")


@pytest.mark.parametrize("to", ALL)
def test_norms_in_python_lists_are_swapped(to: str) -> None:
    model = lived_in(InPlainList())
    result = bnfix.swap(model, to, data=DATA)
    assert not isinstance(result.model.layers[1], nn.BatchNorm2d)
    assert isinstance(model.layers[1], nn.BatchNorm2d)
    assert result.edits[0].gains == result.edits[0].loses == ()


def test_what_cannot_be_replaced_is_refused_by_name() -> None:
    class InTuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = (nn.Conv2d(3, 16, 3), lived_in(nn.BatchNorm2d(16)))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x))

    assert "held in a tuple" in only_refusal(bnfix.swap(InTuple(), data=DATA), "layers[1]")
    model = conv(nn.BatchNorm2d(16))
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    assert "parametrization" in only_refusal(bnfix.swap(model, data=DATA))
    model = conv(nn.BatchNorm2d(16))
    prune.random_unstructured(model[1], "weight", 0.5)
    assert "weight_orig" in only_refusal(bnfix.swap(model, data=DATA))
    model = conv(nn.BatchNorm2d(16))
    model[1].forward = torch.relu
    assert "its own forward set on the instance" in only_refusal(bnfix.swap(model, data=DATA))
    model = conv(nn.InstanceNorm2d(16, track_running_stats=True))
    assert "instance norm with running statistics" in only_refusal(bnfix.swap(model, data=DATA))


def test_a_parameter_of_two_norms_is_not_torn_apart() -> None:
    model = fitted(Small(), DATA)
    model.bn2.weight = model.bn1.weight
    result = bnfix.swap(model, data=DATA)
    assert [(r.site, "tied" in r.reason) for r in result.refusals] == [("bn2", True), ("bn1", True)]
    synced = bnfix.swap(model, "sync", data=DATA).model
    assert synced.bn2.weight is synced.bn1.weight


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_script_module_inside_is_refused_and_the_rest_is_swapped() -> None:
    inner = lived_in(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)))
    model = nn.Sequential(*conv(nn.BatchNorm2d(16)), torch.jit.script(inner)).eval()
    result = bnfix.swap(model, data=DATA)
    assert [e.site for e in result.edits] == ["1"]
    assert [(r.site, "ScriptModule" in r.reason) for r in result.refusals] == [("2.1", True)]
    assert isinstance(model[1], nn.BatchNorm2d)


def test_never_called_norms_are_refused() -> None:
    class Spare(Small):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.BatchNorm2d(16)

    result = bnfix.swap(lived_in(Spare()), data=DATA)
    assert [(r.site, "no forward reached it" in r.reason) for r in result.refusals] == [("spare", True)]
    assert isinstance(bnfix.swap(lived_in(Spare()), "sync", data=DATA).model.spare, nn.SyncBatchNorm)
