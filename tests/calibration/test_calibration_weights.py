"""Forwards that write to large weights (``max_norm``, clamped weights): they get their values back, all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnfix
from bnfix.errors import CalibrationError

SIZE = 300
"""SIZE² numbers are more than are copied in any case."""


def _added(weight: nn.Parameter) -> None:
    weight.data += 0.5 - weight.data


def _assigned(weight: nn.Parameter) -> None:
    weight.data[3:] = 0.5


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "renorm_": lambda w: w.data.renorm_(2, 0, 0.5),
    "clamp_ under no_grad": lambda w: w.clamp_(-0.01, 0.01),
    "a view": lambda w: w.detach().view(-1)[: SIZE * 3].fill_(0.25),
    "+=": _added,
    "item assignment": _assigned,
    "out=": lambda w: torch.clamp(w.data, -0.01, 0.01, out=w.data),
    "nn.init": lambda w: nn.init.constant_(w, 0.1),
    "foreach": lambda w: torch._foreach_clamp_min_([w.data], 0.01),
    "operator": lambda w: torch.ops.aten.relu_(w.data),
    "overload": lambda w: torch.ops.aten.clamp_.default(w.data, -0.01, 0.01),
    "max_norm": lambda w: F.embedding(torch.arange(100), w, max_norm=0.1),
}


class Writes(nn.Module):
    """A layer whose forward writes to its weight before it uses it, in evaluation mode too; a second time, the same."""

    def __init__(self, write: Callable[[nn.Parameter], object]) -> None:
        super().__init__()
        self.inner, self.norm, self.write = nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE), write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self.inner.weight)
        return self.norm(self.inner(x))


def _model(write: Callable[[nn.Parameter], object]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(SIZE), Writes(write), nn.Linear(SIZE, 5), nn.BatchNorm1d(5)).train()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def _batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, SIZE) * 2 + 1 for n in (16, 16, 9)]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _assert_intact(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, now in model.named_parameters():
        assert torch.equal(now, before[name]), name


@pytest.mark.parametrize("write", WRITES)
def test_large_weights_that_a_forward_writes_to(write: str) -> None:
    model = _model(WRITES[write])
    before, places = _weights(model), [p.data_ptr() for p in model.parameters()]
    bnfix.recalibrate(model, _batches())
    assert [p.data_ptr() for p in model.parameters()] == places
    _assert_intact(model, before)
    with torch.no_grad():
        model.eval()(_batches()[0])
    assert not torch.equal(model[1].inner.weight, before["1.inner.weight"])  # the forward does write


def test_large_weights_that_are_written_before_the_loader_fails() -> None:
    model = _model(WRITES["renorm_"])
    before = _weights(model)

    def loader() -> Iterator[Tensor]:
        yield from _batches()
        raise OSError("gone")

    with pytest.raises(CalibrationError, match="gone"):
        bnfix.recalibrate(model, loader(), method="online")
    _assert_intact(model, before)


def test_check_leaves_large_weights_that_a_forward_writes_to() -> None:
    model = _model(WRITES["clamp_ under no_grad"])
    before = _weights(model)
    bnfix.check(model, data=_batches())
    _assert_intact(model, before)


def test_tied_weights_are_kept_once_and_both_intact() -> None:
    model = _model(WRITES["+="])
    model.add_module("tied", Writes(WRITES["+="]))
    model.tied.inner.weight = model[1].inner.weight
    model = nn.Sequential(model[1], model.tied)
    before = _weights(model)
    bnfix.recalibrate(model, _batches())
    _assert_intact(model, before)
