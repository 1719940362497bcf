"""What modules do besides computing: reparametrize, hide in lists, hook, stash, wrap. Right or refused, each."""

from __future__ import annotations

import nets
import pytest
import torch
import torch.nn.utils.parametrize as P
import torch.nn.utils.prune as prune
from foldcheck import FLOAT32, IMAGE, fold, reasons
from nets import lived_in, relative_error
from timm.layers import StdConv2d
from torch import Tensor, nn

import bnfix
from bnfix.errors import PassError, TraceError


def test_weight_computed_by_a_parametrization() -> None:
    model = nets.conv_bn()
    P.register_parametrization(model[0], "weight", _Twice())
    _, result = fold(model)
    assert [e.action for e in result.edits] == ["bake", "fold"]
    assert not result.refusals


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", ["weight_norm", "spectral_norm", "prune"])
def test_old_reparametrizations_that_break_deepcopy(wrap: str) -> None:
    model = nets.conv_bn()
    if wrap == "prune":
        prune.l1_unstructured(model[0], "weight", 0.5)
    else:
        getattr(nn.utils, wrap)(model[0])
    model(torch.randn(IMAGE))  # leaves a non-leaf tensor behind
    _, result = fold(model)
    assert [e.action for e in result.edits] == ["bake", "fold"]
    assert not result.refusals


