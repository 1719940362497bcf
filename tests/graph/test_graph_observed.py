"""Facts from runs, where torch.export refuses: what is known then, and that folds on it are right or refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import nets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import bits, lived_in, relative_error, same_bits
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

import bnfix
from bnfix import folding
from bnfix.api.asked import other_calls
from bnfix.errors import TraceError
from bnfix.graph import copy_model, gather
from bnfix.graph.routes import TURNS, hold
from bnfix.graph.sources import exported, observed
from bnfix.graph.sources.decisions import held, watching
from bnfix.running import Call, as_call
from bnfix.types import Facts, Op, Result

IMAGE = (2, 3, 8, 8)


class Pair(nn.Module):
    """A convolution and its norm; what the forward does with them is each test's own."""

    def __init__(self, way: Callable[[Any, Tensor], Any], norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), norm(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.__dict__["way"] = way

    def forward(self, x: Tensor) -> Any:
        return self.__dict__["way"](self, x)


def positive(x: Tensor) -> bool:
    return bool(x.sum() > 0)


def fold(
    way: Callable[[Any, Tensor], Any], *examples: Tensor, norm: type[nn.Module] = nn.BatchNorm2d
) -> tuple[nn.Module, Result]:
    """Fold, hold the model itself to the bit, and compare numbers on both sides of zero and on other sizes."""
    model = lived_in(Pair(way, norm))
    before = bits(model)
    result = bnfix.fold(model, list(examples) or torch.randn(IMAGE))
    assert same_bits(model, before)
    assert result.source == "observed"
    assert not any(r.defect for r in result.refusals)
    assert result.model is not None
    for x in (torch.randn(IMAGE), torch.rand(IMAGE), -torch.rand(IMAGE), torch.randn(1, 3, 12, 9), *examples):
        with torch.no_grad():
            expected, found = model(x.clone()), result.model(x.clone())
        for a, b in zip(leaves(found), leaves(expected), strict=True):
            assert a.shape == b.shape
            assert relative_error(a, b) < 1e-5  # two layers in float32, each rounded a little differently
    return model, result


def leaves(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for v in (out.values() if isinstance(out, dict) else out) for t in leaves(v)]


def sites(result: Result) -> set[str]:
    return {e.site for e in result.edits}


def why(result: Result, site: str) -> str:
    return next(r.reason for r in result.refusals if r.site == site)


# ------------------------------------------------------------------------------- what is recorded


def key_of_names(model: nn.Module) -> tuple[Callable[[Tensor], int | None], dict[int, str]]:
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    numbers = {key: i for i, key in enumerate(names)}
    return lambda t: numbers.get(id(t)), {i: names[key] for key, i in numbers.items()}


def comparable(op: Op) -> tuple[Any, ...]:
    settings = {
        k: v for k, v in op.attrs.items() if k != "cudnn_enabled"
    }  # a switch of the process, which export turns
    return op.kind, op.target, str(op.site), op.shape, op.dtype, dict(op.tensors), repr(sorted(settings.items()))


@pytest.mark.parametrize(
    "model",
    [nets.TwoConsumers(), nets.conv_bn(), nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.ReLU(True))],
    ids=["two consumers", "sequential", "frozen"],
)
def test_a_run_gives_the_operations_that_export_gives(model: nn.Module) -> None:
    model = lived_in(model)
    key_of, _ = key_of_names(model)
    call = as_call(torch.randn(IMAGE))
    run, _ = observed.trace(model, call, key_of)
    graph = exported.trace(model, call, key_of)
    assert [comparable(o) for o in run.ops if o.kind not in ("input", "constant")] == [
        comparable(o) for o in graph.ops if o.kind not in ("input", "constant")
    ]


