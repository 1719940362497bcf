"""Facts, the keystone: each sentence of the design about them is a test here."""

from __future__ import annotations

import gc

import nets
import pytest
import torch
import torch.nn.functional as F
from nets import bits, lived_in, same_bits
from timm.layers import FrozenBatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from bnfix.errors import PassError
from bnfix.graph import copy_model, gather
from bnfix.running import Call, as_call
from bnfix.types import Facts, NormFact, Op

IMAGE = (2, 3, 8, 8)


def facts_of(model: nn.Module, *shapes: tuple[int, ...]) -> Facts:
    return gather(lived_in(model), [as_call(torch.randn(s)) for s in shapes or (IMAGE,)])


def norm(facts: Facts, path: str) -> NormFact:
    return next(n for n in facts.norms if n.path == path)


def calls(facts: Facts, fact: NormFact) -> list[Op]:
    return [facts.routes[r].ops[i] for r, i in fact.calls]


def test_a_conv_is_a_conv_however_it_is_called() -> None:
    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x) + F.conv2d(x, self.conv.weight, self.conv.bias)
            y = y + torch.conv2d(x, self.conv.weight) + torch.ops.aten.conv2d(x, self.conv.weight)
            return y + torch.convolution(x, self.conv.weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)

    ops = [op for op in facts_of(Ways()).routes[0].ops if op.kind == "conv"]
    assert len(ops) == 5
    assert len({op.tensors["weight"] for op in ops}) == 1


def test_all_subgraphs_are_walked_and_laid_out_in_one_list() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.conv(x)
                with torch.enable_grad(), torch.autocast("cpu", enabled=False):
                    return self.bn(y.float())

    facts = facts_of(Nested())
    assert [op.kind for op in facts.routes[0].ops if op.kind in ("conv", "norm")] == ["conv", "norm"]
    assert len(norm(facts, "bn").calls) == 1


def test_consumers_are_counted_across_the_borders_of_subgraphs() -> None:
    class Leaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.conv(x)
                z = self.bn(y)
            return z + y

    facts = facts_of(Leaks())
    conv = next(op for op in facts.routes[0].ops if op.kind == "conv")
    assert {u.kind for u in facts.routes[0].users(conv.index)} == {"norm", "other"}


def test_a_branch_of_cond_is_listed_and_marked() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda v: self.bn(self.conv(v)), lambda v: v * 1.0, (x,))

    facts = facts_of(Branches())
    found = calls(facts, norm(facts, "bn"))
    assert [op.within for op in found] == [("cond",)]


def test_norms_are_known_by_their_buffers_not_by_name() -> None:
    model = nets.conv_bn()
    model.again = model[1]
    facts = facts_of(model)
    assert facts.norms[0].paths == ("1", "again")
    assert len(facts.norms) == 1
    assert [str(op.site) for op in calls(facts, facts.norms[0])] == ["1", "again"]


def test_second_call_is_named_as_such() -> None:
    facts = facts_of(nets.CalledTwice(), (1, 4, 6, 6))
    assert [str(op.site) for op in calls(facts, norm(facts, "bn"))] == ["bn", "bn@1"]


def test_tied_buffers_belong_to_both_norms_each_call_to_one() -> None:
    a, b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    b.running_mean, b.running_var = a.running_mean, a.running_var
    facts = facts_of(nn.Sequential(nn.Conv2d(3, 3, 1), a, nn.ReLU(), nn.Conv2d(3, 3, 1), b))
    assert norm(facts, "1").tensors["running_mean"] == norm(facts, "4").tensors["running_mean"]
    assert [len(n.calls) for n in facts.norms] == [1, 1]


def test_every_use_of_a_tied_weight_has_one_key() -> None:
    facts = facts_of(nets.TiedWeights())
    ops = [op for op in facts.routes[0].ops if op.kind == "conv"]
    assert len({op.tensors["weight"] for op in ops}) == 1
    assert facts.tensors[ops[0].tensors["weight"]].owners == ("a.weight", "b.weight")


def test_modules_in_a_plain_list_are_found() -> None:
    facts = facts_of(nets.InPlainList())
    assert [n.path for n in facts.norms] == ["layers[1]"]
    assert len(facts.norms[0].calls) == 1


def test_functional_norm_has_an_owner() -> None:
    facts = facts_of(nets.Functional())
    assert len(facts.norms) == 1
    assert not facts.norms[0].module
    assert len(facts.norms[0].calls) == 1


def test_functional_norm_without_any_buffer_is_not_lost() -> None:
    class Batch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, training=True)

    facts = facts_of(nn.Sequential(Batch()))
    assert [n.cls for n in facts.norms] == ["F.batch_norm"]


@pytest.mark.parametrize("source", ["torchvision", "timm", "own"])
def test_frozen_norms_are_matched_by_their_span(source: str) -> None:
    build = {
        "torchvision": FrozenBatchNorm2d,
        "timm": lambda c: FrozenBatchNormAct2d(c, apply_act=False),
        "own": _WrittenOut,
    }[source]
    facts = facts_of(nn.Sequential(nn.Conv2d(3, 4, 1), build(4), nn.ReLU()))
    (op,) = calls(facts, norm(facts, "1"))
    assert op.kind == "norm"
    assert op.attrs["eps"] == pytest.approx(1e-5)
    assert [o.kind for o in facts.routes[0].ops if o.kind != "input"] == ["conv", "norm", "other", "output"]


