"""Tensors without values, and statistics that share one place in memory: refused before any work, with a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import bits, lived_in, same_bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from trap_nets import Two, images

import bnfix
from bnfix.errors import CalibrationError


def untouched(model: nn.Module) -> Callable[[], None]:
    """Says no where anything about the tensors of ``model`` is another: identity, place, strides, bits."""
    tensors = [*model.parameters(), *model.buffers()]
    before = [(id(t), t.stride(), t.device, None if t.is_meta else t.detach().clone()) for t in tensors]

    def check() -> None:
        for t, (identity, stride, device, value) in zip([*model.parameters(), *model.buffers()], before, strict=True):
            assert (id(t), t.stride(), t.device) == (identity, stride, device)
            assert value is None or torch.equal(t, value)

    return check


def never_read() -> Any:
    raise AssertionError("the data was read")
    yield


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("options", [{}, {"dry_run": True}, {"method": "population"}], ids=["", "dry", "stream"])
def test_an_expanded_running_buffer(name: str, options: dict[str, Any]) -> None:
    model = lived_in(Two())
    setattr(model.bn1, name, torch.ones(1).expand(4))
    check = untouched(model)
    with pytest.raises(CalibrationError, match=f"bn1: its {name} is expanded, all 4 channels are one number") as caught:
        bnfix.recalibrate(model, never_read(), **options)
    check()
    line = (caught.value.hint or "").replace("  ", "")
    exec(line, {"model": model})  # the hint is what helps
    assert bnfix.recalibrate(model, images()).changed


def test_an_expanded_buffer_that_nobody_writes_to() -> None:
    model = lived_in(Two())
    model.bn1.running_mean = torch.zeros(1).expand(4)
    model.register_buffer("ones", torch.ones(1).expand(4))
    assert bnfix.recalibrate(model, images(), select="bn2").changed
    assert model.bn1.running_mean.stride() == (0,)


def test_an_expanded_buffer_of_a_functional_norm() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("m", torch.zeros(1).expand(3))
            self.register_buffer("v", torch.ones(3))

        def forward(self, x: Tensor) -> Any:
            return torch.nn.functional.batch_norm(x, self.m, self.v)  # type: ignore[arg-type]

    model = Functional()
    check = untouched(model)
    with pytest.raises(CalibrationError, match=r"m: its running_mean is expanded.*\n.*torch.zeros\(3\)"):
        bnfix.recalibrate(model, images())
    check()


def test_a_model_on_the_meta_device() -> None:
    for model, name in ((Two().to("meta"), "conv1.weight"), (Two(), "conv2.weight")):
        model.conv2.to("meta")
        check = untouched(model)
        with pytest.raises(CalibrationError, match=f"^{name} is on the meta device: it has no values\n.*to_empty"):
            bnfix.recalibrate(model, never_read())
        check()


def test_weights_that_accelerate_brings_when_they_are_needed() -> None:
    model = lived_in(Two())
    weights = model.conv2.weight
    model.conv2.weight = nn.Parameter(weights.to("meta"))

    def bring(module: nn.Module, _args: Any) -> None:
        module.weight = weights

    def take(module: nn.Module, _args: Any, _out: Any) -> None:
        module.weight = nn.Parameter(weights.to("meta"))

    model.conv2._hf_hook = object()  # type: ignore[assignment]
    model.conv2.register_forward_pre_hook(bring)
    model.conv2.register_forward_hook(take)
    assert bnfix.recalibrate(model, images()).changed


def test_inside_a_fake_tensor_mode() -> None:
    model = lived_in(Two())
    before = bits(model)
    for options in ({}, {"allow_non_fake_inputs": True}):
        with FakeTensorMode(**options), pytest.raises(CalibrationError, match="called inside a FakeTensorMode"):
            bnfix.recalibrate(model, never_read())
    assert same_bits(model, before)


def test_a_model_of_fake_tensors() -> None:
    with FakeTensorMode():
        model = Two()
    with pytest.raises(CalibrationError, match=r"conv1.weight is a fake tensor: it has no values\n.*outside"):
        bnfix.recalibrate(model, never_read())


def test_data_without_values() -> None:
    model = lived_in(Two())
    before = bits(model)
    with FakeTensorMode():
        fake = torch.ones(4, 3, 6, 6)
    with pytest.raises(CalibrationError, match="batch 1 holds a tensor that is a fake tensor"):
        bnfix.recalibrate(model, [images()[0], fake])
    with pytest.raises(CalibrationError, match=r"batch 1 can't be brought to the model: .*meta"):
        bnfix.recalibrate(model, [images()[0], torch.ones(4, 3, 6, 6, device="meta")])
    assert same_bits(model, before)