def test_watching_changes_no_bit_and_ends_with_the_run() -> None:
    model = lived_in(nn.Sequential(nets.conv_bn(), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Hardswish()))
    x = torch.randn(IMAGE)
    seen: list[str] = []

    def see(func: Any, _args: Any, _kwargs: Any, out: Any) -> Any:
        seen.append(str(func))
        return out

    with torch.no_grad():
        expected = model(x)
        with watching(see):
            assert torch.equal(model(x), expected)
        count = len(seen)
        with pytest.raises(RuntimeError), watching(see):
            model(x[:, :2])
        after = len(seen)
        model(x)
    assert seen[0] == "aten.conv2d.default"
    assert count <= after == len(seen)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_modules_that_no_parent_knows_have_names_too() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [nets.conv_bn(3), nets.conv_bn(3)]

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) if x.sum() > -1e9 else x
            return x

    model = Loose()
    for block in model.blocks:
        lived_in(block)
    facts = gather(model.eval(), [as_call(torch.randn(IMAGE))])
    assert facts.source == "observed"
    assert [n.path for n in facts.norms] == ["blocks[0].1", "blocks[1].1"]
    assert all(n.module for n in facts.norms)


def test_a_name_of_the_same_numbers_is_the_same_value() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        other = y.data  # no operation, and another object
        z = m.bn(y)
        return z + other if positive(x) else z * other

    _, result = fold(way)
    assert "also used by" in why(result, "bn")


def test_facts_say_what_they_rest_on() -> None:
    facts = gather(lived_in(nets.DataDependent()), [as_call(torch.randn(IMAGE))])
    assert facts.source == "observed"
    assert "recorded from one run" in facts.notes[0]
    assert "torch.export can't trace" in facts.notes[0]
    assert "one example" in facts.notes[1]
    assert "the other way was walked as well" in facts.notes[2]
    assert len(facts.routes) == 2


def with_more(model: nn.Module, call: Call) -> Facts:
    return gather(model, [call], more=lambda: other_calls(model, [call]))


def test_one_example_is_joined_by_variations_of_it() -> None:
    facts = with_more(lived_in(nets.DataDependent()), as_call(torch.randn(IMAGE)))
    assert {c.signature for c in facts.binding.calls} == {"2x3x8x8", "3x3x8x8", "2x3x16x16"}
    assert "3 runs" in facts.notes[0]
    assert not any("one example" in n for n in facts.notes)
    facts = with_more(lived_in(detector()), Call(([torch.rand(3, 64, 64)],)))
    assert [c.signature for c in facts.binding.calls] == ["[3x64x64]", "[3x64x96, 3x64x96]"]
    facts = with_more(lived_in(nets.conv_bn()), as_call(torch.randn(IMAGE)))  # export can: nothing is added
    assert (len(facts.binding.calls), facts.notes) == (1, ())


def test_where_nothing_can_watch_either_both_reasons_are_given() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        m.__dict__["count"] = m.__dict__.get("count", 0) + 1
        if m.__dict__["count"] > 1:
            raise RuntimeError("only once")
        return m.bn(m.conv(x)) if positive(x) else x

    with pytest.raises(TraceError, match=r"torch\.export can't trace.*can't be recorded: RuntimeError: only once"):
        gather(lived_in(Pair(way)), [as_call(torch.randn(IMAGE))])


# ------------------------------------------------------------------------------- right or refused


def test_if_on_data() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        return m.bn2(m.conv2(y)) if y.sum() > 0 else y * 2

    _, result = fold(way, torch.rand(IMAGE), torch.rand(IMAGE), -torch.rand(IMAGE), torch.randn(IMAGE) * 9)
    assert "bn" in sites(result)
    _, result = fold(lambda m, x: m.bn2(m.conv2(F.relu(m.bn(m.conv(x))))) * (2 if positive(x) else 3))
    assert sites(result) == {"bn", "bn2"}


def test_item_tolist_and_numpy() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        scale = max(y.abs().max().item(), 1e-3)
        parts = torch.tensor(y.mean((0, 2, 3)).tolist(), dtype=y.dtype).view(1, 3, 1, 1)
        return m.bn2(m.conv2(y / scale)) + torch.from_numpy(np.tanh(y.numpy())) + parts

    _, result = fold(way)
    assert sites(result) == {"bn", "bn2"}
    assert result.parity is not None
    assert result.parity.passed


@pytest.mark.parametrize("read", [lambda y: y.numpy(), lambda y: np.asarray(y), lambda y: np.array(y.tolist())])
def test_numpy_between_the_layer_and_its_norm(read: Callable[[Tensor], Any]) -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + torch.from_numpy(np.tanh(read(y))).to(y.dtype)

    _, result = fold(way)
    assert "also used by" in why(result, "bn")


