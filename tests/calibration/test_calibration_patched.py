"""Functions of torch that somebody has replaced for good: what a wrapper does is done once, as in a plain forward."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calib_nets import FIBERS, norm_inputs
from torch import Tensor
from trap_nets import EXACT, Two, exact, images

import bnfix


def scaled(function: Callable[..., Any], by: float) -> Callable[..., Any]:
    def wrapper(x: Any, *args: Any, **kwargs: Any) -> Any:
        return function(x, *args, **kwargs) * by

    return wrapper


def scaled_before(function: Callable[..., Any], by: float) -> Callable[..., Any]:
    def wrapper(x: Any, *args: Any, **kwargs: Any) -> Any:
        return function(x * by, *args, **kwargs)

    return wrapper


class Many(Two):
    """Uses functions of several kinds."""

    def forward(self, x: Tensor) -> Any:
        y = F.max_pool2d(self.first(x), 3, 1, 1) + F.softmax(x[:, :1].flatten(1), 1).view(-1, 1, 6, 6)
        y = y + torch.einsum("nchw->nhwc", y).permute(0, 3, 1, 2) + F.silu(y) + y.norm(dim=1, keepdim=True)
        return self.second(F.relu(y))


FUNCTIONS = [(F, "relu"), (F, "softmax"), (F, "silu"), (F, "max_pool2d"), (torch, "einsum"), (Tensor, "norm")]


@pytest.mark.parametrize("count", [40, 400])
@pytest.mark.parametrize(("home", "name"), FUNCTIONS, ids=[name for _, name in FUNCTIONS])
def test_a_function_of_torch_replaced_by_a_wrapper(
    home: Any, name: str, count: int, monkeypatch: pytest.MonkeyPatch, parked: str
) -> None:
    wrap = (lambda f, by: lambda e, x: f(e, x) * by) if name == "einsum" else scaled
    monkeypatch.setattr(home, name, wrap(getattr(home, name), 1.5))
    assert exact(Many(), images(count)).engine == ("one chunk" if count == 40 else parked)


def test_a_wrapper_that_is_wrapped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "relu", scaled(scaled(F.relu, 1.5), 1.5))
    exact(Many(), images())


def test_batch_norm_itself_replaced_by_a_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm sees what the wrapper gives it."""
    monkeypatch.setattr(F, "batch_norm", scaled_before(F.batch_norm, 2.0))
    model = Two()
    model.eval()
    report = bnfix.recalibrate(model, images())
    assert report.left == ()
    for name, x in norm_inputs(model, images()).items():
        norm: Any = model.get_submodule(name)
        sees = x * 2
        assert ((sees.mean(1) - norm.running_mean.double()).abs() / sees.std(1)).max() <= EXACT
        assert (sees.var(1) / norm.running_var.double() - 1).abs().max() <= EXACT


def test_batch_norm_replaced_before_bnfix_was_there() -> None:
    code = """
import torch, torch.nn.functional as F
own = F.batch_norm
F.batch_norm = lambda x, *args, **kwargs: own(x * 2, *args, **kwargs)
import bnfix
model = torch.nn.Sequential(torch.nn.BatchNorm1d(2)).eval()
x = torch.arange(8.0).view(4, 2) ** 2
assert bnfix.recalibrate(model, [x]).left == ()
assert torch.allclose(model[0].running_mean, 2 * x.mean(0)), model[0].running_mean
"""
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


def test_a_function_of_a_library_that_hands_on_as_torch_does() -> None:
    """It is no wrapper of torch's: it is told of by itself."""
    from torch.overrides import handle_torch_function, has_torch_function_unary

    def twice(x: Tensor) -> Any:
        if has_torch_function_unary(x):
            return handle_torch_function(twice, (x,), x)
        return x * 2

    class Net(Two):
        def forward(self, x: Tensor) -> Any:
            return self.second(twice(self.first(x)))

    assert exact(Net(), images()).engine == FIBERS
