"""Must be right or refused, never silently wrong: what other tools get wrong, one test each (design: folding.md)."""

from __future__ import annotations

import nets
import pytest
import torch
from foldcheck import FLOAT32, IMAGE, fold, reasons
from nets import lived_in, relative_error
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import bnfix
from bnfix.errors import PassError


def test_conv_with_two_consumers() -> None:
    _, result = fold(nets.TwoConsumers())
    assert not result.edits
    assert "also used by aten.add" in reasons(result)


def test_conv_output_that_is_also_the_models_output() -> None:
    _, result = fold(nets.ConvIsOutput())
    assert not result.edits
    assert "also used by the model's output" in reasons(result)


def test_conv_shared_by_two_norms() -> None:
    _, result = fold(nets.SharedConv())
    assert not result.edits
    assert reasons(result).count("is shared") == 2


def test_tied_weights() -> None:
    _, result = fold(nets.TiedWeights())
    assert not result.edits
    assert "a.weight is shared" in reasons(result)


def test_weight_read_elsewhere() -> None:
    _, result = fold(nets.WeightReadElsewhere())
    assert not result.edits
    assert "conv.weight is also read by" in reasons(result)


def test_same_conv_and_norm_called_twice() -> None:
    _, result = fold(nets.CalledTwice(), (2, 4, 6, 6))
    assert [e.site for e in result.edits] == ["bn"]


def test_one_norm_on_a_conv_and_on_a_relu() -> None:
    _, result = fold(nets.NormOnConvAndRelu(), (2, 4, 6, 6))
    assert not result.edits
    assert "comes from aten.relu" in reasons(result)


def test_one_norm_on_two_convs() -> None:
    _, result = fold(nets.NormOnTwoConvs())
    assert result.edits[0].into == ("a", "b")
    assert result.edits[0].gains == ("b.bias",)


def test_linear_then_norm_on_n_l_c_with_l_equal_to_c() -> None:
    _, result = fold(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), (3, 6, 5))
    assert not result.edits
    assert "last of 3 axes" in reasons(result)


@pytest.mark.parametrize("groups", [2, 4], ids=["grouped", "depthwise"])
def test_conv_transpose_with_groups(groups: int) -> None:
    _, result = fold(nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=groups), nn.BatchNorm2d(8)), (2, 4, 5, 5))
    assert len(result.edits) == 1


@pytest.mark.parametrize("where", ["conv", "bn"])
@pytest.mark.parametrize("kind", ["hook", "pre-hook"])
def test_hook_on_conv_or_norm(where: str, kind: str) -> None:
    model = nn.Sequential()
    model.conv, model.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    module = model.get_submodule(where)
    if kind == "hook":
        module.register_forward_hook(lambda m, i, o: o * 2)
    else:
        module.register_forward_pre_hook(lambda m, i: (i[0] * 2,))
    _, result = fold(model)
    assert not result.edits
    assert "hook" in reasons(result) or "aten.mul" in reasons(result)


def test_hook_on_an_ancestor_whose_output_is_the_convs() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3))
    stem.register_forward_hook(lambda m, i, o: None)  # a hook that may do anything when nobody looks
    _, result = fold(nn.Sequential(stem, nn.BatchNorm2d(4)))
    assert not result.edits
    assert "0 has a hook" in reasons(result)


def test_hook_elsewhere_stays_and_does_not_matter() -> None:
    model = nn.Sequential(*nets.conv_bn(), nn.ReLU())
    model[2].register_forward_hook(lambda m, i, o: o + 1)
    _, result = fold(model)
    assert len(result.edits) == 1
    assert result.model is not None
    assert len(result.model[2]._forward_hooks) == 1


def test_global_module_hook() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)
    try:
        result = bnfix.fold(lived_in(nets.conv_bn()), torch.randn(IMAGE))
    finally:
        handle.remove()
    assert not result.edits
    assert "global module hook" in reasons(result)


def test_attribute_written_in_forward() -> None:
    _, result = fold(nets.Stashing())
    assert not result.edits
    assert "keeps the output of conv" in reasons(result)


def test_output_kept_in_a_closure() -> None:
    kept: list[Tensor] = []

    class Keeps(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            kept.append(y[0].detach())  # a view: its storage is the convolution's
            return self.bn(y)

    result = bnfix.fold(lived_in(Keeps()), torch.randn(IMAGE))
    assert not result.edits


def test_norm_subclass_with_an_activation() -> None:
    _, result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), nets.NormWithActivation(4)))
    assert not result.edits
    assert "its forward also does aten.relu" in reasons(result)


def test_timm_batch_norm_act_keeps_its_activation() -> None:
    _, result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU)))
    assert len(result.edits) == 1
    assert "then act" in result.edits[0].after


@pytest.mark.parametrize("cls", [FrozenBatchNorm2d, FrozenBatchNormAct2d])
def test_frozen_batch_norm(cls: type[nn.Module]) -> None:
    _, result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), cls(4)))
    assert len(result.edits) == 1


def test_sync_batch_norm() -> None:
    _, result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)))
    assert len(result.edits) == 1


def test_instance_norm_with_running_statistics() -> None:
    _, result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)))
    assert len(result.edits) == 1


def test_registration_order_is_not_call_order() -> None:
    _, result = fold(nets.RegisteredBackwards())
    assert {e.site: e.into for e in result.edits} == {"bn1": ("conv1",), "bn2": ("conv2",)}


def test_conv_norm_norm() -> None:
    _, result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=0.1)))
    assert len(result.edits) == 2


def test_affine_false() -> None:
    _, result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))
    assert len(result.edits) == 1


def test_track_running_stats_false() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert not result.edits
    assert "no running statistics" in reasons(result)


