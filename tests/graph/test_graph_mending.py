"""Fixes that need the model alone: exact, whole or not at all, and everything else as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import bits, lived_in, same_bits
from torch import Tensor, nn

from bnfix.graph import mend
from bnfix.types import Fix


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    lived_in(model)
    return model


@pytest.mark.parametrize("options", [{"momentum": 0.01}, {"eps": 1e-3}, {"track_running_stats": False}])
def test_set_changes_these_attributes_and_nothing_else(options: dict[str, Any]) -> None:
    model = net()
    before, other = bits(model), {k: v for k, v in vars(model[1]).items() if k not in options}
    (edit,) = mend(model, Fix("set", "", ("1",), options))
    (name, value), *_ = options.items()
    assert getattr(model[1], name) == value
    assert getattr(model[4], name) != value
    assert {k: v for k, v in vars(model[1]).items() if k not in options} == other
    assert same_bits(model, before)
    assert (edit.action, edit.site, edit.after) == ("set", "1", f"{name}={value}")
    assert mend(model, Fix("set", "", ("1",), options)) == ()  # it is so already


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float_keeps_outputs_to_the_bit_and_the_objects_that_others_hold(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    model[1].register_buffer("tied", model[1].running_mean)
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    held = [*model[1].parameters(), *model[1].buffers()]
    model(x).float().sum().backward()
    before = model(x).detach()
    edits = mend(model, Fix("float", "", ("1", "4")))
    assert [e.site for e in edits] == ["1", "4"]
    assert [*model[1].parameters(), *model[1].buffers()] == held or all(
        a is b for a, b in zip([*model[1].parameters(), *model[1].buffers()], held, strict=True)
    )
    assert {t.dtype for t in held if t.is_floating_point()} == {torch.float32}
    assert model[1].weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert model[1].tied.data_ptr() == model[1].running_mean.data_ptr()  # type: ignore[operator, union-attr]
    assert model[0].weight.dtype == dtype
    after = model(x).detach()
    assert after.dtype == dtype
    # torch's kernels compute 16-bit norms in float32 either way, and widening is exact.
    assert torch.equal(after, before)


def test_reset_registers_what_is_not_there() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False, track_running_stats=False)).double()
    (edit,) = mend(model, Fix("reset", "", ("1",)))
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.track_running_stats
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert (norm.running_mean.tolist(), norm.running_var.tolist()) == ([0.0] * 4, [1.0] * 4)
    assert norm.running_var.dtype == torch.float64  # as the model's
    assert edit.after == "running statistics"
    assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= model.state_dict().keys()
    reference = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)).double()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(model.train()(x), reference(x), rtol=0, atol=0)
    torch.testing.assert_close(norm.running_var, reference[1].running_var, rtol=0, atol=0)  # type: ignore[arg-type]


def test_values_that_are_there_stay() -> None:
    model = net()
    model[1].track_running_stats = False  # type: ignore[assignment]
    before = bits(model)
    mend(model, Fix("reset", "", ("1",)))
    assert model[1].track_running_stats
    assert same_bits(model, before)


def test_an_alias_is_mended_once() -> None:
    model = net()
    model.add_module("again", model[1])
    assert len(mend(model, Fix("set", "", ("1", "again"), {"momentum": 0.5}))) == 1


@pytest.mark.parametrize(
    ("fix", "said"),
    [
        (Fix("set", "", ("1", "3"), {"eps": 1.0}), "3 is no norm"),
        (Fix("set", "", ("1", "nowhere"), {"eps": 1.0}), "nowhere is no norm"),
        (Fix("set", "", ("1",), {"forward": 1}), "forward is no attribute"),
        (Fix("recalibrate", "", ("1",)), "another verb"),
    ],
)
def test_what_can_not_be_done_changes_nothing(fix: Fix, said: str) -> None:
    model = net()
    before, attributes = bits(model), dict(vars(model[1]))
    with pytest.raises(ValueError, match=said):
        mend(model, fix)
    assert same_bits(model, before)
    assert vars(model[1]) == attributes


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("verb", ["set", "float", "reset"])
def test_all_sites_or_none(verb: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = net().half() if verb == "float" else net()
    if verb == "reset":
        for i in (1, 4):
            model[i].running_mean = model[i].running_var = None  # type: ignore[assignment]
    before = copy.deepcopy(model.state_dict())
    held = [t for m in (model[1], model[4]) for t in (*m._parameters.values(), *m._buffers.values())]
    attributes = [dict(vars(model[i])) for i in (1, 4)]
    from bnfix.graph import mending

    shown, calls = mending._shown, []

    def fails_at_the_last(norm: Any, fix: Fix) -> str:
        calls.append(norm)
        if len(calls) == 4:
            raise error("stopped")
        return shown(norm, fix)

    monkeypatch.setattr(mending, "_shown", fails_at_the_last)
    with pytest.raises(error):
        mend(model, Fix(verb, "", ("1", "4"), {"momentum": 0.7} if verb == "set" else {}))
    assert len(calls) == 4
    now = [t for m in (model[1], model[4]) for t in (*m._parameters.values(), *m._buffers.values())]
    assert all(a is b for a, b in zip(now, held, strict=True))
    state: dict[str, Tensor] = model.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in before.items())
    assert [dict(vars(model[i])) for i in (1, 4)] == attributes