class _WrittenOut(nn.Module):
    """Someone's own frozen norm, in another order of operations than the known ones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        inverse = (self.running_var + 1e-5).sqrt().reciprocal().view(shape)
        return (x - self.running_mean.view(shape)) * inverse * self.weight.view(shape) + self.bias.view(shape)


def test_a_span_that_is_not_a_norm_is_not_called_one() -> None:
    class Almost(_WrittenOut):
        def forward(self, x: Tensor) -> Tensor:
            return x * (self.running_var + 1e-5).rsqrt().view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    facts = facts_of(nn.Sequential(nn.Conv2d(3, 4, 1), Almost(4)))
    assert not norm(facts, "1").calls


def test_norm_that_is_never_called_is_there() -> None:
    model = nets.TwoConsumers()
    model.spare = nn.BatchNorm2d(9)
    assert norm(facts_of(model), "spare").calls == ()


def test_norm_without_statistics_is_there() -> None:
    facts = facts_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)))
    (op,) = calls(facts, norm(facts, "1"))
    assert op.attrs["training"] is True


def test_instance_norm_without_statistics_is_none_of_ours() -> None:
    assert facts_of(nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4))).norms == ()


def test_eps_and_training_come_from_the_call() -> None:
    model = lived_in(nets.conv_bn())
    model[1].eps = 0.25
    model[1].train()
    facts = gather(model, [as_call(torch.randn(IMAGE))])
    (op,) = calls(facts, facts.norms[0])
    assert (op.attrs["eps"], op.attrs["training"]) == (0.25, True)


def test_facts_of_several_signatures_hold_all_of_them() -> None:
    facts = facts_of(nets.ShapeRoute(), (1, 3, 8, 8), (2, 3, 16, 16))
    assert [r.signature for r in facts.routes] == ["1x3x8x8", "2x3x16x16"]
    consumers = [len(r.users(next(o.index for o in r.ops if o.kind == "conv"))) for r in facts.routes]
    assert consumers == [1, 2]


def test_a_private_copy_is_traced() -> None:
    model = lived_in(nets.Stashing())
    before = bits(model)
    gather(model, [as_call(torch.randn(IMAGE))])
    assert not hasattr(model, "last")
    assert same_bits(model, before)
    copy_model(model)  # still copyable


def test_running_statistics_survive_a_trace_in_training_mode() -> None:
    model = lived_in(nets.conv_bn()).train()
    before = bits(model)
    gather(model, [as_call(torch.randn(IMAGE))])
    assert same_bits(model, before)


def test_an_output_that_something_keeps_is_known() -> None:
    facts = facts_of(nets.Stashing())
    assert {facts.tensors[k].owners for k in facts.held} == {("conv.weight",)}
    assert not facts_of(nets.DictOutput()).held


def test_a_reference_cycle_is_not_someone_who_keeps_it() -> None:
    class Cycle(nets.TwoConsumers):
        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            knot: list[object] = [y]
            knot.append(knot)
            return self.bn(y)

    gc.disable()
    try:
        assert not facts_of(Cycle()).held
    finally:
        gc.enable()


def test_where_export_refuses_a_run_is_recorded() -> None:
    facts = facts_of(nets.DataDependent())
    assert facts.source == "observed"
    assert "can't trace this model on 2x3x8x8" in facts.notes[0]
    assert "\n" not in facts.notes[0]


def test_nothing_is_printed_when_export_refuses(capfd: pytest.CaptureFixture[str]) -> None:
    assert facts_of(nets.DataDependent()).source == "observed"
    assert capfd.readouterr() == ("", "")


def test_wrong_input_is_a_pass_error_not_a_trace_error() -> None:
    with pytest.raises(PassError, match="expected input"):
        facts_of(nets.conv_bn(), (1, 9, 8, 8))


def test_call_is_the_one_form_of_an_input() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.bn(self.conv(x)) * scale

    x, scale = torch.randn(IMAGE), torch.ones(1)
    model = lived_in(Two())
    for call in (
        Call((x,), {"scale": scale}),
        as_call({"x": x, "scale": scale}),
        as_call((x, scale), forward=lambda m, b: m(b[0], scale=b[1])),
        as_call({"image": x}, forward=lambda m, b: m(b["image"], scale=scale)),
    ):
        facts = gather(model, [call])
        assert [op.kind for op in facts.routes[0].ops if op.kind in ("conv", "norm")] == ["conv", "norm"]


def test_training_flags_of_children_are_what_they_were_in_the_trace() -> None:
    model = lived_in(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5), nn.BatchNorm2d(3)))
    facts = gather(model, [as_call(torch.randn(IMAGE))])
    dropout = next(op for op in facts.routes[0].ops if "dropout" in op.target)
    assert dropout.attrs["train"] is False