@pytest.mark.parametrize("part", ["weight", "bias", "running_mean", "running_var"])
def test_each_part_can_be_none_on_its_own(part: str) -> None:
    norm = nn.BatchNorm2d(4)
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3), norm))
    setattr(norm, part, None)
    x = torch.randn(IMAGE)
    if part in ("weight", "bias"):
        result = bnfix.fold(model, x)
        assert len(result.edits) == 1
        assert result.model is not None
        assert relative_error(result.model(x), model(x)) < FLOAT32
    else:  # torch itself refuses such a norm
        with pytest.raises(PassError):
            bnfix.fold(model, x)


def test_functional_batch_norm_in_training() -> None:
    _, result = fold(nets.Functional(training=True))
    assert not result.edits
    assert "training" in reasons(result)


def test_functional_batch_norm() -> None:
    _, result = fold(nets.Functional())
    assert not result.edits
    assert "functional call" in reasons(result)


def test_model_in_training_mode() -> None:
    model = lived_in(nets.conv_bn()).train()
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert "call model.eval() first" in reasons(result)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_layer_with_float32_norm(dtype: torch.dtype) -> None:
    model = lived_in(nets.conv_bn())
    model[0].to(dtype)
    result = bnfix.fold(model, torch.randn(IMAGE).to(dtype))
    assert len(result.edits) == 1
    assert result.edits[0].ulp == 0.5
    assert result.model is not None
    assert result.model[0].bias.dtype == dtype
    assert result.parity is not None
    assert result.parity.verdict != "failed"


def test_bfloat16_model() -> None:
    result = bnfix.fold(lived_in(nets.conv_bn()).to(torch.bfloat16), torch.randn(IMAGE).bfloat16())
    assert len(result.edits) == 1
    assert result.edits[0].ulp == 0.5


@pytest.mark.parametrize("eps", [0.1, 1e-8, 0.0])
def test_eps(eps: float) -> None:
    _, result = fold(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=eps)))
    assert len(result.edits) == 1


def test_eps_changed_after_construction_is_read_from_the_call() -> None:
    model = lived_in(nets.conv_bn())
    model[1].eps = 0.5
    x = torch.randn(IMAGE)
    result = bnfix.fold(model, x)
    assert result.model is not None
    assert relative_error(result.model(x), model(x)) < FLOAT32


def test_variance_zero() -> None:
    model = lived_in(nets.conv_bn())
    model[1].running_var[1] = 0.0
    x = torch.randn(IMAGE)
    result = bnfix.fold(model, x)
    assert len(result.edits) == 1
    assert result.model is not None
    assert relative_error(result.model(x), model(x)) < FLOAT32


def test_gamma_zero_and_negative() -> None:
    model = lived_in(nets.conv_bn())
    with torch.no_grad():
        model[1].weight[0], model[1].weight[1] = 0.0, -2.0
    x = torch.randn(IMAGE)
    result = bnfix.fold(model, x)
    assert len(result.edits) == 1
    assert result.model is not None
    assert relative_error(result.model(x), model(x)) < FLOAT32


@pytest.mark.parametrize(("value", "said"), [(float("nan"), "finite"), (float("inf"), "finite")])
def test_statistics_that_are_not_finite(value: float, said: str) -> None:
    model = lived_in(nets.conv_bn())
    model[1].running_mean[2] = value
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert not result.edits
    assert said in reasons(result)


def test_folded_weight_that_overflows() -> None:
    model = lived_in(nets.conv_bn()).half()
    model[1].float()
    with torch.no_grad():
        model[1].weight.fill_(6e4)
        model[1].running_var.fill_(1e-4)
    result = bnfix.fold(model, torch.randn(IMAGE).half() * 1e-3)
    assert not result.edits
    assert "more than torch.float16 holds" in reasons(result)


def test_folded_weight_that_turns_subnormal() -> None:
    model = lived_in(nets.conv_bn()).half()
    model[1].float()
    with torch.no_grad():
        model[1].running_var.fill_(1e12)
    result = bnfix.fold(model, torch.randn(IMAGE).half())
    assert not result.edits
    assert "subnormal" in reasons(result)


def test_dead_channel_does_not_keep_the_norm() -> None:
    model = lived_in(nets.conv_bn())
    with torch.no_grad():
        model[0].weight[1] *= 1e-40
        model[1].weight[2] = 1e-42
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert len(result.edits) == 1


def test_control_flow_on_shapes_one_signature_is_not_all() -> None:
    model = lived_in(nets.ShapeRoute())
    small, large = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 16, 16)
    assert len(bnfix.fold(model, small).edits) == 1  # exact where it was traced, and only there
    result = bnfix.fold(model, [small, large])
    assert not result.edits
    assert result.signatures == ("1x3x8x8", "1x3x16x16")
    assert result.model is not None
    for x in (small, large):
        assert torch.equal(result.model(x), model(x))


def test_control_flow_on_data_is_recorded_from_runs() -> None:
    _, result = fold(nets.DataDependent())
    assert result.source == "observed"
    assert len(result.edits) == 1


def test_dict_outputs() -> None:
    _, result = fold(nets.DictOutput())
    assert len(result.edits) == 1
    assert result.parity is not None
    assert len(result.parity.outputs) == 2


class ViewOrCopy(nn.Module):
    """``flatten`` of a permuted norm's output is a copy; of the permuted linear layer's it would be a view."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.lin(x).transpose(1, 2)).permute(0, 2, 1)
        y.flatten(1)[:, ::2].neg_()
        return y


def test_change_in_place_that_hangs_on_the_layout() -> None:
    _, result = fold(ViewOrCopy(), (2, 5, 3))
    assert not result.edits
    assert "by how it lies in memory" in reasons(result)