@pytest.mark.parametrize(
    "decide",
    [
        positive,
        lambda x: x.sum().item() > 0,
        lambda x: int((x > 0).sum()) > x.numel() // 2,
        lambda x: torch.equal(x, x.abs()),
        lambda x: not torch.allclose(x, -x.abs()),
    ],
    ids=["bool", "item", "int", "equal", "allclose"],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_norm_that_the_other_side_skips(decide: Callable[[Tensor], bool], sign: int) -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) if decide(x) else y

    # One input, that goes one way: the other is known all the same.
    _, result = fold(way, sign * torch.rand(IMAGE))
    assert not result.edits


def test_a_norm_that_some_runs_reach() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        boxes = (x.mean((2, 3)) > 0).nonzero()
        return m.bn2(m.conv2(y[: len(boxes)])) if len(boxes) else y  # a size, not a number: nobody reads it

    _, result = fold(way, torch.rand(IMAGE), -torch.rand(IMAGE))
    assert sites(result) == {"bn"}
    assert "some of the recorded runs don't reach it" in why(result, "bn2")


def test_both_ways_of_an_input_that_goes_both() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) if positive(x) else m.bn2(y)

    _, result = fold(way)
    assert not result.edits


def test_a_loop_that_data_end() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        for _ in range(20):
            x = m.bn(m.conv(x)) * 0.3
            if x.abs().max() < 1:
                break
        return x

    _, result = fold(way)
    assert sites(result) == {"bn"}


def test_a_turned_decision_that_never_ends_is_given_up() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        steps = x.abs().mean().item()
        while steps > 0:  # turned below zero at once, or with `!=` never
            steps -= 1
            x = x + 0
        count = int((x > 1e9).sum())
        while count != 0:  # none as it is; one when turned
            x = x + 0
        return m.bn(m.conv(x))

    _, result = fold(way)
    assert sites(result) == {"bn"}


class Many(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.pairs = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.pairs:
            x = pair(x)
            for value in x.mean((0, 2, 3)):
                x = x * 2 if value > 0 else x
        return x


def test_each_decision_is_turned_once_for_what_ran_before_it() -> None:
    facts = gather(lived_in(Many(3)), [as_call(torch.randn(IMAGE))])
    assert 1 + 3 <= len(facts.routes) <= 1 + 2 * 3  # behind each norm: above zero, or not, or both
    assert len(facts.notes) == 3


def test_many_decisions_are_bounded_and_said() -> None:
    facts = gather(lived_in(Many(TURNS + 4)), [as_call(torch.randn(IMAGE))])
    assert len(facts.routes) == 1 + TURNS
    assert "more were not" in facts.notes[3]


def test_same_module_called_twice() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x))
        return m.bn(m.conv(y)) if positive(x) else m.bn(m.conv(-y))

    model, result = fold(way)
    assert sites(result) == {"bn"}
    facts = gather(model, [as_call(torch.randn(IMAGE))])
    sites_of_bn = {str(facts.routes[r].ops[i].site) for n in facts.norms if n.path == "bn" for r, i in n.calls}
    assert sites_of_bn == {"bn", "bn@1"}


def test_second_call_without_the_norm() -> None:
    _, result = fold(lambda m, x: m.conv(m.bn(m.conv(x))) if positive(x) else m.bn(m.conv(x)))
    assert "shared" in why(result, "bn")


@pytest.mark.parametrize("where", ["conv", "bn", "layer"])
def test_hook_between(where: str) -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential()
            self.layer.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
            if where == "bn":
                self.bn.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
            else:
                target = self.layer if where == "layer" else self.layer.conv
                target.register_forward_hook(lambda _m, _a, out: out if bool(out.sum() > 1e9) else None)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.layer(x))
            return y if y.sum() > 0 else -y

    model = lived_in(Hooked())
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert not result.edits
    assert result.model is not None
    x = torch.randn(IMAGE)
    assert torch.equal(result.model(x), model(x))


@pytest.mark.parametrize(
    "guard",
    [
        torch.no_grad,
        torch.inference_mode,
        pytest.param(
            functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=False),
            marks=pytest.mark.skipif(
                tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8),
                reason="torch 2.7 exports the side taken of an `if` inside autocast, without a word",
            ),
        ),
    ],
)
def test_norms_in_blocks(guard: Callable[[], Any]) -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        with guard():
            y = m.bn(m.conv(x))
            return y if positive(y) else -y

    _, result = fold(way)
    assert sites(result) == {"bn"}