def test_standardised_convolution() -> None:
    _, result = fold(nn.Sequential(StdConv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert [e.action for e in result.edits] == ["bake", "fold"]
    assert not result.refusals


def test_inside_autocast_and_no_grad() -> None:
    model = lived_in(nets.InAutocast())
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert len(result.edits) == 1
    assert result.parity is not None
    assert result.parity.verdict != "failed"


def test_layers_in_a_plain_list() -> None:
    _, result = fold(nets.InPlainList())
    assert [e.into for e in result.edits] == [("layers[0]",)]


def test_norm_under_two_names() -> None:
    model = nets.conv_bn()
    model.alias = model[1]

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.alias(self.inner[0](x))

    _, result = fold(Uses())
    assert len(result.edits) == 1
    assert result.model is not None
    assert result.model.inner.alias is result.model.inner[1]


def test_two_norms_with_tied_buffers() -> None:
    a, b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    b.running_mean, b.running_var = a.running_mean, a.running_var
    _, result = fold(nn.Sequential(nn.Conv2d(3, 4, 1), a, nn.ReLU(), nn.Conv2d(4, 4, 1), b))
    assert [e.site for e in result.edits] == ["1", "4"]


def test_norm_parameter_read_elsewhere() -> None:
    class Penalty(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.bn.weight.abs().sum()

    _, result = fold(Penalty())
    assert not result.edits
    assert "weight is also read by aten.abs" in reasons(result)


def test_norm_that_no_forward_reaches_is_named() -> None:
    model = nets.conv_bn()
    model.spare = nn.BatchNorm2d(7)

    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[1](self.inner[0](x))

    _, result = fold(Only())
    assert len(result.edits) == 1
    assert "inner.spare: no forward reached it" in reasons(result)


def test_class_check_in_forward_is_undone_not_wrong() -> None:
    class Asks(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) if isinstance(self.bn, nn.BatchNorm2d) else y * 0

    model = lived_in(Asks())
    x = torch.randn(IMAGE)
    result = bnfix.fold(model, x)
    assert not result.edits
    assert result.refusals[0].defect
    assert result.model is not None
    assert torch.equal(result.model(x), model(x))


def test_attributes_of_the_norm_stay_readable() -> None:
    class Asks(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * self.bn.num_features + self.bn.eps

    _, result = fold(Asks())
    assert len(result.edits) == 1


def test_subclassed_convolution_that_drops_its_bias_is_undone() -> None:
    class Biasless(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight, None)

    model = lived_in(nn.Sequential(Biasless(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    x = torch.randn(IMAGE)
    result = bnfix.fold(model, x)
    assert not result.edits
    assert result.model is not None
    assert torch.equal(result.model(x), model(x))


def test_unbatched_input() -> None:
    _, result = fold(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(6)), (3, 8))
    assert not result.edits
    assert "without a batch dimension" in reasons(result)


def test_instance_forward_that_runs_the_original() -> None:
    model = lived_in(nets.conv_bn())
    inner = model[1].forward
    model[1].forward = lambda x: inner(x)
    with pytest.raises(TraceError, match="set on the instance"):
        bnfix.fold(model, torch.randn(IMAGE))


def test_method_as_instance_forward_is_the_copys_own() -> None:
    class Chooses(nets.TwoConsumers):
        def __init__(self) -> None:
            super().__init__()
            self.forward = self.plain  # type: ignore[method-assign]

        def plain(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x))

    _, result = fold(Chooses())
    assert len(result.edits) == 1


def test_closure_in_a_hook_that_reaches_the_model() -> None:
    model = lived_in(nn.Sequential(*nets.conv_bn(), nn.ReLU()))
    norm = model[1]
    model[2].register_forward_hook(lambda m, i, o: o + norm.eps)
    with pytest.raises(TraceError, match="closure reaches the model"):
        bnfix.fold(model, torch.randn(IMAGE))


def test_hook_that_collects_leaves_the_users_list_alone() -> None:
    model = lived_in(nn.Sequential(*nets.conv_bn(), nn.ReLU()))
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda m, i, o: seen.append(o))
    bnfix.fold(model, torch.randn(IMAGE))
    assert seen == []


def test_script_module_is_refused_by_name() -> None:
    model = nn.Sequential(lived_in(nets.conv_bn()), torch.jit.script(nn.ReLU()))
    with pytest.raises(TraceError, match="1 is a ScriptModule"):
        bnfix.fold(model, torch.randn(IMAGE))


def test_compiled_and_data_parallel_are_unwrapped() -> None:
    model = lived_in(nets.conv_bn())
    x = torch.randn(IMAGE)
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        result = bnfix.fold(wrapped, x)
        assert len(result.edits) == 1
        assert "unwrapped" in result.notes[0]


def test_model_that_is_a_norm_itself() -> None:
    result = bnfix.fold(lived_in(nn.BatchNorm2d(3)), torch.randn(IMAGE))
    assert "the model's own input" in reasons(result)


def test_uncopyable_attribute_is_named() -> None:
    model = lived_in(nets.conv_bn())
    model[0].lock = (i for i in range(3))
    with pytest.raises(TraceError, match=r"0\.lock"):
        bnfix.fold(model, torch.randn(IMAGE))


def test_forward_that_fails_is_said_to_be_the_users() -> None:
    with pytest.raises(PassError, match="failed on 2x5x8x8"):
        bnfix.fold(lived_in(nets.conv_bn()), torch.randn(2, 5, 8, 8))


def test_channels_last_is_kept() -> None:
    model = lived_in(nets.conv_bn()).to(memory_format=torch.channels_last)
    result = bnfix.fold(model, torch.randn(IMAGE).to(memory_format=torch.channels_last))
    assert result.model is not None
    assert result.model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_frozen_parameters_stay_frozen_and_untouched_keys_stay() -> None:
    model = nn.Sequential(*nets.conv_bn(bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model.requires_grad_(False)
    before, result = fold(model)
    assert result.model is not None
    assert not any(p.requires_grad for p in result.model.parameters())
    assert set(result.model.state_dict()) - set(before.state_dict()) == {"0.bias"}
    assert set(before.state_dict()) - set(result.model.state_dict()) == {k for k in before.state_dict() if k[0] == "1"}
    assert torch.equal(result.model[3].weight, before[3].weight)


def test_everything_untouched_keeps_class_code_and_hooks() -> None:
    model = nets.RegisteredBackwards()
    model.note = {"kept": [1, 2]}  # type: ignore[assignment]
    _, result = fold(model)
    assert type(result.model) is nets.RegisteredBackwards
    assert result.model.note == {"kept": [1, 2]}


def test_forward_that_works_in_place_leaves_the_users_input() -> None:
    class InPlace(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x.mul_(2)))

    x = torch.randn(IMAGE)
    before = x.clone()
    result = bnfix.fold(lived_in(InPlace()), x)
    assert len(result.edits) == 1
    assert torch.equal(x, before)


def test_norms_in_a_row_behind_a_layer_without_a_bias_also_in_place() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    x = torch.randn(IMAGE)
    expected = model(x)
    result = bnfix.fold(model, x, inplace=True)
    assert [e.gains for e in result.edits] == [("0.bias",), ()]
    assert relative_error(model(x), expected) < FLOAT32
