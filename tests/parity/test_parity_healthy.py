"""Healthy architectures raise no alarm, and an error in one channel does: on networks as they are deployed.

The ratios here were measured for twelve architectures (see bnfix.parity.rule): at most 1.72. A limit of 4 for a test
leaves room for other machines' kernels, and is where bnfix would begin to warn.
"""

from __future__ import annotations

import copy

import pytest
import torch
from parity_models import perturbed
from torch import nn
from torch.fx.experimental.optimization import fuse

from bnfix.parity import verify

torchvision = pytest.importorskip("torchvision")

NAMES = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "densenet121")


def calibrated(name: str) -> nn.Module:
    """The architecture with statistics that fit its random weights, moved by some tenths."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None
    with torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
        for norm in norms:
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.7, 1.4)
            norm.weight.uniform_(0.6, 1.4)
            norm.bias.normal_(0, 0.2)
    return model.eval()


def inputs() -> list[torch.Tensor]:
    return [torch.randn(b, 3, 64, 64, generator=torch.Generator().manual_seed(b)) for b in (1, 2)]


@pytest.mark.parametrize("name", NAMES)
def test_healthy_folds_and_files_raise_no_alarm(name, tmp_path):
    model = calibrated(name)
    fold = verify(model, fuse(model), inputs())
    assert (fold.verdict, fold.outputs[0].noise_ratio < 4) == ("passed", True)
    pytest.importorskip("onnxruntime")
    file = str(tmp_path / "m.onnx")
    torch.onnx.export(model, (inputs()[0],), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    onnx = verify(model, file, inputs())
    assert (onnx.verdict, onnx.outputs[0].noise_ratio < 4) == ("passed", True)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_five_percent_in_one_channels_variance_is_found_in_any_of_three_layers(name):
    model = calibrated(name)
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for path in (norms[1], norms[len(norms) // 2], norms[-1]):
        wrong = copy.deepcopy(model)
        wrong.get_submodule(path).running_var[1] *= 1.05
        found = verify(model, wrong, inputs())
        assert found.verdict == "failed", path
        assert found.first_divergence == path


def test_norms_of_a_fresh_model_are_perturbed_in_these_tests():
    means = [m.running_mean.abs().mean() for m in perturbed(calibrated("resnet18")).modules() if hasattr(m, "eps")]
    assert min(means) > 0.1