def test_autocast_gives_the_types_that_really_ran() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = m.bn(m.conv(x))
        return y if positive(y) else -y

    model = lived_in(Pair(way))
    facts = gather(model, [as_call(torch.randn(IMAGE))])
    assert {o.dtype for o in facts.routes[0].ops if o.kind in ("conv", "norm")} == {"bfloat16"}
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert result.parity is not None
    assert result.parity.verdict in ("passed", "warned", "inconclusive")
    x = torch.randn(IMAGE)
    assert result.model is not None
    with torch.no_grad():
        error = relative_error(result.model(x).float().abs(), model(x).float().abs())
    assert error < 2**-6  # three roundings to eight bits


def test_state_that_the_first_run_fills() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.offset: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.offset is None:
                self.offset = torch.arange(3.0).view(1, 3, 1, 1)
            y = self.bn(self.conv(x)) + self.offset
            return y if y.sum() > 0 else -y

    model = lived_in(Cached())
    facts = gather(model, [as_call(torch.randn(IMAGE))])
    assert facts.written == ("offset",)
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert sites(result) == {"bn"}
    assert vars(model)["offset"] is None
    assert result.model is not None
    x = torch.randn(IMAGE)
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(result.model(x), model(x)) < 1e-5


def test_a_norm_that_is_skipped_once_the_cache_is_full() -> None:
    class Skips(nets.DataDependent):
        def __init__(self) -> None:
            super().__init__()
            self.ready = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            if self.ready:
                return y
            self.ready = True
            return self.bn(y) if y.sum() > -1e9 else -self.bn(y)

    result = bnfix.fold(lived_in(Skips()), torch.randn(IMAGE))
    assert not result.edits


def test_an_output_in_an_object_that_nobody_can_look_into() -> None:
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    def way(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        z = m.bn(y)
        return (z if positive(z) else -z), Box(y)

    model = lived_in(Pair(way))
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert not result.edits


def test_weights_that_the_code_reads_as_numbers() -> None:
    _, result = fold(lambda m, x: m.bn(m.conv(x)) * (m.bn.weight.abs().sum().item() if positive(x) else 1))
    assert "its weight is also read by" in why(result, "bn")
    _, result = fold(lambda m, x: m.bn(m.conv(x)) + (float(m.conv.weight[0, 0, 0, 0]) if positive(x) else 1))
    assert "conv.weight is also read by" in why(result, "bn")


def test_changed_in_place_behind_the_layer() -> None:
    _, result = fold(lambda m, x: m.bn(m.conv(x).relu_()) * (1 if positive(x) else 2))
    assert "bn" not in sites(result)

    def through_a_part(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[:, 0].clamp_(min=0)
        return m.bn(y) if positive(x) else m.bn(y) * 2

    _, result = fold(through_a_part)
    assert "bn" not in sites(result)


def test_a_scripted_function_inside_is_seen() -> None:
    scripted = torch.jit.script(_twice_if_positive)

    def way(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.bn(y) + scripted(y) if positive(x) else m.bn(y) - scripted(y)

    _, result = fold(way)
    assert not result.edits


def _twice_if_positive(y: Tensor) -> Tensor:
    if bool(y.sum() > 0):
        return y * 2
    return y


# --------------------------------------------------------------------------- decisions and proof


def test_a_run_held_to_decisions_takes_them_and_says_what_it_would_have_done() -> None:
    def way(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = m.bn(m.conv(x)).flatten()
        values, indices = y.topk(5)
        kept = y[y > 0]
        return values, indices, kept if kept.sum() > 0 else kept + 1

    model = lived_in(Pair(way))
    call = as_call(torch.randn(IMAGE))
    _, tape = observed.trace(copy_model(model)[0], call, lambda _: None)
    own = tape.blank()
    with torch.no_grad(), held(own):
        again = call.run(model)
    assert (own.differs, own.lost) == (0, "")
    assert all(torch.equal(a, b) for a, b in zip(again, call.run(model), strict=True))
    other = tape.blank()
    with torch.no_grad(), held(other):
        values, indices, kept = call.map(lambda t: t.flip(0)).run(model)
    assert other.differs > 5
    assert torch.equal(indices, again[1])
    assert kept.shape == again[2].shape
    assert not torch.equal(values, again[0])
    wrong = tape.blank()
    with torch.no_grad(), held(wrong):
        call.run(lived_in(Pair(lambda m, x: m.bn(m.conv(x)).flatten().sort()[0])))
    assert "sort" in wrong.lost


def test_an_error_is_not_hidden_by_a_number_that_is_held() -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        return x * m.bn(m.conv(x)).abs().max().item()

    model = lived_in(Pair(way))
    call = as_call(torch.randn(IMAGE))
    facts = gather(model, [call])
    (bound,) = hold(facts.binding.runs, [call])
    with torch.no_grad():
        expected = call.run(model)
        assert torch.equal(bound.run(model), expected)
        model.bn.weight.mul_(1.5)
        assert relative_error(bound.run(model), expected) > 0.2


def test_the_proof_sees_an_error_behind_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    def way(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.conv(x)).flatten()
        return y.topk(7)[1] if positive(x) else y.topk(7)[1] + 1  # nothing but indices, held as they were

    real = folding.operate

    def spoiled(facts: Any, folded: Any, surgeon: Any, *more: Any, **options: Any) -> Any:
        edits = real(facts, folded, surgeon, *more, **options)
        if folded.folds and surgeon.memo is not None:
            for owner in facts.binding.owners.modules.values():
                if isinstance(owner, nn.Conv2d) and owner.kernel_size == (3, 3):
                    with torch.no_grad():
                        surgeon.memo[id(owner)].weight.mul_(1.01)
        return edits

    model = lived_in(Pair(way))
    assert sites(bnfix.fold(model, torch.randn(IMAGE))) == {"bn"}
    monkeypatch.setattr(folding, "operate", spoiled)
    result = bnfix.fold(model, torch.randn(IMAGE))
    assert not result.edits
    assert any(r.defect for r in result.refusals)


# --------------------------------------------------------------------------------------- detectors


def detector(norm: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """Torchvision's Faster R-CNN, proposals, non-maximum suppression and all, on a backbone of three layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into, out in ((3, 8), (8, 12), (12, 16)):
        layers += [nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False), norm(out), nn.ReLU(inplace=True)]
    backbone = nn.Sequential(*layers)
    backbone.out_channels = 16  # type: ignore[assignment]
    return FasterRCNN(
        backbone,
        num_classes=4,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        min_size=64,
        max_size=128,
        rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_test=30,
        box_score_thresh=0.2,
        box_detections_per_img=10,
    ).eval()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_detector(norm: type[nn.Module]) -> None:
    model = lived_in(detector(norm))
    before = bits(model)
    images = [torch.rand(3, 64, 80), torch.rand(3, 72, 64)]
    result = bnfix.fold(model, Call((images,)))
    assert same_bits(model, before)
    assert result.source == "observed"
    assert sites(result) == {"backbone.1", "backbone.4", "backbone.7"}
    assert not result.refusals
    assert result.parity is not None
    assert result.parity.verdict in ("passed", "warned")
    assert any("decisions on data" in n for n in result.parity.notes)
    assert all(e.noise_ratio is not None and e.noise_ratio < 8 for e in result.edits)
    assert result.model is not None
    other = [torch.rand(3, 96, 64)]
    with torch.no_grad():
        expected, found = model(other)[0], result.model(other)[0]
    assert len(expected["boxes"]) == len(found["boxes"]) > 0
    assert relative_error(found["boxes"], expected["boxes"]) < 1e-4  # boxes are exponentials of what is predicted
    assert torch.equal(found["labels"], expected["labels"])


def test_in_place_and_dry_run() -> None:
    model = lived_in(detector())
    before = bits(model)
    call = Call(([torch.rand(3, 64, 80)],))
    dry = bnfix.fold(model, call, dry_run=True)
    assert dry.model is None
    assert same_bits(model, before)
    with torch.no_grad():
        expected = model.backbone(torch.stack(call.args[0]))
    result = bnfix.fold(model, call, inplace=True)
    assert result.model is model
    assert sites(result) == sites(dry)
    assert nets.norms_left(model) == 0
    with torch.no_grad():
        assert relative_error(model.backbone(torch.stack(call.args[0])), expected) < 1e-5
